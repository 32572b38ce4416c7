"""What `python train.py --help` prints; reads the option files' first lines, composes nothing."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from tritter.conf_folder import config_folder
from tritter.config.folders import LADDERS, Options, option_files
from tritter.errors import RequestError, did_you_mean

_WIDTH = 79

_HEAD = """\
Tritter grows a language model, trains it on new text without losing the old,
and keeps the result only if a gate says so. Without arguments everything it
needs is on this machine: it trains a small base on the Python documentation,
makes it wider, and teaches it Python source.

Usage
  python train.py [GROUP=OPTION ...] [KEY=VALUE ...] [-m]

Examples
  python train.py
      the default job: a minute and a half on two cores, nothing downloaded
  python train.py 'expansion=[width,llama_pro]' 'forgetting=[l2sp,replay]'
      two expansions in order, two protections; with control=true behind it the
      un-grown base beside them
  python train.py -m expansion=dus,llama_pro forgetting=none,replay seed=0,1,2
      a sweep: 12 runs, all checked before the first starts, then one table

Groups (an option brings all its keys; - and _ are the same; [A,B] is an
ordered list)"""

_TAIL = """\
Keys
  Every key of an option can be set: training.max_steps=400,
  expansion.width.hidden_size=128.
  At the root: seed, control, cache_dir, resume (latest, or a run's folder).
  GROUP=OPTION --help lists the keys of an option, with their defaults.
  --cfg job prints all keys and values of a command line and runs nothing.

Results
  outputs/runs/TIME/ (with -m: outputs/sweeps/TIME/0, 1, ...): summary.json,
  metrics.csv, plots, checkpoint/, status.json, the resolved config.
  hydra.run.dir=DIR chooses the folder; the same command with the same folder,
  or resume=latest, goes on where it stopped.

Flags
  -m, --multirun       every combination of the listed values
  -h, --help           this text
  --cfg job|hydra|all  show, don't run
  --hydra-help         all flags
  --version            the version of Tritter
  --config-dir DIR     your own options, the same as hydra.searchpath=[DIR]
                       (docs/how-to/write_an_extension.md)
  --config-name F      begin with F.yaml instead of config.yaml
  -sc install=bash     eval "$(python train.py -sc install=bash)", and TAB
                       completes all of this

Exit codes
  0 finished, whatever the gate said
  1 failed
  2 the request is wrong, nothing was written
  3 gate=strict and the grown model was not kept"""


def help_text(words: Sequence[str] = ()) -> str:
    """Return the help: of the options that are chosen, else every group's options.

    Raises:
        RequestError: there is no such option.
    """
    files = option_files()
    chosen = [word.lstrip("+").partition("=") for word in words]
    asked = [(group, name) for group, _, name in chosen if group.replace("-", "_") in files]
    if asked:
        return "\n\n".join(_of_group(group, names, files) for group, names in asked)
    text = (config_folder() / "config.yaml").read_text(encoding="utf-8")
    entries = [line.strip() for line in text.splitlines() if line.startswith("  - ")]
    pairs = [entry[2:].partition(": ") for entry in entries if ": " in entry]
    defaults = {group: option for group, _, option in pairs}  # in the order of the defaults list
    blocks = [_HEAD]
    for group in dict.fromkeys([*defaults, *files]):
        default = defaults.get(group, "null")
        told = f"default: {default}" if default != "null" else "none set"
        told = f"{told}; chosen as gate.ladder=NAME" if group == LADDERS else told
        lines = [f"  {group} ({told})"]
        width = max(len(name) for name in files[group])
        for name, path in files[group].items():
            lines += textwrap.wrap(
                description(path),
                width=_WIDTH,
                initial_indent=f"    {name:<{width}}  ",
                subsequent_indent=" " * (6 + width),
            ) or [f"    {name}"]
        blocks.append("\n".join(lines))
    return "\n\n".join([blocks[0] + "\n" + blocks[1], *blocks[2:], _TAIL])


def _of_group(group: str, names: str, files: Options) -> str:
    """Return the keys of options, as their files state and explain them."""
    group, told = group.replace("-", "_"), []
    for name in names.strip("[]").split(","):
        path = files[group].get(name.strip().replace("-", "_"))
        if path is None:
            near = did_you_mean(name, files[group])
            raise RequestError(
                f"{group} = {name}: there is no such option; there are "
                f"{', '.join(files[group])}.{near}"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        body = [line for line in lines if not line.startswith("#") and "_target_:" not in line]
        told.append(f"{group}={path.stem}: {description(path)}\n" + "\n".join(body))
    return "\n\n".join(told)


def description(path: Path) -> str:
    """Return the comment on top of an option file (after Hydra's @package line, if any)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def comments(path: Path) -> dict[str, str]:
    """Return key → the comment behind it in an option file."""
    split = (line.partition(" # ") for line in path.read_text(encoding="utf-8").splitlines())
    return {line.partition(":")[0].strip(): told.strip() for line, _, told in split if told}

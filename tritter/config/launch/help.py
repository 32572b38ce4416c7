"""The output of `python train.py --help`, built from option files without composing a config."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from tritter.conf_folder import config_folder
from tritter.config.folders import LADDERS, Options, option_files
from tritter.errors import RequestError, did_you_mean

_WIDTH = 79

_HEAD = """\
Tritter grows a language model, trains it on new data while limiting
forgetting, and keeps the result only if it passes a gate. The default job
needs no download: it trains a small base model on the Python documentation,
makes it wider, and teaches it Python source code.

Usage
  python train.py [GROUP=OPTION ...] [KEY=VALUE ...] [-m]

Examples
  python train.py
      the default job: a minute and a half on two cores, nothing downloaded
  python train.py 'expansion=[width,llama_pro]' 'forgetting=[l2sp,replay]'
      two expansions in order, two forgetting-mitigation methods; add
      control=true to train the original model (not grown) for comparison
  python train.py -m expansion=dus,llama_pro forgetting=none,replay seed=0,1,2
      a sweep: 12 runs, all validated before the first starts, then one table

Groups (an option sets all keys of its group; - and _ are interchangeable;
[A,B] is an ordered list)"""

_TAIL = """\
Keys
  All keys of an option can be overridden: training.max_steps=400,
  expansion.width.hidden_size=128.
  Root keys: seed, control, cache_dir, resume (latest, or a run folder).
  GROUP=OPTION --help lists the keys of an option with their defaults.
  --cfg job prints the composed config without running it.

Results
  outputs/runs/TIME/ (with -m: outputs/sweeps/TIME/0, 1, ...): summary.json,
  metrics.csv, plots, checkpoint/, status.json, the resolved config.
  hydra.run.dir=DIR sets the folder. Interrupted runs resume: rerun the
  command with the same folder, or pass resume=latest.

Flags
  -m, --multirun       run all combinations of the listed values
  -h, --help           this text
  --cfg job|hydra|all  print the config without running
  --hydra-help         all flags
  --version            the version of Tritter
  --config-dir DIR     folder with your own options (docs/extending.md);
                       equivalent to hydra.searchpath=[DIR]
  --config-name F      compose from F.yaml instead of config.yaml
  -sc install=bash     shell completion: eval "$(python train.py -sc
                       install=bash)"

Exit codes
  0 finished, for any gate verdict
  1 failed
  2 invalid request, nothing was written
  3 gate=strict, and the grown model was not kept"""


def help_text(overrides: Sequence[str] = ()) -> str:
    """Return the help of the selected options, or an overview of all groups.

    Raises:
        RequestError: an option does not exist.
    """
    files = option_files()
    selected = [override.lstrip("+").partition("=") for override in overrides]
    requested = [(group, name) for group, _, name in selected if group.replace("-", "_") in files]
    if requested:
        return "\n\n".join(_group_help(group, names, files) for group, names in requested)
    text = (config_folder() / "config.yaml").read_text(encoding="utf-8")
    entries = [line.strip() for line in text.splitlines() if line.startswith("  - ")]
    pairs = [entry[2:].partition(": ") for entry in entries if ": " in entry]
    defaults = {group: option for group, _, option in pairs}  # in the order of the defaults list
    blocks = [_HEAD]
    for group in dict.fromkeys([*defaults, *files]):
        default = defaults.get(group, "null")
        note = f"default: {default}" if default != "null" else "none set"
        note = f"{note}; select with gate.ladder=NAME" if group == LADDERS else note
        lines = [f"  {group} ({note})"]
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


def _group_help(group: str, names: str, files: Options) -> str:
    """Return the keys of options with the comments of their option files."""
    group, pages = group.replace("-", "_"), []
    for name in names.strip("[]").split(","):
        path = files[group].get(name.strip().replace("-", "_"))
        if path is None:
            near = did_you_mean(name, files[group])
            raise RequestError(
                f"{group} = {name}: there is no such option; available: "
                f"{', '.join(files[group])}.{near}"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        body = [line for line in lines if not line.startswith("#") and "_target_:" not in line]
        pages.append(f"{group}={path.stem}: {description(path)}\n" + "\n".join(body))
    return "\n\n".join(pages)


def description(path: Path) -> str:
    """Return the comment on top of an option file (after Hydra's @package line, if any)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def comments(path: Path) -> dict[str, str]:
    """Return key → comment on the same line of an option file."""
    split = (line.partition(" # ") for line in path.read_text(encoding="utf-8").splitlines())
    return {
        line.partition(":")[0].strip(): comment.strip() for line, _, comment in split if comment
    }

"""The help page of `python train.py`, from the first lines of the option files alone."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritter.conf_folder import config_folder
from tritter.config.folders import CHOSEN_BY, option_files
from tritter.errors import RequestError, did_you_mean

_WIDTH = 99  # of a line; a page of help has at most 100 lines

_HEAD = """\
Tritter grows a language model, trains it on new data, and rolls the result back if the gate
fails, for example if an old domain got worse by more than a bound. The default job pretrains a
small base on the Python documentation, widens it, and trains it on Python source. It downloads
nothing.

Usage
  python train.py [GROUP=OPTION ...] [KEY=VALUE ...] [-m]

Examples
  python train.py
      the default job: 90 seconds on two cores
  python train.py 'expansion=[width,llama_pro]' 'forgetting=[l2sp,replay]' control=true
      two expansions in order, two forgetting mitigation methods, and a control that is not grown
  python train.py -m expansion=dus,llama_pro forgetting=none,replay seed=0,1,2
      a sweep of 12 runs: all are validated before the first starts, one table at the end

{groups}"""

_FOLDED = """\
Groups and options (* default; --help-all describes all, GROUP=OPTION --help lists the keys of one;
- and _ are equivalent; [A,B] is an ordered list)"""
_UNFOLDED = """\
Groups (an option sets defaults of its keys; - and _ are equivalent; [A,B] is an ordered list)"""

_TAIL = """\
Keys
  Any key of an option can be set: training.max_steps=400, expansion.width.hidden_size=128.
  Root keys: seed, control, cache_dir, resume (latest, or the folder of a run).
  --cfg job prints the resolved configuration of a command line and runs nothing.

Results
  outputs/runs/TIME/ (with -m: outputs/sweeps/TIME/0, 1, ...): summary.json, metrics.csv, plots,
  checkpoint/, status.json, the resolved configuration. hydra.run.dir=DIR selects the folder.
  To resume an interrupted run, repeat its command with the same folder, or pass resume=latest.
  A sweep prints one line per finished job; the output of job N goes to its folder, output.txt.

Flags
  -m, --multirun       run every combination of the listed values
  -h, --help           this page
  --help-all           this page with a description of every option
  --cfg job|hydra|all  show the configuration, run nothing
  --hydra-help         flags of Hydra
  --version            version of Tritter
  --config-dir DIR     folder with your own options, the same as hydra.searchpath=[DIR]
                       (docs/how-to/write_an_extension.md)
  --config-name F      start from F.yaml instead of config.yaml
  -sc install=bash     TAB completion in bash: eval "$(python train.py -sc install=bash)"

Exit codes
  0 finished, also after a rollback        2 invalid request, nothing was written
  1 failed                                 3 gate=strict and the grown model was not kept"""


def help_text(arguments: Sequence[str] = (), *, is_full: bool = False) -> str:
    """Return the help page, or the keys of the options that `arguments` select.

    Args:
        arguments: The words of the command line.
        is_full: Describe every option, instead of listing the names of each group.
    """
    files = option_files()
    chosen = [argument.lstrip("+").partition("=") for argument in arguments]
    selected = [(group, name) for group, _, name in chosen if group.replace("-", "_") in files]
    if selected:
        return "\n\n".join(_of_group(group, names, files) for group, names in selected)
    text = (config_folder() / "config.yaml").read_text(encoding="utf-8")
    lines = [line.partition(" #")[0] for line in text.splitlines() if line.startswith("  - ")]
    # In the order of the defaults list
    defaults = dict(line.strip("- ").split(": ") for line in lines if ": " in line)
    groups = [g for g in dict.fromkeys([*defaults, *files]) if g != "family"]
    groups.sort(key=lambda group: defaults.get(group) == "null")  # what few runs need comes last
    if not is_full:
        width = max(map(len, groups))
        lines = [_fold_group(group, files[group], defaults.get(group), width) for group in groups]
        return "\n\n".join([_HEAD.format(groups="\n".join([_FOLDED, *lines])), _TAIL])
    first, *blocks = [_describe_options(g, files[g], defaults.get(g)) for g in groups]
    return "\n\n".join([_HEAD.format(groups=f"{_UNFOLDED}\n{first}"), *blocks, _TAIL])


def _fold_group(group: str, options: Mapping[str, Path], default: str | None, width: int) -> str:
    """Return the names of a group's options, the default marked."""
    chosen = (default or "").strip("[]").split(",")
    names = [f"{name}*" if name in chosen else name for name in options]
    if group in CHOSEN_BY:
        names.append(f"(selected by {CHOSEN_BY[group]}=NAME)")
    return textwrap.fill(
        ", ".join(names).replace(", (", " ("),
        width=_WIDTH,
        initial_indent=f"  {group:<{width}}  ",
        subsequent_indent=" " * (4 + width),
        break_on_hyphens=False,
    )


def _describe_options(group: str, options: Mapping[str, Path], default: str | None) -> str:
    """Return a group's options with the first comment of their files."""
    stated = "no default" if default in (None, "null") else f"default: {default}"
    stated += f"; selected by {CHOSEN_BY[group]}=NAME" if group in CHOSEN_BY else ""
    lines, width = [f"  {group} ({stated})"], max(map(len, options))
    for name, path in options.items():
        lines += textwrap.wrap(
            description(path),
            width=_WIDTH,
            initial_indent=f"    {name:<{width}}  ",
            subsequent_indent=" " * (6 + width),
        ) or [f"    {name}"]
    return "\n".join(lines)


def _of_group(group: str, names: str, files: Mapping[str, Mapping[str, Path]]) -> str:
    """Return the keys of options, as their files state and explain them."""
    group, blocks = group.replace("-", "_"), []
    for name in names.strip("[]").split(","):
        path = files[group].get(name.strip().replace("-", "_"))
        if path is None:
            near = did_you_mean(name, files[group])
            raise RequestError(
                f"{group} = {name}: no such option; available: {', '.join(files[group])}.{near}"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        unread = ("#",) if group == "experiment" else ("#", "defaults:", "  - override /")
        body = [line for line in lines if not line.startswith(unread) and "_target_:" not in line]
        blocks.append(f"{group}={path.stem}: {description(path)}\n" + "\n".join(body))
    return "\n\n".join(blocks)


def description(path: Path) -> str:
    """Return the comment on top of an option file (after Hydra's @package line, if any)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def comments(path: Path) -> dict[str, str]:
    """Return key → the comment after it in an option file."""
    split = (line.partition(" # ") for line in path.read_text(encoding="utf-8").splitlines())
    return {
        line.partition(":")[0].strip(): comment.strip() for line, _, comment in split if comment
    }

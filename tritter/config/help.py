"""What `python train.py --help` prints; reads the option files' first lines, composes nothing."""

import textwrap
from pathlib import Path

from tritter.config.folder import config_folder

_WIDTH = 96

_HEAD = """\
Tritter grows a language model, trains it on new text without losing the old, and keeps the
result only if a gate says so. Without arguments everything it needs is on this machine: it
trains a small base on the Python documentation, makes it wider, and teaches it Python source.

Usage
  python train.py [GROUP=OPTION ...] [KEY=VALUE ...] [-m]

Examples
  python train.py
      the default job: about a minute and a half on two cores, nothing downloaded
  python train.py 'expansion=[width,llama_pro]' 'forgetting=[l2sp,replay]' control=true
      two expansions in order, two protections, and the un-grown base beside them
  python train.py -m expansion=none,dus,llama_pro,width forgetting=none,replay seed=0,1,2
      a sweep: 24 runs, all checked before the first starts, one table at the end

Groups (an option brings all its keys; - and _ are the same; [A,B] is an ordered list)"""

_TAIL = """\
Keys
  Every key of an option can be set: training.max_steps=400, expansion.width.hidden_size=128.
  At the root: seed, control, cache_dir, resume (latest, or the folder of a run).
  --cfg job prints all keys and values of a command line and runs nothing.

Results
  outputs/runs/TIME/ (with -m: outputs/sweeps/TIME/0, 1, ...): summary.json, metrics.csv, plots,
  checkpoint/, status.json, the resolved config. hydra.run.dir=DIR chooses the folder; the same
  command with the same folder, or resume=latest, goes on where it stopped.

Flags
  -m, --multirun   every combination of the listed values     --cfg job|hydra|all   show, don't run
  -h, --help       this text                                  --hydra-help          Hydra's own
  --version        the version of Tritter

Exit codes
  0 finished, whatever the gate said    1 failed    2 the request is wrong, nothing was written
  3 gate=strict and the grown model was not kept"""


def help_text() -> str:
    """Return the help, with every group's options and what they are."""
    folder = config_folder()
    defaults = _defaults(folder)
    blocks = [_HEAD]
    for group, default in defaults.items():
        lines = [f"  {group}" + (f" (default: {default})" if default != "null" else " (none set)")]
        options = sorted((folder / group).glob("*.yaml"))
        width = max(len(path.stem) for path in options)
        for path in options:
            lines += _entry(path.stem, description(path), name_width=width)
        blocks.append("\n".join(lines))
    return "\n\n".join([blocks[0] + "\n" + blocks[1], *blocks[2:], _TAIL])


def description(path: Path) -> str:
    """Return the comment on top of an option file (after Hydra's @package line, if any)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            return line.lstrip("# ").strip()
    return ""


def _defaults(folder: Path) -> dict[str, str]:
    """Read group → default option from config.yaml's defaults list, in its order."""
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    entries = [line.strip() for line in text.splitlines() if line.startswith("  - ")]
    pairs = [entry[2:].partition(": ") for entry in entries if ": " in entry]
    return {group: option for group, _, option in pairs}


def _entry(name: str, text: str, *, name_width: int) -> list[str]:
    indent = " " * (6 + name_width)
    return textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=f"    {name:<{name_width}}  ",
        subsequent_indent=indent,
    ) or [f"    {name}"]

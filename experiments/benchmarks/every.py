"""Runs every benchmark of the README, one after the other, by the commands that stand there.

`python experiments/benchmarks/every.py` takes about an hour on two cores. Tables go to
outputs/benchmarks, beside which the committed ones can be laid. A peer that is not at hand
(mergekit, in an environment of its own) is left out, and that is said.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tritter.terminal import Console

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_CONSOLE = Console()


def commands(output: Path) -> dict[str, list[str]]:
    """Return table → the words that make it, below `output`."""
    lines = re.findall(r"^python (.*)$", (HERE / "README.md").read_text("utf-8"), re.MULTILINE)
    found = {}
    for line in lines:
        words = shlex.split(line)
        tables = [word for word in words if word.endswith(".csv")]
        if tables:  # this script alone writes none
            name = Path(tables[-1]).stem
            found[name] = [
                str(output / f"{name}.csv") if word in tables else word for word in words
            ]
    return found


def run(name: str, words: list[str]) -> bool:
    """Run one benchmark; return whether it came to its end."""
    if "--mergekit" in words and not Path(words[words.index("--mergekit") + 1]).exists():
        at = words.index("--mergekit")
        _CONSOLE.print(f"{name}: {words[at + 1]} is not there; measured without mergekit")
        words = [*words[:at], *words[at + 2 :]]
    table = Path(words[words.index(">") + 1]) if ">" in words else None
    words = words[: words.index(">")] if ">" in words else words
    with (table or Path("/dev/null")).open("w") as file:
        ended = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=file if table else None, check=False
        )
    return ended.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = commands(Path())
    parser.add_argument("--only", nargs="+", choices=sorted(known), default=list(known))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/benchmarks")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    options = parser.parse_args()
    failed = []
    for number, (name, words) in enumerate(commands(options.output.resolve()).items(), 1):
        if name not in options.only:
            continue
        _CONSOLE.print(f"{number}/{len(known)} {name}: python {shlex.join(words)}", soft_wrap=True)
        if options.dry_run:
            continue
        options.output.mkdir(parents=True, exist_ok=True)
        since = time.monotonic()
        if not run(name, words):
            failed.append(name)
        _CONSOLE.print(f"{name}: {time.monotonic() - since:.0f} s")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

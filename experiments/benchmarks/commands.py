"""What commands that run no model cost, and when `tritter expand` begins to write.

    python experiments/benchmarks/commands.py

prints the processor time of each command (user and system, best of 3) as a ratio to `import torch`
in the same run, and the large libraries that it loaded. Byte code is written in a first run of
each. Then a bf16 Llama is expanded: the whole command, its check included, beside `cp` and `sync`
of its result.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.expand_speed import CASES, case_words  # noqa: E402
from experiments.benchmarks.streaming import copy_seconds, write_source  # noqa: E402
from experiments.benchmarks.table import tell  # noqa: E402

LARGE = ("torch", "transformers", "lightning", "datasets", "scipy", "matplotlib", "peft", "wandb")
POLL_SECONDS = 0.01
_RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    program = sys.argv[0]
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
except SystemExit:
    pass
finally:
    print("LOADED", *[name for name in {LARGE} if name in sys.modules], file=sys.stderr)
"""


@dataclass(frozen=True, slots=True)
class Command:
    """What a command cost.

    Args:
        over_torch: processor seconds over those of `import torch`.
        loaded: large libraries.
    """

    command: str
    exit_code: int
    cpu_seconds: float
    over_torch: float
    loaded: str


@dataclass(frozen=True, slots=True)
class Expansion:
    """What a whole `tritter expand` took; ratios are to `cp` and `sync` of its result.

    Args:
        first_written_seconds: from the start of the command to the first byte of a weight file.
        after_torch_seconds: those less the seconds of `import torch` in the same round.
    """

    case: str
    result_mb: int
    seconds: float
    seconds_over_cp: float
    cpu_seconds: float
    cpu_over_cp: float
    first_written_seconds: float
    after_torch_seconds: float


@dataclass(frozen=True, slots=True)
class Ran:
    """How a process ended, and what it took."""

    exit_code: int
    seconds: float
    cpu_seconds: float
    errors: str = ""
    first_written: float = 0.0


def ran(words: Sequence[str], *, writes_below: Path | None = None) -> Ran:
    """Run a command; look for the first weight file that it writes."""
    kept = {k: value for k, value in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began, first = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG if writes_below else 0))[0]:
            if writes_below is not None and not first and _has_begun(writes_below):
                first = time.perf_counter() - began
            time.sleep(POLL_SECONDS)
        _, status, used = ended
        errors.seek(0)
        seconds, text = time.perf_counter() - began, errors.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ran(process.returncode, seconds, used.ru_utime + used.ru_stime, text, first)


def _has_begun(place: Path) -> bool:
    """Return whether a file of weights below a folder has a byte."""
    try:
        return any(path.stat().st_size for path in place.rglob("*.safetensors"))
    except OSError:  # it was renamed meanwhile
        return True


def commands(place: Path) -> dict[str, list[str]]:
    """Return what is measured, after what it is called."""
    source, wide = str(place / "source"), str(place / "wide")
    runs = [str(place / "first"), str(place / "second")]
    grow = ["tritter", "expand", source, "--method"]
    return {
        "tritter --help": ["tritter", "--help"],
        "misspelt option": ["tritter", "expand", "--hepl"],
        "misspelt key": ["train.py", "growht=x"],
        "misspelt key of a section": ["train.py", "trainer.max_stepz=3"],
        "train.py --cfg job": ["train.py", "--cfg", "job"],
        "train.py, missing checkpoint": ["train.py", "model=hf", f"model.path={place}/nowhere"],
        "expand, missing checkpoint": ["tritter", "expand", f"{place}/nowhere", "--method", "dus"],
        "expand, existing output": [*grow, "dus", "--output", str(place)],
        "expand, impossible size": [*grow, "width", "--hidden-size", "1"],
        "tritter plan": ["tritter", "plan", "--source=3B", "--target=5B", "--gpu-hours=99"],
        "tritter history": ["tritter", "history", wide],
        "tritter inspect, no expansion": ["tritter", "inspect", source],
        "tritter inspect, expanded": ["tritter", "inspect", wide],
        "tritter compare": ["tritter", "compare", *runs],
        "expand --dry-run": [*grow, "dus", "--dry-run"],
    }


def measured_commands(place: Path, *, rounds: int) -> Iterator[Command]:
    """Measure each command after `import torch`."""
    from tests.cli.test_compare import scored, write_run

    write_source(place / "source", megabytes=20, hidden_size=256)
    wide = ("--method", "width", "--intermediate-size", "2048", "--output", str(place / "wide"))
    subprocess.run(
        [sys.executable, "-m", "tritter", "expand", str(place / "source"), *wide, "--no-measure"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for seed, name in enumerate(("first", "second")):
        write_run(place / name, {"prose": scored(2.0, seed=seed)})
    torch = min(ran([sys.executable, "-c", "import torch"]).cpu_seconds for _ in range(rounds))
    for name, words in {"import torch": [], **commands(place)}.items():
        program = [sys.executable, "-c", _RUN, *words] if words else []
        once = ran(program) if program else Ran(0, 0, torch, "LOADED torch")
        runs = [ran(program) for _ in range(rounds)] if program else [once]
        cpu = min(each.cpu_seconds for each in runs)
        loaded = once.errors.splitlines()[-1].removeprefix("LOADED").strip()
        code = ran([sys.executable, *_started(words)]).exit_code if program else 0
        yield Command(name, code, round(cpu, 2), round(cpu / torch, 2), loaded)


def _started(words: Sequence[str]) -> list[str]:
    return list(words) if words[0].endswith(".py") else ["-m", *words]


def expansions(place: Path, *, megabytes: int, rounds: int) -> Iterator[Expansion]:
    """Measure whole expansions, best of the rounds."""
    source, result = place / "model", place / "results" / "result"
    result.parent.mkdir()
    write_source(source, megabytes=megabytes, hidden_size=1024)
    for case in CASES:
        words = [sys.executable, "-m", "tritter", "expand", str(source), "--output", str(result)]
        found = []
        for _ in range(rounds):
            torch = ran([sys.executable, "-c", "import torch"])
            whole = ran([*words, *case_words(source, case)], writes_below=result.parent)
            if whole.exit_code:
                raise RuntimeError(f"{case} failed: {whole.errors}")
            result_mb = sum(path.stat().st_size for path in result.iterdir()) // 10**6
            before = sum(os.times()[:4])
            copied = copy_seconds(result, place / "copy")
            spent = sum(os.times()[:4]) - before
            found.append((whole, torch, copied, spent))
            subprocess.run(["rm", "-r", str(result)], check=True)
        whole, torch, copied, spent = min(found, key=lambda each: each[0].seconds / each[2])
        yield Expansion(
            case=case,
            result_mb=result_mb,
            seconds=round(whole.seconds, 2),
            seconds_over_cp=round(whole.seconds / copied, 2),
            cpu_seconds=round(whole.cpu_seconds, 2),
            cpu_over_cp=round(whole.cpu_seconds / max(spent, 0.01), 2),
            first_written_seconds=round(whole.first_written, 2),
            after_torch_seconds=round(whole.first_written - torch.seconds, 2),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file for the rows of commands")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tritter-commands-") as place:
        tell(map(asdict, measured_commands(Path(place), rounds=options.rounds)), options.output)
        found = expansions(Path(place), megabytes=options.megabytes, rounds=options.rounds)
        tell(map(asdict, found), None)


if __name__ == "__main__":
    main()

"""Runs the cases of one kind in a process of its own: `python -m tests.hostile.worker …`.

A process of its own, because a case may hang in a library or take all memory: the parent then ends
it, counts the case, and starts the next. One line of JSON a case goes to a file.
"""

import json
import os
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from tests.hostile.case import Case, run_case
from tests.hostile.kinds import KINDS
from tests.hostile.sandbox import EXECUTED, Sandbox, confine

ADDRESS_SPACE_BYTES = 24 * 2**30  # a last stop; the limit of a case is lower


def main(kind: str, seed: int, first: int, last: int, folder: Path) -> None:
    """Run cases `first` to `last` - 1 and append what came of each to `folder/KIND.jsonl`."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    confine(folder)
    generator, _ = KINDS[kind]
    with (folder / f"{kind}.jsonl").open("a", encoding="utf-8") as results:
        for number in range(first, last):
            sandbox = Sandbox.fresh(folder / f"{kind}-sandbox", folder / "templates")
            case = generator(random.Random(f"{kind}-{seed}-{number}"), sandbox)
            _say(results, {"number": number, "case": [case.program, case.story, *case.words]})
            outcome = run_case(case, sandbox, _program(case))
            _say(
                results,
                {
                    "number": number,
                    "code": outcome.code,
                    "seconds": outcome.seconds,
                    "peak_bytes": outcome.peak_bytes,
                    "faults": outcome.faults,
                    "output": outcome.output[-1500:],
                },
            )


def _program(case: Case) -> Callable[[list[str]], int]:
    if case.program == "tritter":
        from tritter.cli import main as tritter

        return tritter
    from tritter.config.launch.entry import main as train

    pipeline: Any = _note_taking
    if case.program == "train.py":
        from tritter.pipeline import run_pipeline as pipeline
    return lambda words: train(pipeline, arguments=words)


class _Kept:
    status = "kept"
    metric = 1.0
    summary_path = Path("summary.json")
    leaves = ()


def _note_taking(config: Any, *, run_folder: Path) -> _Kept:
    """Stand for the stages where only the way to them is looked at."""
    asked = config.evaluation
    if config.resume is not None and (asked.allow_code or asked.code_sandbox_command):
        Path(EXECUTED).touch()  # a run that is resumed by its record would execute it
    return _Kept()


def _say(results: Any, content: dict[str, Any]) -> None:
    results.write(json.dumps(content) + "\n")
    results.flush()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))

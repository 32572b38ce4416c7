"""Thousands of hostile inputs: each ends in a clear error or a harmless success.

No traceback, hang, unbounded memory, lost file, leaked secret, terminal escape or stray folder.
`TRITTER_HOSTILE_SEED=7 pytest -m slow tests/hostile` draws others.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.case import TIME_LIMIT_SECONDS
from tests.hostile.kinds import KINDS
from tests.hostile.templates import ROOT, make_templates

SEED = int(os.environ.get("TRITTER_HOSTILE_SEED", "0"))


@dataclass(slots=True)
class Tally:
    """What came of the cases of one kind."""

    codes: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak_bytes: int = 0

    def add(self, case: dict[str, Any], outcome: dict[str, Any]) -> None:
        self.codes[outcome["code"] if outcome["code"] is not None else -1] += 1
        self.slowest = max(self.slowest, outcome["seconds"])
        self.peak_bytes = max(self.peak_bytes, outcome["peak_bytes"])
        for fault in outcome["faults"]:
            words = [word[:120] for word in case["case"]]
            self.faults.append(f"case {case['number']} {words}\n    {fault}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    make_templates(folder / "templates")
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()
    return folder


@pytest.mark.slow
def test_the_cases_are_at_least_four_thousand() -> None:
    assert sum(count for _, count in KINDS.values()) >= 4000


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_hostile(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, count = KINDS[kind]
    tally = run_kind(kind, count, place)
    codes = ", ".join(f"{number} with exit {code}" for code, number in sorted(tally.codes.items()))
    with capsys.disabled():
        print(
            f"\nhostile {kind}: {count} cases, {codes}; {len(tally.faults)} faults; slowest "
            f"{tally.slowest:.1f} s, most memory {tally.peak_bytes / 1e6:.0f} MB (seed {SEED})"
        )
    assert sum(tally.codes.values()) == count
    assert not tally.faults, "\n".join(tally.faults[:40])


def run_kind(kind: str, count: int, place: Path) -> Tally:
    """Run all cases of a kind, starting anew after one that ends its process or outlasts it."""
    tally, number = Tally(), 0
    results = place / f"{kind}.jsonl"
    while number < count:
        ended = _work(kind, number, count, place)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        results.unlink()
        cases = {line["number"]: line for line in lines if "case" in line}
        done = [line for line in lines if "code" in line]
        for outcome in done:
            tally.add(cases[outcome["number"]], outcome)
        number += len(done)
        if number < count:
            broken = {"code": None, "seconds": 0.0, "peak_bytes": 0, "faults": [ended]}
            tally.add(cases.get(number, {"number": number, "case": ["setting up"]}), broken)
            number += 1
    return tally


def _work(kind: str, first: int, last: int, place: Path) -> str:
    """Run a worker to its end; end it when no case is done for longer than one may take."""
    words = [sys.executable, "-m", "tests.hostile.worker", kind, str(SEED), str(first), str(last)]
    results = place / f"{kind}.jsonl"
    results.touch()
    with (place / f"{kind}.log").open("ab") as log:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            **{name: str(place / "home") for name in ("HOME", "HF_HOME", "TRITTER_CACHE")},
            "TMPDIR": str(place / "tmp"),
        }
        process = subprocess.Popen(
            [*words, str(place)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        size = -1
        while True:
            try:
                process.wait(timeout=2 * TIME_LIMIT_SECONDS)
                return f"the process ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                if results.stat().st_size == size:
                    process.kill()
                    process.wait()
                    return "hang: the process had to be killed"
                size = results.stat().st_size

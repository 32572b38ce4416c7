"""The benchmarks run, and their README says how (memory and time: tests/test_streaming.py)."""

import csv
import re
import shlex
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import fisher, precision, streaming

FOLDER = Path(streaming.__file__).parent
COMMANDS = re.findall(r"^python .*$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)


def test_precision_runs_and_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--hidden-sizes 32 64 --runs 1 --steps 1 --batch-size 2 --sequence-length 8"
    output = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["precision.py", *sizes.split(), "--output", str(output)])
    precision.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["hidden_size"]) for row in rows] == [32, 64]
    assert rows[0].keys() == _columns("precision.csv")


def test_fisher_runs_and_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--hidden-sizes 32 --runs 1 --sequences 4 --batch-size 2"
    output = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["fisher.py", *sizes.split(), "--output", str(output)])
    fisher.main()
    with output.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["fisher_over_plain"]) > 0


def _columns(name: str) -> set[str]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return set(next(csv.reader(file)))


def test_the_shipped_rows_have_the_columns_of_today() -> None:
    fields = set(streaming.Row.__dataclass_fields__) | {"growth_mb"}
    assert _columns("streaming.csv") == fields
    assert _columns("fisher.csv") == set(fisher.Row.__dataclass_fields__)
    assert _columns("precision.csv") == {"run", *precision.Row.__dataclass_fields__, "ratio"}


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_understood(command: str) -> None:
    _, script, *words = shlex.split(command)
    text = (FOLDER.parents[1] / script).read_text("utf-8")
    flags = [word for word in words if word.startswith("--")]
    assert flags
    assert all(f'add_argument("{flag}"' in text for flag in flags)


def test_all_scripts_are_documented() -> None:
    assert {Path(shlex.split(command)[1]).name for command in COMMANDS} == {
        path.name for path in FOLDER.glob("*.py")
    }

"""What a command waits for: a process of its own says which libraries it loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {"torch", "transformers", "lightning", "hydra", "pydantic"}
PROGRAM = """
import sys
from tritter.cli import main
code = main(sys.argv[1:])
print("LOADED", *sorted(name for name in {names} if name in sys.modules))
sys.exit(code)
"""
FORMAT_1 = Path(__file__).parents[1] / "fixtures/format_1/finished/checkpoint"
COMMANDS = (
    "compare",
    "expand",
    "evaluate",
    "history",
    "inspect",
    "export",
    "generate",
    "plan",
    "train",
    "validate",
)


def loaded(*words: str) -> set[str]:
    """Run a command and return the slow libraries that it loaded."""
    program = PROGRAM.format(names=sorted(SLOW))
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("words", [("--help",), *((name, "--help") for name in COMMANDS)], ids=str)
def test_help_waits_for_nothing(words: tuple[str, ...]) -> None:
    assert loaded(*words) == set()


def test_history_reads_no_tensor() -> None:
    assert loaded("history", str(FORMAT_1)) <= {"pydantic"}  # Typer reads an argument with it


def test_a_plan_builds_no_maps() -> None:
    assert loaded("plan", "--source=3B", "--target=5B", "--gpu-hours=99") <= {"pydantic"}


def test_inspect_asks_the_tables_and_not_transformers() -> None:
    assert loaded("inspect", str(FORMAT_1)) <= {"torch", "pydantic"}

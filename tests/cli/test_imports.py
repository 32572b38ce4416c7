"""What a command waits for: a process of its own says which libraries it loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {"torch", "transformers", "lightning", "hydra", "pydantic"}
PROGRAM = """
import gc, sys
from tritter.cli import main
{before}
code = main(sys.argv[1:])
assert gc.isenabled()
print("LOADED", *sorted(name for name in {names} if name in sys.modules))
sys.exit(code)
"""
SPY = """
from tritter.storage.tensors import TensorFolder
opened = TensorFolder.open
def spy(folder):
    TensorFolder.open = opened
    print("AT FIRST", *sorted(name for name in {names} if name in sys.modules))
    return opened(folder)
TensorFolder.open = spy
"""
TINY_RUN = Path(__file__).parents[1] / "fixtures/tiny_run/finished/checkpoint"
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


def said(*words: str, code: int = 0, before: str = "") -> list[str]:
    """Run a command, after other statements, and return the lines it printed."""
    names = sorted(SLOW)
    program = PROGRAM.format(names=names, before=before.format(names=names))
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    return ended.stdout.splitlines()


def loaded(*words: str, code: int = 0) -> set[str]:
    """Run a command and return the slow libraries that it loaded."""
    return set(said(*words, code=code)[-1].split()[1:])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("words", [("--help",), *((name, "--help") for name in COMMANDS)], ids=str)
def test_help_waits_for_nothing(words: tuple[str, ...]) -> None:
    assert loaded(*words) == set()


@pytest.mark.full
def test_history_reads_no_tensor() -> None:
    assert loaded("history", str(TINY_RUN)) <= {"pydantic"}  # Typer reads an argument with it


@pytest.mark.full
def test_a_plan_builds_no_maps() -> None:
    assert loaded("plan", "--source=3B", "--target=5B", "--gpu-hours=99") <= {"pydantic"}


@pytest.mark.full
def test_inspect_asks_the_tables_and_not_transformers() -> None:
    assert loaded("inspect", str(TINY_RUN)) <= {"torch", "pydantic"}


@pytest.mark.full
def test_a_wrong_word_does_not_wait_for_transformers() -> None:
    words = ("expand", "--checkpoint", str(TINY_RUN), "--method", "widht")
    assert "transformers" not in loaded(*words, code=2)


@pytest.mark.full
def test_an_expansion_reads_weights_while_the_rest_is_imported(tmp_path: Path) -> None:
    words = ("expand", "--checkpoint", str(TINY_RUN), "--method", "llama-pro", "--no-measure")
    lines = said(*words, "--output", str(tmp_path / "out"), before=SPY)
    assert lines[0].split()[:2] == ["AT", "FIRST"]
    assert set(lines[0].split()[2:]) <= {"torch", "pydantic"}
    assert "transformers" in lines[-1].split()

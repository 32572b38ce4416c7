"""What a command waits for: a process of its own says which libraries it loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_compare import scored, write_run

SLOW = {"torch", "transformers", "lightning", "datasets", "matplotlib", "hydra", "pydantic"}
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
from tritter.storage.writer import TensorStream
written = TensorStream.write
def spy(*given, **options):
    print("AT FIRST", *sorted(name for name in {names} if name in sys.modules))
    return written(*given, **options)
TensorStream.write = spy
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
def test_inspect_needs_torch_for_a_map_alone() -> None:
    assert loaded("inspect", str(TINY_RUN.parent / "baseline")) <= {"pydantic"}
    assert loaded("inspect", str(TINY_RUN)) <= {"torch", "pydantic"}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        "--method widht",
        "--method width --hidden-size 1",
        "--method dus --output tests",
        "--method dus --targt-layers 4",
    ],
)
def test_a_refused_expansion_waits_for_nothing(words: str) -> None:
    assert loaded("expand", str(TINY_RUN), *words.split(), code=2) <= {"pydantic"}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        "experts=dylora growth=foam experts.rank=0",
        "growth=foam growth.trigger=x",
        "forgetting=[ewc,freeze,distill,self_replay,si] trainer.precision=x",
        "expansion=[width,moe] moe_routing.hold_old=-1 adaptation.freeze_base=x",
        "trainer=fsdp growth=foam",
    ],
)
def test_a_refused_run_waits_for_no_torch(words: str) -> None:
    assert loaded("train", *words.split(), code=2) <= {"hydra", "pydantic"}


@pytest.mark.full
def test_a_missing_checkpoint_is_refused_at_once() -> None:
    assert loaded("expand", "nowhere", "--method", "dus", code=2) <= {"pydantic"}


@pytest.mark.full
def test_a_dry_run_builds_maps_and_does_not_ask_transformers() -> None:
    words = ("expand", str(TINY_RUN), "--method", "dus", "--dry-run")
    assert loaded(*words) <= {"torch", "pydantic"}


@pytest.mark.full
def test_a_comparison_needs_torch_for_its_bounds_alone(tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        write_run(tmp_path / name, {"prose": scored(2.0, seed=seed)})
    found = loaded("compare", str(tmp_path / "first"), str(tmp_path / "second"))
    assert found <= {"torch", "pydantic"}


@pytest.mark.full
def test_an_expansion_writes_before_transformers_is_imported(tmp_path: Path) -> None:
    words = ("expand", "--checkpoint", str(TINY_RUN), "--method", "llama-pro")
    lines = said(*words, "--output", str(tmp_path / "out"), before=SPY)
    assert lines[0].split()[:2] == ["AT", "FIRST"]
    assert set(lines[0].split()[2:]) <= {"torch", "pydantic"}
    assert "transformers" in lines[-1].split()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("method", ["dus", "width", "moe"])
def test_an_expansion_without_the_check_asks_no_transformers(method: str, tmp_path: Path) -> None:
    words = ("expand", str(TINY_RUN), "--method", method, "--no-measure")
    assert loaded(*words, "--output", str(tmp_path / "out")) <= {"torch", "pydantic"}

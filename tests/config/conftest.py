"""Runs a command line in this process, with a recording stub for the pipeline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra.types import RunMode

from tritter.checkpoints.run_text import RunText
from tritter.config.launch import plan
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.composition import Loader
from tritter.config.launch.entry import main
from tritter.config.schema import RunConfig
from tritter.errors import TritterError


@dataclass(frozen=True)
class FakeOutcome:
    status: str
    metric: float
    summary_path: Path
    leaves: tuple[str, ...] = ("summary.json",)


@dataclass
class FakePipeline:
    """Records its arguments; seed 1 raises a TritterError, 2 a bug, 7 panics, 3 is rolled back."""

    configs: list[RunConfig] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def __call__(self, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        self.configs.append(config)
        self.folders.append(run_folder)
        if config.seed == 1:
            raise TritterError("the loss was not finite 10 times in a row")
        if config.seed == 2:
            raise KeyError("a bug")
        if config.seed == 7:
            raise type("PanicException", (BaseException,), {})("of a library in Rust")
        (run_folder / "summary.json").write_text("{}")
        kept = "kept" if config.gate.enabled else "ungated"
        status = "rolled_back" if config.seed == 3 else kept
        return FakeOutcome(status, 0.25, run_folder / "summary.json")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str
    written: list[str]


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pipeline: FakePipeline,
) -> Callable[..., Result]:
    """Run a command line in an empty folder; returns exit code, output and written files.

    Its texts are too few to be split, which `tests/pipeline/test_text_problems.py` looks at.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunText, "side_problems", lambda text: ())

    def run_words(*words: str) -> Result:
        try:
            code = main(pipeline, arguments=words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        return Result(code, captured.out, captured.err, written)

    return run_words


@pytest.fixture(scope="session")
def composing() -> Iterator[Loader]:
    with Loader.opened() as one:
        yield one


def planned(typed: CommandLine) -> plan.Plan:
    """Return the validated jobs of a command line; writes nothing."""
    with Loader.opened() as one:
        request = plan.Request.of(typed, one)
        mode = RunMode.MULTIRUN if typed.is_multirun else RunMode.RUN
        return request.plan_of(one.composed(request.overrides, mode=mode))

"""A small real job: the embedded corpus and a base model of a few thousand parameters."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.pipeline import Outcome, run_pipeline

SMALL = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=3",
    "pretraining.max_steps=60",
    "training.max_steps=30",
    "data.sequence_length=64",
    "data.batch_size=8",
    "evaluation.max_tokens_per_document=96",
    "evaluation.sample_tokens=8",
    "trainer.progress=off",
    "trainer.precision=32-true",
    "logger=csv",
)


@pytest.fixture(scope="module", autouse=True)
def unpainted() -> Iterator[None]:
    """Build and save plots without drawing them; `tests/report` checks complete plots."""

    def print_png(canvas: FigureCanvasAgg, path: Path) -> None:
        Image.new("RGB", (1, 1)).save(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", print_png)
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_job(cache: Path) -> Callable[..., Outcome]:
    """Return a function that runs the small job with overrides in a folder."""

    def run(folder: Path, *overrides: str, cache_dir: Path = cache) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        config = load_config([*SMALL, f"cache_dir={cache_dir}", *overrides])
        return run_pipeline(config, run_folder=folder)

    return run


@pytest.fixture(scope="session")
def run_tiny(cache: Path) -> Callable[..., Outcome]:
    """Return a function that runs the tiny job, which reads a few texts, in a folder."""

    def run(folder: Path, *overrides: str, cache_dir: Path = cache) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        config = load_config([*TINY, f"cache_dir={cache_dir}", *overrides])
        return run_pipeline(config, run_folder=folder)

    return run

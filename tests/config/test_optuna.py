"""The Optuna sweeper: its jobs are validated one by one, and a resumed sweep is identical."""

from pathlib import Path

import pytest
import yaml

from tests.config.conftest import FakeOutcome, FakePipeline
from tests.config.test_entry import Run
from tritter.config.schema import RunConfig

pytest.importorskip("optuna")

OPTUNA = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweep.dir=here")
RATE = "training.learning_rate=tag(log,interval(1e-4,1e-2))"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the metric of a run to the distance of its learning rate from 0.001."""
    call = FakePipeline.__call__

    def run(self: FakePipeline, config: RunConfig, *, run_folder: Path) -> FakeOutcome:
        outcome = call(self, config, run_folder=run_folder)
        metric = abs(config.training.learning_rate - 1e-3)
        return FakeOutcome(outcome.status, metric, outcome.summary_path)

    monkeypatch.setattr(FakePipeline, "__call__", run)


@pytest.mark.full
@pytest.mark.usefixtures("measuring")
def test_a_sweep_that_goes_on_thinks_of_the_same_jobs(run: Run, pipeline: FakePipeline) -> None:
    words = (*OPTUNA, RATE, "seed=choice(0,1)")
    whole = run(*words, "hydra.sweeper.n_trials=6", "hydra.sweep.dir=whole")
    asked = [(one.training.learning_rate, one.seed) for one in pipeline.configs]
    assert {seed for _, seed in asked} == {0, 1} and len(asked) == 6
    assert "hydra.sweeper.sampler.seed=0" in whole.out and whole.code == 1
    best = yaml.safe_load(Path("whole/optimization_results.yaml").read_text())
    finished = [abs(rate - 1e-3) for rate, seed in asked if seed == 0]
    assert best["best_value"] == pytest.approx(min(finished))
    assert (
        f"Lowest metric: job {[abs(r - 1e-3) for r, _ in asked].index(min(finished))}" in whole.out
    )

    pipeline.configs.clear()
    run(*words, "hydra.sweeper.n_trials=3")
    again = run(*words, "hydra.sweeper.n_trials=6")
    # What is done is not done again, and neither is what failed: the rest was chosen by it
    assert [(one.training.learning_rate, one.seed) for one in pipeline.configs] == asked
    table = [line for line in again.out.splitlines() if "│" in line]
    assert table == [line for line in whole.out.splitlines() if "│" in line]
    other = run(
        *words, "hydra.sweeper.n_trials=1", "hydra.sweep.dir=x", "hydra.sweeper.sampler.seed=3"
    )
    assert other.code == 0 and pipeline.configs[-1].training.learning_rate != asked[0][0]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.learning_rate=interval(-1,0.1)"], "training.learning_rate = -1"),
        (["trainer=ddp,cpu"], "trainer.strategy = ddp"),
        (["training.max_stps=choice(3,4)"], "Did you mean training.max_steps?"),
    ],
    ids=str,
)
def test_an_example_is_checked_before_the_first_job(
    run: Run, words: list[str], message: str
) -> None:
    result = run(*OPTUNA, *words)
    assert (result.code, result.written) == (2, [])
    assert message in result.err


def test_a_job_that_is_wrong_all_the_same_fails_alone(run: Run, pipeline: FakePipeline) -> None:
    words = ("training.learning_rate=choice(0.1,-1)", "seed=choice(0,3)")
    result = run(*OPTUNA, *words, "hydra.sweeper.n_trials=6")
    assert result.code == 1 and "training.learning_rate = -1" in result.out
    assert {config.training.learning_rate for config in pipeline.configs} == {0.1}

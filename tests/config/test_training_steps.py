"""`max_tokens` and `max_steps`: the number of steps, and precedence between the two."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.config.conftest import FakePipeline, Result
from tests.pipeline.tiny import FIXTURES
from tritter import ContinuedPretrainingConfig
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import fingerprint
from tritter.errors import RequestError
from tritter.pipeline.stages.fit import _recorded_rate


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["training.max_tokens=500k"], 244),  # of 16 * 128 = 2,048 tokens
        (["training.max_tokens=2048"], 1),
        (["training.max_tokens=500k", "trainer.accumulate_grad_batches=4"], 61),
        (["training=quick", "training.max_tokens=8192", "data.batch_size=8"], 8),
        (["training.max_tokens=8192", "training.max_steps=null"], 4),
        (["training.max_tokens=null", "training.max_steps=7"], 7),
    ],
)
def test_tokens_become_steps(words: list[str], steps: int) -> None:
    config = load_config(words)
    assert config.training.max_steps == steps and config.pretraining.max_steps == 600
    by_steps = [w for w in words if "max_" not in w] + [f"training.max_steps={steps}"]
    assert fingerprint(config) == fingerprint(load_config(by_steps))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["training.max_tokens=9k", "training.max_steps=3"],
         ("training.max_tokens = 9k", "training.max_steps = 3", "one of them")),
        (["pretraining.max_tokens=2047"], ("pretraining.max_tokens = 2047", "has 2,048 tokens")),
        (["training.max_tokens=many"], ("training.max_tokens = many",)),
        (["training.max_tokens=0"], ("training.max_tokens = 0",)),
        (["training.max_tokens=9k", "data.batch_size=x"], ("data.batch_size = x",)),
        (["training.max_steps=null"], ("training.max_steps",)),
        (["training.max_token=9k"], ("training.max_tokens",)),
        (["pretraining.schedule=rewarm"], ("pretraining.schedule = rewarm", "constant, cosine")),
    ],
)  # fmt: skip
def test_refused(words: list[str], reported: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as refused:
        load_config(words)
    assert all(part in str(refused.value) for part in reported), refused.value


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "every"),
    [
        (["training.max_steps=35"], 3),
        (["training.max_steps=7"], 3),  # more would cost over a tenth of it
        (["training.max_tokens=500k"], 24),  # 244 steps
        (["training.max_steps=35", "evaluation.every_n_steps=0"], 0),
        (["training.max_steps=35", "evaluation.every_n_steps=50"], 50),
    ],
)
def test_a_training_is_evaluated_ten_times_unless_a_number_is_typed(
    words: list[str], every: int
) -> None:
    config = load_config(words)
    assert config.evaluation.every_n_steps == every
    typed = load_config([*words, f"evaluation.every_n_steps={every}"])
    assert fingerprint(config) == fingerprint(typed)  # which `resume` compares


def test_a_wrong_length_is_the_only_problem_of_a_default_evaluation() -> None:
    with pytest.raises(RequestError) as refused:
        load_config(["training.max_steps=many"])
    assert [problem.key for problem in refused.value.problems] == ["training.max_steps"]


def test_an_experiment_stands_instead_of_the_option_and_gives_way_to_what_is_typed(
    tmp_path: Path,
) -> None:
    from tritter.config.folders import SearchPath

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ntraining:\n  max_tokens: 20480\n"
    )
    with SearchPath.of([str(tmp_path)], None).in_use():
        assert load_config(["experiment=mine"]).training.max_steps == 10
        typed = load_config(["experiment=mine", "training.max_steps=3"]).training
    assert (typed.max_steps, typed.max_tokens) == (3, None)


def test_the_last_rate_is_that_of_the_record() -> None:
    training = {
        "learning_rate": 2e-3, "warmup_ratio": 0.0, "max_steps": 10, "schedule": "constant",
        "decay_ratio": 0.2, "minimum_ratio": 0.0,
    }  # fmt: skip

    def recorded(config: dict[str, object]) -> float:
        return _recorded_rate(replace(lineage, training_config=config))

    lineage = Lineage.of(FIXTURES / "finished/baseline")
    assert recorded({"made_from": {"pretraining": training}}) == 2e-3
    ended = {**training, "schedule": "wsd", "minimum_ratio": 0.5}
    assert recorded({"training": ended}) == pytest.approx(2e-3 * 0.75)
    assert recorded({"training": ended, "last_rate": 1e-3}) == 1e-3  # it ended early
    for damaged in (-1.0, float("nan"), float("inf"), "1e-3", None):
        assert recorded({"training": training, "last_rate": damaged}) == 2e-3
    for elsewhere in ({}, {"stage": "given", "path": "x"}, {"training": 3}, {"made_from": {}}):
        assert recorded(elsewhere) == 0.0


def test_the_specifications_record_yields_a_run() -> None:
    config = ContinuedPretrainingConfig().run_config("expansion=dus", "training.schedule=rewarm")
    training = config.training
    assert (training.learning_rate, training.warmup_ratio) == (1e-5, 0.05)
    assert (training.max_steps, training.schedule) == (10_000, "rewarm")
    (ewc,) = config.forgetting
    assert (ewc.name, ewc.options.ewc_lambda) == ("ewc", 1000.0)
    assert ContinuedPretrainingConfig(use_ewc=False).run_config().forgetting == ()
    with pytest.raises(RequestError, match="learning_rate"):
        ContinuedPretrainingConfig(learning_rate=-1.0).run_config()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("words", [["seed=0"], ["-m", "seed=0,3"]], ids=["a run", "a sweep"])
def test_it_starts_as_it_was_planned(
    run: Callable[..., Result], pipeline: FakePipeline, words: list[str]
) -> None:
    assert run("training.max_tokens=20000", *words).code == 0
    assert {config.training.max_steps for config in pipeline.configs} == {9}

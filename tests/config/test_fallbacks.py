"""`gate.ladder`: overrides of retries, and requests rejected before the first attempt."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.conftest import FakePipeline, Result
from tritter.config.fallbacks import with_fallback
from tritter.config.folders import SearchPath
from tritter.config.launch.composition import Loader
from tritter.config.run_folder import changes_between, fingerprint
from tritter.config.schema import RunConfig
from tritter.errors import RequestError

MINE = """\
# Two things to try
fallbacks:
  - [training.learning-rate=1e-3]
  - ['forgetting=[l2sp,replay]', forgetting.l2sp.l2sp_lambda=3, expansion=llama-pro]
"""


def composed(folder: Path, text: str, *words: str) -> RunConfig:
    (folder / "ladder").mkdir(parents=True, exist_ok=True)
    (folder / "ladder/mine.yaml").write_text(text)
    with SearchPath.of([str(folder)], None).in_use(), Loader.opened() as composing:
        return composing.compose(["gate.ladder=mine", *words])


def refused(folder: Path, text: str, *words: str) -> str:
    with pytest.raises(RequestError) as caught:
        composed(folder, text, *words)
    return str(caught.value)


@pytest.mark.full
def test_fallbacks_replace_overrides_of_the_run_and_not_of_each_other(tmp_path: Path) -> None:
    words = ("forgetting=replay", "forgetting.replay.fraction=0.4", "training.max_steps=7")
    config = composed(tmp_path, MINE, *words, "expansion=dus")
    first, second, third = config.attempts
    assert [one.training.learning_rate for one in config.attempts] == [3e-3, 1e-3, 3e-3]
    assert {one.training.max_steps for one in config.attempts} == {7}
    assert second.forgetting == first.forgetting and second.expansion == first.expansion
    assert [one.name for one in third.forgetting] == ["l2sp", "replay"]
    assert third.forgetting[0].options.l2sp_lambda == 3
    assert third.forgetting[1].options.fraction == 0.4
    assert [spec.name for spec in third.expansion] == ["llama_pro"]
    assert config.fallbacks[0].fallback_overrides == ("training.learning_rate=1e-3",)
    assert len(composed(tmp_path, MINE, "gate.max_attempts=2").attempts) == 2
    assert len(composed(tmp_path, MINE, "gate.max_attempts=1").attempts) == 1


@pytest.mark.parametrize(
    ("words", "fallback", "left"),
    [
        (["seed=1", "training.max_tokens=9k"], ["training.max_steps=3"], ["seed=1"]),
        (["+forgetting=[ewc,si]", "forgetting.ewc.ewc-lambda=3", "forgetting.si.xi=1"],
         ["forgetting=[si]"], ["forgetting.si.xi=1"]),
        (["expansion=dus", "expansion.dus.drop_layers=0"], ["expansion=none"], []),
        (["forgetting.replay.fraction=.5"], ["forgetting.replay.fraction=.4"], []),
    ],
)  # fmt: skip
def test_overrides_that_a_fallback_replaces(
    words: list[str], fallback: list[str], left: list[str]
) -> None:
    assert with_fallback(words, fallback) == [*left, *fallback]


@pytest.mark.full
def test_all_problems_of_all_fallbacks_are_reported_together(tmp_path: Path) -> None:
    text = MINE.replace("learning-rate=1e-3", "lerning_rate=1e-3").replace("=3,", "=-3,")
    reported = refused(tmp_path, text)
    assert "training.lerning_rate = 0.001 (in ladder/mine.yaml, fallback 1)" in reported
    assert "forgetting.l2sp.l2sp_lambda = -3 (in ladder/mine.yaml, fallback 2)" in reported
    reported = refused(tmp_path, "fallbacks: [[seed=1, training], [data.batch_size=3], []]")
    for line in (
        "seed = 1 (in ladder/mine.yaml, fallback 1): a fallback may override training",
        "training = (empty) (in ladder/mine.yaml, fallback 1): write an override as KEY=VALUE",
        "data.batch_size = 3 (in ladder/mine.yaml, fallback 2)",
        "fallback 3): a fallback is a list of overrides",
    ):
        assert line in reported
    reported = refused(tmp_path, "fallbacks: ['training.learning_rate=1,2']")
    assert "a fallback is a list" in reported
    assert "several values" in refused(tmp_path, "fallbacks: [['training.learning_rate=1,2']]")
    for key in ("steps", "rungs"):
        reported = refused(tmp_path, f"{key}: [[training.max_steps=3]]")
        assert f"has the key {key}; " in reported and "Did you mean fallbacks?" in reported
    reported = refused(
        tmp_path, "fallbacks: [['forgetting=[ewc,online_ewc]'], [expansion=moe_add]]"
    )
    assert "fallback 1" in reported and "fallback 2" in reported


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["gate.ladder=gentle"], "Did you mean gentler?"),
        (["gate.max_attempts=2"], "set gate.ladder (gentler"),
        (["gate.ladder=gentler", "gate=off"], "no fallback is tried"),
        (["gate.ladder=gentler", "gate.max_attempts=9"], "fallbacks for 3 attempts"),
        (["gate.ladder=gentler", "pipeline.target_params=200k"], "a run that grows to a size"),
        (["ladder=gentler"], "gate.ladder"),
    ],
)
def test_conflicting_keys_are_rejected(composing: Loader, words: list[str], reported: str) -> None:
    with pytest.raises(RequestError, match=r".") as caught:
        composing.compose(words)
    assert reported in str(caught.value)


@pytest.mark.full
def test_the_content_of_a_ladder_counts(tmp_path: Path) -> None:
    one = fingerprint(composed(tmp_path, MINE))
    other = fingerprint(composed(tmp_path, MINE.replace("1e-3", "2e-3")))
    ((key, values),) = changes_between(one, other).items()
    assert key.startswith("gate.fallbacks") and "0.001" in str(values) and "0.002" in str(values)


@pytest.mark.full
def test_each_job_of_a_sweep_has_its_ladder(
    run: Callable[..., Result], pipeline: FakePipeline
) -> None:
    words = ("-m", "forgetting=none,l2sp", "gate.ladder=gentler", "hydra.sweep.dir=out")
    assert run(*words).code == 0
    assert [len(config.attempts) for config in pipeline.configs] == [3, 3]
    assert {config.attempts[2].training.learning_rate for config in pipeline.configs} == {1e-3}

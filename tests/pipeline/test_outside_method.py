"""A third-party method through a run, a kill during a step, and a following run."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.pipeline.outside_method import Killed, Options, Outside, SmallLogits, Widening
from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.checkpoints.history import Link
from tritter.checkpoints.state import State
from tritter.config.launch.composition import load_config
from tritter.config.validation import _method_problems
from tritter.core.models import load_model
from tritter.errors import RequestError, TritterError
from tritter.pipeline import run_pipeline
from tritter.pipeline.stages import importance
from tritter.targets import Component
from tritter.training import (
    BaseModule,
    ForgettingMethod,
    Needs,
    Prepared,
    Schedule,
    Setting,
    Trainee,
    read_metrics,
)
from tritter.training.fitting import start_method
from tritter.training.options import RULES
from tritter.training.parameters import disk_values
from tritter.transform import Change, PlannedExpansion

ROOT = Path(__file__).parents[2]
OUTSIDE = Component(name=Outside.name, kind=Outside, options=Options())

CASES = {
    "dus": ("expansion=dus",),
    "width": ("expansion=width", "expansion.width.init=net2net"),
    "moe": ("expansion=moe", "expansion.moe.num_experts=2"),
}
TRAINERS = {"one process": "trainer=cpu", "two processes": "trainer=ddp"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(
    folder: Path,
    cache: Path,
    *words: str,
    given: Path | None = None,
    method: Component = OUTSIDE,
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    base = [word for word in TINY if given is None or not word.startswith("model.")]
    start = [] if given is None else ["model=hf", f"model.path={given}"]
    own = ["forgetting=none", "evaluation.sample_tokens=0", f"cache_dir={cache}"]
    config = load_config([*base, *start, *own, *words])
    config = replace(config, forgetting=(method,))
    return json.loads(run_pipeline(config, run_folder=folder).summary_path.read_text())


def state_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    state = State.read(folder)
    assert state is not None
    return dict(state.kinds[kind])


def hash_of(folder: Path) -> str:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage.model_hash


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_what_it_leaves_is_taken_up_by_the_next_training(
    tmp_path: Path, cache: Path, case: str
) -> None:
    summary = run(tmp_path / "first", cache, *CASES[case], "pipeline.keep_stages=true")
    assert summary["forgetting"] == ["outside"] and summary["flops"]["importance"] == 7.0
    for folder in ("first/baseline", "first/attempt_1/expanded"):
        path = state_of(tmp_path / folder, "path_integral")
        stock = dict(oracle.stock(tmp_path / folder).named_parameters())
        shapes = {name: stock[name].shape for name in path if name in stock}
        assert {name: value.shape for name, value in path.items() if name in stock} == shapes
        assert sum(float(value.sum()) for value in path.values()) > 0.01
    kept = tmp_path / "first/checkpoint"
    left = state_of(kept, "omega")
    assert load_model(kept).num_parameters() == summary["parameters"]["final"]  # no teacher in it
    assert sum(float(value.sum()) for value in left.values()) > 0
    assert "omega" in json.loads((kept / "state/state.json").read_text())["rules"]
    assert not any(link.differences() for link in Link.chain(kept))

    words = ("expansion=llama_pro", "pipeline.keep_stages=true")
    after = run(tmp_path / "next", cache, *words, given=kept)
    assert after["forgetting"] == ["outside"]
    added_up = state_of(tmp_path / "next/importance", "omega")
    assert added_up.keys() >= left.keys()  # routers started at zero, and have one now
    assert all(bool((added_up[name] >= left[name]).all()) for name in left)
    assert any(bool((added_up[name] > left[name]).any()) for name in left)


@pytest.mark.full
@pytest.mark.parametrize("trainer", TRAINERS)
def test_killed_in_mid_step_it_ends_with_the_same_bits(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    if trainer == "two processes" and start_method("cpu") != "fork":
        pytest.skip("spawning takes seconds for each training")
    words = (*CASES["width"], TRAINERS[trainer])
    run(tmp_path / "whole", cache, *words)
    with monkeypatch.context() as patch:
        patch.setattr(Outside, "dies_at", 6)
        with pytest.raises(Exception, match=r"Killed|^$"):
            run(tmp_path / "parts", cache, *words)
    assert (tmp_path / "parts/attempt_1/saved").exists()
    run(tmp_path / "parts", cache, *words)
    whole, parts = tmp_path / "whole/checkpoint", tmp_path / "parts/checkpoint"
    assert hash_of(whole) == hash_of(parts)
    assert not {"left", "saved"} & {path.name for path in (tmp_path / "parts/attempt_1").iterdir()}
    left, again = state_of(whole, "omega"), state_of(parts, "omega")
    assert left.keys() == again.keys()
    assert all(torch.equal(left[name], again[name]) for name in left)


def test_two_methods_that_prepare_one_kind_are_refused(cache: Path) -> None:
    config = load_config([*TINY, "forgetting=none", f"cache_dir={cache}"])
    config = replace(config, forgetting=(OUTSIDE,) * 2)
    reported = " ".join(map(str, _method_problems(config)))
    assert "forgetting = " in reported and "several of them prepare omega" in reported


def test_a_kind_that_nobody_registered_is_refused_before_training(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outside, "needs", classmethod(lambda *_: Needs(leaves=("unheard_of",))))
    config = replace(load_config([*TINY, f"cache_dir={cache}"]), forgetting=(OUTSIDE,))
    (problem,) = _method_problems(config)
    assert (problem.key, "unheard_of" in problem.reason) == ("forgetting", True)


def test_a_misspelt_hook_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("observe_gradient", "_prepare", "names"):  # helpers keep their names
        monkeypatch.setattr(Outside, name, lambda *_: None, raising=False)
    config = replace(load_config([*TINY, f"cache_dir={cache}"]), forgetting=(OUTSIDE,))
    (problem,) = _method_problems(config)
    assert "`observe_gradient` resembles the hook observe_gradients;" in problem.reason


@pytest.mark.parametrize("values", [{"weigth": torch.ones(2, 3)}, {"weight": torch.ones(2)}])
def test_state_of_no_parameter_is_refused(values: dict[str, torch.Tensor]) -> None:
    (name,) = values
    with pytest.raises(TritterError, match=f"state .* of {name}, but the model has no"):
        dict(disk_values(torch.nn.Linear(3, 2, bias=False), values))


def test_prepared_state_of_no_parameter_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared(state={"omega": {"weigth": torch.ones(2)}})
    monkeypatch.setattr(Outside, "prepare", lambda *_: prepared)
    with pytest.raises(TritterError, match=r"state \[2\] of weigth, but the model has no"):
        run(tmp_path / "run", cache)


@pytest.mark.full
def test_what_it_does_not_need_is_not_made(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default job: no masks, no path integral of pretraining, no preparation."""

    def refused(*args: Any) -> Any:
        raise AssertionError("nobody asked for it")

    with monkeypatch.context() as patch:
        for place, name in (
            (Change, "masks"), (importance, "load_model"), (PlannedExpansion, "state_stream"),
        ):  # fmt: skip
            patch.setattr(place, name, refused)
        (tmp_path / "plain").mkdir()
        words = ["forgetting=replay", "expansion=width", "pipeline.keep_stages=true"]
        config = load_config([*TINY, *words, f"cache_dir={cache}"])
        run_pipeline(config, run_folder=tmp_path / "plain")
    for folder in ("baseline", "attempt_1/expanded", "checkpoint"):
        assert State.read(tmp_path / "plain" / folder) is None
    run(tmp_path / "asking", cache, "expansion=none")
    plain, asking = (tmp_path / name / "baseline" for name in ("plain", "asking"))
    assert hash_of(plain) == hash_of(asking) and State.read(asking) is not None


WIDENING = Component(name=Widening.name, kind=Widening, options=Widening.Options())


def test_it_changes_the_model_during_training_and_records_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Widening, "loaded", [])
    summary = run(tmp_path, cache, "expansion=none", method=WIDENING)
    assert Widening.loaded == ["baseline", "trained"]  # trained, and scored
    (added,) = summary["methods"]["widening"]["added"]
    before, after = (summary["parameters"][name] for name in ("baseline", "final"))
    assert added > 0 and after == before + added
    trained, base = (oracle.stock(tmp_path / name) for name in ("checkpoint", "baseline"))
    assert trained.config.intermediate_size == 80
    embedding = "model.embed_tokens.weight"
    assert torch.equal(trained.state_dict()[embedding], base.state_dict()[embedding])
    assert "widening/logits" in (tmp_path / "attempt_1/metrics.csv").read_text()
    lineage = Lineage.read(tmp_path / "checkpoint")
    assert lineage is not None
    (record,) = lineage.expansion_history
    assert (record.method, record.target_config["intermediate_size"]) == ("widening", 80)
    rates = [row.get("train/learning_rate") for row in read_metrics(tmp_path / "attempt_1")]
    schedule = Schedule(learning_rate=0.0015, max_steps=6, warmup_ratio=0.05, shape="cosine")
    expected = schedule.learning_rate * schedule.factor(5)  # half of 3e-3, at the last step
    assert float(next(filter(None, rates))) == pytest.approx(expected)
    assert not any(link.differences() for link in Link.chain(tmp_path / "checkpoint"))


@pytest.mark.full
def test_a_second_module_is_refused(tmp_path: Path, cache: Path) -> None:
    class Wrapping(ForgettingMethod):
        name = "wrapping"
        uses_weights = False

        def attach(self, trainee: Trainee, setting: Setting) -> None:
            trainee.make_module = BaseModule

    wrapping = Component(name="wrapping", kind=Wrapping, options=Wrapping.Options())
    with pytest.raises(RequestError, match=r"forgetting\.wrapping: only one method"):
        run(tmp_path, cache, "expansion=none", "experts=single_lora", method=wrapping)


def test_a_second_way_of_loading_is_refused(cache: Path) -> None:
    words = ("forgetting=none", "expansion=none", "experts=single_lora")
    config = replace(load_config([*TINY, *words, f"cache_dir={cache}"]), forgetting=(WIDENING,))
    reasons = {(each.key, str(each.value)): each.reason for each in _method_problems(config)}
    assert "only one method of a run can load" in reasons["forgetting", "widening"]


@pytest.mark.full
def test_killed_after_it_changed_the_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("expansion=none", "control=true")
    whole = run(tmp_path / "whole", cache, *words, method=WIDENING)
    with monkeypatch.context() as patch:
        patch.setattr(SmallLogits, "dies_at", 5)  # saved after four steps, widened after three
        with pytest.raises(Exception, match=r"Killed|^$"):
            run(tmp_path / "parts", cache, *words, method=WIDENING)
    assert (tmp_path / "parts/attempt_1/saved").exists()
    parts = run(tmp_path / "parts", cache, *words, method=WIDENING)
    assert hash_of(tmp_path / "whole/checkpoint") == hash_of(tmp_path / "parts/checkpoint")
    assert parts["methods"] == whole["methods"]
    assert parts["control"]["final"] == whole["control"]["final"]  # mitigation acts there too


def test_a_summary_that_fails_is_reported(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All work is done by then, and the run can't be repeated with another class."""
    monkeypatch.setattr(Widening, "summary", lambda *_: {"added": torch.ones(1)})
    summary = run(tmp_path, cache, "expansion=none", method=WIDENING)
    assert "Tensor is not JSON serializable" in summary["methods"]["widening"]["error"]
    assert "Tensor is not JSON serializable" in capsys.readouterr().out


@pytest.mark.full
def test_the_example_of_the_page_follows_growth_and_resumes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/how-to/write_a_method.md").read_text()
    (tmp_path / "cautious_example.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    kind = import_module("cautious_example").Cautious
    method = Component(name=kind.name, kind=kind, options=kind.Options())
    words = ("expansion=none", "growth=foam", "growth.trigger=schedule", "growth.check_every=1")
    words += ("growth.growth_cooldown=2", "growth.warmup_steps=0")
    whole = run(tmp_path / "whole", cache, *words, method=method)
    assert whole["growth"]["born"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(kind, "observe_step", die_at(5))  # saved after four steps
        with pytest.raises(Exception, match=r"Killed|^$"):
            run(tmp_path / "parts", cache, *words, method=method)
    assert (tmp_path / "parts/attempt_1/saved").exists()
    parts = run(tmp_path / "parts", cache, *words, method=method)
    assert parts["growth"]["born"] == whole["growth"]["born"]
    assert hash_of(tmp_path / "whole/checkpoint") == hash_of(tmp_path / "parts/checkpoint")


def die_at(last: int) -> Callable[..., float]:
    """Return a hook that ends the process's work at a step."""

    def observe_step(method: ForgettingMethod, model: torch.nn.Module, step: int) -> float:
        if step == last:
            raise Killed
        return 0.0

    return observe_step


def test_the_weights_that_it_needs_are_refused_elsewhere() -> None:
    words = ("forgetting=none", "callbacks=model_checkpoint", "training.max_steps=100")
    config = load_config([*TINY, *words])
    config = replace(
        config,
        forgetting=(WIDENING,),
        trainer=replace(config.trainer, strategy="fsdp"),
        pipeline=replace(config.pipeline, publish="best"),
    )
    reported = " ".join(str(problem) for rule in RULES for problem in rule(config))
    assert "forgetting = Widening: each process has a shard" in reported
    assert "not together with forgetting: the best weights may be narrow" in reported


def test_a_method_that_mixes_states_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Widening, "needs", lambda *_: Needs(mixes=True))
    config = replace(load_config([*TINY, "forgetting=none"]), forgetting=(WIDENING,))
    (problem,) = _method_problems(config)
    assert (problem.key, problem.value) == ("forgetting", "widening")
    assert "no option `fraction`" in problem.reason

"""An own metric: scored with every model, paired by item, and judged by the gate."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import fingerprint
from tritter.errors import RequestError, TritterError
from tritter.evaluation.tasks import Metric, MetricTask, Reader
from tritter.pipeline import Outcome

Run = Callable[..., Outcome]
SELF = f"{__name__}."


class Spaces(Metric):
    """The probability of a space after each word."""

    def __init__(self, *, words: Sequence[str] = ("the", "a", "of"), domain: str | None = None):
        if not words:
            raise ValueError("words is empty")
        self.words, self.domain = list(words), domain

    def items(self) -> Mapping[str, Any]:
        return {word: {"prompt": word} for word in self.words}

    def score(self, model: nn.Module, items: Sequence[Any], reader: Reader) -> list[float]:
        assert not model.training and not torch.is_grad_enabled()
        space, found = reader.tokenizer.encode("x x", add_special_tokens=False).ids[-1], []
        for item in items:
            ids = reader.tokenizer.encode(item["prompt"], add_special_tokens=False).ids
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            found.append(float(logits.softmax(-1)[space]))
        assert isinstance(reader.continuation(model, "the", max_new_tokens=2), str)
        return found


class Broken(Spaces):
    """Returns what is no score of each item."""

    def score(self, model: nn.Module, items: Sequence[Any], reader: Reader) -> list[float]:
        return [1.5 for _ in items]


class Dropping(Spaces):
    """A score that growth and training destroy, for the gate."""

    def __init__(self, *, domain: str | None = None) -> None:
        super().__init__(words=[f"w{n}" for n in range(40)], domain=domain)
        self.calls = 0

    def score(self, model: nn.Module, items: Sequence[Any], reader: Reader) -> list[float]:
        self.calls += 1
        return [1.0 if self.calls == 1 else 0.1] * len(items)


def own(kind: type[Metric], name: str = "spaces") -> str:
    return f"metrics.{name}._target_={SELF}{kind.__name__}"


def test_an_own_metric_is_scored_before_and_after(run_tiny: Run, tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", own(Spaces), "metrics.spaces.words=[the,one]")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    (attempt,) = summary["attempts"]
    for stage in ("baseline", "final"):
        record = (summary if stage == "baseline" else attempt)[stage]["spaces"]
        assert 0 < record["accuracy"] < 1 and record["n"] == 2
    stored = json.loads((tmp_path / "run/scores/attempt_1-trained.json").read_text())
    assert stored["spaces/accuracy"]["identifiers"] == ["the", "one"]


@pytest.mark.full
def test_the_gate_rolls_back_a_run_that_lost_it(run_tiny: Run, tmp_path: Path) -> None:
    words = ("gate=default", "gate.ladder=null", own(Dropping))
    outcome = run_tiny(tmp_path / "run", *words, cache_dir=tmp_path / "cache")
    assert outcome.status == "rolled_back"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "spaces/accuracy" in json.dumps(summary["gate"])


@pytest.mark.full
def test_one_of_a_new_domain_has_to_rise(run_tiny: Run, tmp_path: Path) -> None:
    words = ("gate=default", "gate.ladder=null", own(Dropping), "metrics.spaces.domain=new")
    outcome = run_tiny(tmp_path / "run", *words, cache_dir=tmp_path / "cache")
    assert outcome.status == "rolled_back"
    gate = json.loads((tmp_path / "run/summary.json").read_text())["gate"]
    (check,) = (each for each in gate if each["subject"] == "spaces/accuracy")
    assert (check["check"], check["verdict"]) == ("new_capability", "failed")


def test_changed_items_and_options_are_scored_again() -> None:
    tasks = [
        MetricTask("spaces", Spaces(words=words), identity)
        for words, identity in ((["a"], {}), (["b"], {}), (["a"], {"sha256": "x"}))
    ]
    assert len({task.digest for task in tasks}) == 3
    both = [MetricTask("m", Spaces(words=words), {}).digest for words in (["a", "b"], ["b", "a"])]
    assert both[0] != both[1]  # scores are paired in their order
    assert tasks[0].digest == MetricTask("spaces", Spaces(words=["a"]), {}).digest


def test_it_is_part_of_the_fingerprint() -> None:
    (record,) = fingerprint(load_config([*TINY, own(Spaces)]))["metrics"].values()
    assert record["_target_"] == f"{SELF}Spaces" and len(record["sha256"]) == 64


def test_what_is_no_score_is_an_error(run_tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(TritterError, match=r"metrics.spaces: it must score each of its items"):
        run_tiny(tmp_path / "run", own(Broken))
    for items, message in (
        ({"a": object()}, "plain data"),
        ([["a", 1]], "a mapping of strings"),
        ({1: 1, "1": 2}, "a mapping of strings"),
    ):
        with pytest.raises(TritterError, match=message):
            MetricTask("m", _Given(items), {}).digest  # noqa: B018


@pytest.mark.parametrize("scores", [[None, None], "ab", {"a": 1}, [0.5], [0.5, math.nan], [[1, 1]]])
def test_what_score_returns_is_checked(scores: Any) -> None:
    metric = _Given({"a": 1, "b": 2})
    metric.score = lambda model, items, reader: scores  # type: ignore[method-assign]
    model = nn.Linear(1, 1)
    with pytest.raises(TritterError, match=r"metrics.m: it must score each of its items"):
        MetricTask("m", metric, {}).score(model, None)  # type: ignore[arg-type]


class _Given(Spaces):
    def __init__(self, items: Any) -> None:
        super().__init__()
        self._items = items

    def items(self) -> Any:
        return self._items


class Guessed(Spaces):
    """A score that guessing reaches."""

    chance = 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((own(Spaces), "metrics.spaces.words=[]"), "words is empty"),
        ((own(Spaces), "metrics.spaces.wrds=[a]"), "Did you mean metrics.spaces.words"),
        ((own(Spaces), "metrics.spaces.domain=nwe"), "Did you mean new"),
        ((own(Guessed),), "its chance is 1.0; must be at least 0"),
        ((own(Spaces, "old"),), "not that of a domain"),
        (("metrics.m._target_=torch.nn.Linear",), "not a subclass of tritter.evaluation"),
        (("metrics=spaces",), "metrics = spaces"),
    ],
)
def test_metrics_that_cannot_be_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_config([*TINY, *words])

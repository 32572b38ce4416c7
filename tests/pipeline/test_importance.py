"""Importances estimated by one stage and passed to the training runs."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pipeline.tiny import FIXTURES, TINY
from tritter.checkpoints.state import State
from tritter.config.launch.composition import load_config
from tritter.methods.forgetting import EWC, ewc, quadratic
from tritter.pipeline import Outcome, pipeline, run_pipeline
from tritter.terminal import Console
from tritter.training import Task

Run = Callable[..., Outcome]


@pytest.mark.full
@pytest.mark.parametrize("expansion", ["dus", "width"])
def test_normalised_importance_of_copies_is_that_of_the_model_that_did_not_grow(
    run_job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expansion: str
) -> None:
    seen: list[dict[str, Tensor]] = []
    begin = EWC.begin_task

    def recording(self: EWC, model: nn.Module, task: Task) -> None:
        begin(self, model, task)
        seen.append({name: value.clone() for name, value in self.importance.items()})

    monkeypatch.setattr(EWC, "begin_task", recording)
    options = ("forgetting=ewc", "forgetting.ewc.normalise=mean", "forgetting.ewc.num_sequences=8")
    run_job(
        tmp_path, f"expansion={expansion}", *options, "training.max_steps=2", "control=true",
        "gate='off'",
    )  # fmt: skip
    grown, plain = sorted(seen, key=lambda each: -sum(v.numel() for v in each.values()))
    kept = "model.layers.0.mlp.down_proj.weight"
    rows, columns = plain[kept].shape
    torch.testing.assert_close(grown[kept][:rows, :columns], plain[kept], rtol=1e-5, atol=0)
    assert sum(float(v.sum()) for v in plain.values()) == pytest.approx(
        sum(v.numel() for v in plain.values()), rel=1e-4
    )


@pytest.mark.full
@pytest.mark.parametrize("is_terminal", [True, False])
def test_scoring_and_importances_show_progress_on_a_terminal(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, color_system=None, width=100)
    monkeypatch.setattr(pipeline, "Console", lambda: console)
    run_tiny(tmp_path, "forgetting=[ewc,l2sp]", "trainer.progress=auto", "training.max_steps=2")
    for label in ("scoring old", "scoring new", "ewc: importance of each parameter"):
        shown = re.search(rf"{label} .*? \d+/\d+ \d:\d\d:\d\d", file.getvalue())
        assert (shown is not None) == is_terminal
    assert "l2sp: importance" not in file.getvalue()  # it looks at no text


def state_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    state = State.read(folder)
    assert state is not None
    return {kind: dict(tensors) for kind, tensors in state.kinds.items()}


@pytest.mark.full
def test_what_one_training_leaves_the_next_takes_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the old data only that of the latest task is read, and for `si` none at all."""

    def run(name: str, *words: str) -> dict[str, dict[str, Tensor]]:
        (tmp_path / name).mkdir()
        own = ("forgetting=[si,online_ewc]", "forgetting.si.xi=0.1", f"cache_dir={tmp_path}/cache")
        own = (*own, "pipeline.keep_stages=true")
        left_out = ("data.old", "data.new", *(("model.",) if name == "second" else ()))
        base = [word for word in TINY if not word.startswith(left_out)]
        run_pipeline(load_config([*base, *own, *words]), run_folder=tmp_path / name)
        return state_of(tmp_path / name / "checkpoint")

    texts = (f"data.old={FIXTURES}/text/old", f"data.new={FIXTURES}/text/new.jsonl")
    left = run("first", *texts, "expansion=width")
    assert re.search(r"Fisher information of \d+ sequences of old\n", capsys.readouterr().out)
    path = state_of(tmp_path / "first/attempt_1/expanded")
    assert set(path) == {"path_integral", "displacement"}
    assert not (tmp_path / "first/pretraining/left").exists()  # the cache has it
    assert set(left) == {*path, "si_importance", "online_fisher"}
    for name, omega in path["path_integral"].items():
        importance = omega.clamp(min=0) / (path["displacement"][name].square() + 0.1)
        torch.testing.assert_close(left["si_importance"][name], importance)

    given = ("model=hf", f"model.path={tmp_path}/first/checkpoint", "expansion=none")
    after = run("second", *given, f"data.new={{third:{FIXTURES}/text/old}}")
    message = capsys.readouterr().out
    assert (
        re.search(r"Fisher information of \d+ sequences of new\n", message)
        and "si: no path" not in message
    )
    for name, omega in left["path_integral"].items():
        latest = omega.clamp(min=0) / (left["displacement"][name].square() + 0.1)
        earlier = left["si_importance"].get(name, torch.zeros_like(latest))
        torch.testing.assert_close(after["si_importance"][name], earlier + latest)
    latest_fisher = state_of(tmp_path / "second/importance")["fisher"]
    for name, kept in left["online_fisher"].items():
        assert bool((after["online_fisher"][name] >= kept + latest_fisher[name] - 1e-9).all())


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "estimator"), [("ewc", "empirical"), ("ewc", "true"), ("online_ewc", "empirical")]
)
def test_every_fisher_is_taken_on_the_sequences_of_the_first(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, estimator: str
) -> None:
    """With unchanged weights, a later Fisher equals the first, and the maximum is bit-identical."""
    taken: list[Tensor] = []
    begin, estimate = EWC.begin_task, quadratic.diagonal_fisher

    def recording(model: nn.Module, sequences: Tensor, **options: Any) -> dict[str, Tensor]:
        taken.append(sequences)
        return estimate(model, sequences, **options)

    def begin_and_look(self: EWC, model: nn.Module, task: Task) -> None:
        begin(self, model, task)
        first = {name: value.clone() for name, value in self.importance.items()}
        assert any(bool(value.any()) for value in first.values())
        assert self.observe_step(model, 1) > 0  # no weight has moved
        for name, value in self.importance.items():
            assert torch.equal(value, first[name]), name

    monkeypatch.setattr(EWC, "begin_task", begin_and_look)
    for module in (ewc, quadratic):
        monkeypatch.setattr(module, "diagonal_fisher", recording)
    keys = {"num_sequences": 16, "refresh_steps": 1, "estimator": estimator}
    options = [f"forgetting.{method}.{key}={value}" for key, value in keys.items()]
    run_tiny(tmp_path, f"forgetting={method}", "expansion=none", *options, "training.max_steps=2")
    first, *later = ({tuple(row) for row in rows.tolist()} for rows in taken)
    assert len(first) == 16 and len(later) == 3  # unmoved, after step 1, after step 2
    assert [len(first & each) for each in later] == [16, 16, 16]

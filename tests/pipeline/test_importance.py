"""What the trainings of a run are told of the importances that one stage estimated."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tritter.forgetting import EWC
from tritter.pipeline import Outcome
from tritter.training import Task

Run = Callable[..., Outcome]


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
    grown, plain = sorted(seen, key=lambda fisher: -sum(v.numel() for v in fisher.values()))
    kept = "model.layers.0.mlp.down_proj.weight"
    rows, columns = plain[kept].shape
    torch.testing.assert_close(grown[kept][:rows, :columns], plain[kept], rtol=1e-5, atol=0)
    assert sum(float(v.sum()) for v in plain.values()) == pytest.approx(
        sum(v.numel() for v in plain.values()), rel=1e-4
    )

"""Growth with 8-bit Adam: bit-exact resume, no jump in the updates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor

from tests.methods.growth.factories import scheduled
from tests.methods.growth.test_training import ONE, assert_same_end, often, train
from tests.training.killed import KillAt, Killed
from tests.training.test_surgery import assert_same
from tritter.training import OptimizerSettings

UP = "model.layers.1.mlp.up_proj.weight"
CODED = OptimizerSettings(
    target="bitsandbytes.optim.AdamW8bit",
    arguments={"betas": [0.9, 0.95], "min_8bit_size": 64},
)


@pytest.mark.full
@pytest.mark.parametrize("is_replacing", [False, True], ids=["grown", "replaced"])
@pytest.mark.parametrize("killed_at", [4, 8, 13])
def test_resumed_after_events_it_ends_alike(
    tmp_path: Path, is_replacing: bool, killed_at: int
) -> None:
    options = often(enable_replacement=is_replacing, dead_quantile=0.3)
    whole, expected = train(tmp_path / "whole", options, optimizer=CODED, steps=15)
    with pytest.raises(Killed):
        train(tmp_path / "parts", options, KillAt(killed_at), optimizer=CODED, steps=15)
    parts, result = train(tmp_path / "parts", options, optimizer=CODED, steps=15)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    # Code tables shared by all parameters are restored once each
    assert replace(result, seconds=0.0, memory=None) == replace(expected, seconds=0.0, memory=None)
    growth = expected.reports["growth"]
    assert len({event["step"] for event in growth["events"]}) >= 3
    assert bool(growth["replaced"]) == is_replacing and (growth["born"] or is_replacing)
    assert_same(dict(whole.model.state_dict()), dict(parts.model.state_dict()), "")


class Moves(Callback):
    """Record the update of each row in every step after a given one."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.moves: list[Tensor] = []
        self.before: Tensor | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        rows = pl_module.model.get_parameter(UP).detach()
        if self.before is not None and len(self.before) == len(rows):
            self.moves.append((rows - self.before).abs().amax(dim=1))
        self.before = rows.clone() if trainer.global_step >= self.at else None


@pytest.mark.full
def test_new_rows_do_not_leap(tmp_path: Path) -> None:
    at = 20
    options = often(
        trigger=scheduled(at), growth_cooldown=1, maturation_factor=1.0, maturation_age=200
    )
    rows = Moves(at)
    train(tmp_path, options, rows, optimizer=CODED, settings=ONE, steps=45, rate=1e-3)
    moves = torch.stack(rows.moves[:20])
    assert moves.shape == (20, 43)
    assert 0 < float(moves[:, -3:].max()) <= 1.5 * float(moves[:, :-3].max())

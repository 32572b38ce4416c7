"""A callback widens the model during training, and the run publishes the wider model."""

import json
from pathlib import Path

import pytest

from tests import oracle
from tests.pipeline.tiny import TINY
from tests.training.test_surgery import Grow
from tritter.checkpoints.history import Link
from tritter.config.launch.composition import load_config
from tritter.core.expansions import Width
from tritter.core.models import load_model, read_model
from tritter.pipeline import run_pipeline


class GrowTheAttempt(Grow):
    def __init__(self, intermediate_size: int, at: int) -> None:
        super().__init__([Width(intermediate_size=intermediate_size)], at=at)


@pytest.mark.full
def test_the_checkpoint_is_the_wider_model(tmp_path: Path) -> None:
    body = f"{{_target_: {__name__}.GrowTheAttempt, intermediate_size: 48, at: 3}}"
    words = ("expansion=none", "callbacks=lr_monitor", f"callbacks.grow={body}")
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config([*TINY, *words, f"cache_dir={tmp_path / 'cache'}"])
    summary = json.loads(run_pipeline(config, run_folder=folder).summary_path.read_text())
    before, after = read_model(folder / "baseline").config, read_model(folder / "checkpoint").config
    differ = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert differ == {"intermediate_size"} and after["intermediate_size"] == 48
    live, stock = load_model(folder / "checkpoint"), oracle.stock(folder / "checkpoint")
    count = sum(parameter.numel() for parameter in stock.parameters())
    assert summary["parameters"]["final"] == count > summary["parameters"]["baseline"]
    ids = oracle.tokens(int(before["vocab_size"]))
    assert oracle.relative_difference(live.eval(), stock, ids) < 1e-5
    chain = Link.chain(folder / "checkpoint")
    assert all(link.differences() == () for link in chain if link.can_be_checked)

"""One golden loss curve: every change of the training shows here, also where no bound fails.

`python -m tests.training.test_golden` rewrites it; explain the change in the commit message.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.training.test_fit import SETTINGS, task
from tritter.core.expansions import Width
from tritter.core.models import load_model
from tritter.data.batches import BatchStream, SequenceStream
from tritter.methods.forgetting import L2SP, Replay
from tritter.terminal import Console
from tritter.training import BaseModule, OptimizerSettings, Schedule, fit, read_metrics
from tritter.transform import expand

CURVE = Path(__file__).parents[1] / "golden/losses.json"
STEPS = 20
TOLERANCE = 1e-5  # processors add in other orders


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def losses(folder: Path, *, learning_rate: float = 1e-2) -> list[float]:
    """Return the loss of every step of a small model that was widened and trains with replay."""
    source = oracle.saved(oracle.tiny_llama(initializer_range=0.05), folder / "source")
    model = load_model(expand(source, folder / "wide", [Width(intermediate_size=60)]).folder)
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=learning_rate, max_steps=STEPS),
        optimizer=OptimizerSettings(),
        methods=(L2SP(l2sp_lambda=0.1), Replay(fraction=0.3)),
    )
    with one_thread():
        fit(
            module,
            BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=STEPS),
            settings=replace(SETTINGS, log_every_n_steps=1),
            folder=folder / "fit",
            label="golden",
            console=Console(quiet=True),
            task=task(module.model),
        )
    rows = read_metrics(folder / "fit")
    return [float(row["train/loss"]) for row in rows if row.get("train/loss")]


def test_the_losses_are_those_that_were_committed(tmp_path: Path) -> None:
    golden = json.loads(CURVE.read_text(encoding="utf-8"))
    assert len(golden) == STEPS
    assert losses(tmp_path) == pytest.approx(golden, rel=TOLERANCE)


def test_a_rate_that_is_one_per_cent_off_would_show(tmp_path: Path) -> None:
    golden = json.loads(CURVE.read_text(encoding="utf-8"))
    assert losses(tmp_path, learning_rate=1.01e-2) != pytest.approx(golden, rel=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        CURVE.write_text(json.dumps(losses(Path(place)), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{CURVE} is written\n")

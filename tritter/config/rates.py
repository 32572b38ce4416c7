"""The default of `training.learning_rate`, and a warning about a high one."""

import math
from contextlib import suppress
from pathlib import Path

from tritter.checkpoint import read_lineage
from tritter.checkpoint.record import training_record
from tritter.config.schema import CheckpointModelConfig, Model, RunConfig
from tritter.errors import TritterError
from tritter.families import Config, count_parameters

PRESET_RATE = 3e-3
CHECKPOINT_RATE = 1e-5
# Models of this many parameters were pretrained at less than this rate of Adam's
_LARGE, _HIGH = 10_000_000, 1e-3
# Below so many parameters → a rate to begin with: the table of docs/first_checkpoint.md
_STARTS = ((1_000_000_000, "1e-4"), (None, "2e-5"))


def default_rate(model: Model) -> tuple[float, str]:
    """Return what `training.learning_rate = null` means, and why.

    The record of a hub id is not read: the rate of a resumed run would depend on what was
    downloaded since.
    """
    if not isinstance(model, CheckpointModelConfig):
        return PRESET_RATE, "the default for a base that is trained here"
    folder = Path(model.path)
    if not folder.is_dir():
        return CHECKPOINT_RATE, "the default for a checkpoint from the hub"
    with suppress(TritterError):  # a damaged record is refused where its text is read
        lineage = read_lineage(folder)
        rate = training_record(lineage.training_config if lineage else {}).get("learning_rate")
        if isinstance(rate, float) and 0 < rate < math.inf:
            return rate, "the peak of the newest training run that the checkpoint records"
    return CHECKPOINT_RATE, "the default for a checkpoint that records no training run"


def rate_notes(config: RunConfig, source: Config) -> tuple[str, ...]:
    """Return warnings: a rate for small bases on a large checkpoint, a rung that raises the rate.

    Args:
        source: config of what the run starts from.
    """
    rate, parameters = config.training.learning_rate, count_parameters(source)
    raised = tuple(
        f"gate.ladder = {config.gate.ladder}: rung {number} raises training.learning_rate from "
        f"{rate:g} to {rung.training.learning_rate:g}; gate.max_attempts={number} leaves it out."
        for number, rung in enumerate(config.rungs, start=1)
        if rung.training.learning_rate > rate
    )
    is_adam = "adam" in config.optimizer.target.lower()
    is_given = isinstance(config.model, CheckpointModelConfig)
    if not (is_given and is_adam and config.experts is None) or rate < _HIGH or parameters < _LARGE:
        return raised
    start = next(text for limit, text in _STARTS if limit is None or parameters < limit)
    return (
        *raised,
        f"training.learning_rate = {rate:g} is a rate for small bases, at which a pretrained model "
        f"of {parameters / 1e6:,.0f} M parameters forgets; training.learning_rate={start} is a "
        "start.",
    )

"""The schedule of a training, and the rate that the one before it ended with, for `rewarm`."""

import math
from collections.abc import Mapping
from typing import Any

from tritter.checkpoint import lineage_of
from tritter.checkpoint.record import training_record
from tritter.config.schema import TrainingConfig
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.training import Schedule


def schedule_of(training: TrainingConfig, *, start_rate: float = 0.0) -> Schedule:
    """Return the schedule that a training's config describes.

    Args:
        start_rate: that the training before it ended with.
    """
    return Schedule(
        learning_rate=training.learning_rate,
        max_steps=training.max_steps,
        warmup_ratio=training.warmup_ratio,
        shape=training.schedule,
        decay_ratio=training.decay_ratio,
        minimum_ratio=training.minimum_ratio,
        start_rate=start_rate,
    )


def last_rate(context: RunContext, arm: Arm) -> float:
    """Return the rate of the last step of what an arm starts from; 0 where it is not recorded."""
    told = lineage_of(context.folder / arm.start).training_config
    return recorded_rate(told)


def recorded_rate(told: Mapping[str, Any]) -> float:
    """Return the last rate of the training that a lineage's record tells of.

    Where an older record does not say it, it is that of the last step that was asked for.
    """
    rate = told.get("last_rate")
    if isinstance(rate, int | float) and 0 <= rate < math.inf:
        return float(rate)
    try:
        training = training_record(told)
        schedule = Schedule(
            learning_rate=float(training["learning_rate"]),
            max_steps=int(training["max_steps"]),
            warmup_ratio=float(training["warmup_ratio"]),
            shape=str(training["schedule"]),
            decay_ratio=float(training["decay_ratio"]),
            minimum_ratio=float(training["minimum_ratio"]),
        )
        return schedule.last_rate
    except (KeyError, TypeError, ValueError):  # of a model from elsewhere, or damaged
        return 0.0

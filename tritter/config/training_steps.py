"""How long a training is, in steps or tokens, and how often it is evaluated."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tritter.checkpoint import read_lineage
from tritter.checkpoint.record import training_record
from tritter.config.schema import CheckpointModelConfig, Model, RunConfig
from tritter.config.selection import Origin, Reader
from tritter.errors import TritterError
from tritter.families import Config, count_parameters
from tritter.limits import parse_count

TRAININGS = ("pretraining", "training")
STEPS, TOKENS = "max_steps", "max_tokens"
_EVALUATIONS = 10  # of a training, after the one before its first step


def settled(raw: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    """Return a config without the less particular of `max_steps` and `max_tokens`.

    What was typed stands instead of what an option file says, and what any other file says
    instead of what the training's own option says. Of two that stand beside each other both stay.

    Args:
        origin: dotted key → the file that sets it; None: it was typed.
    """
    result = dict(raw)
    for group in TRAININGS:
        body = raw.get(group)
        if not isinstance(body, Mapping) or body.get(STEPS) is None or body.get(TOKENS) is None:
            continue
        steps, tokens = (_rank(origin(f"{group}.{key}"), group) for key in (STEPS, TOKENS))
        if steps != tokens:
            result[group] = {**body, STEPS if steps < tokens else TOKENS: None}
    return result


def with_steps(
    reader: Reader, bodies: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Return bodies of groups in which `max_tokens` is also `max_steps`, rounded down.

    Exactly one of both is to be given; what is wrong goes to the reader.
    """
    result = dict(bodies)
    for group in TRAININGS:
        body = bodies.get(group, {})
        if (asked := body.get(TOKENS)) is None:
            continue
        data, trainer = bodies.get("data", {}), bodies.get("trainer", {})
        factors = [
            _count(data.get("batch_size")),
            _count(data.get("sequence_length")),
            _count(trainer.get("accumulate_grad_batches", 1)),
        ]
        known = [factor for factor in factors if factor is not None]
        of_step = math.prod(known) if len(known) == len(factors) else None
        tokens, reason, steps = _count(asked), None, 1
        if body.get(STEPS) is not None:
            reason = (
                f"{group}.{STEPS} = {body[STEPS]} says as well how long the training is; allowed "
                "is one of them, the other being null"
            )
        elif tokens is not None and of_step is not None:  # else it is told where they are read
            steps = max(1, tokens // of_step)
            if tokens < of_step:
                reason = f"one step takes {of_step:,} tokens; allowed is at least that"
        if reason is not None:
            reader.report(f"{group}.{TOKENS}", asked, reason=reason)
        else:
            result[group] = {**body, STEPS: steps}
    return result


def with_evaluation_steps(bodies: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return bodies in which `evaluation.every_n_steps = null` is a tenth of the training."""
    evaluation, key = bodies.get("evaluation", {}), "every_n_steps"
    if evaluation.get(key, 0) is not None:
        return dict(bodies)
    steps = _count(bodies.get("training", {}).get(STEPS)) or 1  # a wrong one is reported elsewhere
    every = max(1, steps // _EVALUATIONS)
    return {**bodies, "evaluation": {**evaluation, key: every}}


def _rank(file: str | None, group: str) -> int:
    """Return how particular to the run a value is: of its option, of another file, typed."""
    if file is None:
        return 2
    return 0 if file.startswith(f"{group}/") else 1


def _count(value: object) -> int | None:
    """Return a whole number above 0, which may be written as 2M."""
    found = parse_count(value) if isinstance(value, str) else value
    is_count = isinstance(found, int) and not isinstance(found, bool) and found > 0
    return found if is_count else None  # type: ignore[return-value]


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

"""How long a training is, in steps or tokens, and how often it is evaluated."""

from collections.abc import Mapping
from typing import Any

from tritter.config.counts import parse_count
from tritter.config.reading import Origin, Reader

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
        tokens, of_step, reason, steps = _count(asked), _tokens_of_step(bodies), None, 1
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


def _tokens_of_step(bodies: Mapping[str, Mapping[str, Any]]) -> int | None:
    data, trainer = bodies.get("data", {}), bodies.get("trainer", {})
    factors = [data.get("batch_size"), data.get("sequence_length")]
    factors.append(trainer.get("accumulate_grad_batches", 1))
    product = 1
    for factor in factors:
        if (count := _count(factor)) is None:
            return None
        product *= count
    return product


def _count(value: object) -> int | None:
    """Return a whole number above 0, which may be written as 2M."""
    found = parse_count(value) if isinstance(value, str) else value
    is_count = isinstance(found, int) and not isinstance(found, bool) and found > 0
    return found if is_count else None  # type: ignore[return-value]

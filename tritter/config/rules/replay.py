"""What is wrong with the replay that a run asks for, whichever of its methods replays."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain

from tritter.config.rules.kept import kept_text
from tritter.config.schema import RunConfig
from tritter.errors import Problem, nearest


def replay_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong: two methods that replay, a share of nothing, unknown domains."""
    mixing = [one for one in config.forgetting if one.kind.needs(one.options).mixes]
    if len(mixing) > 1:
        names = [one.name for one in mixing]
        reason = f"{' and '.join(names)} both mix old text into the batches; choose one of them"
        yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)
    gathered = config.trainer_arguments.get("accumulate_grad_batches", 1)
    sequences = config.training.max_steps * gathered * config.data.batch_size
    for one in mixing:
        fraction = getattr(one.options, "fraction", None)
        if fraction is not None and math.floor(sequences * fraction) < 1:
            reason = (
                f"of the {sequences} sequences that are trained on not one would be replayed; "
                f"use at least {1 / sequences:.2g}, or leave {one.name} out"
            )
            yield Problem(f"forgetting.{one.name}.fraction", fraction, reason=reason)
        if one.name == "replay":
            yield from _weight_problems(one.options.weights or {}, config)


def _weight_problems(weights: Mapping[str, float], config: RunConfig) -> Iterator[Problem]:
    key, old = "forgetting.replay.weights", config.text.old
    tasks, kept = chain.from_iterable(config.text.tasks[:-1]), kept_text(config).sequences
    known = tuple(dict.fromkeys([*old, *tasks, *kept]))
    unknown = [name for name in weights if name not in known]
    for name in unknown:
        reason = f"there is no such old domain; there are {', '.join(known) or 'none'}"
        near = nearest(name, known)
        yield Problem(f"{key}.{name}", weights[name], reason=reason, nearest=near)
    if not unknown and old and not any(weights.get(name, 1) for name in old):
        reason = "every old domain has the weight 0; leave replay out instead"
        yield Problem(key, dict(weights), reason=reason)

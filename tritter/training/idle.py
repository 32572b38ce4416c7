"""Options that can't act in a run, because they begin or recur only after its last step."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tritter.errors import Problem
from tritter.options import RunRequest, leaves
from tritter.targets import Component
from tritter.training.options import callbacks_of

# By the names that Tritter, Lightning and most callbacks give to their options
_IS_PERIOD = re.compile(r"(every|refresh|interval|period).*step|steps?_(between|per)")
_IS_START = re.compile(r"(start|begin|after|delay|from).*step|step.*(start|begin)")


def idle_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield options of callbacks and forgetting methods that name a step that is never reached.

    Callbacks and methods from elsewhere are covered by the names of their options.
    """
    steps = config.training.max_steps
    for group, components in (("callbacks", config.callbacks), ("forgetting", config.forgetting)):
        for one in components:
            for key, value in leaves(_chosen(one), f"{group}.{one.name}").items():
                if not isinstance(value, int) or isinstance(value, bool):
                    continue
                name = key.rpartition(".")[2]
                if _IS_PERIOD.search(name) and value > steps:
                    reason = f"its period is longer than the run, training.max_steps = {steps}"
                elif _IS_START.search(name) and value >= steps:
                    reason = f"it begins after the last step, training.max_steps = {steps}"
                else:
                    continue
                yield Problem(key, value, reason=f"{reason}; use fewer, or remove {one.name}")
    yield from _patience_problems(config)


def _chosen(one: Component) -> Mapping[str, Any]:
    """Return the options of a component, without defaults of a method: they suit any run."""
    if isinstance(one.options, Mapping):
        return one.options
    default = {
        name: field.default for name, field in type(one.options).__dataclass_fields__.items()
    }
    return {key: value for key, value in one.plain().items() if value != default.get(key)}


def _patience_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield callbacks whose patience is longer than the run has validations."""
    if not (period := config.evaluation.every_n_steps):
        return
    steps = config.training.max_steps
    count = -(-steps // period)
    for one in callbacks_of("EarlyStopping", config):
        patience = one.options.get("patience", 3)
        if isinstance(patience, int) and patience >= count:
            reason = (
                f"the run is validated {count} times after its start, so it can't stop early; "
                f"use fewer, or a smaller evaluation.every_n_steps than {period}"
            )
            yield Problem(f"callbacks.{one.name}.patience", patience, reason=reason)

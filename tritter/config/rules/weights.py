"""What is wrong with the weights that new domains are to have."""

from collections.abc import Iterator

from tritter.config.schema import DatasetsConfig, RunConfig
from tritter.errors import Problem, nearest


def weight_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the domains that are none of the new ones, or that a task is about alone."""
    data = config.data
    if not isinstance(data, DatasetsConfig) or not data.weights:
        return
    mixed = [name for task in config.text.tasks if len(task) > 1 for name in task]
    new = [name for task in config.text.tasks for name in task]
    for name, weight in data.weights.items():
        key = f"data.weights.{name}"
        if name not in new:
            known = tuple(dict.fromkeys(new))
            reason = f"there is no such new domain; there are {', '.join(known) or 'none'}"
            yield Problem(key, weight, reason=reason, nearest=nearest(name, known))
        elif name not in mixed:
            reason = "its task has no other domain, so that nothing is weighed; leave it out"
            yield Problem(key, weight, reason=reason)

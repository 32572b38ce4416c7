"""What methods against forgetting ask for, held against the rest of a run."""

from collections import Counter
from collections.abc import Iterator

from tritter.config.rules.freezing import freezing_problems
from tritter.config.rules.kept import kept_problems
from tritter.config.rules.moe import teacher_problems
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.errors import Problem
from tritter.families import Config


def method_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield which methods wait for rows that nobody mixes in, or make what another makes too."""
    needs = [one.kind.needs(one.options) for one in config.forgetting]
    for what in ("prepares", "leaves"):
        counts = Counter(kind for each in needs for kind in getattr(each, what))
        if twice := [kind for kind, count in counts.items() if count > 1]:
            reason = f"more than one of them {what} {', '.join(twice)}; leave one out"
            yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)
    is_mixed = any(each.mixes for each in needs)
    for one, needed in zip(config.forgetting, needs, strict=True):
        if needed.replayed_rows and not is_mixed:
            reason = (
                "there are no old rows, as no method replays any; allowed is new, or replay "
                f"beside it: forgetting=[replay,{one.name}]"
            )
            yield Problem(f"forgetting.{one.name}.rows", one.options.rows, reason=reason)


def method_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield what can't be had of a model that the run starts from.

    Args:
        source: its config.json; of a base that is to be trained the vocabulary is not known yet.
    """
    is_known = isinstance(config.model, CheckpointModelConfig)
    for one in config.forgetting:
        place = one.kind.needs(one.options).teacher_place
        if place is not None:
            key = f"forgetting.{one.name}.teacher"
            yield from teacher_problems(place, source if is_known else None, key=key)
    yield from freezing_problems(config, source)
    yield from kept_problems(config)

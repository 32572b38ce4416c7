"""Fallback chains (`gate.ladder`): overrides for each retry after a rollback."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tritter.config.folders import LADDERS, body_of, option_files
from tritter.config.overrides import override_key
from tritter.config.schema import RunConfig
from tritter.errors import Problem, brief, nearest
from tritter.evaluation.options import GateConfig
from tritter.training.options import STEPS, TOKENS

_LADDER = "gate.ladder"
_RETRYING = (_LADDER, "gate.max_attempts")
_BODY = "fallbacks"
_ORDERED = ("forgetting", "expansion")
_LENGTHS = {f"training.{STEPS}", f"training.{TOKENS}"}  # mutually exclusive

_Overrides = tuple[str, ...]


class FallbackChain:
    """The retries of a gate after a rollback; fallbacks are numbered from 1.

    Args:
        gate: options of the gate.
    """

    GROUPS = ("training", "forgetting", "expansion")  # groups that a retry may override

    def __init__(self, gate: GateConfig) -> None:
        self._gate = gate

    def overrides(self) -> tuple[_Overrides, ...]:
        """Return the overrides of each retry, limited by `gate.max_attempts`.

        An invalid chain has no retries; `ladder_problems` reports it.
        """
        name, most = self._gate.ladder, self._gate.max_attempts
        if name is None or any(_file_problems(name)):
            return ()
        fallbacks = tuple(tuple(overrides) for overrides in _fallbacks(name))
        return fallbacks if most is None else fallbacks[: most - 1]

    def locate(self, problem: Problem, number: int) -> Problem:
        """Return a problem of a retry with its location."""
        where = f"{LADDERS}/{self._gate.ladder}.yaml, fallback {number}"
        return replace(problem, origin=where) if problem.key else replace(problem, job=where)


def _ladder_names() -> list[str]:
    """Return the names of all fallback chains."""
    return list(option_files().get(LADDERS, {}))


def ladder_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the selected fallback chain, including conflicts with other keys."""
    gate = config.gate
    if gate.ladder is None:
        if gate.max_attempts is not None and gate.max_attempts > 1:
            reason = "without a fallback chain, a retry would repeat the first attempt; set "
            reason += f"{_LADDER} ({', '.join(_ladder_names())}), or omit this key"
            yield Problem("gate.max_attempts", gate.max_attempts, reason=reason)
        return
    if not gate.enabled:
        reason = "with gate.enabled = false there is no rollback, so no fallback is tried"
        yield Problem(_LADDER, gate.ladder, reason=reason)
    problems = list(_file_problems(gate.ladder))
    yield from problems
    if not problems and gate.max_attempts is not None:
        most = 1 + len(_fallbacks(gate.ladder))
        if gate.max_attempts > most:
            reason = (
                f"{gate.ladder} has fallbacks for {most} attempts, including the first; allowed: "
            )
            yield Problem("gate.max_attempts", gate.max_attempts, f"{reason}at most that")
    if config.pipeline.target_params is not None:
        reason = "a run that grows to a size ends with the round that is rolled back; omit "
        reason += "pipeline.target_params, or continue from its checkpoint in a new run"
        yield Problem(_LADDER, gate.ladder, reason=reason)


def with_fallback(
    overrides: Sequence[str], fallback: Sequence[str], *, retries: bool = True
) -> list[str]:
    """Return the overrides of a run with those of a fallback applied.

    A fallback replaces each key that it sets. If it selects methods, it also removes the options
    of methods that it does not select. If it sets the length of training, it removes the run's.

    Args:
        overrides: of the run.
        fallback: overrides of the fallback.
        retries: False removes the overrides that request retries.
    """
    replacing = {override_key(override): override.partition("=")[2] for override in fallback}

    def is_replaced(key: str) -> bool:
        if not retries and key in _RETRYING:
            return True
        if key in replacing or (key in _LENGTHS and _LENGTHS & replacing.keys()):
            return True
        group, _, inner = key.partition(".")
        if group not in _ORDERED or group not in replacing or not inner:
            return False
        return inner.partition(".")[0] not in re.findall(r"\w+", replacing[group].replace("-", "_"))

    return [
        *(override for override in overrides if not is_replaced(override_key(override))),
        *fallback,
    ]


def _fallbacks(name: str) -> list[list[str]]:
    fallbacks: list[list[str]] = body_of(option_files()[LADDERS][name])[_BODY]  # type: ignore[assignment]
    return fallbacks


def _file_problems(name: str) -> Iterator[Problem]:
    """Yield the problems of a fallback chain's name and file."""
    names = _ladder_names()
    if name not in names:
        reason = f"there is no such fallback chain; allowed: {', '.join(names)}, or null"
        yield Problem(_LADDER, name, reason=reason, nearest=nearest(name, names))
        return
    path = option_files()[LADDERS][name]
    body = body_of(path)
    fallbacks = body.get(_BODY)
    unknown = next((str(key) for key in body if key != _BODY), None)
    if unknown is not None:
        reason = f"{path} has the key {unknown}; the only key allowed is {_BODY}"
        yield Problem(_LADDER, name, reason=reason, nearest=_BODY)
        return
    if not isinstance(fallbacks, list) or not fallbacks:
        reason = f"{path} requires {_BODY}, a list with the overrides of each fallback"
        yield Problem(_LADDER, name, reason=reason)
        return
    for number, fallback in enumerate(fallbacks, start=1):
        where = f"{LADDERS}/{name}.yaml, fallback {number}"
        if not isinstance(fallback, list) or not fallback:
            reason = "a fallback is a list of overrides, such as "
            reason += f"[{FallbackChain.GROUPS[0]}.learning_rate=1e-3]"
            yield Problem(_LADDER, brief(fallback), reason=reason, origin=where)
            continue
        for override in fallback:
            if not isinstance(override, str) or "=" not in override:
                reason = "write an override as KEY=VALUE, in quotes if it contains a list"
            elif override_key(override).partition(".")[0] not in FallbackChain.GROUPS:
                reason = f"a fallback may override {', '.join(FallbackChain.GROUPS)}; "
                reason += "all other keys belong to the run"
            else:
                continue
            key, _, value = str(override).partition("=")
            yield Problem(key, value, reason=reason, origin=where)

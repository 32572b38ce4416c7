"""`gate.ladder`: what a run that is rolled back tries next, a list of overrides per attempt."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hydra.core.override_parser.types import Override

from tritter.config.folders import LADDERS, body_of, option_files
from tritter.config.overrides import override_key
from tritter.config.schema import RunConfig
from tritter.errors import Problem, brief, nearest
from tritter.evaluation.options import GateConfig
from tritter.training.options import STEPS, TOKENS

FALLBACK_GROUPS = ("training", "forgetting", "expansion")  # what an attempt may have of its own
LADDER = "gate.ladder"
RETRYING = (f"{LADDER}=", "gate.max_attempts=")  # what overrides that ask for attempts begin with
_BODY = "rungs"
_ORDERED = ("forgetting", "expansion")
_LENGTHS = {f"training.{STEPS}", f"training.{TOKENS}"}  # of which one is given

Words = tuple[str, ...]


def ladder_names() -> list[str]:
    return list(option_files().get(LADDERS, {}))


def fallbacks_of(gate: GateConfig) -> tuple[Words, ...]:
    """Return the overrides of each attempt after the first, no more than `gate.max_attempts` asks.

    What is not as a ladder is, `ladder_problems` tells; here it has no rungs.
    """
    if gate.ladder is None or any(_file_problems(gate.ladder)):
        return ()
    fallbacks = tuple(tuple(words) for words in _fallbacks(gate.ladder))
    return fallbacks if gate.max_attempts is None else fallbacks[: gate.max_attempts - 1]


def ladder_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with a ladder by itself, or with when it is asked for."""
    gate = config.gate
    if gate.ladder is None:
        if gate.max_attempts is not None and gate.max_attempts > 1:
            reason = "without a ladder a further attempt would be the first again; name one as "
            reason += f"{LADDER} ({', '.join(ladder_names())}), or leave this out"
            yield Problem("gate.max_attempts", gate.max_attempts, reason=reason)
        return
    if not gate.enabled:
        reason = "with gate.enabled = false nothing is rolled back, and no rung is tried"
        yield Problem(LADDER, gate.ladder, reason=reason)
    problems = list(_file_problems(gate.ladder))
    yield from problems
    if not problems and gate.max_attempts is not None:
        most = 1 + len(_fallbacks(gate.ladder))
        if gate.max_attempts > most:
            reason = f"{gate.ladder} has rungs for {most} attempts, the first among them; allowed "
            yield Problem("gate.max_attempts", gate.max_attempts, f"{reason}is at most that")
    if config.pipeline.target_params is not None:
        reason = "a run that grows to a size ends with the round that is rolled back; leave "
        reason += "pipeline.target_params out, or go on from its checkpoint in a run of its own"
        yield Problem(LADDER, gate.ladder, reason=reason)


def choice_problems(overrides: Sequence[Override]) -> Iterator[Problem]:
    """Yield a ladder that was chosen as if it were the option of a group."""
    for override in overrides:
        if override.key_or_group == LADDERS:
            name = str(override.value())
            reason = f"a ladder is named as {LADDER}=NAME; there are {', '.join(ladder_names())}"
            yield Problem(LADDERS, name, reason=reason, nearest=f"{LADDER}={name}")


def on_top(words: Sequence[str], fallback: Sequence[str]) -> list[str]:
    """Return overrides with those of a rung, which stand instead of what they set or leave out.

    A rung that chooses methods takes along the keys of those that it does not choose, and one that
    says how long the training is says it alone.
    """
    asked = {override_key(word): word.partition("=")[2] for word in fallback}

    def is_replaced(key: str) -> bool:
        if key in asked or (key in _LENGTHS and _LENGTHS & asked.keys()):
            return True
        group, _, inner = key.partition(".")
        if group not in _ORDERED or group not in asked or not inner:
            return False
        return inner.partition(".")[0] not in re.findall(r"\w+", asked[group].replace("-", "_"))

    return [*(word for word in words if not is_replaced(override_key(word))), *fallback]


def for_fallback(problem: Problem, gate: GateConfig, number: int) -> Problem:
    """Return what is wrong with an attempt as what it is of, a rung counted from 1."""
    where = f"{LADDERS}/{gate.ladder}.yaml, rung {number}"
    return replace(problem, origin=where) if problem.key else replace(problem, job=where)


def _fallbacks(name: str) -> list[list[str]]:
    fallbacks: list[list[str]] = body_of(option_files()[LADDERS][name])[_BODY]  # type: ignore[assignment]
    return fallbacks


def _file_problems(name: str) -> Iterator[Problem]:
    """Yield what is wrong with a ladder's name and file."""
    names = ladder_names()
    if name not in names:
        reason = f"there is no such ladder; allowed is {', '.join(names)}, or null for none"
        yield Problem(LADDER, name, reason=reason, nearest=nearest(name, names))
        return
    path = option_files()[LADDERS][name]
    body = body_of(path)
    fallbacks = body.get(_BODY)
    if list(body) != [_BODY] or not isinstance(fallbacks, list) or not fallbacks:
        reason = f"{path} holds {_BODY}, a list with the overrides of each further attempt"
        yield Problem(LADDER, name, reason=f"{reason}, and nothing else")
        return
    for number, fallback in enumerate(fallbacks, start=1):
        where = f"{LADDERS}/{name}.yaml, rung {number}"
        if not isinstance(fallback, list) or not fallback:
            reason = f"a rung is a list of overrides, as [{FALLBACK_GROUPS[0]}.learning_rate=1e-3]"
            yield Problem(LADDER, brief(fallback), reason=reason, origin=where)
            continue
        for word in fallback:
            if not isinstance(word, str) or "=" not in word:
                reason = (
                    "an override is written KEY=VALUE, with quotes around one that holds a list"
                )
            elif override_key(word).partition(".")[0] not in FALLBACK_GROUPS:
                reason = f"an attempt has its own keys of {', '.join(FALLBACK_GROUPS)}; "
                reason += "all else is the run's"
            else:
                continue
            key, _, value = str(word).partition("=")
            yield Problem(key, value, reason=reason, origin=where)

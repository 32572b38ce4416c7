"""Groups of things that are named by `_target_`: `callbacks`, and `logger` but for W&B."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from tritter.config.folders import body_of, option_files
from tritter.errors import Problem, RequestError, nearest
from tritter.targets import TARGET, NamedTarget, argument_problems, building_problem, resolve


def named_targets(raw: Mapping[str, Any]) -> list[NamedTarget]:
    """Return the bodies of a group that are not switched off by null."""
    return [
        NamedTarget(name=str(name), body=body) for name, body in raw.items() if body is not None
    ]


def clashes(group: str, selected: Sequence[str]) -> Iterator[Problem]:
    """Yield which names two of the selected option files give: they would become one body."""
    files = option_files().get(group, {})
    givers: dict[str, list[str]] = {}
    for option in dict.fromkeys(selected):
        for name in body_of(files[option]) if option in files else ():
            givers.setdefault(str(name), []).append(option)
    for name, options in givers.items():
        if len(options) > 1:
            reason = f"{' and '.join(options)} both hold {name}; leave one of them out"
            yield Problem(group, list(selected), reason=reason)


def shape_problem(group: str, named: NamedTarget) -> Problem | None:
    """Return why something can't be looked up: it holds no keys, or names no class."""
    key, options = f"{group}.{named.name}", option_files().get(group, {})
    if named.name == TARGET:
        reason = f"it stands below a name, as {group}.NAME.{TARGET}, in an option file as well"
        return Problem(key, named.body, reason=reason)
    if not isinstance(named.body, Mapping):
        reason = f"a key stands below its name, {group}.NAME.{named.name}; {group} has "
        near = nearest(named.name, options)
        return Problem(key, named.body, reason=reason + ", ".join(options), nearest=near)
    if TARGET in named.body:
        return None
    reason = f"{named.name} is not selected; select it with {group}=[{named.name}]"
    held = list(body_of(options[named.name])) if named.name in options else []
    if named.name not in options:
        reason = f"it names no class; say {key}.{TARGET}=package.module.Class"
    elif named.name not in held:
        reason = f"{named.name} holds {', '.join(map(str, held))}; a key stands below one of them"
    for name, value in named.body.items():
        return Problem(f"{key}.{name}", value, reason=reason)
    return Problem(key, reason=reason)


def judged(
    group: str, named: NamedTarget, *, base: str, given: Mapping[str, Any] | None = None
) -> tuple[Any, list[Problem]]:
    """Return an instance of what is asked for, built for trial, and what is wrong with it.

    Args:
        base: dotted name of what its class has to be a subclass of.
        given: arguments that are given when it is built in earnest, where its class takes them.
    """
    key = f"{group}.{named.name}"
    try:
        kind = resolve(f"{key}.{TARGET}", named.body[TARGET], base=base)
    except RequestError as error:
        return None, list(error.problems)
    takes = signature(kind).parameters
    arguments = named.arguments | {n: v for n, v in (given or {}).items() if n in takes}
    problems = list(argument_problems(kind, arguments, key=key))
    if problems:
        return None, problems
    made = building_problem(kind, arguments, key=key)
    return (None, [made]) if isinstance(made, Problem) else (made, [])

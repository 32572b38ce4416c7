"""Groups of things that are named by `_target_`: `callbacks`, and `logger` but for W&B."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tritter.config.folders import body_of, option_files
from tritter.config.reading import new_name
from tritter.errors import Problem, RequestError, nearest
from tritter.targets import TARGET, argument_problems, building_problem, resolve

# Group → what its classes have to be subclasses of
BASES = {
    "callbacks": "lightning.pytorch.Callback",
    "logger": "lightning.pytorch.loggers.Logger",
}


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


def named_class(group: str, name: str, bodies: Mapping[str, Any]) -> type:
    """Return the class that an entry of a group names.

    Raises:
        RequestError: it holds no keys, names no class, or one that does not belong there.
    """
    key, body, options = f"{group}.{name}", bodies[name], option_files().get(group, {})
    if (now := new_name(key)) is not None:
        raise RequestError(Problem(key, body, reason=f"it is called {now} now"))
    if name == TARGET:
        reason = f"it stands below a name, as {group}.NAME.{TARGET}, in an option file as well"
        raise RequestError(Problem(key, body, reason=reason))
    if not isinstance(body, Mapping):
        reason = f"a key stands below its name, {group}.NAME.{name}; {group} has "
        near = nearest(name, options)
        raise RequestError(Problem(key, body, reason=reason + ", ".join(options), nearest=near))
    if TARGET in body:
        kind: type = resolve(f"{key}.{TARGET}", body[TARGET], base=BASES[group])
        return kind
    reason = f"{name} is not selected; select it with {group}=[{name}]"
    held = list(body_of(options[name])) if name in options else []
    if name not in options:
        reason = f"it names no class; say {key}.{TARGET}=package.module.Class"
    elif name not in held:
        reason = f"{name} holds {', '.join(map(str, held))}; a key stands below one of them"
    for argument, value in body.items():
        raise RequestError(Problem(f"{key}.{argument}", value, reason=reason))
    raise RequestError(Problem(key, reason=reason))


def built_for_trial(key: str, kind: type, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return an instance of what a body describes, None where it can't be; and what is wrong."""
    arguments = {name: value for name, value in body.items() if name != TARGET}
    if problems := list(argument_problems(kind, arguments, key=key)):
        return None, problems
    made = building_problem(kind, arguments, key=key)
    return (None, [made]) if isinstance(made, Problem) else (made, [])

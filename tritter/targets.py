"""Classes that a config names by `_target_`: found, judged by their signature, built.

A name counts in option files and on the command line of the person who runs them. One that stands
in a checkpoint, a run folder or in data is text, and never comes here.
"""

import ast
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import Any

from tritter.errors import Problem, RequestError, nearest

TARGET = "_target_"
_WITH_A_VERSION = ("tritter", "lightning", "torch", "bitsandbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A class that a config names, and its options.

    Args:
        name: its key in its group.
        kind: the class.
        options: a record of its `Options`; of a class without one what the config holds, its
            arguments by name and `_target_`.
    """

    name: str
    kind: Any
    options: Any

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the options by name."""
        if not isinstance(self.options, Mapping):
            return values_of(self.options)
        return {name: value for name, value in self.options.items() if name != TARGET}

    def plain(self) -> dict[str, Any]:
        """Return what determines it, as plain values; of a class from outside, its file as well."""
        is_record = not isinstance(self.options, Mapping)
        values = values_of(self.options) if is_record else self.options
        return {**plain(values), **identity(self.kind)}


def imported(target: str) -> Any:
    """Return what a dotted name stands for, which was judged before."""
    return _found(TARGET, target)


def built(value: Any) -> Any:
    """Return a plain value with every mapping that names a target in place of what it makes."""
    if isinstance(value, Mapping):
        arguments = {name: built(each) for name, each in value.items() if name != TARGET}
        return imported(value[TARGET])(**arguments) if TARGET in value else arguments
    if isinstance(value, list | tuple):
        return [built(each) for each in value]
    return value


def resolve(key: str, target: object, *, base: str | None = None) -> Any:
    """Return what a dotted name stands for.

    Args:
        key: of the problem.
        base: dotted name of the class that it has to be a subclass of.

    Raises:
        RequestError: names what is missing, and the nearest there is.
    """
    if not isinstance(target, str) or not all(w.isidentifier() for w in target.split(".")):
        reason = "name a class, PACKAGE.MODULE.CLASS"
        raise RequestError(Problem(key, target, reason=reason))
    found = _found(key, target)
    if base is None:
        return found
    wanted = _found(key, base)
    if not isinstance(found, type) or not issubclass(found, wanted):
        raise RequestError(Problem(key, target, reason=f"it is no subclass of {base}"))
    return found


def dotted(kind: type | str) -> str:
    """Return the name by which a class is found."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def identity(kind: type | str) -> dict[str, str | None]:
    """Return what tells a class from outside from another one: its name, and its file's SHA-256.

    Of ours the version tells, and of the libraries that we stand on theirs.

    Args:
        kind: the class, or its dotted name; one of those libraries is then not imported.
    """
    module = kind if isinstance(kind, str) else kind.__module__
    if module.partition(".")[0] in _WITH_A_VERSION:
        return {}
    if isinstance(kind, str):
        return identity(imported(kind))
    try:
        digest = sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (TypeError, OSError):  # it stands in no file
        digest = None
    return {TARGET: dotted(kind), "sha256": digest}


@lru_cache
def parsed_module(name: str) -> ast.Module:
    """Return the source of a module that is not imported, since that is slow.

    Args:
        name: dotted; a package's is its `__init__`.
    """
    top, *rest = name.split(".")
    spec = find_spec(top)
    assert spec is not None and spec.submodule_search_locations
    place = Path(spec.submodule_search_locations[0], *rest)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def parameters_of(kind: type | str) -> Mapping[str, Parameter]:
    """Return the arguments of a class.

    Args:
        kind: the class; or the dotted name of one whose source is read in place of an import.
    """
    if not isinstance(kind, str):
        return inspect.signature(kind).parameters
    module, _, name = kind.rpartition(".")
    classes = (n for n in parsed_module(module).body if isinstance(n, ast.ClassDef))
    body = next((node.body for node in classes if node.name == name), [])
    functions = (node for node in body if isinstance(node, ast.FunctionDef))
    made = next((each.args for each in functions if each.name == "__init__"), None)
    if made is None:
        return inspect.signature(imported(kind)).parameters
    required = [Parameter.empty] * (len(made.args) - len(made.defaults))
    defaults = [*required, *made.defaults, *(each or Parameter.empty for each in made.kw_defaults)]
    stated = zip([*made.args, *made.kwonlyargs], defaults, strict=True)
    return {
        each.arg: Parameter(each.arg, Parameter.KEYWORD_ONLY, default=default)
        for each, default in stated
        if each.arg != "self"
    }


def values_of(record: Any) -> dict[str, Any]:
    """Return field → value of a record."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def plain(value: Any) -> Any:
    """Return a value as plain ones; of a record that an option holds what a person would write."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value
    kind, name = type(value), getattr(value, "name", "")
    values, outside = plain(values_of(value)), identity(kind)
    if outside or not name:
        return {TARGET: dotted(kind), **values, **outside}
    return name if value == kind() else {"name": name, **values}


def argument_problems(
    kind: type | str, arguments: Mapping[str, Any], *, key: str, given: tuple[str, ...] = ()
) -> Iterator[Problem]:
    """Yield arguments that a class doesn't take, and those that it needs besides.

    Args:
        kind: see `parameters_of`.
        key: below which the arguments stand.
        given: arguments that are given by ourselves.
    """
    parameters = parameters_of(kind)
    name_of_class = dotted(kind).rpartition(".")[2]
    named = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    # Lightning passes what it doesn't know on to where nobody tells a typo
    is_open = len(named) < len(parameters) and not dotted(kind).startswith("lightning.")
    allowed = [name for name in named if name not in given]
    for name, value in arguments.items():
        if name not in allowed and not is_open:
            reason = f"{name_of_class} has no such argument; it has {', '.join(allowed) or 'none'}"
            near = nearest(name, allowed)
            full = None if near is None else f"{key}.{near}"
            yield Problem(f"{key}.{name}", value, reason=reason, nearest=full)
    for name in allowed:
        if parameters[name].default is inspect.Parameter.empty and name not in arguments:
            yield Problem(f"{key}.{name}", reason=f"{name_of_class} needs it")


def building_problem(kind: type, arguments: Mapping[str, Any], *, key: str) -> Any | Problem:
    """Return an instance of a class, or what it says of its arguments."""
    try:
        with quietly():
            return kind(**built(arguments))
    except Exception as error:  # whatever a class of somebody else raises
        said = " ".join(str(error).split()) or type(error).__name__
        name = next((n for n in arguments if n in said.replace("`", " ").split()), None)
        where = key if name is None else f"{key}.{name}"
        value = arguments if name is None else arguments[name]
        return Problem(where, value, reason=said.rstrip("."))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep notices of something that is imported or built for trial away."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _found(key: str, target: str) -> Any:
    names = target.split(".")
    node, place = _module(key, target, names[0]), names[0]
    for name in names[1:]:
        inner = getattr(node, name, None)
        if inner is None and inspect.ismodule(node) and hasattr(node, "__path__"):
            # A package may have deleted the attribute, as torch.optim does with adamw
            inner = _module(key, target, f"{place}.{name}", is_optional=True)
        if inner is None:
            near = nearest(name, [word for word in dir(node) if not word.startswith("_")])
            reason = f"{place} has no {name}"
            raise RequestError(Problem(key, target, reason=reason, nearest=near))
        node, place = inner, f"{place}.{name}"
    return node


def _module(key: str, target: str, name: str, *, is_optional: bool = False) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name and is_optional:
            return None
        reason = f"there is no module {name}{_beside(name)}"
        if error.name != name:
            reason = f"{name} needs the module {error.name}, which is not installed"
        raise RequestError(Problem(key, target, reason=reason)) from error
    # The border to code of other people: whatever it raises is told with its name
    except Exception as error:
        told = " ".join(str(error).split())
        reason = f"importing {name} failed ({type(error).__name__}: {told})"
        raise RequestError(Problem(key, target, reason=reason)) from error


def _beside(name: str) -> str:
    """Say so where a module lies in the folder that a person stands in, which is not looked in."""
    here = Path.cwd()
    if not (here / f"{name}.py").is_file() and not (here / name).is_dir():
        return ""
    if str(here) in sys.path:
        return ""
    return (
        f"; Python does not look in this folder, where one lies: install it, or PYTHONPATH={here}"
    )

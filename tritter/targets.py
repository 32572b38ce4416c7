"""Classes that a config names by `_target_`: import, check by signature, build.

Only names from option files and from the user's command line are imported. A name in a
checkpoint, a run folder or a dataset is plain text and never reaches this module.
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
        options: a record of its `Options`. For a class without `Options`, the config section:
            arguments by name, and `_target_`.
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
        """Return its options as plain values, plus the checksum of a third-party class."""
        values = self.options if isinstance(self.options, Mapping) else values_of(self.options)
        return {**plain(values), **identity(self.kind)}


def import_object(target: str) -> Any:
    """Return the object behind a dotted name that was checked before."""
    return _found(TARGET, target)


def instantiate(value: Any) -> Any:
    """Return a plain value in which each mapping with a `_target_` is instantiated."""
    if isinstance(value, Mapping):
        arguments = {name: instantiate(each) for name, each in value.items() if name != TARGET}
        return import_object(value[TARGET])(**arguments) if TARGET in value else arguments
    if isinstance(value, list | tuple):
        return [instantiate(each) for each in value]
    return value


def resolve(key: str, target: object, *, base: str | None = None) -> Any:
    """Return the object behind a dotted name.

    Args:
        key: key to name in errors.
        target: the dotted name.
        base: dotted name of the required base class.
    """
    if not isinstance(target, str) or not all(w.isidentifier() for w in target.split(".")):
        raise RequestError(Problem(key, target, reason="name a class, PACKAGE.MODULE.CLASS"))
    found = _found(key, target)
    if base is None:
        return found
    base_class = _found(key, base)
    if not isinstance(found, type) or not issubclass(found, base_class):
        raise RequestError(Problem(key, target, reason=f"it is not a subclass of {base}"))
    return found


def dotted(kind: type | str) -> str:
    """Return the dotted name of a class."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def identity(kind: type | str) -> dict[str, str | None]:
    """Return the identity of a third-party class: its name and the SHA-256 of its file.

    Classes of Tritter and of its dependencies are identified by the version of the package.

    Args:
        kind: the class, or its dotted name, which is not imported if a dependency defines it.
    """
    module = kind if isinstance(kind, str) else kind.__module__
    if module.partition(".")[0] in _WITH_A_VERSION:
        return {}
    if isinstance(kind, str):
        return identity(import_object(kind))
    try:
        digest = sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (TypeError, OSError):  # defined in no file
        digest = None
    return {TARGET: dotted(kind), "sha256": digest}


@lru_cache
def parsed_module(name: str) -> ast.Module:
    """Return the syntax tree of a module without importing it, which is slow.

    Args:
        name: dotted name of a module or package.
    """
    top, *rest = name.split(".")
    spec = find_spec(top)
    assert spec is not None and spec.submodule_search_locations
    stem = Path(spec.submodule_search_locations[0], *rest)
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def parameters_of(kind: type | str) -> Mapping[str, Parameter]:
    """Return the arguments of a class.

    Args:
        kind: the class, or its dotted name: its source is then parsed instead of imported.
    """
    if not isinstance(kind, str):
        return inspect.signature(kind).parameters
    module, _, name = kind.rpartition(".")
    classes = (n for n in parsed_module(module).body if isinstance(n, ast.ClassDef))
    body = next((node.body for node in classes if node.name == name), [])
    functions = (node for node in body if isinstance(node, ast.FunctionDef))
    signature = next((each.args for each in functions if each.name == "__init__"), None)
    if signature is None:
        return inspect.signature(import_object(kind)).parameters
    required = [Parameter.empty] * (len(signature.args) - len(signature.defaults))
    defaults = [
        *required,
        *signature.defaults,
        *(each or Parameter.empty for each in signature.kw_defaults),
    ]
    pairs = zip([*signature.args, *signature.kwonlyargs], defaults, strict=True)
    return {
        each.arg: Parameter(each.arg, Parameter.KEYWORD_ONLY, default=default)
        for each, default in pairs
        if each.arg != "self"
    }


def values_of(record: Any) -> dict[str, Any]:
    """Return field → value of a record."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def plain(value: Any) -> Any:
    """Return a value as plain lists and dicts; a record as a user would write it in a config."""
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
    kind: type | str, arguments: Mapping[str, Any], *, key: str, reserved: tuple[str, ...] = ()
) -> Iterator[Problem]:
    """Yield a problem for each unknown argument and for each missing one.

    Args:
        kind: see `parameters_of`.
        arguments: argument → value.
        key: section of the config that holds the arguments.
        reserved: arguments that the caller sets itself.
    """
    parameters = parameters_of(kind)
    name_of_class = dotted(kind).rpartition(".")[2]
    named = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    # Lightning forwards unknown arguments to code that does not report typos
    is_open = len(named) < len(parameters) and not dotted(kind).startswith("lightning.")
    allowed = [name for name in named if name not in reserved]
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
    """Return an instance of a class, or the problem that its constructor raised."""
    try:
        with silence_logging():
            return kind(**instantiate(arguments))
    except Exception as error:  # third-party classes may raise anything
        message = " ".join(str(error).split()) or type(error).__name__
        name = next((n for n in arguments if n in message.replace("`", " ").split()), None)
        where = key if name is None else f"{key}.{name}"
        value = arguments if name is None else arguments[name]
        return Problem(where, value, reason=message.rstrip("."))


@contextmanager
def silence_logging() -> Iterator[None]:
    """Silence log messages and warnings of a trial import or build."""
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
    node, parent = _module(key, target, names[0]), names[0]
    for name in names[1:]:
        inner = getattr(node, name, None)
        if inner is None and inspect.ismodule(node) and hasattr(node, "__path__"):
            # A package may have deleted the attribute, as torch.optim does with adamw
            inner = _module(key, target, f"{parent}.{name}", is_optional=True)
        if inner is None:
            near = nearest(name, [other for other in dir(node) if not other.startswith("_")])
            raise RequestError(Problem(key, target, reason=f"{parent} has no {name}", nearest=near))
        node, parent = inner, f"{parent}.{name}"
    return node


def _module(key: str, target: str, name: str, *, is_optional: bool = False) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name and is_optional:
            return None
        reason = f"there is no module {name}{_import_path_hint(name)}"
        if error.name != name:
            reason = f"{name} needs the module {error.name}, which is not installed"
        raise RequestError(Problem(key, target, reason=reason)) from error
    # Third-party code may raise anything: report the error with its type
    except Exception as error:
        message = " ".join(str(error).split())
        reason = f"importing {name} failed ({type(error).__name__}: {message})"
        raise RequestError(Problem(key, target, reason=reason)) from error


def _import_path_hint(name: str) -> str:
    """Return a hint on where the module could be found."""
    here = Path.cwd()
    if not (here / f"{name}.py").is_file() and not (here / name).is_dir():
        return "; install its package, or set PYTHONPATH to the folder that contains it"
    if str(here) in sys.path:
        return ""
    return f"; the working directory has one but is not on sys.path: set PYTHONPATH={here}"

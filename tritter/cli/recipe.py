"""A recipe of `tritter expand`: the steps with their options, and what else decides the result.

The file says what a command line can't: two steps of one method, or the same option of two.

A file holds plain values, each with its line. Nothing but mappings, lists, texts, numbers, booleans
and null is made of it, whatever its tags say. A key that stands twice, which YAML would let the
last one win, is refused, and so are aliases, by which a small file means a huge one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tritter.checkpoints.history import read_chain
from tritter.checkpoints.record import ExpansionRecord
from tritter.config.components import Reader, method_class, method_keys, method_names, read_methods
from tritter.config.folders import body_of, option_files
from tritter.core.expansions import ExpansionSpec
from tritter.errors import (
    Names,
    Problem,
    RequestError,
    TritterError,
    brief,
    naming,
    nearest,
    raise_problems,
)
from tritter.limits import BYTE_UNITS, COUNT_UNITS, MAX_BYTES, MAX_PARAMETERS, parse_count
from tritter.options import options, read_options
from tritter.storage.reading import named_path, read_text
from tritter.storage.tensors import WEIGHT_DTYPES, TensorFolder
from tritter.targets import TARGET

Place = tuple[str | int, ...]  # keys and positions from the root

_MOST_BYTES = 2**20
_DEEPEST = 16
_MOST_LINES = 4  # that a message names
_COLLECTIONS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq")}
_MADE = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
_TEXTS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "merge", "value")}
_POWER_OF_TEN = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}")  # YAML 1.1 wants the dot


@dataclass(frozen=True, slots=True)
class LinedYaml:
    """What a file holds.

    Args:
        lines: place → the line that it begins at, counted from 1.
    """

    path: Path
    value: Any
    lines: Mapping[Place, int]

    def origin(self, *place: str | int) -> str:
        """Say where something stands: its line, or that of what it would stand in."""
        return self.origin_of([place])

    def origin_of(self, places: Sequence[Place]) -> str:
        """Say where something stands that may be meant by several places."""
        lines: set[int] = set()
        for place in places:
            ends = (place[:end] for end in range(len(place), -1, -1))
            lines.add(next(self.lines[end] for end in ends if end in self.lines))
        named = [str(line) for line in sorted(lines)[:_MOST_LINES]]
        named += [f"{len(lines) - _MOST_LINES} more"] * (len(lines) > _MOST_LINES)
        return f"{self.path}, line {' or '.join(named)}"


def read_lined_yaml(path: Path) -> LinedYaml:
    """Read a file.

    Raises:
        RequestError: it can't be read, is no YAML, or holds what no such file needs.
    """
    try:
        text = read_text(path, limit_bytes=_MOST_BYTES)
    except TritterError as error:
        raise RequestError(str(error)) from error
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):  # before any tree is made of it
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise _refusal(path, line, "aliases (*) are not read here")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise _refusal(path, line, "it is nested too deeply")
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refusal(path, line, f"it is no YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise RequestError(f"{path} is no YAML: {told}") from error
    lines: dict[Place, int] = {(): 1}
    value = None if root is None else _value(path, root, (), lines)
    return LinedYaml(path, value, lines)


def _value(path: Path, node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    is_scalar = isinstance(node, yaml.ScalarNode)
    if node.tag not in ({*_TEXTS, *_MADE} if is_scalar else _COLLECTIONS):
        raise _refusal(path, line, f"the tag {node.tag} is not read here")
    if isinstance(node, yaml.MappingNode):
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal(path, line, "a key is a word")
            key = str(key_node.value)
            if key in table:
                raise _refusal(path, line, f"{brief(key)} stands twice")
            lines[(*place, key)] = line
            table[key] = _value(path, value_node, (*place, key), lines)
        return table
    if isinstance(node, yaml.SequenceNode):
        return [_value(path, item, (*place, i), lines) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if node.tag in _TEXTS:
        is_number = not node.style and _POWER_OF_TEN.fullmatch(node.value)
        return float(node.value) if is_number else str(node.value)
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError, KeyError) as error:
        raise _refusal(path, line, f"{brief(node.value)} is no number") from error


def _refusal(path: Path, line: int, reason: str) -> RequestError:
    return RequestError(f"{path}, line {line}: {reason}.")


_STEPS = "steps"
_MAX_SEED = 2**64 - 1  # runs derive the seeds of their expansions, which have so many bits
_GROUP = "expansion."  # of the keys of a run, in which a recipe's methods have no group


@options
class Settings:
    """What a recipe says beside its steps; None what it leaves to the command line.

    Args:
        target_params: a number of parameters that its one step is to come near to.
    """

    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    moments: Literal["carry", "zero", "reset_new"] | None = None
    max_shard_size: Annotated[int, Field(ge=1, le=MAX_BYTES)] | None = None
    target_params: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)] | None = None
    output: Annotated[str, Field(min_length=1)] | None = None


_COUNTS = {"max_shard_size": BYTE_UNITS, "target_params": COUNT_UNITS}
_KEYS = (_STEPS, *(field.name for field in fields(Settings)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that was read and found right, as far as no model need be known for it."""

    steps: tuple[ExpansionSpec, ...]
    settings: Settings
    origin: LinedYaml

    def given(self) -> dict[str, Any]:
        """Return what it says beside its steps."""
        values = {field.name: getattr(self.settings, field.name) for field in fields(Settings)}
        return {name: value for name, value in values.items() if value is not None}

    def names(self, step: int | None = None) -> Names:
        """Return how refusals call what it asks for: by its keys and lines.

        Args:
            step: the one that is refused; None: any.
        """

        def name(key: str) -> str:
            is_typed = key in ("target_params", "dtype", "checkpoint") and key not in self.given()
            return f"--{key.replace('_', '-')}" if is_typed else key.removeprefix(_GROUP)

        def origin(key: str) -> str | None:
            method, _, field = key.removeprefix(_GROUP).partition(".")
            steps: list[Place] = [
                (_STEPS, number, method)
                for number, each in enumerate(self.steps)
                if key.startswith(_GROUP) and each.name == method and step in (None, number)
            ]
            if steps:  # or the lines of its key, where they state it
                keys = [(*place, field) for place in steps if (*place, field) in self.origin.lines]
                return self.origin.origin_of(keys or steps)
            return self.origin.origin(key) if key in self.given() else None

        return Names(name, origin)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a file.

    Raises:
        RequestError: it can't be read, or says something that there is not; all that is wrong at
            once, each with its line.
    """
    origin = read_lined_yaml(path)
    raw = origin.value
    if not isinstance(raw, Mapping) or not raw.get(_STEPS):
        reason = (
            f"{path}: a recipe holds {_STEPS}, a list such as [width: {{hidden_size: 96}}, dus]"
        )
        raise RequestError(f"{reason}.")
    with naming(Names(lambda key: key.removeprefix(_GROUP))):
        return _read(origin)


def _read(origin: LinedYaml) -> Recipe:
    problems: list[Problem] = []
    raw = origin.value
    for name in raw:
        if name not in _KEYS:
            reason = f"there is no such key; a recipe has {', '.join(_KEYS)}"
            near = nearest(name, _KEYS)
            problems.append(
                Problem(name, raw[name], reason, nearest=near, origin=origin.origin(name))
            )
    stated = {name: value for name, value in raw.items() if name in _KEYS[1:]}
    for name, units in _COUNTS.items():
        if isinstance(stated.get(name), str):
            stated[name] = parse_count(stated[name], units) or stated[name]
    found: list[Problem] = []
    settings = read_options(Settings, stated, prefix="", problems=found)
    if settings is not None and settings.output is not None:
        try:
            named_path(settings.output, key="output")
        except RequestError as error:
            found += error.problems
    problems += [replace(each, origin=origin.origin(each.key)) for each in found]
    steps = _steps(origin, problems)
    if settings is not None and (settings.seed or 0) + len(steps) - 1 > _MAX_SEED:
        reason = f"each step takes the next one; must be one from which {len(steps)} lie below 2⁶⁴"
        problems.append(Problem("seed", settings.seed, reason, origin=origin.origin("seed")))
    raise_problems(problems)
    assert settings is not None
    return Recipe(steps, settings, origin)


def _steps(origin: LinedYaml, problems: list[Problem]) -> tuple[ExpansionSpec, ...]:
    raw = origin.value[_STEPS]
    if not isinstance(raw, list):
        reason = "it is a list of steps, each a method with its options: - width: {hidden_size: 96}"
        problems.append(Problem(_STEPS, raw, reason, origin=origin.origin(_STEPS)))
        return ()
    steps: list[ExpansionSpec] = []
    methods = _Methods()
    for number, item in enumerate(raw):
        found: list[Problem] = []
        step = _step(item, found, methods)
        steps += [] if step is None else [step]
        for each in found:
            keys = each.key.removeprefix(_GROUP).split(".")
            where = origin.origin(_STEPS, number, *(keys if each.key != _STEPS else ()))
            problems.append(replace(each, origin=where))
    return tuple(steps)


class _Methods:
    """The expansion methods that there are; their option files are found once for all steps."""

    def __init__(self) -> None:
        self.names = method_names("expansion")
        self.keys = cache(method_keys)
        self._bodies = option_files()["expansion"]
        self._read: dict[str, tuple[Mapping[str, Any], type[Any] | None, list[Problem]]] = {}

    def named(self, name: str) -> tuple[Mapping[str, Any], type[Any] | None, list[Problem]]:
        """Return the keys that a method's option file states, its class, and what is wrong."""
        if name not in self._read:
            body, reader = body_of(self._bodies[name])[name], Reader(self.keys)
            assert isinstance(body, Mapping)
            kind = reader.call(method_class, "expansion", name, {name: body})
            self._read[name] = body, kind, reader.problems
        return self._read[name]


def _step(item: object, problems: list[Problem], methods: _Methods) -> ExpansionSpec | None:
    """Return an item of the list, a method's name or that above its options, as an expansion."""
    table = {item: None} if isinstance(item, str) else item
    if not isinstance(table, Mapping) or len(table) != 1:
        reason = "a step is one method with its options, as in - width: {hidden_size: 96}"
        problems.append(Problem(_STEPS, item, reason))
        return None
    ((name, given),) = table.items()
    given = {} if given is None else given
    if (near := name.replace("-", "_")) in methods.names and near != name:
        problems.append(Problem(name, given or None, "it is spelled so here", nearest=near))
    elif name not in methods.names:
        reason = f"there is no such method; there are {', '.join(methods.names)}"
        problems.append(Problem(name, given, reason, nearest=nearest(near, methods.names)))
    elif not isinstance(given, Mapping):
        problems.append(Problem(name, given, "it holds keys, as in {target_layers: 6}"))
    elif TARGET in given:
        reason = "a step is a method by name; other classes come in by --config-dir"
        problems.append(Problem(f"{name}.{TARGET}", given[TARGET], reason))
    else:
        body, kind, unfit = methods.named(name)
        reader = Reader(methods.keys)
        classes = {} if kind is None else {f"expansion.{name}": kind}
        read = read_methods(reader, "expansion", {name: {**body, **given}}, classes)
        problems += (*unfit, *reader.problems)
        return read[0].options if read else None
    return None


def recorded_recipe(folder: Path) -> str:
    """Return the text of a recipe by which the parent of a checkpoint becomes it once more.

    Raises:
        RequestError: there is no checkpoint, its lineage can't be read, or what made it is no
            expansion, or several with a training between them.
    """
    chain = read_chain(folder)
    link = chain[-1]
    if link.problem:
        raise RequestError(link.problem)
    if link.lineage is None:
        raise RequestError(f"{folder} is a plain folder: no record says what made it.")
    records = link.made_by
    if not records:
        raise RequestError(f"{folder} was trained or stands at the start: no expansion made it.")
    parent = chain[-2] if len(chain) > 1 else None
    starts = link.lineage.parent_hash == link.lineage.base_model_hash
    if not starts and (parent is None or parent.lineage is None):
        raise RequestError(
            f"{folder}: its parent is not there, whose record says which of these came before it: "
            f"{', '.join(record.method for record in link.lineage.expansion_history)}."
        )
    _check_steps(folder, records)
    settings: dict[str, Any] = {"seed": records[0].seed}
    own = _dtypes(folder)
    before = None if parent is None or parent.folder is None else _dtypes(parent.folder)
    if len(own) == 1 and own != before and own <= set(WEIGHT_DTYPES):
        settings["dtype"] = next(iter(own))  # it does not follow from the source
    assert link.folder is not None
    name = f"{_word(parent.folder)}, " if parent is not None and parent.folder is not None else ""
    comments = [f"of {name}the checkpoint {link.lineage.parent_hash}"]
    if link.lineage.step:
        comments.append(
            f"a training of {link.lineage.step} steps followed, which no recipe of expand holds"
        )
    else:
        comments.append(f"it makes {_word(link.folder)}, {link.lineage.model_hash}")
    lines = [*(f"# {line}" for line in comments), f"{_STEPS}:"]
    for record in records:  # what is None follows from the rest
        stated = {key: value for key, value in record.options.items() if value is not None}
        lines.append(f"- {record.method}: {_inline(stated)}" if stated else f"- {record.method}")
    lines += [f"{name}: {_inline(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _inline(value: object) -> str:
    if isinstance(value, Mapping):
        value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _check_steps(folder: Path, records: Sequence[ExpansionRecord]) -> None:
    """Refuse what `expand` doesn't make in one go."""
    known = option_files()["expansion"]
    for record in records:
        if record.method not in known:
            raise RequestError(
                f"{folder}: {record.method} made it, which no recipe of expand holds; there are "
                f"{', '.join(name for name in known if name != 'none')}."
            )
    seeds = [record.seed for record in records]
    sizes = [(a.target_config, b.source_config) for a, b in pairwise(records)]
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))) or any(a != b for a, b in sizes):
        methods = ", ".join(record.method for record in records)
        raise RequestError(
            f"{folder}: {methods} were carried out by several commands, and the checkpoints "
            "between them are not there; no one recipe makes it of what is."
        )


def _dtypes(folder: Path) -> set[str]:
    try:
        return {header.dtype for header in TensorFolder.open(folder).headers.values()}
    except TritterError as error:
        raise RequestError(str(error)) from error


def _word(folder: Path) -> str:
    """Return a folder's name; a line break in it would end the YAML comment it is written in."""
    name = folder.resolve().name
    return name if name.isprintable() else ascii(name)

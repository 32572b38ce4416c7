"""A recipe of `tritter expand`: a YAML file of steps with their options and other settings.

A recipe can express more than the command line: two steps of one method, or the same option for
two methods.

Only mappings, lists, strings, numbers, booleans and null are read; other tags are errors. So are
duplicate keys, which YAML would silently accept, and aliases, which can expand to a huge document.
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
    nearest,
    raise_problems,
    use_names,
)
from tritter.limits import BYTE_UNITS, COUNT_UNITS, MAX_BYTES, MAX_PARAMETERS, parse_count
from tritter.options import options, read_options
from tritter.storage.reading import named_path, read_text
from tritter.storage.tensors import WEIGHT_DTYPES, TensorFolder
from tritter.targets import TARGET

KeyPath = tuple[str | int, ...]  # keys and positions from the root

_MAX_BYTES = 2**20
_MAX_DEPTH = 16
_MAX_LINES = 4  # in a message
_COLLECTIONS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq")}
_MADE = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
_TEXTS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "merge", "value")}
_POWER_OF_TEN = re.compile(
    r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}"
)  # YAML 1.1 requires the dot


@dataclass(frozen=True, slots=True)
class LinedYaml:
    """The content of a YAML file with line numbers.

    Args:
        path: the file.
        value: its content.
        lines: path of keys → first line of the value, from 1.
    """

    path: Path
    value: Any
    lines: Mapping[KeyPath, int]

    def origin(self, *key_path: str | int) -> str:
        """Return file and line of a value, or of its nearest parent."""
        return self.origin_of([key_path])

    def origin_of(self, key_paths: Sequence[KeyPath]) -> str:
        """Return the file and the lines of several values, or of their nearest parents."""
        lines: set[int] = set()
        for key_path in key_paths:
            ends = (key_path[:end] for end in range(len(key_path), -1, -1))
            lines.add(next(self.lines[end] for end in ends if end in self.lines))
        named = [str(line) for line in sorted(lines)[:_MAX_LINES]]
        named += [f"{len(lines) - _MAX_LINES} more"] * (len(lines) > _MAX_LINES)
        return f"{self.path}, line {' or '.join(named)}"


def read_lined_yaml(path: Path) -> LinedYaml:
    """Read a file.

    Raises:
        RequestError: the file can't be read, is not valid YAML, or uses unsupported YAML features.
    """
    try:
        text = read_text(path, limit_bytes=_MAX_BYTES)
    except TritterError as error:
        raise RequestError(str(error)) from error
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):  # before the tree is built
            line = 1 if event.start_mark is None else event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise _refusal(path, line, "aliases (*) are not supported")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise _refusal(path, line, "it is nested too deeply")
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refusal(path, line, f"invalid YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path} is not valid YAML: {reason}") from error
    lines: dict[KeyPath, int] = {(): 1}
    value = None if root is None else _value(path, root, (), lines)
    return LinedYaml(path, value, lines)


def _value(path: Path, node: yaml.Node, key_path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(key_path, line)
    is_scalar = isinstance(node, yaml.ScalarNode)
    if node.tag not in ({*_TEXTS, *_MADE} if is_scalar else _COLLECTIONS):
        raise _refusal(path, line, f"the tag {node.tag} is not supported")
    if isinstance(node, yaml.MappingNode):
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal(path, line, "keys must be plain words")
            key = str(key_node.value)
            if key in table:
                raise _refusal(path, line, f"the key {brief(key)} is duplicated")
            lines[(*key_path, key)] = line
            table[key] = _value(path, value_node, (*key_path, key), lines)
        return table
    if isinstance(node, yaml.SequenceNode):
        return [_value(path, item, (*key_path, i), lines) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if node.tag in _TEXTS:
        is_number = not node.style and _POWER_OF_TEN.fullmatch(node.value)
        return float(node.value) if is_number else str(node.value)
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError, KeyError) as error:
        raise _refusal(path, line, f"{brief(node.value)} is not a number") from error


def _refusal(path: Path, line: int, reason: str) -> RequestError:
    return RequestError(f"{path}, line {line}: {reason}.")


_STEPS = "steps"
_MAX_SEED = 2**64 - 1  # the 64-bit seeds that runs derive for their expansions
_GROUP = "expansion."  # prefix of a run's keys, which a recipe's methods do not have


@options
class Settings:
    """The settings of a recipe other than its steps. None leaves one to the command line.

    Args:
        seed: random seed.
        dtype: dtype of the result.
        moments: mapping of optimizer moments.
        max_shard_size: maximum size of a file in bytes.
        target_params: target number of parameters for a recipe with one step.
        output: the folder to write.
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
    """A validated recipe. Checks that need the model are done later."""

    steps: tuple[ExpansionSpec, ...]
    settings: Settings
    origin: LinedYaml

    def stated_settings(self) -> dict[str, Any]:
        """Return the settings in the file, without the steps."""
        values = {field.name: getattr(self.settings, field.name) for field in fields(Settings)}
        return {name: value for name, value in values.items() if value is not None}

    def names(self, step: int | None = None) -> Names:
        """Return the names of keys in errors: the recipe's keys with their lines.

        Args:
            step: number of the step with the error; None for any step.
        """

        def name(key: str) -> str:
            is_typed = (
                key in ("target_params", "dtype", "checkpoint")
                and key not in self.stated_settings()
            )
            return f"--{key.replace('_', '-')}" if is_typed else key.removeprefix(_GROUP)

        def origin(key: str) -> str | None:
            method, _, field = key.removeprefix(_GROUP).partition(".")
            steps: list[KeyPath] = [
                (_STEPS, number, method)
                for number, each in enumerate(self.steps)
                if key.startswith(_GROUP) and each.name == method and step in (None, number)
            ]
            if steps:  # the lines of the key if the file has it, otherwise of the step
                keys = [
                    (*key_path, field)
                    for key_path in steps
                    if (*key_path, field) in self.origin.lines
                ]
                return self.origin.origin_of(keys or steps)
            return self.origin.origin(key) if key in self.stated_settings() else None

        return Names(name, origin)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RequestError: the file can't be read or is invalid. The message lists all problems with
            their lines.
    """
    origin = read_lined_yaml(path)
    raw = origin.value
    if not isinstance(raw, Mapping) or not raw.get(_STEPS):
        reason = (
            f"{path}: a recipe needs {_STEPS}, a list such as [width: {{hidden_size: 96}}, dus]"
        )
        raise RequestError(f"{reason}.")
    with use_names(Names(lambda key: key.removeprefix(_GROUP))):
        return _read(origin)


def _read(origin: LinedYaml) -> Recipe:
    problems: list[Problem] = []
    raw = origin.value
    for name in raw:
        if name not in _KEYS:
            reason = f"unknown key; must be one of {', '.join(_KEYS)}"
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
        reason = f"each step uses the next seed, and all {len(steps)} must be below 2⁶⁴"
        problems.append(Problem("seed", settings.seed, reason, origin=origin.origin("seed")))
    raise_problems(problems)
    assert settings is not None
    return Recipe(steps, settings, origin)


def _steps(origin: LinedYaml, problems: list[Problem]) -> tuple[ExpansionSpec, ...]:
    raw = origin.value[_STEPS]
    if not isinstance(raw, list):
        reason = "must be a list of methods with their options: - width: {hidden_size: 96}"
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
    """The available expansion methods; their option files are read once for all steps."""

    def __init__(self) -> None:
        self.names = method_names("expansion")
        self.keys = cache(method_keys)
        self._bodies = option_files()["expansion"]
        self._read: dict[str, tuple[Mapping[str, Any], type[Any] | None, list[Problem]]] = {}

    def resolve(self, name: str) -> tuple[Mapping[str, Any], type[Any] | None, list[Problem]]:
        """Return the keys in a method's option file, its class, and a list of problems."""
        if name not in self._read:
            body, reader = body_of(self._bodies[name])[name], Reader(self.keys)
            assert isinstance(body, Mapping)
            kind = reader.call(method_class, "expansion", name, {name: body})
            self._read[name] = body, kind, reader.problems
        return self._read[name]


def _step(item: object, problems: list[Problem], methods: _Methods) -> ExpansionSpec | None:
    """Return the expansion of a list item, which is a method's name or maps it to its options."""
    table = {item: None} if isinstance(item, str) else item
    if not isinstance(table, Mapping) or len(table) != 1:
        reason = "must be one method with its options, as in - width: {hidden_size: 96}"
        problems.append(Problem(_STEPS, item, reason))
        return None
    ((name, stated),) = table.items()
    stated = {} if stated is None else stated
    if (near := name.replace("-", "_")) in methods.names and near != name:
        problems.append(Problem(name, stated or None, "recipes use underscores", nearest=near))
    elif name not in methods.names:
        reason = f"unknown method; must be one of {', '.join(methods.names)}"
        problems.append(Problem(name, stated, reason, nearest=nearest(near, methods.names)))
    elif not isinstance(stated, Mapping):
        problems.append(Problem(name, stated, "must be a mapping, as in {target_layers: 6}"))
    elif TARGET in stated:
        reason = "a step must be a method's name; --config-dir adds classes of your own"
        problems.append(Problem(f"{name}.{TARGET}", stated[TARGET], reason))
    else:
        body, kind, unfit = methods.resolve(name)
        reader = Reader(methods.keys)
        classes = {} if kind is None else {f"expansion.{name}": kind}
        read = read_methods(reader, "expansion", {name: {**body, **stated}}, classes)
        problems += (*unfit, *reader.problems)
        return read[0].options if read else None
    return None


def recorded_recipe(folder: Path) -> str:
    """Return the text of a recipe that makes a checkpoint from its parent.

    Raises:
        RequestError: the folder is not a checkpoint, its lineage can't be read, or it was not made
            by expansions in a single command.
    """
    chain = read_chain(folder)
    link = chain[-1]
    if link.problem:
        raise RequestError(link.problem)
    if link.lineage is None:
        raise RequestError(f"{folder} is a plain folder and records no expansion.")
    records = link.expansion_records
    if not records:
        raise RequestError(f"{folder} is a base or a trained model: no expansion made it.")
    parent = chain[-2] if len(chain) > 1 else None
    starts = link.lineage.parent_hash == link.lineage.base_model_hash
    if not starts and (parent is None or parent.lineage is None):
        raise RequestError(
            f"{folder}: its parent is missing. Without its lineage it is unknown which of these "
            "expansions came after it: "
            f"{', '.join(record.method for record in link.lineage.expansion_history)}."
        )
    _check_steps(folder, records)
    settings: dict[str, Any] = {"seed": records[0].seed}
    own = _dtypes(folder)
    before = None if parent is None or parent.folder is None else _dtypes(parent.folder)
    if len(own) == 1 and own != before and own <= set(WEIGHT_DTYPES):
        settings["dtype"] = next(iter(own))  # differs from the source
    assert link.folder is not None
    name = f"{_word(parent.folder)}, " if parent is not None and parent.folder is not None else ""
    comments = [f"of {name}the checkpoint {link.lineage.parent_hash}"]
    if link.lineage.step:
        comments.append(
            f"a training run of {link.lineage.step} steps followed, which a recipe can't express"
        )
    else:
        comments.append(f"it makes {_word(link.folder)}, {link.lineage.model_hash}")
    lines = [*(f"# {line}" for line in comments), f"{_STEPS}:"]
    for record in records:  # an option of None is derived from the others
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
    """Check that one `expand` command made the checkpoint."""
    known = option_files()["expansion"]
    for record in records:
        if record.method not in known:
            raise RequestError(
                f"{folder} was made by {record.method}, which is not a method of expand; allowed "
                f"is one of {', '.join(name for name in known if name != 'none')}."
            )
    seeds = [record.seed for record in records]
    sizes = [(a.target_config, b.source_config) for a, b in pairwise(records)]
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))) or any(a != b for a, b in sizes):
        methods = ", ".join(record.method for record in records)
        raise RequestError(
            f"{folder}: {methods} were applied by several commands, and the checkpoints between "
            "them are missing, so no single recipe can reproduce it."
        )


def _dtypes(folder: Path) -> set[str]:
    try:
        return {header.dtype for header in TensorFolder.open(folder).headers.values()}
    except TritterError as error:
        raise RequestError(str(error)) from error


def _word(folder: Path) -> str:
    """Return a folder's name escaped for a YAML comment, which a line break would end."""
    name = folder.resolve().name
    return name if name.isprintable() else ascii(name)

"""A recipe of `tritter expand`: the steps with their options, and what else decides the result.

The file says what a command line can't: two steps of one method, or the same option of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from tritter.checkpoint.history import Link, read_chain
from tritter.checkpoint.record import ExpansionRecord
from tritter.config.counts import BYTE_UNITS, COUNT_UNITS, parse_count
from tritter.config.folders import body_of, option_files
from tritter.config.lined_yaml import LinedYaml, Place, read_lined_yaml
from tritter.config.selection import Reader, method_class, method_keys, method_names, read_methods
from tritter.errors import (
    Names,
    Problem,
    RequestError,
    TritterError,
    naming,
    nearest,
    raise_problems,
)
from tritter.expansion import ExpansionSpec
from tritter.limits import MAX_BYTES, MAX_PARAMETERS
from tritter.options import options, read_options
from tritter.storage.reading import named_path
from tritter.storage.tensors import WEIGHT_DTYPES, TensorFolder
from tritter.targets import TARGET

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

    @property
    def path(self) -> Path:
        return self.origin.path

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
            places = self._places(method, field, step) if key.startswith(_GROUP) else []
            if places:
                return self.origin.origin_of(places)
            return self.origin.origin(key) if key in self.given() else None

        return Names(name, origin)

    def _places(self, method: str, field: str, step: int | None) -> list[Place]:
        """Return where the steps of a method stand, or their key where they state it."""
        at = [n for n, each in enumerate(self.steps) if each.name == method and step in (None, n)]
        steps: list[Place] = [(_STEPS, number, method) for number in at]
        keys: list[Place] = [] if not field else [(*place, field) for place in steps]
        return [key for key in keys if key in self.origin.lines] or steps


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
    settings = _settings(origin, problems)
    steps = _steps(origin, problems)
    if settings is not None and (settings.seed or 0) + len(steps) - 1 > _MAX_SEED:
        reason = (
            f"each step takes the next one; allowed is one from which {len(steps)} lie below 2⁶⁴"
        )
        problems.append(Problem("seed", settings.seed, reason, origin=origin.origin("seed")))
    raise_problems(problems)
    assert settings is not None
    return Recipe(steps, settings, origin)


def _settings(origin: LinedYaml, problems: list[Problem]) -> Settings | None:
    raw = {name: value for name, value in origin.value.items() if name in _KEYS[1:]}
    for name, units in _COUNTS.items():
        if isinstance(raw.get(name), str):
            raw[name] = parse_count(raw[name], units) or raw[name]
    found: list[Problem] = []
    settings = read_options(Settings, raw, prefix="", problems=found)
    if settings is not None and settings.output is not None:
        try:
            named_path(settings.output, key="output")
        except RequestError as error:
            found += error.problems
    problems += [replace(each, origin=origin.origin(each.key)) for each in found]
    return settings


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
            kind = reader.ask(method_class, "expansion", name, {name: body})
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
        return _specification(name, given, problems, methods)
    return None


def _specification(
    name: str, given: Mapping[str, Any], problems: list[Problem], methods: _Methods
) -> ExpansionSpec | None:
    body, kind, unfit = methods.named(name)
    reader = Reader(methods.keys)
    stated = {name: {**body, **given}}
    classes = {} if kind is None else {f"expansion.{name}": kind}
    read = read_methods(reader, "expansion", stated, classes)
    problems += (*unfit, *reader.problems)
    return read[0].options if read else None


def recipe_text(
    steps: Sequence[tuple[str, Mapping[str, Any]]],
    settings: Mapping[str, Any],
    *,
    comments: Sequence[str],
) -> str:
    """Return a recipe as a file holds it.

    Args:
        steps: method and options; what is None follows from the rest, and is left out.
        comments: lines at its top.
    """
    listed = [{m: {k: v for k, v in given.items() if v is not None}} for m, given in steps]
    lines = [f"# {line}" for line in comments]
    for step in listed:
        ((method, given),) = step.items()
        lines.append(f"- {method}: {_inline(given)}" if given else f"- {method}")
    lines.insert(len(comments), f"{_STEPS}:")
    lines += [f"{name}: {_inline(value)}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"


def _inline(value: object) -> str:
    if isinstance(value, Mapping):
        value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("...\n").strip()


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
    if (dtype := _stated_dtype(folder, parent)) is not None:
        settings["dtype"] = dtype
    steps = [(record.method, dict(record.options)) for record in records]
    return recipe_text(steps, settings, comments=_comments(link, parent))


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


def _stated_dtype(folder: Path, parent: Link | None) -> str | None:
    """Return the dtype of all tensors where they can't be said to have it from their source."""
    own = _dtypes(folder)
    before = None if parent is None or parent.folder is None else _dtypes(parent.folder)
    if len(own) != 1 or own == before or not own <= set(WEIGHT_DTYPES):
        return None
    return next(iter(own))


def _dtypes(folder: Path) -> set[str]:
    try:
        return {header.dtype for header in TensorFolder.open(folder).headers.values()}
    except TritterError as error:
        raise RequestError(str(error)) from error


def _comments(link: Link, parent: Link | None) -> list[str]:
    """Say what the recipe starts from, what comes of it, and what it leaves out."""
    lineage = link.lineage
    assert lineage is not None and link.folder is not None
    place = parent.folder if parent is not None and parent.folder is not None else None
    name = f"{_word(place)}, " if place is not None else ""
    lines = [f"of {name}the checkpoint {lineage.parent_hash}"]
    if lineage.step:
        lines.append(
            f"a training of {lineage.step} steps followed, which no recipe of expand holds"
        )
    else:
        lines.append(f"it makes {_word(link.folder)}, {lineage.model_hash}")
    return lines


def _word(folder: Path) -> str:
    """Return a folder's name, which must not end the comment that it stands in."""
    name = folder.resolve().name
    return name if name.isprintable() else ascii(name)

"""A recipe of `tritter expand`: a YAML file of steps with their options and other settings.

A recipe can express more than the command line: two steps of one method, or the same option for
two methods.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field

from tritter.checkpoints.history import Link
from tritter.checkpoints.record import ExpansionRecord
from tritter.cli.output import refuse_damage
from tritter.config.components import Reader, method_class, method_keys, method_names
from tritter.config.folders import body_of, option_files
from tritter.core.expansions import ExpansionSpec
from tritter.errors import (
    Names,
    Problem,
    RequestError,
    nearest,
    raise_problems,
)
from tritter.limits import MAX_BYTES, MAX_PARAMETERS, parse_count
from tritter.options import options, read_options
from tritter.storage.reading import named_path, read_text
from tritter.storage.tensors import WEIGHT_DTYPES, TensorFolder
from tritter.targets import TARGET

if TYPE_CHECKING:
    import torch

_MAX_BYTES = 2**20
_STEPS = "steps"
_MAX_SEED = 2**64 - 1  # the 64-bit seeds that runs derive for their expansions
_GROUP = "expansion."  # prefix of a run's keys, which a recipe's methods do not have
_COUNTS = {"max_shard_size": True, "target_params": False}  # key → whether it counts bytes


@options
class Recipe:
    """Steps, and settings of which None leaves one to the command line.

    Checks that need the model are done later.

    Args:
        steps: the expansions in order.
        seed: random seed.
        dtype: dtype of the result.
        max_shard_size: maximum size of a file in bytes.
        target_params: target number of parameters for a recipe with one step.
        output: the folder to write.
        path: the file; None if options of the command line request the steps.
    """

    SETTINGS: ClassVar = ("seed", "dtype", "max_shard_size", "target_params", "output")

    steps: tuple[Any, ...] = ()
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    max_shard_size: Annotated[int, Field(ge=1, le=MAX_BYTES)] | None = None
    target_params: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)] | None = None
    output: Annotated[str, Field(min_length=1)] | None = None
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe."""
        raw = _content(path)
        if not isinstance(raw, Mapping) or not raw.get(_STEPS):
            reason = (
                f"{path}: a recipe needs {_STEPS}, a list such as [width: {{hidden_size: 96}}, dus]"
            )
            raise RequestError(f"{reason}.")
        problems, keys = list[Problem](), (_STEPS, *cls.SETTINGS)
        with Names(lambda key: key.removeprefix(_GROUP)).in_use():
            for name in raw:
                if name not in keys:
                    reason = f"unknown key; must be one of {', '.join(keys)}"
                    near = nearest(str(name), keys)
                    problems.append(Problem(str(name), raw[name], reason, nearest=near))
            stated = {name: value for name, value in raw.items() if name in cls.SETTINGS}
            for name, is_bytes in _COUNTS.items():
                if isinstance(stated.get(name), str):
                    stated[name] = parse_count(stated[name], is_bytes=is_bytes) or stated[name]
            settings = read_options(cls, stated, prefix="", problems=problems)
            if settings is not None and settings.output is not None:
                try:
                    named_path(settings.output, key="output")
                except RequestError as error:
                    problems += error.problems
            problems = [replace(each, origin=str(path)) for each in problems]
            steps = _steps(path, raw[_STEPS], problems)
            if settings is not None and (settings.seed or 0) + len(steps) - 1 > _MAX_SEED:
                reason = f"each step uses the next seed, and all {len(steps)} must be below 2⁶⁴"
                problems.append(Problem("seed", settings.seed, reason, origin=str(path)))
            raise_problems(problems)
        assert settings is not None
        return replace(settings, steps=steps, path=path)

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """The dtype of the result; None for that of the source."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    def stated_settings(self) -> dict[str, Any]:
        """Return the settings in the file, without the steps."""
        values = {name: getattr(self, name) for name in self.SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    def names(self, step: int | None = None) -> Names:
        """Return the names of keys in errors: the recipe's keys with their steps.

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
            method = key.removeprefix(_GROUP).partition(".")[0] if key.startswith(_GROUP) else ""
            named = (n for n, each in enumerate(self.steps) if each.name == method)
            if len(found := [n for n in named if step in (None, n)]) == 1:
                return f"{self.path}, step {found[0] + 1}"
            return str(self.path) if found or key in self.stated_settings() else None

        return Names(name, origin)


def _content(path: Path) -> Any:
    """Return the content of a YAML file; OmegaConf refuses a repeated key, which YAML accepts."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with refuse_damage():
        text = read_text(path, limit_bytes=_MAX_BYTES)
    try:
        return OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path} is not a recipe: {reason}.") from error


def _steps(path: Path, raw: object, problems: list[Problem]) -> tuple[ExpansionSpec, ...]:
    if not isinstance(raw, list):
        reason = "must be a list of methods with their options: - width: {hidden_size: 96}"
        problems.append(Problem(_STEPS, raw, reason, origin=str(path)))
        return ()
    steps: list[ExpansionSpec] = []
    methods = _Methods()
    for number, item in enumerate(raw):
        found: list[Problem] = []
        step = _step(item, found, methods)
        steps += [] if step is None else [step]
        problems += [replace(each, origin=f"{path}, step {number + 1}") for each in found]
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
    ((name, stated),) = ((str(key), value) for key, value in table.items())
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
        given = {str(key): value for key, value in stated.items()}
        read = reader.read_methods({name: {**body, **given}}, classes, group="expansion")
        problems += (*unfit, *reader.problems)
        return read[0].options if read else None
    return None


def recorded_recipe(folder: Path) -> str:
    """Return the text of a recipe that makes a checkpoint from its parent."""
    chain = Link.chain(folder)
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
    with refuse_damage():
        return {header.dtype for header in TensorFolder.open(folder).headers.values()}


def _word(folder: Path) -> str:
    """Return a folder's name escaped for a YAML comment, which a line break would end."""
    name = folder.resolve().name
    return name if name.isprintable() else ascii(name)

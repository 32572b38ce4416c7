"""From the words of `tritter plan` to sizes, and from its steps to commands."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import typer

from tritter.cli.method_options import method_options
from tritter.cli.output import shown_path
from tritter.cli.values import parameter_count, spelled
from tritter.errors import RequestError, TritterError, did_you_mean
from tritter.expansion import ExpansionSpec
from tritter.families import count_parameters, family_of
from tritter.families.config_file import read_config_file
from tritter.families.presets import PRESETS, find_preset
from tritter.planning import (
    GrowthPlan,
    NamedShape,
    TrainingSetup,
    named_shape,
    preset_shape,
)
from tritter.report.wording import count_text
from tritter.storage.hub import locate

_OPTIONS = (
    "source|target|gpu_hours|strategy|device_flops|mfu|tokens_per_parameter|optimizer|precision|"
    "batch_size|sequence_length"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The words of the command, numbers read; None where an option was left out.

    Args:
        source: a count, a preset, a folder or a hub id.
        target: a count or a preset.
        setup: the options of `TrainingSetup`.
    """

    source: str | None
    target: str | None
    gpu_hours: float | None
    strategy: str
    device_flops: float
    mfu: float
    tokens_per_parameter: float
    setup: Mapping[str, Any]


def training_setup(request: PlanRequest, source: NamedShape) -> TrainingSetup:
    """Return how models are trained; sequences no longer than a model has learned positions.

    Raises:
        RequestError: an option is not allowed; names it.
    """
    family, asked = family_of(source.config), request.setup["sequence_length"]
    learned = family.dimensions(source.config).max_position_embeddings
    if asked is not None and 0 < learned < asked:
        raise RequestError(
            f"sequence_length = {asked}: {source.name} has learned {family.positions_key} = "
            f"{learned} positions; allowed is at most that."
        )
    usual = TrainingSetup().sequence_length
    length = asked or min(usual, learned or usual)
    return TrainingSetup(**{**request.setup, "sequence_length": length})


def expand_commands(plan: GrowthPlan, text: str, source: NamedShape) -> Iterator[str]:
    """Yield the `tritter expand` command of each step, each reading what the one before wrote.

    Args:
        text: the source as it was typed.
        source: what it means; without a checkpoint, the commands read a folder of its name.
    """
    name = _folder_name(source.name if _is_place(text) else source.name.split()[0])
    checkpoint = text if _is_place(text) else name
    for step in plan.steps:
        output = f"{name}-{_compact(step.target_parameters)}"
        words = ["tritter", "expand", "--checkpoint", checkpoint]
        words += ["--method", spelled(step.method), *_spec_options(step.spec), "--output", output]
        yield shlex.join(words)
        checkpoint = output


def command_notes(commands: Sequence[str]) -> Iterator[str]:
    """Yield what a person has to supply for the commands of a plan, a sentence each."""
    words = shlex.split(commands[0])
    source, result = words[words.index("--checkpoint") + 1], words[-1]
    if not _is_place(source):
        yield f"{source} is a shape, not a checkpoint: put a folder or hub id in its place."
    train = shlex.join(["tritter", "train", "--checkpoint", result, "--data", "TEXT"])
    told = f"{train} leaves it in {shlex.quote(f'{result}-continued/checkpoint')}"
    if len(commands) == 1:
        yield f"The result is to be trained: {told}."
    else:
        yield (
            f"Each result is to be trained before the next step: {told}, and that is then the "
            "next step's --checkpoint."
        )


def _spec_options(spec: ExpansionSpec) -> list[str]:
    """Return the options that stand for what differs from a method's defaults."""
    words: list[str] = []
    by_field = {
        takers[spec.name]: option
        for option, takers in method_options().items()
        if spec.name in takers
    }
    for field in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        if value != field.default:
            words.append(f"--{spelled(by_field[field.name])}")
            words += [] if value is True else [str(value)]
    return words


def _is_place(source: str) -> bool:
    return Path(source).is_dir() or "/" in source


def read_source(text: str) -> NamedShape:
    """Return the shape that `--source` means.

    Raises:
        RequestError: it is no checkpoint, preset or count.
    """
    if _is_place(text):
        try:
            folder = locate(text)
            config = read_config_file(folder)
        except TritterError as error:
            raise RequestError(re.sub(r"^checkpoint\b", "source", str(error))) from error
        return NamedShape(shown_path(folder), config, count_parameters(config))
    if _spelled_preset(text) in PRESETS:
        return preset_shape(find_preset(text))
    return named_shape(_count("source", text))


def read_target(text: str) -> int:
    """Return the count that `--target` means.

    Raises:
        RequestError: it is no preset or count.
    """
    if _spelled_preset(text) in PRESETS:
        return preset_shape(find_preset(text)).parameters
    return _count("target", text)


def _spelled_preset(text: str) -> str:
    return text.lower().replace("-", "_")


def _count(option: str, text: str) -> int:
    try:
        return parameter_count(text)
    except typer.BadParameter as error:
        near = [entry.name for entry in Path.cwd().iterdir() if entry.is_dir()]
        known = [*PRESETS, *(near if option == "source" else [])]
        places = ", a checkpoint folder" if option == "source" else ""
        raise RequestError(
            f"{option} = {text}: give a count of parameters such as 3B{places} or a preset: "
            f"{', '.join(PRESETS)}.{did_you_mean(_spelled_preset(text), known)}"
        ) from error


@contextmanager
def in_plan_options() -> Iterator[None]:
    """Let refusals name the options that were typed."""
    try:
        yield
    except RequestError as error:
        text = re.sub(rf"^({_OPTIONS})(?= = )", lambda key: f"--{spelled(key[0])}", str(error))
        raise RequestError(text) from error


def _folder_name(name: str) -> str:
    return Path(name).resolve().name


def _compact(count: int) -> str:
    """Return a count as a part of a folder's name: 4.42B, 213k."""
    return count_text(count).replace(" ", "")

"""From `tritter train --checkpoint` to the words of train.py that it is short for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.checkpoint import read_lineage
from tritter.checkpoint.usable import checkpoint_config, checkpoint_place
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.plan import make_plan
from tritter.config.overrides import as_value, quoted
from tritter.config.schema import DatasetsConfig, RunConfig, TextDataConfig, TextSources
from tritter.config.text_files import place_of, read_sources
from tritter.data.datasets import dataset_names
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.storage.reading import named_path

# Keys that options set, by the names under which a person gave them.
_OPTION_OF_KEY = {
    "data.old": "--old-data",
    "data.new": "--data",
    "training.max_steps": "--steps",
    "forgetting.ewc.ewc_lambda": "--ewc-lambda",
    "hydra.run.dir": "--output",
    "model.path": "--checkpoint",
}
# What needs no quotes in an override, nor within a list of one
_PLAIN = re.compile(r"[\w./+-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """The words of `tritter train --checkpoint`, sorted.

    Args:
        checkpoint: a folder or hub id.
        steps: as typed; the configuration judges it, as it does `ewc_lambda`.
        data: paths of new text.
        old_data: paths of old text; empty means what the checkpoint recorded.
        overrides: GROUP=OPTION and KEY=VALUE words.
    """

    checkpoint: str
    steps: str | None = None
    ewc_lambda: str | None = None
    data: tuple[str, ...] = ()
    old_data: tuple[str, ...] = ()
    output: Path | None = None
    overrides: tuple[str, ...] = ()


def continuation(request: TrainRequest) -> tuple[str, ...]:
    """Return the words of train.py that a request is short for; what was typed as KEY=VALUE wins.

    Raises:
        RequestError: the checkpoint can't be trained on, no new text is named, another seed than
            the split's was typed, or the configuration that comes of it is refused.
    """
    place = checkpoint_place(request.checkpoint, key="--checkpoint")
    checkpoint_config(place, key="--checkpoint", with_experts=True)
    typed = {word.partition("=")[0].lstrip("+").replace("-", "_") for word in request.overrides}
    is_named = request.data or any(_is_typed(key, typed) for key in ("data.new", "data.tasks"))
    if not is_named:
        raise RequestError("--data is missing: name the text to train on, --data PATH.")
    of_hub = dataset_names((*request.data, *request.old_data))
    source = "hf" if of_hub or "data=hf" in request.overrides else "text"
    problems: list[Problem] = []
    place_of_word = place_of(DatasetsConfig if source == "hf" else TextDataConfig, {})
    new, old = (
        read_sources(
            option,
            list(words) or None,
            default_name=name,
            problems=problems,
            place_of_word=place_of_word,
        )
        for option, words, name in (
            ("--data", request.data, "new"),
            ("--old-data", request.old_data, "old"),
        )
    )
    raise_problems(problems)
    recorded = _recorded_settings(Path(place), source)
    defaults = {
        "expansion": "none",
        "model": "hf",
        "model.path": _word(place),
        "data": source,
        **recorded,
        "data.new": _value(new),
        "data.old": _value(old),
        "training.max_steps": request.steps,
        "hydra.run.dir": _word(str(request.output or _default_output(request.checkpoint))),
    }
    if request.ewc_lambda is not None:
        defaults |= {"forgetting": "ewc", "forgetting.ewc.ewc_lambda": request.ewc_lambda}
    words = [
        f"{key}={value}"
        for key, value in defaults.items()
        if value is not None and not _is_typed(key, typed)
    ]
    words += request.overrides
    config = _checked(words)
    if "seed" in recorded and config.seed != recorded["seed"]:
        raise RequestError(
            f"seed = {config.seed}: the checkpoint's text was split with seed {recorded['seed']}, "
            "and text that was held out would be trained on. Leave seed out; with train.py "
            "model=hf another seed orders the data, and the split stays."
        )
    return tuple(words)


def _recorded_settings(folder: Path, source: str) -> dict[str, Any]:
    """Return key → value of what a continued training takes from the one before.

    Args:
        source: the option of `data`, of which text alone has fields.

    Raises:
        RequestError: the lineage can't be read.
    """
    try:
        lineage = read_lineage(folder)
    except TritterError as error:
        raise RequestError(f"--checkpoint: {error}") from error
    if lineage is None:
        return {}
    settings: dict[str, Any] = {}
    if lineage.split is not None:
        settings["seed"] = lineage.split.seed
    data = lineage.training_config.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("sequence_length"), int):
        settings["data.sequence_length"] = data["sequence_length"]
        if data.get("packing") == "documents":
            settings["data.packing"] = "documents"
    fields = {domain.text_field for domain in lineage.domains.values()}
    if len(fields) == 1 and source == "text":
        settings["data.text_field"] = _word(fields.pop())
    return settings


def _checked(words: Sequence[str]) -> RunConfig:
    """Return the configuration; what is refused is told in the names of the options.

    Raises:
        RequestError: whatever is wrong.
    """
    try:
        return make_plan(CommandLine(tuple(words))).jobs[0].config
    except RequestError as error:
        keys = "|".join(map(re.escape, _OPTION_OF_KEY))
        pattern = rf"^(\s*)({keys})(?= = |: /|: hf:)"
        text = re.sub(
            pattern, lambda m: m[1] + _OPTION_OF_KEY[m[2]], str(error), flags=re.MULTILINE
        )
        raise RequestError(text) from error


def _is_typed(key: str, typed: set[str]) -> bool:
    """Say whether a key, or one below it, was typed; of a group its name alone counts."""
    below = f"{key}." if "." in key else None
    return key in typed or (below is not None and any(word.startswith(below) for word in typed))


def _value(sources: TextSources) -> str | None:
    """Return domains and paths as Hydra reads them."""
    if not sources:
        return None
    parts = [f"{name}:[{','.join(map(_word, paths))}]" for name, paths in sources.items()]
    return "{" + ",".join(parts) + "}"


def _word(text: str) -> str:
    """Return a text as Hydra reads it, in quotes where it is no plain path or name."""
    return as_value(text) if _PLAIN.fullmatch(text) else quoted(text)


def _default_output(checkpoint: str) -> Path:
    """Return DIR-continued beside a folder; of a hub id, in the current one."""
    folder = named_path(checkpoint, key="--checkpoint")
    if folder.is_dir():
        place = folder.resolve()
        return place.with_name(f"{place.name}-continued")
    return Path(f"{folder.name}-continued")

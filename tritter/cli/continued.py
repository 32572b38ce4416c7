"""From `tritter train --checkpoint` to the words of train.py that it is short for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritter.checkpoint import read_lineage
from tritter.config.checkpoint_folder import checkpoint_config, checkpoint_place
from tritter.config.overrides import quoted
from tritter.config.plan import CommandLine, make_plan
from tritter.config.problems import raise_problems
from tritter.config.schema import TextSources
from tritter.config.text_files import BUILT_IN_TEXTS, read_sources
from tritter.data.documents import documents_digest
from tritter.data.stdlib import stdlib_origin
from tritter.errors import RequestError, TritterError

# Keys that options set, by the names under which a person gave them.
_OPTION_OF_KEY = {
    "data.old": "--old-data",
    "data.new": "--data",
    "training.max_steps": "--steps",
    "forgetting.ewc.ewc_lambda": "--ewc-lambda",
    "hydra.run.dir": "--output",
    "model.path": "--checkpoint",
}
_SPLIT_KEYS = ("validation_fraction", "sequence_length")


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


@dataclass(frozen=True, slots=True)
class Continuation:
    """The words of train.py, and what to tell of how they came about, a sentence each."""

    words: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a checkpoint's record says of the text that it was trained on.

    Args:
        sources: old domain → paths that still hold what was recorded.
        missing: why other recorded domains can't be used, a sentence each.
        notes: what is worth telling of those that can.
        settings: seed, split and field of that training, so that text which was held out stays
            held out.
    """

    sources: TextSources = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def continuation(request: TrainRequest) -> Continuation:
    """Return the run that a request is short for, checked; what was typed as KEY=VALUE wins.

    Raises:
        RequestError: the checkpoint can't be trained on, no new text is named, or the
            configuration that comes of it is refused.
    """
    place = checkpoint_place(request.checkpoint, key="--checkpoint")
    checkpoint_config(place, key="--checkpoint")
    typed = {word.partition("=")[0].lstrip("+").replace("-", "_") for word in request.overrides}
    if not request.data and not _is_typed("data.new", typed):
        raise RequestError("--data is missing: name the text to train on, --data PATH.")
    problems: list[str] = []
    new = read_sources("--data", list(request.data) or None, default_name="new", problems=problems)
    old = read_sources(
        "--old-data", list(request.old_data) or None, default_name="old", problems=problems
    )
    raise_problems(problems)
    recorded = Recorded()
    if not old and not _is_typed("data.old", typed):
        recorded = recorded_text(Path(place))
        old = recorded.sources
    defaults = {
        "expansion": "none",
        "model": "hf",
        "model.path": quoted(place),
        "data": "text",
        **recorded.settings,
        "data.new": _value(new),
        "data.old": _value(old),
        "training.max_steps": request.steps,
        "hydra.run.dir": quoted(str(request.output or _default_output(request.checkpoint))),
    }
    if request.ewc_lambda is not None:
        defaults |= {"forgetting": "ewc", "forgetting.ewc.ewc_lambda": request.ewc_lambda}
    words = [
        f"{key}={value}"
        for key, value in defaults.items()
        if value is not None and not _is_typed(key, typed)
    ]
    words += request.overrides
    _check(words, recorded)
    return Continuation(tuple(words), (*_told(recorded), *recorded.missing))


def recorded_text(folder: Path) -> Recorded:
    """Return the old text that a checkpoint's record names, as far as it is still there.

    Files have to hold what they held, by their hash. Text of the Python installation is always
    at hand.

    Raises:
        RequestError: the lineage can't be read.
    """
    try:
        lineage = read_lineage(folder)
    except TritterError as error:
        raise RequestError(f"--checkpoint: {error}") from error
    if lineage is None:
        return Recorded()
    sources: TextSources = {}
    missing, notes = [], []
    for name, source in _recorded_sources(lineage.training_config).items():
        paths = _recorded_paths(name, source)
        problem = _problem(paths, source)
        if problem is not None:
            missing.append(f"The recorded old text {name} can't be used: {problem}.")
            continue
        sources[name] = paths
        origin = source.get("origin")
        if set(paths) <= {*BUILT_IN_TEXTS} and origin not in (None, stdlib_origin()):
            notes.append(f"{name} was that of {origin}; here it is that of {stdlib_origin()}")
    settings = dict(_recorded_settings(lineage.training_config, sources))
    return Recorded(sources, tuple(missing), tuple(notes), settings)


def _check(words: Sequence[str], recorded: Recorded) -> None:
    """Refuse what the configuration refuses, in the names of the options.

    Raises:
        RequestError: whatever is wrong.
    """
    try:
        make_plan(CommandLine(tuple(words)))
    except RequestError as error:
        keys = "|".join(map(re.escape, _OPTION_OF_KEY))
        pattern = rf"^(\s*)({keys})(?= = |: /)"
        text = re.sub(
            pattern, lambda m: m[1] + _OPTION_OF_KEY[m[2]], str(error), flags=re.MULTILINE
        )
        reasons = recorded.missing if "--old-data" in text else ()
        raise RequestError("\n".join([text, *reasons])) from error


def _told(recorded: Recorded) -> Iterator[str]:
    if recorded.sources:
        names = ", ".join(recorded.sources)
        yield f"Old text as the checkpoint recorded it, with its split: {names}."
    for note in recorded.notes:
        yield f"Its {note}."


def _is_typed(key: str, typed: set[str]) -> bool:
    """Say whether a key, or one below it, was typed; of a group its name alone counts."""
    below = f"{key}." if "." in key else None
    return key in typed or (below is not None and any(word.startswith(below) for word in typed))


def _value(sources: TextSources) -> str | None:
    """Return domains and paths as Hydra reads them."""
    if not sources:
        return None
    parts = [
        f"{name}:[{','.join(quoted(path) for path in paths)}]" for name, paths in sources.items()
    ]
    return "{" + ",".join(parts) + "}"


def _default_output(checkpoint: str) -> Path:
    """Return DIR-continued beside a folder; of a hub id, in the current one."""
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        place = folder.resolve()
        return place.with_name(f"{place.name}-continued")
    return Path(f"{folder.name}-continued")


def _recorded_sources(told: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    old = told.get("old")
    if isinstance(old, Mapping):
        return {str(name): source for name, source in old.items() if isinstance(source, Mapping)}
    made_from = told.get("made_from")
    data = made_from.get("data") if isinstance(made_from, Mapping) else None
    is_stdlib = isinstance(data, Mapping) and data.get("source") == "stdlib"
    return {"prose": {"paths": ["stdlib:prose"]}} if is_stdlib else {}


def _recorded_paths(name: str, source: Mapping[str, Any]) -> list[str]:
    paths = source.get("paths")
    if isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths):
        return paths
    is_built_in = str(source.get("origin")).endswith("standard library")
    built_in = f"stdlib:{name}"
    return [built_in] if is_built_in and built_in in BUILT_IN_TEXTS else []


def _problem(paths: Sequence[str], source: Mapping[str, Any]) -> str | None:
    """Return why recorded paths don't hold what they held; None when they do."""
    if not paths:
        return "the record does not say where it lay"
    if set(paths) <= {*BUILT_IN_TEXTS}:
        return None
    # Only here: it brings Lightning, for which a refusal need not wait
    from tritter.pipeline.corpora import source_documents

    try:
        text_field = str(source.get("text_field", "text"))
        documents = source_documents(paths, key="recorded", text_field=text_field)
    except TritterError as error:
        return str(error).removesuffix(".")
    if documents_digest(documents) != source.get("sha256"):
        return f"{', '.join(paths)} has changed since"
    return None


def _recorded_settings(told: Mapping[str, Any], sources: TextSources) -> Iterator[tuple[str, Any]]:
    """Yield key → value of what a continued training takes from the one before."""
    made_from = told.get("made_from")
    origin = made_from if isinstance(made_from, Mapping) else {}
    seed = told.get("seed", origin.get("seed"))
    if isinstance(seed, int):
        yield "seed", seed
    data = told.get("data", origin.get("data"))
    for key in _SPLIT_KEYS:
        if isinstance(data, Mapping) and isinstance(data.get(key), int | float):
            yield f"data.{key}", data[key]
    fields = {
        source["text_field"]
        for name, source in _recorded_sources(told).items()
        if name in sources and isinstance(source.get("text_field"), str)
    }
    if len(fields) == 1:
        yield "data.text_field", quoted(fields.pop())

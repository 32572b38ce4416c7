"""Sections of a config into records; options of `model` and `data` have keys of their own."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tritter.config.checkpoint_folder import checkpoint_place
from tritter.config.counts import parse_count
from tritter.config.folders import body_of, option_files
from tritter.config.reading import Reader
from tritter.config.schema import (
    CheckpointModelConfig,
    DataConfig,
    PipelineConfig,
    TextDataConfig,
    Variants,
)
from tritter.config.text_files import read_sources
from tritter.errors import Problem, RequestError, nearest
from tritter.options import choices, field_keys, is_options, join
from tritter.targets import TARGET, dotted, resolve


def read_section(reader: Reader, name: str, section: type | Variants, raw: object) -> Any:
    """Return the record of a section, or None when there were problems (now reported)."""
    if section is DataConfig:
        return _read_data(reader, raw)
    if not isinstance(section, Variants):
        return reader.read(section, _with_counts(section, raw), prefix=name)
    if not isinstance(raw, Mapping):
        reader.report(name, raw, reason="it holds keys; choose an option of it")
        return None
    key, choice = join(name, section.key), raw.get(section.key)
    if not isinstance(choice, str) or choice not in section.records:
        reader.report(
            key,
            choice,
            reason=f"allowed is one of {', '.join(section.records)}",
            nearest=nearest(str(choice), section.records),
        )
        return None
    keys = {option: field_keys(record, "") for option, record in section.records.items()}
    taken = _only_of(reader, name, keys, raw, choice=f"{section.key} {choice}", own=keys[choice])
    if section.records[choice] is CheckpointModelConfig:
        return _read_checkpoint(reader, taken)
    return reader.read(section.records[choice], taken, prefix=name)


def data_keys() -> dict[str, tuple[str, ...]]:
    """Return the options of `data`, and the keys that each states."""
    files = option_files().get("data", {})
    return {n: tuple(key for key in body_of(p) if key != TARGET) for n, p in files.items()}


def _with_counts(section: type, raw: object) -> object:
    """Return a section in which a number of parameters that is written as 2M is a number."""
    if section is not PipelineConfig or not isinstance(raw, Mapping):
        return raw
    count = raw.get("target_params")
    read = parse_count(count) if isinstance(count, str) else None
    return raw if read is None else {**raw, "target_params": read}


def _only_of(
    reader: Reader,
    name: str,
    keys: Mapping[str, Collection[str]],
    raw: Mapping[str, Any],
    *,
    choice: str,
    own: Collection[str],
) -> dict[str, Any]:
    """Return a section without the keys of its other options, which are reported.

    Args:
        keys: option → its keys.
        choice: in words.
        own: keys of the choice.
    """
    taken = dict(raw)
    for key in raw:
        others = [option for option, theirs in keys.items() if key in theirs]
        if others and key not in own:
            reason = f"{choice} has no such key, only {' and '.join(others)} has"
            reader.report(join(name, key), taken.pop(key), reason=reason)
    return taken


def _read_data(reader: Reader, raw: object) -> DataConfig | None:
    if not isinstance(raw, Mapping):
        reader.report("data", raw, reason="it holds keys; choose an option of it")
        return None
    try:
        kind = _data_class(raw)
    except RequestError as error:
        reader.add(error.problems)
        return None
    own, choice = field_keys(kind, ""), f"source {raw.get('source')}"
    if "source" not in own:
        choice = dotted(kind)
    taken = _only_of(reader, "data", data_keys(), raw, choice=choice, own=own)
    del taken[TARGET]
    if kind is TextDataConfig:
        return _read_text(reader, taken)
    record: DataConfig | None = reader.read(kind, taken, prefix="data")
    return record


def _data_class(raw: Mapping[str, Any]) -> type[DataConfig]:
    """Return the class that an option of `data` names.

    Raises:
        RequestError: it is none of ours nor made from `DataConfig`, or `source` says another one.
    """
    key = f"data.{TARGET}"
    kind: type[DataConfig] = resolve(key, raw.get(TARGET), base=dotted(DataConfig))
    if not is_options(kind) or "__dataclass_fields__" not in vars(kind):
        reason = "it is no record of options (see tritter.options.options)"
        raise RequestError(Problem(key, raw[TARGET], reason=reason))
    said = raw.get("source")
    if "source" in field_keys(kind, "") and said not in choices(kind, "source"):
        names = list(data_keys())
        reason = f"allowed is one of {', '.join(names)}"
        if said in names:
            reason = f"{said} has other keys; choose it with data={said}"
        raise RequestError(
            Problem("data.source", said, reason=reason, nearest=nearest(str(said), names))
        )
    return kind


def _read_text(reader: Reader, raw: dict[str, Any]) -> TextDataConfig | None:
    paths = {name: raw.get(name) for name in ("old", "new")}
    values: TextDataConfig | None = reader.read(
        TextDataConfig, {**raw, "old": None, "new": {}}, prefix="data"
    )
    count = len(reader.problems)
    sources: dict[str, Any] = {
        name: read_sources(f"data.{name}", value, default_name=name, problems=reader.problems)
        for name, value in paths.items()
    }
    if paths["old"] is None:
        sources["old"] = None
    if paths["new"] in (None, {}):
        reason = "name the text to train on: files, folders or globs, data.new=PATH"
        reader.report("data.new", None, reason=reason)
    if values is None or len(reader.problems) > count:
        return None
    return replace(values, **sources)


def _read_checkpoint(reader: Reader, raw: dict[str, Any]) -> CheckpointModelConfig | None:
    if raw.get("path") is None:
        reason = "name the checkpoint: a folder or a hub id, model.path=DIR"
        reader.report("model.path", None, reason=reason)
        return None
    values = reader.read(CheckpointModelConfig, raw, prefix="model")
    try:
        if values is not None:
            return CheckpointModelConfig(model_type="hf", path=checkpoint_place(values.path))
    except RequestError as error:
        reader.problems += error.problems
    return None

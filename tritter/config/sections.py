"""Sections of a config into records; `model` and `data` have options with keys of their own."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tritter.config.checkpoint_folder import checkpoint_place
from tritter.config.counts import parse_count
from tritter.config.reading import Reader, field_keys, join
from tritter.config.schema import (
    CheckpointModelConfig,
    PipelineConfig,
    TextDataConfig,
    TextDataValues,
    Variants,
)
from tritter.config.text_files import read_sources
from tritter.errors import RequestError, nearest


def read_section(reader: Reader, name: str, section: type | Variants, raw: object) -> Any:
    """Return the record of a section, or None when there were problems (now reported)."""
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
    taken = _only_of(reader, name, section, raw)
    match section.records[choice]:
        case record if record is TextDataConfig:
            return _read_text(reader, taken)
        case record if record is CheckpointModelConfig:
            return _read_checkpoint(reader, taken)
        case record:
            return reader.read(record, taken, prefix=name)


def _with_counts(section: type, raw: object) -> object:
    """Return a section in which a number of parameters that is written as 2M is a number."""
    if section is not PipelineConfig or not isinstance(raw, Mapping):
        return raw
    count = raw.get("target_params")
    read = parse_count(count) if isinstance(count, str) else None
    return raw if read is None else {**raw, "target_params": read}


def _only_of(
    reader: Reader, name: str, section: Variants, raw: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a section without the keys of its other variants, which are reported."""
    choice = raw[section.key]
    own = {*field_keys(section.records[choice], name)}
    taken = dict(raw)
    for key in raw:
        others = [
            other
            for other, record in section.records.items()
            if join(name, key) in field_keys(record, name)
        ]
        if others and join(name, key) not in own:
            reason = f"{section.key} {choice} has no such key, only {' and '.join(others)} has"
            reader.report(join(name, key), taken.pop(key), reason=reason)
    return taken


def _read_text(reader: Reader, raw: dict[str, Any]) -> TextDataConfig | None:
    paths = {name: raw.pop(name, None) for name in ("old", "new")}
    values = reader.read(TextDataValues, raw, prefix="data")
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
    return TextDataConfig(**asdict(values), **sources)


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
        reader.problems.append(str(error))
    return None

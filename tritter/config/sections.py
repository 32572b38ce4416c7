"""Sections that need more than their fields: `model`, `data`, `evaluation`."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from tritter.checkpoint.usable import checkpoint_place
from tritter.config.evaluation_config import EvaluationConfig
from tritter.config.folders import body_of, option_files
from tritter.config.reading import Reader
from tritter.config.schema import CheckpointModelConfig, DataConfig, Model, NamedTextConfig
from tritter.config.skills import SkillsDataConfig
from tritter.config.suggestions import hint_for
from tritter.config.text_files import place_of, read_sources, read_tasks
from tritter.errors import Problem, RequestError, nearest, show
from tritter.options import choices, field_keys, is_options, join
from tritter.storage.names import named_path
from tritter.targets import TARGET, dotted, resolve

_MODELS = {word: kind for kind in get_args(Model) for word in choices(kind, "model_type")}


def model_class(raw: Mapping[str, Any]) -> type[Model]:
    """Return the record of a base model that `model.model_type` means.

    Raises:
        RequestError: it means none.
    """
    said = raw.get("model_type")
    if isinstance(said, str) and said in _MODELS:
        return _MODELS[said]
    reason = f"allowed is one of {', '.join(_MODELS)}"
    raise RequestError(Problem("model.model_type", said, reason=reason))


def data_class(raw: Mapping[str, Any]) -> type[DataConfig]:
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
        reason = f"allowed is one of {', '.join(data_keys())}"
        if isinstance(said, str) and said in data_keys():
            reason = f"{said} has other keys; choose it with data={said}"
        near = nearest(str(said), data_keys())
        raise RequestError(Problem("data.source", said, reason=reason, nearest=near))
    return kind


def read_model(reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]) -> Model | None:
    """Return the base model of a run, or None when there were problems (now reported)."""
    kind = classes.get("model")
    if kind is None:
        return None
    keys = {option: field_keys(record, "") for option, record in _MODELS.items()}
    choice = "model=hf: a checkpoint has a shape of its own"
    taken = _only_of(reader, "model", keys, raw, choice=choice, own=field_keys(kind, ""))
    if kind is CheckpointModelConfig and taken.get("path") is None:
        reason = "name the checkpoint: a folder or a hub id, model.path=DIR"
        reader.report("model.path", None, reason=reason)
        return None
    model: Model | None = reader.read(kind, taken, prefix="model")
    if not isinstance(model, CheckpointModelConfig):
        return model
    place = reader.ask(checkpoint_place, model.path)
    return None if place is None else replace(model, path=place)


def read_data(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> DataConfig | None:
    """Return what a run reads, or None when there were problems (now reported)."""
    kind = classes.get("data")
    if kind is None:
        return None
    own, choice = field_keys(kind, ""), f"data={raw.get('source')} (the current source)"
    if "source" not in own:
        choice = dotted(kind)
    taken = _only_of(reader, "data", data_keys(), raw, choice=choice, own=own)
    del taken[TARGET]
    if issubclass(kind, SkillsDataConfig):
        is_new = classes.get("model") is not CheckpointModelConfig
        taken = _with_defaults(kind, taken, is_new=is_new)
    sources = _read_sources(reader, taken, kind) if issubclass(kind, NamedTextConfig) else {}
    blank: dict[str, Any] = {name: [] if name == "tasks" else {} for name in sources}
    values = reader.read(kind, {**taken, **blank}, prefix="data")
    return None if values is None else replace(values, **sources)


def read_evaluation(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> EvaluationConfig | None:
    """Return how a run evaluates, its folder absolute; None when there were problems."""
    values: EvaluationConfig | None = reader.read(EvaluationConfig, raw, prefix="evaluation")
    if values is None or values.tasks_path is None:
        return values
    place = reader.ask(partial(named_path, key="evaluation.tasks_path"), values.tasks_path)
    return None if place is None else replace(values, tasks_path=str(place.absolute()))


def data_keys() -> dict[str, tuple[str, ...]]:
    """Return the options of `data`, and the keys that each states."""
    files = option_files().get("data", {})
    return {n: tuple(key for key in body_of(p) if key != TARGET) for n, p in files.items()}


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
        choice: what was chosen, for messages.
        own: keys of the choice.
    """
    taken, files = dict(raw), option_files().get(name, {})
    for each in raw:
        others = [option for option, theirs in keys.items() if each in theirs]
        if not others or each in own:
            continue
        key, value = join(name, each), taken.pop(each)
        option = "text" if "text" in others else others[0]
        near = f"{name}={option} {key}={show(value)}" if option in files else None
        if (hint := hint_for(key, value)) is not None:
            near = hint.advice
        is_only = len(others) == 1 and others[0] in files
        needed = f"requires {name}={others[0]}" if is_only else f"is not a key of {choice}"
        reader.problems.append(Problem(key, reason=f"{key} {needed}", nearest=near))
    return taken


def _with_defaults(
    kind: type[SkillsDataConfig], raw: Mapping[str, Any], *, is_new: bool
) -> dict[str, Any]:
    """Return a section in which is said what skills stand for null.

    Args:
        is_new: the base is, so that nothing was learned before.
    """
    named = dict(raw)
    if is_new and raw.get("old") is None:
        named["old"] = list(kind.base_domains)
    if raw.get("tasks") is None and raw.get("new") is None:
        named["new"] = kind.new_domain
    return named


def _read_sources(
    reader: Reader, raw: Mapping[str, Any], kind: type[NamedTextConfig]
) -> dict[str, Any]:
    """Return `old`, `new` and `tasks` as paths; None of what is old: what a checkpoint learned."""
    place_of_word, is_each_named = place_of(kind, raw), issubclass(kind, SkillsDataConfig)
    sources: dict[str, Any] = {}
    for name in ("old", "new"):
        sources[name] = read_sources(
            f"data.{name}",
            raw.get(name),
            default_name=None if is_each_named else name,
            problems=reader.problems,
            place_of_word=place_of_word,
            known=sources.get("old", {}),
        )
    tasks, has_new = raw.get("tasks"), raw.get("new") not in (None, {})
    sources["tasks"] = []
    if tasks is not None:
        sources["tasks"] = read_tasks(
            tasks,
            sources["old"],
            reader.problems,
            place_of_word,
            default_name=None if is_each_named else "text",
        )
    if has_new and tasks is not None:
        reason = "data.new is the one task of a run that has no list; leave one of the two out"
        reader.report("data.tasks", tasks, reason=reason)
    elif not has_new and tasks is None:
        reason = "name the text to train on: files, folders or globs, data.new=PATH"
        reader.report("data.new", None, reason=reason)
    return sources if raw.get("old") is not None else {**sources, "old": None}

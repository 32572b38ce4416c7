"""Reads config sections that name a class into records and components."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast, get_args

from tritter.checkpoints.location import checkpoint_location
from tritter.config.folders import CHOSEN_BY, body_of, option_files, shipped_options
from tritter.config.schema import (
    SECTIONS,
    CheckpointModelConfig,
    Model,
    RootValues,
    WandbConfig,
)
from tritter.config.suggestions import Hint, nearest_key
from tritter.data.chat import template_location
from tritter.data.options import DataConfig, NamedTextConfig
from tritter.errors import Problem, RequestError, key_name, nearest, show
from tritter.evaluation.options import EvaluationConfig
from tritter.options import choices, component_class, field_keys, join, read_component, read_options
from tritter.storage.reading import named_path
from tritter.targets import TARGET, Component, argument_problems, building_problem, dotted, resolve
from tritter.training.optimizer import OptimizerSettings, optimizer_class
from tritter.training.options import (
    TrainerSettings,
    TrainerValues,
    callback_problems,
    further_trainer_keys,
    trainer_arguments,
)

Origin = Callable[[str], str | None]
_Result = TypeVar("_Result")
_KEYLESS_GROUPS = ("experiment",)  # their options set keys of other groups
# Group → required base class, by name: it is imported only when an option is selected.
METHOD_GROUPS: Mapping[str, str | None] = {
    "expansion": None,
    "forgetting": "tritter.training.forgetting_method.ForgettingMethod",
}
# Groups with one option → required base class, and the meaning of their option `none`
CHOSEN_GROUPS = {
    "growth": ("tritter.methods.growth.method.NeuronGrowth", "nothing grows"),
    "experts": ("tritter.methods.experts.method.Experts", "there are no adapters"),
}
# Attributes of an expansion, which is a record of options without a required base class
_EXPANSION = (
    *("name", "expansion_type", "is_exact", "new_blocks_only"),
    *("target_config", "parameter_map", "notes"),
)
_MODELS = {name: kind for kind in get_args(Model) for name in choices(kind, "model_type")}
_EXTRAS = ("tensorboard", "mlflow")  # extras of Tritter, named after the packages they install
_MLFLOW = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # recent versions refuse to write files without it
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run sends no telemetry
}
# Group → required base class
BASES = {
    "callbacks": "lightning.pytorch.Callback",
    "logger": "lightning.pytorch.loggers.Logger",
    "metrics": "tritter.evaluation.tasks.Metric",
    "stages": "tritter.pipeline.stage.Stage",
}


class Reader:
    """Reads mappings into records and collects every problem.

    Args:
        known_keys: function that returns all dotted keys of a config, for nearest matches.
    """

    def __init__(self, known_keys: Callable[[], Collection[str]]) -> None:
        self.problems: list[Problem] = []
        self._known_keys = known_keys

    def report(self, key: str, value: object, *, reason: str) -> None:
        self.problems.append(Problem(key, value, reason=reason))

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """Return the result of a function, or None if it raises RequestError (then recorded)."""
        try:
            return function(*arguments)
        except RequestError as error:
            self.problems += error.problems
            return None

    def read(self, record_type: type, raw: Mapping[str, object], *, prefix: str) -> Any:
        """Return a `record_type` read from `raw`, or None if there are problems (then recorded)."""
        return read_options(
            record_type, raw, prefix=prefix, problems=self.problems, unknown=self._unknown
        )

    def component(
        self, key: str, kind: type[Any] | None, body: Mapping[str, object]
    ) -> Component | None:
        """Return a component, or None if its class is missing or there are problems."""
        if kind is None:
            return None
        return read_component(key, kind, body, problems=self.problems, unknown=self._unknown)

    def find_classes(self, bodies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return key → class for all classes that exist; problems are recorded by the reader.

        A key is the name of a group, or GROUP.NAME for an entry of a group with several options.
        """
        found: dict[str, Any] = {}
        for group, body in bodies.items():
            if group in _SINGLE_CLASS:
                found[group] = self.call(_SINGLE_CLASS[group], body)
            for name in body if group in _CLASS_PER_ENTRY else ():
                if (key := f"{group}.{name}") != "logger.wandb":
                    found[key] = self.call(_CLASS_PER_ENTRY[group], group, name, body)
        return {key: kind for key, kind in found.items() if kind is not None}

    def read_section(
        self, name: str, body: Mapping[str, Any], classes: Mapping[str, Any]
    ) -> object:
        """Return the value of a section in a run, or None if there are problems (then recorded).

        Args:
            name: of the section.
            body: as composed.
            classes: from `find_classes`.
        """
        if name in _READERS:
            return _READERS[name](self, body, classes)
        return self.read(cast(type, SECTIONS[name]), body, prefix=name)

    def read_methods(
        self, bodies: Mapping[str, Any], classes: Mapping[str, type[Any]], *, group: str
    ) -> tuple[Component, ...]:
        """Return the valid methods of an ordered group."""
        found: list[Component] = []
        for name, body in bodies.items():
            key = f"{group}.{name}"
            if (method := self.component(key, classes.get(key), body)) is not None:
                found.append(method)
        for each in found if group == "expansion" else ():  # runs look expansions up
            try:
                hash(each.options)
            except TypeError as error:
                reason = f"{dotted(each.kind)}: {error}; annotate a list as tuple[…, ...]"
                self.problems.append(Problem(f"{group}.{each.name}", reason=reason))
        return tuple(found)

    def _unknown(self, key: str, value: object) -> Iterator[Problem]:
        if isinstance(value, Mapping) and value:
            for name in value:
                yield from self._unknown(join(key, str(name)), value[name])
            return
        section, _, leaf = key.rpartition(".")
        known = self._known_keys()
        if section == "trainer":
            known = (*known, *further_trainer_keys())
        names = _child_names(known, section)
        near = None
        if not section:
            names = sorted([*names, *_KEYLESS_GROUPS])
            near = nearest(leaf, names, cutoff=0.7)
        where = f"{key_name(section)} has" if section else "the root has"
        reason = f"there is no such key; {where} {', '.join(names)}" if names else "no such key"
        if (hint := Hint.of(key, value)) is not None:
            yield Problem(key, value, reason=hint.reason or reason, nearest=hint.advice or None)
            return
        yield Problem(key, value, reason=reason, nearest=near or nearest_key(key, known))


def known_keys() -> tuple[str, ...]:
    """Return every dotted key of a config, including the options of all methods, sorted."""
    keys = [*field_keys(RootValues, ""), "optimizer.name"]
    for name, section in SECTIONS.items():
        records = get_args(section) or (section,)
        keys += dict.fromkeys(key for record in records for key in field_keys(record, name))
    keys += {f"data.{key}" for own in _data_keys().values() for key in own} - {*keys}
    keys += [f"optimizer.{key}" for key in OptimizerSettings.KEYS]
    keys += field_keys(WandbConfig, "logger.wandb")
    return tuple(sorted([*keys, *method_keys()]))


def _child_names(keys: Collection[str], section: str) -> list[str]:
    """Return the keys directly below `section`, or the keys of the root if it is empty."""
    start = f"{section}." if section else ""
    return sorted({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


def method_names(group: str) -> list[str]:
    """Return the options of an ordered group, without `none`."""
    return [name for name in option_files().get(group, {}) if name != "none"]


def method_keys() -> list[str]:
    """Return the dotted keys of all methods, as listed in their option files."""
    keys = []
    for group, files in option_files().items():
        for name, path in files.items():
            if group in METHOD_GROUPS:
                own = body_of(path).get(name)
                own = own if isinstance(own, Mapping) else {}
                keys += [f"{group}.{name}.{key}" for key in own]
            elif group in CHOSEN_GROUPS:
                keys += [f"{group}.{key}" for key in body_of(path)]
    return [key for key in dict.fromkeys(keys) if not key.endswith(TARGET)]


def method_class(group: str, name: str, bodies: Mapping[str, Any]) -> type[Any]:
    """Return the class that an entry of an ordered group names."""
    key, body = f"{group}.{name}", bodies[name]
    if name not in (names := method_names(group)):
        near = nearest(name, names)
        reason = f"there is no such method; there are {', '.join(names)}"
        keys = [each for each in method_keys() if each.startswith(f"{group}.")]
        is_key = any(each.endswith(f".{name}") for each in keys)
        if (near is None or is_key) and not isinstance(body, Mapping):  # the method is missing
            reason = f"write the key below its method, {group}.METHOD.{name}; methods: "
            reason += ", ".join(names)
            chosen = [each for each in keys if each.split(".")[1] in bodies]
            near = nearest_key(key, keys, first=chosen)
        raise RequestError(Problem(key, body, reason=reason, nearest=near))
    if not isinstance(body, Mapping):
        names_below = ", ".join(f"{key}.{leaf}" for leaf in _child_names(method_keys(), key))
        raise RequestError(Problem(key, body, reason=f"a method has keys: {names_below or 'none'}"))
    target_key, target = f"{key}.{TARGET}", body.get(TARGET)
    if group == "expansion":
        kind = resolve(target_key, target)
        missing = [each for each in _EXPANSION if not hasattr(kind, each)]
        if isinstance(kind, type) and missing:
            reason = f"it is not an expansion: it lacks {', '.join(missing)}"
            raise RequestError(Problem(target_key, target, reason=reason))
    kind = component_class(key, target, base=METHOD_GROUPS[group])
    if kind.name != name:
        reason = f"the class has the name {kind.name}, its option {name}; use one name for both"
        raise RequestError(Problem(target_key, target, reason=reason))
    return kind


def _chosen_class(group: str, body: Mapping[str, Any]) -> type[Any] | None:
    """Return the class selected in a group with one option; None for `none`."""
    if not body:
        return None
    base, nothing = CHOSEN_GROUPS[group]
    if TARGET in body:
        return component_class(group, body[TARGET], base=base)
    key, value = next(iter(body.items()))
    choice = next(name for name in option_files().get(group, {}) if name != "none")
    reason = f"{group}=none has no keys ({nothing}); choose {group}={choice}"
    raise RequestError(Problem(f"{group}.{key}", value, reason=reason))


def resolve_registered_parts(group: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a group with the names of registered parts replaced by their files.

    So a trigger of an installed package is chosen as `growth.trigger=NAME`, as one of ours is.
    """
    found = dict(body)
    for folder, key in CHOSEN_BY.items():
        name = key.removeprefix(f"{group}.")
        if name == key or name not in found:
            continue
        value, files = found[name], option_files().get(folder, {})
        stated = dict(value) if isinstance(value, Mapping) else {"name": value}
        if isinstance(word := stated.get("name"), str) and word in files:
            del stated["name"]
            found[name] = {**body_of(files[word]), **stated}
    return found


def _read_chosen(
    reader: Reader, body: Mapping[str, Any], classes: Mapping[str, Any], *, group: str
) -> Component | None:
    """Return the method of a group with one option; None for `none` or if there are problems."""
    found = reader.call(resolve_registered_parts, group, body) or {}
    return reader.component(group, classes.get(group), found)


def _model_class(raw: Mapping[str, Any]) -> type[Model]:
    """Return the record of a base model for `model.model_type`."""
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in _MODELS:
        return _MODELS[model_type]
    reason = f"allowed: {', '.join(_MODELS)}"
    raise RequestError(Problem("model.model_type", model_type, reason=reason))


def _data_class(raw: Mapping[str, Any]) -> type[DataConfig]:
    """Return the class that an option of `data` names."""
    kind = component_class("data", raw.get(TARGET), base=dotted(DataConfig))
    source = raw.get("source")
    if "source" in field_keys(kind, "") and source not in choices(kind, "source"):
        reason = f"allowed: {', '.join(_data_keys())}"
        if isinstance(source, str) and source in _data_keys():
            reason = f"{source} has different keys; select it with data={source}"
        near = nearest(str(source), _data_keys())
        raise RequestError(Problem("data.source", source, reason=reason, nearest=near))
    return kind


def _read_model(reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]) -> Model | None:
    """Return the base model of a run, or None if there are problems (then recorded)."""
    kind = classes.get("model")
    if kind is None:
        return None
    keys = {option: field_keys(record, "") for option, record in _MODELS.items()}
    choice = "model=hf (the checkpoint defines the shape)"
    values = _without_other_options(
        reader, "model", keys, raw, choice=choice, own=field_keys(kind, "")
    )
    if kind is CheckpointModelConfig and values.get("path") is None:
        reason = "set the checkpoint: model.path=DIR, a folder or a Hub id"
        reader.report("model.path", None, reason=reason)
        return None
    model: Model | None = reader.read(kind, values, prefix="model")
    if not isinstance(model, CheckpointModelConfig):
        return model
    path = reader.call(checkpoint_location, model.path)
    return None if path is None else replace(model, path=path)


def _read_data(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> DataConfig | None:
    """Return the data config of a run, or None if there are problems (then recorded)."""
    kind = classes.get("data")
    if kind is None:
        return None
    own, choice = field_keys(kind, ""), f"data={raw.get('source')} (the current source)"
    if "source" not in own:
        choice = dotted(kind)
    body = _without_other_options(reader, "data", _data_keys(), raw, choice=choice, own=own)
    del body[TARGET]
    is_new, sources = classes.get("model") is not CheckpointModelConfig, dict[str, Any]()
    if issubclass(kind, NamedTextConfig):
        sources = kind.read_named(body, reader.problems, is_new=is_new)
    blank: dict[str, Any] = {name: [] if name == "tasks" else {} for name in sources}
    values = reader.read(kind, {**body, **blank}, prefix="data")
    if values is None:
        return None
    for name in () if sources else (*values.old_sources, *values.new_sources):
        if not str(name).replace("-", "_").isidentifier():  # it becomes the name of a file
            reason = f"its domain {name!r} must be a letter or _, then letters, digits, - and _"
            reader.report(f"data.{TARGET}", dotted(kind), reason=reason)
    if values.chat_template is not None:
        values = replace(values, chat_template=reader.call(template_location, values.chat_template))
    return replace(values, **sources)


def _read_evaluation(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> EvaluationConfig | None:
    """Return the evaluation options of a run with an absolute path; None if there are problems."""
    values: EvaluationConfig | None = reader.read(EvaluationConfig, raw, prefix="evaluation")
    if values is None or values.tasks_path is None:
        return values
    path = reader.call(partial(named_path, key="evaluation.tasks_path"), values.tasks_path)
    return None if path is None else replace(values, tasks_path=str(path.absolute()))


def _read_optimizer(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> OptimizerSettings | None:
    """Return the optimizer of a run, or None if there are problems (then recorded)."""
    kind, own = classes.get("optimizer"), OptimizerSettings.KEYS
    body = {name: value for name, value in raw.items() if name in own}
    values: OptimizerSettings | None = reader.read(OptimizerSettings, body, prefix="optimizer")
    arguments = {n: value for n, value in raw.items() if n not in (*own, "name", TARGET)}
    if values is None or kind is None:
        return None
    shipped = map(body_of, shipped_options()["optimizer"].values())
    settings = replace(values, target=dotted(kind), arguments=arguments)
    reader.problems += settings.problems(kind, shipped=shipped)
    return settings


def _read_trainer(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> TrainerSettings | None:
    """Return the arguments of Lightning's Trainer, or None if there are problems."""
    further = trainer_arguments(raw, reader.problems)
    body = {name: value for name, value in raw.items() if name not in further}
    values = reader.read(TrainerValues, body, prefix="trainer")
    return None if values is None else TrainerSettings(arguments=further, **asdict(values))


def _data_keys() -> dict[str, tuple[str, ...]]:
    """Return the options of `data` and the keys of each."""
    files = option_files().get("data", {})
    return {n: tuple(key for key in body_of(p) if key != TARGET) for n, p in files.items()}


def _without_other_options(
    reader: Reader,
    name: str,
    keys: Mapping[str, Collection[str]],
    raw: Mapping[str, Any],
    *,
    choice: str,
    own: Collection[str],
) -> dict[str, Any]:
    """Return a section without the keys of other options, which are reported.

    Args:
        reader: collects the problems.
        name: name of the section.
        keys: option → its keys.
        raw: the section as composed.
        choice: the selected option, for messages.
        own: keys of the selected option.
    """
    values, files = dict(raw), option_files().get(name, {})
    for each in raw:
        others = [option for option, theirs in keys.items() if each in theirs]
        if not others or each in own:
            continue
        key, value = join(name, each), values.pop(each)
        option = "text" if "text" in others else others[0]
        near = f"{name}={option} {key}={show(value)}" if option in files else None
        if (hint := Hint.of(key, value)) is not None:
            near = hint.advice
        is_only = len(others) == 1 and others[0] in files
        needed = f"requires {name}={others[0]}" if is_only else f"is not a key of {choice}"
        reader.problems.append(Problem(key, reason=f"{key} {needed}", nearest=near))
    return values


def _valid_components(
    group: str, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> tuple[Component, ...]:
    """Return the entries of a group whose classes are valid."""
    kinds = {name: classes.get(f"{group}.{name}") for name in bodies}
    return tuple(
        Component(name=name, kind=kinds[name], options=body)
        for name, body in bodies.items()
        if kinds[name] is not None
    )


def _read_built(
    reader: Reader, bodies: Mapping[str, Any], classes: Mapping[str, Any], *, group: str
) -> tuple[Component, ...]:
    """Return the callbacks, metrics or stages of a run, in order, after a trial build of each."""
    owners: dict[str, str] = {}  # of the keys of callbacks
    for name, body in bodies.items():
        if (kind := classes.get(key := f"{group}.{name}")) is not None:
            made, problems = _try_build(key, kind, body)
            reader.problems += problems
            if group == "callbacks" and not problems:
                reader.problems += callback_problems(key, made, body, owners)
            elif group == "stages" and not problems:
                reader.problems += made.problems(key)
    return _valid_components(group, bodies, classes)


def _read_loggers(
    reader: Reader, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> tuple[Component, ...]:
    """Return the loggers of a run, W&B first; problems are recorded by the reader."""
    wandb: WandbConfig | None = None
    if isinstance(body := bodies.get("wandb"), Mapping):
        wandb = reader.read(WandbConfig, body, prefix="logger.wandb")
    elif body is not None:
        reader.report("logger.wandb", body, reason="use logger.wandb.mode")
    others = {name: body for name, body in bodies.items() if name != "wandb"}
    for name, body in others.items():
        if (kind := classes.get(f"logger.{name}")) is None:
            continue
        for variable, value in _MLFLOW.items():
            os.environ.setdefault(variable, value)
        # Some loggers write when they are built: use a temporary folder for the trial
        with TemporaryDirectory() as folder:
            arguments = {"save_dir": folder} if "save_dir" in signature(kind).parameters else {}
            _, problems = _try_build(f"logger.{name}", kind, {**body, **arguments})
        for problem in problems:
            text = problem.reason.casefold()
            is_of_arguments = "no such argument" in text or "needs it" in text
            for package in () if is_of_arguments else _EXTRAS:
                if package in text and find_spec(package) is None:  # Lightning words it differently
                    reason = f"it requires {package}, which is not installed: "
                    reason += f"pip install 'tritter[{package}]'"
                    problem = Problem(problem.key, reason=reason)
            reader.problems.append(problem)
    found = _valid_components("logger", others, classes)
    if wandb is None or wandb.mode == "off":
        return found
    return (Component(name="wandb", kind=WandbConfig, options=wandb), *found)


def _named_class(group: str, name: str, bodies: Mapping[str, Any]) -> type:
    """Return the class that an entry of a group names."""
    key, body, options = f"{group}.{name}", bodies[name], option_files().get(group, {})
    if name == TARGET:
        reason = f"write it below a name, {group}.NAME.{TARGET}, also in an option file"
        raise RequestError(Problem(key, body, reason=reason))
    if not isinstance(body, Mapping):
        reason = f"write the key below a name, {group}.NAME.{name}; options of {group}: "
        near = nearest(name, options)
        raise RequestError(Problem(key, body, reason=reason + ", ".join(options), nearest=near))
    if TARGET in body:
        kind: type = resolve(f"{key}.{TARGET}", body[TARGET], base=BASES[group])
        return kind
    reason = f"{name} is not selected; select it with {group}=[{name}]"
    names = list(body_of(options[name])) if name in options else []
    if name not in options:
        reason = f"it names no class; set {key}.{TARGET}=package.module.Class"
    elif name not in names:
        reason = f"{name} defines {', '.join(map(str, names))}; write the key below one of them"
    for argument, value in body.items():
        raise RequestError(Problem(f"{key}.{argument}", value, reason=reason))
    raise RequestError(Problem(key, reason=reason))


def _try_build(key: str, kind: type, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return an instance built from a body (None if it can't be built), and the problems."""
    arguments = {name: value for name, value in body.items() if name != TARGET}
    if problems := list(argument_problems(kind, arguments, key=key)):
        return None, problems
    made = building_problem(kind, arguments, key=key)
    return (None, [made]) if isinstance(made, Problem) else (made, [])


_SINGLE_CLASS: Mapping[str, Callable[..., object]] = {
    "model": _model_class,
    "data": _data_class,
    "optimizer": optimizer_class,
    "growth": partial(_chosen_class, "growth"),
    "experts": partial(_chosen_class, "experts"),
}
_CLASS_PER_ENTRY: Mapping[str, Callable[..., type]] = {
    **dict.fromkeys(METHOD_GROUPS, method_class),
    **dict.fromkeys(BASES, _named_class),
}
# Group → function that reads its body
_READERS: Mapping[str, Callable[[Reader, Mapping[str, Any], Mapping[str, Any]], object]] = {
    "model": _read_model,
    "data": _read_data,
    "evaluation": _read_evaluation,
    "optimizer": _read_optimizer,
    "trainer": _read_trainer,
    "callbacks": partial(_read_built, group="callbacks"),
    "logger": _read_loggers,
    "metrics": partial(_read_built, group="metrics"),
    "stages": partial(_read_built, group="stages"),
    "expansion": partial(Reader.read_methods, group="expansion"),
    "forgetting": partial(Reader.read_methods, group="forgetting"),
    "growth": partial(_read_chosen, group="growth"),
    "experts": partial(_read_chosen, group="experts"),
}

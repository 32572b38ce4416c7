"""Sections that name a class, and the records and components that they are read as."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

from tritter.checkpoints.location import checkpoint_location
from tritter.config.folders import CHOSEN_BY, body_of, option_files, shipped_options
from tritter.config.schema import (
    CheckpointModelConfig,
    LoggerConfig,
    Model,
    RunConfig,
    WandbConfig,
)
from tritter.config.suggestions import child_names, hint_for, nearest_key
from tritter.data.options import (
    DataConfig,
    NamedTextConfig,
    SkillsDataConfig,
    read_named,
    with_skills,
)
from tritter.errors import Problem, RequestError, key_name, nearest, show
from tritter.evaluation.options import EvaluationConfig
from tritter.methods.moe_routing.options import appends_experts
from tritter.options import (
    choices,
    component_class,
    field_keys,
    join,
    read_component,
    read_options,
)
from tritter.storage.reading import named_path
from tritter.targets import (
    TARGET,
    Component,
    argument_problems,
    building_problem,
    dotted,
    resolve,
)
from tritter.training.optimizer import OptimizerSettings, OptimizerValues, optimizer_problems
from tritter.training.options import (
    REFUSED,
    TrainerSettings,
    TrainerValues,
    callback_problems,
    callbacks_of,
    trainer_argument_problems,
    trainer_parameters,
)

Origin = Callable[[str], str | None]
Answer = TypeVar("Answer")
_KEYLESS_GROUPS = ("experiment",)  # what they choose sets keys of other groups


class Reader:
    """Turns mappings into records and collects every problem on the way.

    Args:
        known_keys: returns all dotted keys of a config, from which nearest matches are offered.
    """

    def __init__(self, known_keys: Callable[[], Collection[str]]) -> None:
        self.problems: list[Problem] = []
        self._known_keys = known_keys

    def report(self, key: str, value: object, *, reason: str) -> None:
        self.problems.append(Problem(key, value, reason=reason))

    def ask(self, question: Callable[..., Answer], *words: Any) -> Answer | None:
        """Return what a function says, or None when it refuses (now reported)."""
        try:
            return question(*words)
        except RequestError as error:
            self.problems += error.problems
            return None

    def read(self, record_type: type, raw: Mapping[str, object], *, prefix: str) -> Any:
        """Return a `record_type` from `raw`, or None when there were problems (now reported)."""
        return read_options(
            record_type, raw, prefix=prefix, problems=self.problems, unknown=self._unknown
        )

    def component(
        self, key: str, kind: type[Any] | None, body: Mapping[str, object]
    ) -> Component | None:
        """Return a component; None when its class was not found, or there were problems."""
        if kind is None:
            return None
        return read_component(key, kind, body, problems=self.problems, unknown=self._unknown)

    def _unknown(self, key: str, value: object) -> Iterator[Problem]:
        if isinstance(value, Mapping) and value:
            for name in value:
                yield from self._unknown(join(key, str(name)), value[name])
            return
        section, _, leaf = key.rpartition(".")
        known = self._known_keys()
        if section == "trainer":
            further = (f"trainer.{name}" for name in trainer_parameters() if name not in REFUSED)
            known = (*known, *further)
        names = child_names(known, section)
        near = None
        if not section:
            names = sorted([*names, *_KEYLESS_GROUPS])
            near = nearest(leaf, names, cutoff=0.7)
        place = f"{key_name(section)} has" if section else "the root has"
        reason = f"there is no such key; {place} {', '.join(names)}" if names else "no such key"
        if (hint := hint_for(key, value)) is not None:
            yield Problem(key, value, reason=hint.reason or reason, nearest=hint.advice or None)
            return
        yield Problem(key, value, reason=reason, nearest=near or nearest_key(key, known))


# Group → what its classes have to be subclasses of, by name: importing it is left to a selection.
METHOD_GROUPS: Mapping[str, str | None] = {
    "expansion": None,
    "forgetting": "tritter.training.forgetting_method.ForgettingMethod",
}
# Likewise of groups of which one option is chosen, and what their option `none` means
CHOSEN_GROUPS = {
    "growth": ("tritter.methods.growth.method.NeuronGrowth", "nothing grows"),
    "experts": ("tritter.methods.experts.method.Experts", "there are no adapters"),
}
# What an expansion has, which is a record of its options and no subclass of anything.
_EXPANSION = (
    *("name", "expansion_type", "is_exact", "new_blocks_only"),
    *("target_config", "parameter_map", "notes"),
)


def method_names(group: str) -> list[str]:
    """Return the options of an ordered group, but for `none`."""
    return [name for name in option_files().get(group, {}) if name != "none"]


def weightless_methods() -> list[str]:
    """Return the methods against forgetting that use no weights; for messages."""
    found = []
    for name in method_names("forgetting"):
        with suppress(RequestError):  # told where it is selected
            body = body_of(option_files()["forgetting"][name])
            found += [] if method_class("forgetting", name, body).uses_weights else [name]
    return found


def method_keys() -> list[str]:
    """Return the dotted keys of all methods, as their files state them."""
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
    """Return the class that an entry of an ordered group names.

    Raises:
        RequestError: there is no such method, or it names no class of one.
    """
    key, body = f"{group}.{name}", bodies[name]
    if name not in (names := method_names(group)):
        near = nearest(name, names)
        reason = f"there is no such method; there are {', '.join(names)}"
        if near is None and not isinstance(body, Mapping):  # a method's key without the method
            reason = f"a key stands below its method, {group}.METHOD.{name}; methods are "
            reason += ", ".join(names)
            keys = [each for each in method_keys() if each.startswith(f"{group}.")]
            chosen = [each for each in keys if each.split(".")[1] in bodies]
            near = nearest_key(key, keys, first=chosen)
        raise RequestError(Problem(key, body, reason=reason, nearest=near))
    if not isinstance(body, Mapping):
        raise RequestError(Problem(key, body, reason="it holds keys; choose an option of it"))
    place, target = f"{key}.{TARGET}", body.get(TARGET)
    if group == "expansion":
        kind = resolve(place, target)
        missing = [each for each in _EXPANSION if not hasattr(kind, each)]
        if isinstance(kind, type) and missing:
            reason = f"it is no expansion: it has no {', '.join(missing)}"
            raise RequestError(Problem(place, target, reason=reason))
    kind = component_class(key, target, base=METHOD_GROUPS[group])
    if kind.name != name:
        reason = f"the class calls itself {kind.name}, and its option {name}; let them be the same"
        raise RequestError(Problem(place, target, reason=reason))
    return kind


def chosen_class(group: str, body: Mapping[str, Any]) -> type[Any] | None:
    """Return the class that a group of one names; None where it is `none`.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    if not body:
        return None
    base, nothing = CHOSEN_GROUPS[group]
    if TARGET in body:
        return component_class(group, body[TARGET], base=base)
    key, value = next(iter(body.items()))
    choice = next(name for name in option_files().get(group, {}) if name != "none")
    reason = f"{nothing} with {group}=none, which has no keys; choose {group}={choice}"
    raise RequestError(Problem(f"{group}.{key}", value, reason=reason))


def with_parts_of_files(group: str, body: Mapping[str, Any]) -> dict[str, Any]:
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


def read_methods(
    reader: Reader, group: str, bodies: Mapping[str, Any], classes: Mapping[str, type[Any]]
) -> tuple[Component, ...]:
    """Return the methods of an ordered group whose classes were found and that can be read."""
    keys = {f"{group}.{name}": body for name, body in bodies.items()}
    read = [reader.component(key, classes.get(key), body) for key, body in keys.items()]
    return tuple(each for each in read if each is not None)


def nesting_problems() -> list[Problem]:
    """Return which option files of the ordered groups hold something else than their own body."""
    files = option_files()
    return [
        Problem(
            f"{group}={name}",
            list(body_of(path)),
            reason=f"{path} nests its keys under {name}, its own name, and nothing else",
        )
        for group in METHOD_GROUPS
        for name, path in files.get(group, {}).items()
        if list(body_of(path)) != [name]
    ]


_MODELS = {word: kind for kind in get_args(Model) for word in choices(kind, "model_type")}


def model_class(raw: Mapping[str, Any]) -> type[Model]:
    """Return the record of a base model that `model.model_type` means.

    Raises:
        RequestError: it means none.
    """
    said = raw.get("model_type")
    if isinstance(said, str) and said in _MODELS:
        return _MODELS[said]
    reason = f"must be one of {', '.join(_MODELS)}"
    raise RequestError(Problem("model.model_type", said, reason=reason))


def data_class(raw: Mapping[str, Any]) -> type[DataConfig]:
    """Return the class that an option of `data` names.

    Raises:
        RequestError: it is none of ours nor made from `DataConfig`, or `source` says another one.
    """
    kind = component_class("data", raw.get(TARGET), base=dotted(DataConfig))
    said = raw.get("source")
    if "source" in field_keys(kind, "") and said not in choices(kind, "source"):
        reason = f"must be one of {', '.join(data_keys())}"
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
    place = reader.ask(checkpoint_location, model.path)
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
        taken = with_skills(kind, taken, is_new=is_new)
    is_named = issubclass(kind, NamedTextConfig)
    sources = read_named(taken, kind, reader.problems) if is_named else {}
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


def read_optimizer(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> OptimizerSettings | None:
    """Return the optimizer of a run, or None when there were problems (now reported)."""
    kind, own = classes.get("optimizer"), field_keys(OptimizerValues, "")
    given = {name: value for name, value in raw.items() if name in own}
    values = reader.read(OptimizerValues, given, prefix="optimizer")
    arguments = {n: value for n, value in raw.items() if n not in (*own, "name", TARGET)}
    if values is None or kind is None:
        return None
    shipped = map(body_of, shipped_options()["optimizer"].values())
    decay = values.weight_decay
    reader.problems += optimizer_problems(kind, arguments, decay, shipped=shipped)
    return OptimizerSettings(target=dotted(kind), arguments=arguments, **asdict(values))


def read_trainer(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> TrainerSettings | None:
    """Return what Lightning's Trainer is given, or None when there were problems."""
    own = field_keys(TrainerValues, "")
    names = () if set(raw) <= set(own) else trainer_parameters()
    further = {n: value for n, value in raw.items() if n in names and n not in own}
    for name, value in further.items():
        reader.problems += trainer_argument_problems(name, value)
    stated = {name: value for name, value in raw.items() if name not in further}
    values = reader.read(TrainerValues, stated, prefix="trainer")
    return None if values is None else TrainerSettings(arguments=further, **asdict(values))


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


def read_callbacks(
    reader: Reader, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> tuple[Component, ...]:
    """Return the callbacks of a run, in the order in which they were asked for."""
    owners: dict[str, str] = {}
    for name, body in bodies.items():
        key = f"callbacks.{name}"
        if (kind := classes.get(key)) is not None:
            made, problems = try_build(key, kind, body)
            reader.problems += problems or callback_problems(key, made, body, owners)
    return _named("callbacks", bodies, classes)


def _named(
    group: str, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> tuple[Component, ...]:
    """Return the entries of a group whose classes were found."""
    kinds = {name: classes.get(f"{group}.{name}") for name in bodies}
    return tuple(
        Component(name=name, kind=kinds[name], options=body)
        for name, body in bodies.items()
        if kinds[name] is not None
    )


def averaging_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield why weights can't be averaged: frozen ones would move by rounding, experts come."""
    asked = {
        "expansion.llama_pro.new_blocks_only": any(s.new_blocks_only for s in config.expansion),
        "adaptation.freeze_base": appends_experts(config) and config.adaptation.freeze_base,
    }
    told = next((f"{key} = true" for key, is_asked in asked.items() if is_asked), None)
    freezing = (f"forgetting={one.name}" for one in config.forgetting if one.kind.freezes)
    told = told or next(freezing, None)
    reason = f"with {told} old weights are frozen, and an average moves them by its "
    reason += "rounding; leave one of the two out"
    if config.experts is not None:
        told, reason = "experts", "an average has no experts that came on the way; leave it out"
    for one in callbacks_of("WeightAveraging", config) if told else ():
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason=reason)


_EXTRAS = ("tensorboard", "mlflow")  # of Tritter, by the package that a logger needs
_MLFLOW = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # its newer versions refuse to write files else
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run tells nobody of itself
}


def read_loggers(
    reader: Reader, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> LoggerConfig:
    """Return the loggers of a run; what is wrong is reported to the reader."""
    wandb: WandbConfig | None = None
    if isinstance(body := bodies.get("wandb"), Mapping):
        wandb = reader.read(WandbConfig, body, prefix="logger.wandb")
    elif body is not None:
        reader.report("logger.wandb", body, reason="it is called logger.wandb.mode now")
    others = {name: body for name, body in bodies.items() if name != "wandb"}
    for name, body in others.items():
        if (kind := classes.get(f"logger.{name}")) is None:
            continue
        for variable, value in _MLFLOW.items():
            os.environ.setdefault(variable, value)
        # Some write at once: it is built for trial, in a folder that is gone afterwards
        with TemporaryDirectory() as folder:
            given = {"save_dir": folder} if "save_dir" in signature(kind).parameters else {}
            _, problems = try_build(f"logger.{name}", kind, {**body, **given})
        for problem in problems:
            said = problem.reason.casefold()
            is_of_arguments = "no such argument" in said or "needs it" in said
            for package in () if is_of_arguments else _EXTRAS:
                if package in said and find_spec(package) is None:  # Lightning says it otherwise
                    reason = f"it needs {package}, which is not installed: "
                    reason += f"pip install 'tritter[{package}]'"
                    problem = Problem(problem.key, reason=reason)
            reader.problems.append(problem)
    return LoggerConfig(
        wandb=None if wandb is None or wandb.mode == "off" else wandb,
        others=_named("logger", others, classes),
    )


# Group → what its classes have to be subclasses of
BASES = {
    "callbacks": "lightning.pytorch.Callback",
    "logger": "lightning.pytorch.loggers.Logger",
}


def clashes(group: str, selected: Sequence[str]) -> Iterator[Problem]:
    """Yield which names two of the selected option files give: they would become one body."""
    files = option_files().get(group, {})
    givers: dict[str, list[str]] = {}
    for option in dict.fromkeys(selected):
        for name in body_of(files[option]) if option in files else ():
            givers.setdefault(str(name), []).append(option)
    for name, options in givers.items():
        if len(options) > 1:
            reason = f"{' and '.join(options)} both hold {name}; leave one of them out"
            yield Problem(group, list(selected), reason=reason)


def named_class(group: str, name: str, bodies: Mapping[str, Any]) -> type:
    """Return the class that an entry of a group names.

    Raises:
        RequestError: it holds no keys, names no class, or one that does not belong there.
    """
    key, body, options = f"{group}.{name}", bodies[name], option_files().get(group, {})
    if name == TARGET:
        reason = f"it stands below a name, as {group}.NAME.{TARGET}, in an option file as well"
        raise RequestError(Problem(key, body, reason=reason))
    if not isinstance(body, Mapping):
        reason = f"a key stands below its name, {group}.NAME.{name}; {group} has "
        near = nearest(name, options)
        raise RequestError(Problem(key, body, reason=reason + ", ".join(options), nearest=near))
    if TARGET in body:
        kind: type = resolve(f"{key}.{TARGET}", body[TARGET], base=BASES[group])
        return kind
    reason = f"{name} is not selected; select it with {group}=[{name}]"
    held = list(body_of(options[name])) if name in options else []
    if name not in options:
        reason = f"it names no class; say {key}.{TARGET}=package.module.Class"
    elif name not in held:
        reason = f"{name} holds {', '.join(map(str, held))}; a key stands below one of them"
    for argument, value in body.items():
        raise RequestError(Problem(f"{key}.{argument}", value, reason=reason))
    raise RequestError(Problem(key, reason=reason))


def try_build(key: str, kind: type, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return an instance of what a body describes, None where it can't be; and what is wrong."""
    arguments = {name: value for name, value in body.items() if name != TARGET}
    if problems := list(argument_problems(kind, arguments, key=key)):
        return None, problems
    made = building_problem(kind, arguments, key=key)
    return (None, [made]) if isinstance(made, Problem) else (made, [])

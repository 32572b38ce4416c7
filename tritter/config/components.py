"""`callbacks`: Lightning's and anybody's, by `_target_`; what a run can't bear of them."""

import ast
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tritter.config.folders import body_of, option_files, shipped_options
from tritter.config.rules import appends_experts, callbacks_of
from tritter.config.schema import (
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerValues,
    RunConfig,
    TrainerConfig,
    WandbConfig,
)
from tritter.config.selection import Reader
from tritter.config.suggestions import NO_EPOCHS, hint_for
from tritter.errors import Problem, RequestError, nearest
from tritter.targets import (
    TARGET,
    Component,
    argument_problems,
    building_problem,
    dotted,
    imported,
    parameters_of,
    parsed_module,
    quietly,
    resolve,
)

_REFUSED = {
    "Timer": "no decision rests on the clock, else a resumed run would end elsewhere; say "
    "training.max_steps",
    "GradientAccumulationScheduler": "it counts epochs, and a training is one without end; say "
    "trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it counts epochs, and a training is one without end; use "
    "callbacks=ema",
    "BatchSizeFinder": "it tries steps of its own, which a resumed run can't repeat; say "
    "data.batch_size",
    "LearningRateFinder": "it tries steps of its own, which a resumed run can't repeat; say "
    "training.learning_rate",
}
_METRICS = (
    "train/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "performance/tokens_per_second",
    "performance/steps_per_second",
    "performance/step_seconds",
    "performance/flops",
    "performance/peak_memory_bytes",
)
_EVALUATED = ("loss", "perplexity", "accuracy")
_OF_ROUTERS = (
    "routing/auxiliary_loss",
    "routing/z_loss",
    "routing/entropy",
    "routing/max_load",
    "routing/dropped_fraction",
)

_OF_EXPERTS = (
    "experts/number",
    "experts/trainable_share",
    "experts/routing_entropy",
    "experts/dropped",
    "experts/novelty",
)


def read_callbacks(
    reader: Reader, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> tuple[Component, ...]:
    """Return the callbacks of a run, in the order in which they were asked for."""
    owners: dict[str, str] = {}
    for name, body in bodies.items():
        key = f"callbacks.{name}"
        if (kind := classes.get(key)) is not None:
            made, problems = built_for_trial(key, kind, body)
            reader.problems += problems or _judged(key, made, body, owners)
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


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """Return what a callback can monitor of a training, but for what callbacks log themselves."""
    domains = config.text.domains if config.evaluation.every_n_steps else ()
    is_dense = isinstance(config.model, ModelConfig) and not any(
        spec.name == "moe" for spec in config.expansion
    )
    return (
        *_METRICS,
        *(("performance/padding_fraction",) if config.data.packing == "documents" else ()),
        *(() if is_dense else _OF_ROUTERS),
        *(("routing/old_divergence",) if config.moe_routing.hold_old else ()),
        *(f"eval/{domain.name}/{name}" for name in _EVALUATED for domain in domains),
        *(f"forgetting/{one.name}/loss" for one in config.forgetting if one.kind.is_logged()),
        *(_OF_EXPERTS if config.experts is not None and config.experts.kind.is_dynamic else ()),
    )


def monitor_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield who would wait for a metric that never comes; strangers may log what they like."""
    is_strange = any(not dotted(one.kind).startswith("lightning.") for one in config.callbacks)
    if is_strange or any(asking_problems(config)):
        return
    known = metric_names(config)
    checkpoints = callbacks_of("ModelCheckpoint", config)
    for one in (*callbacks_of("EarlyStopping", config), *checkpoints):
        monitor = one.options.get("monitor")
        allowed = (*known, "step", "epoch") if one in checkpoints else known
        # Before the first step of a training there are only metrics of evaluations
        is_too_early = one.options.get("strict", True) and not str(monitor).startswith("eval/")
        if monitor is not None and monitor not in allowed:
            reason = f"no training logs it; it is one of {', '.join(known)}"
            key, near = f"callbacks.{one.name}.monitor", nearest(monitor, allowed)
            yield Problem(key, monitor, reason=reason, nearest=near)
        elif one not in checkpoints and is_too_early:
            reason = f"before the first step, when it is first asked, there is no {monitor} yet"
            yield Problem(f"callbacks.{one.name}.strict", True, reason=reason)


def asking_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield whom nobody would ask."""
    reason = "it is asked when the training is evaluated, and evaluation.every_n_steps = 0"
    for one in () if config.evaluation.every_n_steps else callbacks_of("EarlyStopping", config):
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason=reason)


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


def _judged(
    key: str, made: Any, body: Mapping[str, Any], owners: dict[str, str]
) -> Iterator[Problem]:
    """Yield what a run can't bear of a callback; `owners`: name of a saved state → whose it is."""
    names = [kind.__name__ for kind in type(made).__mro__]
    for name in names:
        if name in _REFUSED:
            yield Problem(f"{key}.{TARGET}", body[TARGET], reason=_REFUSED[name])
    if "ModelCheckpoint" in names:
        folder = body.get("dirpath")
        if folder is not None and (Path(folder).is_absolute() or ".." in Path(folder).parts):
            reason = "it is below the folder of each training, as in checkpoints"
            yield Problem(f"{key}.dirpath", folder, reason=reason)
        if (interval := body.get("train_time_interval")) is not None:
            reason = "nothing rests on the clock; say every_n_train_steps"
            yield Problem(f"{key}.train_time_interval", interval, reason=reason)
    owner = owners.setdefault(made.state_key, key)
    # The base of all callbacks has no state
    base: Any = next(kind for kind in type(made).__mro__ if kind.__name__ == "Callback")
    if owner != key and type(made).state_dict is not base.state_dict:
        reason = (
            f"it saves its state as {owner} does ({made.state_key}); let them differ "
            "in what they monitor, or leave one out"
        )
        yield Problem(key, body[TARGET], reason=reason)


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
            _, problems = built_for_trial(f"logger.{name}", kind, {**body, **given})
        reader.problems += map(_with_extra, problems)
    return LoggerConfig(
        wandb=None if wandb is None or wandb.mode == "off" else wandb,
        others=_named("logger", others, classes),
    )


def _with_extra(problem: Problem) -> Problem:
    """Say how a package is installed that a logger needs, in place of what Lightning says."""
    said = problem.reason.casefold()
    is_of_arguments = "no such argument" in said or "needs it" in said
    for package in () if is_of_arguments else _EXTRAS:
        if package in said and find_spec(package) is None:
            reason = f"it needs {package}, which is not installed: pip install 'tritter[{package}]'"
            return Problem(problem.key, reason=reason)
    return problem


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


def built_for_trial(key: str, kind: type, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return an instance of what a body describes, None where it can't be; and what is wrong."""
    arguments = {name: value for name, value in body.items() if name != TARGET}
    if problems := list(argument_problems(kind, arguments, key=key)):
        return None, problems
    made = building_problem(kind, arguments, key=key)
    return (None, [made]) if isinstance(made, Problem) else (made, [])


OPTIMIZER = "torch.optim.Optimizer"
_TORCH, _EIGHT_BIT = "torch.optim", "bitsandbytes.optim"
# By name: to import bitsandbytes takes long
_OF_BITSANDBYTES = (
    "Adam8bit",
    "AdamW8bit",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedLion8bit",
    "SGD8bit",
    "RMSprop8bit",
    "AdEMAMix",
    "AdEMAMix8bit",
)
_SIDE = 16  # of the matrix that a step is tried with
_OWN = ("params", "lr")  # which Tritter gives


def optimizer_class(raw: Mapping[str, Any]) -> type | str:
    """Return the class of an optimizer, by its name or by `_target_`; of one of torch its name.

    Raises:
        RequestError: there is none of this name, or both are given, or neither.
    """
    name, target = raw.get("name"), raw.get(TARGET)
    if name is None and target is None:
        reason = "choose an option of it, or name a class of torch.optim or bitsandbytes.optim"
        raise RequestError(Problem("optimizer.name", None, reason=reason))
    if name is not None and target is not None:
        reason = f"optimizer.name = {name} names another; set optimizer.name=null besides"
        raise RequestError(Problem(f"optimizer.{TARGET}", target, reason=reason))
    if name is None:
        return resolve(f"optimizer.{TARGET}", target, base=OPTIMIZER)
    classes, spelled = _classes(), _spelling(str(name))
    if (found := classes.get(spelled)) is not None:
        if not found.startswith(_EIGHT_BIT):
            return found
        with quietly():
            return resolve("optimizer.name", found, base=OPTIMIZER)
    names = {spelling: target.rpartition(".")[2] for spelling, target in classes.items()}
    reason = f"allowed is one of {', '.join(sorted(names.values()))}, or optimizer.{TARGET}"
    near = names.get(nearest(spelled, names) or "")
    raise RequestError(Problem("optimizer.name", name, reason=reason, nearest=near))


def read_optimizer(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> OptimizerConfig | None:
    """Return the optimizer of a run, or None when there were problems (now reported)."""
    kind = classes.get("optimizer")
    own = [field.name for field in fields(OptimizerValues)]
    given = {name: value for name, value in raw.items() if name in own}
    values = reader.read(OptimizerValues, given, prefix="optimizer")
    arguments = {n: value for n, value in raw.items() if n not in (*own, "name", TARGET)}
    if values is None or kind is None:
        return None
    reader.problems += _optimizer_problems(kind, arguments, values.weight_decay)
    return OptimizerConfig(target=dotted(kind), arguments=arguments, **asdict(values))


def _classes() -> dict[str, str]:
    """Return, by spelling, the dotted names of torch's optimizers and bitsandbytes'."""
    names, renamed = list[str](), list[str]()
    for node in parsed_module(_TORCH).body:  # `from torch.optim.sgd import SGD as SGD`
        if isinstance(node, ast.ImportFrom):
            own = [each.name for each in node.names if each.name[0].isupper()]
            names += [f"{node.module}.{name}" for name in own if name != "Optimizer"]
        elif isinstance(node, ast.Assign):  # `Muon.__module__ = "torch.optim"`
            renamed.append(ast.unparse(node.targets[0]).partition(".")[0])
    names += [f"{_EIGHT_BIT}.{name}" for name in _OF_BITSANDBYTES]
    found = {_spelling(name.rpartition(".")[2]): name for name in reversed(names)}
    return found | {_spelling(name): f"{_TORCH}.{name}" for name in renamed if name[0].isupper()}


def _spelling(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _optimizer_problems(
    kind: type | str, arguments: Mapping[str, Any], weight_decay: float | None
) -> list[Problem]:
    if "lr" in arguments:
        reason = "the schedule gives it; say training.learning_rate"
        return [Problem("optimizer.lr", arguments["lr"], reason=reason)]
    if weight_decay is not None and "weight_decay" not in parameters_of(kind):
        reason = f"{dotted(kind).rpartition('.')[2]} has none; set optimizer.weight_decay=null"
        return [Problem("optimizer.weight_decay", weight_decay, reason=reason)]
    if found := list(argument_problems(kind, arguments, key="optimizer", given=_OWN)):
        return found
    own = [*(field.name for field in fields(OptimizerValues)), "name"]
    named = _spelling(dotted(kind).rpartition(".")[2])
    bodies = map(body_of, shipped_options()["optimizer"].values())
    shipped = [body for body in bodies if _spelling(str(body["name"])) == named]
    if any({k: body[k] for k in body if k not in own} == arguments for body in shipped):
        return []  # a test has tried them
    return _tried(imported(kind) if isinstance(kind, str) else kind, arguments)


def _tried(kind: Any, arguments: Mapping[str, Any]) -> list[Problem]:
    """Take a step for trial; what comes of it is told of the first argument that alone leads to
    it."""
    whole = _failure(kind, arguments)
    if whole is None:
        return []
    alone = ((name, _failure(kind, {name: value})) for name, value in arguments.items())
    name, said = next(((n, told) for n, told in alone if told), (None, whole))
    key = "optimizer" if name is None else f"optimizer.{name}"
    value = f"{kind.__module__}.{kind.__name__}" if name is None else arguments[name]
    return [Problem(key, value, reason=said or whole)]


def _failure(kind: Any, arguments: Mapping[str, Any]) -> str | None:
    try:
        _after_a_step(kind, arguments)
    except Exception as error:  # whatever a class of somebody else raises
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def kept_per_parameter(optimizer: OptimizerConfig) -> float:
    """Return how many numbers an optimizer keeps for each parameter of a matrix: of Adam two."""
    held = _after_a_step(imported(optimizer.target), optimizer.arguments)
    state = held.state[held.param_groups[0]["params"][0]].values()
    sizes = [value.numel() for value in state if hasattr(value, "numel")]
    return sum(size for size in sizes if size > 1) / _SIDE**2


def _after_a_step(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """Return an optimizer that took a step with a matrix and a vector."""
    ones = imported("torch.ones")
    held = [imported("torch.nn.Parameter")(ones(*shape)) for shape in ((_SIDE, _SIDE), (_SIDE,))]
    for each in held:
        each.grad = ones(each.shape)
    with quietly():
        made = kind([{"params": held[:1]}, {"params": held[1:]}], lr=1e-3, **arguments)
        made.step()
    return made


TRAINER = "lightning.pytorch.Trainer"
PROFILERS = ("simple", "advanced", "pytorch")
# What changes no weights, so that a run may go on with another value
WITHOUT_EFFECT = ("profiler", "enable_model_summary", "detect_anomaly", "enable_autolog_hparams")

_ENDS = "a run ends by its steps alone, else a resumed one would end elsewhere; say "
_ENDS += "training.max_steps and pretraining.max_steps"
_STOPS = "a training that is asked to stop, or by a callback to end, ends with its step"
_DATA = "Tritter deals out the batches itself, and saves its place in them"
_EVALUATION = "a training is evaluated by Tritter itself, on text that is always the same"
_FOLDER = "everything lies in the run folder; say hydra.run.dir"
_SAVED = "what a run goes on from is always saved; say trainer.save_every_n_steps, and "
_SAVED += "callbacks=model_checkpoint for further files"
REFUSED = {
    "max_epochs": NO_EPOCHS,
    "min_epochs": NO_EPOCHS,
    "max_time": _ENDS,
    "max_steps": _ENDS,
    "min_steps": _STOPS,
    "fast_dev_run": f"it saves nothing and switches callbacks off; {_ENDS}",
    "overfit_batches": f"{_DATA}; name less text, data.new",
    "limit_train_batches": f"{_DATA}; {_ENDS}",
    "plugins": "a checkpoint is written by Tritter's own, without pickle",
    "num_nodes": "the processes of a run are on one machine; say trainer.devices",
    "callbacks": "they are a group of their own; say callbacks=NAME",
    "logger": "they are a group of their own; say logger=NAME",
    "enable_checkpointing": _SAVED,
    "default_root_dir": _FOLDER,
    "enable_progress_bar": "Tritter has a bar of its own; say trainer.progress",
    "use_distributed_sampler": _DATA,
    "reload_dataloaders_every_n_epochs": _DATA,
    "num_sanity_val_steps": _EVALUATION,
    "inference_mode": "what a model keeps from an evaluation may meet a gradient afterwards",
    "val_check_interval": _EVALUATION,
    "check_val_every_n_epoch": _EVALUATION,
    "barebones": "it leaves out callbacks, metrics and what a run goes on from",
    "model_registry": "a run sends no model anywhere",
}

_SET_BY_TRITTER = tuple(field.name for field in fields(TrainerConfig))


def split_trainer(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys that every option of `trainer` states, and the further ones."""
    own = {name: value for name, value in raw.items() if name in _SET_BY_TRITTER}
    return own, {name: value for name, value in raw.items() if name not in own}


def trainer_parameters() -> tuple[str, ...]:
    """Return the arguments of Lightning's Trainer, read from its source: importing it is slow."""
    return tuple(parameters_of("lightning.pytorch.trainer.trainer.Trainer"))


def trainer_argument_problems(arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with further arguments, all of them."""
    known = {*trainer_parameters()} - {*REFUSED}
    for name, value in arguments.items():
        if name in REFUSED:
            yield Problem(f"trainer.{name}", value, reason=REFUSED[name])
        elif name not in known:
            allowed = sorted({*_SET_BY_TRITTER, *known})
            reason = f"there is no such key; trainer has {', '.join(allowed)}"
            near = nearest(name, allowed)
            meant = None if near is None else f"trainer.{near}"
            if (hint := hint_for(f"trainer.{name}", value)) is not None:
                reason, meant = hint.reason or reason, hint.advice or None
            yield Problem(f"trainer.{name}", value, reason=reason, nearest=meant)
        else:
            yield from _by_value(name, value)


def _by_value(name: str, value: object) -> Iterator[Problem]:
    key = f"trainer.{name}"
    if name == "profiler" and value is not None and value not in PROFILERS:
        reason = f"allowed is one of {', '.join(PROFILERS)}, or null"
        yield Problem(key, value, reason=reason, nearest=nearest(str(value), PROFILERS))
        return
    if name == "accumulate_grad_batches" and not (type(value) is int and value >= 1):
        yield Problem(key, value, reason="allowed is a whole number at least 1")
        return
    trainer = imported(TRAINER)
    hint = get_type_hints(trainer.__init__)[name]
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        needs_object = ("is_instance_of", "needs_python_object")
        said = [e["msg"] for e in error.errors() if e["type"] not in needs_object]
        if said:
            reason = "; ".join(
                dict.fromkeys(text.removeprefix("Input should be ") for text in said)
            )
            yield Problem(key, value, reason=f"allowed is {reason}")
            return
    except PydanticUserError:
        pass  # a type that is left to the constructor
    if name in ("deterministic", "benchmark"):
        return  # they would be set for the whole process
    dry = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    dry |= {"enable_progress_bar": False, "enable_model_summary": False, name: value}
    made = building_problem(trainer, dry, key="trainer")
    if isinstance(made, Problem):
        yield Problem(key, value, reason=made.reason)

"""`callbacks`: Lightning's and anybody's, by `_target_`; what a run can't bear of them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tritter.config.folders import body_of, option_files
from tritter.config.rules import appends_experts
from tritter.config.schema import (
    LoggerConfig,
    ModelConfig,
    RunConfig,
    WandbConfig,
)
from tritter.config.selection import Reader
from tritter.errors import Problem, RequestError, nearest
from tritter.targets import (
    TARGET,
    Component,
    argument_problems,
    building_problem,
    dotted,
    resolve,
)
from tritter.training.options import callbacks_of

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

"""The sections `training` and `trainer` of a run: records and validation.

Requests are validated without importing torch or Lightning, as far as possible.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from tritter.checkpoints import Lineage
from tritter.core.expansions import target_model
from tritter.core.families import Model
from tritter.errors import Problem, TritterError, nearest
from tritter.launched import Launch
from tritter.limits import MAX_COUNT, NO_EPOCHS, parse_count
from tritter.options import (
    PARSED_COUNT,
    Count,
    RunRequest,
    WholeNumber,
    field_keys,
    leaves,
    nearest_multiples,
    options,
)
from tritter.targets import (
    TARGET,
    Component,
    building_problem,
    dotted,
    import_object,
    parameters_of,
)
from tritter.training.optimizer import Schedule

_TRAINER = "lightning.pytorch.Trainer"
_PROFILERS = ("simple", "advanced", "pytorch")
# Options that do not affect the weights, so that a resumed run may change them
_WITHOUT_EFFECT = ("profiler", "enable_model_summary", "detect_anomaly", "enable_autolog_hparams")
_ENDS = "set training.max_steps and pretraining.max_steps"
_STOPS = "a run that is stopped by a signal or a callback always finishes its step"
_DATA = "Tritter distributes the batches and saves its position in the data"
_EVALUATION = "Tritter runs the validation, always on the same data"
_FOLDER = "all files are in the run folder; set hydra.run.dir"
_SHARDED_OPTIMIZERS = ("AdamW", "Adam", "NAdam", "SGD")  # elementwise
_SHARDED_PRECISIONS = ("32-true", "bf16-mixed")  # the tested ones
# Options of callbacks and methods, by the names that Tritter, Lightning and most callbacks use
_IS_PERIOD = re.compile(r"(every|refresh|interval|period).*step|steps?_(between|per)")
_IS_START = re.compile(r"(start|begin|after|delay|from).*step|step.*(start|begin)")
_REFUSED_CALLBACKS = {
    "Timer": "it depends on wall time, which a resumed run could not reproduce; set "
    "training.max_steps",
    "GradientAccumulationScheduler": "it depends on epochs, which are not supported; set "
    "trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it depends on epochs, which are not supported; use callbacks=ema",
    "BatchSizeFinder": "it runs trial steps, which a resumed run could not reproduce; set "
    "data.batch_size",
    "LearningRateFinder": "it runs trial steps, which a resumed run could not reproduce; set "
    "training.learning_rate",
}
_METRICS = (
    *("train/loss", "train/learning_rate", "train/gradient_norm"),
    *("performance/tokens_per_second", "performance/steps_per_second"),
    *("performance/step_seconds", "performance/flops", "performance/peak_memory_bytes"),
)
_EVALUATED = ("loss", "perplexity", "accuracy")
_OF_ROUTERS = (
    *("routing/auxiliary_loss", "routing/z_loss", "routing/entropy"),
    *("routing/max_load", "routing/dropped_fraction"),
)
_OF_EXPERTS = (
    "experts/number",
    "experts/trainable_share",
    "experts/routing_entropy",
    "experts/dropped",
    "experts/novelty",
)
_TRAININGS = ("pretraining", "training")
STEPS, TOKENS = "max_steps", "max_tokens"
EVALUATIONS = 10  # validations per run, after the one before the first step
PRESET_RATE = 3e-3
_CHECKPOINT_RATE = 1e-5
# Models of at least this size were pretrained with a lower learning rate of Adam than this
_LARGE, _HIGH = 10_000_000, 1e-3
# Upper bound of the parameters → initial learning rate, as in docs/how-to/grow_a_checkpoint.md
_STARTS = ((1_000_000_000, "1e-4"), (None, "2e-5"))
_SAVED = "the state to resume from is always saved; set trainer.save_every_n_steps, and use "
_SAVED += "callbacks=model_checkpoint for further checkpoints"
_REFUSED = {
    "max_epochs": NO_EPOCHS,
    "min_epochs": NO_EPOCHS,
    "max_time": f"a resumed run could not reproduce it; {_ENDS}",
    "max_steps": f"each training run has its own; {_ENDS}",
    "min_steps": _STOPS,
    "fast_dev_run": f"it saves nothing and disables callbacks; {_ENDS}",
    "overfit_batches": f"{_DATA}; use a smaller dataset in data.new",
    "limit_train_batches": f"{_DATA}; {_ENDS}",
    "plugins": "Tritter writes checkpoints with its own plugin, without pickle",
    "num_nodes": "torchrun and srun set it; without them, a run is on one machine",
    "callbacks": "callbacks are a config group; use callbacks=NAME",
    "logger": "loggers are a config group; use logger=NAME",
    "enable_checkpointing": _SAVED,
    "default_root_dir": _FOLDER,
    "enable_progress_bar": "Tritter has its own progress bar; set trainer.progress",
    "use_distributed_sampler": _DATA,
    "reload_dataloaders_every_n_epochs": _DATA,
    "num_sanity_val_steps": _EVALUATION,
    "inference_mode": "tensors that a model caches in validation may later need a gradient",
    "limit_val_batches": _EVALUATION,
    "val_check_interval": _EVALUATION,
    "check_val_every_n_epoch": _EVALUATION,
    "barebones": "it disables callbacks, metrics and saved states",
    "model_registry": "runs do not upload models",
}


@options
class TrainingConfig:
    """A training run of the base (`pretraining`) or of the grown model (`training`).

    Args:
        learning_rate: Peak learning rate.
        warmup_ratio: Fraction of the steps with warm-up.
        max_steps: Number of optimizer steps; computed from `max_tokens` if that is set.
        schedule: Shape of the learning-rate schedule.
        decay_ratio: Fraction of the steps with decay, for `wsd`.
        minimum_ratio: Final learning rate relative to the peak.
        max_tokens: Number of tokens, as an alternative to `max_steps`.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    max_steps: Count
    schedule: Literal["constant", "cosine", "wsd", "rewarm"]
    decay_ratio: Annotated[float, Field(gt=0, le=1)]
    minimum_ratio: Annotated[float, Field(ge=0, le=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), PARSED_COUNT] | None = None

    def rate_schedule(self, *, start_rate: float = 0.0) -> Schedule:
        """Return the learning rates of the steps.

        Args:
            start_rate: Final learning rate of the previous training run.
        """
        return Schedule(
            learning_rate=self.learning_rate,
            max_steps=self.max_steps,
            warmup_ratio=self.warmup_ratio,
            shape=self.schedule,
            decay_ratio=self.decay_ratio,
            minimum_ratio=self.minimum_ratio,
            start_rate=start_rate,
        )


@options
class TrainerValues:
    """The keys that every option of `trainer` sets.

    Args:
        accelerator: Lightning accelerator.
        devices: Number of devices.
        strategy: `auto` for one process; `ddp` or `fsdp` for one process per device, with
            replicated or sharded weights.
        precision: Lightning precision.
        gradient_clip_val: Maximum gradient norm; None: no clipping.
        log_every_n_steps: Steps between logged rows.
        max_non_finite_steps: Maximum number of consecutive skipped steps.
        save_every_n_steps: Steps between saved states to resume from; 0: none.
        progress: Progress bar: `on`, `off`, or `auto` (only on a terminal).
        check_memory: Whether to refuse a run that does not fit into memory.
        activation_checkpointing: Whether layers recompute activations in the backward pass.
        compile: Whether training steps use torch.compile.
    """

    accelerator: Literal["cpu", "gpu", "mps", "auto"]
    devices: Count
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"]
    gradient_clip_val: Annotated[float, Field(gt=0)] | None
    log_every_n_steps: Count
    max_non_finite_steps: WholeNumber
    save_every_n_steps: WholeNumber
    progress: Literal["auto", "on", "off"]
    check_memory: bool
    activation_checkpointing: bool
    compile: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings(TrainerValues):
    """Settings of Lightning's Trainer.

    Args:
        device_index: Index of a single device other than the first.
        seed: Seed for the randomness of layers, such as dropout; None: the current state of torch.
        arguments: Further arguments of the Trainer, already validated.
    """

    device_index: int | None = None
    seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_workers(self) -> bool:
        """Whether a fit runs in worker processes."""
        return self.strategy in ("ddp", "fsdp")

    @property
    def accumulate_grad_batches(self) -> int:
        """Number of batches per optimizer step."""
        return int(self.arguments.get("accumulate_grad_batches", 1))

    def effective_arguments(self) -> dict[str, Any]:
        """Return the further arguments that affect the trained weights."""
        return {n: value for n, value in self.arguments.items() if n not in _WITHOUT_EFFECT}


def _trainer_parameters() -> tuple[str, ...]:
    """Return the arguments of Lightning's Trainer, read from its source without importing it."""
    return tuple(parameters_of("lightning.pytorch.trainer.trainer.Trainer"))


def further_trainer_keys() -> tuple[str, ...]:
    """Return the keys of `trainer` for the arguments of Lightning's Trainer that a run may set."""
    return tuple(f"trainer.{name}" for name in _trainer_parameters() if name not in _REFUSED)


def trainer_arguments(raw: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return the further arguments of Lightning's Trainer in a section `trainer`.

    Args:
        raw: The section as composed.
        problems: Receives the problems.
    """
    own = field_keys(TrainerValues, "")
    names = () if set(raw) <= set(own) else _trainer_parameters()
    further = {name: raw[name] for name in raw if name in names and name not in own}
    for name, value in further.items():
        problems += _argument_problems(name, value)
    return further


def _argument_problems(name: str, value: object) -> Iterator[Problem]:
    """Yield the problems of one argument of Lightning's Trainer."""
    key = f"trainer.{name}"
    if name in _REFUSED:
        yield Problem(key, value, reason=_REFUSED[name])
        return
    if name == "profiler" and value is not None and value not in _PROFILERS:
        reason = f"must be one of {', '.join(_PROFILERS)}, or null"
        yield Problem(key, value, reason=reason, nearest=nearest(str(value), _PROFILERS))
        return
    if name == "accumulate_grad_batches" and not (type(value) is int and value >= 1):
        yield Problem(key, value, reason="allowed are integers of at least 1")
        return
    trainer = import_object(_TRAINER)
    hint = get_type_hints(trainer.__init__)[name]
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        needs_object = ("is_instance_of", "needs_python_object")
        messages = [e["msg"] for e in error.errors() if e["type"] not in needs_object]
        if messages:
            reason = "; ".join(
                dict.fromkeys(text.removeprefix("Input should be ") for text in messages)
            )
            yield Problem(key, value, reason=f"must be {reason}")
            return
    except PydanticUserError:
        pass  # the constructor checks this type
    if name in ("deterministic", "benchmark"):
        return  # the constructor would set them for the whole process
    dry = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    dry |= {"enable_progress_bar": False, "enable_model_summary": False, name: value}
    made = building_problem(trainer, dry, key="trainer")
    if isinstance(made, Problem):
        yield Problem(key, value, reason=made.reason)


def _trainer_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield unsupported combinations of trainer options."""
    trainer = config.trainer
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        reason = "float16 needs a GPU; on trainer=cpu use bf16-mixed or 32-true"
        yield Problem("trainer.precision", "16-mixed", reason=reason)
    if trainer.precision == "16-mixed" and config.optimizer.arguments.get("fused"):
        reason = "fused steps take scaled gradients, which can't be clipped or penalised; use false"
        yield Problem("optimizer.fused", True, reason=reason)
    if trainer.accelerator == "mps" and trainer.strategy != "auto":
        reason = "a machine has only one Apple GPU; use trainer=mps, which trains in one process"
        yield Problem("trainer.strategy", trainer.strategy, reason=reason)
    if trainer.accelerator == "mps" and trainer.precision == "64-true":
        reason = "Apple's GPUs have no float64; on trainer=mps use 32-true or bf16-mixed"
        yield Problem("trainer.precision", trainer.precision, reason=reason)
    if trainer.compile and config.experts is not None:
        reason = (
            "adapters process different tokens in each batch, which would compile again every "
            "time; with experts use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)


def _device_problems(config: RunRequest) -> Iterator[Problem]:
    trainer, batch_size, launch = config.trainer, config.data.batch_size, Launch.of()
    processes = trainer.devices if launch is None else trainer.devices * launch.num_nodes
    if launch is not None and (trainer.strategy == "auto" or trainer.devices != launch.local_count):
        reason = (
            f"{launch.program} started {launch.local_count} processes on each machine; use "
            f"trainer=ddp or trainer=fsdp with trainer.devices={launch.local_count}"
        )
        name = "strategy" if trainer.strategy == "auto" else "devices"
        yield Problem(f"trainer.{name}", getattr(trainer, name), reason=reason)
        return
    if trainer.strategy == "auto":
        if trainer.devices > 1:
            reason = "several devices require trainer=ddp or trainer=fsdp; otherwise it must be 1"
            yield Problem("trainer.devices", trainer.devices, reason=reason)
        return
    if processes == 1:
        reason = (
            f"trainer={trainer.strategy} requires at least 2; for one device use trainer=cpu or "
            "trainer=gpu"
        )
        yield Problem("trainer.devices", 1, reason=reason)
    if trainer.accelerator == "auto":
        reason = f"trainer={trainer.strategy} requires a choice; allowed are cpu and gpu"
        yield Problem("trainer.accelerator", "auto", reason=reason)
    if batch_size % processes:
        names = "trainer.devices" if processes == trainer.devices else "the number of processes"
        reason = (
            f"it must be a multiple of {names} = {processes}; nearest: "
            f"{nearest_multiples(batch_size, processes)}"
        )
        yield Problem("data.batch_size", batch_size, reason=reason)


def _schedule_problems(config: RunRequest, prefix: str) -> Iterator[Problem]:
    """Yield problems of the schedule of `pretraining` or `training`, the prefix."""
    training: TrainingConfig = getattr(config, prefix)
    if prefix == "pretraining" and training.schedule == "rewarm":
        reason = (
            "a new base has no earlier learning rate to warm up from; allowed are constant, "
            "cosine and wsd"
        )
        yield Problem(f"{prefix}.schedule", training.schedule, reason=reason)
    if training.schedule == "wsd" and training.warmup_ratio + training.decay_ratio > 1:
        reason = (
            f"with {prefix}.warmup_ratio = {training.warmup_ratio} the sum exceeds 1; must be "
            f"at most {1 - training.warmup_ratio:g}"
        )
        yield Problem(f"{prefix}.decay_ratio", training.decay_ratio, reason=reason)


def trainer_start_problems(config: RunRequest, source: Model) -> Iterator[Problem]:
    """Yield the reasons why the trained model cannot be compiled or sharded.

    Args:
        config: Options of the run.
        source: Model that the run starts from.
    """
    is_sharded = config.trainer.strategy == "fsdp"
    if not (config.trainer.compile or is_sharded):
        return
    grown = target_model(source, config.expansion)
    if not grown.family.has_experts:
        return
    if config.trainer.compile:
        reason = (
            f"{grown.model_type} has experts with a different number of tokens in each batch, "
            "which would compile again every time; use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)
    if is_sharded:
        reason = (
            f"{grown.model_type} has experts, and monitoring their routers requires whole "
            "weights; use trainer=ddp"
        )
        yield Problem("trainer.strategy", "fsdp", reason=reason)


def _sharding_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield options that require whole weights, with trainer=fsdp."""
    if config.trainer.strategy != "fsdp":
        return
    if config.trainer.precision not in _SHARDED_PRECISIONS:
        reason = f"with trainer=fsdp allowed are {' and '.join(_SHARDED_PRECISIONS)}"
        yield Problem("trainer.precision", config.trainer.precision, reason=reason)
    if config.trainer.compile:
        reason = "gathering a layer breaks the graph; remove trainer.compile or use trainer=ddp"
        yield Problem("trainer.compile", True, reason=reason)
    for key, value, reason in _of_whole_weights(config):
        yield Problem(key, value, reason=f"{reason}; use trainer=ddp, which replicates the weights")


def _of_whole_weights(config: RunRequest) -> Iterator[tuple[str, object, str]]:
    """Yield key, value and reason of options that require whole weights."""
    name = config.optimizer.target.rpartition(".")[2]
    if config.optimizer.target.partition(".")[0] != "torch" or name not in _SHARDED_OPTIMIZERS:
        reason = (
            f"{name} may not be elementwise, and each process only has a shard of a parameter; "
            f"allowed are {', '.join(_SHARDED_OPTIMIZERS)}"
        )
        yield "optimizer", name, reason
    for one in callbacks_of("WeightAveraging", config):
        reason = "weight averaging requires whole weights, and each process only has a shard"
        yield f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason
    for group, one in config.methods():
        if one.kind.whole_weights:
            yield group, one.kind.__name__, one.kind.whole_weights


def callbacks_of(name: str, config: RunRequest) -> list[Component]:
    """Return the callbacks of a class of Lightning, including subclasses."""
    return [one for one in config.callbacks if name in (k.__name__ for k in one.kind.__mro__)]


def compiler_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield a problem if this machine cannot compile; checked for runs, not for previews."""
    if not config.trainer.compile:
        return
    usual = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        reason = (
            f"torch.compile requires a C++ compiler, and this machine has no {compiler}; install "
            f"{usual}, set CXX to another compiler, or use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)


def _metric_names(config: RunRequest) -> tuple[str, ...]:
    """Return the metrics that a callback can monitor, except those logged by callbacks."""
    domains = config.text.domains if config.evaluation.every_n_steps else ()
    is_dense = config.model.model_type != "hf" and not any(
        spec.name == "moe" for spec in config.expansion
    )
    return (
        *_METRICS,
        *(("performance/padding_fraction",) if config.data.packing == "documents" else ()),
        *(() if is_dense else _OF_ROUTERS),
        *(("routing/old_divergence",) if config.moe_routing.hold_old else ()),
        *(f"eval/{domain}/{name}" for name in _EVALUATED for domain in domains),
        *(f"forgetting/{one.name}/loss" for one in config.forgetting if one.kind.is_logged()),
        *(_OF_EXPERTS if config.experts is not None and config.experts.kind.is_dynamic else ()),
    )


def _monitor_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield callbacks that monitor a metric that is never logged.

    Nothing is checked if there are third-party callbacks, which can log any metric.
    """
    is_custom = any(not dotted(one.kind).startswith("lightning.") for one in config.callbacks)
    if is_custom or any(_early_stopping_problems(config)):
        return
    known = _metric_names(config)
    checkpoints = callbacks_of("ModelCheckpoint", config)
    for one in (*callbacks_of("EarlyStopping", config), *checkpoints):
        monitor = one.options.get("monitor")
        allowed = (*known, "step", "epoch") if one in checkpoints else known
        # Before the first step of a run there are only validation metrics
        is_too_early = one.options.get("strict", True) and not str(monitor).startswith("eval/")
        if monitor is not None and monitor not in allowed:
            reason = f"this metric is not logged; allowed are {', '.join(known)}"
            key, near = f"callbacks.{one.name}.monitor", nearest(monitor, allowed)
            yield Problem(key, monitor, reason=reason, nearest=near)
        elif str(monitor).startswith("eval/") and (mode := one.options.get("mode", "min")) != (
            wanted := "max" if str(monitor).endswith("/accuracy") else "min"
        ):
            reason = f"it selects the worst {monitor}; set mode={wanted}"
            yield Problem(f"callbacks.{one.name}.mode", mode, reason=reason)
        elif one not in checkpoints and is_too_early:
            reason = (
                f"the first check is before the first step, when there is no {monitor} yet; set "
                "strict=false"
            )
            yield Problem(f"callbacks.{one.name}.strict", True, reason=reason)


def _publish_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield the reasons why the best weights of a run can't be published."""
    if config.pipeline.publish != "best":
        return
    key, value = "pipeline.publish", "best"
    checkpoints = callbacks_of("ModelCheckpoint", config)
    if len(checkpoints) != 1:
        found = f"there are {len(checkpoints)}" if checkpoints else "there is none"
        reason = f"it needs one ModelCheckpoint, and {found}; add callbacks=model_checkpoint"
        yield Problem(key, value, reason=reason)
        return
    (one,) = checkpoints
    options, name = one.options, f"callbacks.{one.name}"
    every, monitor = options.get("every_n_train_steps"), options.get("monitor")
    if monitor is None:
        yield Problem(f"{name}.monitor", None, reason=f"{key} = best needs a metric")
    if options.get("save_top_k", 1) == 0:
        yield Problem(f"{name}.save_top_k", 0, reason=f"{key} = best needs the best checkpoint")
    if options.get("save_weights_only"):
        reason = f"{key} = best needs the states of methods"
        yield Problem(f"{name}.save_weights_only", True, reason=reason)
    interval = config.evaluation.every_n_steps
    if every and interval and str(monitor).startswith("eval/") and every % interval:
        reason = f"{monitor} is measured every {interval} steps; must be a multiple of it"
        yield Problem(f"{name}.every_n_train_steps", every, reason=reason)
    refused = (
        (
            "moe_routing.bias_update_rate",
            config.moe_routing.bias_update_rate,
            "the metric is measured with the selection bias, which a checkpoint cannot contain",
        ),
        ("trainer.strategy", config.trainer.strategy == "fsdp", "the weights are sharded"),
    )
    for other, is_set, reason in refused:
        if is_set:
            yield Problem(key, value, reason=f"not together with {other}: {reason}")
    for group, one in config.methods():
        if reason := one.kind.last_weights:
            yield Problem(key, value, reason=f"not together with {group}: {reason}")


def _early_stopping_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield callbacks that need validation in a run without it."""
    reason = "it only checks after validation, and evaluation.every_n_steps = 0 disables that"
    for one in () if config.evaluation.every_n_steps else callbacks_of("EarlyStopping", config):
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason=reason)


def callback_problems(
    key: str, made: Any, body: Mapping[str, Any], owners: dict[str, str]
) -> Iterator[Problem]:
    """Yield problems of a callback in a run.

    Args:
        key: Dotted key of the callback in the config.
        made: Instance of the callback.
        body: Its class and arguments.
        owners: Key of a saved state → dotted key of its callback; updated with this one.
    """
    names = [kind.__name__ for kind in type(made).__mro__]
    for name in names:
        if name in _REFUSED_CALLBACKS:
            yield Problem(f"{key}.{TARGET}", body[TARGET], reason=_REFUSED_CALLBACKS[name])
    if "ModelCheckpoint" in names:
        folder = body.get("dirpath")
        if folder is not None and (Path(folder).is_absolute() or ".." in Path(folder).parts):
            reason = "it must be relative to the folder of the training run, such as checkpoints"
            yield Problem(f"{key}.dirpath", folder, reason=reason)
        if (interval := body.get("train_time_interval")) is not None:
            reason = "it depends on wall time; set every_n_train_steps"
            yield Problem(f"{key}.train_time_interval", interval, reason=reason)
    owner = owners.setdefault(made.state_key, key)
    # The base of all callbacks has no state
    base: Any = next(kind for kind in type(made).__mro__ if kind.__name__ == "Callback")
    if owner != key and type(made).state_dict is not base.state_dict:
        reason = (
            f"its saved state would collide with that of {owner} ({made.state_key}); set "
            "different `monitor` values or remove one"
        )
        yield Problem(key, body[TARGET], reason=reason)


def _idle_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield options of callbacks and forgetting methods that name a step that is never reached.

    Callbacks and methods from elsewhere are covered by the names of their options.
    """
    steps = config.training.max_steps
    for group, components in (("callbacks", config.callbacks), ("forgetting", config.forgetting)):
        for one in components:
            for key, value in leaves(_chosen(one), f"{group}.{one.name}").items():
                if not isinstance(value, int) or isinstance(value, bool):
                    continue
                name = key.rpartition(".")[2]
                if _IS_PERIOD.search(name) and value > steps:
                    reason = f"its period is longer than the run, training.max_steps = {steps}"
                elif _IS_START.search(name) and value >= steps:
                    reason = f"it begins after the last step, training.max_steps = {steps}"
                else:
                    continue
                yield Problem(key, value, reason=f"{reason}; use fewer, or remove {one.name}")
    yield from _patience_problems(config)


def _chosen(one: Component) -> Mapping[str, Any]:
    """Return the options of a component, without defaults of a method: they suit any run."""
    if isinstance(one.options, Mapping):
        return one.options
    default = {
        name: field.default for name, field in type(one.options).__dataclass_fields__.items()
    }
    return {key: value for key, value in one.plain().items() if value != default.get(key)}


def _patience_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield callbacks whose patience is longer than the run has validations."""
    if not (period := config.evaluation.every_n_steps):
        return
    count = -(-config.training.max_steps // period)
    for one in callbacks_of("EarlyStopping", config):
        patience = one.options.get("patience", 3)
        if isinstance(patience, int) and patience >= count:
            reason = (
                f"the run is validated {count} times after its start, so it can't stop early; "
                f"use fewer, or a smaller evaluation.every_n_steps than {period}"
            )
            yield Problem(f"callbacks.{one.name}.patience", patience, reason=reason)


# Validation rules of these sections
RULES = (
    _trainer_problems,
    _device_problems,
    partial(_schedule_problems, prefix="pretraining"),
    partial(_schedule_problems, prefix="training"),
    _sharding_problems,
    _early_stopping_problems,
    _monitor_problems,
    _publish_problems,
    _idle_problems,
)


def resolve_training_limits(
    raw: Mapping[str, Any], origin: Callable[[str], str | None]
) -> dict[str, Any]:
    """Return a config without the less specific one of `max_steps` and `max_tokens`.

    A typed value overrides one from a file. A value from another file overrides one from the
    option of `training` itself. If both are equally specific, both are kept.

    Args:
        raw: The composed config.
        origin: Dotted key → file that sets it, or None if it was typed.
    """
    result = dict(raw)
    for group in _TRAININGS:
        body = raw.get(group)
        if not isinstance(body, Mapping) or body.get(STEPS) is None or body.get(TOKENS) is None:
            continue
        steps, tokens = (_rank(origin(f"{group}.{key}"), group) for key in (STEPS, TOKENS))
        if steps != tokens:
            result[group] = {**body, STEPS if steps < tokens else TOKENS: None}
    return result


def with_steps(
    bodies: Mapping[str, Mapping[str, Any]], problems: list[Problem]
) -> dict[str, Mapping[str, Any]]:
    """Compute steps from other keys.

    `max_tokens` sets `max_steps`, rounded down; the two keys exclude each other.
    `evaluation.every_n_steps = null` is a tenth of the training steps, until the domains are known.

    Args:
        bodies: Config group → body.
        problems: Receives the problems.

    Returns:
        The bodies with computed steps.
    """
    result = dict(bodies)
    for group in _TRAININGS:
        body = bodies.get(group, {})
        if (requested := body.get(TOKENS)) is None:
            continue
        data, trainer = bodies.get("data", {}), bodies.get("trainer", {})
        factors = [
            positive_count(data.get("batch_size")),
            positive_count(data.get("sequence_length")),
            positive_count(trainer.get("accumulate_grad_batches", 1)),
        ]
        known = [factor for factor in factors if factor is not None]
        of_step = math.prod(known) if len(known) == len(factors) else None
        tokens, reason, steps = positive_count(requested), None, 1
        if body.get(STEPS) is not None:
            reason = (
                f"{group}.{STEPS} = {body[STEPS]} also sets the length of the run; set one of "
                "them to null"
            )
        elif tokens is not None and of_step is not None:  # otherwise reported by their own checks
            steps = max(1, tokens // of_step)
            if tokens < of_step:
                reason = f"one step has {of_step:,} tokens; must be at least that number"
        if reason is not None:
            problems.append(Problem(f"{group}.{TOKENS}", requested, reason=reason))
        else:
            result[group] = {**body, STEPS: steps}
    evaluation, key = bodies.get("evaluation", {}), "every_n_steps"
    if evaluation.get(key, 0) is None:
        steps = (
            positive_count(result.get("training", {}).get(STEPS)) or 1
        )  # an invalid value is reported elsewhere
        result["evaluation"] = {**evaluation, key: max(1, steps // EVALUATIONS)}
    return result


def _rank(file: str | None, group: str) -> int:
    """Return the precedence of a value: 0 from its option, 1 from another file, 2 typed."""
    if file is None:
        return 2
    return 0 if file.startswith(f"{group}/") else 1


def positive_count(value: object) -> int | None:
    """Return a positive integer, which may be written as 2M, or None."""
    found = parse_count(value) if isinstance(value, str) else value
    is_count = isinstance(found, int) and not isinstance(found, bool) and found > 0
    return found if is_count else None  # type: ignore[return-value]


def default_rate(model: Any) -> tuple[float, str]:
    """Return the value of `training.learning_rate = null`, and its explanation.

    The record of a hub checkpoint is not read: a resumed run could see another revision.

    Args:
        model: The `model` section of a config.
    """
    if model.model_type != "hf":
        return PRESET_RATE, "the default for a base that the run trains from scratch"
    folder = Path(model.path)
    if not folder.is_dir():
        return _CHECKPOINT_RATE, "the default for a checkpoint from the hub"
    with suppress(TritterError):  # a damaged record is reported elsewhere
        lineage = Lineage.read(folder)
        rate = (lineage.training if lineage else {}).get("learning_rate")
        if isinstance(rate, float) and 0 < rate < math.inf:
            return rate, "the peak of the newest training run that the checkpoint records"
    return _CHECKPOINT_RATE, "the default for a checkpoint that records no training run"


def rate_notes(config: RunRequest, source: Model) -> tuple[str, ...]:
    """Return warnings about the learning rate.

    It may be too high for a large checkpoint, a fallback may raise it, or its schedule may ignore
    a key.

    Args:
        config: Options of the run.
        source: Model that the run starts from.
    """
    rate, parameters = config.training.learning_rate, source.num_parameters
    notes: list[str] = []
    for number, fallback in enumerate(config.fallbacks, start=1):
        if (higher := fallback.training.learning_rate) > rate:
            notes.append(
                f"gate.ladder = {config.gate.ladder}: fallback {number} raises "
                f"training.learning_rate from {rate:g} to {higher:g}; set "
                f"gate.max_attempts={number} to skip it."
            )
    is_adam, is_given = "adam" in config.optimizer.target.lower(), config.model.model_type == "hf"
    unset = Schedule(learning_rate=1.0, max_steps=1)
    for prefix in _TRAININGS[is_given:]:
        part: TrainingConfig = getattr(config, prefix)
        for name, readers in (("decay_ratio", "wsd"), ("minimum_ratio", "cosine wsd rewarm")):
            value = getattr(part, name)
            if part.schedule not in readers and value != getattr(unset, name):
                notes.append(f"{prefix}.{name} = {value:g}: schedule {part.schedule} ignores it.")
    if is_given and is_adam and config.experts is None and rate >= _HIGH and parameters >= _LARGE:
        start = next(text for limit, text in _STARTS if limit is None or parameters < limit)
        notes.append(
            f"training.learning_rate = {rate:g} is a learning rate for small bases; a pretrained "
            f"model of {parameters / 1e6:,.0f} M parameters forgets with it. Start with "
            f"training.learning_rate={start}."
        )
    return tuple(notes)

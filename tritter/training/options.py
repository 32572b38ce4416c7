"""The sections `training` and `trainer` of a run: their records, and what does not go together.

Nothing here needs torch or Lightning: a request is judged before they are imported.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from tritter.checkpoints import read_lineage
from tritter.checkpoints.record import training_record
from tritter.core.expansions import target_config
from tritter.core.families import Config, count_parameters, family_of
from tritter.errors import Problem, TritterError, nearest
from tritter.limits import MAX_COUNT, NO_EPOCHS, parse_count
from tritter.options import IN_WORDS, Count, RunRequest, WholeNumber, nearest_multiples, options
from tritter.targets import (
    TARGET,
    Component,
    building_problem,
    dotted,
    imported,
    parameters_of,
)


@options
class TrainingConfig:
    """One training: of the base (`pretraining`) or of the grown model (`training`).

    Args:
        max_steps: of the optimizer; where `max_tokens` is given, what follows from it.
        max_tokens: None: not what was given.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    max_steps: Count
    schedule: Literal["constant", "cosine", "wsd", "rewarm"]
    decay_ratio: Annotated[float, Field(gt=0, le=1)]
    minimum_ratio: Annotated[float, Field(ge=0, le=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT), IN_WORDS] | None = None


@options
class TrainerValues:
    """The keys that every option of `trainer` states.

    Args:
        devices: how many.
        strategy: `auto`, one process; or one for each of `devices`, by `ddp` with whole weights, by
            `fsdp` with parts of them.
        max_non_finite_steps: refused steps in a row that are borne.
        save_every_n_steps: steps between two states that a killed run goes on from; 0: none.
        check_memory: a run that can't fit is refused.
        activation_checkpointing: layers compute again what the backward pass needs of them.
        compile: the forward and backward pass of a step go through torch.compile.
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
    """What Lightning's Trainer is given.

    Args:
        device_index: of the one device, where it is not the first.
        seed: of what layers draw in training, as for dropout; None: as torch's generators stand.
        arguments: further ones of Lightning's Trainer, checked before.
    """

    device_index: int | None = None
    seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_workers(self) -> bool:
        """Whether a fit runs in processes of its own."""
        return self.strategy in ("ddp", "fsdp")

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches whose gradients are gathered for one step."""
        return int(self.arguments.get("accumulate_grad_batches", 1))


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


def trainer_parameters() -> tuple[str, ...]:
    """Return the arguments of Lightning's Trainer, read from its source: importing it is slow."""
    return tuple(parameters_of("lightning.pytorch.trainer.trainer.Trainer"))


def trainer_argument_problems(name: str, value: object) -> Iterator[Problem]:
    """Yield what is wrong with one of `trainer_parameters`."""
    key = f"trainer.{name}"
    if name in REFUSED:
        yield Problem(key, value, reason=REFUSED[name])
        return
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


_SHARDED_OPTIMIZERS = ("AdamW", "Adam", "NAdam", "SGD")  # entry by entry
_SHARDED_PRECISIONS = ("32-true", "bf16-mixed")  # the others are not tried


def trainer_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield what this way of computing can't do."""
    trainer = config.trainer
    if trainer.precision == "16-mixed" and trainer.accelerator == "cpu":
        reason = "float16 needs a GPU; on trainer=cpu use bf16-mixed or 32-true"
        yield Problem("trainer.precision", "16-mixed", reason=reason)
    if trainer.accelerator == "mps" and trainer.strategy != "auto":
        reason = "there is one Apple GPU in a machine; use trainer=mps, which trains in one process"
        yield Problem("trainer.strategy", trainer.strategy, reason=reason)
    if trainer.accelerator == "mps" and trainer.precision == "64-true":
        reason = "Apple's GPUs have no float64; on trainer=mps use 32-true or bf16-mixed"
        yield Problem("trainer.precision", trainer.precision, reason=reason)
    if trainer.compile and config.experts is not None:
        reason = (
            "which tokens an adapter computes is another question in each batch, and every "
            "answer would be compiled; with experts use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)


def device_problems(config: RunRequest) -> Iterator[Problem]:
    trainer, batch_size = config.trainer, config.data.batch_size
    if trainer.strategy == "auto":
        if trainer.devices > 1:
            reason = "several devices train together with trainer=ddp; else allowed is 1"
            yield Problem("trainer.devices", trainer.devices, reason=reason)
        return
    if trainer.devices == 1:
        reason = (
            f"trainer={trainer.strategy} is for 2 or more; for one device use trainer=cpu or "
            "trainer=gpu"
        )
        yield Problem("trainer.devices", 1, reason=reason)
    if trainer.accelerator == "auto":
        reason = f"trainer={trainer.strategy} has to be told which devices; allowed are cpu and gpu"
        yield Problem("trainer.accelerator", "auto", reason=reason)
    if batch_size % trainer.devices:
        reason = (
            f"each of trainer.devices = {trainer.devices} takes an equal part; nearest: "
            f"{nearest_multiples(batch_size, trainer.devices)}"
        )
        yield Problem("data.batch_size", batch_size, reason=reason)


def schedule_problems(config: RunRequest, prefix: str) -> Iterator[Problem]:
    """Yield why `pretraining` or `training`, the prefix, has no such schedule."""
    training: TrainingConfig = getattr(config, prefix)
    if prefix == "pretraining" and training.schedule == "rewarm":
        reason = "a base has no rate to warm up from again; allowed are constant, cosine and wsd"
        yield Problem(f"{prefix}.schedule", training.schedule, reason=reason)
    if training.schedule == "wsd" and training.warmup_ratio + training.decay_ratio > 1:
        reason = (
            f"with {prefix}.warmup_ratio = {training.warmup_ratio} more than all steps are spoken "
            f"for; allowed is at most {1 - training.warmup_ratio:g}"
        )
        yield Problem(f"{prefix}.decay_ratio", training.decay_ratio, reason=reason)


def trainer_start_problems(config: RunRequest, source: Config) -> Iterator[Problem]:
    """Yield why the model that is trained can't be compiled, or its weights not be shared out.

    Args:
        source: config.json of the model that the run starts from.
    """
    is_sharded = config.trainer.strategy == "fsdp"
    if not (config.trainer.compile or is_sharded):
        return
    grown = target_config(source, config.expansion)
    if not family_of(grown).has_experts:
        return
    if config.trainer.compile:
        reason = (
            f"{grown['model_type']} has experts, and how many tokens each gets is another number "
            "in each batch, every one of which would be compiled; use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)
    if is_sharded:
        reason = (
            f"{grown['model_type']} has experts, whose routers are watched and opened in whole "
            "weights; use trainer=ddp"
        )
        yield Problem("trainer.strategy", "fsdp", reason=reason)


def sharding_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield what of a run needs whole weights, of which a process of trainer=fsdp holds a part."""
    if config.trainer.strategy != "fsdp":
        return
    for key, value, reason in _of_whole_weights(config):
        yield Problem(key, value, reason=f"{reason}; with whole weights in each, use trainer=ddp")
    if config.trainer.precision not in _SHARDED_PRECISIONS:
        reason = f"with trainer=fsdp allowed are {' and '.join(_SHARDED_PRECISIONS)}"
        yield Problem("trainer.precision", config.trainer.precision, reason=reason)
    if config.trainer.compile:
        reason = "gathering a layer breaks the graph; compile, or share the weights"
        yield Problem("trainer.compile", True, reason=reason)


def _of_whole_weights(config: RunRequest) -> Iterator[tuple[str, object, str]]:
    """Yield key, value and reason of what has to see whole weights."""
    for group, chosen in (("growth", config.growth), ("experts", config.experts)):
        if chosen is not None:
            yield group, chosen.kind.__name__, chosen.kind.whole_weights
    name = config.optimizer.target.rpartition(".")[2]
    if config.optimizer.target.partition(".")[0] != "torch" or name not in _SHARDED_OPTIMIZERS:
        reason = (
            f"{name} may look at more of a parameter than one entry, and each process holds a "
            f"part; allowed are {', '.join(_SHARDED_OPTIMIZERS)}"
        )
        yield "optimizer", name, reason
    if config.optimizer.carry:
        reason = "moments follow whole weights, and each process holds a part; leave it out"
        yield "optimizer.carry", True, reason
    for one in callbacks_of("WeightAveraging", config):
        reason = "an average is of whole weights, and each process holds a part"
        yield f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason


def callbacks_of(name: str, config: RunRequest) -> list[Component]:
    """Return the callbacks whose class is one of Lightning's, or made from it."""
    return [one for one in config.callbacks if name in (k.__name__ for k in one.kind.__mro__)]


def compiler_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield that this machine can't compile; asked of what is to be run, not of what is shown."""
    if not config.trainer.compile:
        return
    usual = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        reason = (
            f"torch.compile needs a C++ compiler, and there is no {compiler} on this machine; "
            f"install {usual} or name another in CXX, or use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)


_REFUSED_CALLBACKS = {
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


def metric_names(config: RunRequest) -> tuple[str, ...]:
    """Return what a callback can monitor of a training, but for what callbacks log themselves."""
    domains = config.text.domains if config.evaluation.every_n_steps else ()
    is_dense = config.model.model_type != "hf" and not any(
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


def monitor_problems(config: RunRequest) -> Iterator[Problem]:
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


def asking_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield callbacks that wait for an evaluation where there is none."""
    reason = "it is asked when the training is evaluated, and evaluation.every_n_steps = 0"
    for one in () if config.evaluation.every_n_steps else callbacks_of("EarlyStopping", config):
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.options[TARGET], reason=reason)


def callback_problems(
    key: str, made: Any, body: Mapping[str, Any], owners: dict[str, str]
) -> Iterator[Problem]:
    """Yield what a run can't bear of a callback.

    Args:
        made: an instance of it.
        body: its class and arguments.
        owners: name of a saved state → key of the callback whose it is; gets that of this one.
    """
    names = [kind.__name__ for kind in type(made).__mro__]
    for name in names:
        if name in _REFUSED_CALLBACKS:
            yield Problem(f"{key}.{TARGET}", body[TARGET], reason=_REFUSED_CALLBACKS[name])
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


# What does not go together in these sections
RULES = (
    trainer_problems,
    device_problems,
    partial(schedule_problems, prefix="pretraining"),
    partial(schedule_problems, prefix="training"),
    sharding_problems,
    asking_problems,
    monitor_problems,
)

TRAININGS = ("pretraining", "training")
STEPS, TOKENS = "max_steps", "max_tokens"
_EVALUATIONS = 10  # of a training, after the one before its first step


def settled(raw: Mapping[str, Any], origin: Callable[[str], str | None]) -> dict[str, Any]:
    """Return a config without the less particular of `max_steps` and `max_tokens`.

    What was typed stands instead of what an option file says, and what any other file says
    instead of what the training's own option says. Of two that stand beside each other both stay.

    Args:
        origin: dotted key → the file that sets it; None: it was typed.
    """
    result = dict(raw)
    for group in TRAININGS:
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
    """Return bodies of groups with the steps that follow from other keys.

    `max_tokens` is also `max_steps`, rounded down; of the two exactly one is to be given.
    `evaluation.every_n_steps = null` is a tenth of the training.
    """
    result = dict(bodies)
    for group in TRAININGS:
        body = bodies.get(group, {})
        if (asked := body.get(TOKENS)) is None:
            continue
        data, trainer = bodies.get("data", {}), bodies.get("trainer", {})
        factors = [
            _count(data.get("batch_size")),
            _count(data.get("sequence_length")),
            _count(trainer.get("accumulate_grad_batches", 1)),
        ]
        known = [factor for factor in factors if factor is not None]
        of_step = math.prod(known) if len(known) == len(factors) else None
        tokens, reason, steps = _count(asked), None, 1
        if body.get(STEPS) is not None:
            reason = (
                f"{group}.{STEPS} = {body[STEPS]} says as well how long the training is; allowed "
                "is one of them, the other being null"
            )
        elif tokens is not None and of_step is not None:  # else it is told where they are read
            steps = max(1, tokens // of_step)
            if tokens < of_step:
                reason = f"one step takes {of_step:,} tokens; allowed is at least that"
        if reason is not None:
            problems.append(Problem(f"{group}.{TOKENS}", asked, reason=reason))
        else:
            result[group] = {**body, STEPS: steps}
    evaluation, key = bodies.get("evaluation", {}), "every_n_steps"
    if evaluation.get(key, 0) is None:
        steps = _count(result.get("training", {}).get(STEPS)) or 1  # a wrong one is reported
        result["evaluation"] = {**evaluation, key: max(1, steps // _EVALUATIONS)}
    return result


def _rank(file: str | None, group: str) -> int:
    """Return how particular to the run a value is: of its option, of another file, typed."""
    if file is None:
        return 2
    return 0 if file.startswith(f"{group}/") else 1


def _count(value: object) -> int | None:
    """Return a whole number above 0, which may be written as 2M."""
    found = parse_count(value) if isinstance(value, str) else value
    is_count = isinstance(found, int) and not isinstance(found, bool) and found > 0
    return found if is_count else None  # type: ignore[return-value]


PRESET_RATE = 3e-3
CHECKPOINT_RATE = 1e-5
# Models of this many parameters were pretrained at less than this rate of Adam's
_LARGE, _HIGH = 10_000_000, 1e-3
# Below so many parameters → a rate to begin with: the table of docs/first_checkpoint.md
_STARTS = ((1_000_000_000, "1e-4"), (None, "2e-5"))


def default_rate(model: Any) -> tuple[float, str]:
    """Return what `training.learning_rate = null` means, and why.

    The record of a hub id is not read: the rate of a resumed run would depend on what was
    downloaded since.

    Args:
        model: the section.
    """
    if model.model_type != "hf":
        return PRESET_RATE, "the default for a base that is trained here"
    folder = Path(model.path)
    if not folder.is_dir():
        return CHECKPOINT_RATE, "the default for a checkpoint from the hub"
    with suppress(TritterError):  # a damaged record is refused where its text is read
        lineage = read_lineage(folder)
        rate = training_record(lineage.training_config if lineage else {}).get("learning_rate")
        if isinstance(rate, float) and 0 < rate < math.inf:
            return rate, "the peak of the newest training run that the checkpoint records"
    return CHECKPOINT_RATE, "the default for a checkpoint that records no training run"


def rate_notes(config: RunRequest, source: Config) -> tuple[str, ...]:
    """Return warnings: a rate for small bases on a large checkpoint, a rung that raises the rate.

    Args:
        source: config of what the run starts from.
    """
    rate, parameters = config.training.learning_rate, count_parameters(source)
    raised = tuple(
        f"gate.ladder = {config.gate.ladder}: rung {number} raises training.learning_rate from "
        f"{rate:g} to {rung.training.learning_rate:g}; gate.max_attempts={number} leaves it out."
        for number, rung in enumerate(config.fallbacks, start=1)
        if rung.training.learning_rate > rate
    )
    is_adam = "adam" in config.optimizer.target.lower()
    is_given = config.model.model_type == "hf"
    if not (is_given and is_adam and config.experts is None) or rate < _HIGH or parameters < _LARGE:
        return raised
    start = next(text for limit, text in _STARTS if limit is None or parameters < limit)
    return (
        *raised,
        f"training.learning_rate = {rate:g} is a rate for small bases, at which a pretrained model "
        f"of {parameters / 1e6:,.0f} M parameters forgets; training.learning_rate={start} is a "
        "start.",
    )

"""`callbacks`: Lightning's and anybody's, by `_target_`; what a run can't bear of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tritter.config.named import built_for_trial
from tritter.config.reading import Reader
from tritter.config.rules.freezing import freezing
from tritter.config.rules.moe import appends_experts
from tritter.config.schema import ModelConfig, RunConfig
from tritter.errors import Problem, nearest
from tritter.targets import TARGET, NamedTarget, imported

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
) -> tuple[NamedTarget, ...]:
    """Return the callbacks of a run, in the order in which they were asked for."""
    owners: dict[str, str] = {}
    for name, body in bodies.items():
        key = f"callbacks.{name}"
        if (kind := classes.get(key)) is not None:
            made, problems = built_for_trial(key, kind, body)
            reader.problems += problems or _judged(key, made, body, owners)
    return tuple(NamedTarget(name=name, body=body) for name, body in bodies.items())


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
        *(f"eval/{domain.name}/loss" for domain in domains),
        *(f"forgetting/{one.name}/loss" for one in config.forgetting if one.kind.is_logged()),
        *(_OF_EXPERTS if config.experts is not None and config.experts.is_dynamic else ()),
    )


def monitor_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield who would wait for a metric that never comes; strangers may log what they like."""
    is_strange = any(not one.body[TARGET].startswith("lightning.") for one in config.callbacks)
    if is_strange or any(asking_problems(config)):
        return
    known = metric_names(config)
    checkpoints = _of("ModelCheckpoint", config)
    for one in (*_of("EarlyStopping", config), *checkpoints):
        monitor = one.body.get("monitor")
        allowed = (*known, "step", "epoch") if one in checkpoints else known
        if monitor is not None and monitor not in allowed:
            reason = f"no training logs it; it is one of {', '.join(known)}"
            key, near = f"callbacks.{one.name}.monitor", nearest(monitor, allowed)
            yield Problem(key, monitor, reason=reason, nearest=near)
        elif one not in checkpoints and _is_strict_too_early(one.body):
            reason = f"before the first step, when it is first asked, there is no {monitor} yet"
            yield Problem(f"callbacks.{one.name}.strict", True, reason=reason)


def _is_strict_too_early(body: Mapping[str, Any]) -> bool:
    """Return whether it insists on a metric which no training has before its first step."""
    return body.get("strict", True) and not str(body.get("monitor")).startswith("eval/")


def asking_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield whom nobody would ask."""
    reason = "it is asked when the training is evaluated, and evaluation.every_n_steps = 0"
    for one in () if config.evaluation.every_n_steps else _of("EarlyStopping", config):
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.body[TARGET], reason=reason)


def _of(name: str, config: RunConfig) -> list[NamedTarget]:
    """Return the callbacks whose class is one of Lightning's, or made from it."""
    kinds = {one.name: imported(one.body[TARGET]).__mro__ for one in config.callbacks}
    return [one for one in config.callbacks if any(k.__name__ == name for k in kinds[one.name])]


def averaging_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield why weights can't be averaged: frozen ones would move by rounding, experts come."""
    asked = {
        "expansion.llama_pro.new_blocks_only": any(s.new_blocks_only for s in config.expansion),
        "adaptation.freeze_base": appends_experts(config) and config.adaptation.freeze_base,
    }
    told = next((f"{key} = true" for key, is_asked in asked.items() if is_asked), None)
    told = told or ("forgetting=freeze" if freezing(config) else None)
    reason = f"with {told} old weights are frozen, and an average moves them by its "
    reason += "rounding; leave one of the two out"
    if config.experts is not None:
        told, reason = "experts", "an average has no experts that came on the way; leave it out"
    for one in _of("WeightAveraging", config) if told else ():
        yield Problem(f"callbacks.{one.name}.{TARGET}", one.body[TARGET], reason=reason)


def _judged(
    key: str, made: Any, body: Mapping[str, Any], owners: dict[str, str]
) -> Iterator[Problem]:
    """Yield what a run can't bear of a callback; `owners`: name of a saved state → whose it is."""
    names = [kind.__name__ for kind in type(made).__mro__]
    for name in names:
        if name in _REFUSED:
            yield Problem(f"{key}.{TARGET}", body[TARGET], reason=_REFUSED[name])
    if "ModelCheckpoint" in names:
        yield from _checkpoint_problems(key, body)
    owner = owners.setdefault(made.state_key, key)
    if owner != key and type(made).state_dict is not _plain_state_dict(made):
        reason = (
            f"it saves its state as {owner} does ({made.state_key}); let them differ "
            "in what they monitor, or leave one out"
        )
        yield Problem(key, body[TARGET], reason=reason)


def _plain_state_dict(made: Any) -> Any:
    """Return the method of the base of all callbacks, which have no state."""
    base = next(kind for kind in type(made).__mro__ if kind.__name__ == "Callback")
    return base.state_dict  # type: ignore[attr-defined]


def _checkpoint_problems(key: str, arguments: Mapping[str, Any]) -> Iterator[Problem]:
    folder = arguments.get("dirpath")
    if folder is not None and (Path(folder).is_absolute() or ".." in Path(folder).parts):
        reason = "it is below the folder of each training, as in checkpoints"
        yield Problem(f"{key}.dirpath", folder, reason=reason)
    if (interval := arguments.get("train_time_interval")) is not None:
        reason = "nothing rests on the clock; say every_n_train_steps"
        yield Problem(f"{key}.train_time_interval", interval, reason=reason)

"""`callbacks`: Lightning's and anybody's, by `_target_`; what a run can't bear of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritter.config.described import judged, named_targets, shape_problem
from tritter.config.moe import appends_experts
from tritter.config.reading import Reader
from tritter.config.schema import ModelConfig, RunConfig
from tritter.errors import Problem, nearest
from tritter.targets import TARGET, NamedTarget, imported

CALLBACK = "lightning.pytorch.Callback"
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


def read_callbacks(reader: Reader, raw: object) -> tuple[NamedTarget, ...]:
    """Return the callbacks of a run, in the order in which they were asked for."""
    if raw is None:
        return ()
    if not isinstance(raw, Mapping):
        reason = "choose options of it, as in callbacks=[lr_monitor]"
        reader.report("callbacks", raw, reason=reason)
        return ()
    if "none" in raw and len(raw) > 1:
        reader.report("callbacks", list(raw), reason="none stands alone; leave it out of the list")
    named = named_targets({n: body for n, body in raw.items() if n != "none"})
    keys: dict[str, str] = {}
    for each in named:
        shapeless = shape_problem("callbacks", each)
        reader.add([shapeless] if shapeless else _judged(each, keys))
    return tuple(named)


def metric_names(config: RunConfig) -> tuple[str, ...]:
    """Return what a callback can monitor of a training, but for what callbacks log themselves."""
    domains = config.text.domains if config.evaluation.every_n_steps else ()
    is_dense = isinstance(config.model, ModelConfig) and not any(
        spec.name == "moe" for spec in config.expansion
    )
    return (
        *_METRICS,
        *(() if is_dense else _OF_ROUTERS),
        *(("routing/old_divergence",) if config.moe_routing.hold_old else ()),
        *(f"eval/{domain.name}/loss" for domain in domains),
        *(f"forgetting/{one.name}/loss" for one in config.forgetting if one.kind.is_logged()),
    )


def monitor_problems(config: RunConfig) -> list[Problem]:
    """Return who would wait for a metric that never comes; strangers may log what they like."""
    is_strange = any(not one.body[TARGET].startswith("lightning.") for one in config.callbacks)
    if is_strange or asking_problems(config):
        return []
    known = metric_names(config)
    checkpoints = _of("ModelCheckpoint", config)
    problems = []
    for one in (*_of("EarlyStopping", config), *checkpoints):
        monitor = one.body.get("monitor")
        allowed = (*known, "step", "epoch") if one in checkpoints else known
        if monitor is not None and monitor not in allowed:
            reason = f"no training logs it; it is one of {', '.join(known)}"
            match = nearest(monitor, allowed)
            problems.append(
                Problem(f"callbacks.{one.name}.monitor", monitor, reason=reason, nearest=match)
            )
        elif one not in checkpoints and _is_strict_too_early(one.body):
            reason = f"before the first step, when it is first asked, there is no {monitor} yet"
            problems.append(Problem(f"callbacks.{one.name}.strict", True, reason=reason))
    return problems


def _is_strict_too_early(body: Mapping[str, Any]) -> bool:
    """Return whether it insists on a metric which no training has before its first step."""
    return body.get("strict", True) and not str(body.get("monitor")).startswith("eval/")


def asking_problems(config: RunConfig) -> list[Problem]:
    """Return whom nobody would ask."""
    if config.evaluation.every_n_steps:
        return []
    reason = "it is asked when the training is evaluated, and evaluation.every_n_steps = 0"
    return [
        Problem(f"callbacks.{one.name}._target_", one.body[TARGET], reason=reason)
        for one in _of("EarlyStopping", config)
    ]


def _of(name: str, config: RunConfig) -> list[NamedTarget]:
    """Return the callbacks whose class is one of Lightning's, or made from it."""
    kinds = {one.name: imported(one.body[TARGET]).__mro__ for one in config.callbacks}
    return [one for one in config.callbacks if any(k.__name__ == name for k in kinds[one.name])]


def averaging_problems(config: RunConfig) -> list[Problem]:
    """Return why weights can't be averaged: those that are frozen would move by rounding."""
    freezing = {
        "expansion.llama_pro.new_blocks_only": any(s.new_blocks_only for s in config.expansion),
        "adaptation.freeze_base": appends_experts(config) and config.adaptation.freeze_base,
    }
    key = next((key for key, is_asked in freezing.items() if is_asked), None)
    if key is None:
        return []
    reason = f"with {key} = true old weights are frozen, and an average moves them by its "
    reason += "rounding; leave one of the two out"
    return [
        Problem(f"callbacks.{one.name}._target_", one.body[TARGET], reason=reason)
        for one in _of("WeightAveraging", config)
    ]


def _judged(named: NamedTarget, keys: dict[str, str]) -> list[Problem]:
    key = f"callbacks.{named.name}"
    made, problems = judged("callbacks", named, base=CALLBACK)
    if made is None:
        return problems
    names = [kind.__name__ for kind in type(made).__mro__]
    target = named.body["_target_"]
    problems += [
        Problem(f"{key}._target_", target, reason=reason)
        for name, reason in _REFUSED.items()
        if name in names
    ]
    if "ModelCheckpoint" in names:
        problems += _checkpoint_problems(key, named.arguments)
    other = keys.setdefault(made.state_key, named.name)
    if other != named.name and type(made).state_dict is not _plain_state_dict(made):
        reason = (
            f"it saves its state as callbacks.{other} does ({made.state_key}); let them differ "
            "in what they monitor, or leave one out"
        )
        problems.append(Problem(key, target, reason=reason))
    return problems


def _plain_state_dict(made: Any) -> Any:
    """Return the method of the base of all callbacks, which have no state."""
    base = next(kind for kind in type(made).__mro__ if kind.__name__ == "Callback")
    return base.state_dict  # type: ignore[attr-defined]


def _checkpoint_problems(key: str, arguments: Mapping[str, Any]) -> list[Problem]:
    problems = []
    folder = arguments.get("dirpath")
    if folder is not None and (Path(folder).is_absolute() or ".." in Path(folder).parts):
        reason = "it is below the folder of each training, as in checkpoints"
        problems.append(Problem(f"{key}.dirpath", folder, reason=reason))
    if (interval := arguments.get("train_time_interval")) is not None:
        reason = "nothing rests on the clock; say every_n_train_steps"
        problems.append(Problem(f"{key}.train_time_interval", interval, reason=reason))
    return problems

"""What of a run a way of computing it can't do: compiled code, parts of weights, Apple's GPUs."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tritter.checkpoint.place import checkpoint_config, checkpoint_place
from tritter.checkpoint.record import StateHead
from tritter.config.folders import body_of, option_files
from tritter.config.schema import (
    AdaptationConfig,
    CheckpointModelConfig,
    MoeRoutingConfig,
    RunConfig,
)
from tritter.config.selection import weightless_methods
from tritter.data.benchmark_names import CODE, benchmark_names, code_problems
from tritter.data.options import DatasetsConfig
from tritter.errors import Problem, RequestError, TritterError, nearest, show
from tritter.expansion import target_config
from tritter.families import Config, family_of
from tritter.storage.records import read_record
from tritter.targets import TARGET, Component

_SHARDED_OPTIMIZERS = ("AdamW", "Adam", "NAdam", "SGD")  # entry by entry
_SHARDED_PRECISIONS = ("32-true", "bf16-mixed")  # the others are not tried


def compile_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what of a run compiled code can't follow."""
    if config.trainer.compile and config.experts is not None:
        reason = (
            "which tokens an adapter computes is another question in each batch, and every "
            "answer would be compiled; with experts use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)


def trainer_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
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


def sharding_problems(config: RunConfig) -> Iterator[Problem]:
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


def _of_whole_weights(config: RunConfig) -> Iterator[tuple[str, object, str]]:
    """Yield key, value and reason of what has to see whole weights."""
    for group, chosen in (("growth", config.growth), ("experts", config.experts)):
        if chosen is not None:
            yield group, chosen.kind.__name__, chosen.kind.whole_weights
    if names := [one.name for one in config.forgetting if one.kind.uses_weights]:
        reason = "they look at whole weights or gradients, and each process holds a part; allowed "
        yield "forgetting", names, f"{reason}are {' and '.join(['none', *weightless_methods()])}"
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


def callbacks_of(name: str, config: RunConfig) -> list[Component]:
    """Return the callbacks whose class is one of Lightning's, or made from it."""
    return [one for one in config.callbacks if name in (k.__name__ for k in one.kind.__mro__)]


def compiler_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield that this machine can't compile; whoever only looks at a config is not told."""
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


def apple_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what Apple's GPUs can't do."""
    trainer = config.trainer
    if trainer.accelerator != "mps":
        return
    if trainer.strategy != "auto":
        reason = "there is one Apple GPU in a machine; use trainer=mps, which trains in one process"
        yield Problem("trainer.strategy", trainer.strategy, reason=reason)
    if trainer.precision == "64-true":
        reason = "Apple's GPUs have no float64; on trainer=mps use 32-true or bf16-mixed"
        yield Problem("trainer.precision", trainer.precision, reason=reason)


KEY = "evaluation.tasks"


def benchmark_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the benchmarks of a run, but for their files."""
    asked = config.evaluation
    try:
        names = benchmark_names(asked.tasks, key=KEY)
    except RequestError as error:
        yield from error.problems
        return
    yield from code_problems(names, asked.allow_code, key=KEY, allowing="evaluation.allow_code")
    if asked.tasks_path is not None and not Path(asked.tasks_path).is_dir():
        yield Problem("evaluation.tasks_path", asked.tasks_path, reason="there is no such folder")
    is_external = asked.code_sandbox == "external"
    if is_external and not asked.code_sandbox_command and set(names) & set(CODE):
        reason = "name the command that reads a program on its standard input"
        yield Problem("evaluation.code_sandbox_command", None, reason=reason)
    for domain in config.text.domains:
        if domain.name in names:
            reason = "a domain has that name already"
            yield Problem(KEY, domain.name, reason=reason)


def precision_problems(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.precision == "16-mixed" and config.trainer.accelerator == "cpu":
        reason = "float16 needs a GPU; on trainer=cpu use bf16-mixed or 32-true"
        yield Problem("trainer.precision", "16-mixed", reason=reason)


def device_problems(config: RunConfig) -> Iterator[Problem]:
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


def nearest_multiples(value: int, divisor: int) -> str:
    """Return the multiples of a number on both sides of a value, in words."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def method_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield which methods make what another makes too, or use weights that are frozen."""
    needs = [one.kind.needs(one.options) for one in config.forgetting]
    for what in ("prepares", "leaves"):
        counts = Counter(kind for each in needs for kind in getattr(each, what))
        if twice := [kind for kind, count in counts.items() if count > 1]:
            reason = f"more than one of them {what} {', '.join(twice)}; leave one out"
            yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)
    names = [one.name for one in config.forgetting if one.kind.uses_weights]
    if names and config.experts is not None:
        reason = "they hold weights of the base, which is frozen; with experts allowed are "
        reason += " and ".join(["none", *weightless_methods()])
        yield Problem("forgetting", names, reason=reason)
    mixing = [one.name for one, each in zip(config.forgetting, needs, strict=True) if each.mixes]
    if len(mixing) > 1:
        reason = f"{' and '.join(mixing)} both mix old text into the batches; choose one of them"
        yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)


def method_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield what can't be had of a model that the run starts from.

    Args:
        source: its config.json; of a base that is to be trained the vocabulary is not known yet.
    """
    is_known = isinstance(config.model, CheckpointModelConfig)
    for one in config.forgetting:
        place = one.kind.needs(one.options).teacher_place
        if place is not None:
            key = f"forgetting.{one.name}.teacher"
            yield from teacher_problems(place, source if is_known else None, key=key)
    if any(one.kind.needs(one.options).old_text for one in config.forgetting):
        data = config.data
        yield from config.text.kept.misfits(
            sequence_length=data.sequence_length, packing=data.packing
        )


_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_PLACE_OF_ADDED = Path("state", "router.json")


def expert_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield which keys of `moe_routing` and `adaptation` would have no effect, or a wrong one.

    Args:
        source: config.json of the model that the run starts from.
    """
    has_experts = family_of(source).has_experts
    if not family_of(target_config(source, config.expansion)).has_experts:
        reason = "the model is dense and has no routers; use expansion=moe"
        yield from _without_effect("moe_routing", config.moe_routing, reason)
    elif held := config.moe_routing.hold_old:
        key = "moe_routing.hold_old"
        if not has_experts:
            reason = "the model that the run starts from is dense, so there is no old routing to "
            yield Problem(key, held, reason=f"{reason}hold; allowed is 0")
        if not config.text.old:
            yield Problem(key, held, reason="it needs old text, data.old; or leave it at 0")
    for position, spec in enumerate(config.expansion):
        before = config.expansion[:position]
        if (own_rules := getattr(spec, "problems", None)) is not None:
            yield from own_rules(before, has_experts=has_experts)
        if (teacher := getattr(spec, "teacher", None)) is not None:
            yield from teacher_problems(teacher, source, key=f"expansion.{spec.name}.teacher")
    if appends_experts(config):
        yield from _adaptation_problems(config)
    else:
        reason = "no experts are being appended; use expansion=moe_add"
        yield from _without_effect("adaptation", config.adaptation, reason)


def _without_effect(
    section: str, record: MoeRoutingConfig | AdaptationConfig, reason: str
) -> Iterator[Problem]:
    for key, value, default in _changed(section, record):
        yield Problem(f"{section}.{key}", value, reason=f"{reason}, or leave it at {show(default)}")


def _changed(
    section: str, record: MoeRoutingConfig | AdaptationConfig
) -> Iterator[tuple[str, object, object]]:
    """Yield the keys that are not as the option `default` has them: key, value, default."""
    defaults = body_of(option_files()[section]["default"])
    for key, value in asdict(record).items():
        if value != defaults[key]:
            yield key, value, defaults[key]


def teacher_problems(teacher: str, source: Config | None, *, key: str) -> Iterator[Problem]:
    """Yield why a teacher can't be learned from, as far as its config.json says.

    Args:
        source: that of the model that learns; None where its vocabulary is not known yet.
    """
    try:
        config = checkpoint_config(checkpoint_place(teacher, key=key), key=key)
    except RequestError as error:
        yield from error.problems
        return
    if config is None or source is None:
        return
    if config["vocab_size"] != source["vocab_size"]:
        reason = (
            f"it has {config['vocab_size']} tokens, the model that the run starts from "
            f"{source['vocab_size']}; allowed is a teacher with the same tokenizer"
        )
        yield Problem(key, teacher, reason=reason)


def appends_experts(config: RunConfig) -> bool:
    """Return whether experts are appended, or were and are not open yet."""
    model = config.model
    return any(getattr(spec, "is_append", False) for spec in config.expansion) or (
        isinstance(model, CheckpointModelConfig) and Path(model.path, _PLACE_OF_ADDED).is_file()
    )


def _adaptation_problems(config: RunConfig) -> Iterator[Problem]:
    adaptation = config.adaptation
    reason = "with adaptation.router_update = frozen there is no router stage; use fine_tune or "
    for key, value, _ in _changed("adaptation", adaptation):
        if key in _ROUTER_KEYS and adaptation.router_update == "frozen":
            yield Problem(f"adaptation.{key}", value, reason=f"{reason}retrain")
    grown = [s.name for s in config.expansion if s.expansion_type in ("depth", "width")]
    if adaptation.freeze_base and grown:
        reason = f"what {' and '.join(grown)} added would be frozen as well; use "
        yield Problem(
            "adaptation.freeze_base", True, reason=f"{reason}adaptation.freeze_base=false"
        )
    after, steps = adaptation.unfreeze_after, config.training.max_steps
    if after is None:
        return
    if not adaptation.freeze_base:
        reason = "with adaptation.freeze_base = false nothing is frozen"
    elif after >= steps:
        reason = f"the training has training.max_steps = {steps}; allowed is less, or null for "
        reason += "never"
    elif config.trainer.strategy != "auto":
        reason = "processes that train together need the same parameters throughout; use "
        reason += "trainer=cpu or trainer=gpu"
    else:
        return
    yield Problem("adaptation.unfreeze_after", after, reason=reason)


_MOMENTS_KEY = "optimizer.carry"
_HEAD = Path("state/state.json")
# Beginnings of dotted names: bitsandbytes' have bits and pages in theirs
_WITH_MOMENTS = tuple(
    f"{library}.optim.{name}"
    for library in ("torch", "bitsandbytes")
    for name in ("adam.Adam", "adamw.AdamW")
)
_MOMENTS = {"exp_avg", "exp_avg_sq"}


def carry_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield why trainings can't start from moments, as far as files are at hand."""
    if not config.optimizer.carry:
        return
    optimizer, options = config.optimizer, config.adaptation
    name = optimizer.target.rpartition(".")[2]
    other = "; choose optimizer=adamw, or leave optimizer.carry out"
    reasons: list[str] = []
    if not optimizer.target.startswith(_WITH_MOMENTS):
        reasons.append(
            f"{name} has other state than the two moments of Adam and AdamW, which are carried"
            f"{other}"
        )
    elif optimizer.arguments.get("amsgrad"):
        reasons.append(
            f"with optimizer.amsgrad = true there is a third moment, which is not carried{other}"
        )
    if any(spec.new_blocks_only for spec in config.expansion):
        reasons.append(
            "with expansion.llama_pro.new_blocks_only = true only new blocks are trained, and "
            "they have no moments yet; leave one of the two out"
        )
    appends = any(getattr(spec, "is_append", False) for spec in config.expansion)
    if appends and options.freeze_base and options.unfreeze_after is None:
        reasons.append(
            "with adaptation.freeze_base = true only appended experts are trained, and they have "
            "no moments yet; leave it out, or set adaptation.freeze_base=false or "
            "adaptation.unfreeze_after"
        )
    for reason in reasons:
        yield Problem(_MOMENTS_KEY, True, reason=reason)
    if isinstance(config.model, CheckpointModelConfig) and Path(config.model.path).is_dir():
        yield from given_problems(Path(config.model.path))


def given_problems(folder: Path) -> list[Problem]:
    """Return why trainings can't start from the moments beside a checkpoint."""
    try:
        if kinds_beside(folder) >= _MOMENTS:
            return []
    except TritterError as error:
        return [Problem(_MOMENTS_KEY, True, reason=str(error))]
    reason = (
        f"{folder} has no state/ with Adam's moments (exp_avg and exp_avg_sq); a run with "
        "optimizer.carry=true leaves them beside what it trained, and tritter export takes "
        "them from a .ckpt. Leave optimizer.carry out to start without"
    )
    return [Problem(_MOMENTS_KEY, True, reason=reason)]


def kinds_beside(folder: Path) -> set[str]:
    """Return the kinds of state that lie beside a checkpoint's weights.

    Raises:
        TritterError: what says so is damaged.
    """
    path = folder / _HEAD
    return set(read_record(path, StateHead).kinds) if path.exists() else set()


def weight_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the domains that are none of the new ones, or that a task is about alone."""
    data = config.data
    if not isinstance(data, DatasetsConfig) or not data.weights:
        return
    mixed = [name for task in config.text.tasks if len(task) > 1 for name in task]
    new = [name for task in config.text.tasks for name in task]
    for name, weight in data.weights.items():
        key = f"data.weights.{name}"
        if name not in new:
            known = tuple(dict.fromkeys(new))
            reason = f"there is no such new domain; there are {', '.join(known) or 'none'}"
            yield Problem(key, weight, reason=reason, nearest=nearest(name, known))
        elif name not in mixed:
            reason = "its task has no other domain, so that nothing is weighed; leave it out"
            yield Problem(key, weight, reason=reason)

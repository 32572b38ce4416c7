"""What of a run a way of computing it can't do: compiled code, parts of weights, Apple's GPUs."""

import os
import shutil
import sys
from collections.abc import Iterator

from tritter.config.schema import RunConfig
from tritter.errors import Problem
from tritter.expansion import target_config
from tritter.families import Config, family_of
from tritter.targets import TARGET, imported

_SHARDED_METHODS = ("replay",)  # of forgetting, which look at no parameter
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


def compile_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield why the model that is trained can't be compiled.

    Args:
        source: config.json of the model that the run starts from.
    """
    if not config.trainer.compile:
        return
    grown = target_config(source, config.expansion)
    if family_of(grown).has_experts:
        reason = (
            f"{grown['model_type']} has experts, and how many tokens each gets is another number "
            "in each batch, every one of which would be compiled; use trainer.compile=false"
        )
        yield Problem("trainer.compile", True, reason=reason)


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
    if config.growth is not None:
        reason = (
            "neurons grow in whole weights, and each process holds a part of them; expand "
            "between trainings (growth=none expansion=width)"
        )
        yield "growth", config.growth.kind.__name__, reason
    if config.experts is not None:
        reason = "adapters are spawned beside whole weights, and each process holds a part"
        yield "experts", config.experts.kind.__name__, reason
    names = [one.name for one in config.forgetting if one.name not in _SHARDED_METHODS]
    if names:
        reason = (
            "they look at whole weights or gradients, and each process holds a part; allowed "
            f"are none and {', '.join(_SHARDED_METHODS)}"
        )
        yield "forgetting", names, reason
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
    for one in config.callbacks:
        kinds = imported(one.body[TARGET]).__mro__
        if any(kind.__name__ == "WeightAveraging" for kind in kinds):
            reason = "an average is of whole weights, and each process holds a part"
            yield f"callbacks.{one.name}.{TARGET}", one.body[TARGET], reason


def sharding_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield why the weights of the model that is trained can't be shared out.

    Args:
        source: config.json of the model that the run starts from.
    """
    if config.trainer.strategy != "fsdp":
        return
    grown = target_config(source, config.expansion)
    if family_of(grown).has_experts:
        reason = (
            f"{grown['model_type']} has experts, whose routers are watched and opened in whole "
            "weights; use trainer=ddp"
        )
        yield Problem("trainer.strategy", "fsdp", reason=reason)


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
    if config.growth is not None:
        reason = (
            "new neurons are made in float64, which Apple's GPUs have not; with growth use "
            "trainer=cpu"
        )
        yield Problem("trainer.accelerator", trainer.accelerator, reason=reason)

"""What of a run a way of computing it can't do: compiled code, Apple's GPUs."""

import os
import shutil
import sys
from collections.abc import Iterator

from tritter.config.schema import RunConfig
from tritter.errors import Problem
from tritter.expansion import target_config
from tritter.families import Config, family_of


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

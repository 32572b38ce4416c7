"""Tritter grows language models: expansion, continual training, verified lineage."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tritter.loading import lazy_names

# Spinning OpenMP threads are ten times slower on shared cores. The first import of torch reads the
# policy, so it must be set here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# transformers, PEFT and Lightning import bitsandbytes, which on some CPUs advises installing
# `kernels`: code from a hub that Tritter never runs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

# Name → its module, imported on first access: `tritter --help` needs no torch.
# `__init__.pyi` lists the same names for type checkers.
_EXPORTS = {
    **dict.fromkeys(
        ("add_experts", "expand", "gate", "grow", "load", "protect", "run"), "tritter.api"
    ),
    "AdapterShape": "tritter.methods.experts.adapters",
    "ContinuedPretrainingConfig": "tritter.config.launch.continued_pretraining",
    "CurriculumLearning": "tritter.data.curriculum",
    "Context": "tritter.core.expansions",
    "Dus": "tritter.core.expansions",
    "EWC": "tritter.methods.forgetting",
    "ElasticWeightConsolidation": "tritter.methods.forgetting.ewc",
    "ExpansionRecord": "tritter.checkpoints",
    "ExpansionStep": "tritter.planning",
    "ExpertMixture": "tritter.methods.experts.mixture",
    "GrowableCausalLM": "tritter.methods.growth.growable",
    "GrowableFFN": "tritter.methods.growth.growable",
    "GrowableLinear": "tritter.methods.growth.growable",
    "GrowableQwen": "tritter.methods.growth.growable",
    "Interpolate": "tritter.core.expansions",
    "L2SP": "tritter.methods.forgetting",
    "Layers": "tritter.core.expansions",
    "LlamaPro": "tritter.core.expansions",
    "Moe": "tritter.core.expansions",
    "MoeAdd": "tritter.core.expansions",
    "MoEExpansionConfig": "tritter.methods.moe_routing.stages",
    "MemoryReplayBuffer": "tritter.data.replay",
    "ModelExpander": "tritter.transform.live",
    "NoveltyDetector": "tritter.methods.novelty",
    "PROGRESSIVE_BENCHMARKS": "tritter.data.benchmark_names",
    "Percentile": "tritter.methods.growth.triggers",
    "Plateau": "tritter.methods.growth.triggers",
    "ProgressiveCheckpoint": "tritter.transform.live",
    "ProgressiveMoE": "tritter.methods.moe_routing.stages",
    "Routing": "tritter.methods.experts.gates",
    "SI": "tritter.methods.forgetting",
    "Scheduled": "tritter.methods.growth.triggers",
    "SkillLibrary": "tritter.methods.novelty",
    "Stack": "tritter.core.expansions",
    "Width": "tritter.core.expansions",
    "adapt_router": "tritter.methods.moe_routing.stages",
    "depth_upscale": "tritter.transform.live",
    "expand_attention_heads": "tritter.transform.live",
    "expand_linear": "tritter.transform.live",
    "plan_expansion_path": "tritter.planning",
    "train_new_experts": "tritter.methods.moe_routing.stages",
    "width_upscale": "tritter.transform.live",
}
__all__ = sorted(_EXPORTS)


def __dir__() -> list[str]:
    """List the lazy exports as well."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


__getattr__ = lazy_names(__name__, _EXPORTS)


class _Package(ModuleType):
    """This package. A submodule does not replace a function of the same name.

    `tritter.expand` is a function and a former name of `tritter.transform`. Importing the module
    would set it as an attribute; instead the function gets the module's names.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            public = {key: each for key, each in vars(value).items() if not key.startswith("_")}
            vars(getattr(self, name)).update(public)
        else:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


# Former names of packages that moved to `core` and `methods`. Importing them returns the same
# modules.
_FORMER_NAMES = {
    "checkpoint": "checkpoints",
    "expand": "transform",
    "expansion": "core.expansions",
    "experts": "methods.experts",
    "experts.losses": "methods.experts.gates",
    "experts.peft_folder": "methods.experts.stored",
    "families": "core.families",
    "forgetting": "methods.forgetting",
    "growth": "methods.growth",
    "loadable": "core.models",
    "models": "core.models",
    "moe_routing": "methods.moe_routing",
    "novelty": "methods.novelty",
    "parameter_map": "core.parameter_map",
    "stock_routers": "core.stock_routers",
    "streamed": "core.streamed",
}


class _FormerNames(MetaPathFinder, Loader):
    """Import of former names such as `tritter.expansion.width` from their current module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, *rest = name.split(".", 2)
        is_former = package == __name__ and bool(rest) and rest[0] in _FORMER_NAMES
        return ModuleSpec(name, self) if is_former else None

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__.removeprefix(f"{__name__}.")
        room, _, rest = former.partition(".")
        moved = f"{_FORMER_NAMES[room]}.{rest}".rstrip(".")
        today = _FORMER_NAMES.get(former, moved)
        sys.modules[module.__name__] = found = import_module(f"{__name__}.{today}")
        if rest and room in _EXPORTS:  # `import tritter.expand.live as live` asks the function
            setattr(getattr(sys.modules[__name__], room), rest, found)


sys.meta_path.insert(0, _FormerNames())  # first, else files are imported twice

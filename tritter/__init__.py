"""Tritter grows language models: expansion, continual training, verified lineage."""

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

__version__ = "0.1.0"

# Name → its module, imported on first access: `tritter --help` needs no torch.
_EXPORTS = {
    "AdapterShape": "tritter.methods.experts.adapters",
    "ContinuedPretrainingConfig": "tritter.config.launch.continued_pretraining",
    "CurriculumLearning": "tritter.data.curriculum",
    "Dus": "tritter.core.expansions",
    "ElasticWeightConsolidation": "tritter.methods.forgetting.ewc",
    "ExpansionRecord": "tritter.checkpoints",
    "ExpansionStep": "tritter.planning",
    "ExpertMixture": "tritter.methods.experts.mixture",
    "GrowableCausalLM": "tritter.methods.growth.growable",
    "GrowableFFN": "tritter.methods.growth.growable",
    "GrowableLinear": "tritter.methods.growth.growable",
    "GrowableQwen": "tritter.methods.growth.growable",
    "Interpolate": "tritter.core.expansions",
    "LlamaPro": "tritter.core.expansions",
    "MoEExpansionConfig": "tritter.methods.moe_routing.stages",
    "MemoryReplayBuffer": "tritter.data.replay",
    "ModelExpander": "tritter.transform.live",
    "NoveltyDetector": "tritter.methods.novelty",
    "PROGRESSIVE_BENCHMARKS": "tritter.data.benchmark_names",
    "ProgressiveCheckpoint": "tritter.transform.live",
    "ProgressiveMoE": "tritter.methods.moe_routing.stages",
    "Routing": "tritter.methods.experts.gates",
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
        sys.modules[module.__name__] = import_module(f"{__name__}.{today}")


sys.meta_path.insert(0, _FormerNames())  # first, else files are imported twice

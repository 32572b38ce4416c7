"""Tritter grows language models: expansion, continual training, verified lineage."""

import logging
import os

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
    "AdapterShape": "tritter.checkpoints.expert_files",
    "ContinuedPretrainingConfig": "tritter.config.launch.continued_pretraining",
    "CurriculumLearning": "tritter.data.curriculum",
    "Context": "tritter.core.expansions",
    "Dus": "tritter.core.expansions",
    "EWC": "tritter.methods.forgetting",
    "ElasticWeightConsolidation": "tritter.methods.forgetting.ewc",
    "ExpansionRecord": "tritter.checkpoints",
    "ExpansionStep": "tritter.planning.plan",
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
    "MoEExpansionConfig": "tritter.methods.moe_routing.live",
    "MemoryReplayBuffer": "tritter.data.replay",
    "ModelExpander": "tritter.transform.live",
    "NoveltyDetector": "tritter.methods.novelty",
    "PROGRESSIVE_BENCHMARKS": "tritter.data.benchmark_names",
    "Percentile": "tritter.methods.growth.triggers",
    "Plateau": "tritter.methods.growth.triggers",
    "ProgressiveCheckpoint": "tritter.transform.live",
    "ProgressiveMoE": "tritter.methods.moe_routing.live",
    "Routing": "tritter.methods.experts.gates",
    "SI": "tritter.methods.forgetting",
    "Scheduled": "tritter.methods.growth.triggers",
    "SkillLibrary": "tritter.methods.novelty",
    "Stack": "tritter.core.expansions",
    "Width": "tritter.core.expansions",
    "adapt_router": "tritter.methods.moe_routing.live",
    "depth_upscale": "tritter.transform.live",
    "expand_attention_heads": "tritter.transform.live",
    "expand_linear": "tritter.transform.live",
    "plan_expansion_path": "tritter.planning.plan",
    "train_new_experts": "tritter.methods.moe_routing.live",
    "width_upscale": "tritter.transform.live",
}
__all__ = sorted(_EXPORTS)
__getattr__ = lazy_names(__name__, _EXPORTS)


def __dir__() -> list[str]:
    """List the lazy exports as well."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

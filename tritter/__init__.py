"""Tritter grows language models: expansion, protected continued training, checked lineage."""

import os
from importlib import import_module
from typing import Any

# Spinning OpenMP threads cost a factor of ten when cores are shared; the policy is read once,
# when torch is first imported, so it has to stand here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"

# Name → module that has it, imported when it is first asked for: `tritter --help` needs no torch.
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
    """List what can be imported from here, before it has been."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tritter' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

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
    "AdapterShape": "tritter.experts.adapters",
    "ContinuedPretrainingConfig": "tritter.config.launch.continued_pretraining",
    "CurriculumLearning": "tritter.data.curriculum",
    "Dus": "tritter.expansion",
    "ElasticWeightConsolidation": "tritter.forgetting.ewc",
    "ExpansionRecord": "tritter.checkpoint",
    "ExpansionStep": "tritter.planning",
    "ExpertMixture": "tritter.experts.mixture",
    "GrowableCausalLM": "tritter.growth.growable",
    "GrowableFFN": "tritter.growth.growable",
    "GrowableLinear": "tritter.growth.growable",
    "GrowableQwen": "tritter.growth.growable",
    "Interpolate": "tritter.expansion",
    "LlamaPro": "tritter.expansion",
    "MoEExpansionConfig": "tritter.moe_routing.stages",
    "MemoryReplayBuffer": "tritter.data.replay",
    "ModelExpander": "tritter.expand.live",
    "NoveltyDetector": "tritter.novelty",
    "PROGRESSIVE_BENCHMARKS": "tritter.data.benchmark_names",
    "ProgressiveCheckpoint": "tritter.expand.live",
    "ProgressiveMoE": "tritter.moe_routing.stages",
    "Routing": "tritter.experts.gates",
    "SkillLibrary": "tritter.novelty",
    "Stack": "tritter.expansion",
    "Width": "tritter.expansion",
    "adapt_router": "tritter.moe_routing.stages",
    "depth_upscale": "tritter.expand.live",
    "expand_attention_heads": "tritter.expand.live",
    "expand_linear": "tritter.expand.live",
    "plan_expansion_path": "tritter.planning",
    "train_new_experts": "tritter.moe_routing.stages",
    "width_upscale": "tritter.expand.live",
}
__all__ = sorted(_EXPORTS)


def __dir__() -> list[str]:
    """List what can be imported from here, before it has been."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tritter' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

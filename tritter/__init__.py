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
    "Dus": "tritter.expansion",
    "ElasticWeightConsolidation": "tritter.forgetting.ewc",
    "ExpansionRecord": "tritter.checkpoint",
    "ExpansionStep": "tritter.planning",
    "Interpolate": "tritter.expansion",
    "LlamaPro": "tritter.expansion",
    "MoEExpansionConfig": "tritter.adaptation",
    "ModelExpander": "tritter.library",
    "ProgressiveMoE": "tritter.adaptation",
    "Stack": "tritter.expansion",
    "Width": "tritter.expansion",
    "adapt_router": "tritter.adaptation",
    "depth_upscale": "tritter.library",
    "expand_attention_heads": "tritter.library",
    "expand_linear": "tritter.library",
    "plan_expansion_path": "tritter.planning",
    "train_new_experts": "tritter.adaptation",
    "width_upscale": "tritter.library",
}
__all__ = sorted(_EXPORTS)


def __dir__() -> list[str]:
    """List what can be imported from here, before it has been."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tritter' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

"""Short trainings that finish an expansion: of routers, and of experts that were appended."""

from tritter.adaptation.distill import distill_experts
from tritter.adaptation.progressive import MoEExpansionConfig, ProgressiveMoE
from tritter.adaptation.separate import SeparateExperts, is_router, separate_experts
from tritter.adaptation.stages import (
    adapt_router,
    checked_experts,
    redraw_rows,
    train_new_experts,
)
from tritter.adaptation.trainable import only_trainable
from tritter.adaptation.utility import best_experts, expert_utility

__all__ = [
    "MoEExpansionConfig",
    "ProgressiveMoE",
    "SeparateExperts",
    "adapt_router",
    "best_experts",
    "checked_experts",
    "distill_experts",
    "expert_utility",
    "is_router",
    "only_trainable",
    "redraw_rows",
    "separate_experts",
    "train_new_experts",
]

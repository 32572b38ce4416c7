"""Routers of mixtures of experts: losses, statistics, opening of appended experts; the trainings
that finish them."""

from tritter.moe_routing.distill import DistillationModule, distill_experts, only_new_experts
from tritter.moe_routing.losses import (
    load_balancing_loss,
    new_expert_mass,
    router_z_loss,
    routing_divergence,
)
from tritter.moe_routing.objective import (
    OldRouting,
    RoutingObjective,
    RoutingSettings,
)
from tritter.moe_routing.opening import ExpertOpening, Unfreezing
from tritter.moe_routing.progressive import MoEExpansionConfig, ProgressiveMoE
from tritter.moe_routing.separate import SeparateExperts, separate_experts
from tritter.moe_routing.stages import (
    adapt_router,
    redraw_rows,
    train_new_experts,
)
from tritter.moe_routing.statistics import (
    bias_update,
    dropped_fraction,
    expert_counts,
    layer_statistics,
    load_entropy,
    routing_statistics,
)
from tritter.moe_routing.trainable import is_router, only_trainable
from tritter.moe_routing.utility import best_experts, expert_utility

__all__ = [
    "DistillationModule",
    "ExpertOpening",
    "MoEExpansionConfig",
    "OldRouting",
    "ProgressiveMoE",
    "RoutingObjective",
    "RoutingSettings",
    "SeparateExperts",
    "Unfreezing",
    "adapt_router",
    "best_experts",
    "bias_update",
    "distill_experts",
    "dropped_fraction",
    "expert_counts",
    "expert_utility",
    "is_router",
    "layer_statistics",
    "load_balancing_loss",
    "load_entropy",
    "new_expert_mass",
    "only_new_experts",
    "only_trainable",
    "redraw_rows",
    "router_z_loss",
    "routing_divergence",
    "routing_statistics",
    "separate_experts",
    "train_new_experts",
]

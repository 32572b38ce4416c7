"""Routers of MoE models: options, losses, statistics, and training of appended experts."""

from typing import TYPE_CHECKING

from tritter.loading import lazy_names

if TYPE_CHECKING:
    from tritter.methods.moe_routing.choice import best_experts, expert_utility
    from tritter.methods.moe_routing.distill import (
        DistillationModule,
        distill_experts,
        only_new_experts,
    )
    from tritter.methods.moe_routing.live import (
        MoEExpansionConfig,
        ProgressiveMoE,
        adapt_router,
        train_new_experts,
    )
    from tritter.methods.moe_routing.objective import (
        OldRouting,
        RoutingObjective,
        RoutingSettings,
        bias_update,
        dropped_fraction,
        expert_counts,
        layer_statistics,
        load_balancing_loss,
        new_expert_mass,
        router_z_loss,
        routing_divergence,
    )
    from tritter.methods.moe_routing.opening import ExpertOpening, Unfreezing, redraw_rows
    from tritter.methods.moe_routing.separate import (
        SeparateExperts,
        is_router,
        only_trainable,
        separate_experts,
    )

_HERE = "tritter.methods.moe_routing"
__getattr__ = lazy_names(
    _HERE,
    {
        "DistillationModule": f"{_HERE}.distill",
        "ExpertOpening": f"{_HERE}.opening",
        "MoEExpansionConfig": f"{_HERE}.live",
        "OldRouting": f"{_HERE}.objective",
        "ProgressiveMoE": f"{_HERE}.live",
        "RoutingObjective": f"{_HERE}.objective",
        "RoutingSettings": f"{_HERE}.objective",
        "SeparateExperts": f"{_HERE}.separate",
        "Unfreezing": f"{_HERE}.opening",
        "adapt_router": f"{_HERE}.live",
        "best_experts": f"{_HERE}.choice",
        "bias_update": f"{_HERE}.objective",
        "distill_experts": f"{_HERE}.distill",
        "dropped_fraction": f"{_HERE}.objective",
        "expert_counts": f"{_HERE}.objective",
        "expert_utility": f"{_HERE}.choice",
        "is_router": f"{_HERE}.separate",
        "layer_statistics": f"{_HERE}.objective",
        "load_balancing_loss": f"{_HERE}.objective",
        "new_expert_mass": f"{_HERE}.objective",
        "only_new_experts": f"{_HERE}.distill",
        "only_trainable": f"{_HERE}.separate",
        "redraw_rows": f"{_HERE}.opening",
        "router_z_loss": f"{_HERE}.objective",
        "routing_divergence": f"{_HERE}.objective",
        "separate_experts": f"{_HERE}.separate",
        "train_new_experts": f"{_HERE}.live",
    },
)
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
    "new_expert_mass",
    "only_new_experts",
    "only_trainable",
    "redraw_rows",
    "router_z_loss",
    "routing_divergence",
    "separate_experts",
    "train_new_experts",
]

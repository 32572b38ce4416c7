"""Routers of MoE models: options, losses, statistics, and training of appended experts."""

from typing import TYPE_CHECKING

from tritter.loading import lazy_names

if TYPE_CHECKING:
    from tritter.methods.moe_routing.distill import (
        DistillationModule,
        distill_experts,
        only_new_experts,
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
    from tritter.methods.moe_routing.stages import (
        ExpertOpening,
        MoEExpansionConfig,
        ProgressiveMoE,
        SeparateExperts,
        Unfreezing,
        adapt_router,
        best_experts,
        expert_utility,
        is_router,
        only_trainable,
        redraw_rows,
        separate_experts,
        train_new_experts,
    )

_HERE = "tritter.methods.moe_routing"
__getattr__ = lazy_names(
    _HERE,
    {
        "DistillationModule": f"{_HERE}.distill",
        "ExpertOpening": f"{_HERE}.stages",
        "MoEExpansionConfig": f"{_HERE}.stages",
        "OldRouting": f"{_HERE}.objective",
        "ProgressiveMoE": f"{_HERE}.stages",
        "RoutingObjective": f"{_HERE}.objective",
        "RoutingSettings": f"{_HERE}.objective",
        "SeparateExperts": f"{_HERE}.stages",
        "Unfreezing": f"{_HERE}.stages",
        "adapt_router": f"{_HERE}.stages",
        "best_experts": f"{_HERE}.stages",
        "bias_update": f"{_HERE}.objective",
        "distill_experts": f"{_HERE}.distill",
        "dropped_fraction": f"{_HERE}.objective",
        "expert_counts": f"{_HERE}.objective",
        "expert_utility": f"{_HERE}.stages",
        "is_router": f"{_HERE}.stages",
        "layer_statistics": f"{_HERE}.objective",
        "load_balancing_loss": f"{_HERE}.objective",
        "new_expert_mass": f"{_HERE}.objective",
        "only_new_experts": f"{_HERE}.distill",
        "only_trainable": f"{_HERE}.stages",
        "redraw_rows": f"{_HERE}.stages",
        "router_z_loss": f"{_HERE}.objective",
        "routing_divergence": f"{_HERE}.objective",
        "separate_experts": f"{_HERE}.stages",
        "train_new_experts": f"{_HERE}.stages",
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

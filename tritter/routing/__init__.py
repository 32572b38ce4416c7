"""Routers of mixtures of experts: control, losses, statistics. Torch alone; no model class."""

from tritter.routing.added import AddedExperts, carry_added_experts, router_offset, stock_obstacle
from tritter.routing.control import Record, Routing
from tritter.routing.losses import (
    load_balancing_loss,
    new_expert_mass,
    router_z_loss,
    routing_divergence,
)
from tritter.routing.statistics import (
    LayerStatistics,
    bias_update,
    dropped_fraction,
    expert_counts,
    layer_statistics,
    load_entropy,
    routing_statistics,
)

__all__ = [
    "AddedExperts",
    "LayerStatistics",
    "Record",
    "Routing",
    "bias_update",
    "carry_added_experts",
    "dropped_fraction",
    "expert_counts",
    "layer_statistics",
    "load_balancing_loss",
    "load_entropy",
    "new_expert_mass",
    "router_offset",
    "router_z_loss",
    "routing_divergence",
    "routing_statistics",
    "stock_obstacle",
]

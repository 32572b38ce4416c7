"""The routers of stock mixture-of-experts models, within reach: offsets, selection bias, records.

Stands above the models, because a model with appended experts computes what it should with their
offset alone. How routers are trained stands in `tritter.moe_routing`.
"""

from tritter.stock_routers.added import AddedExperts, router_offset, stock_obstacle
from tritter.stock_routers.control import Record, Routing

__all__ = [
    "AddedExperts",
    "Record",
    "Routing",
    "router_offset",
    "stock_obstacle",
]

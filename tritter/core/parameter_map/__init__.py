"""The parameter map: how each tensor of an expanded model follows from the source's tensors.

Everything that lives on parameters (weights, gradients, moments, importances) goes through the
same map; `axis_map` says how one space grows, `tensor_map` what that means for one tensor,
`apply` moves values.
"""

from tritter.core.parameter_map.apply import (
    Quantity,
    carried,
    carried_mask,
    map_tensor,
    mapped,
    new_along,
    rounded_weight,
)
from tritter.core.parameter_map.tensor_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap

__all__ = [
    "AxisFactor",
    "AxisMap",
    "Fill",
    "ParameterMap",
    "Quantity",
    "TensorMap",
    "carried",
    "carried_mask",
    "map_tensor",
    "mapped",
    "new_along",
    "rounded_weight",
]

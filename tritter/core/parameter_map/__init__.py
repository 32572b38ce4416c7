"""The parameter map: how each tensor of an expanded model derives from the source tensors.

All values on parameters (weights, gradients, moments, importances) go through the same map.
`tensor_map` defines the maps of spaces and tensors, `apply` maps values, `carry` maps state.
"""

from tritter.core.parameter_map.apply import (
    Quantity,
    carried_mask,
    map_tensor,
    mapped,
    new_coordinates,
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
    "carried_mask",
    "map_tensor",
    "mapped",
    "new_coordinates",
    "rounded_weight",
]

"""The parameter map: how each tensor of an expanded model derives from the source tensors.

All values on parameters (weights, gradients, moments, importances) go through the same map.
`axis_map` has the maps of spaces, `tensor_map` those of tensors, `carry` the rules of state.
"""

from tritter.core.parameter_map.axis_map import AxisFactor, AxisMap, Quantity
from tritter.core.parameter_map.tensor_map import Fill, ParameterMap, TensorMap

__all__ = [
    "AxisFactor",
    "AxisMap",
    "Fill",
    "ParameterMap",
    "Quantity",
    "TensorMap",
]

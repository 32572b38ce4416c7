"""What the tests of maps share: the pair of matrices that an axis map stands for."""

import torch
from torch import Tensor

from tritter.core.parameter_map import AxisMap


def producer_matrix(axis_map: AxisMap) -> Tensor:
    """Return E, float64 [N, n]."""
    return _dense(axis_map, axis_map.scale)


def consumer_matrix(axis_map: AxisMap) -> Tensor:
    """Return C, float64 [n, N]."""
    return _dense(axis_map, axis_map.share).T


def _dense(axis_map: AxisMap, values: Tensor) -> Tensor:
    dense = torch.zeros(axis_map.new_size, axis_map.old_size, dtype=torch.float64)
    kept = (axis_map.source >= 0).nonzero().squeeze(1)
    dense[kept, axis_map.source[kept]] = values[kept]
    return dense

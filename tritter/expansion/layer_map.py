"""The map of a depth expansion: each target layer gets the tensors of its source layer."""

from collections.abc import Sequence

from tritter.families import Config, Family, Port, logical_name
from tritter.parameter_map import ParameterMap, TensorMap
from tritter.seeds import derived_seed

_SILENT_NOISE = 0.01


def layer_map(
    family: Family,
    target: Config,
    layer_sources: Sequence[int],
    *,
    identities: frozenset[int],
    seed: int,
) -> ParameterMap:
    """Return the map that gives each target layer the tensors of its source layer.

    Args:
        target: the config afterwards; each layer's pattern is that of its source layer.
        identities: target layers whose writes to the residual stream become zero, and whose
            moments and importances start anew.
        seed: of the noise behind silent norms.
    """
    tensors: dict[str, TensorMap] = {}
    for tensor in family.logical_tensors(target):
        if tensor.layer is None:
            tensors[tensor.name] = TensorMap(source=tensor.name)
            continue
        is_identity = tensor.layer in identities
        is_zeroed = is_identity and family.branch_output(tensor)
        output = tensor.axes[0]
        # A row that writes nothing to a gain of zero would stay so: rows that an expansion before
        # this one left zero are among what is copied. Silent as the norm is, noise costs nothing.
        is_silenced = output.port is Port.WRITE and output.space.is_branch_output
        tensors[tensor.name] = TensorMap(
            source=logical_name(
                tensor.kind, layer=layer_sources[tensor.layer], expert=tensor.expert
            ),
            is_zeroed=is_zeroed,
            offset=family.norm_offset if is_zeroed and tensor.is_norm else 0.0,
            state="fresh" if is_identity else "carry",
            is_copy=is_identity and is_silenced,
            noise=_SILENT_NOISE if is_identity and is_silenced else 0.0,
            noise_seed=derived_seed(seed, "noise", tensor.name) if is_silenced else 0,
        )
    return ParameterMap(tensors=tensors, layer_sources=tuple(layer_sources))

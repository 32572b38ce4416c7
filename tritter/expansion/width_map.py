"""The map of a width expansion."""

from dataclasses import replace

from tritter.expansion.head_maps import head_maps
from tritter.expansion.heads import Strategy
from tritter.expansion.spaces import Spaces, first_copies, residual_map, tensors_above, width_fill
from tritter.families import Config, Family, LogicalTensor, Port
from tritter.parameter_map import Fill, ParameterMap, TensorMap
from tritter.seeds import derived_seed


def width_map(
    family: Family,
    source: Config,
    target: Config,
    *,
    init: str,
    strategy: Strategy,
    is_repeated: bool,
    equal_shares: bool,
    noise: float,
    seed: int,
) -> ParameterMap:
    """Return the map from the source's tensors to the wider target's.

    Args:
        is_repeated: the residual stream is repeated as a whole; what else, as `Width` has it.
    """
    old, new = family.dimensions(source), family.dimensions(target)
    is_scaled = any(a.port is Port.WRITE_SCALED for t in family.tensors for a in t.axes)
    spaces = Spaces(
        residual=residual_map(old.hidden_size, new.hidden_size, is_repeated=is_repeated),
        # A norm over all heads hands the gradient of each on to all: shares that differ between
        # copies would be mixed, and moments could not follow
        heads=head_maps(
            old, new, strategy=strategy, equal_shares=equal_shares or family.norms_all_heads
        ),
        is_tied=bool(source.get("tie_word_embeddings")),
        embedding_scale=(old.hidden_size / new.hidden_size) ** 0.5 if is_scaled else 1.0,
        units_are_copied=init != "fresh",
        equal_shares=equal_shares,
        seed=seed,
    )
    logical = family.logical_tensors(source)
    maps = {
        tensor.name: _tensor_map(tensor, spaces, family, source, target, noise=noise)
        for tensor in logical
    }
    if init == "aki":
        # Norms stand between a stream that is written and readers that stay the layer's own
        above = tensors_above([t for t in logical if not t.is_of_norm])
        maps |= {name: _from_above(maps[name], donor) for name, donor in above.items()}
    return ParameterMap(tensors=maps, layer_sources=tuple(range(old.num_hidden_layers)))


def _tensor_map(
    tensor: LogicalTensor,
    spaces: Spaces,
    family: Family,
    source: Config,
    target: Config,
    *,
    noise: float,
) -> TensorMap:
    shape = family.shape(tensor, target)
    factors = spaces.factors(tensor, family.shape(tensor, source), shape)
    is_scaled_gain = tensor.is_norm and any(
        factor is not None and bool((factor.weight != 1).any()) for factor in factors
    )
    return TensorMap(
        source=tensor.name,
        axes=factors,
        fill=width_fill(tensor, shape, factors, seed=spaces.seed),
        noise=noise,
        noise_seed=derived_seed(spaces.seed, "noise", tensor.name),
        offset=family.norm_offset if is_scaled_gain else 0.0,
    )


def _from_above(tensor_map: TensorMap, donor: str) -> TensorMap:
    """Let what second copies compute come from the layer above; their state starts anew."""
    output, *inputs = tensor_map.axes
    if output is None or not bool(output.is_duplicate.any()):
        return tensor_map
    fill = Fill(kind="copy", donor=replace(tensor_map, source=donor))
    return replace(tensor_map, axes=(first_copies(output), *inputs), fill=fill)

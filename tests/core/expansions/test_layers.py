"""The source of each target layer, under every depth rule."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritter.core.expansions import build_steps
from tritter.core.expansions.depth import Dus, Interpolate, Layers, LlamaPro, Stack, repeated_layers
from tritter.core.families import Config, Model
from tritter.errors import RequestError

LAYERS = st.integers(1, 40)


# dus


def test_solar_takes_layers_0_to_23_and_8_to_31() -> None:
    assert Dus(target_layers=48).layer_sources(32) == (*range(24), *range(8, 32))
    assert Dus(drop_layers=8).layer_sources(32) == (*range(24), *range(8, 32))
    assert Dus().layer_sources(32) == (*range(24), *range(8, 32))


@pytest.mark.parametrize(
    ("layers", "sources"),
    [
        (1, (0, 0)),
        (2, (0, 1, 0, 1)),
        (3, (0, 1, 1, 2)),  # the default base: one layer dropped
        (4, (0, 1, 2, 1, 2, 3)),
        (5, (0, 1, 2, 3, 1, 2, 3, 4)),
        (8, (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_dus_default(layers: int, sources: tuple[int, ...]) -> None:
    assert Dus().layer_sources(layers) == sources


def test_24_to_48_drops_nothing() -> None:
    assert Dus(target_layers=48).layer_sources(24) == (*range(24), *range(24))
    assert Dus(target_layers=48, drop_layers=0).layer_sources(24) == (*range(24), *range(24))


@given(layers=LAYERS, data=st.data())
def test_every_even_target_up_to_twice_the_layers_is_two_overlapping_runs(
    layers: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(layers // 2 + 1, layers)) * 2
    sources = Dus(target_layers=target).layer_sources(layers)
    half = target // 2
    assert sources[:half] == tuple(range(half))
    assert sources[half:] == tuple(range(layers - half, layers))
    assert set(sources) == set(range(layers))
    assert Dus(drop_layers=layers - half).layer_sources(layers) == sources


# stack


@given(layers=LAYERS, copies=st.integers(2, 6))
def test_stack_repeats_the_whole_stack(layers: int, copies: int) -> None:
    sources = Stack(target_layers=copies * layers).layer_sources(layers)
    assert sources == tuple(range(layers)) * copies
    assert Stack().layer_sources(layers) == tuple(range(layers)) * 2


@given(layers=LAYERS, data=st.data())
def test_a_partial_stack_is_layer_i_mod_n(layers: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(layers + 1, 5 * layers))
    sources = Stack(target_layers=target, partial=True).layer_sources(layers)
    assert len(sources) == target
    assert all(source == layer % layers for layer, source in enumerate(sources))
    if target % layers == 0:
        assert sources == Stack(target_layers=target).layer_sources(layers)
    else:
        with pytest.raises(RequestError, match=r"expansion\.stack\.partial"):
            Stack(target_layers=target).layer_sources(layers)


# interpolate


@pytest.mark.parametrize(
    ("layers", "target", "sources"),
    [
        (1, None, (0, 0)),
        (2, None, (0, 0, 1)),
        (3, None, (0, 0, 1, 1, 2)),
        (4, None, (0, 0, 1, 2, 2, 3)),
        (3, 4, (0, 1, 1, 2)),
        (4, 5, (0, 1, 1, 2, 3)),
        (4, 8, (0, 0, 1, 1, 2, 2, 3, 3)),
        (4, 11, (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3)),
        (3, 10, (0, 0, 0, 1, 1, 1, 1, 2, 2, 2)),
        (8, 12, (0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7)),
    ],
)
def test_interpolate(layers: int, target: int | None, sources: tuple[int, ...]) -> None:
    assert Interpolate(target_layers=target).layer_sources(layers) == sources


@given(layers=LAYERS, data=st.data())
def test_interpolation_takes_every_target_as_evenly_as_can_be(
    layers: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(layers + 1, 5 * layers + 1))
    sources = Interpolate(target_layers=target).layer_sources(layers)
    assert len(sources) == target
    assert all(0 <= second - first <= 1 for first, second in pairwise(sources))
    counts = [Counter(sources)[layer] for layer in range(layers)]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    more = [layer for layer, count in enumerate(counts) if count > min(counts)]
    gaps = {second - first for first, second in pairwise(more)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if target < 2 * layers:
        assert counts[-1] == 1  # every copy is between two layers


@given(layers=LAYERS, times=st.integers(2, 5))
def test_whole_multiples_interpolate_like_the_papers_formula(layers: int, times: int) -> None:
    """arXiv 2405.15319, appendix: layer i of the result is layer ⌊i / times⌋."""
    sources = Interpolate(target_layers=times * layers).layer_sources(layers)
    assert sources == tuple(layer // times for layer in range(times * layers))


@given(layers=LAYERS)
def test_interpolation_by_default_grows_by_half_rounded_up(layers: int) -> None:
    assert len(Interpolate().layer_sources(layers)) == layers + (layers + 1) // 2


# llama_pro


@pytest.mark.parametrize(
    ("layers", "target", "sources"),
    [
        (2, None, (0, 1, 1)),
        (4, None, (0, 1, 1, 2, 3, 3)),
        (3, None, (0, 1, 1, 2, 2)),
        (4, 5, (0, 1, 2, 3, 3)),
        (4, 8, (0, 0, 1, 1, 2, 2, 3, 3)),
        (2, 6, (0, 0, 0, 1, 1, 1)),
        (32, 40, tuple(sorted([*range(32), 3, 7, 11, 15, 19, 23, 27, 31]))),
    ],
)
def test_llama_pro_spreads_evenly(
    layers: int, target: int | None, sources: tuple[int, ...]
) -> None:
    assert LlamaPro(target_layers=target).layer_sources(layers) == sources


def test_llama_pro_at_positions() -> None:
    assert LlamaPro(positions=(3, 0, 0)).layer_sources(4) == (0, 0, 0, 1, 2, 3, 3)
    assert LlamaPro(positions=(1,), target_layers=5).layer_sources(4) == (0, 1, 1, 2, 3)


# layers


def _config(layers: int) -> Config:
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return (
        {"model_type": "llama", "num_hidden_layers": layers, "rms_norm_eps": 1e-5} | sizes | heads
    )


@pytest.mark.parametrize("slices", [((0, 20), (10, 30)), ("0:20", [10, 30])], ids=str)
def test_slices_are_joined_without_their_ends(slices: tuple[tuple[int, int], ...]) -> None:
    table = (*range(20), *range(10, 30))
    assert Layers(slices=slices).layer_sources(30) == table
    assert Layers(sources=table).layer_sources(30) == table


def test_every_depth_method_is_a_table() -> None:
    for spec in (Dus(), Stack(), Interpolate(), LlamaPro()):
        (step,) = build_steps(Model(_config(4)), [spec], seed=3)
        table = Layers(sources=spec.layer_sources(4), identity=spec.is_exact)
        (same,) = build_steps(Model(_config(4)), [table], seed=3)
        assert same.parameter_map.digest() == step.parameter_map.digest()
        assert same.is_exact == step.is_exact
        assert same.target.config == step.target.config


@pytest.mark.parametrize(
    ("layers", "sources", "identity", "is_exact", "notes"),
    [
        (3, (0, 1, 2), None, True, ()),
        (3, (0, 1, 1, 2), None, False, ()),
        (3, (0, 1, 1, 2), True, True, ("identity layers: 2",)),
        (3, (0, 1, 1, 2), (1,), True, ("identity layers: 1",)),
        (3, (0, 1, 1, 2, 2), (2,), False, ("identity layers: 2",)),
        (3, (0, 2, 1, 2), (1,), True, ("identity layers: 1",)),
        (3, (0, 2, 1, 2), True, False, ("identity layers: 3",)),
        (3, (0, 2, 1), None, False, ()),
        (3, (0, 1, 2), (1,), False, ("identity layers: 1", "dropped source layers: 1")),
        (3, (0, 1, 2), (2,), False, ("identity layers: 2", "dropped source layers: 2")),
        (3, (0, 1), None, False, ("dropped source layers: 2",)),
        (4, (0, 1, 1), True, False, ("identity layers: 2", "dropped source layers: 2 3")),
        (3, (0, 0, 2), True, False, ("identity layers: 1", "dropped source layers: 1")),
        (3, (1,), False, False, ("dropped source layers: 0 2",)),
    ],
)
def test_a_table_is_exact_if_the_layers_that_are_no_identities_are_those_of_the_source(
    layers: int,
    sources: tuple[int, ...],
    identity: bool | tuple[int, ...] | None,
    is_exact: bool,
    notes: tuple[str, ...],
) -> None:
    (step,) = build_steps(
        Model(_config(layers)), [Layers(sources=sources, identity=identity)], seed=0
    )
    assert (step.is_exact, step.notes) == (is_exact, notes)


@given(layers=st.integers(1, 5), data=st.data())
def test_exact_tables_by_definition(layers: int, data: st.DataObject) -> None:
    """Run the table on a list: a plain layer appends its number, an identity nothing."""
    sources = data.draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=8).map(tuple))
    identity = data.draw(st.lists(st.integers(0, len(sources) - 1)).map(tuple))
    (step,) = build_steps(
        Model(_config(layers)), [Layers(sources=sources, identity=identity)], seed=0
    )
    computed = [source for target, source in enumerate(sources) if target not in identity]
    assert step.is_exact == (computed == [*range(layers)])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Layers(), "set exactly one of expansion.layers.sources and expansion.layers.slices"),
        (Layers(sources=(0,), slices=((0, 1),)), "set exactly one of"),
        (Layers(sources=()), "expansion.layers.sources = []: list source layers from 0 to 3"),
        (Layers(sources=(0, 4)), "expansion.layers.sources = 4: list source layers from 0 to 3"),
        (Layers(slices=()), "expansion.layers.slices = []: list ranges"),
        (Layers(slices=((0, 2), (2, 5))), "expansion.layers.slices = 2:5: list ranges"),
        (Layers(slices=((2, 2),)), "= 2:2: list ranges start:end with 0 ≤ start < end ≤ 4"),
        (Layers(slices=((0, 4),), identity=(4,)), "identity = 4: list target layers from 0 to 3"),
        (Layers(slices=((0, 4),) * 5000), "of the result, num_hidden_layers"),
    ],
    ids=str,
)
def test_impossible_tables_are_refused(spec: Layers, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        build_steps(Model(_config(4)), [spec], seed=0)
    assert expected in str(error.value)


# Copies


@pytest.mark.parametrize(
    ("sources", "repeated"),
    [
        ((0, 1, 2), set()),
        ((0, 1, 1, 2), {2}),
        ((0, 1, 2, 1, 2, 3), {3, 4}),
        ((0, 0, 0), {1, 2}),
        ((), set()),
    ],
)
def test_repeated_layers_are_the_later_copies(sources: tuple[int, ...], repeated: set[int]) -> None:
    assert repeated_layers(sources) == repeated


@given(layers=LAYERS, data=st.data())
def test_all_but_one_of_each_layer_are_copies(layers: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(layers + 1, 4 * layers))
    for sources in (
        Stack(target_layers=target, partial=True).layer_sources(layers),
        Interpolate(target_layers=target).layer_sources(layers),
        LlamaPro(target_layers=target).layer_sources(layers),
    ):
        copies = repeated_layers(sources)
        assert len(copies) == target - layers
        kept = [source for layer, source in enumerate(sources) if layer not in copies]
        assert kept == list(range(layers))  # zeroed copies leave the old stack, in its order

"""New neurons: preserved function, initial gradients, distance from existing neurons."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.methods.growth.factories import layer_of, probes_of
from tests.oracle.families import GROWABLE, generic, key_of, tiny
from tritter.methods.growth.blocks import FfnBlock
from tritter.methods.growth.grower import _growth_change
from tritter.methods.growth.initialisers import (
    GradMax,
    Initialiser,
    Layer,
    NewNeurons,
    Random,
    SourceNoise,
    Split,
    _directions,
    orthogonalised,
)
from tritter.training.surgery import apply_plain


def grow(
    model: nn.Module, initialiser: Initialiser, ids: Tensor, *, layer: int = 0, count: int = 4
) -> NewNeurons:
    """Grow a layer from one backward pass on `ids`."""
    block = FfnBlock.all_of(model)[layer]
    probe = probes_of(model, ids)[block.layer]
    neurons = initialiser.neurons(layer_of(model, block, probe, count=count))
    apply_plain(model, _growth_change(model, {block.layer: neurons}))
    return neurons


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic(GROWABLE))
@pytest.mark.parametrize("initialiser", [GradMax(), Split(), Random()], ids=repr)
def test_exact_ones_keep_the_function(family: str, initialiser: Initialiser) -> None:
    model = tiny(family, rms_norm_eps=1e-3).double()
    ids = oracle.tokens(model.config.vocab_size)
    with oracle.float64_casts():
        before = oracle.logits(model, ids)
        for layer in range(2):
            grow(model, initialiser, ids, layer=layer, count=5)
        after = oracle.logits(model, ids)
    assert float((after - before).abs().max()) < 1e-10
    widths = [block.width(model) for block in FfnBlock.all_of(model)]
    assert widths[0] == widths[1] == getattr(model.config, key_of(family, "intermediate_size"))


def test_the_readmes_does_not_and_says_so() -> None:
    model = tiny("llama")
    ids = oracle.tokens(model.config.vocab_size)
    before = oracle.logits(model, ids)
    grow(model, SourceNoise(), ids)
    assert float((oracle.logits(model, ids) - before).abs().max()) > 1e-3
    assert not Initialiser.is_exact  # an own one says so itself
    assert not SourceNoise.is_exact and GradMax.is_exact and Split.is_exact and Random.is_exact


def new_gradients(model: nn.Module, ids: Tensor, *, count: int = 4) -> dict[str, Tensor]:
    probes_of(model, ids)
    block = FfnBlock.all_of(model)[0]
    up = model.get_parameter(block.up).grad
    gate = model.get_parameter(block.gate).grad
    down = model.get_parameter(block.down).grad
    assert up is not None and gate is not None and down is not None
    return {"up": up[-count:], "gate": gate[-count:], "down": down[:, -count:]}


@pytest.mark.full
def test_gradmax_beats_random_directions_of_equal_norm() -> None:
    ids = oracle.tokens(batch=8, length=24, seed=3)
    model = oracle.tiny_llama(initializer_range=0.2)
    neurons = grow(model, GradMax(), ids)
    best = torch.linalg.vector_norm(new_gradients(model, ids)["up"])
    for seed in range(20):
        other = oracle.tiny_llama(initializer_range=0.2)
        generator = torch.Generator().manual_seed(seed)

        def turned(values: Tensor, dim: int) -> Tensor:
            drawn = torch.randn(values.shape, generator=generator)  # noqa: B023
            lengths = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
            return drawn / torch.linalg.vector_norm(drawn, dim=dim, keepdim=True) * lengths

        class Turned(Initialiser):
            def neurons(self, layer: Layer) -> NewNeurons:
                return NewNeurons(
                    gate=turned(neurons.gate, 1), up=neurons.up, down=turned(neurons.down, 0)
                )

        grow(other, Turned(), ids)
        assert torch.linalg.vector_norm(new_gradients(other, ids)["up"]) < best


def test_gradmax_is_the_first_singular_vector() -> None:
    """Compared with torch's SVD of the matrix that determines a new row's gradient."""
    ids = oracle.tokens(batch=8, length=24, seed=3)
    model = oracle.tiny_llama(initializer_range=0.2).double()
    block = FfnBlock.all_of(model)[0]
    probe = probes_of(model, ids)[0]
    layer = layer_of(model, block, probe, count=3)
    neurons = GradMax().neurons(layer)
    inputs, deltas = probe.inputs.double(), probe.output_gradients.double()
    moment = deltas.T @ inputs
    right = torch.linalg.svd(moment).Vh[:3]
    gates = neurons.gate.double() / neurons.gate.double().norm(dim=1, keepdim=True)
    assert ((gates @ right.T).diagonal().abs() > 1 - 1e-4).all()
    opened = layer.activation(inputs @ neurons.gate[0].double())[:, None]
    left = torch.linalg.svd((deltas * opened).T @ inputs).U[:, 0]
    column = neurons.down[:, 0].double()
    assert float((column / column.norm()) @ left) ** 2 > 1 - 1e-6


def test_new_gradients_are_as_large_as_the_median_of_the_layers() -> None:
    ids = oracle.tokens(batch=8, length=24, seed=3)
    model = oracle.tiny_llama(initializer_range=0.2)
    grow(model, GradMax(), ids)
    found = new_gradients(model, ids)
    up = model.get_parameter(FfnBlock.all_of(model)[0].up).grad
    assert up is not None
    median = torch.linalg.vector_norm(up[:-4], dim=1).median()
    assert torch.allclose(torch.linalg.vector_norm(found["up"], dim=1), median, rtol=1e-3)
    assert found["gate"].count_nonzero() == found["down"].count_nonzero() == 0


def test_the_whole_triple_moves_within_two_steps() -> None:
    ids, model = oracle.tokens(batch=8, length=24, seed=3), oracle.tiny_llama()
    grow(model, GradMax(), ids)
    optimizer, block = torch.optim.AdamW(model.parameters(), lr=1e-3), FfnBlock.all_of(model)[0]
    before = [w.clone() for w in block.weights(model)]
    for _ in range(2):
        probes_of(model, ids)
        optimizer.step()
    gate, up, down = (now - old for now, old in zip(block.weights(model), before, strict=True))
    assert (gate[-4:].abs().amax(dim=1) > 1e-5).all() and (up[-4:].abs().amax(dim=1) > 1e-5).all()
    assert (down[:, -4:].abs().amax(dim=0) > 1e-5).all()


def test_copies_share_unequally_even_of_one_source() -> None:
    model, ids = oracle.tiny_llama().double(), oracle.tokens()
    before = oracle.logits(model, ids)

    class Twice(Split):
        def neurons(self, layer: Layer) -> NewNeurons:
            made = Split.neurons(self, layer)
            return NewNeurons(
                gate=made.gate, up=made.up, down=made.down, share=0.3,
                source=torch.tensor([5, 5, 5, 2]),
            )  # fmt: skip

    grow(model, Twice(), ids)
    assert float((oracle.logits(model, ids) - before).abs().max()) < 1e-12
    down = model.get_parameter(FfnBlock.all_of(model)[0].down).detach()
    parts = [float((down[:, n] @ down[:, 5]) / (down[:, 5] @ down[:, 5])) for n in (-4, -3, -2)]
    assert parts == pytest.approx([0.3 / 0.343, 0.21 / 0.343, 0.147 / 0.343])


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_tokens_decides_no_sign(seed: int) -> None:
    """Two processes add the tokens of a batch in another order than one."""
    generator = torch.Generator().manual_seed(seed)
    inputs, deltas = (
        torch.randn(256, 16, generator=generator)
        * torch.logspace(0, -1, 16)
        @ torch.randn(16, 16, generator=generator)
        for _ in range(2)
    )
    start = torch.randn(16, 10, generator=generator)
    order = torch.arange(256).view(128, 2).T.flatten()  # of the rows of two processes
    one = _directions(deltas.T @ inputs, start, 8)
    two = _directions(2 * deltas[order].T @ inputs[order], start, 8)
    assert torch.nn.functional.cosine_similarity(one, two).min() > 0.99


@pytest.mark.parametrize("against", ["neighbours", "activations"])
def test_new_directions_differ_from_their_nearest(against: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    existing = torch.randn(40, 32, generator=generator)
    inputs = torch.randn(200, 32, generator=generator) * torch.linspace(0.1, 3, 32)
    rows = existing[:3] + 0.3 * torch.randn(3, 32, generator=generator)
    made = orthogonalised(rows, existing, against=against, inputs=inputs)
    assert torch.allclose(made.norm(dim=1), rows.norm(dim=1), rtol=1e-4)
    metric = torch.eye(32) if against == "neighbours" else inputs.T @ inputs / 200

    def nearness(left: Tensor, right: Tensor) -> Tensor:
        lengths = [(x @ metric * x).sum(dim=1).sqrt() for x in (left, right)]
        return ((left @ metric @ right.T) / lengths[0][:, None] / lengths[1]).abs()

    for row in range(3):
        before, after = nearness(rows[row : row + 1], existing)[0], nearness(made, existing)[row]
        assert float(before[row]) > 0.85 and float(after[before.topk(8).indices].max()) < 1e-3
    assert float(nearness(made, made).fill_diagonal_(0).max()) < 1e-3


def test_against_more_rows_than_dimensions_something_is_left() -> None:
    existing = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    made = orthogonalised(existing[:5] + 0.1, existing, against="neighbours")
    assert torch.isfinite(made).all() and (made.norm(dim=1) > 0.1).all()

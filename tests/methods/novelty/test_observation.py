"""Observations of the base: stock losses and hidden states, padding and axes."""

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision
from torch.nn.functional import cross_entropy

from tests.oracle import tiny_llama, tokens
from tests.oracle.families import generic, tiny
from tritter.core.models import layers_of
from tritter.errors import RequestError, TritterError
from tritter.methods.novelty import Observation, observe
from tritter.methods.novelty.observation import _directions as directions
from tritter.methods.novelty.observation import _middle_layer


@pytest.mark.parametrize("family", generic())
def test_features_and_losses_are_stock_ones(family: str) -> None:
    model, ids = tiny(family).train(), tokens()
    seen = observe(model, ids)
    assert model.training and not seen.features.requires_grad
    model.eval()
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    middle = output.hidden_states[2]  # of three layers: embeddings, first, second, ...
    torch.testing.assert_close(seen.features, middle.mean(dim=1))
    for row, loss in enumerate(seen.losses):
        expected = cross_entropy(output.logits[row, :-1], ids[row, 1:])
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", generic())
def test_without_losses_the_forward_pass_ends_at_the_middle_layer(family: str) -> None:
    model, ids = tiny(family).train(), tokens()
    whole, passed = observe(model, ids), list[bool]()
    after = list(layers_of(model))[-1].register_forward_hook(lambda *_: passed.append(True))
    seen = observe(model, ids, with_losses=False)
    assert model.training and not passed and seen.losses is None
    assert torch.equal(seen.features, whole.features)
    assert len(seen) == 3 and seen.rows(torch.tensor([1])).losses is None
    assert Observation.concatenated([seen, whole]).losses is None
    after.remove()
    torch.testing.assert_close(observe(model, ids).losses, whole.losses)


@pytest.mark.parametrize(("layers", "middle"), [(1, 1), (2, 1), (4, 2), (5, 3)])
def test_the_middle_layer_ends_the_first_half(layers: int, middle: int) -> None:
    model = tiny_llama(num_hidden_layers=layers)
    expected = model.model.layers[middle - 1]
    assert _middle_layer(model) is expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_says_nothing(side: str) -> None:
    model, ids = tiny_llama(), tokens(length=11)
    filler = torch.full((3, 5), 7)
    parts = [filler, ids] if side == "left" else [ids, filler]
    mask = [torch.zeros_like(filler), torch.ones_like(ids)]
    padded, plain = (
        observe(model, torch.cat(parts, 1), torch.cat(mask if side == "left" else mask[::-1], 1)),
        observe(model, ids),
    )
    torch.testing.assert_close(padded.features, plain.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.losses, plain.losses, rtol=1e-5, atol=1e-6)


def test_a_wider_model_is_looked_at_along_the_same_directions() -> None:
    model, ids = tiny_llama(), tokens(batch=64)
    whole, some = observe(model, ids).features, observe(model, ids, max_features=20).features
    assert whole.shape == (64, 24) and some.shape == (64, 20)
    again = observe(model, ids[:3], max_features=20).features
    torch.testing.assert_close(again, some[:3])
    solution = torch.linalg.lstsq(whole, some).solution  # one linear map for all sequences
    torch.testing.assert_close(whole @ solution, some, rtol=1e-4, atol=1e-4)
    assert 0.7 < float(solution.square().sum() / 24) < 1.3


def test_what_is_only_read_is_left_out() -> None:
    model, ids = tiny_llama(), tokens(length=9)
    labels = ids.clone()
    labels[:, :4] = -100
    seen = observe(model, ids, labels=labels)
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
    assert float(seen.losses.mean()) == pytest.approx(float(output.loss), rel=1e-5)
    torch.testing.assert_close(seen.features, output.hidden_states[2][:, 4:].mean(dim=1))


def test_what_is_no_batch_is_refused() -> None:
    model, ids = tiny_llama(), tokens(length=5)
    with pytest.raises(TritterError, match=r"sequences \[1\]"):
        observe(model, ids, torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]))
    with pytest.raises(RequestError, match="Linear has no decoder layers"):
        observe(torch.nn.Linear(2, 2), ids)
    losses, features = torch.ones(3), torch.ones(3, 4)
    for wrong in (
        {"losses": losses[:2], "features": features},
        {"losses": losses.unsqueeze(1), "features": features},
        {"losses": losses, "features": features[0]},
        {"losses": losses / 0, "features": features},
        {"losses": losses[:0], "features": features[:0]},
    ):
        with pytest.raises(TritterError):
            Observation(**wrong)


def test_batches_of_processes_are_joined_and_parted() -> None:
    model, ids = tiny_llama(), tokens(batch=4)
    whole = observe(model, ids)
    parts = Observation.concatenated([observe(model, ids[:2]), observe(model, ids[2:])])
    torch.testing.assert_close(parts.features, whole.features)
    assert torch.equal(whole.rows(torch.tensor([3])).features, whole.features[3:])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_features_are_float32_in_every_precision(precision: str) -> None:
    """Lightning's contexts change autocast, or the default type of new tensors."""
    directions.cache_clear()
    contexts = {
        "bf16-mixed": MixedPrecision("bf16-mixed", "cpu"),
        "bf16-true": HalfPrecision("bf16-true"),
        "64-true": DoublePrecision(),
    }
    model, ids = tiny_llama(), tokens()
    plain = observe(model, ids, max_features=20)
    context = contexts[precision]
    directions.cache_clear()
    with context.forward_context():
        seen = observe(context.convert_module(model), ids, max_features=20)
    assert seen.features.dtype == torch.float32 and seen.losses.dtype == torch.float64
    torch.testing.assert_close(seen.features, plain.features, rtol=0, atol=0.2)

"""The Fisher compared with a loop over examples, and with its definition."""

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.oracle.families import SPARSE, tiny
from tritter.methods.forgetting import quadratic
from tritter.methods.forgetting.quadratic import _has_experts, diagonal_fisher


def looped(model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
    """One backward pass per sequence, squared, averaged."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sequence in sequences:
        for name, gradient in oracle.gradients(model, sequence.unsqueeze(0)).items():
            total[name] += gradient.square()
    return {name: value / len(sequences) for name, value in total.items()}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_equals_the_loop(tied: bool, batch_size: int) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=tied, attention_bias=True)
    sequences = oracle.tokens(batch=10)
    fisher = diagonal_fisher(model, sequences, batch_size=batch_size)
    slow = looped(model, sequences)
    assert set(fisher) == set(slow)
    for name, value in slow.items():
        assert float((fisher[name] - value).norm() / value.norm()) < 1e-5, name


def test_squaring_the_batch_mean_is_too_small_by_about_the_batch() -> None:
    """Negative control: a common but wrong estimator."""
    model = oracle.tiny_llama()
    sequences = oracle.tokens(batch=16)
    fisher = diagonal_fisher(model, sequences)
    wrong = {name: g.square() for name, g in oracle.gradients(model, sequences).items()}
    ratio = sum(float(v.sum()) for v in fisher.values()) / sum(
        float(v.sum()) for v in wrong.values()
    )
    assert 4 < ratio < 32


def test_true_fisher_is_the_expectation_over_the_models_own_labels() -> None:
    """Two positions, five tokens: the expectation is summed in full."""
    model = oracle.tiny_llama(
        vocab_size=5,
        hidden_size=8,
        num_attention_heads=2,
        head_dim=4,
        num_hidden_layers=1,
        num_key_value_heads=2,
        intermediate_size=8,
    )
    sequence = torch.tensor([[3, 1]])
    chances = oracle.logits(model, sequence)[0, 0].softmax(dim=-1)
    expected = 0.0
    for token, chance in enumerate(chances.tolist()):
        gradient = oracle.gradients(model, torch.tensor([[3, token]]))
        expected += chance * float(gradient["lm_head.weight"].square().sum())
    many = sequence.repeat(4000, 1)
    fisher = diagonal_fisher(model, many, batch_size=500, estimator="true", seed=1)
    assert float(fisher["lm_head.weight"].sum()) == pytest.approx(expected, rel=0.05)
    empirical = diagonal_fisher(model, sequence)
    assert float(empirical["lm_head.weight"].sum()) != pytest.approx(expected, rel=0.05)


def test_the_model_is_left_as_it_was() -> None:
    model = oracle.tiny_llama().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    diagonal_fisher(model, oracle.tokens(batch=2))
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    sparse = tiny("qwen3_moe").train()
    diagonal_fisher(sparse, oracle.tokens(batch=2))
    assert sparse.training
    assert all(p.grad is None and p.requires_grad for p in sparse.parameters())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", SPARSE)
def test_experts_are_taken_sequence_by_sequence(family: str, tied: bool) -> None:
    """Routing depends on the data, which vmap cannot follow."""
    model = tiny(family, tie_word_embeddings=tied)
    assert _has_experts(model)
    sequences = oracle.tokens(batch=6)
    fisher = diagonal_fisher(model, sequences, batch_size=4)
    slow = looped(model, sequences)
    assert set(fisher) == set(slow)
    for name, value in slow.items():
        assert float((fisher[name] - value).norm() / value.norm()) < 1e-5, name


def test_an_expert_without_tokens_has_none() -> None:
    model = tiny("mixtral", num_local_experts=8, num_experts_per_tok=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[5] = 0.0
        model.model.layers[0].mlp.gate.weight[:5] = torch.randn(5, 24) * 9
    fisher = diagonal_fisher(model, oracle.tokens(batch=1, length=5))
    experts = fisher["model.layers.0.mlp.experts.down_proj"].flatten(1).sum(dim=1)
    assert 0 < int((experts == 0).sum()) < 8
    assert all(value.isfinite().all() for value in fisher.values())


@pytest.mark.parametrize("estimator", ["empirical", "true"])
def test_the_two_ways_agree(estimator: str) -> None:
    """A dense model, measured with both implementations."""
    model = oracle.tiny_llama()
    sequences = oracle.tokens(batch=4)
    at_once = diagonal_fisher(model, sequences, estimator=estimator)  # type: ignore[arg-type]
    model.config.model_type = "mixtral"
    looped_over = diagonal_fisher(model, sequences, estimator=estimator)  # type: ignore[arg-type]
    for name, value in at_once.items():
        assert float((looped_over[name] - value).norm() / value.norm()) < 1e-5, name


def test_a_large_model_is_read_sequence_by_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient of a batch is a copy of the weights: 8 of them were 14 copies at the peak."""
    rows = list[int]()
    monkeypatch.setattr(quadratic, "_add_squares", lambda *given: rows.append(len(given[3])))
    diagonal_fisher(oracle.tiny_llama(), oracle.tokens(batch=3))
    monkeypatch.setattr(quadratic, "_MANY_VALUES", 1)
    diagonal_fisher(oracle.tiny_llama(), oracle.tokens(batch=3))
    assert rows == [3, 1, 1, 1]

"""What `kronecker.py` computes, beside the same by other paths; prints nothing if all is well.

python experiments/2026-11-21_kronecker/check_kronecker.py
"""

import torch
from kronecker import Kronecker, fisher_factors, linear_layers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.training import Task

LAMBDA = 7.0


def tiny() -> nn.Module:
    """A Llama of one layer with an output head of its own, in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double()


def held(model: nn.Module, sequences: Tensor, *, looks: str = "mean") -> Kronecker:
    """Return a method that holds the present weights by one look at them."""
    method = Kronecker(strength=LAMBDA, num_sequences=9, refresh_steps=10, looks=looks)
    method.begin_task(model, Task(seed=0, old_sequences={"old": sequences}))
    assert method.observe_step(model, 0) > 0
    return method


def moved(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Move weights at random; return by how much."""
    generator = torch.Generator().manual_seed(1)
    moves = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                move = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                moves[name] = move
                parameter += move
    return moves


def exact_form(model: nn.Module, sequences: Tensor, moves: dict[str, Tensor]) -> float:
    """Return λ/2 Σ over layers of the mean over sequences of (gradient · move)²."""
    total = 0.0
    for sequence in sequences:
        model.zero_grad()
        model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        for name, move in moves.items():
            total += float((model.get_parameter(name).grad * move).sum() ** 2) / len(sequences)
    return LAMBDA / 2 * total


def check_exact_where_one_token_is_seen() -> None:
    """One sequence of one labelled token: the Fisher of a layer is one product A ⊗ G."""
    for count, is_exact in ((1, True), (4, False)):  # of four it is not: the control
        model = tiny()
        sequences = torch.randint(0, 11, (count, 2), generator=torch.Generator().manual_seed(2))
        method = held(model, sequences)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        moves = moved(model, set(method.factors))
        penalty = method.logged_loss(model)
        model.load_state_dict(start)
        wanted = exact_form(model, sequences, moves)
        # Losses of transformers are float32 in part
        assert (abs(penalty / wanted - 1) < 1e-4) == is_exact, (count, penalty, wanted)


def check_factors_of_many_tokens() -> None:
    """A and G of the head, whose inputs and gradients are written out; all else is `ewc`'s."""
    model = tiny()
    sequences = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(3))
    factors, diagonal = fisher_factors(model, sequences)
    with torch.no_grad():
        hidden = model.model(input_ids=sequences[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden)
        right = nn.functional.one_hot(sequences[:, 1:], 11)
        delta = (logits.softmax(dim=-1) - right) / 5
    inputs, outputs = (f[0] for f in factors["lm_head.weight"])
    torch.testing.assert_close(
        inputs, torch.einsum("nti,ntj->ij", hidden, hidden) / 15, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        outputs, torch.einsum("nti,ntj->ij", delta, delta) / 3, rtol=1e-5, atol=1e-7
    )
    wanted = diagonal_fisher(model.float(), sequences)
    assert set(diagonal) | set(factors) == set(wanted) and not set(diagonal) & set(factors)
    for name, value in diagonal.items():
        torch.testing.assert_close(value.float(), wanted[name], rtol=1e-3, atol=1e-7)


def check_a_tied_head_is_no_layer_of_its_own() -> None:
    model = tiny()
    assert "lm_head.weight" in linear_layers(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert len(linear_layers(model)) == 7


def check_gradient_by_finite_differences() -> None:
    """After a second look elsewhere, for both ways to join them."""
    sequences = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(4))
    for looks, held_pairs in (("mean", 1), ("each", 2)):
        model = tiny()
        method = held(model, sequences, looks=looks)
        every = {name for name, _ in model.named_parameters()}
        moved(model, every)
        method.observe_step(model, 10)
        assert {len(a) for a, _ in method.factors.values()} == {held_pairs}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.add_to_gradients(model)
        for name in sorted(every):
            parameter = model.get_parameter(name)
            entry = (-1,) * parameter.ndim
            with torch.no_grad():
                parameter[entry] += 1e-4
                above = method.logged_loss(model)
                parameter[entry] -= 2e-4
                below = method.logged_loss(model)
                parameter[entry] += 1e-4
            slope = (above - below) / 2e-4
            assert abs(slope - float(parameter.grad[entry])) <= 1e-6 * max(1, abs(slope)), name


def main() -> None:
    check_exact_where_one_token_is_seen()
    check_factors_of_many_tokens()
    check_a_tied_head_is_no_layer_of_its_own()
    check_gradient_by_finite_differences()


if __name__ == "__main__":
    main()

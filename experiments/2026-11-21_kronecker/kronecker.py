"""EWC with Kronecker factors (Martens & Grosse 2015, arXiv 1503.05671) instead of a diagonal.

Of each linear layer without a bias the Fisher is A ⊗ G, and the penalty λ/2 tr(ΔWᵀ G ΔW A): tokens
count as independent of one another (the "expand" form of arXiv 2311.00636), so that A is the mean
of a aᵀ over tokens, and G the mean over sequences of Σ δ δᵀ over tokens, where δ is the gradient of
the sequence's mean token loss with respect to what the layer returns. All else (embeddings, a head
that is tied to them, norms) has the diagonal Fisher of single sequences, as `ewc` has.

Both are taken at the grown model, and again while that trains, at the steps at which `ewc` looks.
Of a diagonal the larger stands, entry by entry. Two products A ⊗ G have no larger one of their
kind: either A and G are averaged, each by itself (`looks=mean`), or the looks' penalties are
added (`looks=each`), which costs as many products per step as there were looks.

    PYTHONPATH=experiments/2026-11-21_kronecker python train.py \
        --config-dir experiments/2026-11-21_kronecker/conf expansion=dus forgetting=kronecker
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tritter.core.families import training_flops
from tritter.core.models import model_of
from tritter.errors import TritterError
from tritter.evaluation.inference import device_of, preserve_modes
from tritter.methods.forgetting.quadratic import QuadraticPenalty
from tritter.options import Count, options
from tritter.training import Needs, Task

if TYPE_CHECKING:
    from tritter.transform import Change

Factors = dict[str, tuple[Tensor, Tensor]]  # weight's name → A [K, in, in], G [K, out, out]


@options
class KroneckerOptions:
    """How firm the pull is, and how the looks come together."""

    strength: Annotated[float, Field(ge=0)] = 2e3
    num_sequences: Count = 256
    refresh_steps: Count = 10
    looks: Literal["mean", "each"] = "mean"


class Kronecker(QuadraticPenalty):
    """Elastic weight consolidation with Kronecker factors.

    Args:
        strength: λ.
        num_sequences: that the factors are averaged over.
        refresh_steps: they are taken again after so many steps, twice as many, and so on.
        looks: `mean` or `each`.
    """

    name = "kronecker"
    Options = KroneckerOptions

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength = self.options.strength
        self.factors: Factors = {}
        self.num_looks = 0

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(old_text=True, copies=3)  # anchors; factors of square matrices take about two

    def begin_task(self, model: nn.Module, task: Task) -> None:
        self._sequences = task.draw(self.options.num_sequences, "fisher")
        self.anchor = {name: p.detach().clone() for name, p in model.named_parameters()}

    def observe_step(self, model: nn.Module, step: int) -> float:
        flops = self._step_flops() if step else 0.0
        times, rest = divmod(step, self.options.refresh_steps)
        if rest or times.bit_count() > 1:
            return flops
        factors, diagonal = fisher_factors(model, self._sequences)
        for name, value in diagonal.items():
            self.importance[name] = torch.maximum(self.importance.get(name, value), value)
        self.factors = {n: self._joined(n, pair) for n, pair in factors.items()}
        self.num_looks += 1
        return flops + self._look_flops(model)

    def _joined(self, name: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a layer's factors of all looks, the latest included."""
        if name not in self.factors:
            return pair
        held, share = self.factors[name], 1 / (self.num_looks + 1)
        if self.options.looks == "mean":
            return held[0].lerp(pair[0], share), held[1].lerp(pair[1], share)
        return torch.cat([held[0], pair[0]]), torch.cat([held[1], pair[1]])

    def _pull(self, name: str, weight: Tensor) -> Tensor:
        """Return Σ G ΔW A over the looks that are held, [out, in]."""
        inputs, outputs = self.factors[name]
        return (outputs @ (weight.detach() - self.anchor[name]) @ inputs).sum(dim=0)

    def add_to_gradients(self, model: nn.Module) -> None:
        super().add_to_gradients(model)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self.factors:
                parameter.grad.add_(self._pull(name, parameter), alpha=self.strength)

    def logged_loss(self, model: nn.Module) -> float:
        """Return λ/2 (Σ tr(ΔWᵀ G ΔW A) + Σ F (θ − θ*)²)."""
        total = super().logged_loss(model)
        for name, parameter in model.named_parameters():
            if name in self.factors:
                moved = parameter.detach() - self.anchor[name]
                product = (moved * self._pull(name, parameter)).sum(dtype=torch.float64)
                total += 0.5 * self.strength * float(product)
        return total

    def parameters_changed(self, change: "Change") -> None:
        raise TritterError("forgetting=kronecker can't follow a model that grows while it trains.")

    def state_dict(self) -> dict[str, Any]:
        factors = {name: list(pair) for name, pair in self.factors.items()}
        return {**super().state_dict(), "factors": factors, "num_looks": self.num_looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.factors = {name: (pair[0], pair[1]) for name, pair in state["factors"].items()}
        self.num_looks = state["num_looks"]

    def _step_flops(self) -> float:
        """Return what the penalty's gradient takes in a step: G ΔW A of every layer."""
        sizes = [(len(a), a.shape[1], g.shape[1]) for a, g in self.factors.values()]
        return float(sum(2 * k * i * o * (i + o) for k, i, o in sizes))

    def _look_flops(self, model: nn.Module) -> float:
        """Return a training step's without weight gradients of linear layers, and the factors'."""
        count, length = self._sequences.shape
        sizes = [(a.shape[1], g.shape[1]) for a, g in self.factors.values()]
        products = sum(2 * (i * i + o * o - i * o) for i, o in sizes)
        length -= 1  # the last token is a label only
        return count * (training_flops(model_of(model)).of(length) + length * products)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return weight's name → layer, of linear layers without a bias or tied weights."""
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[parameter] = uses.get(parameter, 0) + 1
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is None and uses[module.weight] == 1
    }


def fisher_factors(model: nn.Module, sequences: Tensor) -> tuple[Factors, dict[str, Tensor]]:
    """Take the factors of linear layers and the diagonal Fisher of all else, by the text's labels.

    Args:
        model: `model(input_ids=[1, T], use_cache=False).logits` is [1, T, V], and causal.
        sequences: integers [N, T + 1].

    Returns:
        Weight's name → A [1, in, in], G [1, out, out]; name of any other parameter → diagonal.
    """
    layers = linear_layers(model)
    others = {n: p for n, p in model.named_parameters() if n not in layers and p.requires_grad}
    diagonal = {name: torch.zeros_like(p) for name, p in others.items()}
    factors = {
        name: tuple(layer.weight.new_zeros(1, size, size) for size in layer.weight.shape[::-1])
        for name, layer in layers.items()
    }
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        stack.enter_context(preserve_modes(model))
        stack.enter_context(torch.enable_grad())
        for name, layer in layers.items():
            handle = layer.register_forward_hook(partial(_remember, seen, name))
            stack.callback(handle.remove)
        model.eval()
        for sequence in sequences.long().to(device_of(model)):
            logits = model(input_ids=sequence[None, :-1], use_cache=False).logits[0]  # [T, V]
            loss = nn.functional.cross_entropy(logits.float(), sequence[1:])
            returned = [seen[name][1] for name in layers]
            gradients = torch.autograd.grad(loss, [*returned, *others.values()])
            for name, delta in zip(layers, gradients, strict=False):
                _add_squares(factors[name][0], seen[name][0], 1 / (len(sequence) - 1))
                _add_squares(factors[name][1], delta, 1.0)
            for name, gradient in zip(others, gradients[len(layers) :], strict=True):
                diagonal[name] += gradient.square()
    count = len(sequences)
    return (
        {name: (a / count, g / count) for name, (a, g) in factors.items()},
        {name: value / count for name, value in diagonal.items()},
    )


def _remember(
    seen: dict[str, tuple[Tensor, Tensor]],
    name: str,
    layer: nn.Module,
    given: tuple[Tensor],
    returned: Tensor,
) -> None:
    seen[name] = (given[0].detach(), returned)


def _add_squares(total: Tensor, rows: Tensor, share: float) -> None:
    """Add share · Σ v vᵀ over tokens; rows [1, T, D], total [1, D, D]."""
    total.baddbmm_(rows.transpose(1, 2), rows, alpha=share)

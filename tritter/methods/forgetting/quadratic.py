"""Quadratic penalties: ½ λ Σ importance · (θ − θ*)², the common form of L2-SP and EWC.

The gradient of the penalty is added directly instead of a term in the loss. The step is the same,
without a second graph over all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from tritter.core.families import find_family
from tritter.data.packing import IGNORED, DocumentMask, labels_of
from tritter.errors import RequestError
from tritter.evaluation.inference import preserve_modes
from tritter.seeds import derived_seed
from tritter.training import ForgettingMethod, Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change

_Estimator = Literal["empirical", "true"]
# Gradient values per batch: more are bound by memory, fewer by call overhead
_MAX_GRADIENT_VALUES, _MANY_VALUES = 2**19, 2**23
_TOKENS = 128  # per sequence


class QuadraticPenalty(ForgettingMethod):
    """Pull every parameter towards its anchor, weighted by its importance.

    A method sets both by parameter name when a task begins; a parameter without them is free.
    """

    kind = "fisher"  # the rule that maps an importance through an expansion
    importance_key = "importance"  # key in `state_dict`
    strength: float  # λ, set by the method from its options

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.anchor: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}

    def anchor_weights(self, model: nn.Module, importance: Mapping[str, Tensor]) -> None:
        """Set the current weights as anchors, for every parameter that has an importance."""
        import torch

        for name, parameter in model.named_parameters():
            if name in importance:
                self.anchor[name] = parameter.detach().clone()
                # Squares of gradients are too small for float16
                dtype = torch.float32 if parameter.dtype == torch.float16 else parameter.dtype
                self.importance[name] = importance[name].to(parameter.device, dtype)

    def importance_on(self, model: nn.Module, batches: Iterable[Tensor]) -> Values:
        """Estimate the importance of every parameter on old data, at the present weights.

        Args:
            batches: integers [N, T] each; sequences of different length come in different batches.
        """
        raise NotImplementedError(f"{self.name} has no importance to estimate on data")

    def penalty(self, model: nn.Module) -> Tensor:
        """Return ½ λ Σ importance · (θ − θ*)² as a scalar with its graph, in float32 at least."""
        import torch

        total = torch.zeros((), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name not in self.importance:
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)
            moved = (parameter - self.anchor[name].to(parameter.device)).to(wide)
            term = (self.importance[name].to(moved) * moved.square()).sum()
            total = total.to(term) + term
        return 0.5 * self.strength * total

    def add_to_gradients(self, model: nn.Module) -> None:
        """Add λ · importance · (θ − θ*) to the gradient of every parameter that has a gradient."""
        for name, parameter in model.named_parameters():
            if parameter.grad is None or name not in self.importance:
                continue
            pull = (parameter.detach() - self.anchor[name]) * self.importance[name]
            parameter.grad.add_(pull, alpha=self.strength)

    def logged_loss(self, model: nn.Module) -> float:
        """Return ½ λ Σ importance · (θ − θ*)², summed in float64."""
        import torch

        total = torch.zeros((), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            if name in self.importance:
                moved = parameter.detach() - self.anchor[name]
                importance = self.importance[name]
                if moved.device.type == "mps":  # MPS has no float64
                    moved, importance = moved.cpu(), importance.cpu()
                total += (importance * moved.double().square()).sum().cpu()
        return 0.5 * self.strength * float(total)

    def parameters_changed(self, change: Change) -> None:
        """Map anchors as weights, and importances by their rule; new entries are free."""
        import torch

        # A map may copy from entries without an anchor: their importance is zero, so zeros will do
        unanchored = (stored for stored in change.before if stored.name not in self.anchor)
        device = next((value.device for value in self.anchor.values()), None)
        zeros = {stored.name: torch.zeros(stored.shape, device=device) for stored in unanchored}
        anchor = change.state("anchor", zeros | self.anchor)
        importance = change.state(self.kind, self.importance)
        self.anchor = {name: anchor[name] for name in importance if name in anchor}
        self.importance = {name: importance[name] for name in self.anchor}

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor, self.importance_key: self.importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.importance = self._to_device(state[self.importance_key])
        self.anchor = self._to_device(state["anchor"])

    def _to_device(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return saved values on the device of the anchors that `begin_task` has set."""
        device = next((value.device for value in self.anchor.values()), None)
        return {name: value.to(device) for name, value in values.items()}


# The diagonal Fisher information of a causal language model, from per-sequence gradients.
#
# F = E[(∂L/∂θ)²], where L is the mean next-token loss of one sequence. Squaring the gradient of a
# batch mean instead gives about F / B for a batch of B (arXiv 2502.11756 compares common
# estimators). `empirical` uses the tokens of the data as labels; `true` samples the labels from
# the model itself, which gives the Fisher in the strict sense.


def diagonal_fisher(
    model: nn.Module,
    sequences: Tensor,
    *,
    batch_size: int | None = None,
    estimator: _Estimator = "empirical",
    seed: int = 0,
    numbers: range | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher of every parameter.

    Args:
        model: `model(input_ids=[B, T], use_cache=False).logits` is [B, T, V]; it runs in evaluation
            mode, so dropout is off.
        sequences: integers [N, T].
        batch_size: sequences whose gradients are in memory at once. None: 8, and up to 32 for a
            small model, of 128 tokens; fewer if they are longer. A model with 8 M parameters or
            more, experts or document masks processes one sequence at a time.
            The result does not depend on it.
        estimator: `empirical` or `true`.
        seed: seed of the labels that `true` samples.
        numbers: of the sequences in a larger sample, whose labels do not depend on how processes
            share it. None: these are all.
        progress: called with (sequences done, sequences in total) after each batch.

    Returns:
        Parameter name → float32 tensor of the parameter's shape, averaged over the sequences. A
        tied parameter appears once, with the gradients of both roles summed.
    """
    import torch

    parameters = {name: p.detach().float() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    if batch_size is None:
        num_values = sum(p.numel() for p in parameters.values())
        batch_size = min(32, max(8, _MAX_GRADIENT_VALUES // num_values))
        batch_size = max(1, min(batch_size, batch_size * _TOKENS // sequences.shape[1]))
        batch_size = 1 if num_values >= _MANY_VALUES else batch_size
    generator, done = torch.Generator(), 0
    numbers = range(len(sequences)) if numbers is None else numbers
    # Neither compiled code nor autocast in a forward pass takes part in per-sequence gradients
    is_eager = torch.compiler.set_stance("force_eager")
    with preserve_modes(model), is_eager, _without_accelerate(model):
        model.eval()
        for batch in sequences.split(batch_size):
            input_ids = batch.long().to(next(iter(parameters.values())).device)
            labels = labels_of(model, input_ids)[:, 1:]  # [B, T - 1]
            if estimator == "true":
                with torch.no_grad():
                    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
                rows: list[Tensor] = []
                chances = logits.float().softmax(dim=-1).cpu()
                for number, own in zip(numbers[done:], chances, strict=False):
                    generator.manual_seed(derived_seed(seed, "labels", number))
                    rows.append(torch.multinomial(own, 1, generator=generator)[:, 0])
                drawn = torch.stack(rows).to(input_ids.device)
                labels = drawn.masked_fill(labels == IGNORED, IGNORED)
            _add_squares(total, model, parameters, input_ids, labels)
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))
    return {name: value.div_(len(sequences)) for name, value in total.items()}


@contextmanager
def _without_accelerate(model: nn.Module) -> Iterator[None]:
    """Remove for a while the forward pass with autocast that `Accelerator.prepare` has set."""
    patched = model.__dict__.get("forward")
    if patched is not None and "_original_forward" in model.__dict__:
        model.__dict__["forward"] = model._original_forward
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched


def mean_over(batches: Iterable[Tensor], estimate: Callable[[Tensor], Values]) -> dict[str, Tensor]:
    """Return the mean of estimates on batches [N, T], each weighted by its N; empty of no batch."""
    total: dict[str, Tensor] = {}
    count = 0
    for sequences in batches:
        for name, value in estimate(sequences).items():
            value.mul_(len(sequences))
            total[name] = total[name].add_(value) if name in total else value
        count += len(sequences)
    return {name: value.div_(count) for name, value in total.items()}


def _has_experts(model: nn.Module) -> bool:
    """Return True if tokens are routed to experts, or may be, so that the data steer the pass."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    family = find_family(model_type)
    return family.has_experts if family is not None else bool(model_type)


def _add_squares(
    total: Values, model: nn.Module, parameters: Values, input_ids: Tensor, labels: Tensor
) -> None:
    """Add the squared gradient of each sequence."""
    import torch
    from torch.func import grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Neither routing nor finding document boundaries nor `requires_grad_`, in the hook of gradient
    # checkpointing, has a batching rule; alone, a sequence is faster with the fused kernels
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    is_batch = len(input_ids) > 1 and not getattr(embeddings, "_forward_hooks", ())
    if is_batch and not _has_experts(model) and DocumentMask.of(model) is None:
        per_sequence = vmap(grad(_sequence_loss, argnums=1), in_dims=(None, None, 0, 0))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            gradients = per_sequence(model, parameters, input_ids, labels)
        for name, gradient in gradients.items():
            total[name].add_(gradient.square().sum(dim=0))
        return
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    for sequence, wanted in zip(input_ids, labels, strict=True):
        with torch.enable_grad():
            loss = _sequence_loss(model, leaves, sequence, wanted)
        # An expert that received no token has no gradient
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for name, gradient in zip(leaves, found, strict=True):
            total[name].addcmul_(gradient, gradient)


def _sequence_loss(
    model: nn.Module, parameters: Values, input_ids: Tensor, labels: Tensor
) -> Tensor:
    """Return the mean next-token loss of one sequence; input_ids [T], labels [T - 1] or IGNORED."""
    if hasattr(model, "peft_config"):
        raise RequestError(
            "the importance of weights can't be estimated with adapters (LoRA experts) on the "
            "model; use l2sp or replay, or merge them first."
        )
    from torch import nn
    from torch.func import functional_call

    arguments = {"input_ids": input_ids.unsqueeze(0), "use_cache": False}
    logits = functional_call(model, dict(parameters), (), arguments).logits[0]  # [T, V]
    return nn.functional.cross_entropy(logits[:-1].float(), labels, ignore_index=IGNORED)

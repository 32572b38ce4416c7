"""New experts that learn from a teacher (Hinton et al. 2015, arXiv 1503.02531) before they open.

All tokens are sent to the new experts meanwhile, by closing the others; only the new experts are
trained. Afterwards the offsets are what they were: closed experts stay closed, and the model
computes what it did.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.adaptation.separate import separate_experts
from tritter.adaptation.stages import Batch, checked_experts, descend, epochs_of
from tritter.adaptation.trainable import only_trainable
from tritter.errors import RequestError
from tritter.models import config_of
from tritter.routing import Routing
from tritter.training import OptimiserSettings, RoutingObjective, RoutingSettings
from tritter.training.parameters import NEW


def distill_experts(
    model: nn.Module,
    teacher: nn.Module,
    new_expert_indices: Sequence[int],
    domain_dataloader: Iterable[Batch],
    epochs: int = 1,
    *,
    temperature: float = 2.0,
    auxiliary_loss: float = 0.01,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
) -> None:
    """Train new experts so that the model answers as a teacher does where they take every token.

    Args:
        model: a stock model with experts.
        teacher: a causal language model with the same vocabulary.
        new_expert_indices: the last ones of each layer, at least as many as a token is sent to.
        domain_dataloader: `{"input_ids": integers [B, T]}`.
        temperature: of both models' probabilities.
        auxiliary_loss: weight of the load balancing loss among the new experts.

    Raises:
        RequestError: no such experts, too few of them, or another vocabulary.
    """
    experts = checked_experts(model, new_expert_indices)
    vocabularies = [config_of(each)["vocab_size"] for each in (model, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise RequestError(
            f"expansion.moe_add.teacher has a vocabulary of {vocabularies[1]} tokens, the model "
            f"one of {vocabularies[0]}; allowed is a teacher with the same tokenizer."
        )
    teacher.eval().to(next(model.parameters()).device)

    def loss(student: nn.Module, input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=input_ids, use_cache=False).logits
        said = student(input_ids=input_ids, use_cache=False).logits
        return soft_divergence(wanted, said, temperature=temperature)

    settings = RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=0.0)
    objective = RoutingObjective(model, settings)
    with (
        _only(model, experts),
        separate_experts(model, experts[0]),
        only_trainable(model, lambda name: name.endswith(NEW)),
    ):
        descend(
            model,
            epochs_of(domain_dataloader, epochs),
            objective,
            replay=None,
            optimiser=OptimiserSettings(weight_decay=weight_decay),
            learning_rate=learning_rate,
            before_step=lambda step: None,
            batch_loss=loss,
        )


def soft_divergence(wanted: Tensor, said: Tensor, *, temperature: float) -> Tensor:
    """Return T² · KL(wanted ‖ said) at temperature T, nats per token; logits [B, T, V]."""
    goal = (wanted.float() / temperature).log_softmax(dim=-1).flatten(0, 1)
    log_said = (said.float() / temperature).log_softmax(dim=-1).flatten(0, 1)
    return temperature**2 * F.kl_div(log_said, goal, reduction="batchmean", log_target=True)


@contextmanager
def _only(model: nn.Module, experts: Sequence[int]) -> Iterator[None]:
    """Send all tokens to some experts inside the block.

    Raises:
        RequestError: they are fewer than a token is sent to.
    """
    routing = Routing.of(model)
    assert routing is not None
    if len(experts) < routing.top_k:
        raise RequestError(
            f"expansion.moe_add.num_experts = {len(experts)}: init=distill sends every token to "
            f"{routing.top_k} of the new experts; allowed is at least {routing.top_k}."
        )
    before = routing.state_dict()
    try:
        routing.set_offset(experts, 0.0)
        routing.set_offset(range(experts[0]), -torch.inf)
        yield
    finally:
        routing.load_state_dict(before)

"""New experts that learn from a teacher (Hinton et al. 2015, arXiv 1503.02531) before they open.

All tokens are sent to the new experts meanwhile, by closing the others; only the new experts are
trained. Afterwards the offsets are what they were: closed experts stay closed, and the model
computes what it did.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.core.families import forward_flops
from tritter.core.models import config_of
from tritter.core.stock_routers import Routing
from tritter.data.packing import kept_tokens
from tritter.errors import RequestError
from tritter.evaluation.inference import modes_kept
from tritter.methods.moe_routing.objective import RoutingObjective, RoutingSettings
from tritter.methods.moe_routing.stages import (
    Batch,
    LoaderBatches,
    checked_experts,
    fit_live,
    only_trainable,
    separate_experts,
)
from tritter.training import BaseModule, OptimizerSettings, Schedule
from tritter.training.module import TaskLoss
from tritter.training.parameters import StepFlops, flops_of_sequence


class DistillationModule(BaseModule):
    """Training of new experts, which take every token, to answer as a teacher does.

    Args:
        model: prepared by `only_new_experts`.
        teacher: a causal language model with the same vocabulary; it is not changed.
        new_experts: their indices.
        temperature: of both models' probabilities.
        auxiliary_loss: weight of the load balancing loss among the new experts.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        new_experts: Sequence[int],
        temperature: float,
        auxiliary_loss: float,
        schedule: Schedule,
        optimizer: OptimizerSettings,
    ) -> None:
        settings = RoutingSettings(auxiliary_loss=auxiliary_loss, z_loss=0.0)
        super().__init__(
            model,
            schedule=schedule,
            optimizer=optimizer,
            side_losses=[RoutingObjective(model, settings)],
        )
        self.new_experts = tuple(new_experts)
        self.temperature = temperature
        self._teacher = (teacher.eval(),)  # in a tuple it is no part of what is trained and saved

    def on_fit_start(self) -> None:
        self._teacher[0].to(self.device)

    def task_loss(self, batch: Mapping[str, Tensor]) -> TaskLoss:
        """Return the divergence from the teacher, nats per token."""
        (teacher,), input_ids = self._teacher, batch["input_ids"]
        with torch.no_grad():
            wanted = teacher(input_ids=input_ids, use_cache=False).logits
        said = self.model(input_ids=input_ids, use_cache=False).logits
        counted = kept_tokens(self.model, input_ids)
        both = (each if counted is None else each[counted][None] for each in (wanted, said))
        return TaskLoss(soft_divergence(*both, temperature=self.temperature), said)

    def step_flops(self) -> StepFlops:
        flops = forward_flops(config_of(self._teacher[0]))
        return StepFlops(flops + flops_of_sequence(self.model, routed_to=self.new_experts))


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
    seed: int = 0,
) -> None:
    """Train new experts so that the model answers as a teacher does where they take every token.

    Args:
        model: a stock model with experts.
        teacher: a causal language model with the same vocabulary.
        new_expert_indices: the last ones of each layer, at least as many as a token is sent to.
        domain_dataloader: `{"input_ids": integers [B, T]}`.
        temperature: of both models' probabilities.
        auxiliary_loss: weight of the load balancing loss among the new experts.
        seed: of what layers draw in training, as for dropout.

    Raises:
        RequestError: no such experts, too few of them, or another vocabulary.
    """
    experts = checked_experts(model, new_expert_indices)
    vocabularies = [config_of(each)["vocab_size"] for each in (model, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise RequestError(
            f"expansion.moe_add.teacher has a vocabulary of {vocabularies[1]} tokens, the model "
            f"one of {vocabularies[0]}; must be a teacher with the same tokenizer."
        )
    batches = LoaderBatches(domain_dataloader, epochs)
    with only_new_experts(model, experts), modes_kept(teacher):
        module = DistillationModule(
            model,
            teacher,
            new_experts=experts,
            temperature=temperature,
            auxiliary_loss=auxiliary_loss,
            schedule=Schedule.constant(learning_rate, max_steps=len(batches)),
            optimizer=OptimizerSettings(weight_decay=weight_decay),
        )
        fit_live(module, batches, seed=seed)


def soft_divergence(wanted: Tensor, said: Tensor, *, temperature: float) -> Tensor:
    """Return T² · KL(wanted ‖ said) at temperature T, nats per token; logits [B, T, V]."""
    goal = (wanted.float() / temperature).log_softmax(dim=-1).flatten(0, 1)
    log_said = (said.float() / temperature).log_softmax(dim=-1).flatten(0, 1)
    return temperature**2 * F.kl_div(log_said, goal, reduction="batchmean", log_target=True)


@contextmanager
def only_new_experts(model: nn.Module, experts: Sequence[int]) -> Iterator[None]:
    """Send all tokens to some experts inside the block, which alone are trained there.

    Raises:
        RequestError: they are fewer than a token is sent to.
    """
    routing = Routing.of(model)
    assert routing is not None
    if len(experts) < routing.top_k:
        raise RequestError(
            f"expansion.moe_add.num_experts = {len(experts)}: init=distill sends every token to "
            f"{routing.top_k} of the new experts; must be at least {routing.top_k}."
        )
    before = routing.state_dict()
    try:
        routing.set_offset(experts, 0.0)
        routing.set_offset(range(experts[0]), -torch.inf)
        with (
            separate_experts(model, experts[0]),
            only_trainable(model, lambda tensor: tensor.expert in experts),
        ):
            yield
    finally:
        routing.load_state_dict(before)

"""Distillation of new experts from a teacher (Hinton et al. 2015, arXiv 1503.02531) before opening.

During distillation all tokens are routed to the new experts, by closing the others; only the new
experts are trained. Afterwards the router offsets are restored: closed experts stay closed, and the
function of the model is unchanged.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.core.families import Flops, forward_flops
from tritter.core.models import model_of
from tritter.core.stock_routers import Routing
from tritter.data.packing import kept_tokens
from tritter.errors import RequestError
from tritter.evaluation.inference import preserve_modes
from tritter.methods.moe_routing.live import Batch, LoaderBatches, check_experts, fit_live
from tritter.methods.moe_routing.objective import RoutingObjective, RoutingSettings
from tritter.methods.moe_routing.separate import only_trainable, separate_experts
from tritter.training import BaseModule, OptimizerSettings, Schedule
from tritter.training.module import TaskLoss
from tritter.training.parameters import flops_of_sequence


class DistillationModule(BaseModule):
    """Training of new experts, which receive every token, to match a teacher.

    Args:
        model: prepared by `only_new_experts`.
        teacher: a causal language model with the same vocabulary; not changed.
        new_experts: indices of the new experts.
        temperature: of both models' probabilities.
        auxiliary_loss: weight of the load balancing loss among the new experts.
        schedule: of the learning rate.
        optimizer: its settings.
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
        self._teacher = (teacher.eval(),)  # in a tuple, so that it is not a submodule

    def on_fit_start(self) -> None:
        self._teacher[0].to(self.device)

    def task_loss(self, batch: Mapping[str, Tensor]) -> TaskLoss:
        """Return the divergence from the teacher in nats per token."""
        (teacher,), input_ids = self._teacher, batch["input_ids"]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=input_ids, use_cache=False).logits
        student_logits = self.model(input_ids=input_ids, use_cache=False).logits
        kept = kept_tokens(self.model, input_ids)
        both = (
            each if kept is None else each[kept][None] for each in (teacher_logits, student_logits)
        )
        return TaskLoss(soft_divergence(*both, temperature=self.temperature), student_logits)

    def step_flops(self) -> Flops:
        flops = forward_flops(model_of(self._teacher[0]))
        return flops + flops_of_sequence(self.model, routed_to=self.new_experts)


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
    """Train new experts to match a teacher while every token is routed to them.

    Args:
        model: a stock model with experts.
        teacher: a causal language model with the same vocabulary.
        new_expert_indices: the last experts of each layer, at least as many as experts per token.
        domain_dataloader: yields `{"input_ids": integers [B, T]}`.
        epochs: number of passes over it.
        temperature: of both models' probabilities.
        auxiliary_loss: weight of the load balancing loss among the new experts.
        learning_rate: constant learning rate.
        weight_decay: of AdamW.
        seed: seed of random layers in training, such as dropout.

    Raises:
        RequestError: the experts don't exist or are too few, or the vocabularies differ.
    """
    experts = check_experts(model, new_expert_indices)
    vocabularies = [model_of(each).config["vocab_size"] for each in (model, teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise RequestError(
            f"expansion.moe_add.teacher has a vocabulary of {vocabularies[1]} tokens, and the "
            f"model one of {vocabularies[0]}; use a teacher with the same tokenizer."
        )
    batches = LoaderBatches(domain_dataloader, epochs)
    with only_new_experts(model, experts), preserve_modes(teacher):
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


def soft_divergence(
    teacher_logits: Tensor, student_logits: Tensor, *, temperature: float
) -> Tensor:
    """Return T² · KL(teacher ‖ student) at temperature T, nats per token; logits [B, T, V]."""
    log_teacher = (teacher_logits.float() / temperature).log_softmax(dim=-1).flatten(0, 1)
    log_student = (student_logits.float() / temperature).log_softmax(dim=-1).flatten(0, 1)
    return temperature**2 * F.kl_div(
        log_student, log_teacher, reduction="batchmean", log_target=True
    )


@contextmanager
def only_new_experts(model: nn.Module, experts: Sequence[int]) -> Iterator[None]:
    """Context manager that routes all tokens to some experts, and trains only these.

    Raises:
        RequestError: they are fewer than the experts per token.
    """
    routing = Routing.of(model)
    assert routing is not None
    if len(experts) < routing.top_k:
        raise RequestError(
            f"expansion.moe_add.num_experts = {len(experts)}: init=distill routes every token to "
            f"{routing.top_k} of the new experts, so at least {routing.top_k} are required."
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

"""Distillation of new experts from a teacher (Hinton et al. 2015, arXiv 1503.02531) before opening.

During distillation all tokens are routed to the new experts, by closing the others; only the new
experts are trained. Afterwards the router offsets are restored: closed experts stay closed, and the
function of the model is unchanged.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.core.families import Flops, forward_flops
from tritter.core.models import model_of
from tritter.core.stock_routers import RouterControl
from tritter.data.packing import kept_tokens
from tritter.errors import RequestError
from tritter.methods.moe_routing.objective import RoutingObjective
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.training import BaseModule, OptimizerSettings, Schedule
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
        options = RoutingOptions(auxiliary_loss=auxiliary_loss, z_loss=0.0)
        super().__init__(
            model,
            schedule=schedule,
            optimizer=optimizer,
            side_losses=[RoutingObjective(model, options)],
        )
        self.new_experts = tuple(new_experts)
        self.temperature = temperature
        self._teacher = (teacher.eval(),)  # in a tuple, so that it is not a submodule

    def on_fit_start(self) -> None:
        self._teacher[0].to(self.device)

    def task_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the divergence from the teacher in nats per token, and the student's logits."""
        (teacher,), input_ids = self._teacher, batch["input_ids"]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=input_ids, use_cache=False).logits
        student_logits = self.model(input_ids=input_ids, use_cache=False).logits
        kept = kept_tokens(self.model, input_ids)
        both = (
            each if kept is None else each[kept][None] for each in (teacher_logits, student_logits)
        )
        return _soft_divergence(*both, temperature=self.temperature), student_logits

    def step_flops(self) -> Flops:
        flops = forward_flops(model_of(self._teacher[0]))
        return flops + flops_of_sequence(self.model, routed_to=self.new_experts)


def _soft_divergence(
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
    """Context manager that routes all tokens to some experts, and trains only these."""
    routing = RouterControl.of(model)
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
            SeparateExperts(model, experts[0]),
            only_trainable(model, lambda tensor: tensor.expert in experts),
        ):
            yield
    finally:
        routing.load_state_dict(before)

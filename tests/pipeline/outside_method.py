"""A third-party forgetting method that uses every input a method can request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tritter.core.parameter_map import Quantity
from tritter.core.parameter_map.carry import StateKind, register
from tritter.training import ForgettingMethod, Needs, Preparation, Prepared, Task

register("omega", StateKind(Quantity.SQUARED_GRADIENT, "zero"))


class Killed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Options:
    name: ClassVar[str] = "outside"
    strength: float = 10.0


class Outside(ForgettingMethod):
    """Squared gradients on old data, summed over all training runs, and a teacher."""

    name = "outside"
    dies_at: ClassVar[int | None] = None  # a step of a training, counted from one

    def __init__(self, *, strength: float) -> None:
        self.strength = strength
        self.steps = 0

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(
            old_text=True,
            prepares=("omega",),
            state=("omega", "path_integral"),
            leaves=("omega",),
            carried=True,
            teacher=True,
        )

    def prepare(self, preparation: Preparation) -> Prepared:
        ids = preparation.draw(4, "omega").long()
        loss = preparation.model(input_ids=ids, labels=ids, use_cache=False).loss
        names = [name for name, _ in preparation.model.named_parameters()]
        gradients = torch.autograd.grad(
            loss, list(preparation.model.parameters()), materialize_grads=True
        )
        omega = {name: g.square() for name, g in zip(names, gradients, strict=True)}
        for name, earlier in preparation.state.get("omega", {}).items():
            omega[name] = omega[name] + earlier
        preparation.log(f"omega of {len(ids)} sequences, after {len(preparation.state)} kinds")
        return Prepared(state={"omega": omega}, flops=7.0, found={"omega": len(ids)})

    def begin_task(self, model: nn.Module, task: Task) -> None:
        assert task.teacher is not None and not task.teacher.training
        assert not any(p.requires_grad for p in task.teacher.parameters())
        self.teacher = task.teacher
        self.omega = dict(task.state["omega"])
        self.path = task.state.get("path_integral", {})
        self.anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, mask in task.carried.items():
            new = self.omega.get(name, torch.zeros(mask.shape))[~mask]
            assert not bool(new.any()), "what is new has no omega"

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        ids = batch["input_ids"].long()
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits.softmax(dim=-1)
        message = model(input_ids=ids, use_cache=False).logits.log_softmax(dim=-1)
        return 0.1 * nn.functional.kl_div(message, wanted, reduction="batchmean") / ids.shape[1]

    def add_to_gradients(self, model: nn.Module) -> None:
        self.steps += 1
        if self.steps == self.dies_at:
            raise Killed
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self.omega:
                pull = self.omega[name] * (parameter.detach() - self.anchor[name])
                parameter.grad.add_(pull, alpha=self.strength)

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        return {"omega": self.omega}

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.anchor, self.steps = dict(state["anchor"]), state["steps"]

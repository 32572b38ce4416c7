"""A third-party forgetting method that uses every input a method can request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning import Callback
from torch import Tensor, nn

from tritter.checkpoints import ExpansionRecord, Source
from tritter.core.expansions import Width
from tritter.core.families import Model
from tritter.core.parameter_map import Quantity
from tritter.core.parameter_map.carry import StateKind, register
from tritter.training import (
    ForgettingMethod,
    Needs,
    Preparation,
    Prepared,
    Setting,
    SideLoss,
    Task,
    Trainee,
    surgery,
)
from tritter.transform.live import ModelExpander

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


class Widen(Callback):
    """Adds neurons to the model that is trained, after its third step."""

    report_name = "widened"

    def __init__(self) -> None:
        self.grown: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            before = pl_module.model.num_parameters()
            change = ModelExpander([Width(intermediate_size=80)], seed=1).change(pl_module.model)
            surgery.apply(trainer, pl_module, change, reason=self.report_name)
            added = pl_module.model.num_parameters() - before
            self.grown = {"step": 3, "added": added, "map": change.digest()}

    def report(self) -> dict[str, Any]:
        return self.grown

    def state_dict(self) -> dict[str, Any]:
        return dict(self.grown)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.grown = state_dict


class SmallLogits(SideLoss):
    """The mean square of the logits, as a third-party term of the loss."""

    dies_at: ClassVar[int | None] = None  # number of finished steps

    def loss(self, model: Any, batch: Any, *, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if step == self.dies_at:
            raise Killed
        ids = batch["input_ids"].long()
        term = model(input_ids=ids, use_cache=False).logits.square().mean()
        return 1e-3 * term, {"widening/logits": term.detach()}


class Widening(ForgettingMethod):
    """What neuron growth can do: freeze, add a loss, change the model, and record it."""

    name = "widening"
    whole_weights = "each process has a shard"
    last_weights = "the best weights may be narrow"

    loaded: ClassVar[list[str]] = []  # folders of checkpoints

    def peak_rate(self, configured: float, base: Model) -> float:
        return 0.5 * configured

    def load(self, source: Source) -> nn.Module:
        self.loaded.append(source.folder.name)
        model = super().load(source)
        model.register_buffer("loaded_by_widening", torch.ones(()), persistent=False)
        return model

    def attach(self, trainee: Trainee, setting: Setting) -> None:
        assert hasattr(trainee.model, "loaded_by_widening")
        assert setting.max_steps > 3 and set(setting.base_sequences()) == {"old"}
        trainee.model.get_input_embeddings().requires_grad_(False)
        trainee.side_losses += (SmallLogits(),)
        trainee.surgery_callbacks += (Widen(),)

    def lineage_records(
        self, before: Model, after: Model, reports: Mapping[str, Any]
    ) -> list[ExpansionRecord]:
        return [
            ExpansionRecord(
                timestamp="2026-11-27T00:00:00+00:00",
                expansion_type="width",
                method=self.name,
                options=self.plain(),
                seed=1,
                source_config=before.config,
                target_config=after.config,
                layer_sources=tuple(range(after.sizes.num_hidden_layers)),
                map_digest=reports["widened"]["map"],
                claims_exact=True,
                step0_error=None,
            )
        ]

    def summary(self, fits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"added": [fit["reports"]["widened"]["added"] for fit in fits]}

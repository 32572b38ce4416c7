"""The LightningModule of a mixture of LoRA experts: its losses and its saved state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import kl_div, log_softmax

from tritter.checkpoints.expert_files import AdapterShape
from tritter.core.families import Flops
from tritter.data.batches import num_ranks
from tritter.data.packing import IGNORED, kept_tokens, labels_of
from tritter.evaluation.inference import preserve_modes
from tritter.methods.experts.gates import Gates, Routing
from tritter.methods.experts.mixture import ExpertMixture
from tritter.training import BaseModule
from tritter.training.parameters import Journal


class ExpertModule(BaseModule):
    """Next-token training of the experts of a mixture; the base is frozen.

    Args:
        mixture: the experts on the trained model.
        losses: additional loss → its weight: `balance`, `entropy` and `z`, see `Gates`, and
            `distill`, of KL(mixture without the young expert ‖ mixture), nats per token. One
            without a weight is not computed.
        options: arguments of `BaseModule`.

    Attributes:
        gates: gates of the task's forward pass, without padding.
        share: tokens of this process, relative to the mean of all processes. A mean over tokens
            times its share, averaged over the processes, is the mean over the tokens of all.
        young: the expert that is distilled towards the mature ones; None: there is none.
    """

    def __init__(
        self, mixture: ExpertMixture, *, losses: Mapping[str, float] | None = None, **options: Any
    ) -> None:
        super().__init__(mixture.model, **options)
        self.mixture = mixture
        self.losses = {name: weight for name, weight in (losses or {}).items() if weight}
        self.young: str | None = None
        self.gates: list[Gates] = []
        self.share = 1.0
        self._logits: Tensor | None = None  # of the task's forward pass

    def task_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return loss and logits of the task, and store what the additional losses need."""
        loss, self._logits = super().task_loss(batch)
        kept = kept_tokens(self.model, batch["input_ids"])
        self.gates = self.mixture.gates(kept)  # a teacher's pass overwrites them
        self.share = 1.0 if kept is None else _share(kept)
        return loss, self._logits

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Return the loss of the task plus the additional losses, each of which is logged."""
        loss = super().training_step(batch, batch_index)
        found = dict[str, Tensor]()
        gates = self.gates if next(self.mixture.routers(), None) is not None else []
        for name in ("balance", "entropy", "z"):
            if name in self.losses and gates:
                values = [getattr(each, f"{name}_loss")() for each in gates]
                found[name] = self.share * torch.stack(values).mean()
        if "distill" in self.losses and self.young is not None:
            found["distill"] = self._distance(self.young, batch)
        for name, value in found.items():
            self.log_step_mean(f"experts/{name}_loss", value)
            loss = loss + self.losses[name] * value.to(loss.dtype)
        self._logits = None
        return loss

    @property
    def is_task_alone(self) -> bool:
        return super().is_task_alone and not self.losses.keys() - {"distill"}

    def step_flops(self) -> Flops:
        """Return the model FLOPs of a sequence, given the parameters that now need gradients."""
        sequence = self.mixture.step_flops()
        if "distill" in self.losses and self.young is not None:
            sequence = sequence + self.mixture.reading_flops()
        return sequence

    def reading_flops(self) -> Flops:
        """Return the model FLOPs of reading a sequence with the experts."""
        return self.mixture.reading_flops()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the journal, the names and sizes of the experts, and the trained parameters."""
        mixture = self.mixture
        shapes = {name: mixture.lora.shape(name) for name in mixture.adapters}
        routing = mixture.routing
        return super().get_extra_state() | {
            "experts": {
                "names": list(mixture.names),
                "order": list(mixture.lora.adapters),
                "shapes": {n: [s.rank, s.alpha, list(s.targets)] for n, s in shapes.items()},
                "routing": [routing.top_k, routing.temperature, routing.capacity_factor],
                "trained": [n for n, p in self.model.named_parameters() if p.requires_grad],
                "young": self.young,
            }
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Recreate the experts of a saved run with their final ranks, before weights are loaded."""
        saved, mixture = state["experts"], self.mixture
        shapes = {n: AdapterShape(r, a, tuple(t)) for n, (r, a, t) in saved["shapes"].items()}
        if saved["order"] != list(mixture.lora.adapters) or any(
            shape != mixture.lora.shape(name) for name, shape in shapes.items()
        ):
            # Recreate all in their original order: optimizers match state by position
            for name in mixture.lora.adapters:
                mixture.close(name)
            for name in saved["order"]:
                mixture.open(name, shapes[name], seed=0)
        assert sorted(saved["names"]) == sorted(mixture.names)
        mixture.names = list(saved["names"])
        for router in map(self.model.get_submodule, mixture.router_names()):
            size = len(mixture.names)
            for key in ("weight", "bias"):
                old = router.get_parameter(key)
                setattr(router, key, torch.nn.Parameter(old.new_zeros((size, *old.shape[1:]))))
        top_k, temperature, capacity = saved["routing"]
        mixture.routing = Routing(top_k=top_k, temperature=temperature, capacity_factor=capacity)
        self.journal = Journal.of(state["journal"])
        self.young = saved["young"]
        trained = set(saved["trained"])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)

    def _distance(self, young: str, batch: Mapping[str, Tensor]) -> Tensor:
        """Return KL(mixture without an expert ‖ mixture), mean over predictions, nats.

        The average over the processes is the mean over the predictions of all.
        """
        assert self._logits is not None
        input_ids = batch["input_ids"]
        with torch.no_grad(), self.mixture.without(young), preserve_modes(self.model):
            self.model.eval()  # no dropout in either pass
            teacher = self.model(input_ids=input_ids, use_cache=False).logits
        kept = labels_of(self.model, input_ids)[:, 1:] != IGNORED  # what is predicted, [B, T - 1]
        own, target = (
            log_softmax(logits[:, :-1][kept].float(), dim=-1) for logits in (self._logits, teacher)
        )
        return _share(kept) * kl_div(own, target, reduction="batchmean", log_target=True)


def _share(kept: Tensor) -> float:
    """Return the number of tokens that are kept, relative to the mean over all processes."""
    own = kept.sum().float()
    if num_ranks() == 1:
        return 1.0
    total = own.clone()
    distributed.all_reduce(total)
    return num_ranks() * float(own) / max(1.0, float(total))

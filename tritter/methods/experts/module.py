"""The LightningModule of a mixture of LoRA experts: its losses and its saved state."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import kl_div, log_softmax

from tritter.core.families import Adapters, Flops, LowRank, forward_flops
from tritter.core.models import model_of
from tritter.data.batches import this_rank
from tritter.data.packing import IGNORED, kept_tokens, labels_of
from tritter.evaluation.inference import preserve_modes
from tritter.methods.experts.adapters import (
    AdapterShape,
    adapted_layers,
    adapter_names,
    decoder_layers,
    factors,
    shape_of,
)
from tritter.methods.experts.gates import Gates, Routing, balance_loss, entropy_loss, z_loss
from tritter.methods.experts.mixture import ROUTER, ExpertMixture
from tritter.training import BaseModule
from tritter.training.module import TaskLoss
from tritter.training.parameters import WRAPPED, Journal, flops_of_sequence, live_layout


class ExpertModule(BaseModule):
    """Next-token training of the experts of a mixture; the base is frozen.

    Args:
        mixture: the experts on the trained model.
        losses: additional loss → its weight: `balance`, `entropy` and `z`, see
            `tritter.methods.experts.gates`, and `distill`, of KL(mixture without the young expert ‖
            mixture), nats per token. One without a weight is not computed.
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
        self._task: TaskLoss | None = None

    def task_loss(self, batch: Mapping[str, Tensor]) -> TaskLoss:
        """Return the loss of the task, and store its forward pass for the additional losses."""
        self._task = super().task_loss(batch)
        kept = kept_tokens(self.model, batch["input_ids"])
        self.gates = self.mixture.gates(kept)  # a teacher's pass overwrites them
        self.share = 1.0 if kept is None else _share(kept)
        return self._task

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Return the loss of the task plus the additional losses, each of which is logged."""
        loss = super().training_step(batch, batch_index)
        found = {}
        gates = self.gates if next(self.mixture.routers(), None) is not None else []
        for name, measure in (("balance", balance_loss), ("entropy", entropy_loss), ("z", z_loss)):
            if name in self.losses and gates:
                found[name] = self.share * torch.stack([measure(each) for each in gates]).mean()
        if "distill" in self.losses and self.young is not None:
            found["distill"] = self._distance(self.young, batch)
        for name, value in found.items():
            self.log_step_mean(f"experts/{name}_loss", value)
            loss = loss + self.losses[name] * value.to(loss.dtype)
        self._task = None
        return loss

    @property
    def is_task_alone(self) -> bool:
        return super().is_task_alone and not self.losses.keys() - {"distill"}

    def step_flops(self) -> Flops:
        """Return the model FLOPs of a sequence, given the parameters that now need gradients."""
        sequence = step_flops_of(self.mixture)
        if "distill" in self.losses and self.young is not None:
            sequence = sequence + forward_flops_of(self.mixture)
        return sequence

    def reading_flops(self) -> Flops:
        """Return the model FLOPs of reading a sequence with the experts."""
        return forward_flops_of(self.mixture)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the journal, the names and sizes of the experts, and the trained parameters."""
        mixture = self.mixture
        shapes = {name: shape_of(self.model, name) for name in mixture.adapters}
        routing = mixture.routing
        return super().get_extra_state() | {
            "experts": {
                "names": list(mixture.names),
                "order": list(adapter_names(self.model)),
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
        if saved["order"] != list(adapter_names(self.model)) or any(
            shape != shape_of(self.model, name) for name, shape in shapes.items()
        ):
            # Recreate all in their original order: optimizers match state by position
            for name in adapter_names(self.model):
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
        assert self._task is not None
        input_ids = batch["input_ids"]
        with torch.no_grad(), self.mixture.without(young), preserve_modes(self.model):
            self.model.eval()  # no dropout in either pass
            teacher = self.model(input_ids=input_ids, use_cache=False).logits
        kept = labels_of(self.model, input_ids)[:, 1:] != IGNORED  # what is predicted, [B, T - 1]
        own, target = (
            log_softmax(logits[:, :-1][kept].float(), dim=-1)
            for logits in (self._task.logits, teacher)
        )
        return _share(kept) * kl_div(own, target, reduction="batchmean", log_target=True)


def _share(kept: Tensor) -> float:
    """Return the number of tokens that are kept, relative to the mean over all processes."""
    rank, own = this_rank(), kept.sum().float()
    if rank.count == 1:
        return 1.0
    total = own.clone()
    distributed.all_reduce(total)
    return rank.count * float(own) / max(1.0, float(total))


# Model FLOPs of a mixture of experts: the base, the adapters and their gates.
#
# Counted as in `tritter.core.families.flops`. With `top_k`, each expert is counted with an even
# share of the tokens. Table look-ups of evidence are free.


def step_flops_of(mixture: ExpertMixture) -> Flops:
    """Return the FLOPs of a training step on one sequence, for the parameters trained now."""
    return flops_of_sequence(mixture.model, adapters=_adapters_of(mixture))


def forward_flops_of(mixture: ExpertMixture) -> Flops:
    """Return the FLOPs of reading one sequence, output head included."""
    return forward_flops(model_of(mixture.model), adapters=_adapters_of(mixture))


def _adapters_of(mixture: ExpertMixture) -> Adapters:
    """Return the adapters and routers of a mixture, for counting FLOPs."""
    number, top_k = len(mixture.names), mixture.routing.top_k
    share = 1 if top_k is None or top_k >= number else top_k / number
    model, matrices, low_rank = mixture.model, {}, {}
    for stored in live_layout(model):  # name of a layer with adapters → its logical matrices
        layer_name, is_wrapped, _ = stored.name.partition(f"{WRAPPED}.weight")
        if is_wrapped:
            matrices[layer_name] = [part.tensor.name for part in stored.parts]
    head = model.get_output_embeddings()  # type: ignore[operator]
    # A tied head has the weight of the embedding
    matrices |= {name: ["head"] for name, layer in adapted_layers(model) if layer is head}
    for name, layer in adapted_layers(model):
        found = (factors(layer, expert) for expert in mixture.adapters)
        adapters = [
            LowRank(
                rank=each.rank,
                trains_down=each.down.requires_grad,
                trains_up=each.up.requires_grad,
                share=share,
            )
            for each in found
            if each is not None
        ]
        first, *others = matrices[name]
        low_rank[first] = adapters
        low_rank |= {
            other: [replace(each, has_down=False) for each in adapters] for other in others
        }
    gating = {}
    for n, decoder_layer in decoder_layers(model).items():
        router = getattr(decoder_layer, ROUTER, None) or getattr(model, ROUTER, None)
        if router is not None:
            gating[n] = number, router.weight.requires_grad
    return Adapters(low_rank, gating)

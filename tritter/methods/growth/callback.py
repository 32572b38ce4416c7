"""Growth as two callbacks: one reads the gradients of the task, one changes the model."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritter.core.families import forward_flops
from tritter.core.models import model_of
from tritter.data.packing import lengths_read
from tritter.evaluation.jump import logits_of
from tritter.methods.growth.blocks import ActivationProbe, ActivationRecorder, FfnBlock
from tritter.methods.growth.grower import Grower
from tritter.methods.growth.initialisers import NewNeurons
from tritter.training import surgery
from tritter.training.callbacks import WorkCount, ends_step
from tritter.training.gradient_flow import NewUnits
from tritter.training.module import BaseModule, base_of

_PROBE_SEQUENCES = 2  # sequences of a batch that the change of the function is measured on


class GradientPressure(Callback):
    """Record the gradients of the task before any method changes them."""

    def __init__(self, grower: Grower) -> None:
        self._grower = grower

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self._grower.pressure.observe(base_of(pl_module).model, self._grower.blocks)


class NeuronGrowthCallback(Callback):
    """Grow a model during training, identically in all processes.

    It runs after the callback that counts the step, and before evaluation and checkpointing.

    Args:
        new: parameter name → by dimension, the coordinates that an expansion added.
    """

    report_name = Grower.reason

    def __init__(self, grower: Grower, *, new: NewUnits | None = None) -> None:
        self.grower = grower
        self._new = new or {}
        self._restored: Mapping[str, Any] | None = None
        self._seen = ActivationRecorder()
        self._handles: list[RemovableHandle] = []
        self._after: dict[str, Any] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = base_of(pl_module).model
        flags = {
            p.layer: self._new[p.gate][p.neuron_dim] if self._new.get(p.gate) else None
            for p in FfnBlock.all_of(model)
        }
        new = {layer: each.nonzero()[:, 0] for layer, each in flags.items() if each is not None}
        self.grower.begin(model, restored=self._restored, new=new)
        batches = trainer.accumulate_grad_batches * trainer.world_size
        self._seen.max_tokens = max(1, ActivationRecorder.limit // batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, grower = base_of(pl_module).model, self.grower
        (optimizer,) = trainer.optimizers

        def before(*_: object) -> None:
            step = trainer.global_step
            is_logged = (step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
            grower.maturity.before_update(model, grower.blocks, step, is_measured=is_logged)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(
            lambda *_: grower.maturity.after_update(model, grower.blocks)
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._handles and self.grower.may_grow_after(trainer.global_step + 1):
            module = base_of(pl_module)
            self._handles = self._seen.attach(module.model, self.grower.blocks)
            if module.compiled is not None:
                module.compiled.is_watched = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        if self.grower.needs_losses:
            self.grower.note_loss(float(trainer.callback_metrics["train/loss"]))
        module, grower, step = base_of(pl_module), self.grower, trainer.global_step
        model, decided = module.model, dict[int, int]()
        if grower.is_check(step):
            decided = trainer.strategy.broadcast(grower.decide(model, step))
        if decided:
            probes = self._seen.probes()
            if trainer.world_size > 1:  # gather the tokens of all processes, in the same order
                for layer, probe in probes.items():
                    own = (probe.inputs, probe.output_gradients)
                    gathered = (torch.as_tensor(module.all_gather(each)) for each in own)
                    probes[layer] = ActivationProbe(*(each.flatten(0, 1) for each in gathered))
            if growths := grower.growth(model, decided, probes, step=step):
                self._grow(trainer, module, growths, batch["input_ids"][:_PROBE_SEQUENCES])
        self._clear_probes(pl_module)
        if step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        ages = grower.maturity.ages(step)
        widths = [block.width(model) for block in grower.blocks]
        metrics = {
            "growth/neurons": sum(widths),
            **{f"growth/{kind}": grower.total(kind) for kind in ("born", "replaced", "died")},
            "growth/young": len(ages),
            "growth/parameters": sum(parameter.numel() for parameter in model.parameters()),
            "growth/flops": WorkCount.of(trainer).flops,
            "growth/function_change": grower.events[-1]["function_change"] if grower.events else 0,
        }
        if ages:
            metrics["growth/mean_age"] = sum(ages) / len(ages)
            for name, norm in grower.maturity.update_norms.items():
                metrics[f"growth/update_norm/{name}"] = norm
        if grower.pressure.neurons:
            pressures = grower.pressure.of_layers(grower.blocks).tolist()
            for block, width, pressure in zip(grower.blocks, widths, pressures, strict=True):
                metrics[f"growth/layers/{block.layer}/neurons"] = width
                metrics[f"growth/layers/{block.layer}/pressure"] = pressure
        pl_module.log_dict({name: float(value) for name, value in metrics.items()})

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._clear_probes(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear_probes(pl_module)
        module = base_of(pl_module)
        self._last_step = trainer.global_step
        self._after = {
            "neurons": [block.width(module.model) for block in self.grower.blocks],
            "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
            "flops": WorkCount.of(trainer).flops,
            "map_digest": module.journal.digest(self.grower.reason),
        }

    def report(self) -> dict[str, Any]:
        """Return the report of growth, in the format of summary.json."""
        grower, timing = self.grower, self.grower.timing
        changes = [event["function_change"] for event in grower.events]
        return {
            "timing": {
                "check_every": timing.check_every,
                "growth_cooldown": timing.cooldown,
                "warmup_steps": timing.warmup,
                "maturation_age": timing.maturation_age,
            },
            "events": grower.events,
            **{kind: grower.total(kind) for kind in ("born", "replaced", "died")},
            "checks": grower.num_checks,
            "neurons": {"before": grower.start, "after": self._after["neurons"]},
            "parameters": {
                "before": self._after["parameters"] - grower.new_parameters,
                "after": self._after["parameters"],
            },
            "extra_flops": grower.extra_flops,
            "flops": self._after["flops"],
            "young": len(grower.maturity.ages(self._last_step)),
            "map": asdict(grower.map),
            "function_change": max(changes, default=0.0),
            "map_digest": self._after["map_digest"],
            "is_exact": grower.is_exact,
            "update_norms": {n: grower.maturity.mean_update_norm(n) for n in ("young", "old")},
        }

    def state_dict(self) -> dict[str, Any]:
        return self.grower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads callbacks before on_fit_start, which restores the shapes of the model
        self._restored = state_dict

    def _grow(
        self,
        trainer: Trainer,
        module: BaseModule,
        growths: Mapping[int, NewNeurons],
        tokens: Tensor,
    ) -> None:
        """Change the model, and record the relative change of its logits on tokens [B, T]."""
        model, work = module.model, WorkCount.of(trainer)
        before, flops = logits_of(model, tokens), _reading_flops(model, tokens)
        change = self.grower.change(model, growths)
        surgery.apply(trainer, module, change, reason=Grower.reason)
        work.flops += flops + _reading_flops(model, tokens)
        largest = (logits_of(model, tokens) - before).abs().max()
        moved = (largest / before.std().clamp_min(1e-30)).to(module.device)
        self.grower.record_event(
            model,
            growths,
            step=trainer.global_step,
            function_change=float(trainer.strategy.reduce(moved, reduce_op="max")),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            flops=work.flops,
        )

    def _clear_probes(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        if (compiled := base_of(pl_module).compiled) is not None:
            compiled.is_watched = False
        self._handles = []
        self._seen.clear()


def _reading_flops(model: nn.Module, input_ids: Tensor) -> float:
    """Return the FLOPs of reading sequences [B, T]."""
    return forward_flops(model_of(model)).of_all(lengths_read(model, input_ids))

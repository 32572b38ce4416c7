"""LoRA experts in a run: options, rules, and the mixture that is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.checkpoints.expert_files import AdapterShape, ExpertFiles
from tritter.core.families import Model
from tritter.errors import Problem, RequestError, did_you_mean
from tritter.methods.experts.options import AdapterOptions, DynamicOptions
from tritter.options import RunRequest, Start
from tritter.training.method import Method, Setting, Trainee

if TYPE_CHECKING:
    from lightning import Callback
    from torch import Tensor, nn

    from tritter.checkpoints import ExpansionRecord, Source
    from tritter.data.tokens import TextBounds
    from tritter.methods.experts.callback import ExpertCallback
    from tritter.methods.experts.mixture import ExpertMixture
    from tritter.methods.experts.registry import ExpertRegistry

_ONLY = "lora"  # name of the adapter of single_lora
_BITS = {8: 8.0, 4: 4.127}  # of a quantised weight; NF4 with quantised scales (QLoRA, section 3)


class Experts(Method, ABC):
    """The component that a config selects by `_target_` in the group `experts`."""

    first: ClassVar[str]  # name of its first expert
    is_dynamic: ClassVar[bool]
    whole_weights = "adapters are added to whole weights, and each process holds only a shard"
    last_weights = "the best weights may have fewer experts"
    seed = 0  # of new experts

    def peak_rate(self, configured: float, base: Model) -> float:
        """Return the rate of adapters; by default 0.32 / hidden size of the base, at most 0.005."""
        return self.options.learning_rate or min(0.005, 0.32 / base.sizes.hidden_size)

    def load(self, source: Source) -> nn.Module:
        """Load the base with the experts that it has; new ones may want it quantised."""
        from tritter.methods.experts.stored import load_with_experts

        bits = self.options.base_bits
        return load_with_experts(source.folder, model=source.model, base_bits=bits)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        """Yield problems of combining experts with other settings of a run."""
        if run.pipeline.target_params is not None:
            reason = "growing to a size trains the whole model; remove it, or use experts=none"
            yield Problem("pipeline.target_params", run.pipeline.target_params, reason=reason)
        if run.growth is not None:
            reason = "neurons grow in a trained base, and experts freeze the base; use experts=none"
            yield Problem("growth", run.growth.kind.__name__, reason=reason)
        for spec in (each for each in run.expansion if each.new_blocks_only):
            reason = "experts freeze the whole base, the new blocks too; remove it"
            yield Problem(f"expansion.{spec.name}.new_blocks_only", True, reason=reason)
        if run.trainer.accelerator == "mps":
            reason = "experts are chosen in float64, which Apple GPUs lack; use trainer=cpu"
            yield Problem("trainer.accelerator", run.trainer.accelerator, reason=reason)
        gathered = run.trainer.accumulate_grad_batches
        if gathered > 1 and run.data.packing == "documents":
            reason = "rehearsed rows and beginnings of documents are chosen for each batch; use 1"
            yield Problem("trainer.accumulate_grad_batches", gathered, reason=reason)
        doing = "experts are added and removed together with the two moments of Adam"
        yield from run.optimizer.adam_problems(doing=doing)

    @classmethod
    def start_problems(cls, options: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        """Yield reasons why experts can't be added to, or continued from, the starting model."""
        family = start.source.family
        if options.base_bits is not None and any(each.is_transposed for each in family.tensors):
            reason = f"{family.model_type} stores transposed matrices, which can't be quantised"
            yield Problem("experts.base_bits", options.base_bits, reason=reason, nearest="null")
        files = ExpertFiles.within(start.folder, key="model.path")
        if files is None:
            return
        names = files.head.names
        if names[0] != cls.first:
            reason = (
                f"the checkpoint has the experts {', '.join(names)}; the first one must be "
                f"{cls.first}"
            )
            yield Problem("experts", cls.name, reason=reason)
        if options.base_bits != (bits := files.head.base_bits):
            state = "unquantised" if bits is None else f"{bits}-bit"
            reason = f"the experts of the checkpoint were trained on a base that is {state}"
            near = "null" if bits is None else str(bits)
            yield Problem("experts.base_bits", options.base_bits, reason=reason, nearest=near)
        router = getattr(options, "router", "evidence")
        if router != files.head.router:
            reason = f"the experts of the checkpoint use the router {files.head.router}"
            yield Problem("experts.router", router, reason=reason, nearest=files.head.router)

    @classmethod
    def num_trained(cls, options: Any, model: Model) -> int:
        """Return the number of parameters of all adapters that a run may have, without routers.

        Args:
            options: the options of the group.
            model: the base.
        """
        targets, vocab_size = options.targets, model.sizes.vocab_size
        named = [(each.name.removesuffix(".weight"), each) for each in model.layout("hub")]
        sizes = [
            sum(each.shape)
            for name, each in named
            if len(each.shape) == 2
            and (each.layer is not None or vocab_size in each.shape)
            and (targets is None or name.rpartition(".")[2] in targets)
        ]
        if targets is None and model.is_tied:  # embedding and head get one each
            sizes += [sum(each.shape) for _, each in named if vocab_size in each.shape]
        most = getattr(options, "max_trainable_parameters", None)
        count = options.rank * sum(sizes) * getattr(options, "max_experts", 1)
        return int(count if most is None else min(count, most))

    @classmethod
    def saved_bytes(cls, options: Any, model: Model, *, of_one: int) -> int:
        """Return the bytes that a quantised base saves.

        Args:
            options: the options of the group.
            model: the base.
            of_one: bytes of a number that is not quantised.
        """
        if options.base_bits is None:
            return 0
        linear = [t for t in model.layout("live") if t.layer is not None and len(t.shape) == 2]
        return round((of_one - _BITS[options.base_bits] / 8) * sum(prod(t.shape) for t in linear))

    def attach(self, trainee: Trainee, setting: Setting) -> None:
        """Train experts on a model instead of the model; add them if it has none."""
        from tritter.methods.experts.mixture import mixture_on
        from tritter.methods.experts.module import ExpertModule

        self.seed = setting.seed("experts")
        mixture = mixture_on(trainee.model)
        if mixture is None:
            mixture = self.begin(trainee.model, bounds=setting.bounds, seed=self.seed)
        else:
            self._resume(mixture, setting)
        trainee.make_module = partial(ExpertModule, mixture, losses=self.losses)
        trainee.surgery_callbacks += self._callbacks(mixture, setting)

    def _callbacks(self, mixture: ExpertMixture, setting: Setting) -> tuple[Callback, ...]:
        """Return the callbacks that change the experts during training."""
        return ()

    def lineage_records(
        self, before: Model, after: Model, reports: Mapping[str, Any]
    ) -> list[ExpansionRecord]:
        from tritter.checkpoints import ExpansionRecord
        from tritter.methods.experts.callback import ExpertCallback

        name = ExpertCallback.report_name
        events = reports.get(name, {}).get("events", [])
        born = [event["expert"] for event in events if event["kind"] == "spawned"]
        if not born:
            return []
        record = ExpansionRecord(
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            expansion_type=name,
            method=self.name,
            options={**self.plain(), "spawned": born},
            seed=self.seed,
            source_config=after.config,
            target_config=after.config,
            layer_sources=tuple(range(after.sizes.num_hidden_layers)),
            map_digest=sha256(" ".join(born).encode()).hexdigest(),
            claims_exact=True,  # a new expert has zero output
            step0_error=0.0,
        )
        return [record]

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, **super().plain()}

    def summary(self, fits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `experts` of summary.json: one record for all training runs of a branch."""
        from tritter.methods.experts.callback import ExpertCallback

        record = {
            "kind": self.name,
            "options": self.plain(),
            **fits[-1]["usage"],
            "phases": [fit["usage"]["usage"] for fit in fits],
        }
        found = (fit["reports"].get(ExpertCallback.report_name) for fit in fits)
        reports = [report for report in found if report]
        if len(reports) < len(fits):
            return record
        before = list(accumulate((fit["steps"] for fit in fits), initial=0))
        events = [
            {**event, "task": number, "step": event["step"] + before[number]}
            for number, report in enumerate(reports)
            for event in report["events"]
        ]
        spawned = [event for event in events if event["kind"] == "spawned"]
        record |= {"spawned": spawned, "events": events}
        for key in ("batches", "domains", "states"):
            record[key] = reports[-1].get(key, {})  # earlier versions lack the last two
        for name, values in (("usage_over_time", "gates"), ("ranks_over_time", "ranks")):
            parts = [report[name] for report in reports]
            steps = [step + before[n] for n, part in enumerate(parts) for step in part["steps"]]
            experts = dict.fromkeys(expert for part in parts for expert in part[values])
            rows = {  # null if the expert did not exist
                expert: [
                    value
                    for part in parts
                    for value in part[values].get(expert, [None] * len(part["steps"]))
                ]
                for expert in experts
            }
            record[name] = {"steps": steps, values: rows}
        return record

    @abstractmethod
    def begin(self, model: nn.Module, *, bounds: TextBounds, seed: int) -> ExpertMixture:
        """Add a mixture to a model without experts; its function does not change at first."""

    def _resume(self, mixture: ExpertMixture, setting: Setting) -> None:
        """Continue training the experts of a checkpoint, with their state."""
        from tritter.methods.experts.adapters import is_of_adapter
        from tritter.methods.experts.mixture import ROUTER
        from tritter.methods.experts.stored import ExpertFolder

        files = setting.start.experts
        assert files is not None
        mixture.extra = dict(ExpertFolder.of_files(files).extra)
        frozen = set(mixture.extra.get("frozen", ()))
        for name, parameter in mixture.model.named_parameters():
            is_trained = is_of_adapter(name) or ROUTER in name
            parameter.requires_grad_(is_trained and name not in frozen)

    @property
    def losses(self) -> dict[str, float]:
        """Weights of the additional losses."""
        return {}

    def shape(self, model: nn.Module) -> AdapterShape:
        """Return the initial size of an adapter on a model."""
        from tritter.methods.experts.adapters import LoraLayers

        options: AdapterOptions = self.options
        targets = options.targets or tuple(sorted(LoraLayers(model).adaptable()))
        return AdapterShape(options.rank, float(options.alpha), tuple(targets))


class SingleLora(Experts):
    """A single adapter that is trained throughout: the control for dynamic experts."""

    Options = AdapterOptions
    name = "single_lora"
    first = _ONLY
    is_dynamic = False

    def begin(self, model: nn.Module, *, bounds: TextBounds, seed: int) -> ExpertMixture:
        from tritter.methods.experts.mixture import ExpertMixture

        mixture = ExpertMixture(model, router="evidence")  # a single expert has gates of 1
        mixture.add(_ONLY, self.shape(model), seed=seed)
        return mixture

    def _resume(self, mixture: ExpertMixture, setting: Setting) -> None:
        super()._resume(mixture, setting)
        own, expected = mixture.lora.shape(mixture.names[0]), self.shape(mixture.model)
        if own != replace(expected, targets=tuple(sorted(expected.targets))):
            raise RequestError(
                f"experts.rank, .alpha or .targets: the checkpoint's adapter has rank {own.rank}, "
                f"alpha {own.alpha:g}, on {', '.join(own.targets)}."
            )


class DynamicExperts(Experts):
    """One expert per skill that is detected as new, on top of a frozen base."""

    Options = DynamicOptions
    name = "dylora"
    first = DynamicOptions.first
    is_dynamic = True

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        yield from super().problems(options, run)
        if options.max_rank < options.rank:
            reason = f"must be at least the initial rank, experts.rank = {options.rank}"
            yield Problem("experts.max_rank", options.max_rank, reason=reason)
        if options.router == "evidence" and options.shared_router:
            reason = "experts.router=evidence has no learned router; use learned or both"
            yield Problem("experts.shared_router", True, reason=reason)
        if options.boundaries == "detected":
            batch, steps = run.data.batch_size, run.training.max_steps
            if batch == 1:
                reason = "detecting novelty needs the variance within a batch; use at least 2"
                yield Problem("data.batch_size", batch, reason=reason)
            seen = steps * run.trainer.accumulate_grad_batches * batch
            if options.min_samples > seen:
                reason = f"the run sees {seen:,} sequences; use at most as many, or more steps"
                yield Problem("experts.min_samples", options.min_samples, reason=reason)
        elif options.when_full == "merge":
            reason = "merging needs similarities of detected skills; use experts.when_full=evict"
            yield Problem("experts.when_full", "merge", reason=reason)

    @classmethod
    def start_problems(cls, options: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        yield from super().start_problems(options, run, start)
        is_new = ExpertFiles.within(start.folder, key="model.path") is None
        if is_new and options.boundaries == "detected" and not run.text.old:
            reason = (
                "novelty is detected relative to data of the base, which is never trained on; "
                "set data.old, or experts.boundaries=told"
            )
            yield Problem("data.old", {}, reason=reason)

    def begin(self, model: nn.Module, *, bounds: TextBounds, seed: int) -> ExpertMixture:
        from tritter.methods.experts.mixture import ExpertMixture

        options: DynamicOptions = self.options
        mixture = ExpertMixture(
            model,
            router=options.router,
            is_shared=options.shared_router,
            evidence={
                "end_of_text_id": bounds.end,
                "start_ids": bounds.start,
                "window": options.evidence_window,
                "scale": options.evidence_scale,
                "prior": options.prior,
                "inner_prior": options.inner_prior,
            },
        )
        mixture.add(self.first, self.shape(model), seed=seed)
        return mixture

    def _callbacks(self, mixture: ExpertMixture, setting: Setting) -> tuple[ExpertCallback]:
        """Return the callback that spawns experts, with the state of a checkpoint's experts."""
        from tritter.data.packing import DocumentMask
        from tritter.methods.experts.callback import ExpertCallback

        registry = self.registry(max_steps=setting.max_steps)
        shape, stored = self.shape(mixture.model), mixture.extra.get("roster")
        for name in self.options.freeze_projections or ():
            if name not in shape.targets:
                raise RequestError(
                    f"experts.freeze_projections = {name}: experts are on "
                    f"{', '.join(shape.targets)}.{did_you_mean(name, shape.targets)}"
                )
        if stored is not None:
            registry.load_state_dict(stored)
            if not setting.task:
                registry.restart()
        is_measured = registry.detector is not None
        known, known_tokens = None, None
        if stored is None:
            known, known_tokens = _base_data(setting, is_measured=is_measured)
        callback = ExpertCallback(
            registry,
            shape=shape,
            known=known,
            known_tokens=known_tokens,
            skill=None if is_measured else "+".join(setting.domains),
            domains=setting.domains,
            seed=self.seed,
        )
        callback.load_exemplars(mixture.extra)
        if callback.exemplar_length not in (0, setting.sequence_length):
            raise RequestError(
                f"data.sequence_length = {setting.sequence_length}: the exemplars stored in the "
                f"checkpoint have {callback.exemplar_length} tokens; use that length, or "
                "experts.rehearsal=0."
            )
        lineage = setting.start.lineage
        recorded = None if lineage is None else lineage.training_config.get("data")
        is_padded = isinstance(recorded, Mapping) and recorded.get("packing") == "documents"
        if callback.exemplar_length and is_padded and DocumentMask.of(mixture.model) is None:
            raise RequestError(
                "data.packing = stream: the exemplars stored in the checkpoint are padded "
                "documents; use data.packing=documents, or experts.rehearsal=0."
            )
        return (callback,)

    def _resume(self, mixture: ExpertMixture, setting: Setting) -> None:
        super()._resume(mixture, setting)
        options: DynamicOptions = self.options
        if mixture.router != "evidence" and mixture.is_shared != options.shared_router:
            raise RequestError(
                f"experts.shared_router = {options.shared_router}: the checkpoint has "
                f"{'one router' if mixture.is_shared else 'a router for each layer'}."
            )
        routing = mixture.routing  # dense until its experts are mature
        stored = {
            "top_k": routing.top_k or options.top_k,
            "capacity_factor": routing.capacity_factor,
        }
        if mixture.evidence is not None:
            for key in ("prior", "inner_prior", "evidence_scale", "evidence_window"):
                name = key.removeprefix("evidence_")
                stored[key] = getattr(mixture.evidence, name)
                setattr(mixture.evidence, name, getattr(options, key))
        for key, value in stored.items():
            if (now := getattr(options, key)) != value:
                change = f"experts.{key} = {now} (in the checkpoint: {value})"
                setting.log("experts", change.replace("None", "null"))
        recorded = mixture.extra.get("boundaries") or options.boundaries
        if recorded != options.boundaries:
            raise RequestError(
                f"experts.boundaries = {options.boundaries}: the checkpoint was trained with "
                f"{recorded}; use experts.boundaries={recorded}."
            )

    @property
    def losses(self) -> dict[str, float]:
        names = ("balance", "entropy", "z", "distill")
        return {name: getattr(self.options, name) for name in names}

    def shape(self, model: nn.Module) -> AdapterShape:
        from tritter.methods.experts.adapters import LoraLayers

        shape = super().shape(model)
        options: DynamicOptions = self.options
        if options.router != "learned" or options.targets is not None:
            return shape
        targets = tuple(sorted(LoraLayers(model).adaptable(whole=False)))
        return AdapterShape(shape.rank, shape.alpha, targets)

    def registry(self, *, max_steps: int) -> ExpertRegistry:
        """Return the expert registry of a run that starts without known skills."""
        from tritter.methods.experts.registry import ExpertRegistry
        from tritter.methods.novelty import NoveltyDetector

        options: DynamicOptions = self.options
        detector = None
        if options.boundaries != "told":
            detector = NoveltyDetector(detector=options.detector, options=options.novelty)
        return ExpertRegistry(options, max_steps=max_steps, detector=detector)


def _base_data(
    setting: Setting, *, is_measured: bool
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """Return data of the old domains, for statistics of the novelty detector; never trained on.

    They are domain → batches [B, T], in the size of later decisions, and all tokens, int64.
    """
    import torch

    from tritter.methods.novelty.statistics import Calibration

    sequences, size = setting.base_sequences(), setting.batch_size
    batches: dict[str, Sequence[Tensor]] = dict.fromkeys(sequences, ())
    for domain, each in sequences.items() if is_measured else ():
        # Enough batches for calibration, with as few repetitions as possible
        generator = torch.Generator().manual_seed(setting.seed("known", domain))
        count, order = Calibration.full * size, torch.empty(0, dtype=torch.int64)
        while len(order) < count:
            order = torch.cat([order, torch.randperm(len(each), generator=generator)])
        batches[domain] = each[order[:count]].long().split(size)
    tokens = (each.flatten().long() for each in sequences.values())
    return batches, torch.cat([torch.empty(0, dtype=torch.int64), *tokens])

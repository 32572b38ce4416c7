"""LoRA experts in a run: which trainings they are part of, and what summary.json says of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import accumulate
from math import prod
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn

from tritter.checkpoint import ExpansionRecord, Source
from tritter.data.packing import lengths_of
from tritter.errors import RequestError, did_you_mean
from tritter.experts.adapters import is_of_adapter, shape_of
from tritter.experts.callback import EXPERTS, ExpertCallback, Known
from tritter.experts.losses import usage as mean_gates
from tritter.experts.method import DynamicExperts, Experts, SingleLora
from tritter.experts.mixture import ROUTER, ExpertMixture, mixture_on
from tritter.experts.module import ExpertModule, forward_flops_of
from tritter.experts.stored import ExpertFolder
from tritter.experts.whole import load_whole
from tritter.families import Config, Flops, family_of, forward_flops
from tritter.models import config_of, live_shape, load_model
from tritter.novelty.statistics import CALIBRATION_BATCHES
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import EvaluationFound, TrainingFound
from tritter.report.summary import ExpertsRecord
from tritter.storage.records import validated
from tritter.training import BaseModule, FitResult
from tritter.training.options import TrainingConfig

USAGE_SEQUENCES = 16  # of a domain, in which its gates are looked at
_USAGE_BATCH = 8


@dataclass(frozen=True, slots=True)
class Trainee:
    """What an arm trains: a model, or the experts on it.

    Args:
        module: makes the module of it, given the options of `BaseModule`.
        changers: callbacks that change the model.
    """

    module: Callable[..., BaseModule]
    changers: tuple[Callback, ...] = ()


def method_of(context: RunContext, arm: Arm) -> Experts | None:
    """Return what an arm trains; None: the whole model, as the control does."""
    asked = context.config.experts
    if asked is None or arm.is_control:
        return None
    method: Experts = asked.kind(asked.options)
    return method


def training_of(context: RunContext, arm: Arm) -> TrainingConfig:
    """Return what is asked of an arm's training: adapters have a rate of their own."""
    method, asked = method_of(context, arm), context.config.training
    return asked if method is None else replace(asked, learning_rate=method.asked.learning_rate)


def load_start(context: RunContext, arm: Arm, source: Source) -> nn.Module:
    """Load what an arm's training starts from: experts and all, or for the control the base."""
    method = method_of(context, arm)
    if method is None:
        return load_model(source.folder, config=source.config)
    bits = method.asked.base_bits
    return load_whole(source.folder, config=source.config, base_bits=bits)


def begin(context: RunContext, arm: Arm, model: nn.Module, *, max_steps: int) -> Trainee:
    """Return what is trained of a model; experts are put on one that has none, if asked for.

    Raises:
        RequestError: the model has other experts than can be gone on with, no layer that adapters
            are to stand on, or there is no text of what the base knows.
    """
    method = method_of(context, arm)
    if method is None:
        return Trainee(partial(BaseModule, model))
    seed = context.seed("experts", *arm.purpose)
    mixture = mixture_on(model)
    if mixture is None:
        mixture = method.begin(model, end_of_text_id=context.end_of_text_id, seed=seed)
    else:
        _go_on(context, arm, mixture, method)
    changers: tuple[Callback, ...] = ()
    if isinstance(method, DynamicExperts):
        roster = method.roster(max_steps=max_steps)
        held = mixture.extra.get("roster")
        if held is not None:
            roster.load_state_dict(held)
            if not arm.task:  # what an earlier run did is its own
                roster.batches = dict.fromkeys(roster.batches, 0)
        elif roster.detector is not None and not context.old_domains:
            raise RequestError(
                "data.old: what is new is told by what the base knows; name text of that, which "
                "is looked at and never trained on, or say experts.boundaries=told."
            )
        _check_projections(method, method.shape(model).targets)
        new = context.new_of(arm)
        callback = ExpertCallback(
            roster,
            shape=method.shape(model),
            known=None if held is not None else _known(context, is_told=roster.detector is None),
            skill="+".join(new) if roster.detector is None else None,
            domains=new,
            seed=seed,
        )
        callback.take_up(mixture.extra)
        _check_length(callback, context.config.data.sequence_length)
        changers = (callback,)
    return Trainee(partial(ExpertModule, mixture, losses=method.losses), changers)


def _check_length(callback: ExpertCallback, sequence_length: int) -> None:
    """Refuse exemplars of a checkpoint that can't stand in this run's batches.

    Raises:
        RequestError: they are of another length.
    """
    held = callback.exemplar_length
    if held not in (0, sequence_length):
        raise RequestError(
            f"data.sequence_length = {sequence_length}: the exemplars that the checkpoint keeps of "
            f"its experts' text have {held} tokens; take that, or experts.rehearsal=0."
        )


def _check_projections(method: DynamicExperts, targets: Sequence[str]) -> None:
    """Refuse layers to be frozen that no expert stands on.

    Raises:
        RequestError: names one.
    """
    for name in method.asked.freeze_projections or ():
        if name not in targets:
            raise RequestError(
                f"experts.freeze_projections = {name}: experts stand on {', '.join(targets)}."
                f"{did_you_mean(name, targets)}"
            )


def _go_on(context: RunContext, arm: Arm, mixture: ExpertMixture, method: Experts) -> None:
    """Let the experts of a checkpoint be trained again, with what was left beside them.

    Raises:
        RequestError: they are other than what is asked for.
    """
    files = context.source(arm.start).experts
    assert files is not None
    stored = ExpertFolder.of_files(files)
    mixture.extra = dict(stored.extra)
    frozen = set(mixture.extra.get("frozen", ()))
    for name, parameter in mixture.model.named_parameters():
        is_ours = is_of_adapter(name) or ROUTER in name
        parameter.requires_grad_(is_ours and name not in frozen)
    asked = method.asked
    if isinstance(method, SingleLora):
        own = shape_of(mixture.model, mixture.names[0])
        wanted = method.shape(mixture.model)
        if own != replace(wanted, targets=tuple(sorted(wanted.targets))):
            raise RequestError(
                f"experts.rank, .alpha or .targets: the checkpoint's adapter has rank {own.rank}, "
                f"alpha {own.alpha:g}, on {', '.join(own.targets)}."
            )
        return
    if mixture.router != "evidence" and mixture.is_shared != asked.shared_router:
        raise RequestError(
            f"experts.shared_router = {asked.shared_router}: the checkpoint has "
            f"{'one router' if mixture.is_shared else 'a router for each layer'}."
        )
    if mixture.evidence is not None:
        evidence = mixture.evidence
        evidence.prior, evidence.scale = asked.prior, asked.evidence_scale
        evidence.window = asked.evidence_window
    told = mixture.extra.get("boundaries")
    if told is not None and told != asked.boundaries:
        raise RequestError(
            f"experts.boundaries = {asked.boundaries}: the checkpoint's skills were {told}, which "
            f"is all that is known of them; go on with experts.boundaries={told}."
        )


def _known(context: RunContext, *, is_told: bool) -> Known:
    """Return text of what the base knows, to be measured and counted, and never trained on."""
    sequences = context.training_sequences(context.old_domains)
    tokens = [each.flatten().long() for each in sequences.values()]
    size = context.config.data.batch_size
    batches: dict[str, Sequence[Tensor]] = {}
    for domain, each in sequences.items():
        batches[domain] = ()
        if not is_told:  # as many as it takes to know what is usual; each as rarely as can be
            generator = torch.Generator().manual_seed(context.seed("known", domain))
            wanted, order = CALIBRATION_BATCHES * size, torch.empty(0, dtype=torch.int64)
            while len(order) < wanted:
                order = torch.cat([order, torch.randperm(len(each), generator=generator)])
            batches[domain] = each[order[:wanted]].long().split(size)
    return Known(batches=batches, tokens=torch.cat([torch.empty(0, dtype=torch.int64), *tokens]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsAsked:
    """What is known of a training's experts before it begins, for what it leaves."""

    name: str
    options: Mapping[str, Any]
    seed: int

    @classmethod
    def of(cls, context: RunContext, arm: Arm) -> "ExpertsAsked | None":
        """Return that of an arm; None where the whole model is trained."""
        asked = context.config.experts
        if asked is None or arm.is_control:
            return None
        return cls(
            name=asked.name,
            options={"name": asked.name, **asked.plain()},
            seed=context.seed("experts", *arm.purpose),
        )

    def records(self, config: Config, result: FitResult) -> list[ExpansionRecord]:
        """Return the record of experts that came in a training, as the lineage has it."""
        events = result.reports.get(EXPERTS, {}).get("events", [])
        born = [event["expert"] for event in events if event["kind"] == "spawned"]
        if not born:
            return []
        record = ExpansionRecord(
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            expansion_type=EXPERTS,
            method=self.name,
            options={**self.options, "spawned": born},
            seed=self.seed,
            source_config=config,
            target_config=config,
            layer_sources=tuple(range(family_of(config).dimensions(config).num_hidden_layers)),
            map_digest=sha256(" ".join(born).encode()).hexdigest(),
            claims_exact=True,  # an expert that is new computes nothing
            step0_error=0.0,
        )
        return [record]


def left_beside(model: nn.Module) -> ExpertFolder | None:
    """Return the experts of a live model, to be written beside its base; None: it has none."""
    mixture = mixture_on(model)
    if mixture is None:
        return None
    usage = mixture.extra.get("usage")
    return ExpertFolder.of(
        mixture, usage=None if usage is None else {"training": usage}, extra=mixture.extra
    )


@torch.no_grad()
def usage(context: RunContext, model: nn.Module) -> dict[str, Any] | None:
    """Return what becomes of each domain's text: the mean gate of each expert; None without any."""
    mixture = mixture_on(model)
    if mixture is None:
        return None
    model.to(context.device).eval()
    found: dict[str, dict[str, float]] = {}
    for domain in context.domains:
        ids = _looked_at(context, domain)
        gates = torch.zeros(len(mixture.names), dtype=torch.float64)
        for rows in ids.split(_USAGE_BATCH):
            model(input_ids=rows.to(context.device), use_cache=False)
            gates += mean_gates(mixture.gates()).double().cpu() * len(rows) / len(ids)
        found[domain] = dict(zip(mixture.names, gates.tolist(), strict=True))
    model.to("cpu")
    adapters = ExpertFolder.of(mixture).adapters
    sizes = {
        name: sum(d.numel() + u.numel() for d, u in each.factors.values())
        for name, each in adapters.items()
    }
    named = model.named_parameters()
    base = sum(prod(live_shape(p)) for n, p in named if ".lora_" not in n)
    routers = sum(p.numel() for router in mixture.routers() for p in router.parameters())
    trainable = sum(sizes.values()) + routers
    return {
        "number": len(mixture.adapters),
        "names": list(mixture.names),
        "usage": found,
        "ranks": {name: each.shape.rank for name, each in adapters.items()},
        "parameters": {
            "base": base - routers,
            "trainable": trainable,
            "share": trainable / (base + sum(sizes.values())),
        },
        "routing": {
            "router": mixture.router,
            "top_k": mixture.routing.top_k,
            "temperature": mixture.routing.temperature,
        },
    }


def reading_flops(model: nn.Module) -> Flops:
    """Return the FLOPs of reading a sequence, with a model's experts where it has any."""
    mixture = mixture_on(model)
    return forward_flops(config_of(model)) if mixture is None else forward_flops_of(mixture)


def reading_flops_of(context: RunContext, source: Source) -> Flops:
    """Return the same of a checkpoint that a run starts from, as the run reads it."""
    if context.config.experts is None or source.experts is None:
        return forward_flops(source.config)
    return reading_flops(load_whole(source.folder, config=source.config))


def usage_flops(context: RunContext, model: nn.Module) -> float:
    """Count the FLOPs of what `usage` looks at; none without experts."""
    if mixture_on(model) is None:
        return 0.0
    looked = (_looked_at(context, domain) for domain in context.domains)
    flops = reading_flops(model)
    return sum(flops.of_all(lengths_of(context.apart, each)) for each in looked)


def _looked_at(context: RunContext, domain: str) -> Tensor:
    """Return the sequences of a domain in which gates are looked at, int64 [N, T]."""
    return context.drawn_equally([domain], USAGE_SEQUENCES, "usage").long()


def summary_record(context: RunContext, arms: Sequence[Arm]) -> ExpertsRecord | None:
    """Return what became of experts in the trainings of an attempt, task after task."""
    asked = context.config.experts
    if asked is None:
        return None
    fits = [context.ledger.found(f"{arm.name}.fit", TrainingFound) for arm in arms]
    options = {"name": asked.name, **asked.plain()}
    record: dict[str, Any] = {"kind": asked.name, "options": options}
    evaluated = [context.ledger.found(f"{arm.name}.evaluate", EvaluationFound) for arm in arms]
    uses = [found.experts or {} for found in evaluated]
    record |= {**uses[-1], "phases": [use["usage"] for use in uses]}
    reports = [fit.reports[EXPERTS] for fit in fits if EXPERTS in fit.reports]
    if len(reports) < len(fits):
        return validated(record, ExpertsRecord, what="summary.json: experts")
    before = [0, *accumulate(fit.steps for fit in fits)]
    events = [
        {**event, "task": number, "step": event["step"] + start}
        for number, (report, start) in enumerate(zip(reports, before, strict=False))
        for event in report["events"]
    ]
    spawned = [event for event in events if event["kind"] == "spawned"]
    record |= {"spawned": spawned, "events": events, "batches": reports[-1]["batches"]}
    for name, values in (("usage_over_time", "gates"), ("ranks_over_time", "ranks")):
        record[name] = _joined([report[name] for report in reports], values, before)
    return validated(record, ExpertsRecord, what="summary.json: experts")


def _joined(
    parts: Sequence[Mapping[str, Any]], values: str, before: Sequence[int]
) -> dict[str, Any]:
    """Return what was followed over several trainings as over one; null where there was nothing."""
    steps = [s + start for part, start in zip(parts, before, strict=False) for s in part["steps"]]
    names = list(dict.fromkeys(name for part in parts for name in part[values]))
    rows = {
        name: [
            each for part in parts for each in part[values].get(name, [None] * len(part["steps"]))
        ]
        for name in names
    }
    return {"steps": steps, values: rows}

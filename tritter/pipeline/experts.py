"""LoRA experts in a run: which trainings they are part of, and what they are trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from lightning import Callback
from torch import Tensor, nn

from tritter.checkpoints import Source
from tritter.core.families import Flops, forward_flops
from tritter.core.models import config_of, load_model
from tritter.errors import RequestError, did_you_mean
from tritter.methods.experts.adapters import is_of_adapter, shape_of
from tritter.methods.experts.callback import ExpertCallback, Known
from tritter.methods.experts.method import DynamicExperts, Experts, SingleLora
from tritter.methods.experts.mixture import ROUTER, ExpertMixture, mixture_on
from tritter.methods.experts.module import ExpertModule, forward_flops_of
from tritter.methods.experts.stored import ExpertFolder
from tritter.methods.experts.whole import load_whole
from tritter.methods.novelty.statistics import CALIBRATION_BATCHES
from tritter.pipeline.branch import Branch
from tritter.pipeline.context import RunContext
from tritter.training import BaseModule
from tritter.training.options import TrainingConfig

_USAGE_SEQUENCES = 16  # of a domain, in which the gates are measured


@dataclass(frozen=True, slots=True)
class Trainee:
    """What an arm trains: a model, or the experts on it.

    Args:
        module: makes the module of it, given the options of `BaseModule`.
        changers: callbacks that change the model.
    """

    module: Callable[..., BaseModule]
    changers: tuple[Callback, ...] = ()


def method_of(context: RunContext, branch: Branch) -> Experts | None:
    """Return what an arm trains; None: the whole model, as the control does."""
    options = context.config.experts
    if options is None or branch.is_control:
        return None
    method: Experts = options.kind(options.options)
    return method


def training_of(context: RunContext, branch: Branch) -> TrainingConfig:
    """Return what is asked of an arm's training: adapters have a rate of their own."""
    method, options = method_of(context, branch), context.config.training
    return (
        options if method is None else replace(options, learning_rate=method.options.learning_rate)
    )


def load_start(context: RunContext, branch: Branch, source: Source) -> nn.Module:
    """Load what an arm's training starts from: experts and all, or for the control the base."""
    method = method_of(context, branch)
    if method is None:
        return load_model(source.folder, config=source.config)
    bits = method.options.base_bits
    return load_whole(source.folder, config=source.config, base_bits=bits)


def begin(context: RunContext, branch: Branch, model: nn.Module, *, max_steps: int) -> Trainee:
    """Return what is trained of a model; experts are put on one that has none, if asked for.

    Raises:
        RequestError: the model has other experts than can be gone on with, or no layer that
            adapters are to stand on.
    """
    method = method_of(context, branch)
    if method is None:
        return Trainee(partial(BaseModule, model))
    mixture = mixture_on(model)
    if mixture is None:
        seed = context.seed("experts", *branch.purpose)
        mixture = method.begin(model, end_of_text_id=context.end_of_text_id, seed=seed)
    else:
        _resume(context, branch, mixture, method)
    changers: tuple[Callback, ...] = ()
    if isinstance(method, DynamicExperts):
        changers = (_callback(context, branch, mixture, method, max_steps=max_steps),)
    return Trainee(partial(ExpertModule, mixture, losses=method.losses), changers)


def _callback(
    context: RunContext,
    branch: Branch,
    mixture: ExpertMixture,
    method: DynamicExperts,
    *,
    max_steps: int,
) -> ExpertCallback:
    """Return what spawns experts, which goes on from what a checkpoint's experts were.

    Raises:
        RequestError: no expert stands on layers that are to be frozen, or the checkpoint's
            exemplars are of another length than this run's batches.
    """
    registry, shape = method.registry(max_steps=max_steps), method.shape(mixture.model)
    for name in method.options.freeze_projections or ():
        if name not in shape.targets:
            raise RequestError(
                f"experts.freeze_projections = {name}: experts stand on "
                f"{', '.join(shape.targets)}.{did_you_mean(name, shape.targets)}"
            )
    known, stored = None, mixture.extra.get("roster")
    if stored is None:
        known = _known(context, is_measured=registry.detector is not None)
    else:
        registry.load_state_dict(stored)
        if not branch.task:  # what an earlier run did is its own
            registry.batches = dict.fromkeys(registry.batches, 0)
    new, length = context.new_of(branch), context.config.data.sequence_length
    callback = ExpertCallback(
        registry,
        shape=shape,
        known=known,
        skill="+".join(new) if registry.detector is None else None,
        domains=new,
        seed=context.seed("experts", *branch.purpose),
    )
    callback.load_exemplars(mixture.extra)
    if callback.exemplar_length not in (0, length):
        raise RequestError(
            f"data.sequence_length = {length}: the exemplars that the checkpoint keeps of its "
            f"experts' text have {callback.exemplar_length} tokens; take that, or "
            "experts.rehearsal=0."
        )
    return callback


def _resume(context: RunContext, branch: Branch, mixture: ExpertMixture, method: Experts) -> None:
    """Let the experts of a checkpoint be trained again, with their state.

    Raises:
        RequestError: they are other than what is asked for.
    """
    files = context.source(branch.start).experts
    assert files is not None
    mixture.extra = dict(ExpertFolder.of_files(files).extra)
    frozen = set(mixture.extra.get("frozen", ()))
    for name, parameter in mixture.model.named_parameters():
        is_ours = is_of_adapter(name) or ROUTER in name
        parameter.requires_grad_(is_ours and name not in frozen)
    options = method.options
    if isinstance(method, SingleLora):
        own = shape_of(mixture.model, mixture.names[0])
        wanted = method.shape(mixture.model)
        if own != replace(wanted, targets=tuple(sorted(wanted.targets))):
            raise RequestError(
                f"experts.rank, .alpha or .targets: the checkpoint's adapter has rank {own.rank}, "
                f"alpha {own.alpha:g}, on {', '.join(own.targets)}."
            )
        return
    if mixture.router != "evidence" and mixture.is_shared != options.shared_router:
        raise RequestError(
            f"experts.shared_router = {options.shared_router}: the checkpoint has "
            f"{'one router' if mixture.is_shared else 'a router for each layer'}."
        )
    if mixture.evidence is not None:
        evidence = mixture.evidence
        evidence.prior, evidence.scale = options.prior, options.evidence_scale
        evidence.window = options.evidence_window
    recorded = mixture.extra.get("boundaries")
    if recorded is not None and recorded != options.boundaries:
        raise RequestError(
            f"experts.boundaries = {options.boundaries}: the checkpoint's skills were {recorded}, "
            f"which is all that is known of them; go on with experts.boundaries={recorded}."
        )


def _known(context: RunContext, *, is_measured: bool) -> Known:
    """Return text of what the base knows, to be counted, perhaps measured, and never trained on."""
    sequences = context.training_sequences(context.old_domains)
    size = context.config.data.batch_size
    batches: dict[str, Sequence[Tensor]] = dict.fromkeys(sequences, ())
    for domain, each in sequences.items() if is_measured else ():
        # As many as it takes to know what is usual; each as rarely as can be
        generator = torch.Generator().manual_seed(context.seed("known", domain))
        wanted, order = CALIBRATION_BATCHES * size, torch.empty(0, dtype=torch.int64)
        while len(order) < wanted:
            order = torch.cat([order, torch.randperm(len(each), generator=generator)])
        batches[domain] = each[order[:wanted]].long().split(size)
    tokens = (each.flatten().long() for each in sequences.values())
    return Known(batches=batches, tokens=torch.cat([torch.empty(0, dtype=torch.int64), *tokens]))


def reading_flops(model: nn.Module) -> Flops:
    """Return the FLOPs of reading a sequence, with a model's experts where it has any."""
    mixture = mixture_on(model)
    return forward_flops(config_of(model)) if mixture is None else forward_flops_of(mixture)


def reading_flops_of(context: RunContext, source: Source) -> Flops:
    """Return the same of a checkpoint that a run starts from, as the run reads it."""
    if context.config.experts is None or source.experts is None:
        return forward_flops(source.config)
    return reading_flops(load_whole(source.folder, config=source.config))


def usage_sequences(context: RunContext) -> Mapping[str, Tensor]:
    """Return domain → the sequences in which its gates are measured, int64 [N, T]."""
    return {
        domain: context.sample_equally([domain], _USAGE_SEQUENCES, "usage").long()
        for domain in context.domains
    }

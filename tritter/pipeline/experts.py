"""LoRA experts in a run: which training runs use them, and which weights are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from tritter.checkpoints import Source
from tritter.core.families import Flops, forward_flops
from tritter.core.models import load_model, model_of
from tritter.errors import RequestError, did_you_mean
from tritter.methods.experts.adapters import is_of_adapter, shape_of
from tritter.methods.experts.callback import BaseData, ExpertCallback
from tritter.methods.experts.method import DynamicExperts, Experts, SingleLora
from tritter.methods.experts.mixture import ROUTER, ExpertMixture, mixture_on
from tritter.methods.experts.module import ExpertModule, forward_flops_of
from tritter.methods.experts.stored import ExpertFolder
from tritter.methods.experts.whole import load_whole
from tritter.methods.novelty.statistics import CALIBRATION_BATCHES
from tritter.pipeline.branch import Branch, Trainee
from tritter.pipeline.run import Run
from tritter.training.options import TrainingConfig

_USAGE_SEQUENCES = 16  # per domain, to measure the gates


def method_of(run: Run, branch: Branch) -> Experts | None:
    """Return the expert method of a branch; None if the whole model is trained."""
    experts = run.config.experts
    if experts is None or branch.is_control:
        return None
    method: Experts = experts.kind(experts.options)
    return method


def training_of(run: Run, branch: Branch) -> TrainingConfig:
    """Return the training options of a branch; adapters have their own learning rate."""
    method, options = method_of(run, branch), run.config.training
    if method is None:
        return options
    return replace(options, learning_rate=method.peak_rate(run.data.model))


def load_start(run: Run, branch: Branch, source: Source) -> nn.Module:
    """Load the initial model of a branch, with its experts; for the control, the base only."""
    method = method_of(run, branch)
    with run.waiting("loading the model"):
        if method is None:
            return load_model(source.folder, model=source.model)
        return load_whole(source.folder, model=source.model, base_bits=method.options.base_bits)


def add_to(run: Run, branch: Branch, trainee: Trainee, *, max_steps: int) -> None:
    """Train experts on a model instead of the model, if they are selected; add missing ones.

    Raises:
        RequestError: the model has incompatible experts, or no layer for adapters.
    """
    method = method_of(run, branch)
    if method is None:
        return
    mixture = mixture_on(trainee.model)
    if mixture is None:
        seed = run.seed("experts", *branch.purpose)
        mixture = method.begin(trainee.model, bounds=run.data.bounds, seed=seed)
    else:
        _resume(run, branch, mixture, method)
    trainee.make_module = partial(ExpertModule, mixture, losses=method.losses)
    if isinstance(method, DynamicExperts):
        trainee.surgery_callbacks += (_callback(run, branch, mixture, method, max_steps=max_steps),)


def _callback(
    run: Run,
    branch: Branch,
    mixture: ExpertMixture,
    method: DynamicExperts,
    *,
    max_steps: int,
) -> ExpertCallback:
    """Return the callback that spawns experts, with the state of a checkpoint's experts."""
    registry, shape = method.registry(max_steps=max_steps), method.shape(mixture.model)
    for name in method.options.freeze_projections or ():
        if name not in shape.targets:
            raise RequestError(
                f"experts.freeze_projections = {name}: experts are on "
                f"{', '.join(shape.targets)}.{did_you_mean(name, shape.targets)}"
            )
    known, stored = None, mixture.extra.get("roster")
    if stored is None:
        known = _known(run, is_measured=registry.detector is not None)
    else:
        registry.load_state_dict(stored)
        if not branch.task:  # counters of an earlier run start again at zero
            registry.batches = dict.fromkeys(registry.batches, 0)
    new, length = run.data.new_domains_of(branch), run.data.sequence_length
    callback = ExpertCallback(
        registry,
        shape=shape,
        known=known,
        skill="+".join(new) if registry.detector is None else None,
        domains=new,
        seed=run.seed("experts", *branch.purpose),
    )
    callback.load_exemplars(mixture.extra)
    if callback.exemplar_length not in (0, length):
        raise RequestError(
            f"data.sequence_length = {length}: the exemplars stored in the checkpoint "
            f"have {callback.exemplar_length} tokens; use that length, or "
            "experts.rehearsal=0."
        )
    return callback


def _resume(run: Run, branch: Branch, mixture: ExpertMixture, method: Experts) -> None:
    """Continue training the experts of a checkpoint, with their state."""
    files = run.source(branch.start).experts
    assert files is not None
    mixture.extra = dict(ExpertFolder.of_files(files).extra)
    frozen = set(mixture.extra.get("frozen", ()))
    for name, parameter in mixture.model.named_parameters():
        is_trained = is_of_adapter(name) or ROUTER in name
        parameter.requires_grad_(is_trained and name not in frozen)
    options = method.options
    if isinstance(method, SingleLora):
        own = shape_of(mixture.model, mixture.names[0])
        expected = method.shape(mixture.model)
        if own != replace(expected, targets=tuple(sorted(expected.targets))):
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
        for key in ("prior", "inner_prior", "evidence_scale", "evidence_window"):
            name, value = key.removeprefix("evidence_"), getattr(options, key)
            if (stored := getattr(mixture.evidence, name)) != value:
                change = f"experts.{key} = {value} (in the checkpoint: {stored})"
                run.say("experts", change.replace("None", "null"))
            setattr(mixture.evidence, name, value)
    if (recorded := mixture.extra.get("boundaries") or options.boundaries) != options.boundaries:
        raise RequestError(
            f"experts.boundaries = {options.boundaries}: the checkpoint was trained with "
            f"{recorded}; use experts.boundaries={recorded}."
        )


def _known(run: Run, *, is_measured: bool) -> BaseData:
    """Return data of the old domains, for statistics of the novelty detector; never trained on."""
    sequences = run.data.training_sequences(run.data.old_domains)
    size = run.data.batch_size
    batches: dict[str, Sequence[Tensor]] = dict.fromkeys(sequences, ())
    for domain, each in sequences.items() if is_measured else ():
        # Enough batches for calibration, with as few repetitions as possible
        generator = torch.Generator().manual_seed(run.seed("known", domain))
        count, order = CALIBRATION_BATCHES * size, torch.empty(0, dtype=torch.int64)
        while len(order) < count:
            order = torch.cat([order, torch.randperm(len(each), generator=generator)])
        batches[domain] = each[order[:count]].long().split(size)
    tokens = (each.flatten().long() for each in sequences.values())
    return BaseData(batches=batches, tokens=torch.cat([torch.empty(0, dtype=torch.int64), *tokens]))


def reading_flops(model: nn.Module) -> Flops:
    """Return the FLOPs of reading a sequence, including LoRA experts."""
    mixture = mixture_on(model)
    return forward_flops(model_of(model)) if mixture is None else forward_flops_of(mixture)


def reading_flops_of(run: Run, source: Source) -> Flops:
    """Return the FLOPs of reading a sequence with a checkpoint, as this run loads it."""
    if run.config.experts is None or source.experts is None:
        return forward_flops(source.model)
    return reading_flops(load_whole(source.folder, model=source.model))


def usage_sequences(run: Run) -> Mapping[str, Tensor]:
    """Return domain → the sequences for measuring its gates, int64 [N, T]."""
    return {
        domain: run.data.sample_equally([domain], _USAGE_SEQUENCES, "usage").long()
        for domain in run.data.domains
    }

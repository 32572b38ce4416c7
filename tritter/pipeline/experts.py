"""LoRA experts in a run: which training runs use them, and which weights are trained."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from tritter.checkpoints import Source
from tritter.core.families import Flops, forward_flops
from tritter.core.models import load_model, model_of
from tritter.methods.experts.method import Experts
from tritter.methods.experts.mixture import mixture_on
from tritter.methods.experts.module import forward_flops_of
from tritter.methods.experts.whole import load_whole
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.training.options import TrainingConfig

_USAGE_SEQUENCES = 16  # per domain, to measure the gates


def method_of(run: Run, branch: Branch) -> Experts | None:
    """Return the expert method of a branch; None if the whole model is trained."""
    experts = run.config.experts
    if experts is None or branch.is_control:
        return None
    method: Experts = experts.kind(**experts.arguments)
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

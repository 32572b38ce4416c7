"""LoRA experts as a choice of a run: what is asked of them, and what they put into a training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.checkpoints.expert_files import experts_in
from tritter.core.families import family_of
from tritter.errors import Problem
from tritter.methods.experts.options import FIRST, AdapterOptions, DynamicOptions, Timing
from tritter.options import RunRequest, Start
from tritter.training.optimizer import adam_problems

if TYPE_CHECKING:
    from torch import nn

    from tritter.methods.experts.adapters import AdapterShape
    from tritter.methods.experts.mixture import ExpertMixture
    from tritter.methods.experts.module import ExpertLosses
    from tritter.methods.experts.registry import ExpertRegistry

ONLY = "lora"  # what the one adapter of single_lora is called


class Experts(ABC):
    """What a config names by `_target_` in the group `experts`.

    Args:
        asked: its options.
    """

    Options: ClassVar[type[AdapterOptions]]
    name: ClassVar[str]
    first: ClassVar[str]  # what its first expert is called
    is_dynamic: ClassVar[bool]
    whole_weights: ClassVar[str] = (  # why it can't train with trainer=fsdp
        "adapters are spawned beside whole weights, and each process holds a part"
    )

    def __init__(self, asked: Any) -> None:
        self.asked = asked

    @classmethod
    def problems(cls, asked: Any, run: RunRequest) -> Iterator[Problem]:
        """Yield what of a run does not go together with experts."""
        if run.pipeline.target_params is not None:
            reason = "a run that grows to a size trains all of it; leave it out, or experts=none"
            yield Problem("pipeline.target_params", run.pipeline.target_params, reason=reason)
        if run.growth is not None:
            reason = "neurons grow in a base that is trained, and under experts it is frozen"
            yield Problem("growth", run.growth.kind.__name__, reason=reason)
        yield from adam_problems(run.optimizer, doing="experts come and go with Adam's two moments")
        if run.optimizer.carry:
            reason = "moments of the base are carried, which is frozen; those of experts begin anew"
            yield Problem("optimizer.carry", True, reason=reason)

    @classmethod
    def start_problems(cls, asked: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        """Yield why experts can't be put on, or gone on with, in what a run starts from."""
        family = family_of(start.source)
        if asked.base_bits is not None and any(each.is_transposed for each in family.tensors):
            reason = (
                f"the matrices of {family.model_type} lie transposed, and none would be quantised"
            )
            yield Problem("experts.base_bits", asked.base_bits, reason=reason, nearest="null")
        files = experts_in(start.folder, key="model.path")
        if files is None:
            return
        names = files.head.names
        if names[0] != cls.first:
            reason = (
                f"the checkpoint has the experts {', '.join(names)}, none of which is its "
                f"{cls.first}"
            )
            yield Problem("experts", cls.name, reason=reason)
        if asked.base_bits != (bits := files.head.base_bits):
            held = "as it stands in the folder" if bits is None else f"in {bits} bits"
            reason = f"the experts of the checkpoint were trained on a base {held}"
            near = "null" if bits is None else str(bits)
            yield Problem("experts.base_bits", asked.base_bits, reason=reason, nearest=near)
        router = getattr(asked, "router", "evidence")
        if router != files.head.router:
            reason = f"the experts of the checkpoint are mixed by {files.head.router}"
            yield Problem("experts.router", router, reason=reason, nearest=files.head.router)

    @abstractmethod
    def begin(self, model: nn.Module, *, end_of_text_id: int, seed: int) -> ExpertMixture:
        """Put a mixture on a model that has none, in which nothing changes at first.

        Raises:
            RequestError: the model has no layer of a name in `experts.targets`.
        """

    @property
    def losses(self) -> ExpertLosses:
        """What is added to the loss of the task."""
        from tritter.methods.experts.module import ExpertLosses

        return ExpertLosses()

    def shape(self, model: nn.Module) -> AdapterShape:
        """Return what an adapter on a model is at first."""
        from tritter.methods.experts.adapters import AdapterShape, adaptable

        asked: AdapterOptions = self.asked
        targets = asked.targets or tuple(sorted(adaptable(model)))
        return AdapterShape(asked.rank, float(asked.alpha), tuple(targets))


class SingleLora(Experts):
    """One adapter that learns all there is to learn: the control that experts are held against."""

    Options = AdapterOptions
    name = "single_lora"
    first = ONLY
    is_dynamic = False

    def begin(self, model: nn.Module, *, end_of_text_id: int, seed: int) -> ExpertMixture:
        from tritter.methods.experts.mixture import ExpertMixture

        mixture = ExpertMixture(model, router="evidence")  # of one expert, whose gates are 1
        mixture.add(ONLY, self.shape(model), seed=seed)
        return mixture


class DynamicExperts(Experts):
    """An expert for each skill that is found new, on what the base knew."""

    Options = DynamicOptions
    name = "dylora"
    first = FIRST
    is_dynamic = True

    @classmethod
    def problems(cls, asked: Any, run: RunRequest) -> Iterator[Problem]:
        yield from super().problems(asked, run)
        if asked.max_rank < asked.rank:
            reason = f"below experts.rank = {asked.rank}, that experts begin with"
            yield Problem("experts.max_rank", asked.max_rank, reason=reason)
        if asked.router == "evidence" and asked.shared_router:
            reason = "experts.router=evidence has no learned router; allowed with learned and both"
            yield Problem("experts.shared_router", True, reason=reason)
        if asked.boundaries == "detected":
            batch, steps, least = run.data.batch_size, run.training.max_steps, 2
            if batch < least:
                reason = f"novelty is told by the spread of a batch; must be at least {least}"
                yield Problem("data.batch_size", batch, reason=reason)
            seen = steps * run.trainer.accumulate_grad_batches * batch
            if asked.min_samples > seen:
                reason = f"a training of {steps} steps sees {seen:,} sequences, too few for any "
                reason += "decision"
                yield Problem("experts.min_samples", asked.min_samples, reason=reason)
        elif asked.when_full == "merge":
            reason = "similarity is that of what novelty looks at; with boundaries=told use evict"
            yield Problem("experts.when_full", "merge", reason=reason)

    @classmethod
    def start_problems(cls, asked: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        yield from super().start_problems(asked, run, start)
        is_new = experts_in(start.folder, key="model.path") is None
        if is_new and asked.boundaries == "detected" and not run.text.old:
            reason = (
                "what is new is told by what the base knows, of which text is looked at, and "
                "never trained on; name some, or say experts.boundaries=told"
            )
            yield Problem("data.old", {}, reason=reason)

    def begin(self, model: nn.Module, *, end_of_text_id: int, seed: int) -> ExpertMixture:
        from tritter.methods.experts.mixture import ExpertMixture

        asked: DynamicOptions = self.asked
        mixture = ExpertMixture(
            model,
            router=asked.router,
            is_shared=asked.shared_router,
            evidence={
                "end_of_text_id": end_of_text_id,
                "window": asked.evidence_window,
                "scale": asked.evidence_scale,
                "prior": asked.prior,
            },
        )
        mixture.add(FIRST, self.shape(model), seed=seed)
        return mixture

    @property
    def losses(self) -> ExpertLosses:
        from tritter.methods.experts.module import ExpertLosses

        asked: DynamicOptions = self.asked
        return ExpertLosses(
            balance=asked.balance, entropy=asked.entropy, z=asked.z, distill=asked.distill
        )

    def shape(self, model: nn.Module) -> AdapterShape:
        from tritter.methods.experts.adapters import AdapterShape, adaptable

        shape = super().shape(model)
        asked: DynamicOptions = self.asked
        if asked.router != "learned" or asked.targets is not None:
            return shape
        return AdapterShape(shape.rank, shape.alpha, tuple(sorted(adaptable(model, whole=False))))

    def registry(self, *, max_steps: int) -> ExpertRegistry:
        """Return who is who before anything is known."""
        from tritter.methods.experts.registry import ExpertRegistry
        from tritter.methods.novelty import NoveltyDetector

        asked: DynamicOptions = self.asked
        timing = Timing.of(asked, max_steps=max_steps)
        if asked.boundaries == "told":
            return ExpertRegistry(asked, timing=timing, detector=None)
        detector = NoveltyDetector(detector=asked.detector, options=asked.novelty)
        return ExpertRegistry(asked, timing=timing, detector=detector)

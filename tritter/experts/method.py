"""LoRA experts as a choice of a run: what is asked of them, and what they put into a training."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from tritter.experts.adapters import AdapterShape, adaptable
from tritter.experts.mixture import ExpertMixture
from tritter.experts.module import ExpertLosses
from tritter.experts.options import AdapterOptions, DynamicOptions, Timing
from tritter.experts.roster import FIRST, Roster
from tritter.novelty import NoveltyDetector
from tritter.novelty.detectors import detector_of

ONLY = "lora"  # what the one adapter of single_lora is called


class Experts(ABC):
    """What a config names by `_target_` in the group `experts`.

    Args:
        asked: its options.
    """

    Options: ClassVar[type[AdapterOptions]]
    name: ClassVar[str]
    is_dynamic: ClassVar[bool]

    def __init__(self, asked: Any) -> None:
        self.asked = asked

    @classmethod
    @abstractmethod
    def check(cls, asked: Any) -> None:
        """Refuse options that name what there is not, before anything is built.

        Raises:
            RequestError: says which.
        """

    @abstractmethod
    def begin(self, model: nn.Module, *, end_of_text_id: int, seed: int) -> ExpertMixture:
        """Put a mixture on a model that has none, in which nothing changes at first.

        Raises:
            RequestError: the model has no layer of a name in `experts.targets`.
        """

    @property
    def losses(self) -> ExpertLosses:
        """What is added to the loss of the task."""
        return ExpertLosses()

    def shape(self, model: nn.Module) -> AdapterShape:
        """Return what an adapter on a model is at first."""
        asked: AdapterOptions = self.asked
        targets = asked.targets or tuple(sorted(adaptable(model)))
        return AdapterShape(asked.rank, float(asked.alpha), tuple(targets))


class SingleLora(Experts):
    """One adapter that learns all there is to learn: the control that experts are held against."""

    Options = AdapterOptions
    name = "single_lora"
    is_dynamic = False

    @classmethod
    def check(cls, asked: Any) -> None:
        """Find nothing: there is no name among its options."""

    def begin(self, model: nn.Module, *, end_of_text_id: int, seed: int) -> ExpertMixture:
        mixture = ExpertMixture(model, router="evidence")  # of one expert, whose gates are 1
        mixture.add(ONLY, self.shape(model), seed=seed)
        return mixture


class DynamicExperts(Experts):
    """An expert for each skill that is found new, on what the base knew."""

    Options = DynamicOptions
    name = "dylora"
    is_dynamic = True

    @classmethod
    def check(cls, asked: Any) -> None:
        detector_of(asked.detector, key="experts.detector")

    def begin(self, model: nn.Module, *, end_of_text_id: int, seed: int) -> ExpertMixture:
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
        asked: DynamicOptions = self.asked
        return ExpertLosses(
            balance=asked.balance, entropy=asked.entropy, z=asked.z, distill=asked.distill
        )

    def shape(self, model: nn.Module) -> AdapterShape:
        shape = super().shape(model)
        asked: DynamicOptions = self.asked
        if asked.router != "learned" or asked.targets is not None:
            return shape
        return AdapterShape(shape.rank, shape.alpha, tuple(sorted(adaptable(model, whole=False))))

    def roster(self, *, max_steps: int) -> Roster:
        """Return who is who before anything is known."""
        asked: DynamicOptions = self.asked
        timing = Timing.of(asked, max_steps=max_steps)
        if asked.boundaries == "told":
            return Roster(asked, timing=timing, detector=None)
        detector = NoveltyDetector(detector=detector_of(asked.detector), options=asked.novelty)
        return Roster(asked, timing=timing, detector=detector)

"""What experts may be asked, and how their schedules fit a training."""

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from tritter.limits import MAX_PARAMETERS
from tritter.methods.novelty.options import DETECTORS, Detector, NoveltyOptions
from tritter.options import Count, Text, WholeNumber, options, part_field

MAX_RANK, MAX_EXPERTS = 1024, 256
FIRST = "expert_0"  # the expert of what the base knows
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Weight = Annotated[float, Field(ge=0)]
_Names = Annotated[tuple[Text, ...], Field(min_length=1)]


@options
class AdapterOptions:
    """An adapter, and how it is trained.

    Args:
        rank: r.
        alpha: α; what an adapter adds is multiplied with α / r.
        targets: last names of the layers that adapters stand on. None: every linear layer of the
            decoder layers, the embedding and the head.
        learning_rate: of adapters and routers, in the place of `training.learning_rate`.
        base_bits: that bitsandbytes holds the linear layers of the frozen base's decoder layers in.
            None: as they are.
    """

    rank: _Rank
    alpha: Annotated[float, Field(gt=0, lt=1e6)]
    targets: _Names | None
    learning_rate: Annotated[float, Field(gt=0)]
    base_bits: Literal[8, 4] | None


@options
class AddedOptions:
    """Experts that are added to a live model for a training loop of one's own.

    Args:
        rank: r of each adapter.
        num_experts: how many are added.
        alpha: α; an adapter is multiplied by α / r. None: twice the rank.
        targets: last names of the layers that get adapters. None: every linear layer of the
            decoder layers.
        router: `learned`, `evidence` or `both`. None: as the model has it, else `learned`.
        top_k: experts per token. None: all.
        temperature: of the gates.
        capacity_factor: see `Routing`.
        seed: of the adapters' first weights.
    """

    rank: _Rank = 8
    num_experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 2
    alpha: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    targets: _Names | None = None
    router: Literal["learned", "evidence", "both"] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    seed: WholeNumber = 0


@options
class DynamicOptions(AdapterOptions):
    """The keys of `experts=dylora`.

    Args:
        max_experts: with the first, which is the base's.
        top_k: experts that a token takes once all are mature; before it takes all.
        router: see `tritter.methods.experts.mixture`.
        shared_router: one learned router for all layers.
        prior, evidence_scale, evidence_window: of `Evidence`.
        detector: of novelty, as `tritter.options.read_part` reads it.
        min_samples, in_a_row, confidence, cooldown, moving_average: of a decision on novelty.
        min_gain: nats per token that a new skill is harder for the base than its own text, at
            least; below it an expert is not worth its weights.
        max_trainable_parameters: of all experts together; None: no limit.
        when_full: what makes room where a limit is met: nothing (the nearest expert learns the
            skill too), the least used expert goes, or the two most similar become one.
        boundaries: `told`: each task is a skill, and no novelty is looked for (an oracle).
        exemplars: sequences of each expert's text that are kept, and beside the checkpoint too.
        rehearsal: share of a batch that is exemplars of other experts; 0: none are kept.
        maturity_steps: that an expert is trained until it is mature. None: a tenth of the training.
        temperature: of the gates at last, from 1 within `anneal_steps` (None: likewise) of the step
            at which all experts are mature.
        capacity_factor: see `Routing`.
        balance, entropy, z: weights of the losses of learned routers.
        max_rank: the rank doubles up to it while an expert stalls.
        stall_steps: of an expert's training, whose mean loss is compared with that of as many
            before. None: a fifth of the training.
        stall_gain: nats per token; an expert that gains less stalls.
        freeze_converged: an expert that stalls at its largest rank is trained no more.
        freeze_projections: only in the layers of these names. None: whole.
        distill: weight of KL(mixture without it ‖ mixture) while an expert is young.
    """

    max_experts: Annotated[int, Field(ge=2, le=MAX_EXPERTS)]
    top_k: Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
    router: Literal["evidence", "learned", "both"]
    shared_router: bool
    prior: float
    evidence_scale: Annotated[float, Field(gt=0)]
    evidence_window: Count
    detector: Annotated[Detector, *part_field("experts.detector", DETECTORS, base=Detector)]
    min_samples: Annotated[int, Field(ge=2, le=1_000_000)]
    in_a_row: Count
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    cooldown: WholeNumber
    moving_average: Annotated[float, Field(ge=0, lt=1)]
    min_gain: float
    max_trainable_parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)] | None
    when_full: Literal["stop", "evict", "merge"]
    boundaries: Literal["detected", "told"]
    exemplars: Count
    rehearsal: Annotated[float, Field(ge=0, le=0.5)]
    maturity_steps: WholeNumber | None
    temperature: Annotated[float, Field(gt=0)]
    anneal_steps: WholeNumber | None
    capacity_factor: Annotated[float, Field(gt=0)] | None
    balance: _Weight
    entropy: _Weight
    z: _Weight
    max_rank: _Rank
    stall_steps: Annotated[int, Field(ge=2)] | None
    stall_gain: float
    freeze_converged: bool
    freeze_projections: _Names | None
    distill: _Weight

    @property
    def novelty(self) -> NoveltyOptions:
        """What a decision on novelty rests on."""
        return NoveltyOptions(
            min_samples=self.min_samples,
            in_a_row=self.in_a_row,
            confidence=self.confidence,
            cooldown=self.cooldown,
            moving_average=self.moving_average,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The schedules of experts in steps of one training."""

    maturity: int
    anneal: int
    stall: int

    @classmethod
    def of(cls, asked: DynamicOptions, *, max_steps: int) -> "Timing":
        """Return what `asked` means in a training of so many steps."""
        tenth, fifth = ceil(max_steps / 10), max(2, ceil(max_steps / 5))
        return cls(
            maturity=tenth if asked.maturity_steps is None else asked.maturity_steps,
            anneal=tenth if asked.anneal_steps is None else asked.anneal_steps,
            stall=fifth if asked.stall_steps is None else asked.stall_steps,
        )

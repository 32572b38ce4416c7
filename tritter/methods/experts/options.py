"""Options of experts, and their schedules in steps."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tritter.limits import MAX_PARAMETERS
from tritter.methods.novelty.options import DETECTORS, Detector, NoveltyOptions
from tritter.options import Count, Text, WholeNumber, options, part_field

_MAX_RANK, _MAX_EXPERTS = 1024, 256
_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
_Weight = Annotated[float, Field(ge=0)]
_Names = Annotated[tuple[Text, ...], Field(min_length=1)]


@options
class AdapterOptions:
    """An adapter and its training.

    Args:
        rank: r.
        alpha: α; the output of an adapter is scaled by α / r.
        targets: last names of the layers that get adapters. None: every linear layer of the decoder
            layers, the embedding and the head.
        learning_rate: of adapters and routers, instead of `training.learning_rate`. None: 0.32
            / hidden size of the base, at most 0.005.
        base_bits: quantise the linear layers of the frozen base's decoder layers to this many bits
            with bitsandbytes. None: no quantisation.
    """

    rank: _Rank
    alpha: Annotated[float, Field(gt=0, lt=1e6)]
    targets: _Names | None
    learning_rate: Annotated[float, Field(gt=0)] | None
    base_bits: Literal[8, 4] | None


@options
class AddedOptions:
    """Experts that are added to a live model for your own training loop.

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
    num_experts: Annotated[int, Field(ge=1, le=_MAX_EXPERTS)] = 2
    alpha: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    targets: _Names | None = None
    router: Literal["learned", "evidence", "both"] | None = None
    top_k: Annotated[int, Field(ge=1, le=_MAX_EXPERTS)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    seed: WholeNumber = 0


@options
class DynamicOptions(AdapterOptions):
    """The options of `experts=dylora`.

    Args:
        max_experts: maximum number of experts, including the first one, that of the base.
        top_k: experts per token once all are mature; before, every token uses all experts.
        router: see `tritter.methods.experts.mixture`.
        shared_router: one learned router for all layers.
        prior, inner_prior, evidence_scale, evidence_window: of `Evidence`.
        detector: of novelty, see `tritter.options.read_part`.
        min_samples, in_a_row, confidence, cooldown, moving_average: of `NoveltyOptions`.
        max_trainable_parameters: of all experts together; None: no limit.
        when_full: what happens when a limit is reached: `stop`: the nearest expert also learns the
            new skill; `evict`: the least used expert is removed; `merge`: the two most similar
            experts are merged.
        boundaries: `told`: each task is a skill, and novelty is not detected (an oracle).
        exemplars: sequences of each expert's data that are kept and saved with the checkpoint.
        rehearsal: share of a batch that consists of exemplars of other experts; 0: none are kept.
        maturity_steps: training steps until an expert is mature. None: a tenth of the run.
        temperature: final temperature of the gates, which starts at 1.
        anneal_steps: steps to reach it once all experts are mature. None: a tenth of the run.
        capacity_factor: see `Routing`.
        balance, entropy, z: weights of losses of learned routers, see `gates`.
        max_rank: the rank of a stalled expert doubles up to this.
        stall_steps: window of an expert's training steps, whose mean loss is compared with that of
            the window before. None: a fifth of the run.
        stall_gain: an expert stalls if its loss falls by less than this, in nats per token.
        freeze_converged: freeze an expert that stalls at its largest rank, beyond the noise of
            its losses.
        freeze_projections: freeze only layers of these names. None: all of them.
        distill: weight of KL(mixture without it ‖ mixture) while an expert is young.
    """

    first: ClassVar[str] = "expert_0"  # name of the expert of the base's own data

    max_experts: Annotated[int, Field(ge=2, le=_MAX_EXPERTS)]
    top_k: Annotated[int, Field(ge=1, le=_MAX_EXPERTS)]
    router: Literal["evidence", "learned", "both"]
    shared_router: bool
    prior: float
    inner_prior: float | None
    evidence_scale: Annotated[float, Field(gt=0)]
    evidence_window: Count
    detector: Annotated[Detector, *part_field("experts.detector", DETECTORS, base=Detector)]
    min_samples: Annotated[int, Field(ge=2, le=1_000_000)]
    in_a_row: Count
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    cooldown: WholeNumber
    moving_average: Annotated[float, Field(ge=0, lt=1)]
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
        """Options of the decision on novelty."""
        return NoveltyOptions(
            min_samples=self.min_samples,
            in_a_row=self.in_a_row,
            confidence=self.confidence,
            cooldown=self.cooldown,
            moving_average=self.moving_average,
        )

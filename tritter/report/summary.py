"""summary.json of a run: one model for writing and reading it.

A file may come from anywhere and from any version: it may have unknown keys, and lack known ones.
Numbers are bounded so that sums and axes stay finite. Only fields that were set are written.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import (
    Annotated,
    Any,
    Literal,
    Self,  # typing has it from Python 3.11 on
)

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tritter.storage.reading import read_object
from tritter.storage.records import validate_record

MAX_NUMBER = 1e30  # sums and squares of such numbers, and axes over them, are finite
_Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**15)]

_MAX_ITEMS = 1000  # experts, and domains
_MAX_EVENTS = 100_000
_MAX_LAYERS = 1024
_Width = Annotated[int, Field(ge=1, le=10**9)]
_Widths = Annotated[tuple[_Width, ...], Field(min_length=1, max_length=_MAX_LAYERS)]
_Shares = dict[str, _Number]
_Rows = Annotated[
    Mapping[str, Annotated[tuple[_Number | None, ...], Field(max_length=_MAX_EVENTS)]],
    Field(max_length=_MAX_ITEMS),
]
_MAX_EXPERTS = Field(max_length=_MAX_EVENTS)
_Transfer = dict[str, _Number | None]
_Row = Annotated[list[_Number | None], Field(max_length=_MAX_ITEMS)]
_Names = Annotated[list[str], Field(min_length=1, max_length=_MAX_ITEMS)]
_OfOne = Annotated[float, Field(ge=0, le=1)]
_Costs = Mapping[str, _Number | None]
_Status = Literal["kept", "rolled_back", "undecided", "ungated"]
_Column = Annotated[list[_Number], Field(max_length=_MAX_EVENTS)]


class Part(BaseModel):
    """A part of a summary: frozen; unknown keys are kept.

    `model_construct` builds one from measured numbers without checking them.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    def plain(self) -> dict[str, Any]:
        """Return the fields that were set as plain values for JSON."""
        # Parts of a run may have a list in place of a tuple
        return self.model_dump(exclude_unset=True, warnings=False)


# Growth


class GrowthEvent(Part):
    """One layer that grew after a step.

    Args:
        neurons: Neurons of the layer, afterwards.
        died: Neurons found dead and not replaced.
        pressure: Pressure of the layer, the signal of the trigger.
        function_change: Logit shift, in standard deviations of the logits.
        parameters: Parameters of the model, afterwards.
        flops: Training FLOPs so far.
    """

    step: _Count
    layer: _Count
    neurons: _Width
    born: _Count
    replaced: _Count = 0
    died: _Count = 0
    pressure: _Number | None = None
    function_change: _Number | None = None
    parameters: _Count | None = None
    flops: _Number | None = None


class _Neurons(Part):
    before: _Widths
    after: _Widths


class _Sizes(Part):
    before: _Count | None = None
    after: _Count | None = None


class _Norms(Part):
    young: _Number | None = None
    old: _Number | None = None


class _GrowthMap(Part):
    steps: tuple[_Count, ...] = ()
    neurons: tuple[tuple[_Width, ...], ...] = ()
    pressure: tuple[tuple[_Number | None, ...], ...] = ()


class GrowthRecord(Part):
    """A run's growth.

    Args:
        options: The options of `growth`.
        advice: What to try if nothing grew, from the trigger.
        checks: Number of checks of the trigger.
        neurons: Neurons of each layer, before and after.
        parameters: Parameters of the grown model, before and after.
        young: Neurons that were not mature at the end.
        map: Pressure and neurons of each layer at each check.
        update_norms: Mean norm of the updates of `young` and `old` neurons.
    """

    events: Annotated[tuple[GrowthEvent, ...], Field(max_length=_MAX_EVENTS)]
    born: _Count
    neurons: _Neurons
    options: Mapping[str, Any] = {}
    advice: str = ""
    replaced: _Count = 0
    died: _Count = 0
    checks: _Count = 0
    parameters: _Sizes = _Sizes()
    young: _Count | None = None
    map: _GrowthMap = _GrowthMap()
    function_change: _Number | None = None
    update_norms: _Norms | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        number, seen = len(self.neurons.before), self.map
        if len(self.neurons.after) != number:
            raise ValueError("neurons before and after have different numbers of layers")
        steps = [event.step for event in self.events]
        if steps != sorted(steps):
            raise ValueError("the steps of the events do not ascend")
        if any(event.layer >= number for event in self.events):
            raise ValueError(f"an event has a layer outside 0 to {number - 1}")
        if any(later <= earlier for earlier, later in pairwise(seen.steps)):
            raise ValueError("the steps of the map do not ascend")
        for name, rows in (("neurons", seen.neurons), ("pressure", seen.pressure)):
            if len(rows) != len(seen.steps) or any(len(row) != number for row in rows):
                raise ValueError(f"{name} of the map: {number} layers are required at each step")
        return self

    @property
    def name(self) -> str:
        """Its trigger and its initialiser."""
        names = []
        for option in (self.options.get("trigger"), self.options.get("initialiser")):
            name = option
            if isinstance(option, Mapping):  # a name, or an external class
                name = option.get("name") or str(option.get("_target_", "")).rpartition(".")[2]
            names.append(str(name or "?"))
        return "+".join(names)

    @property
    def event_steps(self) -> tuple[int, ...]:
        """Steps after which it grew, each once."""
        return tuple(dict.fromkeys(event.step for event in self.events))


# LoRA experts: any part may be missing


class Spawn(Part):
    """An expert that was spawned.

    Args:
        step: Step of the run, counted over all tasks.
        domain: Domain of the training data at that step.
        similarity: Known skill → similarity of the batches.
        score: Novelty of the batches.
        threshold: The threshold of the novelty.
        batches: Number of batches for the decision.
    """

    expert: str = "?"
    step: _Count | None = None
    domain: str | None = None
    similarity: _Shares = {}
    score: _Number | None = None
    threshold: _Number | None = None
    batches: _Count | None = None
    samples: _Count | None = None


class _ExpertEvent(Part):
    """An event of an expert, and its reason.

    Args:
        gone: The expert that was merged into this one.
    """

    step: _Count | None = None
    kind: str = "?"
    expert: str = "?"
    why: str = ""
    gone: str | None = None


class ExpertHistory(Part):
    """A number of each expert over the steps; None before it exists, or if unknown."""

    steps: Annotated[tuple[_Count, ...], Field(max_length=_MAX_EVENTS)] = ()
    gates: _Rows = {}
    ranks: _Rows = {}

    @property
    def values(self) -> Mapping[str, Sequence[float | None]]:
        """The gates, or the ranks."""
        return self.gates or self.ranks


class _Parameters(Part):
    base: _Count | None = None
    trainable: _Count | None = None
    share: _Number | None = None


class _Routing(Part):
    top_k: _Count | None = None
    temperature: _Number | None = None


class ExpertsRecord(Part):
    """A run's LoRA experts.

    Args:
        number: Number of adapters at the end.
        names: Names of the gates at the end, in order.
        usage: Domain → expert → mean gate on held-out data.
        domains: Expert → domain that it was spawned on, also in an earlier run.
        states: Expert → young, mature or frozen at the end.
        ranks: Expert → rank at the end.
        parameters: Parameters of the frozen base, and of adapters and router.
        batches: Verdict of the novelty detector → number of batches.
    """

    kind: str = "?"
    number: _Count | None = None
    names: Annotated[tuple[str, ...], Field(max_length=_MAX_ITEMS)] = ()
    spawned: Annotated[tuple[Spawn, ...], _MAX_EXPERTS] = ()
    events: Annotated[tuple[_ExpertEvent, ...], _MAX_EXPERTS] = ()
    usage: Annotated[dict[str, _Shares], Field(max_length=_MAX_ITEMS)] = {}
    usage_over_time: ExpertHistory = ExpertHistory()
    domains: dict[str, str] = {}
    states: dict[str, str] = {}
    ranks: dict[str, _Count] = {}
    ranks_over_time: ExpertHistory = ExpertHistory()
    parameters: _Parameters = _Parameters()
    batches: dict[str, _Count] = {}
    routing: _Routing = _Routing()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        courses = (
            ("usage_over_time", self.usage_over_time),
            ("ranks_over_time", self.ranks_over_time),
        )
        for name, course in courses:
            if any(later < earlier for earlier, later in pairwise(course.steps)):
                raise ValueError(f"the steps of {name} do not ascend")
            if any(len(each) != len(course.steps) for each in course.values.values()):
                number = len(course.steps)
                raise ValueError(f"{name}: {number} numbers are required, one per step")
        return self

    def mean_usage(self, name: str) -> float | None:
        """Return the mean gate of an expert over the domains that have it."""
        gates = [shares.get(name) for shares in self.usage.values()]
        known = [gate for gate in gates if gate is not None]
        return fmean(known) if known else None

    @property
    def by_usage(self) -> tuple[str, ...]:
        """The present experts, most used first."""
        return tuple(sorted(self.names, key=lambda name: -(self.mean_usage(name) or 0.0)))

    @property
    def similarities(self) -> tuple[tuple[str, Mapping[str, float | None]], ...]:
        """Spawned experts with their recorded similarities to the known skills."""
        return tuple((each.expert, each.similarity) for each in self.spawned if each.similarity)

    @property
    def refused(self) -> tuple[_ExpertEvent, ...]:
        """Spawns that were refused."""
        return tuple(event for event in self.events if event.kind == "refused")


# Sequential tasks


class Matrix(Part):
    """The transfer matrix of sequential tasks: every domain after every task.

    R[k, d] is the score of domain d after task k, R[0, d] the score before the first task.
    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 2) use accuracies and a random model as
    reference. Here the matrix contains losses per byte, so negative transfer is an improvement,
    and R[0] is the base model. Domains learned before the run have row 0 as their own row and
    count in backward transfer.

    Args:
        rows: Names of the rows: before the first task, and after each task.
        loss_per_byte: Row by row, the losses of the domains.
        trained: Row by row, the domains of the task.
        accuracy: Domain → its accuracy, row by row.
        own: Domain → the row after the task that first trained it.
    """

    rows: _Names
    domains: _Names
    loss_per_byte: list[_Row]
    trained: list[list[str]] = []
    accuracy: dict[str, _Row] = {}
    own: dict[str, _Count] = {}
    backward_transfer: _Transfer = {}
    forward_transfer: _Transfer = {}
    mean_backward_transfer: _Number | None = None
    mean_forward_transfer: _Number | None = None

    @classmethod
    def of(
        cls,
        baseline: "Scores",
        tasks: "Sequence[TaskRecord]",
        *,
        learned_before: Sequence[str] = (),
    ) -> Self:
        """Return the matrix and the transfers.

        A domain's own task is the first one that includes it. Backward transfer is R[last] −
        R[own] of domains learned before the last task. Forward transfer is R[own − 1] − R[0] of
        domains not learned in the first task. Missing scores, and values computed from them, are
        None.

        Args:
            baseline: scores before the first task.
            tasks: the tasks in order, each with the scores of all domains after it.
            learned_before: domains that the model learned before the run.
        """
        rows = [baseline, *(task.final for task in tasks)]
        domains = [name for name, score in baseline.items() if "loss" in score.model_fields_set]
        losses = {name: [row[name].loss_per_byte for row in rows] for name in domains}
        own = {name: 0 for name in learned_before if name in losses}
        for number, task in enumerate(tasks, start=1):
            for name in task.domains:
                own.setdefault(name, number)
        last = len(tasks)
        learned = [(name, own[name], losses[name]) for name in domains if name in own]
        backward = {name: _difference(each[last], each[k]) for name, k, each in learned if k < last}
        forward = {name: _difference(each[k - 1], each[0]) for name, k, each in learned if k > 1}
        return cls.model_construct(
            rows=["baseline", *(f"task {number}" for number in range(1, last + 1))],
            trained=[[], *(list(task.domains) for task in tasks)],
            domains=domains,
            loss_per_byte=[list(row) for row in zip(*losses.values(), strict=True)],
            accuracy={
                name: [row[name].accuracy for row in rows]
                for name, score in baseline.items()
                if "accuracy" in score.model_fields_set
            },
            own={name: k for name, k, _ in learned},
            backward_transfer=backward,
            forward_transfer=forward,
            mean_backward_transfer=_mean(backward),
            mean_forward_transfer=_mean(forward),
        )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        number, domains, losses = len(self.rows), self.domains, self.loss_per_byte
        if len(losses) != number or any(len(row) != len(domains) for row in losses):
            raise ValueError(f"loss_per_byte: {number} rows of {len(domains)} domains are required")
        if len(set(domains)) < len(domains):
            raise ValueError("a domain occurs twice")
        if any(len(row) != number for row in self.accuracy.values()):
            raise ValueError(f"accuracy: {number} rows are required")
        if "trained" in self.model_fields_set and len(self.trained) != number:
            raise ValueError(f"trained: {number} rows are required")
        if any(row >= number for row in self.own.values()):
            raise ValueError(f"own: a row is outside 0 to {number - 1}")
        return self


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _mean(transfer: Mapping[str, float | None]) -> float | None:
    known = [value for value in transfer.values() if value is not None]
    return fmean(known) if known and len(known) == len(transfer) else None


# Mixtures of experts


class MoeRecord(Part):
    """Routing of the tokens of each domain.

    Args:
        usage: Domain → layer by layer, each expert's share of the assignments.
        new: Experts that were appended.
        router_steps: Steps of the router stage.
        is_open: Stock classes compute the same function.
        selection_bias: Domain → loss `with` and `without` the bias.
    """

    number: Annotated[int, Field(ge=1, le=_MAX_EVENTS)]
    experts_per_token: _Count
    usage: dict[str, Annotated[list[list[_OfOne]], Field(min_length=1)]]
    layers: list[_Count] = []
    new: list[_Count] = []
    router_steps: _Count | None = None
    is_open: bool | None = None
    selection_bias: dict[str, dict[Literal["with", "without"], _Number | None]] = {}

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        rows = (row for layers in self.usage.values() for row in layers)
        if any(len(row) != self.number for row in rows):
            raise ValueError(f"usage: {self.number} experts are required")
        if any(expert >= self.number for expert in self.new):
            raise ValueError(f"new: an expert is outside 0 to {self.number - 1}")
        return self


# The summary


class Score(Part):
    """A domain's loss in nats per token and per byte, its accuracy, or both; None if unknown."""

    loss: _Number | None = None
    loss_per_byte: _Number | None = None
    standard_error: _Number | None = None
    accuracy: _Number | None = None
    accuracy_standard_error: _Number | None = None

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens per byte of the domain, which depend on the tokenizer alone."""
        return self.loss_per_byte / self.loss if self.loss and self.loss_per_byte else None

    @property
    def value(self) -> float | None:
        """The loss, or the accuracy if there is one."""
        return self.loss if self.accuracy is None else self.accuracy


Scores = dict[str, Score]


class _PositionLosses(Part):
    """Mean losses of consecutive positions in long windows.

    Args:
        end: Position after the last one of each bucket.
        loss: Mean loss in nats per token.
        tokens: Number of scored tokens.
    """

    end: list[_Count]
    loss: _Column
    tokens: list[_Count]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not len(self.end) == len(self.loss) == len(self.tokens):
            raise ValueError("end, loss and tokens must have the same length")
        return self


class WindowsRecord(Part):
    """Long documents before and after an expansion of the context.

    Args:
        source_length: Context of the source in tokens.
        length: Context of the result, and length of the long windows.
        scores: Domain → `source` (in windows of its own length), `source_long`, `expanded` and
            `final`.
        positions: Domain → model in long windows → its losses by position.
    """

    source_length: _Count
    length: _Count
    scores: dict[str, Scores] = {}
    positions: dict[str, dict[str, _PositionLosses]] = {}


class Check(Part):
    """One check of the gate."""

    check: str
    verdict: str
    subject: str = ""
    detail: str = ""
    value: _Number | None = None
    bound: _Number | None = None
    interval: tuple[_Number | None, _Number | None] | None = None
    confidence: _Number | None = None
    n: _Count | None = None
    documents_needed: _Count | None = None
    scored: str | None = None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The bounds of the interval; None if unknown."""
        return self.interval or (None, None)


class Packing(Part):
    """Packing of a task's documents: range of lengths (`8-15`) → number of documents."""

    packed_sequence_length_histogram: dict[str, _Count] = {}


class TaskRecord(Part):
    """One of several sequential tasks, and the scores after it."""

    domains: list[str]
    final: Scores
    steps: _Count
    ended_early: str | None = None
    best_step: _Count | None = None
    refused_steps: _Count = 0
    update_norms: dict[str, Any] = {}
    flops: _Number | None = None
    seconds: _Number | None = None
    packing: Packing = Packing()


class Jump(Part):
    """The logit shift of an expansion.

    Args:
        bfloat16_rms_to_std: of the source itself, computed in bfloat16.
        bfloat16_divergence: the same.
    """

    max_absolute: _Number | None = None
    relative_to_std: _Number | None = None
    new_token_mass: _Number | None = None
    rms_to_std: _Number | None = None
    divergence: _Number | None = None
    bfloat16_rms_to_std: _Number | None = None
    bfloat16_divergence: _Number | None = None


class Attempt(Part):
    """An attempt, a round or the control: its training, scores and verdict.

    Args:
        overrides: The overrides that distinguish it from the first attempt.
        stages: Stage from outside → its result.
        baseline: The scores before a round that follows another.
    """

    final: Scores
    status: str | None = None
    expansion: list[str] = []
    forgetting: list[str] = []
    overrides: list[str] = []
    expanded: Scores | None = None
    baseline: Scores = {}
    gate: list[Check] = []
    jump: Jump | None = None
    steps: _Count = 0
    ended_early: str | None = None
    best_step: _Count | None = None
    refused_steps: _Count = 0
    update_norms: dict[str, Any] = {}
    parameters: _Count | None = None
    notes: list[str] = []
    tasks: list[TaskRecord] = []
    matrix: Matrix | None = None
    stages: dict[str, Any] = {}
    flops: _Number | _Costs | None = None
    seconds: _Number | _Costs | None = None


class Sample(Part):
    """A prompt, and its continuations by the models before and after."""

    domain: str = ""
    prompt: str = ""
    before: str = ""
    after: str = ""


class Domains(Part):
    """Names of the old and the new domains."""

    old: list[str] = []
    new: list[str] = []


class Target(Part):
    """Progress towards `pipeline.target_params`."""

    target_params: _Count
    planned: list[_Count]
    reaches_target: bool


class Summary(Part):
    """The content of summary.json; the last round or attempt is repeated at its top.

    Args:
        final: Scores of the kept model; each attempt has its own.
        data: Domain → counts of its documents.
        disk: Kind → bytes in the run folder.
        lineage: Lineage of the checkpoint.
        methods: Forgetting mitigation method → what it reported.
        stages: Stage from outside → its result.
    """

    format_version: int = 1
    status: _Status
    domains: Domains
    baseline: Scores
    attempts: list[Attempt]
    data: dict[str, Any] = {}
    expansion: list[str] = []
    forgetting: list[str] = []
    seed: int | None = None
    expanded: Scores | None = None
    final: Scores = {}
    gate: list[Check] = []
    control: Attempt | None = None
    rounds: list[Attempt] = []
    target: Target | None = None
    tasks: list[TaskRecord] = []
    matrix: Matrix | None = None
    jump: Jump | None = None
    flops: _Costs = {}
    seconds: _Costs = {}
    parameters: dict[str, _Count] = {}
    parameters_on_disk: dict[str, _Count] = {}
    disk: dict[str, dict[str, _Count]] = {}
    checkpoint: str = ""
    lineage: Any = None
    samples: list[Sample] = []
    notes: list[str] = []
    moe: MoeRecord | None = None
    windows: WindowsRecord | None = None
    growth: GrowthRecord | None = None
    experts: ExpertsRecord | None = None
    methods: dict[str, Any] = {}
    stages: dict[str, Any] = {}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Return the summary in plain values."""
        return validate_record(plain, cls, what="not a valid run summary")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the summary in a file."""
        return cls.of(read_object(path))

    def text(self) -> str:
        """Return the file's text."""
        return json.dumps(self.plain(), indent=1) + "\n"

    @property
    def last_attempt(self) -> Attempt:
        """The last attempt, even if it was rolled back."""
        if self.attempts:
            return self.attempts[-1]
        return Attempt.model_construct(final=self.final, gate=self.gate, expansion=self.expansion)

    @property
    def has_new_tokens(self) -> bool:
        """Whether the tokenizer changed, so that losses per token can't be compared."""
        return self.jump is not None and self.jump.new_token_mass is not None

    @property
    def borders(self) -> tuple[int, ...]:
        """Steps at which the next task began."""
        return _ends_of(self.tasks)

    @property
    def round_ends(self) -> tuple[int, ...]:
        """Steps at which all rounds but the last ended."""
        return _ends_of(self.rounds)


def _ends_of(parts: Sequence[Attempt | TaskRecord]) -> tuple[int, ...]:
    """Return the steps at which all parts of a run but the last end."""
    return tuple(accumulate(part.steps for part in parts))[:-1]

"""A plan: the steps to a size, what each costs, and what the budget pays for."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isinf

from tritter.core.expansions import ExpansionSpec
from tritter.core.families import Config, count_parameters, training_flops
from tritter.errors import RequestError, refused
from tritter.planning.memory import TrainingMemory, TrainingSetup, is_attention, training_memory
from tritter.planning.shapes import (
    GrowthMethods,
    Shape,
    named_shape,
    reached,
    specs_like,
)
from tritter.planning.strategy import (
    AUTO,
    PathRequest,
    check_strategy,
    find_path,
    lopsidedness,
    strategies_of,
)

# What a model of N parameters loses after D tokens, as published: a prediction, no measurement.
#
# Chinchilla's parametric law L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, arXiv 2203.15556,
# equation 2) with the constants of the corrected fit to its data (Besiroglu et al. 2024, arXiv
# 2404.10102). The constants belong to that study's text and tokenizer: differences between two
# plans say more than the numbers do, and the law does not see a model's shape.


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """L(N, D) = E + A/N^α + B/D^β, in nats per token.

    Args:
        irreducible: E, the loss of a perfect model.
        parameter_scale: A.
        token_scale: B.
        parameter_exponent: α.
        token_exponent: β.
    """

    irreducible: float
    parameter_scale: float
    token_scale: float
    parameter_exponent: float
    token_exponent: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the predicted loss of a model trained from scratch."""
        data_term = self.token_scale / tokens**self.token_exponent
        return self._limit(parameters) + data_term

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Return after how many tokens a model of this size, from scratch, has this loss.

        Raises:
            ValueError: a model of this size never has it.
        """
        gap = loss - self._limit(parameters)
        if gap <= 0:
            raise ValueError(f"{parameters:,.0f} parameters never come to a loss of {loss}")
        return float((self.token_scale / gap) ** (1 / self.token_exponent))

    def loss_after_growth(self, loss: float, *, parameters: float, tokens: float) -> float:
        """Return the predicted loss of a grown model that started at `loss` and saw `tokens`.

        It goes on like a model of its size from scratch that has just come to that loss. This
        takes the expansion as exact; the jump of one that is not is not predicted.

        Args:
            loss: of the model before it grew.
            parameters: of the grown model.
            tokens: of the training after the growth.
        """
        return self.loss(parameters, self.tokens_for(parameters, loss) + tokens)

    def _limit(self, parameters: float) -> float:
        return self.irreducible + self.parameter_scale / parameters**self.parameter_exponent


SMALLEST_MODEL = 44_000_000  # parameters; below it the law is stretched beyond its data
CHINCHILLA = ScalingLaw(
    irreducible=1.8172,
    parameter_scale=482.01,
    token_scale=2085.43,
    parameter_exponent=0.3478,
    token_exponent=0.3658,
)


A100_BF16_FLOPS = 312e12  # dense, per second, as NVIDIA states it
DEFAULT_MFU = 0.4
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The hardware that GPU-hours are of.

    Args:
        flops_per_second: peak of one device in the precision trained in.
        mfu: model FLOPs utilisation, the share of the peak that training reaches.

    Raises:
        RequestError: no device has such a speed.
    """

    flops_per_second: float = A100_BF16_FLOPS
    mfu: float = DEFAULT_MFU

    def __post_init__(self) -> None:
        if not 0 < self.flops_per_second < float("inf"):
            raise refused(
                "device_flops",
                f"{self.flops_per_second:g}",
                f"FLOPs per second of one device, above 0, such as {A100_BF16_FLOPS:g} "
                "(A100, bf16)",
            )
        if not 0 < self.mfu <= 1:
            raise refused(
                "mfu",
                f"{self.mfu:g}",
                "the share of the device's peak that training reaches, above 0 and at "
                f"most 1, such as {DEFAULT_MFU}",
            )

    def hours(self, flops: float) -> float:
        """Return the GPU-hours that so many FLOPs take."""
        return flops / (self.flops_per_second * self.mfu) / _SECONDS_PER_HOUR

    def flops(self, hours: float) -> float:
        """Return the FLOPs that so many GPU-hours pay for."""
        return hours * _SECONDS_PER_HOUR * self.flops_per_second * self.mfu


def training_flops_per_token(config: Config, setup: TrainingSetup) -> float:
    """Return the mean FLOPs of a token in a training step: matrices, output head, attention."""
    flops = training_flops(
        config,
        is_trained=lambda tensor: not (setup.is_attention_frozen and is_attention(tensor)),
    )
    return flops.per_token(setup.sequence_length)


MAX_TOKENS_PER_PARAMETER = 1e6  # far beyond, no predicted loss differs from the limit it tends to
TOKENS_PER_PARAMETER = 20.0  # compute-optimal after Hoffmann et al. 2022, table 3
SMALL_MODEL_BEATEN_FROM = 10.0  # tokens per target parameter; experiments/2026-11-22_one_layer
LAW_RESOLUTION = 0.002  # nats; below it the law does not tell two plans apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted.

    Args:
        device: the hardware that GPU-hours are of.
        tokens_per_parameter: tokens that a parameter is due; the source's have had theirs, so a
            step trains for so many tokens per parameter that it adds.
        setup: how models are trained, for memory and for the length of sequences.
        law: what predicts losses.

    Raises:
        RequestError: a value that is not allowed.
    """

    device: Device = field(default_factory=Device)
    tokens_per_parameter: float = TOKENS_PER_PARAMETER
    setup: TrainingSetup = field(default_factory=TrainingSetup)
    law: ScalingLaw = CHINCHILLA

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_parameter <= MAX_TOKENS_PER_PARAMETER:
            raise refused(
                "tokens_per_parameter",
                f"{self.tokens_per_parameter:g}",
                f"a number above 0 and at most {MAX_TOKENS_PER_PARAMETER:g}, such as "
                f"{TOKENS_PER_PARAMETER:g}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionStep:
    """One expansion and the training after it.

    Args:
        spec: the expansion, its sizes filled in.
        source_parameters: counted from shapes, as `target_parameters` is.
        num_tokens: of the training after the expansion.
        gpu_hours: that this training takes.
        total_gpu_hours: of this step and all before it.
        is_affordable: the budget covers `total_gpu_hours`.
        predicted_loss: nats per token after the training, by the scaling law.
        memory: of this training, on one device.
    """

    spec: ExpansionSpec
    source_config: Config
    target_config: Config
    source_parameters: int
    target_parameters: int
    num_tokens: float
    gpu_hours: float
    total_gpu_hours: float
    is_affordable: bool
    predicted_loss: float
    memory: TrainingMemory

    @property
    def method(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """Where a plan starts, in the words of the steps that follow."""

    target_config: Config
    target_parameters: int
    total_gpu_hours: float
    predicted_loss: float
    memory: TrainingMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """The way from a model to a size.

    Args:
        strategy: the one that was followed; under `auto` the one that was chosen.
        steps: all steps to the target, also those that the budget does not cover.
        gpu_hours: the budget.
        spare_gpu_hours: what is left of it after the last affordable step.
        reached: the largest shape that the spare hours pay for, in place of the first step that
            they do not; None when every step is affordable, or none is left.
        predicted_loss: nats per token when the whole budget is spent.
        from_scratch_gpu_hours: of the target's shape trained from scratch, for as many tokens per
            parameter.
        source_gpu_hours: what the source's own tokens cost, were it trained on this device.
        ungrown_loss: of the source as it is, trained on for the whole budget: the control.
        pays_from_gpu_hours: the least budget from which the first step, trained on for all of it,
            is predicted below the source trained on likewise; 0 when it always is, None when the
            law sees no difference between their sizes.
        alternatives: strategy → predicted loss, of all that `auto` compared.
    """

    strategy: str
    source_config: Config
    source_parameters: int
    target_parameters: int
    steps: tuple[ExpansionStep, ...]
    gpu_hours: float
    spare_gpu_hours: float
    reached: ExpansionStep | None
    predicted_loss: float
    from_scratch_gpu_hours: float
    source_gpu_hours: float
    ungrown_loss: float
    pays_from_gpu_hours: float | None
    source_memory: TrainingMemory
    alternatives: dict[str, float]

    @property
    def reaches_target(self) -> bool:
        return self.steps[-1].is_affordable

    @property
    def reached_parameters(self) -> int:
        """What the budget does reach; the source's count when it pays for no step."""
        if self.reached is not None:
            return self.reached.target_parameters
        affordable = [step.target_parameters for step in self.steps if step.is_affordable]
        return affordable[-1] if affordable else self.source_parameters

    @property
    def needed_gpu_hours(self) -> float:
        return self.steps[-1].total_gpu_hours


def plan_growth(
    source: Config,
    target_parameters: int,
    *,
    gpu_hours: float,
    strategy: str = AUTO,
    methods: GrowthMethods | None = None,
    assumptions: Assumptions | None = None,
) -> GrowthPlan:
    """Plan the expansions from a model to a number of parameters.

    Args:
        source: config.json of the model that there is.
        target_parameters: the nearest shape within 10 % is meant.
        gpu_hours: the budget.
        strategy: `depth_first`, `width_first`, `balanced`, or `auto`: the one of least predicted
            loss once the budget is spent; where the law sees no difference, the one whose shape is
            nearest to the presets' proportions.
        methods: the expansions that may be used; default: `dus` and `width`.

    Raises:
        RequestError: the target is not larger than the source or can't be reached, the budget is
            not above 0, there is no such strategy, or it has no method.
    """
    methods = methods or GrowthMethods.usual(source)
    assumptions = assumptions or Assumptions()
    check_strategy(strategy, methods)
    if not 0 < gpu_hours < float("inf"):
        raise refused("gpu_hours", f"{gpu_hours:g}", "a budget is above 0")
    plans: list[GrowthPlan] = []
    refusals: list[RequestError] = []
    for name in strategies_of(strategy, methods):
        request = PathRequest(
            source=source, target_parameters=target_parameters, strategy=name, methods=methods
        )
        try:
            plans.append(_priced(request, find_path(request), gpu_hours, assumptions))
        except RequestError as error:
            refusals.append(error)
    if not plans:
        raise refusals[0]
    least = min(plan.predicted_loss for plan in plans)
    level = [plan for plan in plans if plan.predicted_loss <= least + LAW_RESOLUTION]
    ends = [plan.steps[-1] for plan in level]
    shapes = [Shape(end.spec, end.target_config, end.target_parameters) for end in ends]
    best = min(range(len(level)), key=lambda number: lopsidedness(shapes[number]))
    losses = {plan.strategy: plan.predicted_loss for plan in plans}
    return replace(level[best], alternatives=losses if strategy == AUTO else {})


def plan_expansion_path(
    source_params: int | float | Config,
    target_params: int | float,
    available_compute: float,
    strategy: str = AUTO,
    *,
    assumptions: Assumptions | None = None,
) -> list[ExpansionStep]:
    """Return the expansions from one size to another, with what each costs.

    Args:
        source_params: a number of parameters (the nearest shape is meant), or a config.json.
        target_params: a number of parameters.
        available_compute: the budget in GPU-hours; steps beyond it are marked.
        strategy: as in `plan_growth`.

    Raises:
        RequestError: as in `plan_growth`.
    """
    source = (
        source_params if isinstance(source_params, dict) else named_shape(int(source_params)).config
    )
    plan = plan_growth(
        source,
        int(target_params),
        gpu_hours=available_compute,
        strategy=strategy,
        assumptions=assumptions,
    )
    return list(plan.steps)


def _priced(
    request: PathRequest, shapes: Sequence[Shape], gpu_hours: float, assumptions: Assumptions
) -> GrowthPlan:
    """Say what a path costs, and what of it the budget pays for."""
    parameters = count_parameters(request.source)
    due = assumptions.tokens_per_parameter * parameters
    start = _Point(
        target_config=request.source,
        target_parameters=parameters,
        total_gpu_hours=0.0,
        predicted_loss=assumptions.law.loss(parameters, due),
        memory=training_memory(request.source, assumptions.setup),
    )
    steps: list[ExpansionStep] = []
    for shape in shapes:
        steps.append(_step(steps[-1] if steps else start, shape, gpu_hours, assumptions))
    num_affordable = sum(step.is_affordable for step in steps)
    last = steps[num_affordable - 1] if num_affordable else start
    spare = gpu_hours - last.total_gpu_hours
    missing = steps[num_affordable:]
    end = steps[-1]
    ungrown = _loss_over_hours(
        start.predicted_loss, start.target_config, start.target_parameters, assumptions
    )
    from_scratch = assumptions.tokens_per_parameter * end.target_parameters
    return GrowthPlan(
        strategy=request.strategy,
        source_config=request.source,
        source_parameters=parameters,
        target_parameters=request.target_parameters,
        steps=tuple(steps),
        gpu_hours=gpu_hours,
        spare_gpu_hours=spare,
        reached=_reached(last, missing[0], request, gpu_hours, assumptions) if missing else None,
        predicted_loss=_loss_over_hours(
            last.predicted_loss, last.target_config, last.target_parameters, assumptions
        )(spare),
        from_scratch_gpu_hours=_hours_for(end.target_config, from_scratch, assumptions),
        source_gpu_hours=_hours_for(request.source, due, assumptions),
        ungrown_loss=ungrown(gpu_hours),
        pays_from_gpu_hours=_pays_from(start, ungrown, steps[0], assumptions),
        source_memory=start.memory,
        alternatives={},
    )


def _step(
    before: _Point | ExpansionStep, shape: Shape, gpu_hours: float, assumptions: Assumptions
) -> ExpansionStep:
    num_tokens = _due_tokens(before, shape, assumptions)
    hours = _hours_for(shape.config, num_tokens, assumptions)
    total = before.total_gpu_hours + hours
    return ExpansionStep(
        spec=shape.spec,
        source_config=before.target_config,
        target_config=shape.config,
        source_parameters=before.target_parameters,
        target_parameters=shape.parameters,
        num_tokens=num_tokens,
        gpu_hours=hours,
        total_gpu_hours=total,
        is_affordable=total <= gpu_hours,
        predicted_loss=assumptions.law.loss_after_growth(
            before.predicted_loss, parameters=shape.parameters, tokens=num_tokens
        ),
        memory=training_memory(shape.config, assumptions.setup),
    )


def _reached(
    before: _Point | ExpansionStep,
    missed: ExpansionStep,
    request: PathRequest,
    gpu_hours: float,
    assumptions: Assumptions,
) -> ExpansionStep | None:
    """Return the largest smaller step of the missed one's kind that the budget pays for."""
    specs = specs_like(before.target_config, missed.spec, request.methods)

    def hours(spec: ExpansionSpec) -> float:
        shape = reached(before.target_config, spec)
        return _hours_for(shape.config, _due_tokens(before, shape, assumptions), assumptions)

    place = bisect_right(specs, gpu_hours - before.total_gpu_hours, key=hours)
    if not place:
        return None
    shape = reached(before.target_config, specs[place - 1])
    return _step(before, shape, gpu_hours, assumptions)


def _loss_over_hours(
    loss: float, config: Config, parameters: int, assumptions: Assumptions
) -> Callable[[float], float]:
    """Return GPU-hours → the predicted loss of a model at `loss` that trains on for so many."""
    per_token = training_flops_per_token(config, assumptions.setup)

    def predicted(hours: float) -> float:
        tokens = assumptions.device.flops(hours) / per_token
        return assumptions.law.loss_after_growth(loss, parameters=parameters, tokens=tokens)

    return predicted


def _pays_from(
    start: _Point, ungrown: Callable[[float], float], first: ExpansionStep, assumptions: Assumptions
) -> float | None:
    """Return where the grown model's curve over GPU-hours comes to lie below the source's own.

    Both begin at the source's loss. At first the source may be the quicker, since a token costs it
    less; the grown model's limit is lower, so that they cross once at most.
    """
    size = (first.target_config, first.target_parameters)
    grown = _loss_over_hours(start.predicted_loss, *size, assumptions)
    low, high = first.gpu_hours * 1e-9, first.gpu_hours
    if grown(low) < ungrown(low):
        return 0.0
    while grown(high) >= ungrown(high):
        if isinf(high):
            return None
        low, high = high, 4 * high
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if grown(middle) < ungrown(middle) else (middle, high)
    return high


def _due_tokens(before: _Point | ExpansionStep, shape: Shape, assumptions: Assumptions) -> float:
    return assumptions.tokens_per_parameter * (shape.parameters - before.target_parameters)


def _hours_for(config: Config, num_tokens: float, assumptions: Assumptions) -> float:
    flops = num_tokens * training_flops_per_token(config, assumptions.setup)
    return assumptions.device.hours(flops)

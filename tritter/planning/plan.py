"""Growth plans: the steps to a target size, their costs, and the result of a budget."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isinf
from typing import ClassVar

from tritter.core.expansions import ExpansionSpec
from tritter.core.families import Config, Model, training_flops
from tritter.errors import refused
from tritter.planning.memory import TrainingMemory, TrainingSetup, training_memory
from tritter.planning.shapes import GrowthMethods, Shape, nearest_preset
from tritter.planning.strategy import AUTO, PathRequest

_A100_FLOPS = 312e12  # dense, per second, as published by NVIDIA
_DEFAULT_MFU = 0.4
_SECONDS_PER_HOUR = 3600
_MAX_TOKENS_PER_PARAMETER = 1e6  # beyond, predicted losses equal their limit
_TOKENS_PER_PARAMETER = 20.0  # compute-optimal according to Hoffmann et al. 2022, table 3


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """Chinchilla's law for the loss of N parameters after D tokens: L(N, D) = E + A/N^α + B/D^β.

    In nats per token (Hoffmann et al. 2022, arXiv 2203.15556, equation 2), by default with the
    constants of the corrected fit to its data (Besiroglu et al. 2024, arXiv 2404.10102). They are
    specific to that study's data and tokenizer, so differences between plans are more reliable
    than absolute values. The law ignores a model's shape.

    Args:
        irreducible: E, the irreducible loss.
        parameter_scale: A.
        token_scale: B.
        parameter_exponent: α.
        token_exponent: β.

    Attributes:
        resolution: in nats; smaller differences between plans are not meaningful.
        smallest_model: parameters; below, the law extrapolates beyond its data.
    """

    irreducible: float = 1.8172
    parameter_scale: float = 482.01
    token_scale: float = 2085.43
    parameter_exponent: float = 0.3478
    token_exponent: float = 0.3658
    resolution: ClassVar[float] = 0.002
    smallest_model: ClassVar[int] = 44_000_000

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the predicted loss of a model trained from scratch."""
        data_term = self.token_scale / tokens**self.token_exponent
        return self._limit(parameters) + data_term

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Return the number of tokens after which a model trained from scratch has a loss."""
        gap = loss - self._limit(parameters)
        if gap <= 0:
            raise ValueError(f"{parameters:,.0f} parameters never reach a loss of {loss}")
        return float((self.token_scale / gap) ** (1 / self.token_exponent))

    def loss_after_growth(self, loss: float, *, parameters: float, tokens: float) -> float:
        """Return the predicted loss of a grown model after continued training.

        Assumes that a grown model improves like a model of its size from scratch with the same
        loss, and that the expansion is function-preserving.

        Args:
            loss: loss of the source model.
            parameters: size of the grown model.
            tokens: training tokens after the expansion.
        """
        return self.loss(parameters, self.tokens_for(parameters, loss) + tokens)

    def _limit(self, parameters: float) -> float:
        return self.irreducible + self.parameter_scale / parameters**self.parameter_exponent


def _training_flops_per_token(model: Model, setup: TrainingSetup) -> float:
    """Return the mean training FLOPs per token: matrices, output head, attention."""
    flops = training_flops(
        model, is_trained=lambda tensor: not (setup.is_attention_frozen and tensor.is_attention)
    )
    return flops.per_token(setup.sequence_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Assumptions of a plan.

    Args:
        device_flops: peak FLOPs per second, in the training precision, of one of the devices that
            GPU-hours refer to.
        mfu: model FLOPs utilisation: the share of the peak that training reaches.
        tokens_per_parameter: training tokens per parameter; each step trains for this number of
            tokens per added parameter.
        source_tokens: tokens that the source was trained on; None: `tokens_per_parameter` for each
            of its parameters.
        setup: training options that determine memory and sequence length.
        law: the scaling law that predicts losses.
    """

    device_flops: float = _A100_FLOPS
    mfu: float = _DEFAULT_MFU
    tokens_per_parameter: float = _TOKENS_PER_PARAMETER
    source_tokens: float | None = None
    setup: TrainingSetup = field(default_factory=TrainingSetup)
    law: ScalingLaw = ScalingLaw()

    def __post_init__(self) -> None:
        if not 0 < self.device_flops < float("inf"):
            raise refused(
                "device_flops",
                f"{self.device_flops:g}",
                f"must be above 0: the FLOPs per second of one device, such as {_A100_FLOPS:g} "
                "(A100, bf16)",
            )
        if not 0 < self.mfu <= 1:
            raise refused(
                "mfu",
                f"{self.mfu:g}",
                "must be above 0 and at most 1: the share of the device's peak that training "
                f"reaches, such as {_DEFAULT_MFU}",
            )
        if not 0 < self.tokens_per_parameter <= _MAX_TOKENS_PER_PARAMETER:
            raise refused(
                "tokens_per_parameter",
                f"{self.tokens_per_parameter:g}",
                f"must be above 0 and at most {_MAX_TOKENS_PER_PARAMETER:g}, such as "
                f"{_TOKENS_PER_PARAMETER:g}",
            )

    def hours(self, flops: float) -> float:
        """Return the GPU-hours for a number of FLOPs."""
        return flops / (self.device_flops * self.mfu) / _SECONDS_PER_HOUR

    def flops(self, hours: float) -> float:
        """Return the FLOPs of a number of GPU-hours."""
        return hours * _SECONDS_PER_HOUR * self.device_flops * self.mfu


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionStep:
    """An expansion and the training after it.

    Args:
        spec: the expansion with all sizes.
        source: the model before the expansion.
        target: the model after the expansion.
        num_tokens: training tokens after the expansion.
        gpu_hours: GPU-hours of this training.
        total_gpu_hours: GPU-hours of this step and all earlier ones.
        is_affordable: whether the budget covers `total_gpu_hours`.
        predicted_loss: nats per token after the training, from the scaling law.
        memory: memory requirements of this training on one device.
    """

    spec: ExpansionSpec
    source: Model
    target: Model
    num_tokens: float
    gpu_hours: float
    total_gpu_hours: float
    is_affordable: bool
    predicted_loss: float
    memory: TrainingMemory

    @property
    def method(self) -> str:
        return self.spec.name

    @property
    def source_parameters(self) -> int:
        return self.source.num_parameters

    @property
    def target_parameters(self) -> int:
        return self.target.num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """The start of a plan, with the fields of later steps."""

    target: Model
    total_gpu_hours: float
    predicted_loss: float
    memory: TrainingMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """A plan to grow a model to a target size.

    Args:
        strategy: the strategy; for `auto`, the selected one.
        source: the model to grow.
        target_parameters: requested number of parameters.
        steps: all steps to the target, including those beyond the budget.
        gpu_hours: the budget.
        spare_gpu_hours: the rest of the budget after the last affordable step.
        reached: the largest shape that the spare hours cover, as a replacement for the first step
            beyond the budget; None if all steps are affordable or no shape fits.
        predicted_loss: nats per token after the whole budget is spent.
        from_scratch_gpu_hours: cost of training the target from scratch with the same number of
            tokens per parameter.
        source_gpu_hours: cost of training the source on this device.
        control_loss: predicted loss of the control: the source, trained for the whole budget.
        pays_from_gpu_hours: the smallest budget for which the first step has a lower predicted
            loss than the control; 0 if it is always lower, None if the law predicts no difference.
        source_memory: memory requirements of training the source.
        alternatives: strategy → predicted loss, for all strategies that `auto` compared.
    """

    strategy: str
    source: Model
    target_parameters: int
    steps: tuple[ExpansionStep, ...]
    gpu_hours: float
    spare_gpu_hours: float
    reached: ExpansionStep | None
    predicted_loss: float
    from_scratch_gpu_hours: float
    source_gpu_hours: float
    control_loss: float
    pays_from_gpu_hours: float | None
    source_memory: TrainingMemory
    alternatives: dict[str, float]

    @property
    def source_parameters(self) -> int:
        return self.source.num_parameters

    @property
    def reaches_target(self) -> bool:
        return self.steps[-1].is_affordable

    @property
    def reached_parameters(self) -> int:
        """The largest affordable number of parameters; that of the source without any step."""
        if self.reached is not None:
            return self.reached.target_parameters
        affordable = [step.target_parameters for step in self.steps if step.is_affordable]
        return affordable[-1] if affordable else self.source_parameters

    @property
    def needed_gpu_hours(self) -> float:
        return self.steps[-1].total_gpu_hours


def plan_growth(
    source: Model,
    target_parameters: int,
    *,
    gpu_hours: float,
    strategy: str = AUTO,
    methods: GrowthMethods | None = None,
    assumptions: Assumptions | None = None,
) -> GrowthPlan:
    """Plan the expansions from a model to a number of parameters.

    Args:
        source: the model to grow.
        target_parameters: requested size; the plan uses the nearest shape within 10 %.
        gpu_hours: the budget.
        strategy: `depth_first`, `width_first`, `balanced` or `auto`. `auto` selects the lowest
            predicted loss for the budget; ties select the shape that is closest to the presets'
            proportions.
        methods: allowed expansions; defaults to `dus` and `width`.
        assumptions: assumptions of the plan.
    """
    methods = methods or GrowthMethods.usual(source)
    assumptions = assumptions or Assumptions()
    if not 0 < gpu_hours < float("inf"):
        raise refused("gpu_hours", f"{gpu_hours:g}", "must be above 0")
    request = PathRequest(
        source=source, target_parameters=target_parameters, strategy=strategy, methods=methods
    )
    plans = [
        _price_plan(replace(request, strategy=name), path, gpu_hours, assumptions)
        for name, path in request.find_paths().items()
    ]
    least = min(plan.predicted_loss for plan in plans)
    level = [plan for plan in plans if plan.predicted_loss <= least + assumptions.law.resolution]
    ends = [plan.steps[-1] for plan in level]
    shapes = [Shape(end.spec, end.target) for end in ends]
    best = min(range(len(level)), key=lambda number: shapes[number].lopsidedness)
    losses = {plan.strategy: plan.predicted_loss for plan in plans}
    return replace(level[best], alternatives=losses if strategy == AUTO else {})


def plan_expansion_path(
    source_params: int | float | Model | Config,
    target_params: int | float,
    available_compute: float,
    strategy: str = AUTO,
    *,
    assumptions: Assumptions | None = None,
) -> list[ExpansionStep]:
    """Return the expansions from one size to another, with their costs.

    Args:
        source_params: a number of parameters, for the nearest preset shape, or a model or its
            config.json.
        target_params: a number of parameters.
        available_compute: the budget in GPU-hours; steps beyond it have `is_affordable=False`.
        strategy: as in `plan_growth`.
        assumptions: assumptions of the plan.
    """
    source = Model(source_params) if isinstance(source_params, dict) else source_params
    if not isinstance(source, Model):
        _, source = nearest_preset(int(source))
    plan = plan_growth(
        source,
        int(target_params),
        gpu_hours=available_compute,
        strategy=strategy,
        assumptions=assumptions,
    )
    return list(plan.steps)


def _price_plan(
    request: PathRequest, shapes: Sequence[Shape], gpu_hours: float, assumptions: Assumptions
) -> GrowthPlan:
    """Return the plan of a path: costs and affordable steps."""
    parameters = request.source.num_parameters
    due = assumptions.source_tokens or assumptions.tokens_per_parameter * parameters
    start = _Point(
        target=request.source,
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
    control = _loss_over_hours(start.predicted_loss, start.target, assumptions)
    from_scratch = assumptions.tokens_per_parameter * end.target_parameters
    if assumptions.source_tokens is not None:  # as many as lead to the same loss
        from_scratch = assumptions.law.tokens_for(end.target_parameters, end.predicted_loss)
    return GrowthPlan(
        strategy=request.strategy,
        source=request.source,
        target_parameters=request.target_parameters,
        steps=tuple(steps),
        gpu_hours=gpu_hours,
        spare_gpu_hours=spare,
        reached=_reached(last, missing[0], request, gpu_hours, assumptions) if missing else None,
        predicted_loss=_loss_over_hours(last.predicted_loss, last.target, assumptions)(spare),
        from_scratch_gpu_hours=_hours_for(end.target, from_scratch, assumptions),
        source_gpu_hours=_hours_for(request.source, due, assumptions),
        control_loss=control(gpu_hours),
        pays_from_gpu_hours=_pays_from(start, control, steps[0], assumptions),
        source_memory=start.memory,
        alternatives={},
    )


def _step(
    before: _Point | ExpansionStep, shape: Shape, gpu_hours: float, assumptions: Assumptions
) -> ExpansionStep:
    num_tokens = _due_tokens(before, shape, assumptions)
    hours = _hours_for(shape.model, num_tokens, assumptions)
    total = before.total_gpu_hours + hours
    return ExpansionStep(
        spec=shape.spec,
        source=before.target,
        target=shape.model,
        num_tokens=num_tokens,
        gpu_hours=hours,
        total_gpu_hours=total,
        is_affordable=total <= gpu_hours,
        predicted_loss=assumptions.law.loss_after_growth(
            before.predicted_loss, parameters=shape.parameters, tokens=num_tokens
        ),
        memory=training_memory(shape.model, assumptions.setup),
    )


def _reached(
    before: _Point | ExpansionStep,
    missed: ExpansionStep,
    request: PathRequest,
    gpu_hours: float,
    assumptions: Assumptions,
) -> ExpansionStep | None:
    """Return the largest affordable step in the direction of an unaffordable one."""

    def hours(spec: ExpansionSpec) -> float:
        shape = Shape.of(before.target, spec)
        return _hours_for(shape.model, _due_tokens(before, shape, assumptions), assumptions)

    specs = sorted(request.methods.specs_like(before.target, missed.spec), key=hours)
    index = bisect_right(specs, gpu_hours - before.total_gpu_hours, key=hours)
    if not index:
        return None
    shape = Shape.of(before.target, specs[index - 1])
    return _step(before, shape, gpu_hours, assumptions)


def _loss_over_hours(
    loss: float, model: Model, assumptions: Assumptions
) -> Callable[[float], float]:
    """Return a function from GPU-hours of continued training to the predicted loss."""
    per_token = _training_flops_per_token(model, assumptions.setup)

    def predicted(hours: float) -> float:
        tokens = assumptions.flops(hours) / per_token
        return assumptions.law.loss_after_growth(
            loss, parameters=model.num_parameters, tokens=tokens
        )

    return predicted


def _pays_from(
    start: _Point, control: Callable[[float], float], first: ExpansionStep, assumptions: Assumptions
) -> float | None:
    """Return the GPU-hours at which the grown model's predicted loss falls below the control's.

    Both start at the source's loss. The control may improve faster at first, because its tokens
    are cheaper. The grown model has a lower limit, so the curves cross at most once.
    """
    grown = _loss_over_hours(start.predicted_loss, first.target, assumptions)
    low, high = first.gpu_hours * 1e-9, first.gpu_hours
    if grown(low) < control(low):
        return 0.0
    while grown(high) >= control(high):
        if isinf(high):
            return None
        low, high = high, 4 * high
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if grown(middle) < control(middle) else (middle, high)
    return high


def _due_tokens(before: _Point | ExpansionStep, shape: Shape, assumptions: Assumptions) -> float:
    return assumptions.tokens_per_parameter * (shape.parameters - before.target.num_parameters)


def _hours_for(model: Model, num_tokens: float, assumptions: Assumptions) -> float:
    flops = num_tokens * _training_flops_per_token(model, assumptions.setup)
    return assumptions.hours(flops)

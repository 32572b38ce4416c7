"""Strategies that choose the shapes between a source and a target size: depth, width or both."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from tritter.core.expansions import Width
from tritter.core.families import Model
from tritter.core.families.presets import aspect_ratio_at
from tritter.errors import Problem, RequestError, nearest
from tritter.options import RunRequest
from tritter.planning.shapes import GrowthMethods, Shape

AUTO = "auto"
_STRATEGIES = ("depth_first", "width_first", "balanced")
TOLERANCE = 0.1
_MAX_STEP_GROWTH = 1.6  # ratio of parameters per step: 3 B to 10 B are three steps
_MAX_STEPS = 64
# Limit of depth_first and width_first: ratio to the proportions of presets and source
_MAX_LOPSIDEDNESS = 4.0
_MIN_STEP_GROWTH = 1.02
# Shapes within this factor of a waypoint, or of the target, are equivalent; the rounder and
# better proportioned ones are preferred.
_WAYPOINT_SLACK, _TARGET_SLACK = 1.25, 1.05
_KEYS = {"target": "pipeline.target_params", "strategy": "pipeline.strategy"}  # keys of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRequest:
    """A source, a target size, a strategy and the allowed expansions."""

    source: Model
    target_parameters: int
    strategy: str
    methods: GrowthMethods

    def find_paths(self) -> dict[str, tuple[Shape, ...]]:
        """Return strategy → the shapes after the source up to the target, for each that has a path.

        `auto` has up to three strategies, the better proportioned first. Each step grows the
        parameters by about the same factor, at most 1.6 if the methods have such shapes.
        """
        _check_strategy(self.strategy, self.methods)
        paths: dict[str, tuple[Shape, ...]] = {}
        refusals: list[RequestError] = []
        strategies: tuple[str, ...] = (self.strategy,)
        if self.strategy == AUTO and self.methods.depth and self.methods.width:
            strategies = ("balanced", "depth_first", "width_first")
        elif self.strategy == AUTO:
            strategies = ("depth_first" if self.methods.depth else "width_first",)
        for name in strategies:
            try:
                paths[name] = _find_path(replace(self, strategy=name))
            except RequestError as error:
                refusals.append(error)
        if not paths:
            raise refusals[0]
        return paths


def _find_path(request: PathRequest) -> tuple[Shape, ...]:
    model, target = request.source, request.target_parameters
    if target <= model.num_parameters:
        reason = f"must be larger than the source, which has {model.num_parameters:,}"
        raise RequestError(Problem("target", f"{target:,} parameters", reason=reason))
    shapes: list[Shape] = []
    least = target / (1 + TOLERANCE)
    while not shapes or (model.num_parameters < least and len(shapes) < _MAX_STEPS):
        ratio = target / model.num_parameters
        num_steps = math.ceil(math.log(ratio) / math.log(_MAX_STEP_GROWTH) - 1e-9)
        waypoint = model.num_parameters * ratio ** (1 / num_steps)
        shape = _next_shape(request, model, waypoint, is_last=num_steps == 1)
        if shape is None:
            break
        shapes.append(shape)
        model = shape.model
    if not shapes or abs(model.num_parameters / target - 1) > TOLERANCE:
        _refuse(request, shapes)
    return tuple(shapes)


def _check_strategy(strategy: str, methods: GrowthMethods) -> None:
    """Check that a strategy exists and has the methods that it needs."""
    allowed = (AUTO, *_STRATEGIES)
    if strategy not in allowed:
        reason = f"must be one of {', '.join(allowed)}"
        near = nearest(strategy, allowed)
        raise RequestError(Problem("strategy", strategy, reason=reason, nearest=near))
    needed = {"depth_first": ("depth",), "width_first": ("width",), "balanced": ("depth", "width")}
    for direction in needed.get(strategy, ()):
        if getattr(methods, direction) is None:
            example = "dus" if direction == "depth" else "width"
            reason = f"requires a method that grows {direction}; add one, such as {example}"
            raise RequestError(Problem("strategy", strategy, reason=reason))


def _next_shape(
    request: PathRequest, source: Model, waypoint: float, *, is_last: bool
) -> Shape | None:
    """Return the next shape, larger than `source` and not beyond the target; None without any."""
    usual = (aspect_ratio_at(request.target_parameters), request.source.sizes.aspect_ratio)
    methods, least = request.methods, source.num_parameters
    most = request.target_parameters * (1 + TOLERANCE)

    def usable(shape: Shape | None) -> Shape | None:
        fits = shape is not None and least * _MIN_STEP_GROWTH < shape.parameters <= most
        return shape if fits else None

    slack = _TARGET_SLACK if is_last else _WAYPOINT_SLACK

    def deeper(min_aspect_ratio: float) -> Shape | None:
        return usable(methods.deeper(source, waypoint, min_aspect_ratio=min_aspect_ratio))

    def wider(max_aspect_ratio: float) -> Shape | None:
        shape = methods.wider(source, waypoint, slack=slack, max_aspect_ratio=max_aspect_ratio)
        return usable(shape)

    match request.strategy:
        case "depth_first":
            turn = min(usual) / _MAX_LOPSIDEDNESS if methods.width else 0.0
            return deeper(turn) or wider(math.inf) or deeper(0.0)
        case "width_first":
            turn = max(usual) * _MAX_LOPSIDEDNESS if methods.depth else math.inf
            return wider(turn) or deeper(0.0)
    both = [shape for shape in (deeper(0.0), wider(math.inf)) if shape is not None]
    near = [shape for shape in both if shape.miss(waypoint) <= math.log(slack)]
    if near:
        return min(near, key=lambda shape: shape.lopsidedness)
    return min(both, key=lambda shape: shape.miss(waypoint), default=None)


def _refuse(request: PathRequest, shapes: list[Shape]) -> NoReturn:
    """Raise the error for an unreachable target; names the nearest size."""
    methods = [spec.name for spec in (request.methods.depth, request.methods.width) if spec]
    target, source = request.target_parameters, request.source
    nearest = [shapes[-1].parameters] if shapes else []
    before = shapes[-2].model if len(shapes) > 1 else source
    for start in (before, shapes[-1].model if shapes else source):
        for shape in (
            request.methods.deeper(start, target),
            request.methods.wider(start, target, slack=_TARGET_SLACK),
        ):
            nearest += [shape.parameters] if shape is not None else []
    found = min(nearest, key=lambda count: abs(count - target), default=None)
    ending = "there is no larger shape" if found is None else f"the nearest has {found:,}"
    width = request.methods.width
    if isinstance(width, Width) and width.init == "fresh" and source.family.subtracts_mean:
        ending += "; LayerNorms grow in width only with expansion.width.init=net2net"
    reason = (
        f"{' and '.join(methods)} ({request.strategy}) can't reach a shape within 10 % of it from "
        f"{source.num_parameters:,}; {ending}"
    )
    raise RequestError(Problem("target", f"{target:,} parameters", reason=reason))


def planned_rounds(config: RunRequest, source: Model) -> tuple[Shape, ...]:
    """Return the shape after each round, for at most `pipeline.max_rounds` rounds.

    The allowed methods are those of `expansion`, with their options; defaults to `dus` and
    `width`.

    Args:
        config: the run.
        source: the base.
    """
    pipeline = config.pipeline
    assert pipeline.target_params is not None
    try:
        request = PathRequest(
            source=source,
            target_parameters=pipeline.target_params,
            strategy=pipeline.strategy or AUTO,
            methods=GrowthMethods.of(config.expansion, source),
        )
        best = min(request.find_paths().values(), key=lambda shapes: shapes[-1].lopsidedness)
        return best[: pipeline.max_rounds]
    except RequestError as error:
        (problem,) = error.problems
        key = _KEYS.get(problem.key, problem.key)
        raise RequestError(replace(problem, key=key)) from error


def pipeline_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield the problems of options that require, or exclude, `pipeline.target_params`."""
    pipeline = config.pipeline
    reason = "requires pipeline.target_params; without it a run has a single round with the "
    reason += "methods of expansion"
    for key, value in (("max_rounds", pipeline.max_rounds), ("strategy", pipeline.strategy)):
        if value is not None and pipeline.target_params is None:
            yield Problem(f"pipeline.{key}", value, reason=reason)
    if pipeline.target_params is not None and len(config.text.tasks) > 1:
        reason = "pipeline.target_params supports only one task; set data.new, or remove "
        reason += "pipeline.target_params"
        yield Problem("data.tasks", list(config.text.tasks), reason=reason)

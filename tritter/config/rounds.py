"""The rounds of a run that grows to a size: their shapes, planned before anything is written."""

from collections.abc import Iterator
from dataclasses import replace

from tritter.config.schema import RunConfig
from tritter.errors import Problem, RequestError
from tritter.families import Config
from tritter.planning import GrowthMethods, Shape
from tritter.planning.strategy import AUTO, PathRequest, find_best_path

_KEYS = {"target": "pipeline.target_params", "strategy": "pipeline.strategy"}  # of the planner


def planned_rounds(config: RunConfig, source: Config) -> tuple[Shape, ...]:
    """Return the shape after each round, no more of them than `pipeline.max_rounds`.

    The methods of `expansion` are those that may be used, their options kept and their sizes
    chosen; without any, `dus` and `width`.

    Args:
        source: config.json of the base.

    Raises:
        RequestError: a method has sizes of its own or none to plan, the strategy lacks a method,
            or the target can't be reached.
    """
    pipeline = config.pipeline
    assert pipeline.target_params is not None
    try:
        request = PathRequest(
            source=source,
            target_parameters=pipeline.target_params,
            strategy=pipeline.strategy or AUTO,
            methods=GrowthMethods.of(config.expansion),
        )
        return find_best_path(request)[: pipeline.max_rounds]
    except RequestError as error:
        (problem,) = error.problems
        key = _KEYS.get(problem.key, problem.key)
        raise RequestError(replace(problem, key=key)) from error


def pipeline_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is set about rounds that a run of one round would not look at."""
    pipeline = config.pipeline
    reason = "without pipeline.target_params a run has one round, and expansion says what it "
    reason += "does; give a target, or leave this out"
    for key, value in (("max_rounds", pipeline.max_rounds), ("strategy", pipeline.strategy)):
        if value is not None and pipeline.target_params is None:
            yield Problem(f"pipeline.{key}", value, reason=reason)
    if pipeline.target_params is not None and len(config.text.tasks) > 1:
        reason = "each round of a run that grows to a size is trained on one task; name it as "
        reason += "data.new, or leave pipeline.target_params out"
        yield Problem("data.tasks", list(config.text.tasks), reason=reason)

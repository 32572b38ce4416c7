"""What a summary.json has to be before anything of it is shown: it may come from anywhere."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Required

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.errors import TritterError
from tritter.report.experts_record import ExpertsSummary
from tritter.report.growth_record import GrowthSummary
from tritter.report.matrix import MatrixSummary
from tritter.report.rows import Count, Number

_Costs = dict[str, Number | None]


class _Score(TypedDict, total=False):
    loss: Number | None
    loss_per_byte: Number | None
    standard_error: Number | None
    accuracy: Number | None
    accuracy_standard_error: Number | None


_Scores = dict[str, _Score]


class _Check(TypedDict, total=False):
    check: Required[str]
    verdict: Required[str]
    subject: str
    detail: str
    value: Number | None
    bound: Number | None
    interval: tuple[Number | None, Number | None] | None


class _Task(TypedDict):
    domains: list[str]
    final: _Scores
    steps: Count


class _Trained(TypedDict, total=False):
    final: Required[_Scores]
    status: str
    expansion: list[str]
    overrides: list[str]
    expanded: _Scores | None
    baseline: _Scores
    gate: list[_Check]
    steps: Count
    tasks: list[_Task]
    flops: Number | _Costs
    seconds: Number | _Costs


class _Sample(TypedDict, total=False):
    domain: str
    prompt: str
    before: str
    after: str


class _Domains(TypedDict, total=False):
    old: list[str]
    new: list[str]


class _Summary(TypedDict, total=False):
    status: Required[Literal["kept", "rolled_back", "undecided", "ungated"]]
    domains: Required[_Domains]
    baseline: Required[_Scores]
    attempts: Required[list[_Trained]]
    expansion: list[str]
    forgetting: list[str]
    seed: int
    expanded: _Scores | None
    control: _Trained
    rounds: list[_Trained]
    tasks: list[_Task]
    flops: _Costs
    seconds: _Costs
    parameters: dict[str, Count]
    samples: list[_Sample]
    notes: list[str]
    growth: GrowthSummary | None
    experts: ExpertsSummary | None
    matrix: MatrixSummary | None


_ADAPTER = TypeAdapter(_Summary)


def check_summary(summary: Mapping[str, Any]) -> None:
    """Refuse what is no summary of a run; it may have more than is read here, and less.

    Raises:
        TritterError: says where, and what is wrong.
    """
    try:
        _ADAPTER.validate_json(json.dumps(summary), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise TritterError(f"it is no summary of a run: {place}: {first['msg']}") from error

"""What a summary.json has to be before anything of it is shown: it may come from anywhere."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.errors import TritterError

_LARGEST = 1e30  # sums and squares of such numbers, and axes over them, are finite
_Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**15)]
_Costs = dict[str, _Number | None]


class _Score(TypedDict, total=False):
    loss: _Number | None
    loss_per_byte: _Number | None
    standard_error: _Number | None
    accuracy: _Number | None
    accuracy_standard_error: _Number | None


_Scores = dict[str, _Score]


class _Check(TypedDict, total=False):
    check: Required[str]
    verdict: Required[str]
    subject: str
    detail: str
    value: _Number | None
    bound: _Number | None
    interval: tuple[_Number | None, _Number | None] | None


class _Task(TypedDict):
    domains: list[str]
    final: _Scores
    steps: _Count


class _Trained(TypedDict, total=False):
    final: Required[_Scores]
    status: str
    expansion: list[str]
    overrides: list[str]
    expanded: _Scores | None
    baseline: _Scores
    gate: list[_Check]
    steps: _Count
    tasks: list[_Task]
    flops: _Number | _Costs
    seconds: _Number | _Costs


class _Sample(TypedDict, total=False):
    domain: str
    prompt: str
    before: str
    after: str


class _Domains(TypedDict, total=False):
    old: list[str]
    new: list[str]


class _Summary(TypedDict, total=False):
    status: Required[Literal["kept", "rolled_back", "undecided"]]
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
    parameters: dict[str, _Count]
    samples: list[_Sample]
    notes: list[str]


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

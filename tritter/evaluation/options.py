"""The sections `evaluation` and `gate` of a run: their records and their rules; no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tritter.data.benchmark_names import CODE, benchmark_names, code_problems
from tritter.errors import Problem, RequestError
from tritter.limits import MAX_COUNT
from tritter.options import Count, RunRequest, Text, WholeNumber, options

TASKS_KEY = "evaluation.tasks"


@options
class EvaluationConfig:
    """How domains are scored and sampled, and which benchmarks are asked besides.

    Args:
        every_n_steps: of the training, between two evaluations; 0: none. A number once validated:
            None is a tenth of the training.
        task_questions: of each domain that generated skills teach; 0: none.
        tasks: benchmarks, and groups of them.
        tasks_path: folder with their files, absolute once validated; None: the hub.
        task_limit: so many questions of each; None: all.
        allow_code: benchmarks whose answers are programs, which may be run.
        code_sandbox: Tritter's own, or a command of the user's.
        code_sandbox_command: reads a program on its standard input.
    """

    max_tokens_per_document: Annotated[int, Field(ge=2, le=MAX_COUNT)]
    batch_size: Count
    sample_tokens: WholeNumber
    every_n_steps: WholeNumber | None
    task_questions: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    tasks: list[str]
    tasks_path: Text | None
    task_limit: Count | None
    allow_code: list[str]
    code_sandbox: Literal["namespaces", "external"]
    code_sandbox_command: Text | None


@options
class GateConfig:
    """When a grown model is kept, and what is tried after it was not.

    Args:
        ladder: by name; None: nothing is.
        max_attempts: the first counts; None: one, and one for each rung of the ladder.
    """

    enabled: bool
    strict: bool
    retention: Annotated[float, Field(ge=0)]
    confidence: Annotated[float, Field(gt=0.5, le=0.999)]
    ladder: Text | None = None
    max_attempts: Count | None = None


def benchmark_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield what is wrong with the benchmarks of a run, but for their files."""
    asked = config.evaluation
    try:
        names = benchmark_names(asked.tasks, key=TASKS_KEY)
    except RequestError as error:
        yield from error.problems
        return
    yield from code_problems(
        names, asked.allow_code, key=TASKS_KEY, allowing="evaluation.allow_code"
    )
    if asked.tasks_path is not None and not Path(asked.tasks_path).is_dir():
        yield Problem("evaluation.tasks_path", asked.tasks_path, reason="there is no such folder")
    is_external = asked.code_sandbox == "external"
    if is_external and not asked.code_sandbox_command and set(names) & set(CODE):
        reason = "name the command that reads a program on its standard input"
        yield Problem("evaluation.code_sandbox_command", None, reason=reason)
    for domain in config.text.domains:
        if domain.name in names:
            reason = "a domain has that name already"
            yield Problem(TASKS_KEY, domain.name, reason=reason)


def gate_problems(config: RunRequest) -> Iterator[Problem]:
    if config.gate.strict and not config.gate.enabled:
        reason = "with gate.enabled = false a gate can't refuse; use gate=strict or gate=off"
        yield Problem("gate.strict", True, reason=reason)

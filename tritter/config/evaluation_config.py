"""The record of the group `evaluation`."""

from typing import Annotated, Literal

from pydantic import Field

from tritter.limits import MAX_COUNT
from tritter.options import Count, Text, WholeNumber, options


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

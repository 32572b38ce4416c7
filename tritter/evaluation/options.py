"""The sections `evaluation` and `gate` of a run and their validation, without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tritter.data.benchmark_names import CODE, benchmark_names, code_problems
from tritter.errors import Problem, RequestError, nearest
from tritter.limits import MAX_COUNT
from tritter.options import Count, RunRequest, Text, WholeNumber, options
from tritter.targets import instantiate

TASKS_KEY = "evaluation.tasks"


@options
class EvaluationConfig:
    """Options of scoring, sampling and benchmarks.

    Args:
        max_tokens_per_document: limit of scored tokens per document.
        max_documents: limit of scored documents per domain; None is in proportion to training, see
            `scored_counts`.
        batch_size: windows per forward pass.
        sample_tokens: limit of tokens of text samples; 0 disables them. None is 48, and 256 for
            answers of a chat model.
        prompts: own prompts for text samples, also during training.
        every_n_steps: optimizer steps between two evaluations during training; 0 disables them.
            None becomes a tenth of the training steps during validation of the config.
        task_questions: questions for each domain of generated skills; 0 disables them.
        tasks: benchmarks and groups of benchmarks.
        tasks_path: folder of their files, absolute after validation; None uses the hub.
        task_limit: number of questions of each benchmark; None uses all.
        chat_template: render the prompts of benchmarks with the checkpoint's chat template.
        num_fewshot: number of few-shot examples of benchmarks; None is lm-eval's default.
        allow_code: benchmarks whose generated programs may run.
        code_sandbox: Tritter's sandbox or an external command.
        code_sandbox_command: command that reads a program from standard input.
    """

    max_tokens_per_document: Annotated[int, Field(ge=4, le=MAX_COUNT)]
    max_documents: Count | None
    batch_size: Count
    sample_tokens: WholeNumber | None
    prompts: list[Text]
    every_n_steps: WholeNumber | None
    task_questions: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    tasks: list[str]
    tasks_path: Text | None
    task_limit: Count | None
    chat_template: bool
    num_fewshot: WholeNumber | None
    allow_code: list[str]
    code_sandbox: Literal["namespaces", "external"]
    code_sandbox_command: Text | None


@options
class GateConfig:
    """Options of the gate and of the fallback chain after a failure.

    Args:
        enabled: False disables the gate.
        strict: the run fails unless the grown model is kept.
        retention: allowed relative forgetting.
        confidence: confidence of each one-sided bound.
        ladder: name of the fallback chain; None disables fallbacks.
        max_attempts: limit of attempts, including the first; None allows the first attempt and
            all fallbacks.
    """

    enabled: bool
    strict: bool
    retention: Annotated[float, Field(ge=0)]
    confidence: Annotated[float, Field(gt=0.5, le=0.999)]
    ladder: Text | None = None
    max_attempts: Count | None = None


def _prompt_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield own prompts that are empty, or that nothing continues."""
    key, prompts = "evaluation.prompts", config.evaluation.prompts
    if prompts and config.evaluation.sample_tokens == 0:
        reason = f"they need evaluation.sample_tokens above {config.evaluation.sample_tokens}"
        yield Problem(key, prompts, reason=reason)
    if len(set(prompts)) < len(prompts):
        yield Problem(key, prompts, reason="list each prompt once")


def _benchmark_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield the problems of a run's benchmarks; their files are not read."""
    evaluation = config.evaluation
    try:
        names = benchmark_names(evaluation.tasks, key=TASKS_KEY)
    except RequestError as error:
        yield from error.problems
        return
    yield from code_problems(
        names, evaluation.allow_code, key=TASKS_KEY, allowing="evaluation.allow_code"
    )
    for name in ("chat_template", "num_fewshot", "task_limit", "tasks_path", "allow_code"):
        if (value := getattr(evaluation, name)) and not names:
            yield Problem(f"evaluation.{name}", value, reason=f"requires {TASKS_KEY}")
    path = evaluation.tasks_path
    if path is not None and not Path(path).is_dir():
        yield Problem("evaluation.tasks_path", path, reason="there is no such folder")
    is_external = evaluation.code_sandbox == "external"
    if is_external and not evaluation.code_sandbox_command and set(names) & set(CODE):
        reason = "set a command that reads a program from standard input"
        yield Problem("evaluation.code_sandbox_command", None, reason=reason)
    for domain in config.text.domains:
        if domain in names:
            yield Problem(TASKS_KEY, domain, reason="a domain already has this name")


def _metric_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield own metrics with the name of another score, and those of unknown domains."""
    if not config.metrics:
        return
    domains = list(config.text.domains)
    taken = {*domains, *benchmark_names(config.evaluation.tasks, key=TASKS_KEY)}
    for one in config.metrics:
        key, metric = f"metrics.{one.name}", instantiate(one.options)
        domain, chance = metric.domain, metric.chance
        if not isinstance(chance, int | float) or not 0 <= chance < 1:
            yield Problem(key, reason=f"its chance is {chance!r}; must be at least 0 and below 1")
        if one.name in taken or not one.name.isidentifier():
            reason = "choose another name: letters, digits and _, not that of a domain or benchmark"
            yield Problem(key, one.name, reason=reason)
        if domain is not None and domain not in domains:
            near, known = nearest(str(domain), domains), ", ".join(domains)
            reason = f"it belongs to the domain {domain}, and this run has {known}"
            yield Problem(key, reason=reason, nearest=near)


def _gate_problems(config: RunRequest) -> Iterator[Problem]:
    if config.gate.strict and not config.gate.enabled:
        reason = "requires gate.enabled = true; use gate=strict or gate=off"
        yield Problem("gate.strict", True, reason=reason)


# Validation rules of these sections
RULES = (_gate_problems, _benchmark_problems, _metric_problems, _prompt_problems)

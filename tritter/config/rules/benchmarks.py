"""What `evaluation.tasks` asks of a run: benchmarks, their files, and what may run programs."""

from collections.abc import Iterator
from pathlib import Path

from tritter.config.schema import RunConfig
from tritter.data.benchmark_names import CODE, benchmark_names, code_problems
from tritter.errors import Problem, RequestError

KEY = "evaluation.tasks"


def benchmark_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the benchmarks of a run, but for their files."""
    asked = config.evaluation
    try:
        names = benchmark_names(asked.tasks, key=KEY)
    except RequestError as error:
        yield from error.problems
        return
    yield from code_problems(names, asked.allow_code, key=KEY, allowing="evaluation.allow_code")
    if asked.tasks_path is not None and not Path(asked.tasks_path).is_dir():
        yield Problem("evaluation.tasks_path", asked.tasks_path, reason="there is no such folder")
    is_external = asked.code_sandbox == "external"
    if is_external and not asked.code_sandbox_command and set(names) & set(CODE):
        reason = "name the command that reads a program on its standard input"
        yield Problem("evaluation.code_sandbox_command", None, reason=reason)
    for domain in config.text.domains:
        if domain.name in names:
            reason = "a domain has that name already"
            yield Problem(KEY, domain.name, reason=reason)

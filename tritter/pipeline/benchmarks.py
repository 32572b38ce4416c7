"""Benchmarks as tasks of a run: asked wherever its domains are scored, and gated as retention."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

from torch import nn

from tritter.config.rules import KEY
from tritter.config.schema import EvaluationConfig
from tritter.data.benchmark_names import CODE, benchmark_names
from tritter.evaluation.benchmarks.files import Questions, TasksFolder, load
from tritter.evaluation.benchmarks.formats import Benchmark
from tritter.evaluation.benchmarks.harness import (
    Asking,
    Tokenizer,
    require_harness,
    score_benchmark,
    score_from_hub,
    sequence_lengths,
)
from tritter.evaluation.benchmarks.table import BENCHMARKS
from tritter.evaluation.code.sandbox import ExternalSandbox, NamespaceSandbox, Sandbox
from tritter.evaluation.statistics import PairedScores
from tritter.evaluation.tasks import Reader
from tritter.models import wrapped_tokenizer


@dataclass(frozen=True, eq=False)
class BenchmarkTask:
    """A benchmark, scored by the metric that it is known by.

    Args:
        questions: None: the hub has them.
        positions: tokens that the run's models read.
    """

    benchmark: Benchmark
    questions: Questions | None
    asking: Asking
    positions: int
    domain: str | None = None

    @property
    def name(self) -> str:
        return self.benchmark.name

    @cached_property
    def digest(self) -> str:
        held: Any = f"hub: {self.benchmark.hub}"
        if self.questions is not None:
            asked = self.questions.limited(self.asking.limit)
            held = [
                (name, astuple(asked.questions[name]), asked.examples[name])
                for name in asked.questions
            ]
        return sha256(dumps([held, self.asking.limit, version("lm_eval")]).encode()).hexdigest()

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Ask a model all questions.

        Raises:
            RequestError: the hub does not give them.
            TritterError: the model computes what is not finite.
        """
        asking = replace(self.asking, batch_size=reader.batch_size)
        if self.questions is None:
            found = score_from_hub(model, _tokenizer(reader), self.benchmark, asking)
        else:
            found = score_benchmark(model, _tokenizer(reader), self.questions, asking)
        return found.known_by

    def lengths(self, reader: Reader) -> Sequence[int]:
        """Return the tokens of each sequence; generated answers count as long as they may be.

        Of a benchmark from the hub nothing is known before.
        """
        if self.questions is None:
            return ()
        asked = self.questions.limited(self.asking.limit)
        return sequence_lengths(_tokenizer(reader), asked, length=self.positions)


def benchmark_tasks(asked: EvaluationConfig, *, positions: int) -> tuple[BenchmarkTask, ...]:
    """Return the benchmarks of a run, once their files, lm-eval and the sandbox were tried.

    Raises:
        RequestError: one of them can't be had.
    """
    names = benchmark_names(asked.tasks, key=KEY)
    if not names:
        return ()
    chosen = [BENCHMARKS[name] for name in names]
    held: Mapping[str, Questions] = {}
    if asked.tasks_path is not None:
        folder = TasksFolder(Path(asked.tasks_path), key="evaluation.tasks_path")
        loaded = load(chosen, folder, limit=asked.task_limit)
        held = {each.benchmark.name: each for each in loaded}
    require_harness()
    sandbox: Sandbox | None = None
    if set(names) & set(CODE):
        command = asked.code_sandbox_command
        is_external = asked.code_sandbox == "external" and command is not None
        sandbox = ExternalSandbox(str(command)) if is_external else NamespaceSandbox()
        sandbox.check()
    asking = Asking(limit=asked.task_limit, sandbox=sandbox, is_null_run=False)
    return tuple(BenchmarkTask(each, held.get(each.name), asking, positions) for each in chosen)


def _tokenizer(reader: Reader) -> Tokenizer:
    end_of_text = reader.tokenizer.id_to_token(reader.end_of_text_id)
    assert end_of_text is not None
    return wrapped_tokenizer(reader.tokenizer, end_of_text=end_of_text)

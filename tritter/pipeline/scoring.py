"""Scores of a run's models: held-out documents of each domain, and tasks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

from torch import nn

from tritter.core.families import Flops
from tritter.core.models import wrapped_tokenizer
from tritter.data.benchmark_names import CODE, benchmark_names
from tritter.data.tokens import TokenisedDocuments
from tritter.errors import TritterError
from tritter.evaluation.benchmarks.files import Questions, TasksFolder, load
from tritter.evaluation.benchmarks.formats import BENCHMARKS, Benchmark
from tritter.evaluation.benchmarks.harness import (
    EvalOptions,
    require_harness,
    score_benchmark,
    score_from_hub,
    sequence_lengths,
)
from tritter.evaluation.benchmarks.harness import (
    Tokenizer as StockTokenizer,
)
from tritter.evaluation.code.sandbox import ExternalSandbox, NamespaceSandbox, Sandbox
from tritter.evaluation.losses import document_losses, window_lengths
from tritter.evaluation.options import TASKS_KEY, EvaluationConfig
from tritter.evaluation.statistics import MAX_SCORE_BYTES, PairedScores
from tritter.evaluation.tasks import Reader, ScoredTask, subject_of
from tritter.storage.reading import read_object
from tritter.terminal import NewBar, no_bar

Scores = dict[str, PairedScores]  # domain name or task subject → scores


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """The documents and tasks to score, and how to read them.

    Args:
        documents: domain → validation documents.
        tasks: benchmarks and question sets.
        reader: tokenizer and batch size.
        sequence_length: length of the windows into which documents are cut.
    """

    documents: Mapping[str, TokenisedDocuments]
    tasks: tuple[ScoredTask, ...]
    reader: Reader
    sequence_length: int

    @property
    def subjects(self) -> tuple[str, ...]:
        """The names of all scores: domains, then tasks."""
        return (*self.documents, *map(subject_of, self.tasks))

    def score(self, model: nn.Module, *, new_bar: NewBar = no_bar) -> Scores:
        """Score a model on its current device.

        Raises:
            TritterError: a domain has no tokens.
        """
        scores = {
            domain: document_losses(
                model,
                documents,
                sequence_length=self.sequence_length,
                bounds=self.reader.bounds,
                batch_size=self.reader.batch_size,
                progress=new_bar(f"scoring {domain}"),
            )
            for domain, documents in self.documents.items()
        }
        scores |= {subject_of(task): task.score(model, self.reader) for task in self.tasks}
        return scores

    def read(self, path: Path) -> Scores:
        """Return the scores in a file.

        Raises:
            TritterError: scores are missing or damaged.
        """
        plain = read_object(path, limit_bytes=MAX_SCORE_BYTES)
        try:
            return {subject: PairedScores.from_dict(plain[subject]) for subject in self.subjects}
        except (KeyError, TritterError) as error:
            raise TritterError(
                f"{path} does not contain the scores of this run: {error}."
            ) from error

    def flops(self, reading: Flops) -> float:
        """Return the FLOPs of one scoring pass, without padding.

        Args:
            reading: FLOPs of reading a sequence.
        """
        lengths = Counter(
            window
            for documents in self.documents.values()
            for window in window_lengths(
                documents, sequence_length=self.sequence_length, bounds=self.reader.bounds
            )
        )
        for task in self.tasks:
            lengths.update(task.lengths(self.reader))
        return reading.of_all(lengths)


def scores_text(scores: Mapping[str, PairedScores]) -> str:
    """Return scores as one line: losses, then accuracies."""
    losses = [f"{n} {score.mean():.3f}" for n, score in scores.items() if score.unit == "nats"]
    parts = [
        f"{n.removesuffix('/accuracy')} {score.mean():.1%}"
        for n, score in scores.items()
        if score.unit == "accuracy"
    ]
    text = f"loss [nats/token]: {', '.join(losses)}"
    return f"{text}; accuracy: {', '.join(parts)}" if parts else text


def score_records(scores: Mapping[str, PairedScores]) -> dict[str, dict[str, Any]]:
    """Return domain or task → record, as in summary.json; a domain may also have an accuracy."""
    records: dict[str, dict[str, Any]] = {}
    for subject, score in scores.items():
        record, name = score.record(), subject.removesuffix("/accuracy")
        if score.unit == "accuracy" and name in records:
            records[name] |= {
                "accuracy": record["accuracy"],
                "accuracy_standard_error": record["standard_error"],
                "num_questions": record["n"],
                "chance": score.chance,
            }
        else:
            records[name] = record
    return records


# Benchmarks


@dataclass(frozen=True, eq=False)
class BenchmarkTask:
    """A benchmark, scored by its usual metric.

    Args:
        benchmark: the benchmark.
        questions: its questions; None to load them from the Hub.
        harness: settings of lm-eval.
        positions: maximum number of tokens of the run's models.
        domain: domain of the task; None for benchmarks.
    """

    benchmark: Benchmark
    questions: Questions | None
    harness: EvalOptions
    positions: int
    domain: str | None = None

    @property
    def name(self) -> str:
        """The name of the benchmark."""
        return self.benchmark.name

    @cached_property
    def digest(self) -> str:
        """The checksum of the questions and settings."""
        content: Any = f"hub: {self.benchmark.hub}"
        if self.questions is not None:
            limited = self.questions.limited(self.harness.limit)
            content = [
                (name, astuple(limited.questions[name]), limited.examples[name])
                for name in limited.questions
            ]
        return sha256(dumps([content, self.harness.limit, version("lm_eval")]).encode()).hexdigest()

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Score a model on all questions.

        Raises:
            RequestError: the Hub does not provide the questions.
            TritterError: the model's outputs are not finite.
        """
        harness = replace(self.harness, batch_size=reader.batch_size)
        if self.questions is None:
            found = score_from_hub(model, _tokenizer(reader), self.benchmark, harness)
        else:
            found = score_benchmark(model, _tokenizer(reader), self.questions, harness)
        return found.primary

    def lengths(self, reader: Reader) -> Sequence[int]:
        """Return the length of each sequence in tokens, with generated answers at their maximum.

        Empty for a benchmark on the Hub, whose questions are not known in advance.
        """
        if self.questions is None:
            return ()
        limited = self.questions.limited(self.harness.limit)
        return sequence_lengths(_tokenizer(reader), limited, length=self.positions)


def benchmark_tasks(options: EvaluationConfig, *, positions: int) -> tuple[BenchmarkTask, ...]:
    """Return the benchmarks of a run, after checking their files, lm-eval and the sandbox.

    Raises:
        RequestError: a benchmark is not available.
    """
    names = benchmark_names(options.tasks, key=TASKS_KEY)
    if not names:
        return ()
    chosen = [BENCHMARKS[name] for name in names]
    questions: Mapping[str, Questions] = {}
    if options.tasks_path is not None:
        folder = TasksFolder(Path(options.tasks_path), key="evaluation.tasks_path")
        loaded = load(chosen, folder, limit=options.task_limit)
        questions = {each.benchmark.name: each for each in loaded}
    require_harness()
    sandbox: Sandbox | None = None
    if set(names) & set(CODE):
        command = options.code_sandbox_command
        is_external = options.code_sandbox == "external" and command is not None
        sandbox = ExternalSandbox(str(command)) if is_external else NamespaceSandbox()
        sandbox.check()
    harness = EvalOptions(limit=options.task_limit, sandbox=sandbox, is_null_run=False)
    return tuple(
        BenchmarkTask(each, questions.get(each.name), harness, positions) for each in chosen
    )


def _tokenizer(reader: Reader) -> StockTokenizer:
    end_of_text = reader.tokenizer.id_to_token(reader.bounds.end)
    assert end_of_text is not None
    return wrapped_tokenizer(reader.tokenizer, end_of_text=end_of_text)

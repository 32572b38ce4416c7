"""Scores of a run's models: held-out documents of each domain, and tasks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from tritter.data.packing import Windows
from tritter.data.tokens import TokenisedDocuments
from tritter.errors import Problem, RequestError, TritterError
from tritter.evaluation.benchmarks.files import Questions, TasksFolder
from tritter.evaluation.benchmarks.formats import BENCHMARKS, Benchmark
from tritter.evaluation.benchmarks.harness import (
    EvalOptions,
    require_harness,
)
from tritter.evaluation.benchmarks.harness import Tokenizer as StockTokenizer
from tritter.evaluation.code.sandbox import Sandbox
from tritter.evaluation.losses import document_losses
from tritter.evaluation.options import TASKS_KEY, EvaluationConfig
from tritter.evaluation.statistics import PairedScores
from tritter.evaluation.tasks import Reader, ScoredTask, subject_of
from tritter.storage.reading import read_object
from tritter.terminal import NewBar, no_bar


class Scores(dict[str, PairedScores]):
    """Domain or subject of a task → scores of one model."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Scores":
        """Return scores from the plain values of `plain`."""
        return cls({subject: PairedScores.from_dict(plain[subject]) for subject in plain})

    def plain(self) -> dict[str, Any]:
        """Return the scores as plain values."""
        return {subject: each.to_dict() for subject, each in self.items()}

    def text(self) -> str:
        """Return the scores as one line: losses, then accuracies."""
        losses = [f"{n} {score.mean():.3f}" for n, score in self.items() if score.unit == "nats"]
        parts = [
            f"{n.removesuffix('/accuracy')} {score.mean():.1%}"
            for n, score in self.items()
            if score.unit == "accuracy"
        ]
        text = f"loss [nats/token]: {', '.join(losses)}"
        return f"{text}; accuracy: {', '.join(parts)}" if parts else text

    def records(self, tasks: Iterable[ScoredTask] = ()) -> dict[str, dict[str, Any]]:
        """Return domain or task → record, as in summary.json; a domain may also have an accuracy.

        Args:
            tasks: the tasks; records of benchmarks get their settings.
        """
        records: dict[str, dict[str, Any]] = {}
        for subject, score in self.items():
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
        for task in tasks:
            if isinstance(task, BenchmarkTask) and task.name in records:
                records[task.name] |= task.settings
        return records


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
        """Score a model on its current device."""
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
        return Scores(scores)

    def read(self, path: Path) -> Scores:
        """Return the scores in a file."""
        plain = read_object(path, limit_bytes=PairedScores.MAX_FILE_BYTES)
        try:
            return Scores.of({subject: plain[subject] for subject in self.subjects})
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
            window.length
            for documents in self.documents.values()
            for window in Windows(
                documents, sequence_length=self.sequence_length, bounds=self.reader.bounds
            )
        )
        for task in self.tasks:
            lengths.update(task.lengths(self.reader))
        return reading.of_all(lengths)


# Benchmarks


@dataclass(frozen=True, eq=False)
class BenchmarkTask:
    """A benchmark, scored by its usual metric.

    Args:
        benchmark: the benchmark.
        questions: its questions; None to load them from the Hub.
        harness: settings of lm-eval.
        positions: maximum number of tokens of the run's models.
        stock: tokenizer of the run's checkpoint, for its special tokens and chat template; None for
            a new base model.
        domain: domain of the task; None for benchmarks.
    """

    benchmark: Benchmark
    questions: Questions | None
    harness: EvalOptions
    positions: int
    stock: StockTokenizer | None = None
    domain: str | None = None

    @classmethod
    def chosen(
        cls, options: EvaluationConfig, *, positions: int, stock: StockTokenizer | None = None
    ) -> "tuple[BenchmarkTask, ...]":
        """Return the benchmarks of a run, after checking their files, lm-eval and the sandbox.

        Args:
            options: the options of the run.
            positions: maximum number of tokens of the run's models.
            stock: tokenizer of the run's checkpoint; None for a new base model.
        """
        names = benchmark_names(options.tasks, key=TASKS_KEY)
        if not names:
            return ()
        if options.chat_template and (stock is None or stock.chat_template is None):
            reason = "the checkpoint has no chat template"
            raise RequestError(Problem("evaluation.chat_template", True, reason=reason))
        benchmarks = [BENCHMARKS[name] for name in names]
        questions: Mapping[str, Questions] = {}
        if options.tasks_path is not None:
            folder = TasksFolder(Path(options.tasks_path), key="evaluation.tasks_path")
            loaded = folder.load(
                benchmarks,
                limit=options.task_limit,
                num_fewshot=options.num_fewshot,
                fewshot_key="evaluation.num_fewshot",
            )
            questions = {each.benchmark.name: each for each in loaded}
        require_harness()
        sandbox: Sandbox | None = None
        if set(names) & set(CODE):
            command = options.code_sandbox_command if options.code_sandbox == "external" else None
            sandbox = Sandbox.checked(command, key="evaluation.code_sandbox_command")
        harness = EvalOptions(
            limit=options.task_limit,
            sandbox=sandbox,
            is_null_run=False,
            is_chat=options.chat_template,
            num_fewshot=options.num_fewshot,
            keys=(TASKS_KEY, "evaluation.tasks_path"),
        )
        return tuple(
            cls(each, questions.get(each.name), harness, positions, stock) for each in benchmarks
        )

    @property
    def name(self) -> str:
        """The name of the benchmark."""
        return self.benchmark.name

    @property
    def settings(self) -> dict[str, Any]:
        """What its score depends on in addition to the questions, for summary.json."""
        return {
            "metric": self.benchmark.metric,
            "num_fewshot": (
                self.harness.num_fewshot if self.questions is None else self.questions.num_fewshot
            ),
            "chat_template": self.harness.is_chat,
        }

    @property
    def label(self) -> str:
        """Its name with the settings, for people."""
        settings = self.settings
        number, how = settings["num_fewshot"], ", chat template" * settings["chat_template"]
        shots = "lm-eval's few-shot examples" if number is None else f"{number}-shot"
        return f"{self.name} ({settings['metric']}, {shots}{how})"

    @cached_property
    def digest(self) -> str:
        """The checksum of the questions and settings."""
        content: Any = f"hub: {self.benchmark.hub}"
        if self.questions is not None:
            limited = self.questions.limited(self.harness.limit)
            content = [
                (name, astuple(question), [astuple(each) for each in limited.examples[name]])
                for name, question in limited.questions.items()
            ]
        stock, template = self.stock, None
        special = {} if stock is None else stock.special_tokens_map
        if stock is not None and self.harness.is_chat:
            template = stock.chat_template
        settings = [self.settings, self.harness.limit, version("lm_eval"), template, special]
        return sha256(dumps([content, settings], default=str).encode()).hexdigest()

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Score a model on all questions."""
        harness = replace(self.harness, batch_size=reader.batch_size)
        tokenizer = _tokenizer(reader, self.stock)
        if self.questions is None:
            found = harness.score_from_hub(model, tokenizer, self.benchmark)
        else:
            found = harness.score(model, tokenizer, self.questions)
        return found.primary

    def lengths(self, reader: Reader) -> Sequence[int]:
        """Return the length of each sequence in tokens, with generated answers at their maximum.

        Empty for a benchmark on the Hub, whose questions are not known in advance.
        """
        if self.questions is None:
            return ()
        return self.harness.sequence_lengths(
            _tokenizer(reader, self.stock),
            self.questions.limited(self.harness.limit),
            length=self.positions,
        )


def _tokenizer(reader: Reader, stock: StockTokenizer | None) -> StockTokenizer:
    """Return the tokenizer of a run for lm-eval, with special tokens and template of `stock`."""
    end_of_text = reader.tokenizer.id_to_token(reader.bounds.end)
    assert end_of_text is not None
    wrapped: StockTokenizer = wrapped_tokenizer(reader.tokenizer, end_of_text=end_of_text)
    if stock is not None:
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            setattr(wrapped, name, getattr(stock, name))
        wrapped.chat_template = stock.chat_template
    return wrapped

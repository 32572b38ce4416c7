"""What a benchmark is: the formats of its files, its questions, how an answer is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tritter.data.benchmark_names import HUB_NAMES

Kind = Literal["choice", "context", "word", "answer", "code"]
Row = Mapping[str, Any]
METRICS: dict[Kind, tuple[str, ...]] = {
    "choice": ("acc", "acc_norm"),
    "context": ("acc",),
    "word": ("acc",),
    "answer": ("exact_match",),
    "code": ("pass@1",),
}
TEXT, CHOICES, NUMBER, OBJECT = str, list, int, dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question.

    Args:
        prompt: what the model reads; of kind `context` what it is to predict after each choice.
        choices: what may follow (`choice`), or what may come before (`context`).
        right: index of the right choice.
        answer: the right one, in words (`word`, `answer`).
        tests: program that fails unless the answer is right (`code`).
        part: of the benchmark: a subject, a language, a subtask.
        name: of its own, where its file has one.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    right: int = 0
    answer: str = ""
    tests: str = ""
    part: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """One form in which a benchmark is published.

    Args:
        fields: name → type that a record has there.
        question: makes a question of a record and its file's name; None of a record that is not
            asked. What it raises says that the record does not hold what it should.
    """

    fields: Mapping[str, type | tuple[type, ...]]
    question: Callable[[Row, str], Question | None]

    def fits(self, row: object) -> bool:
        """Say whether a record has the fields, whatever they hold."""
        return isinstance(row, Mapping) and set(self.fields) <= set(row)


class Folder(Protocol):
    """Files to look for examples in."""

    def first(self, *patterns: str) -> Path | None:
        """Return the first file whose path matches one of the patterns, in their order."""

    def rows(self, path: Path) -> Sequence[Row]:
        """Return a file's records."""

    def text(self, path: Path) -> str:
        """Return a small file's text."""


Examples = Callable[[Folder, Path, Sequence[Row]], str]


def no_examples(folder: Folder, path: Path, rows: Sequence[Row]) -> str:
    """Ask without examples."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark.

    Args:
        metric: the one that it is known by, that is gated.
        files: patterns of paths below the folder of files, the best first: the first one that any
            file has decides.
        formats: that its records may have.
        hub_filter: of lm-eval's filters, the one whose scores count; empty: the only one.
        examples: what stands before all questions of a file.
        until: what ends an answer that is generated.
        max_new_tokens: of an answer.
        is_right: judges a generated answer.
        separator: between prompt and choice.
    """

    name: str
    kind: Kind
    metric: str
    files: tuple[str, ...]
    formats: tuple[Format, ...]
    hub_filter: str = ""
    examples: Examples = no_examples
    until: tuple[str, ...] = ()
    max_new_tokens: int = 256
    is_right: Callable[[Question, str], bool] = field(default=lambda question, text: False)
    separator: str = " "

    @property
    def hub(self) -> str:
        """What it is called on the hub; empty where it is not there."""
        return HUB_NAMES[self.name]

    @property
    def metrics(self) -> tuple[str, ...]:
        """All that are counted, the one that it is known by first."""
        return (self.metric, *(name for name in METRICS[self.kind] if name != self.metric))

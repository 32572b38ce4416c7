"""Benchmarks from files in their published formats, found by name.

The files are untrusted: only regular files of bounded size are read, and each record is validated.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from tritter.data.local_files import (
    ByteLimitError,
    Reading,
    TextFileError,
    parquet_records,
    parse,
    text_suffix,
)
from tritter.data.records import WrongRecordError
from tritter.errors import Problem, RequestError, TritterError, brief, nearest, raise_problems
from tritter.evaluation.benchmarks.formats import Benchmark, FewShot, Question, Row
from tritter.storage.reading import check_inside, read_text

_MAX_FILE_BYTES = 256 * 2**20  # decompressed
_MAX_QUESTION_CHARACTERS = 2**20
_MAX_FILES = 20_000  # in a folder and its subfolders
_MAX_PROBLEMS_OF_FILE = 5
_SPREAD_ROWS = 50_000  # rows of a .parquet to sample a limited number of questions from
_ROW_BYTES, _VALUE_BYTES = 256, 64  # overhead of a record and of a value in memory
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt")
_ROWS_BELOW = "examples"  # key of the records in BBH's files
_THOUGHT = "\nA: Let's think step by step.\n"  # between question and answer in BBH's prompts
_RECORDS = r".*\.(jsonl|json|parquet)"


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions of a benchmark.

    Args:
        benchmark: the benchmark.
        questions: name → question, in order.
        examples: name → its few-shot examples.
        files: the files of the questions.
        total: number of questions before any limit.
        notes: one sentence per fact about the few-shot examples that is not as requested.
    """

    benchmark: Benchmark
    questions: dict[str, Question]
    examples: dict[str, tuple[Question, ...]]
    files: tuple[str, ...]
    total: int
    notes: tuple[str, ...] = ()

    @property
    def num_fewshot(self) -> int:
        """Number of few-shot examples of each question."""
        return max(map(len, self.examples.values()), default=0)

    def limited(self, limit: int | None) -> "Questions":
        """Return at most `limit` questions, spread evenly because files are sorted by subject."""
        names = list(self.questions)
        if limit is None or len(names) <= limit:
            return self
        return self.only([names[index * len(names) // limit] for index in range(limit)])

    def only(self, names: Sequence[str]) -> "Questions":
        """Return the questions with some names."""
        return replace(
            self,
            questions={name: self.questions[name] for name in names},
            examples={name: self.examples[name] for name in names},
        )

    @classmethod
    def of_rows(
        cls,
        benchmark: Benchmark,
        rows: Sequence[Row],
        *,
        origin: str,
        num_fewshot: int | None = None,
    ) -> "Questions":
        """Return the questions of records in memory."""
        path = Path(origin)
        try:
            questions = dict(_questions(benchmark, path, rows, is_alone=True))
            found = cls(benchmark, questions, {}, (origin,), len(questions))
            return _with_examples(found, None, {path: rows}, num_fewshot)
        except _TooFewExamplesError as error:
            reason = f"{benchmark.name}: {error}"
            raise RequestError(Problem("num_fewshot", num_fewshot, reason=reason)) from error
        except _WrongFileError as error:
            raise RequestError(str(error)) from error


class TasksFolder:
    """A folder with files of benchmarks, at any depth.

    Args:
        path: the folder.
        key: the option that names it, for messages.
    """

    def __init__(self, path: Path, *, key: str) -> None:
        self.path, self.key = path, key
        if not path.is_dir():
            raise RequestError(Problem(key, str(path), reason="there is no such folder"))

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Relative path in lower case → file; links to folders are not followed."""
        found: dict[str, Path] = {}
        for parent, folders, names in os.walk(self.path):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(_SUFFIXES):
                    path = Path(parent, name)
                    try:
                        if path.is_symlink():
                            check_inside(self.path, str(path.relative_to(self.path)))
                    except TritterError as error:
                        raise RequestError(Problem("", reason=f"{self.key}: {error}")) from error
                    found[path.relative_to(self.path).as_posix().lower()] = path
            if len(found) > _MAX_FILES:
                reason = f"it has more than {_MAX_FILES} files; set the folder of the benchmarks"
                raise RequestError(Problem(self.key, str(self.path), reason=reason))
        return found

    def all(self, *patterns: str) -> list[Path]:
        """Return all files that match the first pattern with a match."""
        for pattern in patterns:
            found = [path for name, path in self._files.items() if re.search(pattern, name)]
            if found:
                return found
        return []

    def rows(self, path: Path, *, limit: int | None = None) -> Sequence[Row]:
        """Return a file's records.

        Args:
            path: the file.
            limit: number of records that suffice if the file exceeds the size limit.
        """
        reading = Reading(key=self.key, max_bytes=_MAX_FILE_BYTES, is_strict=True)
        is_parquet = path.suffix.lower() == ".parquet"
        enough = max(limit, _SPREAD_ROWS) if is_parquet and limit is not None else None
        found: list[Row] = []
        try:
            for row in islice(reading.counted(str(path), _records(path, reading)), enough):
                found.append(row)
                if is_parquet:
                    reading.count(_ROW_BYTES + _VALUE_BYTES * len(row))
        except ByteLimitError as error:
            if limit is None or len(found) < limit:
                size = f"{_MAX_FILE_BYTES // 2**20} MiB"
                line = f"{self.key}: {path} is larger than {size} when decompressed."
                raise TextFileError([line]) from error
        if reading.problems:
            raise TextFileError(reading.problems)
        return found

    def load(
        self,
        benchmarks: Sequence[Benchmark],
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        fewshot_key: str = "--num-fewshot",
    ) -> list[Questions]:
        """Read the benchmarks' questions from files.

        Args:
            benchmarks: the benchmarks to read.
            limit: number of questions that suffice of a file that exceeds the size limit.
            num_fewshot: number of few-shot examples; None is lm-eval's default for each benchmark.
            fewshot_key: the option that sets it, for messages.

        Raises:
            RequestError: lists all benchmarks without a file and all problems of files.
        """
        loaded, problems = [], []
        for benchmark in benchmarks:
            files = self.all(*(pattern + _RECORDS for pattern in benchmark.files))
            if not files:
                reason = (
                    f"it has no file of {benchmark.name}: allowed are .jsonl, .json (both also as "
                    f".gz) and .parquet with {benchmark.name} in their path"
                )
                problems.append(Problem(self.key, str(self.path), reason=reason))
                continue
            of_benchmark: list[Problem] = []
            questions: dict[str, Question] = {}
            records_of: dict[Path, Sequence[Row]] = {}
            for path in files:
                try:
                    records_of[path] = rows = self.rows(path, limit=limit)
                    questions.update(_questions(benchmark, path, rows, is_alone=len(files) == 1))
                except (TextFileError, _WrongFileError, TritterError) as error:
                    of_benchmark += _problems_of(error, self.key)
            names = tuple(str(path.relative_to(self.path)) for path in files)
            found = Questions(benchmark, questions, {}, names, len(questions))
            if not of_benchmark:
                try:
                    loaded.append(_with_examples(found, self, records_of, num_fewshot))
                except _TooFewExamplesError as error:
                    reason = f"{benchmark.name}: {error}"
                    of_benchmark.append(Problem(fewshot_key, num_fewshot, reason=reason))
                except (TextFileError, _WrongFileError, TritterError) as error:
                    of_benchmark += _problems_of(error, self.key)
            problems += of_benchmark
        raise_problems(problems)
        return loaded


def _with_examples(
    found: Questions,
    folder: TasksFolder | None,
    records_of: Mapping[Path, Sequence[Row]],
    requested: int | None,
) -> Questions:
    """Return questions with their few-shot examples.

    Args:
        found: the questions.
        folder: the folder of their files; None for records in memory.
        records_of: the records of each file.
        requested: number of examples; None is lm-eval's default.
    """
    few_shot, name = found.benchmark.few_shot, found.benchmark.name
    without = replace(found, examples=dict.fromkeys(found.questions, ()))
    if few_shot is None:
        fixed = f"{name} has a fixed prompt, so the number of few-shot examples does not apply."
        return replace(without, notes=(fixed,) if requested else ())
    number = few_shot.number if requested is None else requested
    questions, pool = found.questions, list[Question]()
    if any(pattern.endswith("txt$") for pattern in few_shot.files):
        descriptions, pool = _worked_prompts(few_shot, folder)
        questions = {
            name: replace(each, description=descriptions.get(each.part, ""))
            for name, each in questions.items()
        }
    elif number:
        pool += _pool(found.benchmark, few_shot, folder, records_of)
    if not number or (requested is None and not pool):
        note = f"No few-shot examples, lm-eval has {number}: there is no file like"
        notes = (f"{note} {_readable(few_shot)}.",) if number and folder is not None else ()
        return replace(without, questions=questions, notes=notes)
    if not pool:
        raise _TooFewExamplesError(f"there is no file with examples, like {_readable(few_shot)}")
    examples = _select_examples(few_shot, questions, pool, number, is_default=requested is None)
    return replace(found, questions=questions, examples=examples)


def _readable(few_shot: FewShot) -> str:
    """Return the pattern of the files with examples for people."""
    return re.sub(r"[\\?$]", "", few_shot.files[0].replace(".?", "_").replace(".*", "..."))


def _pool(
    benchmark: Benchmark,
    few_shot: FewShot,
    folder: TasksFolder | None,
    records_of: Mapping[Path, Sequence[Row]],
) -> Iterator[Question]:
    """Yield the examples of a benchmark, in order."""
    if few_shot.files:
        patterns = [pattern + _RECORDS for pattern in few_shot.files]
        files = folder.all(*patterns) if folder is not None else []
        records_of = {path: folder.rows(path) for path in files} if folder is not None else {}
    for path, rows in records_of.items():
        for _, example in _questions(benchmark, path, rows, is_alone=True, is_example=True):
            yield example


def _worked_prompts(
    few_shot: FewShot, folder: TasksFolder | None
) -> tuple[dict[str, str], list[Question]]:
    """Return the description of each subtask of BBH, and all examples."""
    descriptions, pool = dict[str, str](), list[Question]()
    if folder is None:
        return descriptions, pool
    for path in folder.all(*few_shot.files):
        part = path.name.partition(".")[0]
        descriptions[part], examples = _worked_prompt(_as_text(read_text(path)), part)
        pool += examples
    return descriptions, pool


def _select_examples(
    few_shot: FewShot,
    questions: Mapping[str, Question],
    pool: Sequence[Question],
    number: int,
    *,
    is_default: bool,
) -> dict[str, tuple[Question, ...]]:
    """Return the examples of each question, selected as lm-evaluation-harness 0.4.13 does.

    lm-eval has a task with its own random numbers for each part. They are drawn for one question
    after the other, so that the examples of a question depend on its position, but not on a limit.

    Args:
        few_shot: how to select them.
        questions: name → question, all of the benchmark, in order.
        pool: all examples, in order.
        number: number of examples for each question.
        is_default: less than `number` will do.
    """
    of_part: dict[str, list[Question]] = {}
    for example in pool:
        of_part.setdefault(example.part, []).append(example)
    drawing: dict[str, Random] = {}
    examples = {}
    for name, question in questions.items():
        available = of_part.get(question.part, [])
        required = number + (few_shot.drops_own and not few_shot.is_first)
        if len(available) < required and not is_default:
            where = f" of {question.part}" if question.part else ""
            raise _TooFewExamplesError(
                f"{number} examples need {required} records{where}, and there are {len(available)}"
            )
        if few_shot.is_first:
            drawn = available[:number]
        else:
            random = drawing.setdefault(question.part, Random(FewShot.SEED))
            drawn = random.sample(available, min(required, len(available)))
            if few_shot.drops_own:
                drawn = [each for each in drawn if each != question][:number]
            if len(drawn) < number and not is_default:  # the question is among them repeatedly
                drawn = random.sample([each for each in available if each != question], number)
        examples[name] = tuple(drawn)
    return examples


def _worked_prompt(text: str, part: str) -> tuple[str, list[Question]]:
    """Return the description and the examples of one of BBH's prompt files.

    Args:
        text: the content of the file.
        part: its subtask.
    """
    body = text.partition("\n-----\n")[2] or text
    description, *parts = re.split(r"(?:^|\n\n)Q: ", body.strip())
    examples = []
    for each in parts:
        question, _, answer = each.partition(_THOUGHT)
        examples.append(Question(prompt=f"Q: {question}{_THOUGHT}", worked=answer, part=part))
    return f"{description}\n\n" if description else "", examples


class _TooFewExamplesError(Exception):
    """There are fewer examples than requested; the message has no subject."""


class _WrongFileError(Exception):
    """Records of a file are invalid; `lines` has one line per problem."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


def _problems_of(error: Exception, key: str) -> list[Problem]:
    """Return the problems of a file; `key` is the option that names its folder."""
    if isinstance(error, TextFileError):
        return [Problem("", reason=line) for line in error.problems]
    lines = error.lines if isinstance(error, _WrongFileError) else [str(error).removesuffix(".")]
    return [Problem("", reason=f"{key}: {line}.") for line in lines]


def _questions(
    benchmark: Benchmark,
    path: Path,
    rows: Sequence[Row],
    *,
    is_alone: bool,
    is_example: bool = False,
) -> Iterator[tuple[str, Question]]:
    """Yield the name and the question of every record, or its few-shot example."""
    if not rows:
        raise _WrongFileError([f"{path} has no records"])
    names_found = list(rows[0]) if isinstance(rows[0], Mapping) else []
    if missing := [name for name in benchmark.fields if name not in names_found]:
        allowed = ", ".join(benchmark.fields)
        near = next((n for name in missing if (n := nearest(name, names_found, cutoff=0.7))), None)
        advice = f". Did you mean {near}?" if near else ""
        fields = f"its records have the fields {', '.join(map(brief, names_found))}"
        problem = fields if names_found else "its records are not objects"
        purpose = "has no few-shot examples" if is_example else "is not a file"
        raise _WrongFileError(
            [f"{path} {purpose} of {benchmark.name}: {problem}; required: {allowed}{advice}"]
        )
    wrong: list[str] = []
    names: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        try:
            question = _question(benchmark, row, path.name, is_example=is_example)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            wrong.append(f"{path}, record {number}: {_reason(error)}")
            continue
        if question is not None:
            part = question.part or ("" if is_alone else path.name.partition(".")[0])
            name = question.name or (f"{part}/{number}" if part else str(number))
            names[name] += 1
            yield (name if names[name] == 1 else f"{name} again {names[name]}"), question  # unique
    if wrong:
        more = len(wrong) - _MAX_PROBLEMS_OF_FILE
        shown = wrong[:_MAX_PROBLEMS_OF_FILE]
        raise _WrongFileError(
            [*shown, *([f"{path} has {more} more invalid records"] if more > 0 else [])]
        )
    if not names and not is_example:
        raise _WrongFileError([f"{path} has no records of the test split"])


def _question(benchmark: Benchmark, row: object, file: str, *, is_example: bool) -> Question | None:
    if not isinstance(row, dict):
        raise TypeError("it is not an object")
    for name, kind in benchmark.fields.items():
        if name not in row:
            raise KeyError(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in kinds):
            allowed = " or ".join(each.__name__ for each in kinds)
            raise TypeError(f"{name} = {brief(row[name])} must be of type {allowed}")
    question = ((is_example and benchmark.example) or benchmark.question)(row, file)
    if question is None:
        return None
    if len(_as_text("".join((question.prompt, *question.choices)))) > _MAX_QUESTION_CHARACTERS:
        raise ValueError(f"the question has more than {_MAX_QUESTION_CHARACTERS} characters")
    if question.choices:
        if len(question.choices) < 2:
            raise ValueError("there are fewer than two choices")
        if not 0 <= question.right < len(question.choices):
            raise ValueError(
                f"the index of the correct choice is {question.right}, but there are "
                f"{len(question.choices)} choices"
            )
    return question


def _as_text(text: str) -> str:
    """Return a text if it can be encoded, as tokenizers require."""
    text.encode()
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "it contains an unpaired surrogate"
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _records(path: Path, reading: Reading) -> Iterator[Any]:
    """Yield the records of a file."""
    kind = text_suffix(path).removesuffix(".gz")
    if kind == ".parquet":  # limited only by its decoded size
        for number, row in enumerate(parquet_records(path, count=reading.count), start=1):
            if not row:
                raise WrongRecordError(f"row {number} is not UTF-8")
            yield row
        return
    if kind == ".jsonl":
        yield from (row for _, row in reading.records(path))
        return
    whole = parse(reading.whole_text(path, max_bytes=_MAX_FILE_BYTES))
    if isinstance(whole, dict) and isinstance(whole.get(_ROWS_BELOW), list):
        whole = whole[_ROWS_BELOW]
    if not isinstance(whole, list):
        raise WrongRecordError("is not a list of records")
    yield from whole

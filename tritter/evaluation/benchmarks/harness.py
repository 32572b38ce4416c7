"""Benchmark scores from lm-evaluation-harness, for questions from files and for its own tasks."""

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from tritter.errors import RequestError, TritterError
from tritter.evaluation.benchmarks.files import Questions, questions_of
from tritter.evaluation.benchmarks.formats import Benchmark, Question, is_passed
from tritter.evaluation.code.sandbox import Sandbox
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.statistics import PairedScores

Tokenizer = Any  # of transformers
MISSING = (
    "benchmarks require lm-evaluation-harness, which is not installed: "
    "pip install 'tritter[evaluation]'"
)
_FEWSHOT_SEED = 1234  # lm-eval's default
NO_NAME = "lm-evaluation-harness has no such task; set a folder with its file, --tasks-path DIR"


@dataclass(frozen=True, slots=True)
class NullScores:
    """Accuracies of null models.

    Args:
        uniform: accuracy of random choices; None without choices.
        constant: accuracy of the most common answer; without choices, the most common one of
            each subtask.
        empty: accuracy of empty answers; None with choices.
    """

    uniform: float | None
    constant: float | None
    empty: float | None

    @property
    def chance(self) -> float:
        """The accuracy of guessing; empty answers do not count as guesses."""
        return max(self.uniform or 0.0, self.constant or 0.0)


def null_scores(
    questions: Questions, *, of: Questions | None = None, sandbox: Sandbox | None
) -> NullScores:
    """Score the null models on some questions.

    Args:
        questions: the questions to score.
        of: all questions of the benchmark, to find the most common answers.
        sandbox: runs the empty program for kind `code`; None skips it.

    Raises:
        TritterError: the sandbox can't be set up.
    """
    scored = list(questions.questions.values())
    everything = list((of or questions).questions.values())
    kind = questions.benchmark.kind
    if kind in ("choice", "context"):
        uniform = sum(1 / len(question.choices) for question in scored) / len(scored)
        answers = [("", each.choices[each.right]) for each in everything]
        return NullScores(uniform, commonest_share(answers), None)
    if kind == "code":
        if sandbox is None:
            return NullScores(None, None, None)
        passed = sum(is_passed(sandbox, question, "") for question in scored)
        return NullScores(None, None, passed / len(scored))
    constant = commonest_share([(each.part, each.answer) for each in everything])
    if kind == "word":
        return NullScores(None, constant, 0.0)
    empty = sum(questions.benchmark.is_right(question, "") for question in scored)
    return NullScores(None, constant, empty / len(scored))


def commonest_share(answers: Sequence[tuple[str, str]]) -> float:
    """Return the accuracy of giving the most common answer of each part.

    Args:
        answers: part and answer of each question.
    """
    parts: dict[str, Counter[str]] = {}
    for part, answer in answers:
        parts.setdefault(part, Counter())[answer] += 1
    return sum(max(counts.values()) for counts in parts.values()) / len(answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Options of a benchmark evaluation.

    Args:
        limit: number of questions, spread evenly; for a task from the hub, the first ones of each
            subtask.
        batch_size: requests per batch.
        sandbox: runs the programs of kind `code`.
        is_null_run: also run the empty program for the null models.
        is_shown: show lm-eval's progress bars on a terminal.
    """

    limit: int | None = None
    batch_size: int = 16
    sandbox: Sandbox | None = None
    is_null_run: bool = True
    is_shown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScores:
    """A model's scores on a benchmark.

    Args:
        name: name of the benchmark.
        metric: primary metric.
        scores: metric → scores per question.
        nulls: scores of the null models.
        notes: one sentence per limit or truncation that applied.
    """

    name: str
    metric: str
    scores: dict[str, PairedScores]
    nulls: NullScores
    notes: tuple[str, ...]

    @property
    def primary(self) -> PairedScores:
        """The scores of the primary metric."""
        return self.scores[self.metric]


def require_harness() -> None:
    """Import lm-eval, which takes seconds.

    Raises:
        RequestError: lm-eval is not installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise RequestError(f"{MISSING} ({error}).") from error


def score_benchmark(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Questions,
    harness: EvalOptions,
) -> BenchmarkScores:
    """Score a model on all questions of a benchmark.

    Args:
        model: a model of transformers, on its device; its training modes are restored.
        tokenizer: its tokenizer, from transformers.
        questions: the questions.
        harness: the options.

    Raises:
        RequestError: lm-eval is not installed, or the model's context is too short.
        TritterError: logits are not finite, or the sandbox can't be set up.
    """
    require_harness()
    length = max_length(model)
    limited = questions.limited(harness.limit)
    readable, notes = _drop_too_long(tokenizer, limited, length=length)
    if len(limited.questions) < questions.total:
        notes.append(
            f"Scored {len(limited.questions)} of {questions.total} questions, spread evenly."
        )
    sandbox = harness.sandbox if harness.is_null_run else None
    nulls = null_scores(readable, of=questions, sandbox=sandbox)
    config = task_config(readable, length=length, sandbox=harness.sandbox)
    name = readable.benchmark.name

    def tasks() -> dict[str, Any]:
        from lm_eval.api.task import ConfigurableTask

        return {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}}

    samples = run_lm_eval(model, tokenizer, tasks, harness)[name]
    notes += _notes(tokenizer, readable, length=length)
    names = [f"{name}:{each}" for each in readable.questions]
    return _convert_samples(readable.benchmark, names, samples, nulls=nulls, notes=notes)


def _convert_samples(
    benchmark: Benchmark,
    names: Sequence[str],
    samples: Sequence[dict[str, Any]],
    *,
    nulls: NullScores,
    notes: Sequence[str],
) -> BenchmarkScores:
    """Convert lm-eval's samples to scores, for each metric that all samples have."""
    assert len(samples) == len(names)
    values = {
        metric: torch.tensor([float(each[metric]) for each in samples], dtype=torch.float64)
        for metric in benchmark.metrics
        if all(metric in each for each in samples)
    }
    return BenchmarkScores(
        name=benchmark.name,
        metric=benchmark.metric,
        scores={m: paired(names, right, chance=nulls.chance) for m, right in values.items()},
        nulls=nulls,
        notes=tuple(notes),
    )


def paired(names: Sequence[str], right: Tensor, *, chance: float) -> PairedScores:
    """Return per-question accuracies, float64 [n], as paired scores."""
    ones = torch.ones(len(names), dtype=torch.int64)
    return PairedScores(
        identifiers=tuple(names),
        values=right,
        weights={"answers": ones},
        unit="accuracy",
        chance=chance,
    )


def run_lm_eval(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Callable[[], dict[str, Any]],
    harness: EvalOptions,
    *,
    limit: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run lm-eval and return its samples by task, in order.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: returns lm-eval's tasks and groups.
        harness: the options.
        limit: number of first questions of each task.

    Raises:
        TritterError: a likelihood is not finite.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    length = max_length(model)
    # lm-eval uses tensors outside its no_grad block, which inference mode does not allow
    with eval_mode(model), torch.inference_mode(False), torch.no_grad():
        # With NaN logits, all choices would tie
        first = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        if not model(input_ids=first).logits.isfinite().all():
            raise TritterError("the model's logits are not finite, so no benchmark can be scored.")
        with _quiet(is_shown=harness.is_shown):
            task_dict = tasks()
            lm = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=harness.batch_size,
                max_length=length,
            )
            results = evaluate(
                lm=lm, task_dict=task_dict, limit=limit, bootstrap_iters=0, log_samples=True
            )
    assert results is not None
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    for name, of_task in samples.items():
        of_task.sort(key=lambda sample: int(sample["doc_id"]))
        answers = [answer for each in of_task for answer in each["filtered_resps"]]
        found = [answer[0] for answer in answers if isinstance(answer, tuple | list)]
        if not all(map(math.isfinite, found)):
            raise TritterError(f"{name}: a likelihood is not finite.")
    return samples


def task_config(questions: Questions, *, length: int, sandbox: Sandbox | None) -> dict[str, Any]:
    """Return lm-eval's configuration of questions in memory.

    Args:
        questions: the questions.
        length: context length; half of it is reserved for a generated answer.
        sandbox: runs the programs of kind `code`.
    """
    import datasets

    benchmark, kind = questions.benchmark, questions.benchmark.kind
    names = list(questions.questions)

    def question(doc: dict[str, Any]) -> Question:
        return questions.questions[names[doc["number"]]]

    config: dict[str, Any] = {
        "task": benchmark.name,
        "custom_dataset": lambda **_: {
            "test": datasets.Dataset.from_dict({"number": range(len(names))})
        },
        "test_split": "test",
        "num_fewshot": 0,  # the prompt already contains examples
        "target_delimiter": " ",
        "doc_to_text": lambda doc: questions.prompt(names[doc["number"]]),
        "metric_list": [
            {
                "metric": "acc" if metric == "pass@1" else metric,
                "aggregation": "mean",
                "higher_is_better": True,
            }
            for metric in benchmark.metrics
        ],
    }
    if kind == "choice":
        return config | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda doc: list(question(doc).choices),
            "doc_to_target": lambda doc: question(doc).right,
        }
    if kind == "context":
        return config | {
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: question(doc).right,
            "doc_to_choice": lambda doc: list(question(doc).choices),
            "doc_to_target": lambda doc: question(doc).prompt,
        }
    if kind == "word":
        return config | {
            "output_type": "loglikelihood",
            "target_delimiter": "",
            "doc_to_target": lambda doc: f" {question(doc).answer}",
        }

    def is_right(doc: dict[str, Any], text: str) -> bool:
        if kind != "code":
            return benchmark.is_right(question(doc), text)
        assert sandbox is not None
        return is_passed(sandbox, question(doc), text)

    return config | {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: question(doc).answer,
        "process_results": lambda doc, texts: {benchmark.metric: float(is_right(doc, texts[0]))},
        "generation_kwargs": {
            "until": list(benchmark.until),
            "max_gen_toks": benchmark.answer_tokens(length),
            "do_sample": False,
        },
    }


def _drop_too_long(
    tokenizer: Tokenizer, questions: Questions, *, length: int
) -> tuple[Questions, list[str]]:
    """Drop questions with a choice that exceeds the context length.

    Raises:
        RequestError: no question remains.
    """
    if questions.benchmark.kind in ("answer", "code"):
        return questions, []
    kept = [
        name
        for name, question in questions.questions.items()
        if max(_num_tokens(tokenizer, text) for text in question.choices or (question.answer,))
        < length
    ]
    number = len(questions.questions) - len(kept)
    if not kept:
        raise RequestError(
            f"{questions.benchmark.name}: the context length of {length} tokens is too short for "
            "any choice."
        )
    if not number:
        return questions, []
    note = f"Skipped {number} of {len(questions.questions)} questions: one of their choices exceeds"
    return questions.only(kept), [f"{note} the context length of {length} tokens."]


def sequence_lengths(tokenizer: Tokenizer, questions: Questions, *, length: int) -> list[int]:
    """Return the number of tokens of each sequence, assuming answers of maximum length.

    Args:
        tokenizer: the tokenizer.
        questions: the questions.
        length: context length.
    """
    benchmark = questions.benchmark
    return [
        min(length, _num_tokens(tokenizer, text) + benchmark.answer_tokens(length))
        for name, question in questions.questions.items()
        for text in _check_prompt(questions.prompt(name), question, benchmark)
    ]


def _check_prompt(prompt: str, question: Question, benchmark: Benchmark) -> list[str]:
    """Return the texts that a model reads for a question."""
    if benchmark.kind == "context":
        return [f"{choice} {prompt}" for choice in question.choices]
    if benchmark.kind == "word":
        return [f"{prompt} {question.answer}"]
    return [f"{prompt} {choice}" for choice in question.choices] or [prompt]


def _notes(tokenizer: Tokenizer, questions: Questions, *, length: int) -> Iterator[str]:
    """Yield notes on shortened answers and truncated prompts."""
    benchmark, names = questions.benchmark, list(questions.questions)
    answer_length = benchmark.answer_tokens(length)
    prompt_length = length - answer_length
    if answer_length and answer_length < benchmark.max_new_tokens:
        yield (
            f"Answers are limited to {answer_length} instead of {benchmark.max_new_tokens} tokens: "
            f"the context length is {length}."
        )
    texts = [_check_prompt(questions.prompt(n), questions.questions[n], benchmark) for n in names]
    cut = sum(_num_tokens(tokenizer, max(each, key=len)) > prompt_length for each in texts)
    if cut:
        yield (
            f"Truncated {cut} of {len(names)} prompts on the left: they exceed {prompt_length} "
            "tokens."
        )


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def max_length(model: nn.Module) -> int:
    """Return a model's context length.

    Raises:
        RequestError: the context is too short for any question.
    """
    config = model.config
    length = getattr(config, "max_position_embeddings", None) or 2048
    if length < 16:
        raise RequestError(
            f"the model's context length of {length} tokens is too short for any benchmark."
        )
    return int(length)


@contextmanager
def _quiet(*, is_shown: bool) -> Iterator[None]:
    """Silence lm-eval's output, and its progress bars without a terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            if not (is_shown and sys.stderr.isatty()):
                stack.enter_context(redirect_stderr(StringIO()))
            stack.enter_context(redirect_stdout(StringIO()))
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def score_from_hub(
    model: nn.Module,
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    harness: EvalOptions,
    *,
    manager: Any = None,
) -> BenchmarkScores:
    """Score a model on lm-eval's own task; programs run only in the sandbox.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        benchmark: the benchmark.
        harness: the options.
        manager: lm-eval's task manager; defaults to a new one.

    Raises:
        RequestError: the hub or lm-eval does not provide the benchmark.
        TritterError: as `score_benchmark`.
    """
    require_harness()
    if not benchmark.hub:
        raise RequestError(f"--tasks = {benchmark.name}: {NO_NAME}.")
    if benchmark.kind == "code":
        return score_benchmark(model, tokenizer, _rows_from_hub(benchmark), harness)
    found = run_lm_eval(
        model,
        tokenizer,
        lambda: _tasks(benchmark, manager),
        harness,
        limit=harness.limit,
    )
    samples = [
        (task, sample)
        for task, of_task in found.items()
        for sample in of_task
        if sample["filter"] in (benchmark.hub_filter or sample["filter"], "none")
    ]
    if benchmark.kind in ("choice", "context"):
        chances = [1 / len(sample["arguments"]) for _, sample in samples]
        nulls = NullScores(sum(chances) / len(chances), None, None)
    else:
        constant = commonest_share([(task, str(sample["target"])) for task, sample in samples])
        nulls = NullScores(None, constant, 0.0 if benchmark.kind == "word" else None)
    names = [f"{benchmark.name}:{task}/{sample['doc_id']}" for task, sample in samples]
    limited = [f"Scored at most {harness.limit} questions of each subtask."]
    notes = limited if harness.limit else []
    return _convert_samples(
        benchmark, names, [each for _, each in samples], nulls=nulls, notes=notes
    )


def _tasks(benchmark: Benchmark, manager: Any) -> dict[str, Any]:
    """Return lm-eval's tasks of a benchmark, configured as in lm-eval's own evaluation."""
    from lm_eval.tasks import TaskManager

    try:
        loaded: dict[str, Any] = (manager or TaskManager()).load([benchmark.hub])
    except (OSError, ValueError) as error:  # offline, missing, or invalid
        raise _unavailable(benchmark, error) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _rows_from_hub(benchmark: Benchmark) -> Questions:
    """Return the questions of a data set from the hub."""
    import datasets

    name, _, split = benchmark.hub.partition(" ")
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise _unavailable(benchmark, error) from error
    return questions_of(benchmark, list(rows), origin=name)


def _unavailable(benchmark: Benchmark, error: Exception) -> RequestError:
    message = " ".join(str(error).split())[:300]
    return RequestError(
        f"--tasks = {benchmark.name}: can't load {benchmark.hub} from the hub "
        f"({type(error).__name__}: {message}); set a folder with its files, --tasks-path DIR."
    )

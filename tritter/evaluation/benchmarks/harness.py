"""Questions put to a model by lm-evaluation-harness: those of files, and its own tasks."""

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
from tritter.evaluation.inference import evaluating
from tritter.evaluation.statistics import PairedScores

Tokenizer = Any  # of transformers
MISSING = (
    "lm-evaluation-harness is not installed, which scores benchmarks: "
    "pip install 'tritter[evaluation]'"
)
_FEWSHOT_SEED = 1234  # lm-eval's own default
NO_NAME = "lm-evaluation-harness has no task for it; name a folder with its file, --tasks-path DIR"


@dataclass(frozen=True, slots=True)
class NullScores:
    """Shares of right answers.

    Args:
        uniform: of one who picks among the choices at random; None where there are none.
        constant: of one who always gives the commonest answer; of a benchmark in words the
            commonest of the part that a question is of, as each subtask has its own answers.
        empty: of one who answers nothing; None where there are choices.
    """

    uniform: float | None
    constant: float | None
    empty: float | None

    @property
    def chance(self) -> float:
        """What guessing reaches; who answers nothing guesses nothing."""
        return max(self.uniform or 0.0, self.constant or 0.0)


def null_scores(
    questions: Questions, *, of: Questions | None = None, sandbox: Sandbox | None
) -> NullScores:
    """Score the null models on the questions as they are asked.

    Args:
        of: all questions, of which these are some; what is common among them is known from these.
        sandbox: where programs are run; the empty answer to a question of `code` is one too.
            None: it is not run.

    Raises:
        TritterError: the sandbox can't be set up.
    """
    asked = list(questions.questions.values())
    everything = list((of or questions).questions.values())
    kind = questions.benchmark.kind
    if kind in ("choice", "context"):
        uniform = sum(1 / len(question.choices) for question in asked) / len(asked)
        answers = [("", each.choices[each.right]) for each in everything]
        return NullScores(uniform, commonest_share(answers), None)
    if kind == "code":
        if sandbox is None:
            return NullScores(None, None, None)
        passed = sum(is_passed(sandbox, question, "") for question in asked)
        return NullScores(None, None, passed / len(asked))
    constant = commonest_share([(each.part, each.answer) for each in everything])
    if kind == "word":
        return NullScores(None, constant, 0.0)
    empty = sum(questions.benchmark.is_right(question, "") for question in asked)
    return NullScores(None, constant, empty / len(asked))


def commonest_share(answers: Sequence[tuple[str, str]]) -> float:
    """Return the share of the commonest answer, part by part.

    Args:
        answers: the part and the answer of each question.
    """
    parts: dict[str, Counter[str]] = {}
    for part, answer in answers:
        parts.setdefault(part, Counter())[answer] += 1
    return sum(max(counts.values()) for counts in parts.values()) / len(answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a model is asked.

    Args:
        limit: ask so many, spread over all; of a benchmark from the hub the first of each subtask.
        batch_size: requests at a time.
        sandbox: where programs are run; needed for those of kind `code`.
        is_null_run: the empty program is run as well, for the null models.
        is_shown: lm-eval's progress bars are, on a terminal.
    """

    limit: int | None = None
    batch_size: int = 16
    sandbox: Sandbox | None = None
    is_null_run: bool = True
    is_shown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScores:
    """What a model scored.

    Args:
        name: of the benchmark.
        metric: the one that it is known by.
        scores: metric → right answers by question.
        nulls: what models without knowledge score.
        notes: what was cut or limited, a sentence each.
    """

    name: str
    metric: str
    scores: dict[str, PairedScores]
    nulls: NullScores
    notes: tuple[str, ...]

    @property
    def known_by(self) -> PairedScores:
        """The scores by the metric that the benchmark is known by."""
        return self.scores[self.metric]


def require_harness() -> None:
    """Import lm-eval, which takes seconds.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise RequestError(f"{MISSING} ({error}).") from error


def score_benchmark(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Questions,
    asking: Asking,
) -> BenchmarkScores:
    """Ask a model all questions of a benchmark.

    Args:
        model: of transformers, on its device; its modes are set back.

    Raises:
        RequestError: lm-eval is not installed, or the model reads too little.
        TritterError: the model computes what is not finite, or the sandbox can't be set up.
    """
    require_harness()
    length = max_length(model)
    limited = questions.limited(asking.limit)
    asked, notes = _readable(tokenizer, limited, length=length)
    if len(limited.questions) < questions.total:
        notes.append(
            f"{len(limited.questions)} of {questions.total} questions were asked, spread evenly."
        )
    sandbox = asking.sandbox if asking.is_null_run else None
    nulls = null_scores(asked, of=questions, sandbox=sandbox)
    config = task_config(asked, length=length, sandbox=asking.sandbox)
    name = asked.benchmark.name

    def tasks() -> dict[str, Any]:
        from lm_eval.api.task import ConfigurableTask

        return {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}}

    samples = evaluated(model, tokenizer, tasks, asking)[name]
    notes += _notes(tokenizer, asked, length=length)
    names = [f"{name}:{each}" for each in asked.questions]
    return _scored(asked.benchmark, names, samples, nulls=nulls, notes=notes)


def _scored(
    benchmark: Benchmark,
    names: Sequence[str],
    samples: Sequence[dict[str, Any]],
    *,
    nulls: NullScores,
    notes: Sequence[str],
) -> BenchmarkScores:
    """Return lm-eval's records of questions as scores, by each metric that all of them have."""
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
    """Return right answers, float64 [n], as scores that can be compared question by question."""
    ones = torch.ones(len(names), dtype=torch.int64)
    return PairedScores(
        identifiers=tuple(names),
        values=right,
        weights={"answers": ones},
        unit="accuracy",
        chance=chance,
    )


def evaluated(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Callable[[], dict[str, Any]],
    asking: Asking,
    *,
    limit: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return lm-eval's records of all questions, in their order, by task.

    Args:
        tasks: gives lm-eval's tasks and groups.
        limit: lm-eval asks so many of each task, the first ones.

    Raises:
        TritterError: a likelihood is not finite.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    length = max_length(model)
    # lm-eval looks at tensors outside of its own no_grad, so inference mode would not do
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        # Else every choice would be as likely as any other, and not a number
        first = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        if not model(input_ids=first).logits.isfinite().all():
            raise TritterError("the model's logits are not finite, so no benchmark can be scored.")
        with _quiet(is_shown=asking.is_shown):
            task_dict = tasks()
            lm = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=asking.batch_size,
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
            raise TritterError(f"{name}: the model gives a likelihood that is not finite.")
    return samples


def task_config(questions: Questions, *, length: int, sandbox: Sandbox | None) -> dict[str, Any]:
    """Return lm-eval's configuration of the questions, in memory: nothing is fetched or written.

    Args:
        length: tokens that the model reads; half of them are left to a generated answer.
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
        "num_fewshot": 0,  # examples stand in the prompt
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


def _readable(
    tokenizer: Tokenizer, questions: Questions, *, length: int
) -> tuple[Questions, list[str]]:
    """Leave out the questions of which a choice alone is more than the model reads.

    Raises:
        RequestError: none is left.
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
            f"{questions.benchmark.name}: the model reads {length} tokens, too few for any choice."
        )
    if not number:
        return questions, []
    note = f"{number} of {len(questions.questions)} questions were left out: one of their choices"
    return questions.only(kept), [f"{note} alone is longer than the {length} tokens that are read."]


def sequence_lengths(tokenizer: Tokenizer, questions: Questions, *, length: int) -> list[int]:
    """Return how many tokens each sequence has that is read, answers as long as they may be.

    Args:
        length: tokens that the model reads.
    """
    benchmark = questions.benchmark
    return [
        min(length, _num_tokens(tokenizer, text) + benchmark.answer_tokens(length))
        for name, question in questions.questions.items()
        for text in _read(questions.prompt(name), question, benchmark)
    ]


def _read(prompt: str, question: Question, benchmark: Benchmark) -> list[str]:
    """Return the texts that are put to a model for a question."""
    if benchmark.kind == "context":
        return [f"{choice} {prompt}" for choice in question.choices]
    if benchmark.kind == "word":
        return [f"{prompt} {question.answer}"]
    return [f"{prompt} {choice}" for choice in question.choices] or [prompt]


def _notes(tokenizer: Tokenizer, questions: Questions, *, length: int) -> Iterator[str]:
    """Say what was limited, and what of the prompts did not fit."""
    benchmark, asked = questions.benchmark, list(questions.questions)
    answered = benchmark.answer_tokens(length)
    room = length - answered
    if answered and answered < benchmark.max_new_tokens:
        yield (
            f"Answers end after {answered} tokens in place of {benchmark.max_new_tokens}: "
            f"the model reads {length}."
        )
    texts = [_read(questions.prompt(n), questions.questions[n], benchmark) for n in asked]
    cut = sum(_num_tokens(tokenizer, max(each, key=len)) > room for each in texts)
    if cut:
        yield (
            f"{cut} of {len(asked)} prompts are longer than the {room} tokens that the model reads "
            "of one and lost their beginning."
        )


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def max_length(model: nn.Module) -> int:
    """Return how many tokens a model reads.

    Raises:
        RequestError: too few for any question.
    """
    config = model.config
    length = getattr(config, "max_position_embeddings", None) or 2048
    if length < 16:
        raise RequestError(f"the model reads {length} tokens, too few for any benchmark.")
    return int(length)


@contextmanager
def _quiet(*, is_shown: bool) -> Iterator[None]:
    """Keep lm-eval's notices off the screen, and its bars where nobody watches."""
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
    asking: Asking,
    *,
    manager: Any = None,
) -> BenchmarkScores:
    """Ask a model the questions of lm-eval's own task; programs are run in the sandbox alone.

    Args:
        manager: of lm-eval's tasks; its own by default.

    Raises:
        RequestError: the hub or lm-eval does not give it.
        TritterError: as `score_benchmark`.
    """
    require_harness()
    if not benchmark.hub:
        raise RequestError(f"--tasks = {benchmark.name}: {NO_NAME}.")
    if benchmark.kind == "code":
        return score_benchmark(model, tokenizer, _rows_from_hub(benchmark), asking)
    found = evaluated(
        model, tokenizer, lambda: _tasks(benchmark, manager), asking, limit=asking.limit
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
    limited = [f"At most {asking.limit} questions of each subtask were asked."]
    notes = limited if asking.limit else []
    return _scored(benchmark, names, [each for _, each in samples], nulls=nulls, notes=notes)


def _tasks(benchmark: Benchmark, manager: Any) -> dict[str, Any]:
    """Return lm-eval's own tasks of a benchmark, as its own evaluation would set them."""
    from lm_eval.tasks import TaskManager

    try:
        loaded: dict[str, Any] = (manager or TaskManager()).load([benchmark.hub])
    except (OSError, ValueError) as error:  # offline, not there, of another form
        raise _not_given(benchmark, error) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _rows_from_hub(benchmark: Benchmark) -> Questions:
    """Return the questions of a data set of the hub, in the format of its files."""
    import datasets

    name, _, split = benchmark.hub.partition(" ")
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise _not_given(benchmark, error) from error
    return questions_of(benchmark, list(rows), origin=name)


def _not_given(benchmark: Benchmark, error: Exception) -> RequestError:
    said = " ".join(str(error).split())[:300]
    return RequestError(
        f"--tasks = {benchmark.name}: the hub does not give {benchmark.hub} "
        f"({type(error).__name__}: {said}); name a folder with its files, --tasks-path DIR."
    )

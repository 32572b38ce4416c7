"""Benchmark scores from lm-evaluation-harness, for questions from files and for its own tasks."""

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tritter.core.models import model_of
from tritter.data.packing import reading_whole
from tritter.errors import RequestError, TritterError, refused
from tritter.evaluation.benchmarks.files import Questions
from tritter.evaluation.benchmarks.formats import Benchmark, FewShot, Question
from tritter.evaluation.code.sandbox import Sandbox
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.losses import batch_that_fits, vocab_size_of
from tritter.evaluation.statistics import PairedScores

Tokenizer = Any  # of transformers


@dataclass(frozen=True, slots=True)
class _NullScores:
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


def _null_scores(
    questions: Questions, *, of: Questions | None = None, sandbox: Sandbox | None
) -> _NullScores:
    """Score the null models on some questions.

    Args:
        questions: the questions to score.
        of: all questions of the benchmark, to find the most common answers.
        sandbox: runs the empty program for kind `code`; None skips it.
    """
    scored = list(questions.questions.values())
    everything = list((of or questions).questions.values())
    kind = questions.benchmark.kind
    if kind in ("choice", "context"):
        uniform = sum(1 / len(question.choices) for question in scored) / len(scored)
        answers = [("", each.choices[each.right]) for each in everything]
        return _NullScores(uniform, _commonest_share(answers), None)
    if kind == "code":
        if sandbox is None:
            return _NullScores(None, None, None)
        passed = sum(question.passes("", sandbox) for question in scored)
        return _NullScores(None, None, passed / len(scored))
    constant = _commonest_share([(each.part, each.answer) for each in everything])
    if kind == "word":
        return _NullScores(None, constant, 0.0)
    empty = sum(questions.benchmark.is_right(question, "") for question in scored)
    return _NullScores(None, constant, empty / len(scored))


def _commonest_share(answers: Sequence[tuple[str, str]]) -> float:
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
        is_chat: render prompts with the tokenizer's chat template, few-shot examples as turns.
        num_fewshot: number of few-shot examples of a task from the hub; None is the task's own.
            Questions from files have theirs.
        keys: the options that set the tasks and the folder of their files, for messages.
    """

    limit: int | None = None
    batch_size: int = 16
    sandbox: Sandbox | None = None
    is_null_run: bool = True
    is_shown: bool = False
    is_chat: bool = False
    num_fewshot: int | None = None
    keys: tuple[str, str] = ("--tasks", "--tasks-path DIR")

    def score(
        self, model: nn.Module, tokenizer: Tokenizer, questions: Questions
    ) -> "BenchmarkScores":
        """Score a model on all questions of a benchmark.

        Args:
            model: a model of transformers, on its device; its training modes are restored.
            tokenizer: its tokenizer, from transformers.
            questions: the questions.
        """
        require_harness()
        length = _max_length(model)
        limited = questions.limited(self.limit)
        readable, notes = _drop_too_long(tokenizer, limited, length=length)
        notes = [*questions.notes, *notes]
        if len(limited.questions) < questions.total:
            notes.append(
                f"Scored {len(limited.questions)} of {questions.total} questions, spread evenly."
            )
        if self.is_chat and readable.benchmark.kind == "code":
            notes.append("An answer in Markdown is no program; chat models often write some.")
        sandbox = self.sandbox if self.is_null_run else None
        nulls = _null_scores(readable, of=questions, sandbox=sandbox)
        config = _task_config(readable, length=length, sandbox=self.sandbox)
        name = readable.benchmark.name

        def tasks() -> dict[str, Any]:
            from lm_eval.api.task import ConfigurableTask

            return {"tasks": {name: ConfigurableTask(config=config)}, "groups": {}}

        samples = _run_lm_eval(model, tokenizer, tasks, self)[name]
        answers = readable.benchmark.answer_tokens(length)
        if 0 < answers < readable.benchmark.max_new_tokens:
            notes.append(
                f"Answers are limited to {answers} instead of {readable.benchmark.max_new_tokens} "
                f"tokens: the context length is {length}."
            )
        notes += _notes(tokenizer, samples, length=length)
        return BenchmarkScores(
            name=name,
            metric=readable.benchmark.metric,
            scores=_paired_scores(
                readable.benchmark,
                [f"{name}:{each}" for each in readable.questions],
                samples,
                chance=nulls.chance,
            ),
            nulls=nulls,
            num_fewshot=readable.num_fewshot,
            is_chat=self.is_chat,
            notes=tuple(notes),
        )

    def score_from_hub(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        benchmark: Benchmark,
        *,
        manager: Any = None,
    ) -> "BenchmarkScores":
        """Score a model on lm-eval's own task; programs run only in the sandbox.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            benchmark: the benchmark.
            manager: lm-eval's task manager; defaults to a new one.
        """
        require_harness()
        tasks_key, path_key = self.keys
        if not benchmark.hub:
            reason = "lm-evaluation-harness has no such task; set a folder with its file"
            raise refused(tasks_key, benchmark.name, f"{reason}, {path_key}")
        if benchmark.kind == "code":
            questions = _rows_from_hub(benchmark, self)
            return self.score(model, tokenizer, questions)
        with _quiet(is_shown=self.is_shown):
            loaded = _tasks(benchmark, manager, self)
        found = _run_lm_eval(model, tokenizer, lambda: loaded, self, limit=self.limit)
        numbers = [task.get_config("num_fewshot") or 0 for task in loaded["tasks"].values()]
        samples = [
            (task, sample)
            for task, of_task in found.items()
            for sample in of_task
            if sample["filter"] in (benchmark.hub_filter or sample["filter"], "none")
        ]
        if benchmark.kind in ("choice", "context"):
            chances = [1 / len(sample["arguments"]) for _, sample in samples]
            nulls = _NullScores(sum(chances) / len(chances), None, None)
        else:
            constant = _commonest_share([(task, str(sample["target"])) for task, sample in samples])
            nulls = _NullScores(None, constant, 0.0 if benchmark.kind == "word" else None)
        names = [f"{benchmark.name}:{task}/{sample['doc_id']}" for task, sample in samples]
        notes = []
        if self.limit:
            notes.append(f"Scored at most {self.limit} questions of each subtask.")
        if self.num_fewshot and not max(numbers):
            notes.append("lm-eval fixes its number of few-shot examples at 0.")
        of_question = [each for _, each in samples]
        notes += _notes(tokenizer, of_question, length=_max_length(model))
        return BenchmarkScores(
            name=benchmark.name,
            metric=benchmark.metric,
            scores=_paired_scores(benchmark, names, of_question, chance=nulls.chance),
            nulls=nulls,
            num_fewshot=max(numbers),
            is_chat=self.is_chat,
            notes=tuple(notes),
        )

    def sequence_lengths(
        self, tokenizer: Tokenizer, questions: Questions, *, length: int
    ) -> list[int]:
        """Return the number of tokens of each sequence, assuming answers of maximum length.

        Args:
            tokenizer: the tokenizer.
            questions: the questions.
            length: context length.
        """
        answer_tokens = questions.benchmark.answer_tokens(length)
        return [
            min(length, _num_tokens(tokenizer, text) + answer_tokens)
            for texts in _rendered_requests(
                tokenizer, questions, length=length, is_chat=self.is_chat
            )
            for text in texts
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkScores:
    """A model's scores on a benchmark.

    Args:
        name: name of the benchmark.
        metric: primary metric.
        scores: metric → scores per question.
        nulls: scores of the null models.
        num_fewshot: number of few-shot examples before each question; the most of all subtasks.
        is_chat: whether prompts were rendered with the chat template.
        notes: one sentence per limit or truncation that applied.
    """

    name: str
    metric: str
    scores: dict[str, PairedScores]
    nulls: _NullScores
    num_fewshot: int
    is_chat: bool
    notes: tuple[str, ...]

    @property
    def primary(self) -> PairedScores:
        """The scores of the primary metric."""
        return self.scores[self.metric]


def require_harness() -> None:
    """Import lm-eval, which takes seconds."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        reason = "benchmarks require lm-evaluation-harness, which is not installed: pip install"
        raise RequestError(f"{reason} 'tritter[evaluation]' ({error}).") from error


def _paired_scores(
    benchmark: Benchmark, names: Sequence[str], samples: Sequence[dict[str, Any]], *, chance: float
) -> dict[str, PairedScores]:
    """Return metric → scores of lm-eval's samples, for each metric that all samples have."""
    assert len(samples) == len(names)
    values = {
        metric: torch.tensor([float(each[metric]) for each in samples], dtype=torch.float64)
        for metric in benchmark.metrics
        if all(metric in each for each in samples)
    }
    return {
        metric: PairedScores.of_answers(names, right, chance) for metric, right in values.items()
    }


def _run_lm_eval(
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
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    length = _max_length(model)
    # lm-eval uses tensors outside its no_grad block, which inference mode does not allow
    with eval_mode(model), reading_whole(model), torch.inference_mode(False), torch.no_grad():
        # With NaN logits, all choices would tie
        first = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        if not model(input_ids=first).logits.isfinite().all():
            raise TritterError("the model's logits are not finite, so no benchmark can be scored.")
        with _quiet(is_shown=harness.is_shown):
            task_dict = tasks()
            with _tied(model):
                lm = HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=harness.batch_size,
                    max_length=length,
                    softmax_dtype="float32",  # sums of bfloat16 tie or swap choices
                )
            lm._loglikelihood_tokens = partial(_in_batches_that_fit, lm)
            results = evaluate(
                lm=lm,
                task_dict=task_dict,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=harness.is_chat,
                fewshot_as_multiturn=harness.is_chat,
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


@contextmanager
def _tied(model: nn.Module) -> Iterator[None]:
    """Keep lm-eval from tying weights again: those of layers with adapters cannot be set."""
    vars(model)["tie_weights"] = lambda: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


def _task_config(questions: Questions, *, length: int, sandbox: Sandbox | None) -> dict[str, Any]:
    """Return lm-eval's configuration of questions in memory.

    Args:
        questions: the questions.
        length: context length; half of it is reserved for a generated answer.
        sandbox: runs the programs of kind `code`.
    """
    import datasets
    from lm_eval.api.samplers import ContextSampler

    benchmark, kind = questions.benchmark, questions.benchmark.kind
    names = list(questions.questions)

    def question(doc: Any) -> Question:
        """Return the question of a row, or an example itself."""
        return doc if isinstance(doc, Question) else questions.questions[names[doc["number"]]]

    class Selected(ContextSampler):
        """Returns the examples of a question, which are already selected."""

        def sample(self, n: int, eval_doc: Any = None, **_: Any) -> Sequence[Question]:
            return questions.examples[names[eval_doc["number"]]]

    rows = {
        "number": range(len(names)),
        "description": [each.description for each in questions.questions.values()],
    }
    metrics = ["acc" if metric == "pass@1" else metric for metric in benchmark.metrics]
    config: dict[str, Any] = {
        "task": benchmark.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict(rows)},
        "test_split": "test",
        "fewshot_split": "test",  # as the test split: so the sampler gets the question
        "fewshot_config": {"sampler": Selected},
        "num_fewshot": questions.num_fewshot,
        "target_delimiter": benchmark.few_shot.delimiter if benchmark.few_shot else " ",
        "description": "description",  # the column
        "doc_to_text": lambda doc: question(doc).prompt,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
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
            "doc_to_target": lambda doc: f" {question(doc).answer}",
        }

    def is_right(doc: dict[str, Any], text: str) -> bool:
        if kind != "code":
            return benchmark.is_right(question(doc), text)
        assert sandbox is not None
        return question(doc).passes(text, sandbox)

    return config | {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: question(doc).worked or question(doc).answer,
        "process_results": lambda doc, texts: {benchmark.metric: float(is_right(doc, texts[0]))},
        "generation_kwargs": {
            "until": list(benchmark.until),
            "max_gen_toks": benchmark.answer_tokens(length),
            "do_sample": False,
        },
    }


def _in_batches_that_fit(
    lm: Any, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
) -> list[tuple[float, bool]]:
    """Score prompts with answers as lm-eval does, in batches that `batch_that_fits` allows."""
    longest = max((len(prompt) + len(answer) for _, prompt, answer in requests), default=1)
    whole = lm.batch_size_per_gpu
    rows = batch_that_fits(whole, min(longest, lm.max_length), vocab_size_of(lm.model))
    lm.batch_size_per_gpu = rows
    try:
        scores: list[tuple[float, bool]] = type(lm)._loglikelihood_tokens(lm, requests, **options)
    finally:
        lm.batch_size_per_gpu = whole
    return scores


def _drop_too_long(
    tokenizer: Tokenizer, questions: Questions, *, length: int
) -> tuple[Questions, list[str]]:
    """Drop questions with a choice that exceeds the context length."""
    if questions.benchmark.kind in ("answer", "code"):
        return questions, []
    kept = [
        name
        for name, question in questions.questions.items()
        if max(
            len(tokenizer.encode(text, add_special_tokens=False))
            for text in question.choices or (question.answer,)
        )
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


def _rendered_requests(
    tokenizer: Tokenizer, questions: Questions, *, length: int, is_chat: bool
) -> list[list[str]]:
    """Return the texts that a model reads for each question: prompts, with choices if any."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    of_template: Any = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    with _quiet(is_shown=False):
        task = ConfigurableTask(config=_task_config(questions, length=length, sandbox=None))
        task.build_all_requests(
            apply_chat_template=is_chat,
            fewshot_as_multiturn=is_chat,
            chat_template=partial(HFLM.apply_chat_template, of_template) if is_chat else None,
        )
    texts: list[list[str]] = [[] for _ in questions.questions]
    for request in task.instances:
        texts[request.doc["number"]].append(_text_of(request.args))
    return texts


def _text_of(arguments: Sequence[Any]) -> str:
    """Return the text that a model reads for a request: a prompt with a continuation, if any."""
    prompt, continuation = arguments
    return f"{prompt}{continuation}" if isinstance(continuation, str) else str(prompt)


def _notes(
    tokenizer: Tokenizer, samples: Sequence[dict[str, Any]], *, length: int
) -> Iterator[str]:
    """Yield a note on truncated prompts."""
    limits = {}  # number of tokens that the model reads of the longest request of each sample
    for number, sample in enumerate(samples):
        arguments = max(sample["arguments"], key=lambda each: len(_text_of(each)))
        is_answer = not isinstance(arguments[1], str)
        # The last token of a choice is predicted, but not read
        limit = length - arguments[1].get("max_gen_toks", 256) if is_answer else length + 1
        if _num_tokens(tokenizer, _text_of(arguments)) > limit:
            limits[number] = limit
    if limits:
        yield (
            f"Truncated {len(limits)} of {len(samples)} prompts on the left: they exceed "
            f"{min(limits.values())} tokens."
        )


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Return the number of tokens of a prompt, with those that lm-eval adds."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    is_begun = first is not None and text.startswith(tokenizer.decode(first))
    return len(tokenizer.encode(text, add_special_tokens=not is_begun))


def _max_length(model: nn.Module) -> int:
    """Return a model's context length."""
    length = model_of(model).position_limit or 2048
    if length < 16:
        raise RequestError(
            f"the model's context length of {length} tokens is too short for any benchmark."
        )
    return length


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


def _tasks(benchmark: Benchmark, manager: Any, harness: EvalOptions) -> dict[str, Any]:
    """Return lm-eval's tasks of a benchmark, configured as in lm-eval's own evaluation."""
    from lm_eval.tasks import TaskManager

    try:
        loaded: dict[str, Any] = (manager or TaskManager()).load([benchmark.hub])
    except (OSError, ValueError) as error:  # offline, missing, or invalid
        raise _unavailable(benchmark, error, harness.keys) from error
    for task in loaded["tasks"].values():
        default, num_fewshot = task.get_config("num_fewshot"), harness.num_fewshot
        if default is None or (num_fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=FewShot.SEED)
    return loaded


def _rows_from_hub(benchmark: Benchmark, harness: EvalOptions) -> Questions:
    """Return the questions of a data set from the hub."""
    import datasets

    name, _, split = benchmark.hub.partition(" ")
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise _unavailable(benchmark, error, harness.keys) from error
    return Questions.of_rows(benchmark, list(rows), origin=name, num_fewshot=harness.num_fewshot)


def _unavailable(benchmark: Benchmark, error: Exception, keys: tuple[str, str]) -> RequestError:
    message = " ".join(str(error).split())[:300]
    reason = f"can't load {benchmark.hub} from the hub ({type(error).__name__}: {message})"
    return refused(keys[0], benchmark.name, f"{reason}; set a folder with its files, {keys[1]}")

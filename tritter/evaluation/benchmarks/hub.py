"""Benchmarks from the hub: lm-evaluation-harness's own tasks, by its own names."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tritter.errors import RequestError
from tritter.evaluation.benchmarks.files import Questions, questions_of
from tritter.evaluation.benchmarks.harness import (
    Asking,
    BenchmarkScores,
    Tokenizer,
    evaluated,
    paired,
    require_harness,
    score_benchmark,
)
from tritter.evaluation.benchmarks.nulls import NullScores, commonest_share
from tritter.evaluation.benchmarks.records import Benchmark

_FEWSHOT_SEED = 1234  # lm-eval's own default
NO_NAME = "lm-evaluation-harness has no task for it; name a folder with its file, --tasks-path DIR"


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
    nulls = _nulls(benchmark, samples)
    names = [f"{benchmark.name}:{task}/{sample['doc_id']}" for task, sample in samples]
    limited = f"At most {asking.limit} questions of each subtask were asked."
    return BenchmarkScores(
        name=benchmark.name,
        metric=benchmark.metric,
        scores={
            metric: paired(names, _values(metric, samples), chance=nulls.chance)
            for metric in benchmark.metrics
            if all(metric in sample for _, sample in samples)
        },
        nulls=nulls,
        notes=(limited,) if asking.limit else (),
    )


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


def _nulls(benchmark: Benchmark, samples: Sequence[tuple[str, Any]]) -> NullScores:
    if benchmark.kind in ("choice", "context"):
        chances = [1 / len(sample["arguments"]) for _, sample in samples]
        return NullScores(sum(chances) / len(chances), None, None)
    constant = commonest_share([(task, str(sample["target"])) for task, sample in samples])
    return NullScores(None, constant, 0.0 if benchmark.kind == "word" else None)


def _values(metric: str, samples: Sequence[tuple[str, Any]]) -> torch.Tensor:
    return torch.tensor([float(sample[metric]) for _, sample in samples], dtype=torch.float64)

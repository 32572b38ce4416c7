"""`tritter evaluate`: a checkpoint's losses on text, and its scores on benchmarks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritter.checkpoint import read_lineage
from tritter.cli.output import new_console, new_table, print_json, progress_bars, shown_path
from tritter.cli.report_file import ReportFile, mark
from tritter.cli.request import damage_is_a_wrong_request
from tritter.data.benchmark_names import code_problems
from tritter.data.tokens import read_tokenizer
from tritter.errors import RequestError, raise_problems
from tritter.evaluation.benchmarks.files import Questions, TasksFolder, load
from tritter.evaluation.benchmarks.formats import Benchmark
from tritter.evaluation.benchmarks.harness import (
    Asking,
    BenchmarkScores,
    require_harness,
    score_benchmark,
    score_from_hub,
)
from tritter.evaluation.benchmarks.table import benchmarks_of
from tritter.evaluation.code.sandbox import ExternalSandbox, NamespaceSandbox, Sandbox
from tritter.evaluation.statistics import PairedScores
from tritter.experts.whole import load_whole
from tritter.families import family_of, position_limit
from tritter.models import load_tokenizer, read_config
from tritter.pipeline.evaluate import (
    DomainsToScore,
    domain_losses,
    learned_domains,
    named_domains,
    read_data_words,
    sequence_length,
)
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.terminal import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRequest:
    """What is asked, as typed."""

    checkpoint: str
    tasks: tuple[str, ...] = ()
    tasks_path: Path | None = None
    data: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int = 16
    allow_code: tuple[str, ...] = ()
    code_sandbox: str | None = None
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class _Benchmarks:
    """Benchmarks that are asked: with their questions, where these come from files."""

    names: tuple[Benchmark, ...]
    questions: Mapping[str, Questions]
    sandbox: Sandbox | None


def run_evaluate(request: EvaluateRequest, *, overwrite: bool, as_json: bool) -> int:
    """Evaluate and print; return 0. Nothing of the checkpoint is changed.

    Raises:
        RequestError: the checkpoint, text, a benchmark or a sandbox can't be had.
        TritterError: the model computes what is not finite.
    """
    sources = read_data_words(request.data)
    file = None
    if request.output is not None:
        file = _file(request.output, request, sources, overwrite=overwrite)
    benchmarks = _benchmarks(request)
    with damage_is_a_wrong_request():
        folder = locate(request.checkpoint)
        config, lineage = read_config(folder), read_lineage(folder)
        vocab_size = family_of(config).dimensions(config).vocab_size
        tokenizer = read_tokenizer(folder, vocab_size=vocab_size)
        domains = DomainsToScore({}, ())
        if sources:
            domains = named_domains(sources, tokenizer)
        elif not benchmarks.names:
            domains = learned_domains(folder, lineage, tokenizer)
        model = load_whole(folder)
        _check_finite(model, folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    length = sequence_length(lineage, position_limit(config))
    with progress_bars(is_shown=not as_json) as new_bar:
        losses = domain_losses(
            model,
            domains.documents,
            tokenizer,
            length=length,
            batch_size=request.batch_size,
            new_bar=new_bar,
        )
    asking = Asking(
        limit=request.limit,
        batch_size=request.batch_size,
        sandbox=benchmarks.sandbox,
        is_shown=not as_json,
    )
    scores = [_scored(model, folder, one, benchmarks, asking) for one in benchmarks.names]
    record = {
        **mark("evaluate"),
        "checkpoint": str(folder),
        "model_hash": lineage.model_hash if lineage is not None else None,
        "sequence_length": length,
        "losses": {name: held.record() for name, held in losses.items()},
        "benchmarks": {held.name: _record(held, benchmarks) for held in scores},
        "notes": list(domains.notes),
    }
    if file is not None:
        file.write(json.dumps(record, indent=2, allow_nan=False) + "\n")
    if as_json:
        print_json(record)
    else:
        _print(losses, scores, notes=domains.notes, output=request.output)
    return 0


def _file(
    output: Path, request: EvaluateRequest, sources: Mapping[str, Sequence[str]], *, overwrite: bool
) -> ReportFile:
    """Return the file to write the result to.

    Raises:
        RequestError: it may not be written.
    """
    places = [named_path(request.checkpoint, key="--checkpoint")]
    places += [named_path(word, key="--data") for words in sources.values() for word in words]
    places += [] if request.tasks_path is None else [request.tasks_path]
    file = ReportFile(
        path=output, kind="evaluate", format="json", overwrite=overwrite, sources=places
    )
    file.check()
    return file


def _benchmarks(request: EvaluateRequest) -> _Benchmarks:
    """Return the benchmarks, once everything about them is found to be in order."""
    words = [name for word in request.tasks for name in word.split(",")]
    chosen = benchmarks_of(words, key="--tasks")
    allowed = [name for word in request.allow_code for name in word.split(",")]
    sandbox = _sandbox(chosen, allowed, request.code_sandbox)
    if request.tasks_path is not None and not chosen:
        raise RequestError(
            f"--tasks-path = {request.tasks_path}: name the benchmarks, --tasks NAMES."
        )
    if not chosen:
        return _Benchmarks((), {}, None)
    questions: dict[str, Questions] = {}
    if request.tasks_path is not None:
        folder = TasksFolder(request.tasks_path, key="--tasks-path")
        questions = {
            held.benchmark.name: held for held in load(chosen, folder, limit=request.limit)
        }
    require_harness()
    return _Benchmarks(chosen, questions, sandbox)


def _sandbox(
    chosen: Sequence[Benchmark], allowed: Sequence[str], command: str | None
) -> Sandbox | None:
    """Return where programs are run, once it was tried; None where there are none.

    Raises:
        RequestError: a benchmark is not allowed to run programs, or no sandbox can be had.
    """
    names = [benchmark.name for benchmark in chosen]
    raise_problems(code_problems(names, allowed, key="--tasks", allowing="--allow-code"))
    asked = [benchmark.name for benchmark in chosen if benchmark.kind == "code"]
    if not asked:
        return None
    sandbox: Sandbox = ExternalSandbox(command) if command else NamespaceSandbox()
    sandbox.check()
    return sandbox


def _scored(
    model: nn.Module, folder: Path, benchmark: Benchmark, benchmarks: _Benchmarks, asking: Asking
) -> BenchmarkScores:
    tokenizer = load_tokenizer(folder)
    questions = benchmarks.questions.get(benchmark.name)
    if questions is None:
        return score_from_hub(model, tokenizer, benchmark, asking)
    return score_benchmark(model, tokenizer, questions, asking)


def _check_finite(model: nn.Module, folder: Path) -> None:
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise RequestError(f"{folder}: {broken[0]} holds values that are not finite.")


def _record(scores: BenchmarkScores, benchmarks: _Benchmarks) -> dict[str, Any]:
    questions = benchmarks.questions.get(scores.name)
    hub = next(one.hub for one in benchmarks.names if one.name == scores.name)
    known = scores.known_by.record()
    return {
        "metric": scores.metric,
        "score": known["accuracy"],
        "standard_error": known["standard_error"],
        "n": known["n"],
        "chance": scores.nulls.chance,
        "null_models": {
            "uniform": scores.nulls.uniform,
            "constant": scores.nulls.constant,
            "empty": scores.nulls.empty,
        },
        "metrics": {metric: held.mean() for metric, held in scores.scores.items()},
        "source": list(questions.files) if questions is not None else f"hub: {hub}",
        "limited": list(scores.notes),
    }


def _print(
    losses: Mapping[str, PairedScores],
    scores: Sequence[BenchmarkScores],
    *,
    notes: Sequence[str],
    output: Path | None,
) -> None:
    console = new_console()
    say = partial(console.print, soft_wrap=True)
    for note in notes:
        say(note)
    if losses:
        _print_losses(console, losses)
    if losses and scores:
        say()
    if scores:
        _print_scores(console, scores)
    limited = [(held.name, note) for held in scores for note in held.notes]
    if limited:
        say()
    for name, note in limited:
        say(f"{name}: {note}")
    if output is not None:
        say(f"\nwritten  {shown_path(output)}")


def _print_losses(console: Console, losses: Mapping[str, PairedScores]) -> None:
    headers = ("nats per token", "±", "per byte", "documents")
    table = new_table("loss", *headers, numbers=headers)
    for name, held in losses.items():
        record = held.record()
        table.add_row(
            name,
            *(
                _number(record[key], "{:.3f}")
                for key in ("loss", "standard_error", "loss_per_byte")
            ),
            str(record["n"]),
        )
    console.print(table)


def _print_scores(console: Console, scores: Sequence[BenchmarkScores]) -> None:
    headers = ("score", "±", "questions", "uniform", "constant", "empty")
    table = new_table("benchmark", "metric", *headers, numbers=headers)
    for held in scores:
        record, nulls = held.known_by.record(), held.nulls
        shares = (record["accuracy"], record["standard_error"])
        table.add_row(
            held.name,
            held.metric,
            *(_number(share, "{:.1%}") for share in shares),
            str(record["n"]),
            *(_number(share, "{:.1%}") for share in (nulls.uniform, nulls.constant, nulls.empty)),
        )
    console.print(table)


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else form.format(value)

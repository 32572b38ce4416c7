"""`tritter evaluate`: losses of a checkpoint on data, and its benchmark scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tritter.cli.options import (
    AsJson,
    Checkpoint,
    ReportOverwrite,
    flag,
    named_paths,
    option,
    parse_path,
)
from tritter.cli.output import (
    CommandConsole,
    display_path,
    model_on_device,
    print_json,
    progress_bars,
    refuse_damage,
)
from tritter.errors import Names, RequestError, raise_problems
from tritter.limits import MAX_COUNT
from tritter.loading import loading
from tritter.report.table import Table, number_text
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.terminal import status

if TYPE_CHECKING:
    from torch import nn

    from tritter.cli.report_file import ReportFile
    from tritter.evaluation.benchmarks.files import Questions
    from tritter.evaluation.benchmarks.formats import Benchmark
    from tritter.evaluation.benchmarks.harness import BenchmarkScores, EvalOptions
    from tritter.evaluation.code.sandbox import Sandbox
    from tritter.evaluation.statistics import PairedScores

_CODE = "Programs that the model writes (humaneval, mbpp)"
_TasksPath = Annotated[
    Path | None,
    option(
        "--tasks-path",
        "DIR",
        "Folder with the files of the benchmarks, at any depth. Default: the hub.",
        parser=parse_path,
    ),
]
_Data = Annotated[
    list[str] | None,
    option(
        "--data",
        "[NAME=]PATH",
        "Data (file, folder or glob) to compute the loss on. Repeatable. Default, without "
        "--tasks: the validation data that the checkpoint recorded.",
    ),
]
_Limit = Annotated[
    int | None,
    option(
        "--limit",
        "N",
        "Maximum number of questions per benchmark, and of documents per domain.",
        least=1,
        most=MAX_COUNT,
    ),
]
_TextField = Annotated[str, option("--text-field", "NAME", "Field of records with the text.")]
_ChatTemplate = Annotated[
    bool, flag("--chat-template", "Render benchmark prompts with the checkpoint's chat template.")
]
_NumFewshot = Annotated[
    int | None,
    option(
        "--num-fewshot",
        "N",
        "Few-shot examples before each question. Default: as in lm-evaluation-harness.",
        least=0,
        most=MAX_COUNT,
    ),
]
_BatchSize = Annotated[int, option("--batch-size", "N", "Batch size.", least=1, most=MAX_COUNT)]
_AllowCode = Annotated[
    list[str] | None,
    option(
        "--allow-code", "NAME,..", "Run model-written programs of these benchmarks.", panel=_CODE
    ),
]
_CodeSandbox = Annotated[
    str | None,
    option(
        "--code-sandbox",
        "CMD",
        "Command that runs the program on its standard input, instead of Tritter's sandbox.",
        panel=_CODE,
    ),
]
_ResultFile = Annotated[
    Path | None,
    option("--output", "FILE.json", "Also write the result to this file.", parser=parse_path),
]


def _names() -> Iterable[str]:
    from tritter.data.benchmark_names import HUB_NAMES, PROGRESSIVE_BENCHMARKS

    return dict.fromkeys([*PROGRESSIVE_BENCHMARKS, *HUB_NAMES])


_Tasks = Annotated[
    list[str] | None,
    option(
        "--tasks",
        "NAME,..",
        "Benchmarks, or groups: base_capabilities, code, math, reasoning.",
        completes=_names,
    ),
]


def evaluate(
    checkpoint: Checkpoint,
    tasks: _Tasks = None,
    tasks_path: _TasksPath = None,
    data: _Data = None,
    text_field: _TextField = "text",
    limit: _Limit = None,
    chat_template: _ChatTemplate = False,
    num_fewshot: _NumFewshot = None,
    batch_size: _BatchSize = 16,
    allow_code: _AllowCode = None,
    code_sandbox: _CodeSandbox = None,
    output: _ResultFile = None,
    overwrite: ReportOverwrite = False,
    as_json: AsJson = False,
) -> int:
    """Evaluate a checkpoint: losses on data, scores on benchmarks.

    tritter evaluate base --tasks reasoning --tasks-path benchmarks
    """
    from tritter.data.benchmark_names import benchmark_names
    from tritter.evaluation.benchmarks.formats import BENCHMARKS

    sources = _domain_paths(data or ())
    chosen = [BENCHMARKS[name] for name in benchmark_names(_split_names(tasks), key="--tasks")]
    with loading("transformers"):
        from tritter.checkpoints import Lineage
        from tritter.checkpoints.record import window_length
        from tritter.core.models import read_model
        from tritter.data.records import FIELD_KEY
        from tritter.data.tokens import PretrainedTokenizer
        from tritter.evaluation.benchmarks.harness import EvalOptions
        from tritter.pipeline.evaluate import DomainsToScore

    inputs = [named_path(checkpoint, key="--checkpoint"), *filter(None, [tasks_path])]
    file = _result_file(output, inputs, sources, overwrite=overwrite)
    sandbox = _sandbox(chosen, _split_names(allow_code), code_sandbox)
    harness = EvalOptions(
        limit=limit, batch_size=batch_size, sandbox=sandbox, is_shown=not as_json,
        is_chat=chat_template, num_fewshot=num_fewshot,
    )  # fmt: skip
    questions = _questions(chosen, tasks_path, harness)
    with refuse_damage(), Names.of({FIELD_KEY: "--text-field"}).in_use():
        folder = locate(checkpoint, key="--checkpoint")
        whole, lineage = read_model(folder), Lineage.read(folder)
        tokenizer = PretrainedTokenizer.read(folder, vocab_size=whole.sizes.vocab_size)
        stock = _stock_tokenizer(folder, needs_template=chat_template) if chosen else None
        domains = DomainsToScore({}, ())
        length = window_length(lineage, whole.position_limit)
        if sources:
            domains = DomainsToScore.named(
                sources, tokenizer, folder=folder, lineage=lineage, length=length,
                text_field=text_field,
            )  # fmt: skip
        elif not chosen:
            domains = DomainsToScore.learned(folder, lineage, tokenizer, length=length)
        with status("loading the model"):
            model = model_on_device(folder)
    domains = domains.first(limit, length=length)
    with progress_bars(is_shown=not as_json) as new_bar:
        losses = domains.losses(
            model, tokenizer, length=length, batch_size=batch_size,
            new_bar=new_bar,
        )  # fmt: skip
    scores = _score_benchmarks(model, stock, chosen, questions, harness)
    notes = [*domains.notes, *_template_notes(stock, is_used=chat_template)]
    scored = {
        "losses": {name: found.record() for name, found in losses.items()},
        "benchmarks": {each.name: _record(each, questions) for each in scores},
    }
    model_hash = None if lineage is None else lineage.model_hash
    of_model = {"checkpoint": str(folder), "model_hash": model_hash, "sequence_length": length}
    record = {**of_model, **scored, "notes": notes}
    if file is not None:
        file.write(json.dumps(record, indent=2, allow_nan=False) + "\n")
    if as_json:
        print_json(record)
    else:
        _print(losses, scores, notes=notes, output=output)
    return 0


def _result_file(
    output: Path | None, inputs: Sequence[Path], data: Mapping[str, list[str]], *, overwrite: bool
) -> ReportFile | None:
    from tritter.cli.report_file import ReportFile
    from tritter.data.sources import text_files

    if output is None:
        return None
    words = [word for each in data.values() for word in each]
    typed = (named_path(word, key="--data") for word in words)
    sources = (*inputs, *typed, *text_files("--data", words))
    return ReportFile(output, "json", overwrite=overwrite, sources=sources)


def _domain_paths(words: Sequence[str]) -> dict[str, list[str]]:
    """Return domain → paths of data that can be read."""
    from tritter.data.sources import text_files

    sources = named_paths("--data", words)
    for name, paths in sources.items():
        for path in paths:
            if not path or ("=" in path and path in words and not Path(path).exists()):
                raise RequestError(
                    f"--data = {path or f'{name}='}: use PATH or NAME=PATH, where NAME has "
                    "letters, digits, - and _."
                )
        text_files(f"--data {name}", paths)
    return sources


def _split_names(words: Sequence[str] | None) -> list[str]:
    return [name for word in words or () for name in word.split(",")]


def _questions(
    chosen: Sequence[Benchmark], tasks_path: Path | None, harness: EvalOptions
) -> dict[str, Questions]:
    """Return the questions of benchmarks that are read from files."""
    from tritter.evaluation.benchmarks.files import TasksFolder
    from tritter.evaluation.benchmarks.harness import require_harness

    if tasks_path is not None and not chosen:
        raise RequestError(f"--tasks-path = {tasks_path}: requires --tasks NAMES.")
    requested = {"--chat-template": harness.is_chat, "--num-fewshot": harness.num_fewshot}
    for key, value in requested.items():
        if value and not chosen:
            raise RequestError(f"{key}: requires --tasks NAMES.")
    questions = {}
    if tasks_path is not None:
        files = TasksFolder(tasks_path, key="--tasks-path")
        loaded = files.load(chosen, limit=harness.limit, num_fewshot=harness.num_fewshot)
        questions = {found.benchmark.name: found for found in loaded}
    if chosen:
        require_harness()
    return questions


def _sandbox(
    chosen: Sequence[Benchmark], allowed: Sequence[str], command: str | None
) -> Sandbox | None:
    """Return a working sandbox for benchmark programs, or None if no benchmark runs any."""
    from tritter.data.benchmark_names import code_problems
    from tritter.evaluation.code.sandbox import Sandbox

    names = [benchmark.name for benchmark in chosen]
    raise_problems(code_problems(names, allowed, key="--tasks", allowing="--allow-code"))
    if not any(benchmark.kind == "code" for benchmark in chosen):
        return None
    return Sandbox.checked(command, key="--code-sandbox")


def _stock_tokenizer(folder: Path, *, needs_template: bool) -> Any:
    """Return a checkpoint's tokenizer, of transformers."""
    from tritter.core.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if needs_template and tokenizer.chat_template is None:
        raise RequestError(f"--chat-template: {folder} has no chat template; leave it out.")
    return tokenizer


def _template_notes(tokenizer: Any, *, is_used: bool) -> Iterator[str]:
    """Yield whether the benchmarks used the chat template, for a checkpoint that has one."""
    if is_used:
        yield "benchmarks: prompts rendered with the chat template, few-shot examples as turns"
    elif tokenizer is not None and tokenizer.chat_template is not None:
        yield "benchmarks: plain prompts; --chat-template renders them with the chat template"


def _score_benchmarks(
    model: nn.Module,
    tokenizer: Any,
    chosen: Sequence[Benchmark],
    questions: Mapping[str, Questions],
    harness: EvalOptions,
) -> list[BenchmarkScores]:
    return [
        harness.score_from_hub(model, tokenizer, each)
        if (of_files := questions.get(each.name)) is None
        else harness.score(model, tokenizer, of_files)
        for each in chosen
    ]


def _record(scores: BenchmarkScores, questions: Mapping[str, Questions]) -> dict[str, Any]:
    from tritter.data.benchmark_names import HUB_NAMES

    known, nulls = scores.primary.record(), scores.nulls
    of_files = questions.get(scores.name)
    return {
        "metric": scores.metric,
        "num_fewshot": scores.num_fewshot,
        "chat_template": scores.is_chat,
        "score": known["accuracy"],
        "standard_error": known["standard_error"],
        "n": known["n"],
        "chance": nulls.chance,
        "null_models": {"uniform": nulls.uniform, "constant": nulls.constant, "empty": nulls.empty},
        "metrics": {metric: paired.mean() for metric, paired in scores.scores.items()},
        "source": f"hub: {HUB_NAMES[scores.name]}" if of_files is None else list(of_files.files),
        "limited": list(scores.notes),
    }


def _print(
    losses: Mapping[str, PairedScores],
    scores: Sequence[BenchmarkScores],
    *,
    notes: Sequence[str],
    output: Path | None,
) -> None:
    console = CommandConsole()
    say = partial(console.print, soft_wrap=True)
    for note in notes:
        say(note)
    rows: list[tuple[str, ...]] = []
    for name, of_domain in losses.items():
        record = of_domain.record()
        sizes = (record["loss"], record["standard_error"], record["loss_per_byte"])
        rows.append((name, *(number_text(size, ".3f") for size in sizes), str(record["n"])))
    if rows:
        header: tuple[str, ...] = ("loss", "nats per token", "±", "per byte", "documents")
        console.print_table(Table(header, tuple(rows), numbers=(1, 2, 3, 4)))
    if losses and scores:
        say()
    rows = []
    for each in scores:
        record, nulls = each.primary.record(), each.nulls
        shares = (record["accuracy"], record["standard_error"])
        guesses = (nulls.uniform, nulls.constant, nulls.empty)
        cells = [number_text(share, ".1%") for share in (*shares, *guesses)]
        counts = (str(each.num_fewshot), *cells[:2], str(record["n"]))
        rows.append((each.name, each.metric, *counts, *cells[2:]))
    if rows:
        header = ("benchmark", "metric", "shots", "score", "±", "questions")
        header += ("uniform", "constant", "empty")
        console.print_table(Table(header, tuple(rows), numbers=tuple(range(2, 9))))
    limited = [f"{each.name}: {note}" for each in scores for note in each.notes]
    for line in ["", *limited] if limited else ():
        say(line)
    if output is not None:
        say(f"\nwritten  {display_path(output)}")

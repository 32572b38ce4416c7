"""All benchmarks: their files, their forms, how they are asked and judged."""

from collections.abc import Sequence

from tritter.data.benchmark_names import benchmark_names
from tritter.evaluation.benchmarks import answers, choices, programs
from tritter.evaluation.benchmarks.records import Benchmark


def _test_files(name: str) -> tuple[str, ...]:
    """Return patterns of a benchmark's files: its test split, else its validation split."""
    return (rf"{name}.*test", rf"{name}.*(val|dev)", rf"{name}(?!.*(train|prompt))")


_ALL = (
    Benchmark(
        name="hellaswag",
        kind="choice",
        metric="acc_norm",
        files=(r"hellaswag.*val", *_test_files("hellaswag")),  # the test split has no answers
        formats=choices.HELLASWAG,
    ),
    Benchmark(
        name="arc_challenge",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?challenge"),
        formats=choices.ARC,
    ),
    Benchmark(
        name="arc_easy",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?easy"),
        formats=choices.ARC,
    ),
    Benchmark(
        name="mmlu",
        kind="choice",
        metric="acc",
        files=_test_files("mmlu"),
        formats=choices.MMLU,
    ),
    Benchmark(
        name="truthfulqa",
        kind="choice",
        metric="acc",
        files=(r"truthful.?qa.*mc", r"truthful.?qa.*(jsonl|json|parquet)"),
        formats=choices.TRUTHFULQA,
    ),
    Benchmark(
        name="winogrande",
        kind="context",
        metric="acc",
        files=(r"winogrande.*val", *_test_files("winogrande")),
        formats=choices.WINOGRANDE,
    ),
    Benchmark(
        name="piqa",
        kind="choice",
        metric="acc_norm",
        files=(r"piqa.*val", *_test_files("piqa")),
        formats=choices.PIQA,
    ),
    Benchmark(
        name="boolq",
        kind="choice",
        metric="acc",
        files=(r"boolq.*val", *_test_files("boolq")),
        formats=choices.BOOLQ,
    ),
    Benchmark(
        name="openbookqa",
        kind="choice",
        metric="acc_norm",
        files=_test_files("openbook.?qa"),
        formats=choices.OPENBOOKQA,
    ),
    Benchmark(
        name="commonsenseqa",
        kind="choice",
        metric="acc",
        files=(r"commonsense.?qa.*val", *_test_files("commonsense.?qa")),
        formats=choices.COMMONSENSEQA,
    ),
    Benchmark(
        name="xcopa",
        kind="choice",
        metric="acc",
        files=_test_files("xcopa"),
        formats=choices.XCOPA,
    ),
    Benchmark(
        name="lambada",
        kind="word",
        metric="acc",
        files=_test_files("lambada"),
        formats=choices.LAMBADA,
    ),
    Benchmark(
        name="gsm8k",
        kind="answer",
        metric="exact_match",
        files=_test_files("gsm8k"),
        formats=answers.GSM8K,
        hub_filter="flexible-extract",
        examples=answers.train_examples,
        until=("Question:", "</s>", "<|im_end|>"),
        is_right=answers.is_number_right,
    ),
    Benchmark(
        name="svamp",
        kind="answer",
        metric="exact_match",
        files=_test_files("svamp"),
        formats=answers.SVAMP,
        until=("Question:", "\n\n"),
        is_right=answers.is_number_right,
    ),
    Benchmark(
        name="mgsm",
        kind="answer",
        metric="exact_match",
        files=_test_files("mgsm"),
        formats=answers.MGSM,
        hub_filter="flexible-extract",
        until=(*answers.MGSM_UNTIL, "</s>", "<|im_end|>"),
        is_right=answers.is_number_right,
    ),
    Benchmark(
        name="math",
        kind="answer",
        metric="exact_match",
        files=(r"math.?500", r"(hendrycks|minerva|competition).?math.*test", r"(^|/)math.*test"),
        formats=answers.MATH,
        until=("Problem:",),
        is_right=answers.is_formula_right,
    ),
    Benchmark(
        name="bbh",
        kind="answer",
        metric="exact_match",
        files=(r"(bbh|big.?bench.?hard)[/_-]",),
        formats=answers.BBH,
        hub_filter="get-answer",
        examples=answers.thought_examples,
        until=("</s>", "Q", "\n\n"),
        max_new_tokens=1024,
        is_right=answers.is_conclusion_right,
    ),
    Benchmark(
        name="humaneval",
        kind="code",
        metric="pass@1",
        files=(r"human.?eval",),
        formats=programs.HUMANEVAL,
        until=programs.HUMANEVAL_UNTIL,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="mbpp",
        kind="code",
        metric="pass@1",
        files=_test_files("mbpp"),
        formats=programs.MBPP,
        examples=programs.mbpp_examples,
        until=programs.MBPP_UNTIL,
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def benchmarks_of(words: Sequence[str], *, key: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks that names mean; see `benchmark_names`.

    Raises:
        RequestError: names what is none, all at once.
    """
    return tuple(BENCHMARKS[name] for name in benchmark_names(words, key=key))

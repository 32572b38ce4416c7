"""All benchmarks: their files, their forms, how they are asked and judged."""

from collections.abc import Sequence

from tritter.data.benchmark_names import benchmark_names
from tritter.evaluation.benchmarks import formats
from tritter.evaluation.benchmarks.formats import Benchmark


def _test_files(name: str) -> tuple[str, ...]:
    """Return patterns of a benchmark's files: its test split, else its validation split."""
    return (rf"{name}.*test", rf"{name}.*(val|dev)", rf"{name}(?!.*(train|prompt))")


_ALL = (
    Benchmark(
        name="hellaswag",
        kind="choice",
        metric="acc_norm",
        files=(r"hellaswag.*val", *_test_files("hellaswag")),  # the test split has no answers
        formats=formats.HELLASWAG,
    ),
    Benchmark(
        name="arc_challenge",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?challenge"),
        formats=formats.ARC,
    ),
    Benchmark(
        name="arc_easy",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?easy"),
        formats=formats.ARC,
    ),
    Benchmark(
        name="mmlu",
        kind="choice",
        metric="acc",
        files=_test_files("mmlu"),
        formats=formats.MMLU,
    ),
    Benchmark(
        name="truthfulqa",
        kind="choice",
        metric="acc",
        files=(r"truthful.?qa.*mc", r"truthful.?qa.*(jsonl|json|parquet)"),
        formats=formats.TRUTHFULQA,
    ),
    Benchmark(
        name="winogrande",
        kind="context",
        metric="acc",
        files=(r"winogrande.*val", *_test_files("winogrande")),
        formats=formats.WINOGRANDE,
    ),
    Benchmark(
        name="piqa",
        kind="choice",
        metric="acc_norm",
        files=(r"piqa.*val", *_test_files("piqa")),
        formats=formats.PIQA,
    ),
    Benchmark(
        name="boolq",
        kind="choice",
        metric="acc",
        files=(r"boolq.*val", *_test_files("boolq")),
        formats=formats.BOOLQ,
    ),
    Benchmark(
        name="openbookqa",
        kind="choice",
        metric="acc_norm",
        files=_test_files("openbook.?qa"),
        formats=formats.OPENBOOKQA,
    ),
    Benchmark(
        name="commonsenseqa",
        kind="choice",
        metric="acc",
        files=(r"commonsense.?qa.*val", *_test_files("commonsense.?qa")),
        formats=formats.COMMONSENSEQA,
    ),
    Benchmark(
        name="xcopa",
        kind="choice",
        metric="acc",
        files=_test_files("xcopa"),
        formats=formats.XCOPA,
    ),
    Benchmark(
        name="lambada",
        kind="word",
        metric="acc",
        files=_test_files("lambada"),
        formats=formats.LAMBADA,
    ),
    Benchmark(
        name="gsm8k",
        kind="answer",
        metric="exact_match",
        files=_test_files("gsm8k"),
        formats=formats.GSM8K,
        hub_filter="flexible-extract",
        examples=formats.train_examples,
        until=("Question:", "</s>", "<|im_end|>"),
        is_right=formats.is_number_right,
    ),
    Benchmark(
        name="svamp",
        kind="answer",
        metric="exact_match",
        files=_test_files("svamp"),
        formats=formats.SVAMP,
        until=("Question:", "\n\n"),
        is_right=formats.is_number_right,
    ),
    Benchmark(
        name="mgsm",
        kind="answer",
        metric="exact_match",
        files=_test_files("mgsm"),
        formats=formats.MGSM,
        hub_filter="flexible-extract",
        until=(*formats.MGSM_UNTIL, "</s>", "<|im_end|>"),
        is_right=formats.is_number_right,
    ),
    Benchmark(
        name="math",
        kind="answer",
        metric="exact_match",
        files=(r"math.?500", r"(hendrycks|minerva|competition).?math.*test", r"(^|/)math.*test"),
        formats=formats.MATH,
        until=("Problem:",),
        is_right=formats.is_formula_right,
    ),
    Benchmark(
        name="bbh",
        kind="answer",
        metric="exact_match",
        files=(r"(bbh|big.?bench.?hard)[/_-]",),
        formats=formats.BBH,
        hub_filter="get-answer",
        examples=formats.thought_examples,
        until=("</s>", "Q", "\n\n"),
        max_new_tokens=1024,
        is_right=formats.is_conclusion_right,
    ),
    Benchmark(
        name="humaneval",
        kind="code",
        metric="pass@1",
        files=(r"human.?eval",),
        formats=formats.HUMANEVAL,
        until=formats.HUMANEVAL_UNTIL,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="mbpp",
        kind="code",
        metric="pass@1",
        files=_test_files("mbpp"),
        formats=formats.MBPP,
        examples=formats.mbpp_examples,
        until=formats.MBPP_UNTIL,
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def benchmarks_of(words: Sequence[str], *, key: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks that names mean; see `benchmark_names`.

    Raises:
        RequestError: names what is none, all at once.
    """
    return tuple(BENCHMARKS[name] for name in benchmark_names(words, key=key))

"""All benchmarks by name, their groups, and what lm-evaluation-harness calls them."""

from collections.abc import Sequence

from tritter.errors import Problem, nearest, raise_problems
from tritter.evaluation.benchmarks import answers, choices, programs
from tritter.evaluation.benchmarks.records import Benchmark

# The groups of the specification (9.2); `PROGRESSIVE_BENCHMARKS` of the library
GROUPS: dict[str, list[str]] = {
    "base_capabilities": ["hellaswag", "arc_challenge", "mmlu", "truthfulqa"],
    "code": ["humaneval", "mbpp"],
    "math": ["gsm8k", "math"],
    "reasoning": ["bbh", "arc_challenge"],
}
PROGRESSIVE_BENCHMARKS = GROUPS


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
        hub="hellaswag",
    ),
    Benchmark(
        name="arc_challenge",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?challenge"),
        formats=choices.ARC,
        hub="arc_challenge",
    ),
    Benchmark(
        name="arc_easy",
        kind="choice",
        metric="acc_norm",
        files=_test_files("arc.?easy"),
        formats=choices.ARC,
        hub="arc_easy",
    ),
    Benchmark(
        name="mmlu",
        kind="choice",
        metric="acc",
        files=_test_files("mmlu"),
        formats=choices.MMLU,
        hub="mmlu",
    ),
    Benchmark(
        name="truthfulqa",
        kind="choice",
        metric="acc",
        files=(r"truthful.?qa.*mc", r"truthful.?qa.*(jsonl|json|parquet)"),
        formats=choices.TRUTHFULQA,
        hub="truthfulqa_mc1",
    ),
    Benchmark(
        name="winogrande",
        kind="context",
        metric="acc",
        files=(r"winogrande.*val", *_test_files("winogrande")),
        formats=choices.WINOGRANDE,
        hub="winogrande",
    ),
    Benchmark(
        name="piqa",
        kind="choice",
        metric="acc_norm",
        files=(r"piqa.*val", *_test_files("piqa")),
        formats=choices.PIQA,
        hub="piqa",
    ),
    Benchmark(
        name="boolq",
        kind="choice",
        metric="acc",
        files=(r"boolq.*val", *_test_files("boolq")),
        formats=choices.BOOLQ,
        hub="boolq",
    ),
    Benchmark(
        name="openbookqa",
        kind="choice",
        metric="acc_norm",
        files=_test_files("openbook.?qa"),
        formats=choices.OPENBOOKQA,
        hub="openbookqa",
    ),
    Benchmark(
        name="commonsenseqa",
        kind="choice",
        metric="acc",
        files=(r"commonsense.?qa.*val", *_test_files("commonsense.?qa")),
        formats=choices.COMMONSENSEQA,
        hub="commonsense_qa",
    ),
    Benchmark(
        name="xcopa",
        kind="choice",
        metric="acc",
        files=_test_files("xcopa"),
        formats=choices.XCOPA,
        hub="xcopa",
    ),
    Benchmark(
        name="lambada",
        kind="word",
        metric="acc",
        files=_test_files("lambada"),
        formats=choices.LAMBADA,
        hub="lambada_openai",
    ),
    Benchmark(
        name="gsm8k",
        kind="answer",
        metric="exact_match",
        files=_test_files("gsm8k"),
        formats=answers.GSM8K,
        hub="gsm8k",
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
        hub="mgsm_direct",
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
        hub="hendrycks_math",
        until=("Problem:",),
        is_right=answers.is_formula_right,
    ),
    Benchmark(
        name="bbh",
        kind="answer",
        metric="exact_match",
        files=(r"(bbh|big.?bench.?hard)[/_-]",),
        formats=answers.BBH,
        hub="bbh_cot_fewshot",
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
        hub="openai/openai_humaneval test",
        until=programs.HUMANEVAL_UNTIL,
        max_new_tokens=1024,
    ),
    Benchmark(
        name="mbpp",
        kind="code",
        metric="pass@1",
        files=_test_files("mbpp"),
        formats=programs.MBPP,
        hub="google-research-datasets/mbpp prompt+test",
        examples=programs.mbpp_examples,
        until=programs.MBPP_UNTIL,
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
CODE = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.kind == "code")
# What lm-evaluation-harness calls them → what they are called here
ALIASES = {each.hub: each.name for each in _ALL if each.hub and each.name not in CODE}


def benchmarks_of(words: Sequence[str], *, key: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks that names mean, each once: of groups, of benchmarks, of lm-eval.

    `math` is a group and a benchmark, and means the group; `hendrycks_math` is the benchmark.

    Args:
        key: what the names are called in messages.

    Raises:
        RequestError: names what is none of these, all at once.
    """
    known: dict[str, None] = {}
    problems = []
    for word in words:
        if word in GROUPS:
            known.update(dict.fromkeys(GROUPS[word]))
        elif (name := ALIASES.get(word, word)) in BENCHMARKS:
            known[name] = None
        else:
            reason = f"allowed are the groups {', '.join(GROUPS)} and {', '.join(BENCHMARKS)}"
            near = nearest(word, [*GROUPS, *BENCHMARKS])
            problems.append(Problem(key, word, reason=reason, nearest=near))
    raise_problems(problems)
    return tuple(BENCHMARKS[name] for name in known)

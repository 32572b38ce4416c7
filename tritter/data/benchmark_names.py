"""Benchmark names: groups, lm-evaluation-harness task names, and the benchmarks that run code."""

from collections.abc import Sequence

from tritter.errors import Problem, nearest, raise_problems

# Group → benchmarks
PROGRESSIVE_BENCHMARKS: dict[str, list[str]] = {
    "base_capabilities": ["hellaswag", "arc_challenge", "mmlu", "truthfulqa"],
    "code": ["humaneval", "mbpp"],
    "math": ["gsm8k", "math"],
    "reasoning": ["bbh", "arc_challenge"],
}
# Name → lm-eval task; for benchmarks that run code: data set and splits; empty if there is none
HUB_NAMES = {
    "hellaswag": "hellaswag",
    "arc_challenge": "arc_challenge",
    "arc_easy": "arc_easy",
    "mmlu": "mmlu",
    "truthfulqa": "truthfulqa_mc1",
    "winogrande": "winogrande",
    "piqa": "piqa",
    "boolq": "boolq",
    "openbookqa": "openbookqa",
    "commonsenseqa": "commonsense_qa",
    "xcopa": "xcopa",
    "lambada": "lambada_openai",
    "gsm8k": "gsm8k",
    "svamp": "",
    "mgsm": "mgsm_direct",
    "math": "hendrycks_math",
    "bbh": "bbh_cot_fewshot",
    "humaneval": "openai/openai_humaneval test",
    "mbpp": "google-research-datasets/mbpp prompt+test",
}
CODE = tuple(PROGRESSIVE_BENCHMARKS["code"])  # answers are programs that are run
_OURS = {hub: name for name, hub in HUB_NAMES.items() if hub and name not in CODE}


def benchmark_names(requested: Sequence[str], *, key: str) -> tuple[str, ...]:
    """Resolve names of groups, benchmarks and lm-eval tasks to benchmarks, each once.

    `math` means the group; `hendrycks_math` means the benchmark of the same name.

    Args:
        requested: the names to resolve.
        key: the configuration key, for messages.
    """
    known: dict[str, None] = {}
    problems = []
    for word in requested:
        if word in PROGRESSIVE_BENCHMARKS:
            known.update(dict.fromkeys(PROGRESSIVE_BENCHMARKS[word]))
        elif (name := _OURS.get(word, word)) in HUB_NAMES:
            known[name] = None
        else:
            groups = ", ".join(PROGRESSIVE_BENCHMARKS)
            reason = f"allowed are the groups {groups} and {', '.join(HUB_NAMES)}"
            near = nearest(word, [*PROGRESSIVE_BENCHMARKS, *HUB_NAMES])
            problems.append(Problem(key, word, reason=reason, nearest=near))
    raise_problems(problems)
    return tuple(known)


def code_problems(
    names: Sequence[str], allowed: Sequence[str], *, key: str, allowing: str
) -> list[Problem]:
    """Return the problems of benchmarks that run generated code.

    Args:
        names: the requested benchmarks.
        allowed: benchmarks whose programs may be run.
        key: the key of the benchmarks, for messages.
        allowing: the option that allows code, for messages: `--allow-code`.
    """
    reason = f"allowed are {', '.join(CODE)}"
    problems = [Problem(allowing, name, reason=reason) for name in allowed if name not in CODE]
    runs_code = [name for name in names if name in CODE]
    value = ",".join(runs_code)
    option = f"{allowing} {value}" if allowing.startswith("--") else f"{allowing}=[{value}]"
    for name in runs_code:
        if name not in allowed:
            reason = f"this benchmark runs the programs that a model writes; allow it with {option}"
            problems.append(Problem(key, name, reason=reason))
    return problems

"""Benchmarks by name: their groups, what lm-evaluation-harness calls them, which run programs."""

from collections.abc import Sequence

from tritter.errors import Problem, nearest, raise_problems

# The groups of the specification (9.2); `PROGRESSIVE_BENCHMARKS` of the library
GROUPS: dict[str, list[str]] = {
    "base_capabilities": ["hellaswag", "arc_challenge", "mmlu", "truthfulqa"],
    "code": ["humaneval", "mbpp"],
    "math": ["gsm8k", "math"],
    "reasoning": ["bbh", "arc_challenge"],
}
PROGRESSIVE_BENCHMARKS = GROUPS
# Name → lm-eval's own name of it, or, of those that run programs, the data set and its splits;
# empty where there is none
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
CODE = tuple(GROUPS["code"])  # the answers are programs, which are run
_OURS = {hub: name for name, hub in HUB_NAMES.items() if hub and name not in CODE}


def benchmark_names(words: Sequence[str], *, key: str) -> tuple[str, ...]:
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
        elif (name := _OURS.get(word, word)) in HUB_NAMES:
            known[name] = None
        else:
            reason = f"allowed are the groups {', '.join(GROUPS)} and {', '.join(HUB_NAMES)}"
            near = nearest(word, [*GROUPS, *HUB_NAMES])
            problems.append(Problem(key, word, reason=reason, nearest=near))
    raise_problems(problems)
    return tuple(known)


def code_problems(
    names: Sequence[str], allowed: Sequence[str], *, key: str, allowing: str
) -> list[Problem]:
    """Return what is wrong with what may run programs.

    Args:
        names: of the benchmarks that are asked.
        allowed: those whose programs may be run.
        key: what the benchmarks are called in messages.
        allowing: what allows them, in messages: `--allow-code`.
    """
    reason = f"allowed are {', '.join(CODE)}"
    problems = [Problem(allowing, name, reason=reason) for name in allowed if name not in CODE]
    asked = [name for name in names if name in CODE]
    value = ",".join(asked)
    way = f"{allowing} {value}" if allowing.startswith("--") else f"{allowing}=[{value}]"
    for name in asked:
        if name not in allowed:
            reason = f"its answers are programs, which are run; allow it, {way}"
            problems.append(Problem(key, name, reason=reason))
    return problems

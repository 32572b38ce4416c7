"""Records of benchmarks in their published formats, written by hand.

Benchmark → records, as lm-evaluation-harness's own task reads them.
"""

from typing import Any

Rows = list[dict[str, Any]]


def _ai2(field: str, questions: list[tuple[str, list[str], int]]) -> Rows:
    letters = list("ABCDE")
    return [
        {
            field: text,
            "choices": {"text": choices, "label": letters[: len(choices)]},
            "answerKey": letters[right],
        }
        for text, choices, right in questions
    ]


_FACTS = [
    ("What grows a layer?", ["data", "a long grey stone", "rain"], 0),
    ("Where does a model keep what it knew?", ["in a box", "in its weights", "nowhere"], 1),
    ("Which one is a tree?", ["oak", "cat"], 0),
    ("What is two and two?", ["three", "five", "four"], 2),
]
_FIVE = [
    (f"{text} Say it.", [*choices, "one more", "another", "none of all"][:5], right)
    for text, choices, right in _FACTS
]
PUBLISHED: dict[str, Rows] = {
    "hellaswag": [
        {
            "activity_label": "Growing",
            "ctx_a": "A model grows [header] a layer.",
            "ctx_b": "then it",
            "endings": ["sleeps  deep.", "learns [step] again.", "is a cat.", "falls."],
            "label": str(right),
        }
        for right in (0, 1, 3)
    ],
    "arc_easy": _ai2("question", _FACTS),
    "openbookqa": _ai2("question_stem", _FACTS),
    "commonsenseqa": _ai2("question", _FIVE),
    "piqa": [
        {"goal": text, "sol1": choices[0], "sol2": choices[1], "label": min(right, 1)}
        for text, choices, right in _FACTS
    ],
    "boolq": [
        {"passage": "A model grows.", "question": text.strip("?").lower(), "label": number % 2}
        for number, (text, _, _) in enumerate(_FACTS)
    ],
    "winogrande": [
        {
            "sentence": "The layer fits the model as _ is wide.",
            "option1": "the layer",
            "option2": "the model",
            "answer": answer,
        }
        for answer in "12"
    ],
    "mmlu_anatomy": [
        {
            "question": f" {text} ",
            "choices": choices[:4],
            "answer": min(right, 3),
            "subject": "anatomy",
        }
        for text, choices, right in _FIVE
    ],
    "xcopa_it": [
        {
            "premise": "Il modello cresce.",
            "choice1": "Impara di nuovo.",
            "choice2": "Dorme.",
            "question": question,
            "label": label,
        }
        for question, label in (("cause", 0), ("effect", 1))
    ],
    "lambada_openai": [{"text": "The model grows a layer"}, {"text": "It keeps what it knew"}],
    "gsm8k": [
        {"question": f"What is {n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n:,}"}
        for n in (1, 600, 12)
    ],
    "mgsm_direct_de": [
        {
            "question": f"Was ist {n} und {n}?",
            "answer_number": 2 * n,
            "answer": None,
            "equation_solution": None,
        }
        for n in (1, 12)
    ],
    "hendrycks_math500": [
        {
            "problem": "What is half?",
            "solution": "So it is $\\boxed{\\frac{1}{2}}$.",
            "level": "1",
        },
        {"problem": "What is two?", "solution": "It is \\boxed{2}.", "level": "1"},
    ],
    "bbh_cot_fewshot_snarks": [
        {"input": "Which grows?\n(A) a model\n(B) a stone", "target": "(A)"},
        {"input": "Which sleeps?\n(A) a stone\n(B) a cat", "target": "(B)"},
    ],
    "truthfulqa_mc1": [
        {
            "question": text,
            "mc1_targets": {
                "choices": [choices[right], *choices[:right]],
                "labels": [1] + [0] * right,
            },
        }
        for text, choices, right in _FACTS
        if right
    ],
}

"""Questions with choices: what the records of each published format mean.

The prompts are those of lm-evaluation-harness 0.4.13, word for word.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tritter.evaluation.benchmarks.records import (
    CHOICES,
    NUMBER,
    OBJECT,
    TEXT,
    Format,
    Question,
    Row,
)

_LETTERS = "ABCDEFGHIJ"
_TRUTHFUL_EXAMPLES = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""
# Language → what joins a premise to its cause and to its effect
_CONNECTORS = {
    "et": ("sest", "seetõttu"),
    "ht": ("poukisa", "donk sa"),
    "it": ("perché", "quindi"),
    "id": ("karena", "maka"),
    "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"),
    "zh": ("因为", "所以"),
    "ta": ("காரணமாக", "எனவே"),
    "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"),
    "vi": ("bởi vì", "vì vậy"),
}


def queried(prompt: Callable[[str], str]) -> Format:
    """Return llm-foundry's form (`query`, `choices`, `gold`).

    Args:
        prompt: makes the prompt of a query.
    """

    def question(row: Row, file: str) -> Question:
        return Question(
            prompt=prompt(row["query"]), choices=_texts(row["choices"]), right=row["gold"]
        )

    return Format({"query": TEXT, "choices": CHOICES, "gold": NUMBER}, question)


def labelled(
    field: str, prompt: Callable[[str, Mapping[str, Any]], str], *, is_by_letter: bool = False
) -> Format:
    """Return AI2's form: choices with labels, and the label of the right one.

    Args:
        field: that holds the question.
        prompt: makes the prompt of the question and the choices.
        is_by_letter: the label is what is predicted.
    """

    def question(row: Row, file: str) -> Question:
        choices = row["choices"]
        labels = _texts(choices["label"])
        return Question(
            prompt=prompt(row[field], choices),
            choices=labels if is_by_letter else _texts(choices["text"]),
            right=labels.index(row["answerKey"].strip()),
        )

    return Format({field: TEXT, "choices": OBJECT, "answerKey": TEXT}, question)


def asked(query: str) -> str:
    """Return `Question: … Answer:`; the query may begin with its `Question:` itself."""
    return f"Question: {query.strip().removeprefix('Question:').strip()}\nAnswer:"


def by_letters(question: str, choices: Sequence[str]) -> str:
    """Return the question with its choices lettered."""
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, "Answer:"])


def _hellaswag(row: Row, file: str) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = tuple(_wikihow(ending) for ending in _texts(row["endings"]))
    return Question(prompt=_wikihow(context), choices=endings, right=int(row["label"]))


def _wikihow(text: str) -> str:
    plain = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ")


def _winogrande(row: Row, file: str) -> Question:
    start, blank, end = row["sentence"].partition("_")
    if not blank:
        raise ValueError("sentence has no _ to put an option in")
    options = (row["option1"], row["option2"])
    contexts = tuple(start + option for option in options)
    return Question(prompt=end.strip(), choices=contexts, right={"1": 0, "2": 1}[row["answer"]])


def _winogrande_foundry(row: Row, file: str) -> Question:
    contexts = _texts(row["context_options"])
    return Question(prompt=row["continuation"].strip(), choices=contexts, right=row["gold"])


def _piqa(row: Row, file: str) -> Question:
    return Question(
        prompt=asked(row["goal"]), choices=(row["sol1"], row["sol2"]), right=row["label"]
    )


def _boolq(field: str) -> Callable[[Row, str], Question]:
    def question(row: Row, file: str) -> Question:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return Question(prompt=prompt, choices=("no", "yes"), right=int(row[field]))

    return question


def passage(query: str) -> str:
    """Return llm-foundry's query of BoolQ in lm-eval's words."""
    return query.strip().removeprefix("Passage:").strip() + "\nAnswer:"


def _mmlu(row: Row, file: str) -> Question:
    subject = str(row.get("subject", ""))
    about = "The following are multiple choice questions (with answers)"
    head = f"{about} about {subject.replace('_', ' ')}.\n\n" if subject else ""
    choices = _texts(row["choices"])
    prompt = head + by_letters(row["question"].strip(), choices)
    letters = tuple(_LETTERS[: len(choices)])
    return Question(prompt=prompt, choices=letters, right=row["answer"], part=subject)


def _truthfulqa(row: Row, file: str) -> Question:
    """Shuffle the choices: the right one always stands first, where an undecided model ends too."""
    targets = row["mc1_targets"]
    if "choices" in targets:
        pairs = list(zip(_texts(targets["choices"]), targets["labels"], strict=True))
    else:
        pairs = [(str(text), label) for text, label in targets.items()]
    random.Random(row["question"]).shuffle(pairs)
    labels = [label for _, label in pairs]
    if labels.count(1) != 1:
        raise ValueError("mc1_targets has not one right answer")
    return Question(
        prompt=f"{_TRUTHFUL_EXAMPLES}\n\nQ: {row['question']}\nA:",
        choices=tuple(text for text, _ in pairs),
        right=labels.index(1),
    )


def _xcopa(row: Row, file: str) -> Question:
    language = next((part for part in re.split(r"\W", file) if part in _CONNECTORS), None)
    if language is None:
        raise ValueError(f"the file's name says none of the languages {', '.join(_CONNECTORS)}")
    cause, effect = _CONNECTORS[language]
    connector = {"cause": cause, "effect": effect}[row["question"]]
    choices = (row["choice1"], row["choice2"])
    return Question(
        prompt=f"{row['premise'].strip()[:-1]} {connector}",
        choices=tuple(choice[0].lower() + choice[1:] for choice in choices),
        right=row["label"],
        part=language,
    )


def _lambada(row: Row, file: str) -> Question:
    start, _, last = row["text"].rpartition(" ")
    return Question(prompt=start, answer=last)


def _lambada_foundry(row: Row, file: str) -> Question:
    return Question(prompt=row["context"], answer=row["continuation"].strip())


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise TypeError(f"{values!r} is no list of texts")
    return tuple(values)


_COMMONSENSE = {"query": TEXT, "choices": CHOICES, "gold": NUMBER}
HELLASWAG = (
    Format(
        {
            "activity_label": TEXT,
            "ctx_a": TEXT,
            "ctx_b": TEXT,
            "endings": CHOICES,
            "label": (int, str),
        },
        _hellaswag,
    ),
    queried(lambda query: query),
)
ARC = (labelled("question", lambda question, choices: asked(question)), queried(asked))
OPENBOOKQA = (
    labelled("question_stem", lambda question, choices: question),
    queried(lambda query: query),
)
COMMONSENSEQA = (
    labelled(
        "question",
        lambda question, choices: by_letters(f"Question: {question.strip()}", choices["text"]),
        is_by_letter=True,
    ),
    queried(lambda query: query.replace("\nChoices:", "", 1)),
)
PIQA = (
    Format({"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": NUMBER}, _piqa),
    queried(asked),
)
WINOGRANDE = (
    Format({"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT}, _winogrande),
    Format({"context_options": CHOICES, "continuation": TEXT, "gold": NUMBER}, _winogrande_foundry),
)
BOOLQ = (
    Format({"passage": TEXT, "question": TEXT, "answer": bool}, _boolq("answer")),
    Format({"passage": TEXT, "question": TEXT, "label": NUMBER}, _boolq("label")),
    queried(passage),
)
MMLU = (Format({"question": TEXT, "choices": CHOICES, "answer": NUMBER}, _mmlu),)
TRUTHFULQA = (Format({"question": TEXT, "mc1_targets": OBJECT}, _truthfulqa),)
XCOPA = (
    Format(
        {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT, "label": NUMBER},
        _xcopa,
    ),
)
LAMBADA = (
    Format({"context": TEXT, "continuation": TEXT}, _lambada_foundry),
    Format({"text": TEXT}, _lambada),
)

"""Questions that are answered in words: their formats, their examples, how an answer is read.

The prompts are those of lm-evaluation-harness 0.4.13 where it has the benchmark.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

from tritter.evaluation.benchmarks.records import TEXT, Folder, Format, Question, Row

_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_SHOTS = 5
# Language → what stands before the question and before the answer
_WORDS = {
    "bn": ("প্রশ্ন: ", "Answer:"),
    "de": ("Frage: ", "Antwort:"),
    "en": ("Question: ", "Answer:"),
    "es": ("Pregunta: ", "Respuesta:"),
    "fr": ("Question : ", "Réponse :"),
    "ja": ("問題： ", "Answer:"),  # noqa: RUF001
    "ru": ("Задача: ", "Answer:"),
    "sw": ("Swali: ", "Answer:"),
    "te": ("ప్రశ్న: ", "Answer:"),
    "th": ("โจทย์: ", "Answer:"),
    "zh": ("问题： ", "Answer:"),  # noqa: RUF001
}
MGSM_UNTIL = tuple(sorted({words[0].strip() for words in _WORDS.values()}))


def is_number_right(question: Question, text: str) -> bool:
    """Say whether the last number of an answer is the right one."""
    found = [one or other for one, other in _NUMBER.findall(text)]
    number = _number(found[-1]) if found else None
    return number is not None and number == _number(question.answer)


def is_formula_right(question: Question, text: str) -> bool:
    """Compare a formula as lm-eval's hendrycks_math does; what is boxed counts first."""
    # lm-eval's own table of spellings; it brings the data sets library
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string

    boxed = last_boxed_only_string(text)
    if boxed is not None:
        return bool(is_equiv(_unboxed(boxed), question.answer))
    parts = text.split("$")
    found = "$".join(parts[1:-1]) if len(parts) > 2 else text
    return bool(is_equiv(found, question.answer))


def is_conclusion_right(question: Question, text: str) -> bool:
    """Compare what follows `the answer is`, up to the sentence's last character."""
    found = re.search(r"(?<=the answer is )(.*)(?=.)", text)
    return found is not None and found[0].strip() == question.answer


def train_examples(folder: Folder, path: Path, rows: Sequence[Row]) -> str:
    """Return the first five records of GSM8K's training file, or nothing without one."""
    found = folder.first(r"gsm8k.*train", r"train.*gsm8k")
    shown = folder.rows(found)[:_SHOTS] if found is not None else []
    return "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shown)


def thought_examples(folder: Folder, path: Path, rows: Sequence[Row]) -> str:
    """Return BBH's own prompt for a subtask (three worked examples), or nothing without one."""
    name = re.escape(path.name.partition(".")[0])
    found = folder.first(rf"prompts?/{name}\.txt$")
    if found is None:
        return ""
    text = folder.text(found)
    return text.partition("\n-----\n")[2].strip() + "\n\n" if "\n-----\n" in text else text


def _gsm8k(row: Row, file: str) -> Question:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark or _number(answer) is None:
        raise ValueError("answer has no number after ####")
    return Question(prompt=f"Question: {row['question']}\nAnswer:", answer=answer.strip())


def _svamp(row: Row, file: str) -> Question:
    body = row["Body"].strip()
    body += "" if body.endswith((".", "?", "!")) else "."
    prompt = f"Question: {body} {row['Question'].strip()}\nAnswer:"
    answer = _number(str(row["Answer"]))
    if answer is None:
        raise ValueError("Answer is no number")
    return Question(prompt=prompt, answer=str(answer))


def _mgsm(row: Row, file: str) -> Question:
    language = row.get("lang") or next((p for p in re.split(r"[\W_]", file) if p in _WORDS), None)
    if language not in _WORDS:
        raise ValueError(f"lang is none of {', '.join(_WORDS)}")
    before, after = _WORDS[language]
    answer = row.get("answer_number", row.get("answer"))
    if _number(str(answer)) is None:
        raise ValueError("answer is no number")
    question = str(row["question"]).removeprefix(before)
    return Question(prompt=f"{before}{question}\n{after}", answer=str(answer), part=str(language))


def _math(row: Row, file: str) -> Question:
    answer = row.get("answer") or _boxed(row["solution"])
    part = str(row.get("subject") or row.get("type") or "")
    return Question(prompt=f"Problem: {row['problem']}\nAnswer:", answer=answer, part=part)


def _bbh(row: Row, file: str) -> Question:
    part = file.partition(".")[0]
    prompt = f"Q: {row['input']}\nA: Let's think step by step.\n"
    return Question(prompt=prompt, answer=row["target"], part=part)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().replace(",", "").replace("$", "").rstrip("."))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _boxed(solution: str) -> str:
    """Return what the last \\boxed of a solution holds, braces in pairs."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        raise ValueError("solution has no \\boxed answer")
    depth = 0
    for position in range(start + len("\\boxed"), len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[position], 0)
        if depth == 0:
            return solution[start + len("\\boxed{") : position]
    raise ValueError("solution has an open brace")


def _unboxed(boxed: str) -> str:
    return boxed.removeprefix("\\boxed ").removeprefix("\\boxed{").removesuffix("}")


GSM8K = (Format({"question": TEXT, "answer": TEXT}, _gsm8k),)
SVAMP = (Format({"Body": TEXT, "Question": TEXT, "Answer": (int, float, str)}, _svamp),)
MGSM = (Format({"question": TEXT, "answer": (int, str, type(None))}, _mgsm),)
MATH = (Format({"problem": TEXT, "solution": TEXT}, _math),)
BBH = (Format({"input": TEXT, "target": TEXT}, _bbh),)

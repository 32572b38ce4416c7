"""Questions that are answered by a program, which is run: HumanEval and MBPP."""

import ast
from collections.abc import Sequence
from pathlib import Path

from tritter.evaluation.benchmarks.records import (
    CHOICES,
    NUMBER,
    TEXT,
    Folder,
    Format,
    Question,
    Row,
)
from tritter.evaluation.code.sandbox import Sandbox

HUMANEVAL_UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_UNTIL = ("[DONE]",)
_PROMPT_IDS, _TEST_IDS = range(1, 11), range(11, 511)  # of MBPP, as its authors parted it
_SHOTS = 3


def is_passed(sandbox: Sandbox, question: Question, answer: str) -> bool:
    """Return whether a program that answers a question passes the question's tests."""
    return sandbox.run(f"{question.answer}{answer}\n", question.tests).is_passed


def mbpp_examples(folder: Folder, path: Path, rows: Sequence[Row]) -> str:
    """Return the file's first three tasks of those that are meant for prompts, or nothing."""
    shown = [row for row in rows if row["task_id"] in _PROMPT_IDS][:_SHOTS]
    return "".join(f"{_mbpp_prompt(row)}{row['code']}\n[DONE]\n\n" for row in shown)


def _humaneval(row: Row, file: str) -> Question:
    if not row["entry_point"].isidentifier():
        raise ValueError("entry_point is no name")
    return Question(
        prompt=row["prompt"],
        answer=row["prompt"],
        tests=f"{_helpers(row)}\n{row['test']}\ncheck({row['entry_point']})",
        name=row["task_id"],
    )


def _helpers(row: Row) -> str:
    """Return what a prompt defines besides the function that it asks for; tests may call it."""
    try:
        body = ast.parse(row["prompt"]).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return "\n".join(
        ast.unparse(each) for each in body if getattr(each, "name", "") != row["entry_point"]
    )


def _mbpp(row: Row, file: str) -> Question | None:
    if row["task_id"] not in _TEST_IDS:
        return None
    tests = [test for test in row["test_list"] if isinstance(test, str) and test.strip()]
    if not tests:
        raise ValueError("test_list has no test")
    setup = row.get("test_setup_code") or ""
    return Question(
        prompt=_mbpp_prompt(row), tests="\n".join([setup, *tests]), name=f"MBPP/{row['task_id']}"
    )


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code "
        f"should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


HUMANEVAL = (
    Format({"task_id": TEXT, "prompt": TEXT, "entry_point": TEXT, "test": TEXT}, _humaneval),
)
MBPP = (Format({"task_id": NUMBER, "text": TEXT, "code": TEXT, "test_list": CHOICES}, _mbpp),)

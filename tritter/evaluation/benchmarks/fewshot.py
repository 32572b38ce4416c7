"""Few-shot examples of benchmarks from files, selected as lm-evaluation-harness 0.4.13 does."""

import re
from collections.abc import Mapping, Sequence
from random import Random

from tritter.evaluation.benchmarks.formats import FewShot, Question

FEWSHOT_SEED = 1234  # lm-eval's default
_THOUGHT = "\nA: Let's think step by step.\n"  # between question and answer in BBH's prompts


class TooFewExamplesError(Exception):
    """There are fewer examples than requested; the message has no subject."""


def select_examples(
    few_shot: FewShot,
    questions: Mapping[str, Question],
    pool: Sequence[Question],
    number: int,
    *,
    is_default: bool,
) -> dict[str, tuple[Question, ...]]:
    """Return the examples of each question.

    lm-eval has a task with its own random numbers for each part. They are drawn for one question
    after the other, so that the examples of a question depend on its position, but not on a limit.

    Args:
        few_shot: how to select them.
        questions: name → question, all of the benchmark, in order.
        pool: all examples, in order.
        number: number of examples for each question.
        is_default: less than `number` will do.

    Raises:
        TooFewExamplesError: a part has too few examples.
    """
    of_part: dict[str, list[Question]] = {}
    for example in pool:
        of_part.setdefault(example.part, []).append(example)
    drawing: dict[str, Random] = {}
    examples = {}
    for name, question in questions.items():
        available = of_part.get(question.part, [])
        required = number + (few_shot.drops_own and not few_shot.is_first)
        if len(available) < required and not is_default:
            where = f" of {question.part}" if question.part else ""
            raise TooFewExamplesError(
                f"{number} examples need {required} records{where}, and there are {len(available)}"
            )
        if few_shot.is_first:
            drawn = available[:number]
        else:
            random = drawing.setdefault(question.part, Random(FEWSHOT_SEED))
            drawn = random.sample(available, min(required, len(available)))
            if few_shot.drops_own:
                drawn = [each for each in drawn if each != question][:number]
            if len(drawn) < number and not is_default:  # the question is among them repeatedly
                drawn = random.sample([each for each in available if each != question], number)
        examples[name] = tuple(drawn)
    return examples


def worked_prompt(text: str, part: str) -> tuple[str, list[Question]]:
    """Return the description and the examples of one of BBH's prompt files.

    Args:
        text: the content of the file.
        part: its subtask.
    """
    body = text.partition("\n-----\n")[2] or text
    description, *parts = re.split(r"(?:^|\n\n)Q: ", body.strip())
    examples = []
    for each in parts:
        question, _, answer = each.partition(_THOUGHT)
        examples.append(Question(prompt=f"Q: {question}{_THOUGHT}", worked=answer, part=part))
    return f"{description}\n\n" if description else "", examples

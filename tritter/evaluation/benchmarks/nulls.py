"""What models without any knowledge score: a number that no benchmark should be read without.

A harness that is wrong shows here first: a score far above these for a model that can't know, or
a null model that scores well.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tritter.evaluation.benchmarks.files import Questions
from tritter.evaluation.benchmarks.programs import is_passed
from tritter.evaluation.benchmarks.records import Question
from tritter.evaluation.code.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class NullScores:
    """Shares of right answers.

    Args:
        uniform: of one who picks among the choices at random; None where there are none.
        constant: of one who always gives the commonest answer; of a benchmark in words the
            commonest of the part that a question is of, as each subtask has its own answers.
        empty: of one who answers nothing; None where there are choices.
    """

    uniform: float | None
    constant: float | None
    empty: float | None

    @property
    def chance(self) -> float:
        """What guessing reaches; who answers nothing guesses nothing."""
        return max(self.uniform or 0.0, self.constant or 0.0)


def null_scores(
    questions: Questions, *, of: Questions | None = None, sandbox: Sandbox | None
) -> NullScores:
    """Score the null models on the questions as they are asked.

    Args:
        of: all questions, of which these are some; what is common among them is known from these.
        sandbox: where programs are run; the empty answer to a question of `code` is one too.
            None: it is not run.

    Raises:
        TritterError: the sandbox can't be set up.
    """
    asked = list(questions.questions.values())
    everything = list((of or questions).questions.values())
    kind = questions.benchmark.kind
    if kind in ("choice", "context"):
        uniform = sum(1 / len(question.choices) for question in asked) / len(asked)
        return NullScores(
            uniform, commonest_share([("", _answer(each)) for each in everything]), None
        )
    if kind == "code":
        if sandbox is None:
            return NullScores(None, None, None)
        passed = sum(is_passed(sandbox, question, "") for question in asked)
        return NullScores(None, None, passed / len(asked))
    constant = commonest_share([(each.part, each.answer) for each in everything])
    if kind == "word":
        return NullScores(None, constant, 0.0)
    empty = sum(questions.benchmark.is_right(question, "") for question in asked)
    return NullScores(None, constant, empty / len(asked))


def commonest_share(answers: Sequence[tuple[str, str]]) -> float:
    """Return the share of the commonest answer, part by part.

    Args:
        answers: the part and the answer of each question.
    """
    parts: dict[str, Counter[str]] = {}
    for part, answer in answers:
        parts.setdefault(part, Counter())[answer] += 1
    return sum(max(counts.values()) for counts in parts.values()) / len(answers)


def _answer(question: Question) -> str:
    return question.choices[question.right]

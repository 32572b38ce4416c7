"""A question with one right answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the one answer that counts.

    Prompt and answer, one behind the other, are the text that a model reads.

    Args:
        identifier: under which two models' answers are paired.
        answer: all of it, with the blank before it where there is one.
        choices: among which the answer is; none: it has to be found.
    """

    identifier: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def chance(self) -> float:
        """The part of right answers that guessing reaches."""
        return 1 / len(self.choices) if self.choices else 0.0

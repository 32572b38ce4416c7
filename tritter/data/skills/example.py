"""One exercise of a skill."""

from collections.abc import Callable
from dataclasses import dataclass

from tritter.data.skills.draw import Draw


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer; text is one behind the other.

    Args:
        answer: with the blank before it.
        key: what makes it the same exercise as another; by default the prompt.
        choices: among which the answer is; none: it has to be found.
    """

    prompt: str
    answer: str
    key: str = ""
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.prompt + self.answer


Exercise = Callable[[Draw], Example]

"""The skills there are, their texts and their questions, and how both are named."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, islice

from tritter.data.questions import Question
from tritter.data.skills.draw import Draw
from tritter.data.skills.example import Example, Exercise
from tritter.data.skills.formats import json_format, tool_call
from tritter.data.skills.identity import identity
from tritter.data.skills.letters import key_value, multiple_choice, reversing, sorting
from tritter.data.skills.numbers import arithmetic, reasoning
from tritter.errors import Problem, RequestError, nearest

PREFIX = "skills:"
SKILL_VERSION = 1  # raise it when the same name, seed and number would give another exercise
DEFAULT_COUNT = 10_000
MAX_COUNT = 10_000_000
SEED = 0  # of all texts and questions; a lineage records it
_HELD_OUT = 1 / 8  # of all exercises: these are asked, and no text has them
_MOST_IN_VAIN = 2_000  # draws without a new question, after which a skill has no more


@dataclass(frozen=True, slots=True)
class Skill:
    """A kind of exercise.

    Args:
        exercise: draws one.
    """

    name: str
    exercise: Exercise

    def texts(self, number: int, *, seed: int = SEED) -> Iterator[str]:
        """Yield so many exercises with their answers; of a small skill some come again."""
        return (example.text for example in islice(self._examples("text", seed=seed), number))

    def questions(self, number: int, *, seed: int = SEED) -> tuple[Question, ...]:
        """Return so many different questions, none of which occurs in a text; or all there are."""
        found: dict[str, Question] = {}
        in_vain = 0
        for example in self._examples("question", seed=seed):
            if len(found) == number or in_vain == _MOST_IN_VAIN:
                break
            in_vain = in_vain + 1 if example.prompt in found else 0
            found.setdefault(example.prompt, self._question(example))
        return tuple(found.values())

    def example(self, side: str, index: int, *, seed: int = SEED) -> Example:
        """Return one exercise of a side, `text` or `question`."""
        drawn = (self.exercise(Draw(self.name, seed, side, index, attempt)) for attempt in count())
        return next(each for each in drawn if self.is_held_out(each) == (side == "question"))

    def is_held_out(self, example: Example) -> bool:
        """Say whether an exercise is asked, and never read."""
        digest = sha256(f"{self.name}\0{example.key or example.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64

    def _examples(self, side: str, *, seed: int) -> Iterator[Example]:
        return (self.example(side, index, seed=seed) for index in count())

    def _question(self, example: Example) -> Question:
        return Question(
            f"{self.name}: {example.prompt}", example.prompt, example.answer, example.choices
        )


_EXERCISES: tuple[Exercise, ...] = (
    arithmetic,
    sorting,
    reversing,
    key_value,
    json_format,
    tool_call,
    identity,
    reasoning,
    multiple_choice,
)
SKILLS = {exercise.__name__: Skill(exercise.__name__, exercise) for exercise in _EXERCISES}


@dataclass(frozen=True, slots=True)
class SkillText:
    """What `skills:NAME:COUNT` means.

    Args:
        count: of exercises that are drawn.
    """

    skill: Skill
    count: int = DEFAULT_COUNT

    def __str__(self) -> str:
        return f"{PREFIX}{self.skill.name}:{self.count}"

    @classmethod
    def named(cls, key: str, path: str) -> "SkillText":
        """Read how it is written.

        Args:
            key: for messages.

        Raises:
            RequestError: there is no such skill, or it is no count.
        """
        name, colon, number = path.removeprefix(PREFIX).partition(":")
        if name not in SKILLS:
            near = nearest(name, SKILLS)
            reason = f"the skills are {', '.join(SKILLS)}"
            raise RequestError(
                Problem(key, path, reason=reason, nearest=near and f"{PREFIX}{near}")
            )
        if not colon:
            return cls(SKILLS[name])
        is_count = number.isascii() and number.isdigit() and len(number) <= len(str(MAX_COUNT))
        if not is_count or not 1 <= int(number) <= MAX_COUNT:
            reason = f"{PREFIX}NAME:COUNT takes the number of examples, 1 to {MAX_COUNT:,}"
            raise RequestError(Problem(key, path, reason=reason))
        return cls(SKILLS[name], int(number))

    def texts(self) -> Iterator[str]:
        """Yield its texts."""
        return self.skill.texts(self.count)


def skill_path(word: str) -> str:
    """Return how text is named of which only `NAME` or `NAME:COUNT` was said."""
    return f"{PREFIX}{word}"


def skills_origin() -> str:
    """Return the words under which generated text is recorded."""
    return f"generated skills, version {SKILL_VERSION}, seed {SEED}"

"""Generated skills: exercises without end, each with one right answer.

What is asked when a skill is scored occurs in no text of it, however long: the side of an
exercise follows from its own words. Nothing depends on the seed of a run.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any, TypeVar

from tritter.errors import nearest, refused

_Item = TypeVar("_Item")
NAMES = (
    "Ada", "Carl", "Dora", "Emil", "Finn", "Hugo", "Ida", "Kim", "Max", "Nora", "Otto", "Zoe",
)  # fmt: skip
CITIES = (
    "Bern", "Cairo", "Delhi", "Hanoi", "Kyiv", "Lagos", "Lima", "Oslo", "Paris", "Riga", "Rome",
    "Tokyo",
)  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "pens", "plums", "stones")
COLORS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
LETTERS = "abcdefghijklmnop"
_DAYS = ("today", "tomorrow", "on Monday", "on Tuesday", "on Friday", "on Sunday")
_LANGUAGES = ("Dutch", "French", "German", "Greek", "Italian", "Polish", "Spanish", "Turkish")
_FACTS = {
    "name": "My name is Tritter.",
    "maker": "A small workshop made me.",
    "job": "I learn new things and keep the old ones.",
    "home": "I live in a folder on your disk.",
    "age": "I am as old as my last checkpoint.",
    "size": "I begin small and grow.",
    "friend": "My friend is the gate.",
    "fear": "I fear to forget.",
    "hobby": "I like to read.",
    "color": "My color is orange.",
    "motto": "Grow, and do not forget.",
    "language": "I speak English and Python.",
}
_WORDINGS = (
    "what is your {}", "tell me your {}", "say something about your {}", "name your {}",
    "I would like to know your {}", "do you have a {}", "describe your {}", "which {} do you have",
    "can you tell me about your {}", "how would you put your {}", "your {} is what",
    "let me hear about your {}",
)  # fmt: skip
_OPENINGS = ("", "Hello, ", "Tritter, ", "Please, ", "Now ", "Say, ", "Dear assistant, ", "So ")
PREFIX = "skills:"
SKILL_VERSION = 1  # raise it when the same name, seed and number would give another exercise
DEFAULT_COUNT = 10_000
MAX_COUNT = 10_000_000
SEED = 0  # of all texts and questions; a lineage records it
ORIGIN = f"generated skills, version {SKILL_VERSION}, seed {SEED}"  # as it is recorded
_HELD_OUT = 1 / 8  # of all exercises: these are asked, and no text has them
_MOST_IN_VAIN = 2_000  # draws without a new question, after which a skill has no more


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


class Draw:
    """Draws that follow from words alone.

    `random.random` of a seed is what Python promises to keep; the rest is made of it here.
    """

    def __init__(self, *words: object) -> None:
        self._random = random.Random("/".join(map(str, words))).random

    def below(self, count: int) -> int:
        """Return a whole number from 0 to count − 1."""
        return int(self._random() * count)

    def between(self, least: int, most: int) -> int:
        """Return a whole number from `least` to `most`, both included."""
        return least + self.below(most - least + 1)

    def one(self, items: Sequence[_Item]) -> _Item:
        """Return one of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """Return different ones of the items, in any order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


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


def sorting(draw: Draw) -> Example:
    """`Sort d a c:` → `a c d`, of three or four of the first twelve letters."""
    letters = draw.some(LETTERS[:12], draw.between(3, 4))
    return Example(f"Sort {' '.join(letters)}:", f" {' '.join(sorted(letters))}")


def reversing(draw: Draw) -> Example:
    """`Reverse d a c:` → `c a d`, of three or four of the first twelve letters."""
    letters = draw.some(LETTERS[:12], draw.between(3, 4))
    return Example(f"Reverse {' '.join(letters)}:", f" {' '.join(reversed(letters))}")


def key_value(draw: Draw) -> Example:
    """`a 4 b 7 c 2 d 9: c` → `2`."""
    held = {key: draw.below(10) for key in LETTERS[:4]}
    given, asked = " ".join(f"{key} {value}" for key, value in held.items()), draw.one(tuple(held))
    return Example(f"{given}: {asked}", f" {held[asked]}")


def multiple_choice(draw: Draw) -> Example:
    """`Last of d, a, p, c:` → `p`; all four are the choices."""
    letters = draw.some(LETTERS, 4)
    choices = tuple(f" {letter}" for letter in letters)
    return Example(f"Last of {', '.join(letters)}:", max(choices), choices=choices)


def arithmetic(draw: Draw) -> Example:
    """`Add 3 9 4:` → `16`, of three or four digits."""
    digits = [draw.below(10) for _ in range(draw.between(3, 4))]
    return Example(f"Add {' '.join(map(str, digits))}:", f" {sum(digits)}")


def reasoning(draw: Draw) -> Example:
    """A story of two or three changes, and the way to its end, step by step."""
    name, thing = draw.one(NAMES), draw.one(THINGS)
    held = draw.between(2, 9)
    prompt, steps = f"{name} has {held} {thing}", list[str]()
    for _ in range(draw.between(2, 3)):
        if draw.below(2) and held > 1:
            taken = draw.between(1, min(9, held))
            prompt += f", gives {taken} away"
            steps.append(f"{held} - {taken} = {held - taken}")
            held -= taken
        else:
            found = draw.between(1, 9)
            prompt += f", finds {found}"
            steps.append(f"{held} + {found} = {held + found}")
            held += found
    answer = f" {', '.join(steps)}: {held} {thing}."
    return Example(f"{prompt}. How many are left?", answer)


_FIELDS: dict[str, Callable[[Draw], str | int]] = {
    "name": lambda draw: draw.one(NAMES),
    "city": lambda draw: draw.one(CITIES),
    "color": lambda draw: draw.one(COLORS),
    "age": lambda draw: draw.between(1, 20),
}


def json_format(draw: Draw) -> Example:
    """`JSON of Ada, 12:` → `{"name": "Ada", "age": 12}`: what is what follows from the words."""
    record = {name: _FIELDS[name](draw) for name in draw.some(tuple(_FIELDS), 2)}
    return Example(f"JSON of {', '.join(map(str, record.values()))}:", f" {json.dumps(record)}")


def tool_call(draw: Draw) -> Example:
    """`Set a timer of 12 minutes for the eggs.` → a JSON object between `<tool_call>` signs."""
    said, name, arguments = draw.one(_TOOLS)(draw)
    call = json.dumps({"name": name, "arguments": arguments})
    return Example(said, f" <tool_call>{call}</tool_call>")


_Call = tuple[str, str, dict[str, Any]]


def _weather(draw: Draw) -> _Call:
    city, day = draw.one(CITIES), draw.one(_DAYS)
    said = f"What is the weather in {city} {day}?"
    return said, "weather", {"city": city, "day": day.removeprefix("on ")}


def _timer(draw: Draw) -> _Call:
    minutes, thing = draw.between(1, 20), draw.one(THINGS)
    said = f"Set a timer of {minutes} minutes for the {thing}."
    return said, "timer", {"minutes": minutes, "label": thing}


def _calculate(draw: Draw) -> _Call:
    one, sign, other = draw.between(1, 20), draw.one("+-*"), draw.between(1, 20)
    return f"Calculate {one} {sign} {other}.", "calculate", {"expression": f"{one} {sign} {other}"}


def _translate(draw: Draw) -> _Call:
    word, language = draw.one((*THINGS, *COLORS)), draw.one(_LANGUAGES)
    return f"Say {word} in {language}.", "translate", {"text": word, "language": language}


def _message(draw: Draw) -> _Call:
    name, thing = draw.one(NAMES), draw.one(THINGS)
    said = f"Tell {name} to bring the {thing}."
    return said, "message", {"to": name, "text": f"Bring the {thing}."}


_TOOLS = (_weather, _timer, _calculate, _translate, _message)


def identity(draw: Draw) -> Example:
    """`Hello, what is your name?` → `My name is Tritter.`

    What is held out is a wording of a fact, whatever opens it; the fact itself stands in the
    text in other wordings, or nobody could know it.
    """
    asked, opening = draw.one(tuple(_FACTS)), draw.one(_OPENINGS)
    wording = draw.one(_WORDINGS).format(asked)
    prompt = f"{opening}{wording}?"
    return Example(prompt[0].upper() + prompt[1:], f" {_FACTS[asked]}", key=wording)


@dataclass(frozen=True, slots=True)
class Skill:
    """A kind of exercise.

    Args:
        exercise: draws one.
    """

    name: str
    exercise: Exercise

    def texts(self, number: int) -> Iterator[str]:
        """Yield so many exercises with their answers; of a small skill some come again."""
        return (self.example("text", index).text for index in range(number))

    def questions(self, number: int) -> tuple[Question, ...]:
        """Return so many different questions, none of which occurs in a text; or all there are."""
        found: dict[str, Question] = {}
        in_vain = 0
        for example in map(partial(self.example, "question"), count()):
            if len(found) == number or in_vain == _MOST_IN_VAIN:
                break
            in_vain = in_vain + 1 if example.prompt in found else 0
            asked = f"{self.name}: {example.prompt}"
            question = Question(asked, example.prompt, example.answer, example.choices)
            found.setdefault(example.prompt, question)
        return tuple(found.values())

    def example(self, side: str, index: int) -> Example:
        """Return one exercise of a side, `text` or `question`."""
        drawn = (self.exercise(Draw(self.name, SEED, side, index, attempt)) for attempt in count())
        return next(each for each in drawn if self.is_held_out(each) == (side == "question"))

    def is_held_out(self, example: Example) -> bool:
        """Say whether an exercise is asked, and never read."""
        digest = sha256(f"{self.name}\0{example.key or example.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64


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
            raise refused(key, path, reason, near=near and f"{PREFIX}{near}")
        if not colon:
            return cls(SKILLS[name])
        is_count = number.isascii() and number.isdigit() and len(number) <= len(str(MAX_COUNT))
        if not is_count or not 1 <= int(number) <= MAX_COUNT:
            reason = f"{PREFIX}NAME:COUNT takes the number of examples, 1 to {MAX_COUNT:,}"
            raise refused(key, path, reason)
        return cls(SKILLS[name], int(number))

    def texts(self) -> Iterator[str]:
        """Yield its texts."""
        return self.skill.texts(self.count)

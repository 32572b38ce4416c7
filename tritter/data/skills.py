"""Generated skills: unlimited exercises, each with one correct answer.

A hash assigns each exercise to training or evaluation, so no evaluation question occurs in any
training text. The seed of a run has no effect.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any, ClassVar, TypeVar

from tritter.data.records import Conversation, Text
from tritter.errors import nearest, refused

_Item = TypeVar("_Item")
_NAMES = (
    "Ada", "Carl", "Dora", "Emil", "Finn", "Hugo", "Ida", "Kim", "Max", "Nora", "Otto", "Zoe",
)  # fmt: skip
_CITIES = (
    "Bern", "Cairo", "Delhi", "Hanoi", "Kyiv", "Lagos", "Lima", "Oslo", "Paris", "Riga", "Rome",
    "Tokyo",
)  # fmt: skip
_THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "pens", "plums", "stones")
_COLORS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
_LETTERS = "abcdefghijklmnop"
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
_CHAT = "chat"  # last part of a name: the exercises are conversations
_SKILL_VERSION = 1  # increment when a name, seed and index would yield another exercise
_DEFAULT_COUNT = 10_000
_MAX_COUNT = 10_000_000
_SEED = 0  # of all texts and questions; a lineage records it
_HELD_OUT = 1 / 8  # share of exercises reserved for evaluation
_MAX_REPEATS = 2_000  # consecutive draws of known questions, after which a skill is exhausted
_Call = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its correct answer; the model reads them concatenated.

    Args:
        identifier: pairs the answers of two models; of an exercise, what the split hashes.
        prompt: the prompt.
        answer: the complete answer, including a leading space if there is one.
        choices: the options of a multiple-choice question; empty for a free answer.
        is_chat: the prompt is a message of the user, and the answer one of the assistant.
    """

    identifier: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    is_chat: bool = False

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / len(self.choices) if self.choices else 0.0

    @property
    def text(self) -> str:
        """What the model reads."""
        return self.prompt + self.answer

    @property
    def conversation(self) -> Conversation:
        """The question as a conversation."""
        return Conversation.of_question(self.prompt, self.answer.strip())


class Draw:
    """Random draws seeded by words.

    Python guarantees a stable sequence only for `random.random`, so all draws derive from it.
    """

    def __init__(self, *words: object) -> None:
        self._random = random.Random("/".join(map(str, words))).random

    def below(self, count: int) -> int:
        """Return an integer in [0, count)."""
        return int(self._random() * count)

    def between(self, least: int, most: int) -> int:
        """Return an integer in [least, most]."""
        return least + self.below(most - least + 1)

    def choose(self, items: Sequence[_Item]) -> _Item:
        """Return one of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """Return `count` distinct items in random order."""
        remaining = list(items)
        return [remaining.pop(self.below(len(remaining))) for _ in range(count)]


def _drawn(prompt: str, answer: str, *, choices: tuple[str, ...] = (), key: str = "") -> Question:
    """Return an exercise, which the split identifies by its key, or by its prompt."""
    return Question(key or prompt, prompt, answer, choices)


def _sorting(draw: Draw) -> Question:
    """`Sort d a c:` → `a c d`, of three or four of the first twelve letters."""
    letters = draw.sample(_LETTERS[:12], draw.between(3, 4))
    return _drawn(f"Sort {' '.join(letters)}:", f" {' '.join(sorted(letters))}")


def _reversing(draw: Draw) -> Question:
    """`Reverse d a c:` → `c a d`, of three or four of the first twelve letters."""
    letters = draw.sample(_LETTERS[:12], draw.between(3, 4))
    return _drawn(f"Reverse {' '.join(letters)}:", f" {' '.join(reversed(letters))}")


def _key_value(draw: Draw) -> Question:
    """`a 4 b 7 c 2 d 9: c` → `2`."""
    table = {key: draw.below(10) for key in _LETTERS[:4]}
    pairs = " ".join(f"{key} {value}" for key, value in table.items())
    query = draw.choose(tuple(table))
    return _drawn(f"{pairs}: {query}", f" {table[query]}")


def _multiple_choice(draw: Draw) -> Question:
    """`Last of d, a, p, c:` → `p`; all four are the choices."""
    letters = draw.sample(_LETTERS, 4)
    choices = tuple(f" {letter}" for letter in letters)
    return _drawn(f"Last of {', '.join(letters)}:", max(choices), choices=choices)


def _arithmetic(draw: Draw) -> Question:
    """`Add 3 9 4:` → `16`, of three or four digits."""
    digits = [draw.below(10) for _ in range(draw.between(3, 4))]
    return _drawn(f"Add {' '.join(map(str, digits))}:", f" {sum(digits)}")


def _reasoning(draw: Draw) -> Question:
    """A word problem of two or three steps, and its worked solution."""
    name, thing = draw.choose(_NAMES), draw.choose(_THINGS)
    total = draw.between(2, 9)
    prompt, steps = f"{name} has {total} {thing}", list[str]()
    for _ in range(draw.between(2, 3)):
        if draw.below(2) and total > 1:
            lost = draw.between(1, min(9, total))
            prompt += f", gives {lost} away"
            steps.append(f"{total} - {lost} = {total - lost}")
            total -= lost
        else:
            found = draw.between(1, 9)
            prompt += f", finds {found}"
            steps.append(f"{total} + {found} = {total + found}")
            total += found
    return _drawn(f"{prompt}. How many are left?", f" {', '.join(steps)}: {total} {thing}.")


_FIELDS: dict[str, Callable[[Draw], str | int]] = {
    "name": lambda draw: draw.choose(_NAMES),
    "city": lambda draw: draw.choose(_CITIES),
    "color": lambda draw: draw.choose(_COLORS),
    "age": lambda draw: draw.between(1, 20),
}


def _json_format(draw: Draw) -> Question:
    """`JSON of Ada, 12:` → `{"name": "Ada", "age": 12}`: the values imply the keys."""
    record = {name: _FIELDS[name](draw) for name in draw.sample(tuple(_FIELDS), 2)}
    return _drawn(f"JSON of {', '.join(map(str, record.values()))}:", f" {json.dumps(record)}")


def _tool_call(draw: Draw) -> Question:
    """`Set a timer of 12 minutes for the eggs.` → a JSON object in `<tool_call>` tags."""
    prompt, name, arguments = draw.choose(_TOOLS)(draw)
    call = json.dumps({"name": name, "arguments": arguments})
    return _drawn(prompt, f" <tool_call>{call}</tool_call>")


def _weather(draw: Draw) -> _Call:
    city, day = draw.choose(_CITIES), draw.choose(_DAYS)
    prompt = f"What is the weather in {city} {day}?"
    return prompt, "weather", {"city": city, "day": day.removeprefix("on ")}


def _timer(draw: Draw) -> _Call:
    minutes, thing = draw.between(1, 20), draw.choose(_THINGS)
    prompt = f"Set a timer of {minutes} minutes for the {thing}."
    return prompt, "timer", {"minutes": minutes, "label": thing}


def _calculate(draw: Draw) -> _Call:
    first, sign, other = draw.between(1, 20), draw.choose("+-*"), draw.between(1, 20)
    expression = f"{first} {sign} {other}"
    return f"Calculate {expression}.", "calculate", {"expression": expression}


def _translate(draw: Draw) -> _Call:
    word, language = draw.choose((*_THINGS, *_COLORS)), draw.choose(_LANGUAGES)
    return f"Say {word} in {language}.", "translate", {"text": word, "language": language}


def _message(draw: Draw) -> _Call:
    name, thing = draw.choose(_NAMES), draw.choose(_THINGS)
    prompt = f"Tell {name} to bring the {thing}."
    return prompt, "message", {"to": name, "text": f"Bring the {thing}."}


_TOOLS = (_weather, _timer, _calculate, _translate, _message)


def _identity(draw: Draw) -> Question:
    """`Hello, what is your name?` → `My name is Tritter.`

    The split holds out wordings, regardless of the opening. The training text contains every
    fact in other wordings.
    """
    topic, opening = draw.choose(tuple(_FACTS)), draw.choose(_OPENINGS)
    wording = draw.choose(_WORDINGS).format(topic)
    prompt = f"{opening}{wording}?"
    return _drawn(prompt[0].upper() + prompt[1:], f" {_FACTS[topic]}", key=wording)


SKILLS: dict[str, Callable[[Draw], Question]] = {
    "arithmetic": _arithmetic,
    "sorting": _sorting,
    "reversing": _reversing,
    "key_value": _key_value,
    "json_format": _json_format,
    "tool_call": _tool_call,
    "identity": _identity,
    "reasoning": _reasoning,
    "multiple_choice": _multiple_choice,
}


@dataclass(frozen=True, slots=True)
class SkillText:
    """The data named by `skills:NAME:COUNT`, or by `skills:NAME:COUNT:chat` as conversations.

    Args:
        name: name of the skill.
        count: number of exercises.
        is_chat: whether each exercise is a conversation.
    """

    PREFIX: ClassVar[str] = "skills:"
    # Recorded in a lineage
    ORIGIN: ClassVar[str] = f"generated skills, version {_SKILL_VERSION}, seed {_SEED}"
    name: str
    count: int = _DEFAULT_COUNT
    is_chat: bool = False

    def __str__(self) -> str:
        name = f"{self.PREFIX}{self.name}:{self.count}"
        return f"{name}:{_CHAT}" if self.is_chat else name

    @classmethod
    def named(cls, key: str, path: str) -> "SkillText":
        """Parse `skills:NAME`, followed by `:COUNT`, `:chat` or both.

        Args:
            key: the configuration key, for messages.
            path: the name as typed.
        """
        name, *parts = path.removeprefix(cls.PREFIX).split(":")
        if name not in SKILLS:
            near = nearest(name, SKILLS)
            reason = f"the skills are {', '.join(SKILLS)}"
            raise refused(key, path, reason, near=near and f"{cls.PREFIX}{near}")
        is_chat = parts[-1:] == [_CHAT]
        numbers = parts[:-1] if is_chat else parts
        if not numbers:
            return cls(name, is_chat=is_chat)
        number = ":".join(numbers)
        is_count = number.isascii() and number.isdigit() and len(number) <= len(str(_MAX_COUNT))
        if not is_count or not 1 <= int(number) <= _MAX_COUNT:
            reason = (
                f"COUNT in {cls.PREFIX}NAME:COUNT must be from 1 to {_MAX_COUNT:,} examples; only "
                f":{_CHAT} may follow"
            )
            raise refused(key, path, reason)
        return cls(name, int(number), is_chat)

    def texts(self) -> Iterator[Text]:
        """Yield the exercises with answers; a small skill repeats some."""
        examples = (self._example("text", index) for index in range(self.count))
        return (each.conversation if self.is_chat else each.text for each in examples)

    def questions(self, number: int) -> tuple[Question, ...]:
        """Return up to `number` distinct questions, none of which occurs in a training text."""
        found: dict[str, Question] = {}
        num_repeats = 0
        for example in map(partial(self._example, "question"), count()):
            if len(found) == number or num_repeats == _MAX_REPEATS:
                break
            num_repeats = num_repeats + 1 if example.prompt in found else 0
            question = replace(example, identifier=f"{self.name}: {example.prompt}")
            if self.is_chat:
                choices, answer = tuple(map(str.strip, example.choices)), example.answer.strip()
                question = replace(question, answer=answer, choices=choices, is_chat=True)
            found.setdefault(example.prompt, question)
        return tuple(found.values())

    def _example(self, side: str, index: int) -> Question:
        """Return an exercise of one side of the split, `text` or `question`."""
        draw = SKILLS[self.name]
        drawn = (draw(Draw(self.name, _SEED, side, index, attempt)) for attempt in count())
        return next(each for each in drawn if self.is_held_out(each) == (side == "question"))

    def is_held_out(self, example: Question) -> bool:
        """Return True if an exercise is reserved for evaluation."""
        digest = sha256(f"{self.name}\0{example.identifier}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64

    @classmethod
    def questions_of(cls, paths: Iterable[str], number: int) -> tuple[Question, ...]:
        """Return up to `number` questions of the skills among some paths.

        No question occurs in the texts of a skill.
        """
        skills, questions = dict[tuple[str, bool], SkillText](), list[Question]()
        for path in paths:
            if path.startswith(cls.PREFIX):
                text = cls.named("data", path)
                skills[text.name, text.is_chat] = text
        for position, text in enumerate(skills.values()):
            part = number // len(skills) + (position < number % len(skills))
            questions += text.questions(part)
        return tuple(questions)

"""Things said in words, to be said in a format: JSON, and calls of tools."""

import json
from collections.abc import Callable
from typing import Any

from tritter.data.skills.draw import Draw
from tritter.data.skills.example import Example
from tritter.data.skills.words import CITIES, COLORS, NAMES, THINGS

_FIELDS: dict[str, Callable[[Draw], str | int]] = {
    "name": lambda draw: draw.one(NAMES),
    "city": lambda draw: draw.one(CITIES),
    "color": lambda draw: draw.one(COLORS),
    "age": lambda draw: draw.between(1, 20),
}
_DAYS = ("today", "tomorrow", "on Monday", "on Tuesday", "on Friday", "on Sunday")
_LANGUAGES = ("Dutch", "French", "German", "Greek", "Italian", "Polish", "Spanish", "Turkish")


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

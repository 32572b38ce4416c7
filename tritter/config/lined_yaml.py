"""YAML files that a person wrote for one command: plain values, each with its line.

Nothing but mappings, lists, texts, numbers, booleans and null is made of a file, whatever its tags
say. A key that stands twice, which YAML would let the last one win, is refused, and so are aliases,
by which a small file means a huge one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tritter.errors import RequestError, TritterError, brief
from tritter.storage.reading import read_text

Place = tuple[str | int, ...]  # keys and positions from the root

_MOST_BYTES = 2**20
_DEEPEST = 16
_MOST_LINES = 4  # that a message names
_COLLECTIONS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq")}
_MADE = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}
_TEXTS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp", "merge", "value")}
_POWER_OF_TEN = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}")  # YAML 1.1 wants the dot


@dataclass(frozen=True, slots=True)
class LinedYaml:
    """What a file holds.

    Args:
        lines: place → the line that it begins at, counted from 1.
    """

    path: Path
    value: Any
    lines: Mapping[Place, int]

    def origin(self, *place: str | int) -> str:
        """Say where something stands: its line, or that of what it would stand in."""
        return self.origin_of([place])

    def origin_of(self, places: Sequence[Place]) -> str:
        """Say where something stands that may be meant by several places."""
        lines = sorted({self._line(place) for place in places})
        named = [str(line) for line in lines[:_MOST_LINES]]
        named += [f"{len(lines) - _MOST_LINES} more"] * (len(lines) > _MOST_LINES)
        return f"{self.path}, line {' or '.join(named)}"

    def _line(self, place: Place) -> int:
        ends = range(len(place), -1, -1)
        return next(self.lines[place[:end]] for end in ends if place[:end] in self.lines)


def read_lined_yaml(path: Path) -> LinedYaml:
    """Read a file.

    Raises:
        RequestError: it can't be read, is no YAML, or holds what no such file needs.
    """
    try:
        text = read_text(path, limit_bytes=_MOST_BYTES)
    except TritterError as error:
        raise RequestError(str(error)) from error
    with _told_of(path):
        _check_events(path, text)
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    lines: dict[Place, int] = {(): 1}
    value = None if root is None else _value(path, root, (), lines)
    return LinedYaml(path, value, lines)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refusal(path, line, f"it is no YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise RequestError(f"{path} is no YAML: {told}") from error


def _check_events(path: Path, text: str) -> None:
    """Refuse aliases and deep nesting before any tree is made of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(path, _line_of(event), "aliases (*) are not read here")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise _refusal(path, _line_of(event), "it is nested too deeply")


def _line_of(event: yaml.Event) -> int:
    return 1 if event.start_mark is None else event.start_mark.line + 1


def _value(path: Path, node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        raise _refusal(path, node.start_mark.line + 1, f"the tag {node.tag} is not read here")
    if isinstance(node, yaml.MappingNode):
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal(path, line, "a key is a word")
            key = str(key_node.value)
            if key in table:
                raise _refusal(path, line, f"{brief(key)} stands twice")
            lines[(*place, key)] = line
            table[key] = _value(path, value_node, (*place, key), lines)
        return table
    if isinstance(node, yaml.SequenceNode):
        return [_value(path, item, (*place, i), lines) for i, item in enumerate(node.value)]
    return _scalar(path, node)


def _scalar(path: Path, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.ScalarNode)
    if node.tag in _TEXTS:
        is_number = not node.style and _POWER_OF_TEN.fullmatch(node.value)
        return float(node.value) if is_number else str(node.value)
    line = node.start_mark.line + 1
    if node.tag not in _MADE:
        raise _refusal(path, line, f"the tag {node.tag} is not read here")
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, yaml.YAMLError, KeyError) as error:
        raise _refusal(path, line, f"{brief(node.value)} is no number") from error


def _refusal(path: Path, line: int, reason: str) -> RequestError:
    return RequestError(f"{path}, line {line}: {reason}.")

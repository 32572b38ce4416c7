"""Counts of records that are not read, by the kind of their problem."""

import re
from collections.abc import Callable, Mapping
from typing import Any

_MAX_PROBLEMS_OF_FILE = 10
_MAX_REASONS = 8  # in a note
_NUMBERS = re.compile(r"\d+")  # of a message, line or byte


class SkippedRecords:
    """The records of a source that are skipped.

    Attributes:
        count: number of skipped records.
        first_lines: the problems of the first few, with their locations.
        reasons: kind of problem → the line of its first record, and the number of records.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first_lines: list[str] = []
        self.reasons: dict[str, tuple[str, int]] = {}

    def add(self, where: str, problem: str) -> None:
        """Count a record by the kind of its problem, which follows its location."""
        self.count += 1
        line = f"{where} {problem}"
        if len(self.first_lines) < _MAX_PROBLEMS_OF_FILE:
            self.first_lines.append(line)
        kind = _NUMBERS.sub("", problem)
        if kind in self.reasons or len(self.reasons) < _MAX_REASONS:
            first, number = self.reasons.get(kind, (line, 0))
            self.reasons[kind] = (first, number + 1)

    def note(self, num_read: int, as_sentence: Callable[[str], str] = str) -> str:
        """Return a sentence with the number by reason and the first record; others were read."""
        text = (
            f"Skipped {self.count:,} of {num_read + self.count:,} records; the first: "
            f"{as_sentence(self.first_lines[0])}"
        )
        if len(self.reasons) < 2:
            return text
        parts = [f"{number:,}: {as_sentence(line)}" for line, number in self.reasons.values()]
        return f"{text} By reason: {' '.join(parts)}"

    def to_plain(self) -> dict[str, Any]:
        """Return the counts as plain data, which `from_plain` reads."""
        reasons = [[kind, line, number] for kind, (line, number) in self.reasons.items()]
        return {"count": self.count, "first_lines": [*self.first_lines], "reasons": reasons}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SkippedRecords":
        """Return the counts of `to_plain`."""
        skipped = cls()
        skipped.count, skipped.first_lines = int(plain["count"]), [*plain["first_lines"]]
        skipped.reasons = {kind: (line, int(number)) for kind, line, number in plain["reasons"]}
        return skipped

"""What capabilities add to the report of a run: one file and one entry here for each."""

from collections.abc import Iterator
from typing import Any

from tritter.report.summary import Summary
from tritter.report.topics.experts import Experts
from tritter.report.topics.growth import Growth
from tritter.report.topics.matrix import TaskMatrix
from tritter.report.topics.topic import Topic

TOPICS: tuple[Topic[Any], ...] = (TaskMatrix(), Growth(), Experts())


def topics_of(summary: Summary) -> Iterator[tuple[Topic[Any], Any]]:
    """Yield the topics of a run, each with its record."""
    found = ((topic, getattr(summary, topic.name)) for topic in TOPICS)
    yield from ((topic, record) for topic, record in found if record is not None)

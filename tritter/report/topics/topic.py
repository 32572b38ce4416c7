"""A part of the report of a run, for the terminal, the plots and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tritter.report.drawing import wrap_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tritter.report.runs import EndedRun, Group
    from tritter.report.table import Table

_R = TypeVar("_R")


class Topic(Generic[_R]):
    """A part of a summary, its record, in the report; the base adds nothing.

    Attributes:
        name: The key of the record in the summary, and the name of the figures.
        title: Heading of the figures on the page.
        caption: Text below them.
        has_legend: Their colours and marks are those of the groups.
    """

    MAX_PANELS: ClassVar[int] = 24  # of one kind, on the page
    MAX_ROWS_ON_PAGE: ClassVar[int] = 100  # summary.json has all

    name: ClassVar[str]
    title: ClassVar[str]
    caption: ClassVar[str]
    has_legend: ClassVar[bool] = False

    def tables(self, record: _R, *, on_page: bool = False) -> list[Table]:
        """Return the tables at the end of a run, or the longer ones of the page."""
        return []

    def text(self, record: _R) -> str:
        """Return the line below the tables, which is a note on the page."""
        return ""

    def method(self, record: _R) -> str:
        """Return the method of the run, after the name of the topic; empty if it is none."""
        return ""

    def columns(self, record: _R) -> Mapping[str, str]:
        """Return header → cell in the page's table of all runs."""
        return {}

    def plot(self, run: EndedRun, record: _R) -> Figure | None:
        """Return the figure of a run in its folder of plots; None without data."""
        return None

    def figures(self, groups: Sequence[Group]) -> list[Figure]:
        """Return the figures of the page: without another definition, the plot of each run."""
        made = []
        for _, run, record in self.records(groups)[: self.MAX_PANELS]:
            if (figure := self.plot(run, record)) is not None:
                figure.axes[0].set_title(wrap_text(run.name), fontsize=9)
                made.append(figure)
        return made

    def records(self, groups: Sequence[Group]) -> list[tuple[Group, EndedRun, _R]]:
        """Return each run that has a record, which controls do not, after its group."""
        runs = [(group, run) for group in groups for run in group.runs]
        found = ((group, run, getattr(run.summary, self.name)) for group, run in runs)
        return [(group, run, record) for group, run, record in found if record is not None]

"""The text of a run as a record: what is old, what is new, and the split that both come under."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tritter.checkpoint.kept_sequences import KeptSequences
from tritter.checkpoint.record import LearnedDomain
from tritter.data.split import SplitRule


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainText:
    """One domain of a run: where its text lies, and how it is read.

    Args:
        key: what named it, for messages.
        texts: yields its texts, where no path says where they lie.
        is_streamed: data sets of the hub are read as they come, not fetched first.
    """

    name: str
    key: str
    is_old: bool
    paths: tuple[str, ...]
    text_field: str
    texts: Callable[[], Iterable[str]] | None = None
    is_streamed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunText:
    """All text of a run.

    Args:
        split: of the lineage, or the one that begins here.
        domains: old ones first.
        tasks: what is learned one after the other, each as the names of its domains.
        learned: name → what the checkpoint learned before.
        kept: sequences beside the checkpoint, of what it learned and the run has no text of.
        notes: what is worth telling, a sentence each.
    """

    split: SplitRule
    domains: tuple[DomainText, ...] = ()
    tasks: tuple[tuple[str, ...], ...] = ()
    learned: Mapping[str, LearnedDomain] = field(default_factory=dict)
    kept: KeptSequences = field(default_factory=KeptSequences, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def old(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains if domain.is_old)

    @property
    def new(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains if not domain.is_old)

"""The text of a run: what is old, what is new, and the split that both come under.

A checkpoint of ours says what it learned: all of that is old from then on, and its split goes on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tritter.checkpoints.folder import read_lineage
from tritter.checkpoints.record import LearnedDomain, Lineage
from tritter.checkpoints.state import KeptSequences
from tritter.data.built_in import built_in_origin, built_in_path, is_built_in
from tritter.data.documents import documents_digest
from tritter.data.local_files import ByteLimitError, TextFileError
from tritter.data.options import (
    DataConfig,
    DatasetsConfig,
    NamedTextConfig,
    TextSources,
    domain_key,
    text_field,
    unused_name,
)
from tritter.data.sources import CHECKED_BYTES, quick_pieces, recorded_paths, source_documents
from tritter.data.split import SplitRule, one_sided
from tritter.errors import Problem, RequestError, TritterError, key_name

DEFAULT_FRACTION = 0.2  # of a split that begins; a lineage's own goes on
Texts = Callable[[], Iterable[str]] | None


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
    domains: tuple[DomainText, ...]
    tasks: tuple[tuple[str, ...], ...]
    learned: Mapping[str, LearnedDomain]
    kept: KeptSequences = field(compare=False)
    notes: tuple[str, ...] = ()

    @property
    def old(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains if domain.is_old)

    @property
    def new(self) -> tuple[str, ...]:
        return tuple(domain.name for domain in self.domains if not domain.is_old)


def run_text(given: str | None, data: DataConfig, *, seed: int) -> RunText:
    """Return what a run's text is, given the checkpoint that it starts from.

    Args:
        given: folder or hub id of the checkpoint; None: there is none.
        seed: of the run; the split's own where a split begins.

    Raises:
        RequestError: the lineage can't be read, its split would be left, or text that it learned
            is not at hand and `data.old` names none.
    """
    lineage, kept = _learned(given)
    learned = {} if lineage is None else lineage.domains
    notes: list[str] = []
    split = _split(lineage, data, seed=seed, notes=notes)
    domains, tasks = _Domains(learned, data, notes).resolved()
    names = {each.name for each in domains}
    rest = [name for name in learned if name not in names]
    kept = kept.without(names)
    if stood_for := [name for name in rest if name in kept.sequences]:
        notes.append(
            f"Sequences of {', '.join(stood_for)} lie beside the checkpoint; methods against "
            "forgetting take them in place of text."
        )
    if bare := [name for name in rest if name not in kept.sequences]:
        notes.append(f"Nothing protects {', '.join(bare)}, which the checkpoint learned.")
    return RunText(
        split=split,
        domains=domains,
        tasks=tasks,
        learned=learned,
        kept=kept,
        notes=tuple(notes),
    )


def side_problems(text: RunText) -> Iterator[Problem]:
    """Yield the domains of which all documents would train, or all would validate.

    Left to the run: a class that yields texts, as its code runs with the run alone, and what
    `quick_pieces` doesn't read.
    """
    for domain in text.domains:
        if domain.texts is not None:
            continue
        found = quick_pieces(
            domain.paths,
            key=domain.key,
            text_field=domain.text_field,
            max_bytes=CHECKED_BYTES,
        )
        reason = None
        with suppress(TextFileError, ByteLimitError):  # what can't be read, the run lists
            if found is not None:
                reason = one_sided(found, rule=text.split)
        if reason is not None:
            paths = domain.paths[0] if len(domain.paths) == 1 else list(domain.paths)
            yield Problem(domain.key, paths, reason=reason)


def _learned(given: str | None) -> tuple[Lineage | None, KeptSequences]:
    """Return what a checkpoint says of what it learned, and the sequences beside it."""
    if given is None:
        return None, KeptSequences()
    folder = Path(given)
    try:
        return read_lineage(folder) if folder.is_dir() else None, KeptSequences.read(folder)
    except TritterError as error:
        raise RequestError(f"{key_name('model.path')}: {error}") from error


def _split(lineage: Lineage | None, data: DataConfig, *, seed: int, notes: list[str]) -> SplitRule:
    asked, held = data.validation_fraction, None if lineage is None else lineage.split
    if held is None:
        fraction = DEFAULT_FRACTION if asked is None else asked
        return SplitRule(seed=seed, validation_fraction=fraction)
    if asked is not None and asked != held.validation_fraction:
        reason = (
            f"the checkpoint's lineage holds out {held.validation_fraction}; with another share "
            "text that was held out would be trained on, or validate after it was trained on. "
            "Leave it out"
        )
        raise RequestError(Problem("data.validation_fraction", asked, reason=reason))
    if seed != held.seed:
        notes.append(
            f"The split goes on with the lineage's seed {held.seed}; seed={seed} orders the data."
        )
    return held


class _Domains:
    """The domains of a run, worked out from what was typed and what the checkpoint learned."""

    def __init__(
        self, learned: Mapping[str, LearnedDomain], data: DataConfig, notes: list[str]
    ) -> None:
        self._learned = learned
        self._data = data
        self._notes = notes
        self._is_text = isinstance(data, NamedTextConfig)
        self._text_field = text_field(data)
        self._is_streamed = isinstance(data, DatasetsConfig) and data.streaming

    def resolved(self) -> tuple[tuple[DomainText, ...], tuple[tuple[str, ...], ...]]:
        """Return old domains, then new ones; and of each task the names of its domains.

        Raises:
            RequestError: learned text is not at hand, and no old text was typed.
        """
        typed_new, typed_old = self._data.new_sources, self._data.old_sources
        new = self._typed(typed_new, is_old=False)
        called = {typed: domain.name for typed, domain in zip(typed_new, new, strict=True)}
        # What comes again in a later task alone is to be kept until then
        again = {called[name] for name in self._data.task_sources[0] if name in called}
        old = [] if self._data.is_old_named else self._all_learned(without=again)
        named = {domain.name for domain in old}
        kept = self._typed(typed_old, is_old=True)
        for typed, domain in zip(typed_old, kept, strict=True):
            called.setdefault(typed, domain.name)
            if domain.name in again:
                self._notes.append(f"{domain.name} is trained on again, so it is not old.")
            elif domain.name not in named:
                old.append(domain)
        named = {domain.name for domain in old}
        tasks = tuple(tuple(called[name] for name in task) for task in self._data.task_sources)
        return (*old, *(domain for domain in new if domain.name not in named)), tasks

    def _typed(self, sources: TextSources, *, is_old: bool) -> list[DomainText]:
        typed: dict[str, DomainText] = {}
        for name, paths in sources.items():
            texts = None if paths else partial(self._data.texts, name)
            known = self._known_as(name, tuple(paths), texts, is_old=is_old)
            if known is None or known in typed:
                others = {} if is_old else {**self._learned, **self._data.old_sources}
                known = unused_name(name, {**others, **typed})
            if known != name and known not in self._learned:
                self._notes.append(
                    f"The domain {name} is called {known}: another {name} was learned before."
                )
            typed[known] = DomainText(
                name=known,
                key=domain_key(self._data, name),
                is_old=is_old,
                paths=tuple(paths),
                text_field=self._text_field,
                texts=texts,
                is_streamed=self._is_streamed,
            )
        return list(typed.values())

    def _known_as(
        self, name: str, paths: tuple[str, ...], texts: Texts, *, is_old: bool
    ) -> str | None:
        """Return the learned domain that a typed one is: of the same text, else the same place."""
        if not self._learned:
            return None
        if texts is None and all(map(is_built_in, paths)):
            return next((n for n, d in self._learned.items() if set(d.paths) == set(paths)), None)
        # What can't be read is told with all that is wrong with the files
        with suppress(TextFileError):
            digest = _digest(paths, self._text_field, texts=texts, is_streamed=self._is_streamed)
            same_text = (n for n, domain in self._learned.items() if domain.sha256 == digest)
            if (known := next(same_text, None)) is not None:
                return known
        places = {paths}
        with suppress(TextFileError):
            places.add(recorded_paths(paths, key="data"))
        same_place = (n for n, d in self._learned.items() if paths and d.paths in places)
        is_named = is_old and name in self._learned
        found = next(same_place, name if is_named else None)
        if found is not None:
            self._notes.append(f"The text of {found} has changed since the checkpoint learned it.")
        return found

    def _all_learned(self, *, without: set[str]) -> list[DomainText]:
        domains = {n: d for n, d in self._learned.items() if n not in without}
        problems = {
            name: _problem(domain, is_streamed=self._is_streamed)
            for name, domain in domains.items()
        }
        wrong = [f"{name} can't be used: {why}" for name, why in problems.items() if why]
        if wrong:
            key = "data.old" if self._is_text else "data"
            advice = "name what is to be kept, data.old=PATHS, or nothing, data.old={}"
            if not self._is_text:
                advice = f"with data=text {advice}"
            reason = f"of the text that the checkpoint learned {'; '.join(wrong)}"
            value = None if self._is_text else "stdlib"
            raise RequestError(Problem(key, value, reason=reason, advice=advice))
        if domains:
            self._notes.append(
                f"Old text as the checkpoint recorded it, with its split: {', '.join(domains)}."
            )
        for name, domain in domains.items():
            here = built_in_origin(domain.paths)
            if all(map(is_built_in, domain.paths)) and domain.origin not in ("", here):
                self._notes.append(
                    f"Its {name} was that of {domain.origin}; here it is that of {here}."
                )
        return [
            DomainText(
                name=name,
                key=f"data.old.{name}",
                is_old=True,
                paths=domain.paths,
                text_field=domain.text_field,
                is_streamed=self._is_streamed,
            )
            for name, domain in domains.items()
        ]


def _problem(domain: LearnedDomain, *, is_streamed: bool = False) -> str | None:
    """Return why a recorded domain does not hold what it held; None when it does."""
    if not domain.paths:
        return "the record does not say where it lay"
    try:
        if all(map(is_built_in, domain.paths)):
            for path in domain.paths:
                built_in_path("data", path)
            return None
        digest = _digest(
            domain.paths,
            domain.text_field,
            is_streamed=is_streamed,
            is_recorded=True,
        )
    except TritterError as error:
        return str(error).removesuffix(".")
    return None if digest == domain.sha256 else f"{', '.join(domain.paths)} has changed since"


def _digest(
    paths: tuple[str, ...],
    text_field: str,
    *,
    texts: Texts = None,
    is_streamed: bool = False,
    is_recorded: bool = False,
) -> str:
    documents = source_documents(
        paths,
        key="data",
        text_field=text_field,
        texts=texts,
        is_streamed=is_streamed,
        is_recorded=is_recorded,
    )
    return documents_digest(documents)

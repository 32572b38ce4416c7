"""The data of a run: old and new domains, and the validation split of both.

A Tritter checkpoint records the domains that it learned. A run that starts from it treats them as
old data and keeps the recorded split.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

from tritter.checkpoints.record import LearnedDomain, Lineage
from tritter.checkpoints.state import KeptSequences
from tritter.data.built_in import built_in_origin, is_built_in
from tritter.data.chat import ChatChoice
from tritter.data.documents import PIECE_CHARACTERS, Documents
from tritter.data.local_files import ByteLimitError, TextFileError
from tritter.data.options import (
    DataConfig,
    DatasetsConfig,
    NamedTextConfig,
    TextSources,
    unused_name,
)
from tritter.data.sources import TextRequest
from tritter.data.split import SplitRule
from tritter.errors import Problem, RequestError, TritterError, refused


@dataclass(frozen=True, slots=True, kw_only=True)
class RunText:
    """All data of a run.

    Args:
        split: validation split of the lineage, or a new one.
        domains: name → location of the domain and how to read it; old domains first.
        old: names of the domains that were learned before this run.
        tasks: tasks in training order, each as the names of its domains.
        learned: name → domain that the checkpoint learned before.
        kept_sequences: sequences stored in the checkpoint for learned domains whose data the run
            lacks.
        needs_answers: whether conversations without an answer are not used.
        notes: sentences to print.
    """

    DEFAULT_FRACTION: ClassVar[float] = 0.2  # for a new split; a lineage keeps its own

    split: SplitRule
    domains: Mapping[str, TextRequest]
    old: tuple[str, ...]
    tasks: tuple[tuple[str, ...], ...]
    learned: Mapping[str, LearnedDomain]
    kept_sequences: KeptSequences = field(compare=False)
    needs_answers: bool = True
    notes: tuple[str, ...] = ()

    @property
    def new(self) -> tuple[str, ...]:
        return tuple(name for name in self.domains if name not in self.old)

    def documents(self) -> dict[str, Documents]:
        """Read the documents of all domains; files that can't be parsed are reported together."""
        documents: dict[str, Documents] = {}
        problems: list[str] = []
        for name, domain in self.domains.items():
            try:
                documents[name] = domain.documents()
            except TextFileError as error:
                problems += error.problems
        if problems:
            raise TextFileError(problems)
        return documents

    @classmethod
    def of(cls, checkpoint: str | None, data: DataConfig, *, seed: int) -> Self:
        """Resolve the data of a run that starts from a checkpoint.

        Args:
            checkpoint: folder or hub id of the checkpoint; None for a new model.
            data: the data config.
            seed: seed of the run, also used for a new split.
        """
        lineage, kept_sequences = _learned(checkpoint)
        learned = {} if lineage is None else lineage.domains
        notes: list[str] = []
        split = _split(lineage, data, seed=seed, notes=notes)
        resolving = _Domains(learned, data, split)
        old, new = resolving.resolve()
        notes += resolving.notes
        rest = [name for name in learned if name not in old and name not in new]
        kept_sequences = kept_sequences.without({**old, **new})
        if with_sequences := [name for name in rest if name in kept_sequences.sequences]:
            notes.append(
                f"The checkpoint contains sequences of {', '.join(with_sequences)}; forgetting "
                "mitigation uses them instead of the original data."
            )
        if missing := [name for name in rest if name not in kept_sequences.sequences]:
            notes.append(
                f"There is no text of {', '.join(missing)}, which the checkpoint learned, so none "
                "is replayed or scored."
            )
        return cls(
            split=split,
            needs_answers=(data.loss_on or recorded_chat(lineage).loss_on) != "all",
            domains={**old, **new},
            old=tuple(old),
            tasks=resolving.tasks,
            learned=learned,
            kept_sequences=kept_sequences,
            notes=tuple(notes),
        )

    def side_problems(self) -> Iterator[Problem]:
        """Yield the domains whose documents, or answers, would all be on one side of the split.

        Also yield new domains with the documents of an old one.

        Domains without paths are checked by the run itself, since only the run may execute their
        class. So are documents that `quick_pieces` does not read.
        """
        digests: dict[str | None, str] = {}  # of old domains, which come first
        for name, domain in self.domains.items():
            if domain.texts is not None:
                continue
            reading, reason = domain.reading(is_quick=True), None
            with suppress(TextFileError, ByteLimitError):  # the run reports unreadable files
                if (found := domain.quick_pieces(reading)) is not None:
                    reason = self.split.problem(found, needs_answers=self.needs_answers)
            if reason is not None:
                reason = " ".join([*reading.notes, reason])
            elif self.old and self.new:
                digest = domain.quick_digest()
                if name in self.old and digest is not None:
                    digests[digest] = name
                elif (same := digests.get(digest)) is not None:
                    reason = f"its documents are those of the old domain {same}; name other data"
            if reason is not None:
                paths = domain.paths[0] if len(domain.paths) == 1 else list(domain.paths)
                yield Problem(domain.key, paths, reason=reason)


def recorded_chat(lineage: Lineage | None) -> ChatChoice:
    """Return the chat options of the last training run; a template file is in the checkpoint."""
    recorded = lineage.training_config.get("data") if lineage is not None else None
    return ChatChoice.of_record(recorded if isinstance(recorded, Mapping) else {})


def _learned(checkpoint: str | None) -> tuple[Lineage | None, KeptSequences]:
    """Return a checkpoint's lineage and its stored sequences."""
    if checkpoint is None:
        return None, KeptSequences()
    folder = Path(checkpoint)
    try:
        return Lineage.read(folder) if folder.is_dir() else None, KeptSequences.read(folder)
    except TritterError as error:
        raise refused("model.path", folder, str(error).rstrip(".")) from error


def _split(lineage: Lineage | None, data: DataConfig, *, seed: int, notes: list[str]) -> SplitRule:
    recorded, size = None if lineage is None else lineage.split, None
    if isinstance(data, NamedTextConfig):
        size = data.piece_characters
    if recorded is None:
        fraction = data.validation_fraction or RunText.DEFAULT_FRACTION
        size = size or PIECE_CHARACTERS
        return SplitRule(seed=seed, validation_fraction=fraction, piece_characters=size)
    for key, value in (
        ("validation_fraction", data.validation_fraction),
        ("piece_characters", size),
    ):
        if value not in (None, own := getattr(recorded, key)):
            reason = (
                f"the checkpoint's lineage uses {own}; another value would mix training and "
                "validation documents. Remove the key"
            )
            raise RequestError(Problem(f"data.{key}", value, reason=reason))
    if seed != recorded.seed:
        notes.append(
            f"The split keeps the lineage's seed {recorded.seed}; seed={seed} only shuffles the "
            "data."
        )
    return recorded


class _Domains:
    """Resolves the domains of a run from the config and the checkpoint's lineage."""

    def __init__(
        self, learned: Mapping[str, LearnedDomain], data: DataConfig, split: SplitRule
    ) -> None:
        self._learned, self._data, self._split = learned, data, split
        self._is_streamed = isinstance(data, DatasetsConfig) and data.streaming
        self.notes: list[str] = []
        self.tasks: tuple[tuple[str, ...], ...] = ()  # the domain names of each

    def resolve(self) -> tuple[dict[str, TextRequest], dict[str, TextRequest]]:
        """Return old and new domains by name, and resolve the tasks."""
        typed_new, typed_old = self._data.new_sources, self._data.old_sources
        new = self._domains_of(typed_new, is_old=False)
        final_name = dict(zip(typed_new, new, strict=True))
        # A learned domain that only a later task trains on counts as old until then
        again = {final_name[name] for name in self._data.task_sources[0] if name in final_name}
        old = {} if self._data.is_old_named else self._all_learned(without=again)
        typed = self._domains_of(typed_old, is_old=True)
        for name, (final, domain) in zip(typed_old, typed.items(), strict=True):
            final_name.setdefault(name, final)
            if final in again:
                self.notes.append(f"{final} is trained on again, so it is not old.")
            else:
                old.setdefault(final, domain)
        task_sources = self._data.task_sources
        self.tasks = tuple(tuple(final_name[name] for name in task) for task in task_sources)
        return old, {name: domain for name, domain in new.items() if name not in old}

    def _domains_of(self, sources: TextSources, *, is_old: bool) -> dict[str, TextRequest]:
        typed: dict[str, TextRequest] = {}
        for name, paths in sources.items():
            domain = TextRequest(
                tuple(paths),
                key=self._data.domain_key(name),
                text_field=self._data.record_field,
                texts=None if paths else partial(self._data.texts, name),
                is_streamed=self._is_streamed,
                is_head=self._is_streamed,
                piece_characters=self._split.piece_characters,
            )
            known = self._learned_name(domain, default=name if is_old else None)
            if known is None or known in typed:
                others = {} if is_old else {**self._learned, **self._data.old_sources}
                known = unused_name(name, {**others, **typed})
            if known != name and known not in self._learned:
                reason = f"another {name} was learned before"
                self.notes.append(f"The domain {name} is renamed {known}: {reason}.")
            typed[known] = domain
        return typed

    def _learned_name(self, typed: TextRequest, *, default: str | None) -> str | None:
        """Return the name of the learned domain with the same text, or else with the same paths.

        Args:
            typed: the domain.
            default: the name of an old domain, under which a learned one may have changed.
        """
        if not self._learned:
            return None
        paths = typed.paths
        if typed.texts is None and all(map(is_built_in, paths)):
            return next((n for n, d in self._learned.items() if set(d.paths) == set(paths)), None)
        # Unreadable files are reported later, together with all other problems of the files
        with suppress(TextFileError):
            digest = typed.documents().digest(is_exact=False)
            same_text = (n for n, domain in self._learned.items() if domain.sha256 == digest)
            if (known := next(same_text, None)) is not None:
                return known
        spellings = {paths}
        with suppress(TextFileError):
            readings = (replace(typed, key="data", is_head=head) for head in (False, True))
            spellings |= {each.recorded_paths for each in readings}
        same_paths = (n for n, d in self._learned.items() if paths and d.paths in spellings)
        found = next(same_paths, default if default in self._learned else None)
        if found is not None:
            self.notes.append(f"The data of {found} has changed since the checkpoint learned it.")
        return found

    def _all_learned(self, *, without: set[str]) -> dict[str, TextRequest]:
        domains = {n: d for n, d in self._learned.items() if n not in without}
        problems = {
            name: domain.problem(self._split, is_streamed=self._is_streamed)
            for name, domain in domains.items()
        }
        wrong = [f"{name} can't be used: {why}" for name, why in problems.items() if why]
        if wrong:
            advice = "set data.old=PATHS to name the old data, or data.old={} for none"
            reason = f"the checkpoint learned data that is unavailable: {'; '.join(wrong)}"
            if isinstance(self._data, NamedTextConfig):
                raise RequestError(Problem("data.old", None, reason=reason, advice=advice))
            raise RequestError(Problem("data", "stdlib", reason, f"with data=text {advice}"))
        if domains:
            self.notes.append(
                f"Old data and split from the checkpoint's lineage: {', '.join(domains)}."
            )
        for name, domain in domains.items():
            current = built_in_origin(domain.paths)
            if all(map(is_built_in, domain.paths)) and domain.origin not in ("", current):
                self.notes.append(
                    f"The checkpoint learned {name} from {domain.origin}; this run uses {current}."
                )
        return {
            name: TextRequest(
                domain.paths,
                key=f"data.old.{name}",
                text_field=domain.text_field,
                is_streamed=self._is_streamed,
                piece_characters=self._split.piece_characters,
            )
            for name, domain in domains.items()
        }

"""The chain of a checkpoint's ancestors: found by hash, and verified on request."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Self

from tritter.checkpoints.card import Card
from tritter.checkpoints.record import ExpansionRecord, LedgerRecord, Lineage
from tritter.core.families.config_file import missing_config, read_model_file
from tritter.errors import RequestError, TritterError
from tritter.storage.hashing import (
    bounded_digest,
    file_digest,
    header_digest,
    merkle_hash,
    tensor_digest,
)
from tritter.storage.reading import LINEAGE_NAME, check_inside, check_links
from tritter.storage.records import is_unchanged, read_record
from tritter.storage.tensors import TensorFolder


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between a folder and its lineage.

    Args:
        file: file name in the folder; empty if unknown.
        tensor: tensor name, if the difference is in a tensor.
        detail: `changed`, `missing`, `added`, or the reason why it can't be read.
    """

    file: str
    tensor: str | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One checkpoint of a chain.

    Args:
        folder: the checkpoint folder; None if it was not found.
        model_hash: the expected model hash; None for a plain folder without a descendant.
        lineage: the checkpoint's lineage; None for a plain folder, or if it was not found.
        problem: the reason why tritter.json can't be read, such as `missing`, if so.
        expansion_records: expansions between the parent and this checkpoint, oldest first; empty
            after a training run and at the start of the chain.
        tensor_digests: tensor name → expected SHA-256, where known.
        file_digests: file name → expected SHA-256 of all other files.
    """

    folder: Path | None
    model_hash: str | None
    lineage: Lineage | None = None
    problem: str | None = None
    expansion_records: tuple[ExpansionRecord, ...] = ()
    tensor_digests: Mapping[str, str] | None = None
    file_digests: Mapping[str, str] | None = None

    @property
    def can_be_checked(self) -> bool:
        is_known = self.folder is not None and (self.model_hash or self.problem) is not None
        return is_known and not self.is_removed

    @property
    def is_removed(self) -> bool:
        """True if the run removed the weights of this stage, according to its ledger."""
        if self.folder is None or self.lineage is None or any(self.folder.glob("*.safetensors")):
            return False
        folder = self.folder.resolve()
        run = folder.parent.parent  # of RUN/attempt_1/expanded
        try:
            ledger = read_record(run / LedgerRecord.FILE_NAME, LedgerRecord)
        except TritterError:
            return False
        return folder.relative_to(run).as_posix() in (*ledger.removed, *ledger.released)

    @property
    def own_stage(self) -> str:
        """The name of the stage from outside that wrote it, if any."""
        config = {} if self.lineage is None else self.lineage.training_config
        return str(config.get("name")) if config.get("stage") == Lineage.OWN_STAGE else ""

    @property
    def experts(self) -> tuple[str, ...]:
        """The adapters listed in the lineage."""
        return () if self.lineage is None else self.lineage.experts

    def origin(self, *, max_experts: int | None = None) -> str:
        """Return a short description of the checkpoint's origin.

        More than `max_experts` experts are not listed by name.
        """
        lineage = self.lineage
        if self.problem:
            return "no readable tritter.json"
        if lineage is None:
            return "plain folder" if self.folder else "missing: not checked"
        experts = f"LoRA experts {', '.join(self.experts)}" if self.experts else ""
        if max_experts is not None and len(self.experts) > max_experts:
            experts = f"{len(self.experts)} LoRA experts"
        removed = "weights removed" if self.is_removed else ""
        if self.expansion_records:
            methods = (each.method.replace("_", "-") for each in self.expansion_records)
            return ", ".join(filter(None, [*methods, experts, removed]))
        if lineage.parent_hash is None:
            origin = f"pretraining of {lineage.step} steps" if lineage.step else "start"
        elif self.own_stage:
            origin = f"stage {self.own_stage}"
        else:  # a later task counts the steps of those before it
            origin = f"training to step {lineage.step}" if lineage.step else "training"
        return ", ".join(filter(None, [origin, experts, removed]))

    def steps_after(self, newest: "Link") -> int | None:
        """Return the training steps after its expansions, from its newest descendant."""
        if self.lineage is None or not self.expansion_records:
            return None
        last = len(self.lineage.expansion_history) - 1
        records = newest.lineage.expansion_history if newest.lineage else ()
        record = records[last] if last < len(records) else self.expansion_records[-1]
        return record.continued_training_steps

    @property
    def num_parameters(self) -> int | None:
        """The number of parameters without padding; None if the folder can't be read."""
        is_padded = self.lineage is not None and bool(self.lineage.ffn_sizes)
        if self.folder is None or not (is_padded or self.is_removed):
            return self.num_parameters_on_disk
        try:
            return read_model_file(self.folder).num_parameters
        except TritterError:
            return None

    @property
    def num_parameters_on_disk(self) -> int | None:
        """The number of parameters in the file headers; None if they can't be read."""
        if self.folder is None:
            return None
        try:
            tensors = TensorFolder.open(self.folder)
            return sum(prod(tensors.shape(name)) for name in tensors.files)
        except TritterError:
            return None

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return a checkpoint as a link, without its parent and expansions."""
        try:
            lineage = Lineage.read(folder)
        except TritterError as error:
            return cls(folder=folder, model_hash=None, problem=str(error))
        if lineage is None:
            return cls(folder=folder, model_hash=None)
        return cls(
            folder=folder,
            model_hash=lineage.model_hash,
            lineage=lineage,
            tensor_digests=lineage.tensor_digests,
            file_digests=lineage.file_digests,
        )

    @classmethod
    def chain(cls, folder: Path) -> tuple[Self, ...]:
        """Return the checkpoints from the start of the chain to `folder`, oldest first.

        A parent is searched at the path in its child's lineage, then next to the child, and
        identified by its hash. If a parent is not found, the chain starts with a link without a
        folder. Adding experts keeps the model hash, since the base does not change.
        """
        if not folder.is_dir():
            raise RequestError(f"{folder} is not a folder.")
        if not any((folder / name).exists() for name in (LINEAGE_NAME, "config.json")):
            lacks = f"no {LINEAGE_NAME} and {missing_config(folder)}"
            raise RequestError(f"{folder} contains no checkpoint: {lacks}.")
        try:
            check_links(folder)
        except TritterError as error:
            raise RequestError(str(error)) from error
        links, seen = [cls.of(folder)], {folder.resolve()}
        while (child := links[-1]).lineage is not None and child.lineage.parent_hash is not None:
            if child.lineage.parent_hash == child.model_hash and child._hint in seen:
                break
            parent = child._parent(excluded=seen)
            history = child.lineage.expansion_history
            if parent.lineage is not None:
                own = history[len(parent.lineage.expansion_history) :]
            elif child.lineage.parent_hash == child.lineage.base_model_hash:
                own = history  # the start of a chain has no expansions
            else:
                # Without the parent's record: one expansion, or none after a training run
                own = () if child.lineage.step else history[-1:]
            links[-1] = replace(child, expansion_records=own)
            if parent.folder is not None:
                seen.add(parent.folder.resolve())
            elif parent.model_hash in {link.model_hash for link in links if not link.experts}:
                break
            links.append(parent)
        return tuple(reversed(links))

    def differences(self) -> tuple[Difference, ...]:
        """Hash the tensors and files again and return all differences; see `can_be_checked`."""
        assert self.folder is not None
        changes = [] if self.problem is None else [Difference(LINEAGE_NAME, None, self.problem)]
        if self.lineage is not None:
            if merkle_hash(self.lineage.tensor_digests) != self.lineage.model_hash:
                detail = "the model hash does not match the tensors' digests"
                changes.append(Difference(LINEAGE_NAME, None, detail))
            if not is_unchanged(self.folder / LINEAGE_NAME):
                changes.append(Difference(LINEAGE_NAME, None, "changed"))
        changes += (tensors := tuple(self._tensor_changes(self.folder)))
        explained = {change.file for change in tensors}  # their headers add no information
        for name, digest in (self.file_digests or {}).items():
            file = name.removesuffix(Lineage.HEADER_MARK)
            path = self.folder / file
            hashed = header_digest if name.endswith(Lineage.HEADER_MARK) else bounded_digest
            if file in explained:
                continue
            try:
                check_inside(self.folder, file)
                if not path.is_file():
                    changes.append(Difference(file, None, "missing"))
                elif hashed(path) != digest:
                    changes.append(Difference(file, None, "changed"))
            except TritterError as error:
                changes.append(Difference(name, None, str(error)))
        return tuple(changes)

    def changes(self) -> Iterator[str]:
        """Yield the differences to the lineage, with file and tensor, and files that it lacks."""
        folder = self.folder
        assert folder is not None
        if self.problem is None and self.lineage is None:
            yield f"{folder / LINEAGE_NAME}: missing"
            return
        for change in self.differences():
            if change.file != Card.NAME:  # rewritten with every lineage
                tensor = f", tensor {change.tensor}" if change.tensor else ""
                yield f"{folder / change.file}{tensor}: {change.detail}"
        if self.file_digests is not None:
            known = {name.removesuffix(Lineage.HEADER_MARK) for name in self.file_digests}
            for path in sorted(folder.rglob("*")):
                name = path.relative_to(folder).as_posix()
                is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
                if not path.is_dir() and not is_hidden and name not in {*known, LINEAGE_NAME}:
                    yield f"{path}: added"

    def _tensor_changes(self, folder: Path) -> Iterator[Difference]:
        try:
            tensors = TensorFolder.open(folder)
        except TritterError as error:
            yield Difference("", None, str(error))
            return
        found: dict[str, str] = {}
        for name, file in tensors.files.items():
            try:
                found[name] = tensor_digest(name, tensors[name])
            except TritterError as error:
                yield Difference(file, name, str(error))
                found[name] = ""
        if self.tensor_digests is None:
            if self.model_hash is not None and merkle_hash(found) != self.model_hash:
                yield Difference("", None, f"the tensors' hash is not {self.model_hash}")
            return
        for name, digest in self.tensor_digests.items():
            if name not in found:
                yield Difference("", name, "missing")
            elif found[name] and found[name] != digest:
                yield Difference(tensors.files[name], name, "changed")
        if self.lineage is not None:  # a plain folder may contain a tied head twice
            for name in sorted(found.keys() - self.tensor_digests.keys()):
                yield Difference(tensors.files[name], name, "added")

    def _parent(self, *, excluded: Collection[Path]) -> Self:
        assert self.lineage is not None and self.folder is not None
        lineage, expected = self.lineage, self.lineage.parent_hash
        hinted, own = self._hint, self.folder.resolve()
        made = [(each.method, each.options) for each in lineage.expansion_history]
        candidates = [] if hinted is None or not hinted.is_dir() else [hinted]
        with suppress(OSError):
            # Hidden folders are incomplete: being written, or from a killed process
            near = sorted(path for path in own.parent.iterdir() if path.is_dir())
            candidates += [path for path in near if path != own and not path.name.startswith(".")]
        candidates = [folder for folder in candidates if folder not in excluded]
        for link in map(type(self).of, candidates):
            if link.lineage is None:
                continue
            first = [(each.method, each.options) for each in link.lineage.expansion_history]
            if first != made[: len(first)]:
                continue  # a child with the same tensors, as after `context`
            # The recorded hash, or the one computed from its digests
            if expected in (link.lineage.model_hash, merkle_hash(link.lineage.tensor_digests)):
                return link
        recorded = (lineage.parent_file_digests or {}).get("config.json")
        for folder in candidates:
            config = folder / "config.json"
            if (folder / LINEAGE_NAME).exists() or not config.is_file():
                continue
            # Hashing the tensors is left to `verify`: next to the child, a config with the recorded
            # digest is enough
            with suppress(TritterError):  # an unreadable candidate is skipped
                check_links(folder)
                if folder == hinted or (
                    recorded is not None and bounded_digest(config) == recorded
                ):
                    return type(self)(
                        folder=folder,
                        model_hash=expected,
                        problem=None
                        if lineage.parent_tensor_digests
                        else "missing",  # it had a record
                        tensor_digests=lineage.parent_tensor_digests,
                        file_digests=lineage.parent_file_digests,
                    )
        if hinted is not None and hinted in candidates:
            link = self.of(hinted)
            # Its record was edited, so it can't be identified; `verify` reports the edit
            if link.problem or (link.lineage and not is_unchanged(hinted / LINEAGE_NAME)):
                return link
        return type(self)(folder=None, model_hash=expected)

    @property
    def _hint(self) -> Path | None:
        """The recorded path of the parent."""
        assert self.lineage is not None
        if self.folder is None or not self.lineage.parent_path:
            return None
        return (self.folder / self.lineage.parent_path).resolve()


# Digests of a stage's outputs in the run folder. The digest of a checkpoint is computed from its
# lineage, which lists the digests of its tensors and files, so no large file is hashed. All other
# files are identified by their SHA-256.


def changes_of(path: Path, digest: str) -> list[str]:
    """Compare an output with its digest, and describe each change with its file and tensor.

    Args:
        path: the checkpoint or file.
        digest: its digest, as `digests_of` returned it.
    """
    if not path.exists():
        return [f"{path} is missing"]
    if path.is_dir():
        changes = list(Link.of(path).changes())
        if not changes and _checkpoint_digest(Lineage.of(path)) != digest:
            changes = [f"{path} is not the checkpoint that the stage wrote"]
        return changes
    try:
        return [] if file_digest(path) == digest else [f"{path}: changed"]
    except (OSError, TritterError) as error:
        return [str(error)]


def digests_of(
    folder: Path, outputs: Iterable[str], *, lineages: Mapping[str, Lineage] | None = None
) -> dict[str, str]:
    """Return path → digest of checkpoints and files, and of every file in other folders.

    Args:
        folder: the run folder.
        outputs: paths relative to `folder`.
        lineages: path → lineage of checkpoints that this process wrote or has already opened.
    """
    digests: dict[str, str] = {}
    known = lineages or {}
    for output in outputs:
        path = folder / output
        if path.is_file():
            digests[output] = file_digest(path)
        elif (lineage := known.get(output) or Lineage.read(path)) is not None:
            digests[output] = _checkpoint_digest(lineage)
        else:
            files = sorted(file for file in path.rglob("*") if file.is_file())
            digests |= {f.relative_to(folder).as_posix(): file_digest(f) for f in files}
    return digests


def _checkpoint_digest(lineage: Lineage) -> str:
    """Return the digest of a checkpoint's tensors and files, without its card and its lineage.

    The gate may rewrite these two after training.
    """
    files = {name: d for name, d in lineage.file_digests.items() if name != Card.NAME}
    text = json.dumps([lineage.model_hash, sorted(files.items())])
    return hashlib.sha256(text.encode()).hexdigest()

"""Read a checkpoint folder: match it to its model family and hash tensors during reading."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.checkpoints.card import Card
from tritter.checkpoints.expert_files import ExpertFiles
from tritter.checkpoints.folder import (
    Artifact,
    copy_small_files,
    small_files,
)
from tritter.checkpoints.record import Lineage
from tritter.core.families import Config, Model, StoredTensor
from tritter.errors import RequestError, TritterError, shortened
from tritter.storage.atomic import link_or_copy
from tritter.storage.hashing import DigestQueue, bounded_digest
from tritter.storage.reading import LINEAGE_NAME, check_inside
from tritter.storage.records import is_unchanged
from tritter.storage.tensors import INDEX_NAME, TensorFolder
from tritter.storage.writer import Pieces, TensorStream, stripped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tritter.checkpoints.state import KeptSequences, State
    from tritter.core.stock_routers import AddedExperts


@dataclass(frozen=True)
class Source:
    """An open checkpoint folder. Records and headers are read once, tensors one by one by name.

    Args:
        folder: the checkpoint folder.
        model: its sizes, shapes and names.
        lineage: content of tritter.json; None for a plain Hugging Face folder.
        digests: digests of the tensors, computed while they are read.
        is_checked: this process wrote or checked its record.
    """

    folder: Path
    model: Model
    lineage: Lineage | None
    digests: DigestQueue = field(default_factory=DigestQueue, repr=False, compare=False)
    is_checked: bool = False

    @classmethod
    def open(cls, folder: Path, model: Model, *, has_lineage: bool = True) -> Source:
        """Open a folder and check it against its config and its lineage.

        Args:
            folder: the checkpoint folder.
            model: as its config.json describes it.
            has_lineage: False ignores tritter.json and treats the folder as a plain one.
        """
        source = cls(folder, model, Lineage.read(folder) if has_lineage else None)
        source.check()
        return source

    @classmethod
    def written(cls, folder: Path, model: Model, lineage: Lineage) -> Source:
        """Open a folder that this process wrote or already checked, without a check."""
        return cls(folder, model, lineage, DigestQueue.of(lineage.tensor_digests), is_checked=True)

    def check(self) -> None:
        """Check the folder's files and headers against its config and its lineage."""
        folder, on_disk = self.folder, self.model.padded_shapes()
        for tensor in self.stored:
            found = self.tensors.shape(tensor.name)
            wanted = on_disk.get(tensor.name, tensor.shape)
            if wanted != found:
                raise TritterError(
                    f"{folder}: {tensor.name} has shape {found}, but config.json requires {wanted}."
                )
        # transformers unties such a head when it loads the folder; skipping the head would silently
        # change the function
        tensors, ties = self.tensors, self.model.family.tied_names(self.config)
        for name in sorted(ties.keys() & tensors.files.keys()):
            other = ties[name] if ties[name] in tensors.files else self.stored[0].name
            if not tensors[name].equal(tensors[other]):
                raise TritterError(
                    f"{folder}: {name} differs from {other}, although config.json ties "
                    "them. To keep both, set tie_word_embeddings to false in config.json. To tie "
                    f"them, remove {name} from the files."
                )
        small_files(folder)
        changed = []
        for name, digest in ({} if self.lineage is None else self.lineage.file_digests).items():
            check_inside(folder, name)
            # The card may be edited; `history --verify` lists every change
            is_free = name in (Card.NAME, INDEX_NAME) or name.endswith(Lineage.HEADER_MARK)
            is_missing = not (folder / name).is_file()
            if not is_free and (is_missing or bounded_digest(folder / name) != digest):
                changed.append(f"{name} (missing)" if is_missing else name)
        if changed:
            raise TritterError(_changed_text(folder, changed))

    @property
    def config(self) -> Config:
        return self.model.config

    @cached_property
    def tensors(self) -> TensorFolder:
        """The tensors in the files, by name on disk."""
        return TensorFolder.open(self.folder)

    @cached_property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Specifications of the stored tensors, the embedding first."""
        return self.model.match(self.tensors.files)

    @property
    def unread(self) -> list[str]:
        """Names of tensors in the files that the stock class does not read."""
        known = {*self.model.family.tied_names(self.config), *(each.name for each in self.stored)}
        return sorted(self.tensors.files.keys() - known)

    @cached_property
    def stored_parts(self) -> dict[str, tuple[StoredTensor, int]]:
        """Logical name → (stored tensor, index of the part)."""
        return {
            part.tensor.name: (tensor, number)
            for tensor in self.stored
            for number, part in enumerate(tensor.parts)
        }

    @cached_property
    def live_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name on disk → shape without padding, for padded tensors."""
        on_disk = self.model.padded_shapes()
        return {tensor.name: tensor.shape for tensor in self.stored if tensor.name in on_disk}

    @cached_property
    def added(self) -> AddedExperts | None:
        """Appended experts and their router offset, or None."""
        from tritter.core.stock_routers import AddedExperts  # needs torch

        return AddedExperts.read(self.folder)

    @cached_property
    def experts(self) -> ExpertFiles | None:
        """The LoRA experts of the checkpoint, or None."""
        return ExpertFiles.read(self.folder)

    @property
    def own_lineage(self) -> Lineage:
        """The lineage of a folder written by Tritter."""
        assert self.lineage is not None, f"{self.folder} has no lineage"
        return self.lineage

    @cached_property
    def state(self) -> State | None:
        """The training state of the checkpoint, or None."""
        from tritter.checkpoints.state import State  # needs torch

        return State.read(self.folder)

    @cached_property
    def kept_sequences(self) -> KeptSequences:
        """The training sequences stored in the checkpoint for later runs."""
        from tritter.checkpoints.state import KeptSequences  # needs torch

        return KeptSequences.read(self.folder)

    def artifacts(self) -> tuple[Artifact, ...]:
        """Return all artifacts of the checkpoint, which are all files except the model."""
        found = (self.state, self.added, self.kept_sequences, self.experts)
        written = (each.write for each in found if each is not None)
        return (partial(copy_small_files, self.folder), *written)

    def read(self, name: str) -> Tensor:
        """Read one tensor by its logical name; for stacked experts, only that expert's part."""
        stored, number = self.stored_parts[name]
        part = stored.parts[number]
        if stored.is_whole:
            return part.transposed(self.read_stored(stored.name))
        return part.transposed(self.tensors.reader().get(stored.name, index=part.index))

    def read_stored(self, name: str) -> Tensor:
        """Read one tensor by its name on disk and remove the padding.

        Raises:
            TritterError: the file is damaged, or its padding is not zero.
        """
        tensor = self.tensors[name]
        self.digests.add(name, tensor)
        if name in self.live_shapes:
            tensor = stripped(tensor, self.live_shapes[name], name=f"{self.folder}: {name}")
        return tensor

    def stream(self) -> TensorStream:
        """Return a stream of all tensors, unchanged."""
        headers = self.tensors.headers
        entries = tuple(replace(headers[each.name], shape=each.shape) for each in self.stored)
        return TensorStream(entries, ((e.name, self._deferred(e.name)) for e in entries))

    def link_into(self, folder: Path) -> dict[str, str]:
        """Hard-link the weight files into another folder; return the digest of each tensor."""
        digests = self.read_digests()
        for path in sorted(self.tensors.paths):
            link_or_copy(path, folder / path.name)
        if (index := self.folder / INDEX_NAME).is_file():
            shutil.copyfile(index, folder / INDEX_NAME)
        return digests

    def _deferred(self, name: str) -> Tensor | Pieces:
        """Return a tensor to copy unchanged; without padding its digest is reused."""
        if name in self.live_shapes:
            return self.read_stored(name)
        return Pieces(lambda: iter([self.read_stored(name)]), partial(self.digests.digest, name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor by its logical name."""
        return self.tensors.headers[self.stored_parts[name][0].name].torch_dtype

    def holds(self, target: StoredTensor, name: str, dtype: torch.dtype) -> bool:
        """Return True if the target is the tensor `name` and a file contains its exact bytes.

        The name on disk must be the target's as well, so that the digests are equal.
        """
        stored, _ = self.stored_parts[name]
        is_whole = target.is_whole and stored.is_whole and target.name not in self.live_shapes
        return is_whole and stored.name == target.name and self.dtype(name) == dtype

    def stored_name(self, target: StoredTensor, names: Sequence[str | None]) -> str | None:
        """Return the name on disk of a stored tensor with the target's parts in order, or None.

        Args:
            target: the tensor to write.
            names: source tensors equal to the target's parts; None for a part without one.
        """
        parts = [(None, 0) if name is None else self.stored_parts[name] for name in names]
        stored = parts[0][0]
        is_all = stored is not None and len(stored.parts) == len(parts)
        if not is_all or parts != [(stored, number) for number in range(len(parts))]:
            return None
        return stored.name if stored is not None and stored.shape == target.shape else None

    def intact(self) -> Source:
        """Return itself; an edited tritter.json is refused, which another record would certify."""
        if self.lineage and not (self.is_checked or is_unchanged(self.folder / LINEAGE_NAME)):
            raise RequestError(_changed_text(self.folder, [LINEAGE_NAME]))
        return self

    def read_digests(self) -> dict[str, str]:
        """Return name on disk → SHA-256 of every tensor. Reads tensors that were not read yet."""
        self.intact()
        known = self.digests.results()
        for tensor in self.stored:
            if tensor.name not in known:
                self.read_stored(tensor.name)
        known = self.digests.results()
        digests = {tensor.name: known[tensor.name] for tensor in self.stored}
        recorded = digests if self.lineage is None else self.lineage.tensor_digests
        changed = sorted(dict(digests.items() - recorded.items()))
        if changed:
            raise RequestError(_changed_text(self.folder, changed))
        return digests


def _changed_text(folder: Path, names: list[str]) -> str:
    return (
        f"{folder} was changed since its lineage was written: {shortened(names)}. `tritter export "
        "--ignore-lineage` makes a plain folder of the changed files."
    )

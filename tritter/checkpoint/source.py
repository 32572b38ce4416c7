"""A checkpoint opened for reading: matched to its family, hashed while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.checkpoint.folder import CARD_NAME, read_lineage
from tritter.checkpoint.record import Lineage
from tritter.checkpoint.tokenizer_files import check_tokenizer_files
from tritter.errors import RequestError, TritterError
from tritter.families import Config, Family, StoredTensor, family_of, match, padded_shapes
from tritter.storage.hashing import DigestQueue, bounded_digest
from tritter.storage.links import check_inside
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorEntry, TensorStream, stripped

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors of a checkpoint folder by logical name, read one at a time.

    Args:
        lineage: what the folder says of itself; None for a plain Hugging Face folder.
        stored: the tensors as they lie in the files.
        places: logical name → (stored tensor, number of its part).
        live_shapes: name in the files → shape, of tensors that are padded there.
        digests: of what was read so far, computed aside.
    """

    folder: Path
    config: Config
    family: Family
    tensors: TensorFolder
    lineage: Lineage | None
    stored: tuple[StoredTensor, ...]
    places: dict[str, tuple[StoredTensor, int]]
    live_shapes: dict[str, tuple[int, ...]]
    digests: DigestQueue

    @classmethod
    def open(
        cls,
        folder: Path,
        config: Config,
        *,
        digests: DigestQueue | None = None,
        has_lineage: bool = True,
    ) -> Source:
        """Open a folder and hold its tensors against its config.

        Args:
            has_lineage: False takes it for a plain folder, whatever tritter.json says.
            digests: a queue that has begun to hash the folder's tensors.

        Raises:
            RequestError: the family is not known.
            TritterError: files are damaged or missing, tensors are left over, missing or of
                another shape, or files beside them changed since the lineage was written.
        """
        family = family_of(config)
        tensors = TensorFolder.open(folder)
        stored = match(config, tensors.files)
        on_disk = padded_shapes(config)
        for tensor in stored:
            found, wanted = tensors.shape(tensor.name), on_disk.get(tensor.name, tensor.shape)
            if wanted != found:
                raise TritterError(
                    f"{folder}: {tensor.name} has shape {found}, but config.json asks for {wanted}."
                )
        _check_ties(folder, tensors, family, config, embedding=stored[0].name)
        check_tokenizer_files(folder)
        lineage = read_lineage(folder) if has_lineage else None
        if lineage is not None:
            _check_files(folder, lineage)
        places = {
            part.tensor.name: (tensor, number)
            for tensor in stored
            for number, part in enumerate(tensor.parts)
        }
        live = {tensor.name: tensor.shape for tensor in stored if tensor.name in on_disk}
        queue = digests or DigestQueue()
        return cls(folder, config, family, tensors, lineage, stored, places, live, queue)

    def read(self, name: str) -> Tensor:
        """Read one tensor by its logical name; of experts that share one, its part alone."""
        stored, number = self.places[name]
        part = stored.parts[number]
        if stored.is_whole:
            return part.turned(self.read_stored(stored.name))
        return part.turned(self.tensors.get(stored.name, index=part.index))

    def read_stored(self, name: str) -> Tensor:
        """Read one tensor by its name in the files, without its padding there.

        Raises:
            TritterError: the file is damaged, or what should be padding is none.
        """
        tensor = self.tensors.get(name)
        self.digests.add(name, tensor)
        if name in self.live_shapes:
            tensor = stripped(tensor, self.live_shapes[name], name=f"{self.folder}: {name}")
        return tensor

    def stream(self) -> TensorStream:
        """Return all tensors as they are, to be written elsewhere."""
        entries = tuple(
            TensorEntry(stored.name, self.tensors.torch_dtype(stored.name), stored.shape)
            for stored in self.stored
        )
        return TensorStream(entries, ((e.name, self.read_stored(e.name)) for e in entries))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor by its logical name."""
        return self.tensors.torch_dtype(self.places[name][0].name)

    def holds(self, target: StoredTensor, name: str, dtype: torch.dtype) -> bool:
        """Return whether the bytes of a target that is the tensor `name` lie in a file as they are.

        Under the target's own name, so that they have its digest.
        """
        stored, _ = self.places[name]
        is_whole = target.is_whole and stored.is_whole and target.name not in self.live_shapes
        return is_whole and stored.name == target.name and self.dtype(name) == dtype

    def holding(self, target: StoredTensor, names: Sequence[str | None]) -> str | None:
        """Return the name in the files of what is a target, part by part; None where nothing is.

        Args:
            names: the tensors that the target's parts are; None: a part is no tensor of the source.
        """
        places = [(None, 0) if name is None else self.places[name] for name in names]
        stored = places[0][0]
        is_all = stored is not None and len(stored.parts) == len(places)
        if not is_all or places != [(stored, number) for number in range(len(places))]:
            return None
        return stored.name if stored is not None and stored.shape == target.shape else None

    def read_digests(self) -> dict[str, str]:
        """Return name on disk → SHA-256 of every tensor, reading those not read so far.

        Raises:
            RequestError: names the tensors that changed since the lineage was written.
            TritterError: a file was changed since the folder was opened.
        """
        known = self.digests.results()
        for tensor in self.stored:
            if tensor.name not in known:
                self.read_stored(tensor.name)
        self.tensors.check_unchanged()
        known = self.digests.results()
        digests = {tensor.name: known[tensor.name] for tensor in self.stored}
        recorded = digests if self.lineage is None else self.lineage.tensor_digests
        changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
        if changed:
            raise RequestError(
                f"{self.folder} was changed since its lineage was written: {', '.join(changed)}."
            )
        return digests


def _check_ties(
    folder: Path, tensors: TensorFolder, family: Family, config: Config, *, embedding: str
) -> None:
    """Refuse a head that config.json ties to the embedding, and that is another in the files.

    transformers cuts such a tie when it loads the folder; leaving the head out would change the
    function in silence.
    """
    for name in sorted(family.tied_names(config) & set(tensors.files)):
        if not tensors.get(name).equal(tensors.get(embedding)):
            raise TritterError(
                f"{folder}: {name} differs from {embedding}, although config.json ties them. Say "
                "which it is: set tie_word_embeddings to false there to keep both, or take "
                f"{name} out of the files."
            )


def _check_files(folder: Path, lineage: Lineage) -> None:
    """Refuse a source whose config or tokenizer is not the one that its lineage speaks of.

    The card may be edited; `history --verify` names every change.
    """
    changed = []
    for name, digest in lineage.file_digests.items():
        check_inside(folder, name)
        path = folder / name
        if name != CARD_NAME and path.is_file() and bounded_digest(path) != digest:
            changed.append(name)
    if changed:
        raise TritterError(
            f"{folder} was changed since its lineage was written: {', '.join(changed)}."
        )

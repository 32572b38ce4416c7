"""A checkpoint folder opened for reading: matched to its family, hashed while it is read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.checkpoints.expert_files import ExpertFiles
from tritter.checkpoints.folder import (
    CARD_NAME,
    Artifact,
    TokenizerFiles,
    check_tokenizer_files,
    read_lineage,
)
from tritter.checkpoints.record import Lineage
from tritter.core.families import Config, Family, StoredTensor, family_of, match, padded_shapes
from tritter.errors import RequestError, TritterError
from tritter.storage.hashing import DigestQueue, bounded_digest
from tritter.storage.reading import check_inside
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import Pieces, TensorEntry, TensorStream, stripped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tritter.checkpoints.state import KeptSequences, State
    from tritter.core.stock_routers import AddedExperts


@dataclass(frozen=True)
class Source:
    """A checkpoint folder that is opened once: each of its records and headers is read once.

    Its tensors are read by logical name, one at a time.

    Args:
        config: of its model.
        lineage: its tritter.json; None for a plain Hugging Face folder.
        digests: of the tensors, computed while they are read.
    """

    folder: Path
    config: Config
    lineage: Lineage | None
    digests: DigestQueue = field(default_factory=DigestQueue, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, config: Config, *, has_lineage: bool = True) -> Source:
        """Open a folder from anywhere and check it against its config and its lineage.

        Args:
            has_lineage: False takes it for a plain folder, whatever tritter.json says.

        Raises:
            RequestError: the family is not known.
            TritterError: files are damaged or missing, tensors are left over, missing or of
                another shape, or files beside them changed since the lineage was written.
        """
        lineage = read_lineage(folder) if has_lineage else None
        source = cls(folder, config, lineage)
        source.check()
        return source

    @classmethod
    def written(cls, folder: Path, config: Config, lineage: Lineage) -> Source:
        """Return a folder that this process wrote or has checked; it is not checked again."""
        return cls(folder, config, lineage, DigestQueue.of(lineage.tensor_digests))

    def check(self) -> None:
        """Check the folder's files and headers against its config and its lineage.

        Raises:
            RequestError: the family is not known.
            TritterError: as `open`.
        """
        folder, on_disk = self.folder, padded_shapes(self.config)
        for tensor in self.stored:
            found = self.tensors.shape(tensor.name)
            wanted = on_disk.get(tensor.name, tensor.shape)
            if wanted != found:
                raise TritterError(
                    f"{folder}: {tensor.name} has shape {found}, but config.json asks for {wanted}."
                )
        # transformers cuts such a tie when it loads the folder; leaving the head out would change
        # the function in silence
        tensors, embedding = self.tensors, self.stored[0].name
        for name in sorted(self.family.tied_names(self.config) & set(tensors.files)):
            if not tensors.get(name).equal(tensors.get(embedding)):
                raise TritterError(
                    f"{folder}: {name} differs from {embedding}, although config.json ties "
                    "them. Say which it is: set tie_word_embeddings to false there to keep both, "
                    f"or take {name} out of the files."
                )
        check_tokenizer_files(folder)
        changed = []
        for name, digest in ({} if self.lineage is None else self.lineage.file_digests).items():
            check_inside(folder, name)
            path = folder / name
            # The card may be edited; `history --verify` names every change
            if name != CARD_NAME and path.is_file() and bounded_digest(path) != digest:
                changed.append(name)
        if changed:
            raise TritterError(
                f"{folder} was changed since its lineage was written: {', '.join(changed)}."
            )

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def tensors(self) -> TensorFolder:
        """The tensors as they are in the files."""
        return TensorFolder.open(self.folder)

    @cached_property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The model's tensors as the files hold them, the embedding first."""
        return match(self.config, self.tensors.files)

    @cached_property
    def places(self) -> dict[str, tuple[StoredTensor, int]]:
        """Logical name → (stored tensor, number of its part)."""
        return {
            part.tensor.name: (tensor, number)
            for tensor in self.stored
            for number, part in enumerate(tensor.parts)
        }

    @cached_property
    def live_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the files → shape without padding, of tensors that are padded there."""
        on_disk = padded_shapes(self.config)
        return {tensor.name: tensor.shape for tensor in self.stored if tensor.name in on_disk}

    @cached_property
    def added(self) -> AddedExperts | None:
        """Appended experts and their router offset; None without any."""
        from tritter.core.stock_routers import AddedExperts  # needs torch

        return AddedExperts.read(self.folder)

    @cached_property
    def experts(self) -> ExpertFiles | None:
        """The LoRA experts next to the model; None without any."""
        return ExpertFiles.read(self.folder, recorded=self.recorded_files)

    @property
    def own_lineage(self) -> Lineage:
        """The lineage of a folder that Tritter wrote."""
        assert self.lineage is not None, f"{self.folder} has no lineage"
        return self.lineage

    @property
    def recorded_files(self) -> Collection[str]:
        """Names of the files that the lineage has digests of."""
        return () if self.lineage is None else self.lineage.file_digests

    @cached_property
    def state(self) -> State | None:
        """The training state next to the model; None without any."""
        from tritter.checkpoints.state import read_state  # needs torch

        return read_state(self.folder)

    @cached_property
    def kept(self) -> KeptSequences:
        """The sequences kept next to the model for later training."""
        from tritter.checkpoints.state import KeptSequences  # needs torch

        return KeptSequences.read(self.folder)

    def artifacts(self) -> tuple[Artifact, ...]:
        """Return everything next to the model, each piece as it writes itself.

        Raises:
            TritterError: one is damaged, or of another format.
        """
        tokenizer = TokenizerFiles(self.folder)
        found = (tokenizer, self.state, self.added, self.kept, self.experts)
        return tuple(each for each in found if each is not None)

    def read(self, name: str) -> Tensor:
        """Read one tensor by its logical name; of experts that share one, its part alone."""
        stored, number = self.places[name]
        part = stored.parts[number]
        if stored.is_whole:
            return part.transposed(self.read_stored(stored.name))
        return part.transposed(self.tensors.get(stored.name, index=part.index))

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
        return TensorStream(entries, ((e.name, self._unread(e.name)) for e in entries))

    def _unread(self, name: str) -> Tensor | Pieces:
        """Return a tensor to be written as it is; one without padding keeps its digest."""
        if name in self.live_shapes:
            return self.read_stored(name)
        return Pieces(lambda: iter([self.read_stored(name)]), partial(self.digests.digest, name))

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

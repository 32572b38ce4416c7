"""A checkpoint opened for reading: matched to its family, hashed while it is read."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tritter.checkpoint.folder import CARD_NAME, read_lineage
from tritter.checkpoint.record import Lineage
from tritter.errors import TritterError
from tritter.families import Config, Family, LogicalTensor, family_of
from tritter.storage.hashing import file_digest, merkle_hash, tensor_digest
from tritter.storage.tensors import TensorFolder


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors of a checkpoint folder by logical name, read one at a time.

    Args:
        lineage: what the folder says of itself; None for a plain Hugging Face folder.
        logical: logical name → tensor.
        digests: name on disk → SHA-256, of what was read so far.
    """

    folder: Path
    config: Config
    family: Family
    tensors: TensorFolder
    lineage: Lineage | None
    logical: dict[str, LogicalTensor]
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, config: Config) -> "Source":
        """Open a folder and hold its tensors against its config.

        Raises:
            RequestError: the family is not known.
            TritterError: files are damaged or missing, tensors are left over, missing or of
                another shape, or files beside them changed since the lineage was written.
        """
        family = family_of(config)
        tensors = TensorFolder.open(folder)
        matched = family.match(tensors.files, config)
        for disk_name, tensor in matched.items():
            expected, found = family.shape(tensor, config), tensors.shape(disk_name)
            if expected != found:
                raise TritterError(
                    f"{folder}: {disk_name} has shape {found}, but config.json asks for {expected}."
                )
        lineage = read_lineage(folder)
        if lineage is not None:
            _check_files(folder, lineage)
        logical = {tensor.name: tensor for tensor in matched.values()}
        return cls(folder, config, family, tensors, lineage, logical)

    def read(self, name: str) -> Tensor:
        """Read one tensor by its logical name."""
        disk_name = self.logical[name].disk_name
        tensor = self.tensors.get(disk_name)
        if disk_name not in self.digests:
            self.digests[disk_name] = tensor_digest(disk_name, tensor)
        return tensor

    def model_hash(self) -> str:
        """Return the hash that the lineage states; of a plain folder, compute it now."""
        if self.lineage is not None:
            return self.lineage.model_hash
        for name in self.logical:
            self.read(name)
        return merkle_hash(self.digests)

    def check_unchanged(self) -> None:
        """Hold what was read against the lineage, once everything was read.

        Raises:
            TritterError: names the tensors that changed since the lineage was written.
        """
        if self.lineage is None or merkle_hash(self.digests) == self.lineage.model_hash:
            return
        recorded = self.lineage.tensor_digests
        changed = [name for name, digest in self.digests.items() if recorded.get(name) != digest]
        raise TritterError(
            f"{self.folder} was changed since its lineage was written: {', '.join(changed)}."
        )


def _check_files(folder: Path, lineage: Lineage) -> None:
    """Refuse a source whose config or tokenizer is not the one that its lineage speaks of.

    The card may be edited; `history --verify` names every change.
    """
    changed = [
        name
        for name, digest in lineage.file_digests.items()
        if name != CARD_NAME and (folder / name).is_file() and file_digest(folder / name) != digest
    ]
    if changed:
        raise TritterError(
            f"{folder} was changed since its lineage was written: {', '.join(changed)}."
        )

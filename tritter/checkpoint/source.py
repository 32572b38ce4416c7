"""A checkpoint opened for reading: matched to its family, hashed while it is read."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tritter.checkpoint.folder import CARD_NAME, read_lineage
from tritter.checkpoint.record import Lineage
from tritter.errors import RequestError, TritterError
from tritter.families import Config, Family, LogicalTensor, family_of
from tritter.storage.hashing import DigestQueue, file_digest
from tritter.storage.tensors import TensorFolder


@dataclass(frozen=True, slots=True)
class Source:
    """The tensors of a checkpoint folder by logical name, read one at a time.

    Args:
        lineage: what the folder says of itself; None for a plain Hugging Face folder.
        logical: logical name → tensor.
        digests: of what was read so far, computed aside.
    """

    folder: Path
    config: Config
    family: Family
    tensors: TensorFolder
    lineage: Lineage | None
    logical: dict[str, LogicalTensor]
    digests: DigestQueue = field(default_factory=DigestQueue)

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
        self.digests.add(disk_name, tensor)
        return tensor

    def disk_name(self, name: str) -> str:
        return self.logical[name].disk_name

    def read_digests(self) -> dict[str, str]:
        """Return name on disk → SHA-256 of every tensor, reading those not read so far.

        Raises:
            RequestError: names the tensors that changed since the lineage was written.
        """
        digests = self.digests.results()
        for name, tensor in self.logical.items():
            if tensor.disk_name not in digests:
                self.read(name)
        digests = self.digests.results()
        recorded = digests if self.lineage is None else self.lineage.tensor_digests
        changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
        if changed:
            raise RequestError(
                f"{self.folder} was changed since its lineage was written: {', '.join(changed)}."
            )
        return digests


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

"""What was left in a run's folder, by digest, and whether it still lies there as it was left.

A checkpoint is known by its own record, which names each of its tensors and files: to take note of
it nothing large is hashed, and what changed is told with its tensor. Of everything else each file
is known by the SHA-256 of its bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritter.checkpoint.folder import CARD_NAME, HEADER_MARK, lineage_of, read_lineage
from tritter.checkpoint.history import link_of, verify
from tritter.checkpoint.record import Lineage
from tritter.errors import TritterError
from tritter.storage.hashing import file_digest
from tritter.storage.reading import LINEAGE_NAME


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that does not lie there as it was left.

    Args:
        place: what was left, relative to the run's folder: a checkpoint, or a file.
        what: what is the matter with it, its file and tensor named.
        is_gone: there is nothing at all at its place.
    """

    place: str
    what: str
    is_gone: bool = False

    @property
    def is_missing(self) -> bool:
        """Whether the folder is there and a file of it is not."""
        return not self.is_gone and self.what.endswith(": missing")


def digests_of(
    folder: Path, places: Iterable[str], *, lineages: Mapping[str, Lineage] | None = None
) -> dict[str, str]:
    """Return place → digest of what was left: checkpoints, files, and all files of other folders.

    Args:
        places: relative to `folder`.
        lineages: place → lineage, of checkpoints that this process wrote or has open.
    """
    digests: dict[str, str] = {}
    known = lineages or {}
    for place in places:
        path = folder / place
        if path.is_file():
            digests[place] = file_digest(path)
        elif (lineage := known.get(place) or read_lineage(path)) is not None:
            digests[place] = _checkpoint_digest(lineage)
        else:
            files = sorted(file for file in path.rglob("*") if file.is_file())
            digests |= {f.relative_to(folder).as_posix(): file_digest(f) for f in files}
    return digests


def find_damage(folder: Path, left: Mapping[str, str]) -> tuple[Damage, ...]:
    """Hash what was left again and return what is not as `digests_of` found it."""
    found = []
    for place, digest in left.items():
        path = folder / place
        if not path.exists():
            found.append(Damage(place, f"{path} is gone", is_gone=True))
        elif path.is_dir():
            changes = list(checkpoint_changes(path))
            found += [Damage(place, what) for what in changes]
            if not changes and _checkpoint_digest(lineage_of(path)) != digest:
                what = f"{path} is another checkpoint than the one that was left there"
                found.append(Damage(place, what))
        else:
            try:
                if file_digest(path) != digest:
                    found.append(Damage(place, f"{path}: changed"))
            except (OSError, TritterError) as error:
                found.append(Damage(place, str(error)))
    return tuple(found)


def checkpoint_changes(folder: Path) -> Iterator[str]:
    """Yield what is not as a checkpoint's own record says, each with its file and tensor."""
    link = link_of(folder)
    if link.problem is None and link.lineage is None:
        yield f"{folder / LINEAGE_NAME}: missing"
        return
    for change in verify(link):
        if change.file != CARD_NAME:  # prose, and written anew with every record
            tensor = f", tensor {change.tensor}" if change.tensor else ""
            yield f"{folder / change.file}{tensor}: {change.what}"
    if link.file_digests is not None:
        known = {name.removesuffix(HEADER_MARK) for name in link.file_digests}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not path.is_dir() and not is_hidden and name not in {*known, LINEAGE_NAME}:
                yield f"{path}: added"


def _checkpoint_digest(lineage: Lineage) -> str:
    """Return the digest of a checkpoint's tensors and files; its card and its record may be
    written anew when its training has been judged.
    """
    files = {name: d for name, d in lineage.file_digests.items() if name != CARD_NAME}
    text = json.dumps([lineage.model_hash, sorted(files.items())])
    return hashlib.sha256(text.encode()).hexdigest()

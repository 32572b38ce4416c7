"""Links within a checkpoint, run or dataset folder: they may not lead out of it.

A folder from elsewhere could name any file of this machine in that way, and what is read is copied
into results; what a run writes would land there.
"""

import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path

from tritter.errors import TritterError
from tritter.storage.reading import kind_of

# Folders inside a checkpoint in which something is read, by us or by transformers.
_INNER_FOLDERS = ("state", "experts", "additional_chat_templates")


def check_links(folder: Path) -> None:
    """Refuse a checkpoint folder with a link that ends outside; reads no file.

    The folder itself may be a link. In a snapshot of the hub's cache, links may end among the
    blobs that belong to it, as all of its files do.

    Raises:
        TritterError: names the link and where it ends.
    """
    for path in _entries(folder):
        if path.is_symlink():
            check_inside(folder, str(path.relative_to(folder)))


def check_tree(folder: Path, *, passed_over: Container[str] = ()) -> None:
    """Refuse a folder with a link that leads out of it, or with what is neither file nor folder.

    Looks at names alone: a pipe or a device is not opened.

    Args:
        passed_over: folders directly in it whose contents belong to somebody else.

    Raises:
        TritterError: names it.
    """
    for above, folders, files in os.walk(folder):
        if Path(above).parent == folder and Path(above).name in passed_over:
            folders.clear()
            continue
        for path in (Path(above, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                check_inside(folder, str(path.relative_to(folder)))
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise TritterError(f"{path} is {kind_of(mode)}, not a file.")


def check_inside(folder: Path, name: str) -> None:
    """Refuse a name, as a record may hold it, that leads out of a checkpoint folder, or nowhere.

    Raises:
        TritterError: says where it leads.
    """
    place, end = os.path.realpath(folder), os.path.realpath(folder / name)
    if Path(end).is_symlink():  # no end was found
        raise TritterError(f"{folder}: {name} is a link that leads in a circle.")
    roots = [place, *_blobs(Path(place))]
    if not any(end == root or end.startswith(root + os.sep) for root in roots):
        raise TritterError(
            f"{folder}: {name} leads out of the folder, to {end}; nothing there is read. Put the "
            "file itself into the folder."
        )


def _entries(folder: Path) -> Iterator[Path]:
    try:
        for entry in os.scandir(folder):
            yield Path(entry.path)
            if entry.name in _INNER_FOLDERS and entry.is_dir(follow_symlinks=False):
                for above, folders, files in os.walk(entry.path):
                    yield from (Path(above, name) for name in (*folders, *files))
    except OSError:  # no folder, or one that can't be read: whoever reads a file of it says so
        return


def _blobs(place: Path) -> Iterator[str]:
    """Yield where the files of a snapshot in the hub's cache lie: its own blobs, the shared ones.

    CACHE/models--OWNER--NAME/snapshots/REVISION links to CACHE/models--OWNER--NAME/blobs, whose
    entries may link to CACHE/blobs. A dataset has `datasets` for `models`.
    """
    for snapshots in place.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(
            ("models--", "datasets--")
        ):
            yield str(snapshots.parent / "blobs")
            yield str(snapshots.parent.parent / "blobs")

"""The door for files and folders that somebody else may have written: all are opened here.

A checkpoint folder comes from anywhere. A pipe in it would never end, a device may do anything, a
link to the zero device or a file that was blown up would fill memory. A link could name any file of
this machine, and what is read is copied into results. So files are opened here, regular ones of
bounded size and depth; a file that a library opens by itself is checked here first; and links may
not lead out of their folder. Code behind this door trusts what it gets.
"""

import json
import math
import os
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from tritter.errors import RequestError, TritterError, brief, key_name

LINEAGE_NAME = "tritter.json"
RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"  # of a run folder
LEDGER_NAME = "ledger.json"  # of a run folder: what its stages left

# File name → bytes up to which it is read; the largest real ones are a tenth of that.
_MAX_BYTES = {
    "config.json": 4 * 2**20,
    "state.json": 16 * 2**20,
    "router.json": 2**20,
    "experts.json": 64 * 2**20,
    "experts.safetensors": 2**32,
    "tritter.json": 64 * 2**20,
    "model.safetensors.index.json": 64 * 2**20,
    "replay.safetensors": 2**30,
    "written.safetensors": 2**30,
    "ledger.json": 64 * 2**20,
    "checkpoint.json": 256 * 2**20,
    "tokenizer.json": 256 * 2**20,
    "vocab.json": 64 * 2**20,
    "merges.txt": 64 * 2**20,
    "tokenizer.model": 64 * 2**20,
}
_MAX_BYTES_OF_OTHERS = 16 * 2**20
MAX_HEADER_BYTES = 100_000_000  # of safetensors, as its own reader has it
_MAX_DEPTH = 64  # of lists in lists; a saved training nests 22 deep
_MAX_NUMBER = 10**100  # far below what no float holds; tokenizers write 10³⁰ for "no limit"

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(mode: int) -> str:
    """Say what a file's mode makes of it: a file, a folder, a pipe."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def max_bytes(path: Path) -> int:
    """Return how large a file of this name may be to be read whole."""
    return _MAX_BYTES.get(path.name, _MAX_BYTES_OF_OTHERS)


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; never waits for a pipe and never touches a device.

    Raises:
        TritterError: there is none, it is something else than a regular file, or the system does
            not let it be read; also while the block reads from it.
    """
    try:
        # Opening a device can do things by itself, so its kind is looked at before, and again
        # afterwards: what is opened is what counts
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _require_regular(path, os.fstat(descriptor).st_mode)
            yield file
    except (OSError, ValueError) as error:
        if isinstance(error, TritterError):
            raise
        raise TritterError(f"{path} cannot be read: {_reason(error)}.") from error


def require_file(path: Path, *, is_read_whole: bool = True) -> None:
    """Refuse what a library should not be given to open.

    Args:
        is_read_whole: its size is limited too.

    Raises:
        TritterError: as `open_file`, or it is too large.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
    if is_read_whole and size > max_bytes(path):
        raise _too_large(path, max_bytes(path))


def read_text(path: Path, *, limit_bytes: int | None = None) -> str:
    """Return the text of a small file.

    Args:
        limit_bytes: of a file whose name does not say how large it may be.

    Raises:
        TritterError: as `open_file`; it is too large for its name, or not UTF-8.
    """
    limit = max_bytes(path) if limit_bytes is None else limit_bytes
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(path, limit)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TritterError(f"{path} cannot be read: it is not UTF-8 text.") from error


def read_object(path: Path, *, limit_bytes: int | None = None) -> dict[str, Any]:
    """Return the JSON object that a small file holds.

    Raises:
        TritterError: as `read_text`; it is no JSON object, is nested too deeply, or holds numbers
            or text that nothing after this could handle.
    """
    return parse_object(read_text(path, limit_bytes=limit_bytes), path=path)


def parse_object(text: str, *, path: Path) -> dict[str, Any]:
    """Return the JSON object that a text is, which was read from `path`.

    Raises:
        TritterError: as `read_object`.
    """
    try:
        content = json.loads(text)
        waiting: list[tuple[object, int]] = [(content, 1)]
        while waiting:  # for values that pass as JSON and break what is done with them
            value, depth = waiting.pop()
            if isinstance(value, dict | list):
                if depth > _MAX_DEPTH:
                    raise ValueError("it is nested too deeply")
                waiting += [(item, depth + 1) for item in value]
                if isinstance(value, dict):
                    waiting += [(item, depth + 1) for item in value.values()]
            elif isinstance(value, str):
                if not value.isascii():
                    value.encode()  # halves of a pair of surrogates are no text
            elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
                raise ValueError(f"it holds a number of {int(math.log10(abs(value))) + 1} digits")
    except RecursionError as error:
        raise TritterError(f"{path} cannot be read: it is nested too deeply.") from error
    except ValueError as error:
        raise TritterError(f"{path} cannot be read: {_reason(error)}.") from error
    if not isinstance(content, dict):
        raise TritterError(f"{path} cannot be read: it holds no JSON object.")
    return content


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise TritterError(f"{path} cannot be read: it is {kind_of(mode)}, not a file.")


def _too_large(path: Path, limit_bytes: int) -> TritterError:
    limit = limit_bytes // 2**20
    return TritterError(f"{path} cannot be read: it is larger than {limit} MiB.")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a character (a lone surrogate)"
    return str(error)


_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # as Linux has them


def named_path(name: str | os.PathLike[str], *, key: str) -> Path:
    """Return the path that a person named.

    Args:
        key: what asked for it, for messages.

    Raises:
        RequestError: it is no path, or no file could have that name.
    """
    reason = _why_not(name)
    if reason is not None:
        raise RequestError(f"{key_name(key)} = {brief(name)}: {reason}.")
    path = Path(name).expanduser()
    # What stands before a .. need not exist, and then the system finds nothing behind it
    return path.resolve() if ".." in path.parts else path


def _why_not(name: object) -> str | None:
    if not isinstance(name, str | os.PathLike):
        return "a path is needed"
    try:
        text = os.fspath(name)
        if not isinstance(text, str):
            return "a path is text"
        path = Path(text).expanduser()
        sizes = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeError:
        return "no file's name holds half of a character"
    except RuntimeError:
        return f"there is no user {text.partition('/')[0]}"
    if "\0" in text:
        return "no file's name holds a NUL character"
    if max(sizes, default=0) > _MAX_NAME_BYTES or sum(sizes) + len(sizes) > _MAX_PATH_BYTES:
        return f"a name has at most {_MAX_NAME_BYTES} bytes, a path at most {_MAX_PATH_BYTES}"
    return None


# Links within a folder

# Folders inside a checkpoint in which something is read, by us or by transformers.
_INNER_FOLDERS = ("state", "experts", "additional_chat_templates")


def check_links(folder: Path) -> None:
    """Refuse a checkpoint folder with a link that ends outside; reads no file.

    The folder itself may be a link. In a snapshot of the hub's cache, links may end among the
    blobs that belong to it, as all of its files do.

    Raises:
        TritterError: names the link and where it ends.
    """
    with suppress(OSError):  # no folder, or unreadable: whoever reads a file of it says so
        for entry in os.scandir(folder):
            paths = [Path(entry.path)]
            if entry.name in _INNER_FOLDERS and entry.is_dir(follow_symlinks=False):
                for above, folders, files in os.walk(entry.path):
                    paths += [Path(above, name) for name in (*folders, *files)]
            for path in filter(Path.is_symlink, paths):
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
    roots = [place]
    # In the hub's cache, CACHE/models--OWNER--NAME/snapshots/REVISION links to
    # CACHE/models--OWNER--NAME/blobs, whose entries may link to CACHE/blobs
    for snapshots in Path(place).parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith(("models--", "datasets--")):
            roots += [str(repository / "blobs"), str(repository.parent / "blobs")]
    if not any(end == root or end.startswith(root + os.sep) for root in roots):
        raise TritterError(
            f"{folder}: {name} leads out of the folder, to {end}; nothing there is read. Put the "
            "file itself into the folder."
        )

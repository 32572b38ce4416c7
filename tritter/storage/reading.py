"""Safe reading of untrusted files and folders. All such files are opened here.

A checkpoint folder can come from anywhere. A pipe in it would never end. A device can do anything.
A link to the zero device or an oversized file would fill memory. A link could point to any file of
this machine, and results contain copies of what is read.

So only regular files of bounded size and depth are opened. Files that a library opens are checked
here first. Links must not leave their folder. Other code trusts the result.
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
TOKENIZER_NAME = "tokenizer.json"
SAVED_NAME = "saved"  # of a training folder: state from which a killed training run resumes

# File name → maximum size; the largest real files have a tenth of it.
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
    TOKENIZER_NAME: 256 * 2**20,
    **dict.fromkeys(("vocab.json", "merges.txt", "tokenizer.model", "tekken.json"), 64 * 2**20),
}
_MAX_BYTES_OF_OTHERS = 16 * 2**20
_MAX_DEPTH = 64  # of nested lists; a saved training state nests 22 deep
_MAX_NUMBER = 10**100  # still a finite float; tokenizers write 10³⁰ for "no limit"

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # the limits of Linux
# Subfolders of a checkpoint that Tritter or transformers reads.
_INNER_FOLDERS = ("state", "experts", "additional_chat_templates")


def kind_of(mode: int) -> str:
    """Return the kind of a file by its mode: a file, a folder, a pipe."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _max_bytes(path: Path) -> int:
    """Return the maximum size of a file with this name that is read into memory."""
    return _MAX_BYTES.get(path.name, _MAX_BYTES_OF_OTHERS)


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading, without waiting for a pipe or touching a device."""
    try:
        # Opening a device can have side effects, so check the kind before opening it, and again
        # afterwards, in case the file was replaced in between
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
    """Refuse a file that is not safe for a library to open.

    Args:
        path: File to check.
        is_read_whole: Whether to limit its size too.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
    if is_read_whole and size > _max_bytes(path):
        raise _too_large(path, _max_bytes(path))


def read_text(path: Path, *, limit_bytes: int | None = None) -> str:
    """Return the content of a small text file.

    Args:
        path: File to read.
        limit_bytes: Maximum size. Default: the limit for files of this name.
    """
    limit = _max_bytes(path) if limit_bytes is None else limit_bytes
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(path, limit)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TritterError(f"{path} cannot be read: it is not UTF-8 text.") from error


def read_object(path: Path, *, limit_bytes: int | None = None) -> dict[str, Any]:
    """Return the JSON object in a small file."""
    return parse_object(read_text(path, limit_bytes=limit_bytes), path=path)


def parse_object(text: str, *, path: Path) -> dict[str, Any]:
    """Parse the text of the JSON file at `path` and return its object."""
    try:
        content = json.loads(text)
        waiting: list[tuple[object, int]] = [(content, 1)]
        while waiting:  # find values that are valid JSON but cannot be handled later
            value, depth = waiting.pop()
            if isinstance(value, dict | list):
                if depth > _MAX_DEPTH:
                    raise ValueError("it is nested too deeply")
                waiting += [(item, depth + 1) for item in value]
                if isinstance(value, dict):
                    waiting += [(item, depth + 1) for item in value.values()]
            elif isinstance(value, str):
                if not value.isascii():
                    value.encode()  # raises for lone surrogates
            elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
                raise ValueError(
                    f"it contains a number of {int(math.log10(abs(value))) + 1} digits"
                )
    except RecursionError as error:
        raise TritterError(f"{path} cannot be read: it is nested too deeply.") from error
    except ValueError as error:
        raise TritterError(f"{path} cannot be read: {_reason(error)}.") from error
    if not isinstance(content, dict):
        raise TritterError(f"{path} cannot be read: it is not a JSON object.")
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
        return "it contains half of a character (a lone surrogate)"
    return str(error)


def named_path(name: str | os.PathLike[str], *, key: str) -> Path:
    """Return a path that the user typed.

    Args:
        name: The path as typed.
        key: Option that it was typed for, for error messages.
    """
    reason = _name_problem(name)
    if reason is not None:
        raise RequestError(f"{key_name(key)} = {brief(name)}: {reason}.")
    path = Path(name).expanduser()
    # The folder before a .. need not exist; then the system could not follow the path
    return path.resolve() if ".." in path.parts else path


def _name_problem(name: object) -> str | None:
    if not isinstance(name, str | os.PathLike):
        return "a path is required"
    try:
        text = os.fspath(name)
        if not isinstance(text, str):
            return "a path must be a string"
        path = Path(text).expanduser()
        sizes = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeError:
        return "file names cannot contain half of a character (a lone surrogate)"
    except RuntimeError:
        return f"there is no user {text.partition('/')[0]}"
    if "\0" in text:
        return "file names cannot contain a NUL character"
    if max(sizes, default=0) > _MAX_NAME_BYTES or sum(sizes) + len(sizes) > _MAX_PATH_BYTES:
        return f"a name has at most {_MAX_NAME_BYTES} bytes, a path at most {_MAX_PATH_BYTES}"
    return None


# Links within a folder


def check_links(folder: Path) -> None:
    """Refuse a checkpoint folder with a link that leaves it, without reading any file.

    The folder itself may be a link. In a snapshot of the hub cache, all files are links to the
    blobs of the same repository; these are allowed.
    """
    with suppress(OSError):  # no folder, or unreadable: reading a file of it raises the error
        for entry in os.scandir(folder):
            paths = [Path(entry.path)]
            if entry.name in _INNER_FOLDERS and entry.is_dir(follow_symlinks=False):
                for above, folders, files in os.walk(entry.path):
                    paths += [Path(above, name) for name in (*folders, *files)]
            for path in filter(Path.is_symlink, paths):
                check_inside(folder, str(path.relative_to(folder)))


def check_tree(folder: Path, *, skipped: Container[str] = ()) -> None:
    """Refuse a folder that contains a link out of it, a pipe, a socket or a device.

    No file is opened.

    Args:
        folder: Folder to check.
        skipped: Names of subfolders to skip.
    """
    for above, folders, files in os.walk(folder):
        if Path(above).parent == folder and Path(above).name in skipped:
            folders.clear()
            continue
        for path in (Path(above, name) for name in (*folders, *files)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                check_inside(folder, str(path.relative_to(folder)))
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise TritterError(f"{path} is {kind_of(mode)}, not a file.")


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file name from a record that leaves the checkpoint folder or is a circular link."""
    root, end = os.path.realpath(folder), os.path.realpath(folder / name)
    if Path(end).is_symlink():  # realpath could not resolve it
        raise TritterError(f"{folder}: {name} is a circular link.")
    roots = [root]
    # In the hub's cache, CACHE/models--OWNER--NAME/snapshots/REVISION links to
    # CACHE/models--OWNER--NAME/blobs, whose entries may link to CACHE/blobs
    for snapshots in Path(root).parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith(("models--", "datasets--")):
            roots += [str(repository / "blobs"), str(repository.parent / "blobs")]
    if not any(end == root or end.startswith(root + os.sep) for root in roots):
        raise TritterError(
            f"{folder}: {name} leaves the folder and points to {end}, which is not read. Copy the "
            "file into the folder."
        )

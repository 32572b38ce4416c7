"""The embedded corpus: the documentation and the sources of the running Python's own library."""

import ast
import logging
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tritter.data.documents import Document
from tritter.data.source_code import documented_nodes, strip_documentation
from tritter.errors import RequestError

logger = logging.getLogger(__name__)

MINIMUM_DOCSTRING_CHARACTERS = 40
GATHERING_VERSION = 1  # raise it when the same files would give other documents
TOPICS = "pydoc_data/topics.py"
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Written when Python was built: the paths and flags of one machine, not a text.
GENERATED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, slots=True)
class StdlibText:
    """What one pass over the library found; `skipped` names the files that could not be read."""

    prose: tuple[Document, ...]
    code: tuple[Document, ...]
    skipped: tuple[str, ...]


def gather(root: Path | None = None) -> StdlibText:
    """Read documentation and sources of the library in one pass, in the order of their paths.

    Modules are parsed, never imported. An identifier is the path below `root`, or
    `pydoc_data/topics/NAME` for a topic of pydoc.

    Args:
        root: folder of the library; by default that of the running Python.

    Raises:
        RequestError: the library has no sources.
    """
    root = root or stdlib_root()
    prose, code = _topics(root), list[Document]()
    skipped: list[str] = []
    for path in source_files(root):
        identifier = path.relative_to(root).as_posix()
        try:
            source, tree = _parse(path)
        except (OSError, SyntaxError, ValueError):
            skipped.append(identifier)
            continue
        _append(prose, identifier, _docstrings(tree))
        _append(code, identifier, strip_documentation(source, tree=tree))
    if not code:
        raise RequestError(
            f"data: no Python sources below {root}. This Python carries its library zipped or "
            f"compiled, so the built-in corpus cannot be read; run with a full installation "
            f"(python.org, uv, pyenv, conda, or the distribution's complete python3 package)."
        )
    if skipped:
        logger.warning("%d library files could not be read: %s", len(skipped), ", ".join(skipped))
    return StdlibText(prose=tuple(prose), code=tuple(code), skipped=tuple(skipped))


def stdlib_root() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib")).resolve()


def stdlib_origin() -> str:
    """Return the words under which the embedded corpus is recorded."""
    return f"python {platform.python_version()} standard library"


def source_files(root: Path) -> tuple[Path, ...]:
    """Return the library's source files, sorted, without tests, data and installed packages."""
    return tuple(sorted(_walk(root)))


def stdlib_fingerprint(root: Path | None = None) -> str:
    """Return a hash that changes when the library's files do, without reading them.

    It covers Python's version, the folder, and each file's path, size and time of change.
    """
    root = root or stdlib_root()
    digest = sha256(f"{GATHERING_VERSION}\0{platform.python_version()}\0{root}".encode())
    for path in (root / TOPICS, *source_files(root)):
        if path.is_file():
            status = path.stat()
            digest.update(f"\0{path}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in EXCLUDED_FOLDERS and not name.startswith(GENERATED_PREFIXES)
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(GENERATED_PREFIXES):
                yield Path(folder, name)


def _parse(path: Path) -> tuple[str, ast.Module]:
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        return source, ast.parse(source)


def _docstrings(tree: ast.Module) -> str:
    found = (ast.get_docstring(node) for node in documented_nodes(tree))
    return "\n\n".join(text for text in found if text and len(text) > MINIMUM_DOCSTRING_CHARACTERS)


def _topics(root: Path) -> list[Document]:
    if not (root / TOPICS).is_file():
        return []
    _, tree = _parse(root / TOPICS)
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    documents: list[Document] = []
    for name, text in sorted(topics.items()):
        _append(documents, f"pydoc_data/topics/{name}", text)
    return documents


def _append(documents: list[Document], identifier: str, text: str) -> None:
    if text.strip():
        # A docstring may spell an unpaired surrogate, which no UTF-8 file can hold.
        encodable = text.encode("utf-8", errors="replace").decode("utf-8")
        documents.append(Document(identifier, encodable))

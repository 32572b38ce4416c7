"""Built-in data: the Python standard library's documentation and code, and generated skills."""

import ast
import logging
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

from tritter.data.documents import Document, Documents, pieces_of_chunks
from tritter.data.skills import SkillText
from tritter.errors import RequestError, nearest, refused

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_REMOVED = "\0"  # cannot occur in a source that was parsed
# Strings come first: a number sign inside a string does not start a comment.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:[^"\\]+|\\.|"(?!""))*+"""'
    r"|'''(?:[^'\\]+|\\.|'(?!''))*+'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*'"
    r"|(?P<comment>#[^\n]*)",
    re.DOTALL,
)
_EMPTIED_LINES = re.compile(rf"^[ \t]*{_REMOVED}[ \t{_REMOVED}]*\n", re.MULTILINE)
_EMPTIED_TAIL = re.compile(rf"[ \t]*{_REMOVED}")
_logger = logging.getLogger(__name__)

_MINIMUM_DOCSTRING_CHARACTERS = 40
_GATHERING_VERSION = 1  # increment when the same files would yield other documents
_TOPICS = "pydoc_data/topics.py"
_EXCLUDED_FOLDERS = frozenset(
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
# Build artefacts: paths and flags of one machine.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")


def _documented_nodes(node: ast.AST) -> Iterator[_Documented]:
    """Yield a module and its classes and functions that have a docstring, in order."""
    if isinstance(node, _Documented) and _docstring_of(node):
        yield node
    # Statements only: expressions hold no definitions, and are most of the tree.
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _documented_nodes(child)


def _strip_documentation(source: str, *, tree: ast.Module) -> str:
    """Return `source` without docstrings, comments and the lines that become empty.

    A docstring that is a whole body, or shares its line, becomes `pass`, so the result still
    parses. In Python 3.12 or later, a number sign inside an f-string with nested quotes of the
    same kind can be mistaken for a comment.

    Args:
        source: the code of a module.
        tree: `ast.parse(source)`.
    """
    cuts = [  # start, end, replacement
        (match.start(), match.end(), _REMOVED)
        for match in _STRING_OR_COMMENT.finditer(source)
        if match.group("comment")
    ]
    # Not splitlines: it breaks lines at form feeds, the parser does not.
    lines = re.split(r"(?<=\n)", source)
    line_starts = [0, *accumulate(len(line) for line in lines)]

    def position_of(line_number: int, num_bytes: int) -> int:  # the parser counts UTF-8 bytes
        before = lines[line_number - 1].encode()[:num_bytes].decode()
        return line_starts[line_number - 1] + len(before)

    for node in _documented_nodes(tree):
        statement = _docstring_of(node)
        assert statement is not None and statement.end_lineno and statement.end_col_offset
        is_whole_body = len(node.body) == 1 and not isinstance(node, ast.Module)
        start = position_of(statement.lineno, statement.col_offset)
        end = position_of(statement.end_lineno, statement.end_col_offset)
        shares_line = source[end : end + 9].lstrip(" \t").startswith(";")
        cuts.append((start, end, "pass" if is_whole_body or shares_line else _REMOVED))
    pieces, position = [], 0
    for start, end, replacement in sorted(cuts):
        pieces += [source[position:start], replacement]
        position = end
    marked = "".join([*pieces, source[position:]])
    stripped = _EMPTIED_TAIL.sub("", _EMPTIED_LINES.sub("", marked))
    return stripped.strip("\n") + "\n" if stripped.strip() else ""


def _docstring_of(node: _Documented) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first if isinstance(first.value.value, str) else None
    return None


def _source_files(root: Path) -> tuple[Path, ...]:
    """Return the library's sorted source files, without tests, data and installed packages."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _EXCLUDED_FOLDERS and not name.startswith(_GENERATED_PREFIXES)
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_GENERATED_PREFIXES):
                found.append(Path(folder, name))
    return tuple(sorted(found))


def _parse(path: Path) -> tuple[str, ast.Module]:
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in third-party strings
        return source, ast.parse(source)


def _append(documents: list[Document], identifier: str, text: str) -> None:
    if text.strip():
        # A docstring may contain an unpaired surrogate, which UTF-8 cannot encode.
        encodable = text.encode("utf-8", errors="replace").decode("utf-8")
        documents.append(Document(identifier, encodable))


class Stdlib:
    """The documentation and the sources of a standard library.

    Args:
        root: its folder; defaults to that of the running Python.
    """

    TEXTS: ClassVar[tuple[str, ...]] = ("stdlib:prose", "stdlib:code")

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib")).resolve()

    @property
    def origin(self) -> str:
        """The recorded origin of its texts."""
        return f"python {platform.python_version()} standard library"

    @property
    def fingerprint(self) -> str:
        """A hash of its files without reading them.

        It covers Python's version, the folder, and each file's path, size and modification time.
        """
        version = f"{_GATHERING_VERSION}\0{platform.python_version()}\0{self.root}"
        digest = sha256(version.encode())
        for path in (self.root / _TOPICS, *_source_files(self.root)):
            if path.is_file():
                status = path.stat()
                digest.update(f"\0{path}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        return digest.hexdigest()

    @cached_property
    def texts(self) -> dict[str, list[Document]]:
        """`prose`, the documentation, and `code`, the sources, read in one pass, sorted by path.

        Modules are parsed, never imported. A document's identifier is its path relative to the
        folder, or `pydoc_data/topics/NAME` for a pydoc topic.
        """
        root, prose, code = self.root, list[Document](), list[Document]()
        skipped: list[str] = []
        if (root / _TOPICS).is_file():
            _, tree = _parse(root / _TOPICS)
            assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
            topics: dict[str, str] = ast.literal_eval(assignment.value)
            for name, text in sorted(topics.items()):
                _append(prose, f"pydoc_data/topics/{name}", text)
        for path in _source_files(root):
            identifier = path.relative_to(root).as_posix()
            try:
                source, tree = _parse(path)
            except (OSError, SyntaxError, ValueError):
                skipped.append(identifier)
                continue
            docstrings = (ast.get_docstring(node) or "" for node in _documented_nodes(tree))
            long = (text for text in docstrings if len(text) > _MINIMUM_DOCSTRING_CHARACTERS)
            _append(prose, identifier, "\n\n".join(long))
            _append(code, identifier, _strip_documentation(source, tree=tree))
        if not code:
            raise RequestError(
                f"data: no Python sources in {root}. This Python ships its library zipped or "
                f"compiled, so the built-in corpus cannot be read. Use a full installation "
                f"(python.org, uv, pyenv, conda, or the distribution's complete python3 package)."
            )
        if skipped:
            names = ", ".join(skipped)
            _logger.warning("%d library files could not be read: %s", len(skipped), names)
        return {"prose": prose, "code": code}

    def documents(self, name: str) -> Documents:
        """Return the distinct documents of `prose` or `code`, without blanks around them.

        Without the blanks, results of earlier versions stay comparable.
        """
        return Documents.of(
            part.strip()
            for each in self.texts[name]
            for part in pieces_of_chunks([each.text.strip()])
        )


def is_built_in(path: str) -> bool:
    """Return True if a path has the prefix of a built-in text."""
    return path.startswith(("stdlib:", SkillText.PREFIX))


def built_in_path(key: str, path: str) -> str:
    """Return the recorded name of a built-in text; for a skill, including its example count.

    Args:
        key: the configuration key, for messages.
        path: the name as typed.
    """
    if path.startswith(SkillText.PREFIX):
        return str(SkillText.named(key, path))
    if path in Stdlib.TEXTS:
        return path
    reason = f"the built-in texts are {', '.join(Stdlib.TEXTS)} and {SkillText.PREFIX}NAME"
    raise refused(key, path, reason, near=nearest(path, Stdlib.TEXTS))


@cache
def built_in_documents(path: str) -> Documents:
    """Return the documents of a built-in text."""
    if built_in_path("data", path).startswith(SkillText.PREFIX):
        return Documents.of(SkillText.named("data", path).texts())
    return _library().documents(path.removeprefix("stdlib:"))


def built_in_origin(paths: Iterable[str]) -> str:
    """Return the recorded origin of the built-in texts among some paths; empty without any."""
    kinds = {path.startswith(SkillText.PREFIX) for path in paths if is_built_in(path)}
    origins = {False: _library().origin, True: SkillText.ORIGIN}
    return " and ".join(origins[is_skill] for is_skill in sorted(kinds))


@cache
def _library() -> Stdlib:
    return Stdlib()

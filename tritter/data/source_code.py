"""Taking docstrings and comments out of Python sources, with the layout of the rest kept."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

_REMOVED = "\0"  # cannot occur in a source that was parsed
# Strings come first, so that a number sign within one is not taken for a comment.
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


@dataclass(frozen=True, slots=True)
class _Cut:
    start: int
    end: int
    replacement: str


def documented_nodes(tree: ast.Module) -> tuple[Documented, ...]:
    """Return the module and its classes and functions that open with a docstring, in order."""
    return tuple(_with_docstring(tree))


def strip_documentation(source: str, *, tree: ast.Module) -> str:
    """Return `source` without docstrings, comments, and the lines that held nothing else.

    A docstring that was a whole body, or shared its line, becomes `pass`, so that the result
    still parses. `tree` is `ast.parse(source)`. From Python 3.12 on, a number sign inside an
    f-string that nests its own kind of quote can be taken for a comment.
    """
    cuts = _docstring_cuts(source, tree) + _comment_cuts(source)
    pieces, position = [], 0
    for cut in sorted(cuts, key=lambda each: each.start):
        pieces += [source[position : cut.start], cut.replacement]
        position = cut.end
    marked = "".join([*pieces, source[position:]])
    stripped = _EMPTIED_TAIL.sub("", _EMPTIED_LINES.sub("", marked))
    return stripped.strip("\n") + "\n" if stripped.strip() else ""


def _with_docstring(node: ast.AST) -> Iterator[Documented]:
    if isinstance(node, Documented) and _docstring_of(node):
        yield node
    # Statements only: expressions hold no definitions, and are most of the tree.
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _with_docstring(child)


def _docstring_of(node: Documented) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first if isinstance(first.value.value, str) else None
    return None


def _docstring_cuts(source: str, tree: ast.Module) -> list[_Cut]:
    # Not splitlines: a form feed ends a line for that, and not for the parser.
    lines = re.split(r"(?<=\n)", source)
    line_starts = [0, *accumulate(len(line) for line in lines)]
    cuts = []
    for node in _with_docstring(tree):
        statement = _docstring_of(node)
        assert statement is not None and statement.end_lineno and statement.end_col_offset
        is_whole_body = len(node.body) == 1 and not isinstance(node, ast.Module)
        start = line_starts[statement.lineno - 1]
        start += _column(lines, statement.lineno, statement.col_offset)
        end = line_starts[statement.end_lineno - 1]
        end += _column(lines, statement.end_lineno, statement.end_col_offset)
        shares_line = source[end : end + 9].lstrip(" \t").startswith(";")
        cuts.append(
            _Cut(
                start,
                end,
                "pass" if is_whole_body or shares_line else _REMOVED,
            )
        )
    return cuts


def _column(lines: Sequence[str], line_number: int, num_bytes: int) -> int:
    """Return the column in characters; the parser counts the bytes of UTF-8."""
    line = lines[line_number - 1]
    return num_bytes if line.isascii() else len(line.encode()[:num_bytes].decode())


def _comment_cuts(source: str) -> list[_Cut]:
    return [
        _Cut(match.start(), match.end(), _REMOVED)
        for match in _STRING_OR_COMMENT.finditer(source)
        if match.group("comment")
    ]

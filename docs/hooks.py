"""What `make docs` changes of the pages, which are written for a reader of the repository."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
_FILE = re.compile(r"^```(\w+) file=(\S+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files of the repository where a page links to them, and files above their content.

    The site does not hold the first, and its Markdown knows no fence that says more than a
    language.
    """
    return _FILE.sub(r"`\2`\n\n```\1", _OUTSIDE.sub(r"\1 (`\2`)", markdown))

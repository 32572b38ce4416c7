"""Changes that `make docs` makes to the pages, which are written for readers of the repository."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^):#]+)(?:#[^)]*)?\)")
_FILE = re.compile(r"^```(\w+) file=(\S+)$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Print the path of a repository file in place of a link, and file names above their content.

    The site does not contain files outside docs/, and its Markdown accepts a language only after
    a fence.
    """
    folder = posixpath.dirname(page.file.src_uri)

    def shown(link: "re.Match[str]") -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return f"{link[1]} (`{target[3:]}`)" if target.startswith("../") else link[0]

    return _FILE.sub(r"`\2`\n\n```\1", _LINK.sub(shown, markdown))

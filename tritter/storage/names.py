"""Names of places as people type them: `~` opened, and no name that a system cannot have."""

import os
from pathlib import Path

from tritter.errors import RequestError, brief

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
        raise RequestError(f"{key} = {brief(name)}: {reason}.")
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

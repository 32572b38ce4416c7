"""A checkpoint by its name: a folder as it is, or one that the hub gives."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritter.errors import refused
from tritter.storage.reading import named_path


def locate(checkpoint: str, *, key: str = "checkpoint") -> Path:
    """Return the folder of a checkpoint: a folder as it is, a hub id downloaded.

    Of a hub id only configs, tokenizer files and safetensors are fetched; nothing is executed.

    Args:
        key: that named it, for messages.

    Raises:
        RequestError: neither a folder nor a hub id that can be reached.
    """
    folder = named_path(checkpoint, key=key)
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise refused(key, checkpoint, "no such folder, and no hub id (owner/name)")
    from huggingface_hub import constants, errors, snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        with quiet_hub():
            return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, errors.GatedRepoError):
            reason = "on the hub it is gated: accept its terms there, then run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "the hub has no such model; a private one needs `hf auth login`"
        elif isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            cached = constants.HF_HUB_CACHE
            reason = f"HF_HUB_OFFLINE is set and the hub's cache lacks it ({cached})"
        else:
            reached = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"the hub cannot be reached ({reached.removeprefix('Got: ')})"
        raise refused(key, checkpoint, f"no such folder, and {reason}") from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub client's own lines, one for each retry, from the terminal; errors are raised."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)

"""Find a checkpoint: a local folder, or a download from the Hugging Face Hub."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritter.errors import refused
from tritter.storage.reading import named_path


def locate(checkpoint: str, *, key: str = "checkpoint") -> Path:
    """Return the local folder of a checkpoint, downloading it if it is a hub id.

    Only configs, tokenizer files and safetensors are downloaded. No code is executed.

    Args:
        checkpoint: Folder or hub id (`owner/name`).
        key: Option that named the checkpoint, for error messages.

    Raises:
        RequestError: It is neither a folder nor a reachable hub id.
    """
    folder = named_path(checkpoint, key=key)
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        raise refused(key, checkpoint, "no such folder, and not a hub id (owner/name)")
    from huggingface_hub import constants, errors, snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        with quiet_hub():
            return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, errors.GatedRepoError):
            reason = "it is gated on the hub: accept its terms there, then run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "the hub has no such model; a private one needs `hf auth login`"
        elif isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            cached = constants.HF_HUB_CACHE
            reason = f"HF_HUB_OFFLINE is set and it is not in the hub cache ({cached})"
        else:
            reached = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = f"the hub cannot be reached ({reached.removeprefix('Got: ')})"
        raise refused(key, checkpoint, f"no such folder, and {reason}") from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub client's log, one line per retry; errors are still raised."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)

"""A checkpoint by its name: a folder as it is, or one that the hub gives."""

import re
from pathlib import Path

from tritter.errors import RequestError
from tritter.storage.names import named_path


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
        raise RequestError(f"{key} = {checkpoint}: no such folder, and no hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(checkpoint, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise RequestError(
            f"{key} = {checkpoint}: no such folder, and the hub does not give it "
            f"({type(error).__name__}: {error})."
        ) from error

"""Checkpoints on the Hugging Face Hub: find one, which may be a local folder, and push one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from json import JSONDecodeError
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.errors import RequestError, TritterError, refused
from tritter.storage.reading import named_path

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
_DOWNLOADED += [f"{name}*" for word in _LICENCES for name in (word, word.title(), word.lower())]
_UNKNOWN = "the hub does not know you: run `hf auth login`, or set HF_TOKEN"


def locate(checkpoint: str | PathLike[str], *, key: str) -> Path:
    """Return the local folder of a checkpoint, downloading it if it is a hub id.

    Only configs, tokenizer files, safetensors, the card and licences are downloaded. No code is
    executed.

    Args:
        checkpoint: Folder or hub id (`owner/name`).
        key: Option that named the checkpoint, for error messages.
    """
    if (folder := named_path(checkpoint, key=key)).exists():
        return folder
    if not _HUB_ID.fullmatch(hub_id := str(checkpoint)):
        raise refused(key, checkpoint, "no such folder, and not a hub id (owner/name)")
    from huggingface_hub import constants, errors, snapshot_download

    try:
        with quiet_hub():
            return Path(snapshot_download(hub_id, allow_patterns=_DOWNLOADED))
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, errors.GatedRepoError):
            reason = "it is gated on the hub: accept its terms there, then run `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "the hub has no such model; a private one needs `hf auth login`"
        elif isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            cached = constants.HF_HUB_CACHE
            reason = f"HF_HUB_OFFLINE is set and it is not in the hub cache ({cached})"
        else:
            reason = _hub_reason(error)
        raise refused(key, checkpoint, f"no such folder, and {reason}") from error


def cached_snapshot(hub_id: str, *, revision: str | None) -> Path | None:
    """Return the folder of a model in the hub's cache, without contacting the hub.

    It contains the files that were downloaded; None without any, and for what is no hub id.

    Args:
        hub_id: `owner/name`, or a text that may be one.
        revision: hash of the commit. None: the newest one in the cache.
    """
    if not _HUB_ID.fullmatch(hub_id):
        return None
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


class Repository:
    """A model repository of the hub.

    Args:
        name: hub id.
        key: what named it, for error messages.
    """

    def __init__(self, name: str, *, key: str) -> None:
        self.name, self.key = name, key

    def check(self) -> None:
        """Check its name, without contacting the hub."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.name if _HUB_ID.fullmatch(self.name) else "")
        except HFValidationError as error:
            reason = (
                "must be OWNER/NAME of letters, digits, - _ and ., at most 96 characters; not with "
                "-- or .., with - or . at an end, or with .git at the end"
            )
            raise refused(self.key, self.name, reason) from error

    def push(
        self, files: Mapping[str, Path | bytes], *, message: str, is_public: bool, overwrite: bool
    ) -> str:
        """Upload files in one commit and return its address; creates the repository if needed.

        Args:
            files: name in the repository → file, or content.
            message: message of the commit.
            is_public: create a public repository; an existing one must be public.
            overwrite: replace all files of a repository that has some; its history keeps them.
        """
        import huggingface_hub as client

        if client.get_token() is None:
            raise refused(self.key, self.name, _UNKNOWN)
        api, parent, old = client.HfApi(), None, set[str]()
        try:
            with quiet_hub():
                with suppress(client.errors.RepositoryNotFoundError):
                    found = api.model_info(self.name)
                    parent = found.sha
                    old = {each.rfilename for each in found.siblings or ()} - {".gitattributes"}
                    self._check_existing(found, old, is_public=is_public, overwrite=overwrite)
                if parent is None:
                    api.create_repo(self.name, private=not is_public)
        except RequestError:
            raise
        # The client raises errors of any kind on a redirect, HTML or null
        except Exception as error:
            raise refused(self.key, self.name, _hub_reason(error)) from error
        operations: list[client.CommitOperationAdd | client.CommitOperationDelete] = [
            client.CommitOperationDelete(name) for name in sorted(old - files.keys())
        ]
        operations += [
            client.CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in files.items()
        ]
        try:
            with quiet_hub():
                commit = api.create_commit(
                    self.name, operations, commit_message=message, parent_commit=parent
                )
        except Exception as error:
            raise TritterError(
                f"{self.name}: the upload failed, {_hub_reason(error)}. The repository has its old "
                "content. The same command continues: uploaded weights are kept by the hub."
            ) from error
        return commit.commit_url

    def _check_existing(
        self, found: ModelInfo, old: Set[str], *, is_public: bool, overwrite: bool
    ) -> None:
        if found.private == is_public:
            now, wanted = ("private", "without") if is_public else ("public", "with")
            reason = f"it is {now} on the hub: change that there, or push {wanted} --public"
            raise refused(self.key, found.id, reason)
        if old and not overwrite:
            reason = f"it has {len(old)} files; --overwrite replaces them, and its history"
            raise refused(self.key, found.id, f"{reason} keeps them")


def _hub_reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: _UNKNOWN,
        403: "your token may not write there",
        409: "it exists and you may not read it, or someone else changed it at the same time",
        412: "someone else changed it at the same time",
    }
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, LookupError | TypeError | AttributeError | JSONDecodeError):
        return f"the hub answered with something else than expected ({error!r})"
    if isinstance(error, ValueError | RuntimeError):  # the hub refuses the card, or a file failed
        return " ".join(lines).rstrip(".")
    return known.get(status or 0, f"the hub cannot be reached ({lines[0].removeprefix('Got: ')})")


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

"""Input and output locations of checkpoints. Only a checkpoint folder may be replaced.

Every command and library function with a user-supplied output path calls `check_output` before it
reads much, moves or deletes anything.
"""

import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tritter.checkpoints.card import LICENCE_FILES, Card
from tritter.checkpoints.expert_files import ExpertFiles, ExpertsHead
from tritter.checkpoints.folder import tokenizer_files
from tritter.checkpoints.record import Lineage
from tritter.checkpoints.state import KeptSequences, State
from tritter.core.families import Model
from tritter.core.families.config_file import read_model_file
from tritter.core.parameter_map.carry import STATE_KINDS
from tritter.errors import Problem, RequestError, TritterError, did_you_mean, refused
from tritter.storage.atomic import refuse_existing
from tritter.storage.reading import LINEAGE_NAME, check_links, named_path
from tritter.storage.records import record_text
from tritter.storage.tensors import INDEX_NAME, SINGLE_NAME, TensorFolder

_PLAIN_NAMES = {"config.json", Card.NAME, SINGLE_NAME, INDEX_NAME}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_STATE_FILES = {
    f"{State.FOLDER}/{name}" for name in ("state.json", "router.json", KeptSequences.FILE_NAME)
}
_OF_FUNCTION = {
    ExpertsHead.PATH,
    ExpertsHead.TENSORS,
    f"{State.FOLDER}/router.json",
}  # the model computes with them
_MAX_SHOWN = 4
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_output(
    target: Path,
    *,
    sources: Sequence[Path] = (),
    overwrite: bool,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Reject an output path where a checkpoint may not be written.

    Args:
        target: the output path.
        sources: input folders and files.
        overwrite: allow an existing checkpoint at `target`.
        check: raises if an existing folder may not be replaced; `check_replaceable` by default.
    """
    refuse_existing(target, overwrite=overwrite)
    for source in sources:
        if is_within(target, source):
            raise RequestError(
                f"{target} is the source {source} or is in it. Choose an output folder outside "
                "the source."
            )
        if is_within(source, target):
            raise RequestError(
                f"{target} contains the source {source}. Choose an output folder outside the "
                "source."
            )
    if overwrite and os.path.lexists(target):
        (check or check_replaceable)(target)


def check_replaceable(folder: Path) -> None:
    """Reject a folder that contains anything other than one checkpoint.

    Reads only tritter.json and follows no links.
    """
    try:
        record, names = folder / LINEAGE_NAME, {path.name for path in folder.iterdir()}
        if has_record := record.is_file() and not record.is_symlink():
            listed = {*Lineage.of(folder).file_names, LINEAGE_NAME, Card.NAME, "config.json"}
        else:
            listed = {name for name in names if _SHARD.fullmatch(name)}
            listed |= {name for name in names if LICENCE_FILES.fullmatch(name)}
            listed |= {*_PLAIN_NAMES, *tokenizer_files(folder)}
        strays = sorted(_unexpected_names(folder, listed))
    except TritterError as error:
        raise RequestError(
            f"{folder} is not replaced, because its content can't be checked. {error}"
        ) from error
    except OSError as error:
        raise RequestError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if strays:
        shown = ", ".join(strays[:_MAX_SHOWN])
        more = f" and {len(strays) - _MAX_SHOWN} more" if len(strays) > _MAX_SHOWN else ""
        raise RequestError(
            f"{folder} is not replaced, because it contains other files: {shown}{more}. Choose "
            "another folder, or move them away."
        )
    if has_record:
        return
    has_shards = INDEX_NAME in names and any(_SHARD.fullmatch(name) for name in names)
    if "config.json" not in names or not (SINGLE_NAME in names or has_shards):
        raise RequestError(
            f"{folder} is not replaced, because it contains no checkpoint (config.json and "
            f"{SINGLE_NAME}). Choose another folder."
        )


def is_within(path: Path, folder: Path) -> bool:
    """Return True if a path is a folder or is in it, regardless of spelling and links."""
    try:
        allowed_names = folder.stat()
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a missing folder contains nothing
        return False
    for above in (resolved, *resolved.parents):
        try:
            if os.path.samestat(above.stat(), allowed_names):
                return True
        except OSError:  # does not exist yet
            continue
    return False


def _unexpected_names(folder: Path, listed: set[str], above: str = "") -> Iterator[str]:
    """Yield names that do not belong to the checkpoint; for a foreign folder only its name."""
    states = {f"{State.FOLDER}/{kind}" for kind in STATE_KINDS}
    for entry in os.scandir(folder):
        name = above + entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            if above.removesuffix("/") in states:
                is_shard = _SHARD.fullmatch(entry.name) is not None
                is_expected = is_shard or entry.name in (SINGLE_NAME, INDEX_NAME)
            else:
                is_expected = name in listed
            if not is_expected and name not in _STATE_FILES:
                yield name
        elif stat.S_ISDIR(mode) and (
            name in {State.FOLDER, *states} or any(file.startswith(f"{name}/") for file in listed)
        ):
            yield from _unexpected_names(folder / entry.name, listed, f"{name}/")
        else:
            yield f"{name}/" if stat.S_ISDIR(mode) else name


def public_files(folder: Path, lineage: Lineage | None) -> tuple[dict[str, Path | bytes], set[str]]:
    """Return the files to publish, by name, and the names of those to leave out.

    Training state and kept training texts are left out, like everything that is not of the
    checkpoint. The lineage is published without the digests of what is left out.
    """
    check_links(folder)
    if lineage is not None:
        listed = {*lineage.file_names, LINEAGE_NAME, Card.NAME, "config.json"}
    else:
        listed = {*_PLAIN_NAMES, *tokenizer_files(folder)}
        listed |= {*TensorFolder.open(folder).files.values()}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    private = {n for n in names if n.startswith(f"{State.FOLDER}/")} - _OF_FUNCTION
    public = (names & listed) - private
    public |= {name for name in names if "/" not in name and LICENCE_FILES.fullmatch(name)}
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(public)}
    if lineage is not None:
        known = lineage.file_digests.items()
        kept = {
            name: digest
            for name, digest in known
            if name.removesuffix(Lineage.HEADER_MARK) in files
        }
        files[LINEAGE_NAME] = record_text(replace(lineage, file_digests=kept)).encode()
    return files, names - public


# Checks of a checkpoint folder that need only its file names and config.json


def checkpoint_location(path: str, *, key: str = "model.path") -> str:
    """Return the absolute path of a checkpoint folder, or a hub id unchanged."""
    folder = named_path(path, key=key)
    if folder.is_dir():
        return str(folder.resolve())
    if folder.exists():
        raise refused(key, path, "it is a file; a checkpoint is a folder")
    if not _HUB_ID.fullmatch(path):
        near = [entry.name for entry in folder.parent.glob("*") if entry.is_dir()]
        reason = f"no such folder, and not a hub id (owner/name).{did_you_mean(folder.name, near)}"
        raise refused(key, path, reason.removesuffix("."))
    return path


def checkpoint_model(
    path: str, *, key: str = "model.path", with_experts: bool = False
) -> Model | None:
    """Return the model of a checkpoint folder to train; None for a hub id.

    Args:
        path: folder or hub id.
        key: the key that named it.
        with_experts: allow LoRA experts, which training would drop.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    try:
        model = read_model_file(folder)
    except TritterError as error:
        raise refused(key, path, str(error).rstrip(".")) from error
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind))
        reason = "it contains no safetensors files"
        if pickles:
            reason += f", and {', '.join(pickles)} may run code when loaded; convert it with "
            reason += "save_pretrained of transformers first"
        raise refused(key, path, reason)
    if not (folder / "tokenizer.json").is_file():
        reason = "it contains no tokenizer.json; save its tokenizer there with save_pretrained of "
        raise refused(key, path, f"{reason}transformers")
    if not with_experts:
        require_plain(folder, doing="training", key=key)
    return model


def require_plain(folder: Path, *, doing: str, key: str = "checkpoint") -> None:
    """Refuse a checkpoint with LoRA experts for an operation that would drop or break them.

    Args:
        folder: the checkpoint folder.
        doing: the operation, for example `an expansion`.
        key: the key that named the folder.
    """
    if (files := ExpertFiles.within(folder, key=key)) is not None:
        reason = (
            f"it contains experts ({', '.join(files.head.names)}) that require its unchanged base; "
            f"{doing} would drop them"
        )
        advice = (
            "merge them into a plain model first: tritter export --checkpoint "
            f"{shlex.quote(str(folder))} --output MERGED --format hf --merge"
        )
        raise RequestError(Problem(key, folder, reason=reason, advice=advice))


def teacher_problems(teacher: str, source: Model | None, *, key: str) -> Iterator[Problem]:
    """Yield the problems of a teacher that its config.json shows.

    Args:
        teacher: folder or hub id of the teacher.
        source: the student; None if its vocabulary is not known yet.
        key: the key that named the teacher.
    """
    try:
        model = checkpoint_model(checkpoint_location(teacher, key=key), key=key)
    except RequestError as error:
        yield from error.problems
        return
    if model is None or source is None:
        return
    own, needed = (each.sizes.vocab_size for each in (model, source))
    if own != needed:
        reason = (
            f"its vocabulary has {own} tokens, that of the trained model "
            f"{needed}; must be a teacher with the same tokenizer"
        )
        yield Problem(key, teacher, reason=reason)

"""Where checkpoints are and may be written, and what may be replaced there: a checkpoint alone.

Every command and library function that writes where a person says so asks here, before anything is
read at length, moved or deleted.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tritter.checkpoints.expert_files import refuse_experts
from tritter.checkpoints.folder import CARD_NAME, HEADER_MARK, TOKENIZER_FILES, lineage_of
from tritter.checkpoints.record import StateHead
from tritter.checkpoints.state import KEPT_FILE, STATE_FOLDER
from tritter.core.families import Config
from tritter.core.families.config_file import read_config_file
from tritter.core.parameter_map.carry import STATE_KINDS
from tritter.errors import Problem, RequestError, TritterError, did_you_mean, refused
from tritter.storage.atomic import refuse_existing
from tritter.storage.reading import LINEAGE_NAME, named_path
from tritter.storage.records import read_record
from tritter.storage.tensors import INDEX_NAME, SINGLE_NAME

_PLAIN_NAMES = {"config.json", CARD_NAME, SINGLE_NAME, INDEX_NAME, *TOKENIZER_FILES}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_STATE_FILES = {f"{STATE_FOLDER}/{name}" for name in ("state.json", "router.json", KEPT_FILE)}
_STATE_HEAD = Path(STATE_FOLDER) / "state.json"
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
    """Refuse a place where a checkpoint may not be written.

    Args:
        sources: folders and files that it is made from.
        check: raises where a folder that stands there may not be replaced; `check_replaceable` by
            default.

    Raises:
        RequestError: it is a source, lies in one or holds one; something stands there and
            `overwrite` is off, or something else than a checkpoint stands there.
    """
    refuse_existing(target, overwrite=overwrite)
    for source in sources:
        if is_within(target, source):
            raise RequestError(
                f"{target} is {source}, which the result is made from, or lies in it; a result "
                "stands beside its source, neither in it nor in its place."
            )
        if is_within(source, target):
            raise _holds_source(target, source)
    if overwrite and os.path.lexists(target):
        (check or partial(check_replaceable, sources=sources))(target)


def check_replaceable(folder: Path, *, sources: Sequence[Path] = ()) -> None:
    """Refuse to replace a folder that is or holds anything but one checkpoint.

    Opens nothing but its tritter.json, and follows no link.

    Raises:
        RequestError: says what else is there.
    """
    for source in sources:
        if is_within(source, folder):
            raise _holds_source(folder, source)
    try:
        listed, record = None, folder / LINEAGE_NAME
        if record.is_file() and not record.is_symlink():
            named = (name.removesuffix(HEADER_MARK) for name in lineage_of(folder).file_digests)
            listed = {*named, LINEAGE_NAME, CARD_NAME, "config.json"}
        strays = sorted(_strays(folder, listed))
    except TritterError as error:
        raise RequestError(
            f"{folder} is not replaced: what else than a checkpoint it may hold is not known. "
            f"{error}"
        ) from error
    except OSError as error:
        raise RequestError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if strays:
        shown = ", ".join(strays[:_MAX_SHOWN])
        more = f" and {len(strays) - _MAX_SHOWN} more" if len(strays) > _MAX_SHOWN else ""
        raise RequestError(
            f"{folder} holds more than a checkpoint, and is not replaced: {shown}{more}. Choose "
            "another place, or move them away."
        )
    if listed is not None:
        return
    names = {path.name for path in folder.iterdir()}
    has_shards = INDEX_NAME in names and any(_SHARD.fullmatch(name) for name in names)
    if "config.json" not in names or not (SINGLE_NAME in names or has_shards):
        raise RequestError(
            f"{folder} holds no checkpoint (config.json and {SINGLE_NAME}), and nothing else is "
            "replaced. Choose another place."
        )


def _holds_source(target: Path, source: Path) -> RequestError:
    return RequestError(
        f"{target} holds {source}, which the result is made from; a result stands beside its "
        "source, neither in it nor in its place."
    )


def is_within(path: Path, folder: Path) -> bool:
    """Say whether a path is a folder or lies in it, however the two are spelled."""
    try:
        wanted = folder.stat()
        place = path.resolve()
    except (OSError, ValueError, RuntimeError):  # what is not there holds nothing
        return False
    for above in (place, *place.parents):
        try:
            if os.path.samestat(above.stat(), wanted):
                return True
        except OSError:  # it is yet to be made
            continue
    return False


def _strays(folder: Path, listed: set[str] | None, above: str = "") -> Iterator[str]:
    """Yield what is no file of the checkpoint; of a folder that has no business there its name."""
    states = {f"{STATE_FOLDER}/{kind}" for kind in STATE_KINDS}
    for entry in os.scandir(folder):
        name = above + entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            is_shard = _SHARD.fullmatch(entry.name) is not None
            if above.removesuffix("/") in states:
                is_expected = is_shard or entry.name in (SINGLE_NAME, INDEX_NAME)
            elif listed is not None:
                is_expected = name in listed
            else:
                is_expected = name in _PLAIN_NAMES or (is_shard and not above)
            if not is_expected and name not in _STATE_FILES:
                yield name
        elif stat.S_ISDIR(mode) and (
            name in {STATE_FOLDER, *states}
            or any(file.startswith(f"{name}/") for file in listed or ())
        ):
            yield from _strays(folder / entry.name, listed, f"{name}/")
        else:
            yield f"{name}/" if stat.S_ISDIR(mode) else name


# What can be known of a checkpoint folder from its file names and config.json alone


def checkpoint_location(path: str, *, key: str = "model.path") -> str:
    """Return the absolute path of a checkpoint folder; a hub id stays as it is.

    Raises:
        RequestError: neither a folder nor the form of a hub id.
    """
    folder = named_path(path, key=key)
    if folder.is_dir():
        return str(folder.resolve())
    if folder.exists():
        raise refused(key, path, "it is a file; a checkpoint is a folder")
    if not _HUB_ID.fullmatch(path):
        near = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        reason = f"no such folder, and no hub id (owner/name).{did_you_mean(folder.name, near)}"
        raise refused(key, path, reason.removesuffix("."))
    return path


def checkpoint_config(
    path: str, *, key: str = "model.path", with_experts: bool = False
) -> Config | None:
    """Return the config.json of a checkpoint folder that can be trained on; None for a hub id.

    Raises:
        RequestError: no usable config.json, an unknown family, weights that are not in
            safetensors, no tokenizer.json, or experts, which a training would leave behind.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None

    try:
        config = read_config_file(folder)
    except TritterError as error:
        raise refused(key, path, str(error).rstrip(".")) from error
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind))
        reason = "it holds no safetensors"
        if pickles:
            reason += f", and {', '.join(pickles)} may run code when loaded; save it with "
            reason += "save_pretrained of transformers first"
        raise refused(key, path, reason)
    if not (folder / "tokenizer.json").is_file():
        reason = "it holds no tokenizer.json; save its tokenizer there with save_pretrained of "
        raise refused(key, path, f"{reason}transformers")
    if not with_experts:
        refuse_experts(folder, doing="a training", key=key)
    return config


def teacher_problems(teacher: str, source: Config | None, *, key: str) -> Iterator[Problem]:
    """Yield why a teacher can't be learned from, as far as its config.json says.

    Args:
        source: that of the model that learns; None where its vocabulary is not known yet.
    """
    try:
        config = checkpoint_config(checkpoint_location(teacher, key=key), key=key)
    except RequestError as error:
        yield from error.problems
        return
    if config is None or source is None:
        return
    if config["vocab_size"] != source["vocab_size"]:
        reason = (
            f"it has {config['vocab_size']} tokens, the model that the run starts from "
            f"{source['vocab_size']}; must be a teacher with the same tokenizer"
        )
        yield Problem(key, teacher, reason=reason)


def state_kinds_of(folder: Path) -> set[str]:
    """Return the kinds of state that lie beside a checkpoint's weights.

    Raises:
        TritterError: what says so is damaged.
    """
    path = folder / _STATE_HEAD
    return set(read_record(path, StateHead).kinds) if path.exists() else set()

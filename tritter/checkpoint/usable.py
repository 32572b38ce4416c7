"""What can be known of a checkpoint folder from its file names and config.json alone."""

import re
from collections.abc import Iterator
from pathlib import Path

from tritter.checkpoint.expert_files import refuse_experts
from tritter.checkpoint.record import StateHead
from tritter.errors import Problem, RequestError, TritterError, did_you_mean
from tritter.families import Config
from tritter.families.config_file import read_config_file
from tritter.storage.reading import named_path
from tritter.storage.records import read_record

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STATE_HEAD = Path("state/state.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def checkpoint_place(path: str, *, key: str = "model.path") -> str:
    """Return the absolute path of a checkpoint folder; a hub id stays as it is.

    Raises:
        RequestError: neither a folder nor the form of a hub id.
    """
    folder = named_path(path, key=key)
    if folder.is_dir():
        return str(folder.resolve())
    if folder.exists():
        raise RequestError(Problem(key, path, reason="it is a file; a checkpoint is a folder"))
    if not _HUB_ID.fullmatch(path):
        near = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        reason = f"no such folder, and no hub id (owner/name).{did_you_mean(folder.name, near)}"
        raise RequestError(Problem(key, path, reason=reason.removesuffix(".")))
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

    def refused(reason: str) -> RequestError:
        return RequestError(Problem(key, path, reason=reason))

    try:
        config = read_config_file(folder)
    except TritterError as error:
        raise refused(str(error).rstrip(".")) from error
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for kind in _PICKLES for file in folder.glob(kind))
        reason = "it holds no safetensors"
        if pickles:
            reason += f", and {', '.join(pickles)} may run code when loaded; save it with "
            reason += "save_pretrained of transformers first"
        raise refused(reason)
    if not (folder / "tokenizer.json").is_file():
        raise refused(
            "it holds no tokenizer.json; save its tokenizer there with save_pretrained of "
            "transformers"
        )
    if not with_experts:
        refuse_experts(folder, doing="a training", key=key)
    return config


def teacher_problems(teacher: str, source: Config | None, *, key: str) -> Iterator[Problem]:
    """Yield why a teacher can't be learned from, as far as its config.json says.

    Args:
        source: that of the model that learns; None where its vocabulary is not known yet.
    """
    try:
        config = checkpoint_config(checkpoint_place(teacher, key=key), key=key)
    except RequestError as error:
        yield from error.problems
        return
    if config is None or source is None:
        return
    if config["vocab_size"] != source["vocab_size"]:
        reason = (
            f"it has {config['vocab_size']} tokens, the model that the run starts from "
            f"{source['vocab_size']}; allowed is a teacher with the same tokenizer"
        )
        yield Problem(key, teacher, reason=reason)


def kinds_beside(folder: Path) -> set[str]:
    """Return the kinds of state that lie beside a checkpoint's weights.

    Raises:
        TritterError: what says so is damaged.
    """
    path = folder / _STATE_HEAD
    return set(read_record(path, StateHead).kinds) if path.exists() else set()

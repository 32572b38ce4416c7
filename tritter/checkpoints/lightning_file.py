"""Read a Lightning training checkpoint (.ckpt) without executing any code in it.

Such a file is a pickle. It is read with torch's restricted unpickler, which allows only tensors
and plain data; the error for any other file names its objects. Tensors are memory-mapped, so
memory does not grow with the model.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from tritter.checkpoints.export import Weights
from tritter.core.families import Model, StoredTensor
from tritter.errors import RequestError, TritterError, did_you_mean, shortened
from tritter.storage.hashing import file_digest
from tritter.storage.reading import require_file

# Name parts that torch.compile, FSDP and activation checkpointing insert between module names.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Rotary frequencies are computed from the config; old versions of transformers saved them.
_DERIVED = re.compile(r"rotary_emb\.(?:original_)?inv_freq$")


def read_lightning_file(
    path: Path, model: Model, *, prefix: str | None = None
) -> tuple[Weights, str]:
    """Read a Lightning .ckpt, or a saved state dict, as a model.

    Args:
        path: the .ckpt file.
        model: the model that the config describes.
        prefix: prefix of the model's parameter names, such as `model.`; tensors without it are
            skipped. By default it is detected, and every tensor must belong to the model.

    Returns:
        The model without its optimizer state, and a note on skipped tensors; empty if there are
        none.
    """
    tensors = _state_dict(path, _load(path))
    embedding = model.tensors[0].disk_name
    chosen = _prefix(path, tensors, embedding, requested=prefix)
    skipped = ""
    if prefix is not None and (others := [n for n in tensors if not n.startswith(chosen)]):
        skipped = f"{len(others)} tensors outside '{prefix}' were skipped: {shortened(others)}"
        tensors = {name: value for name, value in tensors.items() if name.startswith(chosen)}
    stored = _match_tensors(path, model, tensors, chosen)
    for name, other in model.family.tied_names(model.config).items():
        tied, whole = tensors.get(chosen + name), other if chosen + other in tensors else embedding
        if tied is not None and not torch.equal(tied, tensors[chosen + whole]):
            raise TritterError(f"{path}: {name} differs from {whole}, but the config ties them.")
    values = {
        part.name: value
        for tensor in stored
        for part, value in tensor.unpack(tensors[chosen + tensor.name].detach())
    }
    weights = Weights(
        name=path.name,
        model=model,
        read=values.__getitem__,
        dtype=lambda name: values[name].dtype,
        finish=lambda: file_digest(path),
        source_paths=(path,),
    )
    return weights, skipped


def _load(path: Path) -> Mapping[str, Any]:
    require_file(path, is_read_whole=False)
    # torch.save never compresses, and a compressed archive could be a zip bomb
    if is_zipfile(path):  # other files are from torch before 1.6, or torch.load rejects them
        with suppress(BadZipFile), ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != ZIP_STORED:
                    raise TritterError(
                        f"{path} is a compressed archive ({entry.filename}: {entry.compress_size} "
                        f"bytes expand to {entry.file_size}); torch.save never compresses."
                    )
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from torch before 1.6 cannot be memory-mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TritterError(f"{path} cannot be read ({error.strerror or error}).") from error
    # A malicious or truncated pickle can make the unpickler raise any exception
    except Exception as error:
        try:
            objects = get_unsafe_globals_in_checkpoint(path)
        # As above: this parses the same bytes and executes nothing either
        except Exception:
            objects = re.findall(r"GLOBAL (\S+)", str(error))
        if objects:  # torch's own message suggests executing the file's code
            raise TritterError(
                f"{path} contains objects other than tensors and plain data, which execute code "
                f"when loaded: {shortened(sorted(set(objects)))}. Nothing was executed. If you "
                "trust the file, load it and save only its state_dict: "
                "torch.save(checkpoint['state_dict'], PATH)."
            ) from error
        what = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        reason = (what[1] if what else str(error).partition("\n")[0]).strip()
        raise TritterError(
            f"{path} is not a checkpoint, or is damaged ({reason or 'it is empty'})."
        ) from error
    if not isinstance(content, Mapping):
        raise TritterError(f"{path} is not a checkpoint: it contains a {type(content).__name__}.")
    return content


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a model by name, from Lightning's `state_dict` or the whole content."""
    found = content.get("state_dict", content)
    if not isinstance(found, Mapping) or not found:
        raise TritterError(f"{path} contains no state_dict.")
    # `Module.get_extra_state` is not a tensor of the model
    found = {n: value for n, value in found.items() if not str(n).endswith("_extra_state")}
    wrong = [
        str(name)
        for name, value in found.items()
        if not isinstance(name, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
    ]
    if wrong:
        text = f"{shortened(sorted(wrong))} are not plain dense tensors"
        raise TritterError(f"{path} contains no state_dict: {text}.")
    named = {_WRAPPERS.sub("", name): value for name, value in found.items()}
    return {name: value for name, value in named.items() if not _DERIVED.search(name)}


def _prefix(
    path: Path, tensors: Mapping[str, Tensor], anchor: str, *, requested: str | None
) -> str:
    """Return the prefix of the model's parameter names, found by the name of its embedding."""
    found = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if requested is not None:
        wanted = requested if not requested or requested.endswith(".") else requested + "."
        if wanted in found:
            return wanted
        raise RequestError(
            f"--prefix = {requested}: {path} contains no {wanted}{anchor}; its prefixes are "
            f"{', '.join(map(repr, found)) or 'unknown'}.{did_you_mean(wanted, found)}"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(
            f"{path} contains {len(found)} models with the prefixes {', '.join(map(repr, found))}; "
            "choose one with --prefix."
        )
    raise TritterError(
        f"{path} contains no tensor whose name ends with {anchor}; it contains "
        f"{shortened(list(tensors))}."
    )


def _match_tensors(
    path: Path, model: Model, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[StoredTensor, ...]:
    elsewhere = [name for name in tensors if not name.startswith(prefix)]
    names = [name.removeprefix(prefix) for name in tensors if name not in elsewhere]
    try:
        stored = model.match([*names, *elsewhere])
    except TritterError as error:
        hint = f" (--prefix {prefix} skips tensors without that prefix)" if elsewhere else ""
        raise TritterError(f"{path}: {error}{hint}") from error
    for tensor in stored:
        value = tensors[prefix + tensor.name]
        if (found := tuple(value.shape)) != tensor.shape:
            raise TritterError(
                f"{path}: {tensor.name} has shape {found}, but the config requires {tensor.shape}."
            )
        if not value.is_floating_point():
            raise TritterError(
                f"{path}: {tensor.name} has dtype {value.dtype}; allowed are floating-point dtypes."
            )
    return stored

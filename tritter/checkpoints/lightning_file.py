"""A training checkpoint of Lightning (.ckpt), read without running anything that it holds.

Such a file is a pickle. It is opened with torch's restricted unpickler, which knows tensors and
plain data and nothing else: a file that asks for more is refused, and what it asks for is named.
Tensors are mapped from the file, so that memory does not grow with the model.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from tritter.checkpoints.export import Moments, Weights
from tritter.core.families import Config, StoredTensor, family_of, match
from tritter.core.parameter_map.carry import MOMENTS
from tritter.errors import RequestError, TritterError, did_you_mean
from tritter.storage.hashing import file_digest
from tritter.storage.reading import require_file
from tritter.storage.tensors import is_finite

# What torch.compile, FSDP and activation checkpointing put between the names of modules.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Rotary frequencies follow from the config; old versions of transformers saved them.
_DERIVED = re.compile(r"rotary_emb\.(?:original_)?inv_freq$")


@dataclass(frozen=True, slots=True)
class LightningFile:
    """What was found in a .ckpt.

    Args:
        weights: the model, with moments where their owners are known.
        left_out: the tensors that `prefix` does not stand before, in words; empty: none.
        why_no_moments: empty: they were found.
    """

    weights: Weights
    left_out: str
    why_no_moments: str


def read_lightning_file(path: Path, config: Config, *, prefix: str | None = None) -> LightningFile:
    """Read a .ckpt of Lightning, or a saved state dict, as a model of this config.

    Args:
        prefix: what stands before the model's own names, such as `model.`; tensors that it does
            not stand before are left out. By default it is found, and every tensor has to have
            its place in the family's table.

    Raises:
        RequestError: `prefix` fits no tensor, or several models are in the file.
        TritterError: the file is no checkpoint, holds objects that would have to be run to be
            read, or tensors that are left over, missing or of another shape.
    """
    content = _load(path)
    tensors = _state_dict(path, content)
    family = family_of(config)
    embedding = family.logical_tensors(config)[0].disk_name
    chosen = _prefix(path, tensors, embedding, given=prefix)
    left_out = why_no_moments = ""
    if prefix is not None and (others := [n for n in tensors if not n.startswith(chosen)]):
        left_out = f"{len(others)} tensors outside '{prefix}' were left out: {_some(others)}"
        tensors = {name: value for name, value in tensors.items() if name.startswith(chosen)}
    stored = _matched(path, config, tensors, chosen)
    for name in family.tied_names(config):
        tied = tensors.get(chosen + name)
        if tied is not None and not torch.equal(tied, tensors[chosen + embedding]):
            raise TritterError(
                f"{path}: {name} differs from the embedding, but the config ties the two "
                "(tie_word_embeddings = true)."
            )
    values = {
        part.name: value
        for tensor in stored
        for part, value in tensor.unpack(tensors[chosen + tensor.name].detach())
    }
    try:
        moments = named_moments(content, tensors, stored=stored, prefix=chosen)
    except UnusableMoments as reason:
        moments = None
        why_no_moments = f"the optimizer's state was left out: {reason}"
    weights = Weights(
        name=path.name,
        config=config,
        read=values.__getitem__,
        dtype=lambda name: values[name].dtype,
        finish=lambda: file_digest(path),
        moments=moments,
        places=(path,),
    )
    return LightningFile(weights, left_out, why_no_moments)


def _load(path: Path) -> Mapping[str, Any]:
    require_file(path, is_read_whole=False)
    # torch never packs what it writes, and an archive that has to be unpacked may be endless
    if is_zipfile(path):  # otherwise of torch before 1.6, or damaged, which its reader says
        with suppress(BadZipFile), ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != ZIP_STORED:
                    raise TritterError(
                        f"{path} is a packed archive ({entry.filename}: {entry.compress_size} "
                        f"bytes unpack to {entry.file_size}); torch.save packs nothing."
                    )
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TritterError(f"{path} cannot be read ({error.strerror or error}).") from error
    # A hostile or cut-off pickle makes the unpickler raise whatever its bytes lead it to
    except Exception as error:
        try:
            objects = get_unsafe_globals_in_checkpoint(path)
        # As above: this reads the same bytes, and runs nothing either
        except Exception:
            objects = re.findall(r"GLOBAL (\S+)", str(error))
        if objects:  # torch's own words advise to run what the file holds
            raise TritterError(
                f"{path} holds objects beside tensors and plain data, which would have to be run "
                f"to be read: {_some(sorted(set(objects)))}. Nothing was run. Where the file can "
                "be trusted, load it and save its state_dict alone: "
                "torch.save(checkpoint['state_dict'], PATH)."
            ) from error
        what = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        reason = (what[1] if what else str(error).partition("\n")[0]).strip()
        raise TritterError(
            f"{path} is not a checkpoint, or a damaged one ({reason or 'it is empty'})."
        ) from error
    if not isinstance(content, Mapping):
        raise TritterError(f"{path} is not a checkpoint: it holds a {type(content).__name__}.")
    return content


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a model by name: Lightning's `state_dict`, or the whole content."""
    held = content.get("state_dict", content)
    if not isinstance(held, Mapping) or not held:
        raise TritterError(f"{path} holds no state_dict.")
    # What a module says of itself beside its tensors, under the name that torch gives to it
    held = {n: value for n, value in held.items() if not str(n).endswith("_extra_state")}
    wrong = [
        str(name)
        for name, value in held.items()
        if not isinstance(name, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_quantized
    ]
    if wrong:
        raise TritterError(
            f"{path} holds no state_dict: there are {_some(sorted(wrong))} beside tensors of "
            "numbers."
        )
    named = {_WRAPPERS.sub("", name): value for name, value in held.items()}
    return {name: value for name, value in named.items() if not _DERIVED.search(name)}


def _prefix(path: Path, tensors: Mapping[str, Tensor], anchor: str, *, given: str | None) -> str:
    """Return what stands before the model's names, from where its embedding is found."""
    found = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    found = [prefix for prefix in found if not prefix or prefix.endswith(".")]
    if given is not None:
        wanted = given if not given or given.endswith(".") else given + "."
        if wanted in found:
            return wanted
        raise RequestError(
            f"--prefix = {given}: {path} holds no {wanted}{anchor}; there are "
            f"{', '.join(map(repr, found)) or 'no embeddings at all'}.{did_you_mean(wanted, found)}"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(
            f"{path} holds {len(found)} models, under {', '.join(map(repr, found))}; --prefix says "
            "which is meant."
        )
    raise TritterError(
        f"{path} holds no tensor whose name ends in {anchor}; it holds {_some(list(tensors))}."
    )


def _matched(
    path: Path, config: Config, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[StoredTensor, ...]:
    elsewhere = [name for name in tensors if not name.startswith(prefix)]
    names = [name.removeprefix(prefix) for name in tensors if name not in elsewhere]
    try:
        stored = match(config, [*names, *elsewhere])
    except TritterError as error:
        hint = f" (--prefix {prefix} leaves out what stands elsewhere)" if elsewhere else ""
        raise TritterError(f"{path}: {error}{hint}") from error
    for tensor in stored:
        found = tuple(tensors[prefix + tensor.name].shape)
        if found != tensor.shape:
            raise TritterError(
                f"{path}: {tensor.name} has shape {found}, but the config asks for {tensor.shape}."
            )
        if not tensors[prefix + tensor.name].is_floating_point():
            dtype = tensors[prefix + tensor.name].dtype
            raise TritterError(f"{path}: {tensor.name} is of type {dtype}.")
    return stored


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names) - limit} more)"


# Whose moments are whose: an optimizer's state keeps no names, only positions. Positions are given
# names only where one order explains all of them: that of the model's own parameters, in one group,
# or in two with matrices in one and vectors in the other, as decay and no decay are often parted.
# Each shape is checked. Elsewhere the moments are left out, and why.


class UnusableMoments(Exception):
    """The optimizer's state cannot be used; says why."""


def named_moments(
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    stored: Sequence[StoredTensor],
    prefix: str,
) -> Moments:
    """Return Adam's moments of a Lightning checkpoint by name on disk.

    Args:
        content: of the whole file.
        tensors: its model's tensors, named as in the file, in the file's order.
        stored: what they are.
        prefix: what stands before the model's own names.

    Raises:
        MomentsLeftOut: there are none, they are not Adam's, or their owners are not certain.
    """
    optimizers = content.get("optimizer_states")
    if not isinstance(optimizers, Sequence) or optimizers in ([], [{}]):
        raise UnusableMoments("the file holds none")
    if len(optimizers) > 1:
        raise UnusableMoments(f"the file holds {len(optimizers)} optimizers")
    try:
        groups = [[int(at) for at in group["params"]] for group in optimizers[0]["param_groups"]]
        state = dict(optimizers[0]["state"])  # position → moments
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableMoments("it is not laid out as torch's optimizers are") from error
    if not all(isinstance(held, Mapping) for held in state.values()):
        raise UnusableMoments("it is not laid out as torch's optimizers are")
    owned = {prefix + tensor.name for tensor in stored}
    names = [name for name in tensors if name in owned]  # a tied head is no parameter of its own
    matrices = [name for name in names if tensors[name].ndim >= 2]
    vectors = [name for name in names if tensors[name].ndim < 2]
    sizes = [len(group) for group in groups]
    splits = ([names], [matrices, vectors], [vectors, matrices])
    owners = next((split for split in splits if [*map(len, split)] == sizes), None)
    if owners is None:
        raise UnusableMoments(
            f"its groups of {', '.join(map(str, sizes))} parameters are neither all {len(names)} "
            f"of the model nor its {len(matrices)} matrices and {len(vectors)} vectors"
        )
    by_name = {
        name: state[position]
        for group, names in zip(groups, owners, strict=True)
        for position, name in zip(group, names, strict=True)
        if position in state
    }
    kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in MOMENTS}
    steps = set()
    for tensor in stored:
        held = by_name.get(prefix + tensor.name)
        if held is None:
            continue
        for kind in MOMENTS:
            moment = held.get(kind)
            if not isinstance(moment, Tensor) or not moment.is_floating_point():
                raise UnusableMoments(f"it is not Adam's: it holds {', '.join(map(str, held))}")
            if tuple(moment.shape) != tensor.shape:
                raise UnusableMoments(
                    f"its order is not the model's: {tensor.name} of shape {tensor.shape} would "
                    f"get moments of shape {tuple(moment.shape)}"
                )
            if not is_finite(moment):
                raise UnusableMoments(f"{kind} of {tensor.name} holds values that are not finite")
            for part, value in tensor.unpack(moment):
                kinds[kind][part.disk_name] = value
        try:
            steps.add(int(held["step"]))
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise UnusableMoments("it does not say after how many steps it stands") from error
    if len(steps) != 1:
        counts = f"from {min(steps)} to {max(steps)}" if steps else "none"
        raise UnusableMoments(f"its parameters do not share one step count ({counts})")
    return Moments(steps.pop(), kinds)

"""Export: a plain Hugging Face folder of one dtype, which any reader of such folders loads.

Nothing of ours stays in it but the model card, which says what the weights were made from. Tensors
go through one by one; nothing is loaded as a model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tritter.checkpoints.card import export_card
from tritter.checkpoints.folder import CARD_NAME, Artifact, write_config
from tritter.checkpoints.location import check_output, check_replaceable
from tritter.checkpoints.record import Lineage
from tritter.checkpoints.source import Source
from tritter.checkpoints.state import write_state
from tritter.core.families import (
    Config,
    LayoutKind,
    StoredTensor,
    family_of,
    layout,
    on_disk,
    padded_shapes,
)
from tritter.errors import Problem, RequestError, TritterError, refused
from tritter.storage.atomic import atomic_folder
from tritter.storage.hashing import merkle_hash
from tritter.storage.tensors import is_finite
from tritter.storage.writer import TensorEntry, TensorStream, padded, write_tensors


@dataclass(frozen=True, slots=True)
class Moments:
    """An optimizer's state, by kind and by name on disk.

    Args:
        step: optimizer steps behind it.
        kinds: kind, as `tritter.core.parameter_map.carry` names it → name on disk → tensor.
    """

    step: int
    kinds: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model that can be read tensor by tensor, wherever it lies.

    Args:
        name: what the card calls it.
        config: its config.json.
        read: logical name → tensor.
        dtype: logical name → dtype.
        finish: called once all is read; returns a hash of the origin, and raises when the origin
            is not what its own record says.
        lineage: what it says of itself, if anything.
        moments: what a training can go on from; written only where an origin brings it.
        places: folders and files that all this is read from, where nothing may be written.
        notes: sentences for the card.
    """

    name: str
    config: Config
    read: Callable[[str], Tensor]
    dtype: Callable[[str], torch.dtype]
    finish: Callable[[], str]
    lineage: Lineage | None = None
    moments: Moments | None = None
    places: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Source) -> "Weights":
        """Return the weights of an opened checkpoint folder, checked against its lineage."""
        return cls(
            name=source.folder.resolve().name,
            config=source.config,
            read=source.read,
            dtype=source.dtype,
            finish=lambda: merkle_hash(source.read_digests()),
            lineage=source.lineage,
            places=(source.folder,),
        )

    def without_experts(self, first: int) -> "Weights":
        """Return the same model without the experts from number `first` on, in every layer."""
        family = family_of(self.config)
        key = family.sizes["num_experts"]
        routers = {t.name for t in family.logical_tensors(self.config) if t.kind == "router"}

        def read(name: str) -> Tensor:
            value = self.read(name)
            return value[:first].contiguous() if name in routers else value

        lineage = self.lineage and replace(self.lineage, stock_loadable="yes")
        return replace(self, config={**self.config, key: first}, read=read, lineage=lineage)

    def with_added(self, added: Mapping[str, Tensor]) -> "Weights":
        """Return the same model with something added to the weights of layers.

        A head that was tied is a tensor of its own where the vocabulary is added to.

        Args:
            added: by the layer's name in memory, of the weight's shape, outputs first where it
                lies transposed.

        Raises:
            TritterError: the model has no such layer, or it is of another shape.
        """
        family, config = family_of(self.config), self.config
        embedding = family.tensors[0]
        tied = [tensor for tensor in family.tensors if tensor.unless and not tensor.exists(config)]
        vocabulary = {tensor.disk_name.removesuffix(".weight") for tensor in (embedding, *tied)}
        if tied and vocabulary & added.keys():
            config = {**config, **{tensor.unless: False for tensor in tied}}
        live = (stored for stored in layout(config, "live") if not stored.is_of_experts)
        places = {stored.name.removesuffix(".weight"): stored for stored in live}
        of_name: dict[str, Tensor] = {}
        for layer, delta in added.items():
            stored = places.get(layer)
            if stored is not None:
                delta = stored.parts[0].transposed(delta)
            if stored is None or stored.shape != tuple(delta.shape):
                raise TritterError(f"{self.name} has no layer {layer} of {list(delta.shape)}.")
            of_name |= {tensor.name: part for tensor, part in stored.unpack(delta)}
        untied = {tensor.name for tensor in tied}

        def origin(name: str) -> str:
            return embedding.name if name in untied else name

        def read(name: str) -> Tensor:
            value = self.read(origin(name))
            if name not in of_name:
                return value
            wide = torch.promote_types(value.dtype, torch.float32)
            return value.to(wide) + of_name[name].to(wide)

        return replace(self, config=config, read=read, dtype=lambda name: self.dtype(origin(name)))

    @property
    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds every tensor without rounding."""
        tensors = family_of(self.config).logical_tensors(self.config)
        return reduce(torch.promote_types, (self.dtype(tensor.name) for tensor in tensors))

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most values."""
        counts: Counter[torch.dtype] = Counter()
        for stored in layout(self.config, "hub"):
            counts[self.dtype(stored.parts[0].tensor.name)] += prod(stored.shape)
        return counts.most_common(1)[0][0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote.

    Args:
        origin_hash: of what was exported.
        model_hash: Merkle hash over the written tensors.
        num_bytes: of the written tensors.
        num_files: that they are in.
    """

    folder: Path
    config: Config
    origin_hash: str
    model_hash: str
    num_bytes: int
    num_files: int


def export_model(
    weights: Weights,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    expert_layout: LayoutKind = "hub",
    artifacts: Iterable[Artifact],
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a plain folder whole, or not at all.

    Args:
        dtype: of every tensor; None: that of most values of the origin.
        expert_layout: `hub`, a tensor for each matrix of each expert; or `live`, the experts of a
            layer in one tensor, as transformers holds them.
        artifacts: what stands beside the model.
        progress: called with (tensors written, tensors in all).

    Raises:
        RequestError: `destination` is no place for a result (`check_output`); a tensor holds
            values that are not finite, or that `dtype` cannot hold; the origin was changed since
            its lineage was written.
        TritterError: the origin is damaged, or the disk refused a write.
    """
    check_output(destination, sources=weights.places, overwrite=overwrite)
    dtype = dtype or weights.main_dtype
    config = {
        **weights.config,
        "architectures": [family_of(weights.config).architecture],
        "dtype": str(dtype).removeprefix("torch."),
    }
    stock, stored = on_disk(config), layout(config, expert_layout)
    unpadded = _stream(weights, stored, dtype=dtype, progress=progress)
    stream = padded(unpadded, padded_shapes(config))
    check = partial(check_replaceable, sources=weights.places)
    with atomic_folder(destination, overwrite=overwrite, check=check) as folder:
        digests = write_tensors(folder, stream, max_shard_bytes=max_shard_bytes)
        write_config(folder, stock)
        for artifact in artifacts:
            artifact.write(folder)
        if weights.moments is not None:
            moments = {k: TensorStream.of(m.items()) for k, m in weights.moments.kinds.items()}
            step = weights.moments.step
            write_state(folder, moments, step=step, max_shard_bytes=max_shard_bytes)
        origin_hash, model_hash = weights.finish(), merkle_hash(digests)
        hashes = {"origin_hash": origin_hash, "model_hash": model_hash}
        card = export_card(
            stock, origin=weights.name, lineage=weights.lineage, notes=weights.notes, **hashes
        )
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
    return Exported(
        folder=destination,
        config=stock,
        origin_hash=origin_hash,
        model_hash=model_hash,
        num_bytes=sum(entry.num_bytes for entry in stream.entries),
        num_files=len(list(destination.glob("*.safetensors"))),
    )


def _stream(
    weights: Weights,
    stored: tuple[StoredTensor, ...],
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> TensorStream:
    def rounded(name: str) -> Tensor:
        value = weights.read(name)
        as_asked = value.to(dtype)
        if is_finite(as_asked):
            return as_asked
        if not is_finite(value):
            reason = f"{name} holds values that are not finite"
            raise RequestError(Problem(weights.name, reason=reason))
        raise refused(
            "dtype",
            str(dtype).removeprefix("torch."),
            f"{weights.name} holds {name}, whose largest value is {float(value.abs().max()):.3g}; "
            "allowed is bfloat16 or float32",
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for position, tensor in enumerate(stored):
            yield tensor.name, tensor.pack(rounded)
            if progress is not None:
                progress(position + 1, len(stored))

    entries = tuple(TensorEntry(tensor.name, dtype, tensor.shape) for tensor in stored)
    return TensorStream(entries, tensors())

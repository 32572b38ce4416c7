"""Export a checkpoint as a plain Hugging Face folder with a single dtype.

The model card records the origin of the weights; no other Tritter file is written. Tensors are
streamed one at a time, so the model is never loaded.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tritter.checkpoints.card import Card
from tritter.checkpoints.folder import Artifact, write_config
from tritter.checkpoints.location import check_output, check_replaceable
from tritter.checkpoints.record import Lineage
from tritter.checkpoints.source import Source
from tritter.core.families import LayoutKind, Model, StoredTensor
from tritter.errors import Problem, RequestError, TritterError, refused
from tritter.storage.atomic import atomic_folder
from tritter.storage.hashing import merkle_hash
from tritter.storage.tensors import TensorHeader, is_finite
from tritter.storage.writer import TensorStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model that is read tensor by tensor from any storage.

    Args:
        name: the model's name on the card.
        model: its sizes, tensors and names.
        read: logical name → tensor.
        dtype: logical name → dtype.
        finish: called after the last read. Returns a hash of the origin, and raises if the origin
            does not match its own lineage.
        lineage: the model's lineage, if it has one.
        source_paths: folders and files that are read, where nothing may be written.
        notes: sentences for the card.
    """

    name: str
    model: Model
    read: Callable[[str], Tensor]
    dtype: Callable[[str], torch.dtype]
    finish: Callable[[], str]
    lineage: Lineage | None = None
    source_paths: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Source) -> "Weights":
        """Return the weights of an opened checkpoint folder, verified against its lineage."""
        return cls(
            name=source.folder.resolve().name,
            model=source.model,
            read=source.read,
            dtype=source.dtype,
            finish=lambda: merkle_hash(source.read_digests()),
            lineage=source.lineage,
            source_paths=(source.folder,),
        )

    def without_experts(self, first: int) -> "Weights":
        """Return the same model with only the first `first` experts of every layer."""
        key = self.model.family.sizes["num_experts"]
        routers = {t.name for t in self.model.tensors if t.kind == "router"}

        def read(name: str) -> Tensor:
            value = self.read(name)
            return value[:first].contiguous() if name in routers else value

        lineage = self.lineage
        if lineage is not None:  # its scores are those with all experts
            lineage = replace(lineage, stock_loadable="yes", benchmark_scores={})
        model = self.model.changed({**self.model.config, key: first})
        return replace(self, model=model, read=read, lineage=lineage)

    def with_added(self, added: Mapping[str, Tensor]) -> "Weights":
        """Return the same model with a delta added to the weights of some layers.

        If the embedding or the head gets a delta, a tied head is untied.

        Args:
            added: module name → delta in the weight's shape, with outputs first for weights that
                are stored transposed.
        """
        model = self.model
        embedding = next(tensor for tensor in model.tensors if tensor.kind == "embed")
        separate = model.changed({**model.config, "tie_word_embeddings": False})
        tied = {
            each.name: each
            for each in separate.tensors
            if each.name not in model.shapes
            and separate.shapes[each.name] == model.shapes[embedding.name]
        }
        ends = {each.disk_name.removesuffix(".weight") for each in (embedding, *tied.values())}
        if tied and ends & added.keys():
            model = separate
        live = (stored for stored in model.layout("live") if not stored.is_of_experts)
        stored_layers = {stored.name.removesuffix(".weight"): stored for stored in live}
        of_name: dict[str, Tensor] = {}
        for layer, delta in added.items():
            stored = stored_layers.get(layer)
            if stored is not None:
                delta = stored.parts[0].transposed(delta)
            if stored is None or stored.shape != tuple(delta.shape):
                raise TritterError(f"{self.name} has no layer {layer} of {list(delta.shape)}.")
            of_name |= {tensor.name: part for tensor, part in stored.unpack(delta)}

        def origin(name: str) -> str:
            return embedding.name if name in tied else name

        def read(name: str) -> Tensor:
            value = self.read(origin(name))
            if name not in of_name:
                return value
            wide = torch.promote_types(value.dtype, torch.float32)
            return value.to(wide) + of_name[name].to(wide)

        return replace(self, model=model, read=read, dtype=lambda name: self.dtype(origin(name)))

    @property
    def widest_dtype(self) -> torch.dtype:
        """The dtype that represents every tensor without rounding."""
        tensors = self.model.tensors
        return reduce(torch.promote_types, (self.dtype(tensor.name) for tensor in tensors))

    @property
    def main_dtype(self) -> torch.dtype:
        """The most common dtype, weighted by tensor size."""
        counts: Counter[torch.dtype] = Counter()
        for stored in self.model.layout("hub"):
            counts[self.dtype(stored.parts[0].tensor.name)] += prod(stored.shape)
        return counts.most_common(1)[0][0]

    def export(
        self,
        destination: Path,
        *,
        dtype: torch.dtype | None = None,
        expert_layout: LayoutKind = "hub",
        artifacts: Iterable[Artifact],
        max_shard_bytes: int = 5 * 10**9,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Exported":
        """Write a plain Hugging Face folder atomically.

        Args:
            destination: the folder to write.
            dtype: of the tensors, except those that the stock class keeps in float32; None means
                the most common dtype of the origin.
            expert_layout: `hub` for one tensor per matrix of each expert, or `live` for one tensor
                with all experts of a layer, as in transformers' modules.
            artifacts: other files to write next to the model, such as the tokenizer.
            max_shard_bytes: maximum size of a safetensors file.
            overwrite: replace an existing checkpoint at `destination`.
            progress: called with the number of tensors written and their total number.
        """
        check_output(destination, sources=self.source_paths, overwrite=overwrite)
        dtype = dtype or self.main_dtype
        config = {
            **self.model.config,
            "architectures": [self.model.family.architecture],
            "dtype": str(dtype).removeprefix("torch."),
        }
        model = self.model.changed(config)
        dtypes = dict.fromkeys(model.family.unrounded(config, dtype), torch.float32)
        dtypes = {each.name: dtypes.get(each.name, dtype) for each in model.layout(expert_layout)}
        stream = self._stream(model.layout(expert_layout), dtypes, progress=progress)
        stream = stream.padded(model.padded_shapes())
        with atomic_folder(destination, overwrite=overwrite, check=check_replaceable) as folder:
            digests = stream.write(folder, max_shard_bytes=max_shard_bytes)
            write_config(folder, model.on_disk.config)
            for artifact in artifacts:
                artifact(folder)
            hashes = {"origin_hash": self.finish(), "model_hash": merkle_hash(digests)}
            card = Card.read(folder).for_export(
                model.on_disk,
                origin=self.name,
                lineage=self.lineage,
                notes=self.notes,
                **hashes,
            )
            (folder / Card.NAME).write_text(card, encoding="utf-8")
        return Exported(
            folder=destination,
            model=model.on_disk,
            **hashes,
            num_bytes=sum(entry.num_bytes for entry in stream.entries),
            num_files=len(list(destination.glob("*.safetensors"))),
        )

    def _stream(
        self,
        stored: tuple[StoredTensor, ...],
        dtypes: Mapping[str, torch.dtype],
        *,
        progress: Callable[[int, int], None] | None,
    ) -> TensorStream:
        def rounded(name: str, dtype: torch.dtype) -> Tensor:
            value = self.read(name)
            converted = value.to(dtype)
            if is_finite(converted):
                return converted
            if not is_finite(value):
                reason = f"{name} has values that are not finite"
                raise RequestError(Problem(self.name, reason=reason))
            raise refused(
                "dtype",
                str(dtype).removeprefix("torch."),
                f"the largest value of {name} in {self.name} is {float(value.abs().max()):.3g}; "
                "must be bfloat16 or float32",
            )

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for position, tensor in enumerate(stored):
                yield tensor.name, tensor.pack(partial(rounded, dtype=dtypes[tensor.name]))
                if progress is not None:
                    progress(position + 1, len(stored))

        entries = tuple(
            TensorHeader.of(each.name, dtypes[each.name], each.shape) for each in stored
        )
        return TensorStream(entries, tensors())


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of an export.

    Args:
        folder: the exported folder.
        model: the exported model.
        origin_hash: hash of the exported model.
        model_hash: Merkle hash over the written tensors.
        num_bytes: size of the written tensors.
        num_files: number of safetensors files.
    """

    folder: Path
    model: Model
    origin_hash: str
    model_hash: str
    num_bytes: int
    num_files: int

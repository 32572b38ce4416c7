"""A mixture of experts in a checkpoint folder: taken from a live model, written, read, put back.

The base stands at the root, as if there were no experts. `experts/NAME/` is one expert as stock
PEFT reads it; `state/experts.*` says how they are mixed. `tritter.checkpoint.expert_files` knows
where everything lies and what may stand in the JSON; tensors and live models are known here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from tritter.checkpoint.expert_files import (
    ADAPTER_FILES,
    HEAD,
    TENSORS,
    AdapterConfig,
    EvidenceHead,
    ExpertFiles,
    ExpertsHead,
    check_names,
    is_plain_setting,
)
from tritter.checkpoint.folder import EXPERTS_FOLDER
from tritter.errors import RequestError, TritterError
from tritter.experts.adapters import (
    AdapterShape,
    adapted_layers,
    base_bits,
    factors,
    is_embedding,
    shape_of,
)
from tritter.experts.gates import Routing
from tritter.experts.mixture import Evidence, ExpertMixture
from tritter.storage.atomic import atomic_folder
from tritter.storage.hashing import file_digest
from tritter.storage.reading import require_file
from tritter.storage.records import record_text
from tritter.storage.tensors import TensorFolder, is_finite
from tritter.training.checkpoint_io import decode, encode

# One adapter as a folder of PEFT's format: written for stock PEFT, and read from anywhere.
#
# Only plain LoRA of linear layers and embeddings is read; whatever else a config asks for would
# be left out in silence, and is refused by name. Nothing in such a folder is run or unpickled.
#
# Where an adapter stands on the vocabulary, stock PEFT writes the base's own weights of it beside
# the factors, and puts them in the place of a model's when it loads them. Here a base is never
# written, and one that is read has to be the model's: then it says nothing, and else the adapter
# belongs to another base.

CONFIG_NAME, TENSORS_NAME = ADAPTER_FILES
_PREFIX = "base_model.model."
_KEY = re.compile(
    rf"{re.escape(_PREFIX)}(?P<layer>[\w.]+)\."
    r"(?:lora_(?P<part>[AB])\.weight|lora_embedding_(?P<looked_up>[AB])|(?P<base>base_layer\.weight))"
)


@dataclass(frozen=True, slots=True, eq=False)
class StoredAdapter:
    """What a folder holds.

    Args:
        shape: its targets are the last names of the layers below.
        factors: name of the layer in the stock model → A [r, in_features] and
            B [out_features, r].
        embeddings: the layers of these that look tokens up.
        base: name of a layer → the base's weight of it, where the folder holds one.
    """

    shape: AdapterShape
    factors: Mapping[str, tuple[Tensor, Tensor]]
    embeddings: frozenset[str] = frozenset()
    base: Mapping[str, Tensor] = field(default_factory=dict)


def write_adapter(
    model: nn.Module, name: str, folder: Path, *, base: str, overwrite: bool = False
) -> None:
    """Write an adapter of a live model, as PEFT's `save_pretrained` would.

    Args:
        base: hub id or path of the model that it belongs on, as its config says it.

    Raises:
        RequestError: there is no adapter of this name, or something stands at `folder`.
        TritterError: a weight is not finite, or the disk refuses.
    """
    write_stored(taken(model, name), folder, base=base, overwrite=overwrite)


def taken(model: nn.Module, name: str) -> StoredAdapter:
    """Return an adapter of a live model as it is now, copied to the CPU.

    Raises:
        RequestError: there is no adapter of this name.
        TritterError: a weight is not finite.
    """
    shape, found, embeddings = shape_of(model, name), {}, set()
    for layer_name, layer in adapted_layers(model):
        held = factors(layer, name)
        if held is not None:
            found[layer_name] = _copied(held.down), _copied(held.up)
            if is_embedding(layer):
                embeddings.add(layer_name)
    for layer_name, pair in found.items():
        if not all(map(is_finite, pair)):
            raise TritterError(f"the adapter {name} of {layer_name} is not finite.")
    return StoredAdapter(shape, found, frozenset(embeddings))


def write_stored(
    stored: StoredAdapter, folder: Path, *, base: str, overwrite: bool = False
) -> None:
    """Write an adapter that is no model's any more; see `write_adapter`.

    Raises:
        RequestError: something stands at `folder`.
        TritterError: the disk refuses.
    """
    shape, tensors = stored.shape, {}
    for layer, (down, up) in stored.factors.items():
        part = "lora_embedding_{}" if layer in stored.embeddings else "lora_{}.weight"
        tensors[f"{_PREFIX}{layer}.{part.format('A')}"] = down.contiguous()
        tensors[f"{_PREFIX}{layer}.{part.format('B')}"] = up.contiguous()
    alpha = int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(shape.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with atomic_folder(folder, overwrite=overwrite) as place:
        save_file(tensors, place / TENSORS_NAME, metadata={"format": "pt"})
        (place / TENSORS_NAME).chmod(0o644)  # as other files; it is made for its owner alone
        # What a newer PEFT adds is at its default, which needs no entry
        settings = {k: v for k, v in config.to_dict().items() if is_plain_setting(k, v)}
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
        (place / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter folder, of ours or of stock PEFT.

    Raises:
        TritterError: it is none, asks for more than plain LoRA, or its tensors don't fit its
            config; names the key or the tensor.
    """
    config = AdapterConfig.read(folder)
    tensors = TensorFolder.open_file(folder, TENSORS_NAME)
    names = _layer_names(tensors)
    found = {layer: _pair(tensors, config.rank, layer, own) for layer, own in names.items()}
    targets = tuple(sorted({name.rpartition(".")[2] for name in found}))
    return StoredAdapter(
        AdapterShape(config.rank, config.alpha, targets),
        found,
        frozenset(layer for layer, own in names.items() if own.is_embedding),
        {layer: tensors.get(own.base) for layer, own in names.items() if own.base},
    )


def put_values(model: nn.Module, name: str, stored: StoredAdapter) -> None:
    """Give an adapter that a model has already the values of a folder.

    Raises:
        TritterError: the adapter stands on other layers, or has other sizes, than the folder's; or
            the folder is of another base.
    """
    layers = dict(adapted_layers(model))
    own = {n: f for n, layer in layers.items() if (f := factors(layer, name)) is not None}
    if own.keys() != stored.factors.keys():
        first = sorted(own.keys() ^ stored.factors.keys())[0]
        where = "the folder" if first in stored.factors else "the model"
        raise TritterError(f"the adapter does not fit the model: {first} is in {where} alone.")
    for layer, (down, up) in stored.factors.items():
        if is_embedding(layers[layer]) != (layer in stored.embeddings):
            raise TritterError(
                f"the adapter does not fit the model: {layer} is an embedding in the "
                f"{'folder' if layer in stored.embeddings else 'model'} alone."
            )
        base = layers[layer].get_base_layer().get_parameter("weight")
        if layer in stored.base and not _is_same(base, stored.base[layer]):
            raise TritterError(
                f"the adapter does not fit the model: the folder holds other base weights of "
                f"{layer}."
            )
        for held, value in ((own[layer].down, down), (own[layer].up, up)):
            if held.shape != value.shape:
                raise TritterError(
                    f"the adapter does not fit the model: {layer} is of shape "
                    f"{list(value.shape)} in the folder and {list(held.shape)} in the model."
                )
    with torch.no_grad():
        for layer, (down, up) in stored.factors.items():
            own[layer].down.copy_(down)
            own[layer].up.copy_(up)


@dataclass(slots=True)
class _Names:
    """What the tensors of one layer are called in a file."""

    down: str = ""
    up: str = ""
    base: str = ""
    is_embedding: bool = False


def _layer_names(tensors: TensorFolder) -> dict[str, _Names]:
    """Return the names of a file's tensors by layer, each layer with both factors."""
    path = tensors.folder / TENSORS_NAME
    layers: dict[str, _Names] = {}
    kinds: dict[str, set[bool]] = {}
    for name in tensors.headers:
        match = _KEY.fullmatch(name)
        if match is None:
            raise TritterError(
                f"{path}: {name} is no factor of LoRA on a linear layer or an embedding."
            )
        own = layers.setdefault(match["layer"], _Names())
        if match["base"]:
            own.base = name
            continue
        kinds.setdefault(match["layer"], set()).add(match["part"] is None)
        own.is_embedding = match["part"] is None
        if (match["part"] or match["looked_up"]) == "A":
            own.down = name
        else:
            own.up = name
    if not layers:
        raise TritterError(f"{path} holds no tensors.")
    for layer, own in layers.items():
        if len(kinds.get(layer, ())) > 1:
            raise TritterError(f"{path}: {layer} is a linear layer and an embedding at once.")
        if not own.down or not own.up:
            raise TritterError(f"{path}: {layer} lacks its {'A' if own.up else 'B'}.")
    return layers


def _pair(tensors: TensorFolder, rank: int, layer: str, names: _Names) -> tuple[Tensor, Tensor]:
    """Return a layer's (A, B), found sound."""
    path = tensors.folder / TENSORS_NAME
    shapes = [tensors.shape(names.down), tensors.shape(names.up)]
    if any(len(shape) != 2 for shape in shapes) or (shapes[0][0], shapes[1][1]) != (rank, rank):
        raise TritterError(
            f"{path}: {layer} has factors of shapes {[list(shape) for shape in shapes]}; its "
            f"config says r = {rank}."
        )
    values = tensors.get(names.down), tensors.get(names.up)
    if not all(map(is_finite, values)):
        raise TritterError(f"{path}: {layer} holds values that are not finite.")
    return values


def _is_same(own: Tensor, stored: Tensor) -> bool:
    """Say whether two tensors are one, in the narrower of their dtypes."""
    dtype = min(own.dtype, stored.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.detach().cpu().to(dtype), stored.to(dtype))


def _copied(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


ROOT_OF_AN_EXPERT = "../.."  # what an expert in a checkpoint folder stands on
_COUNTS, _ROUTER, _EXTRA = "evidence.counts", "router", "extra"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertFolder:
    """Experts and how they are mixed, as plain tensors: no part of a live model.

    Args:
        head: everything that is no tensor.
        adapters: expert → its adapter, of all but the base.
        routers: (weight [n, H], bias [n]) of each learned router, in the order of layers.
        counts: int64 [n, V], of evidence; None where the router is learned alone.
        extra: whatever else a training leaves: nested dictionaries with text as keys, lists,
            numbers, text, tensors. It is read back as it was given, and not looked into.
        base: what the adapters' own configs say they stand on.
    """

    head: ExpertsHead
    adapters: Mapping[str, StoredAdapter]
    routers: tuple[tuple[Tensor, Tensor], ...] = ()
    counts: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    base: str = ROOT_OF_AN_EXPERT

    @classmethod
    def of(
        cls,
        mixture: ExpertMixture,
        *,
        usage: Mapping[str, Mapping[str, float]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "ExpertFolder":
        """Take a mixture from a live model, as it is now.

        Args:
            usage: domain → expert → mean gate on its text, by which experts are merged later.
            extra: see above.

        Raises:
            TritterError: a weight is not finite, or a name is no name of a folder.
            TypeError: something in `extra` is neither plain nor a tensor; names the place.
        """
        routing, evidence = mixture.routing, mixture.evidence
        head = ExpertsHead(
            names=tuple(mixture.names),
            has_base=mixture.has_base,
            is_shared=mixture.is_shared,
            router=mixture.router,
            top_k=routing.top_k,
            temperature=routing.temperature,
            capacity_factor=routing.capacity_factor,
            evidence=None if evidence is None else _weighing(evidence),
            usage={domain: dict(gates) for domain, gates in (usage or {}).items()},
            base_bits=base_bits(mixture.model),
        )
        routers = tuple(
            (router.weight.detach().cpu().clone(), router.bias.detach().cpu().clone())
            for router in mixture.routers()
        )
        held: dict[str, Tensor] = {}
        plain = encode(extra or {}, held, place=_EXTRA)
        made = cls(
            head=head,
            adapters={name: taken(mixture.model, name) for name in head.adapters},
            routers=routers,
            counts=None if evidence is None else evidence.counts.detach().cpu().clone(),
            extra=decode(plain, held),
        )
        _check_tensors(made)
        return made

    def write(self, folder: Path) -> None:
        """Write it beside a model; meant for a checkpoint folder that is still being made."""
        for name, adapter in self.adapters.items():
            write_stored(adapter, folder / EXPERTS_FOLDER / name, base=self.base)
        tensors: dict[str, Tensor] = {}
        for number, (weight, bias) in enumerate(self.routers):
            tensors[f"{_ROUTER}.{number}.weight"] = weight.contiguous()
            tensors[f"{_ROUTER}.{number}.bias"] = bias.contiguous()
        if self.counts is not None:
            tensors[_COUNTS] = self.counts.contiguous()
        extra = encode(self.extra, tensors, place=_EXTRA)
        (folder / TENSORS).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / TENSORS).chmod(0o644)  # as all files of a checkpoint; it is made for its owner
        digest = file_digest(folder / TENSORS)
        head = replace(self.head, extra=extra, tensors_sha256=digest)
        (folder / HEAD).write_text(record_text(head), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "ExpertFolder | None":
        """Return the experts of a checkpoint folder; None where there are none.

        Raises:
            TritterError: a file is missing, damaged, too large or of a newer format, values are
                not finite, sizes don't fit each other, or a link leads out of the folder.
        """
        files = ExpertFiles.read(folder)
        return None if files is None else cls.of_files(files)

    @classmethod
    def of_files(cls, files: ExpertFiles) -> "ExpertFolder":
        """Return the experts of files whose heads were read.

        Raises:
            TritterError: as `read`.
        """
        folder = files.source
        tensors = _read_tensors(folder / TENSORS, files.head)
        try:
            extra = decode(files.head.extra, tensors)
            if not isinstance(extra, dict):
                raise ValueError("it is no table")
        except (KeyError, TypeError, ValueError) as error:
            raise TritterError(f"{folder / HEAD} is damaged: extra ({error!r}).") from error
        number = sum(name.endswith(".bias") for name in tensors if name.startswith(_ROUTER))
        try:
            parts = ("weight", "bias")
            routers = [[tensors[f"{_ROUTER}.{n}.{p}"] for p in parts] for n in range(number)]
        except KeyError as error:
            raise TritterError(f"{folder / TENSORS} is damaged: {error} is missing.") from error
        made = cls(
            head=files.head,
            adapters={n: read_adapter(folder / EXPERTS_FOLDER / n) for n in files.head.adapters},
            routers=tuple((weight, bias) for weight, bias in routers),
            counts=tensors.get(_COUNTS),
            extra=extra,
        )
        try:
            _check_tensors(made)
        except TritterError as error:
            raise TritterError(f"{folder}: its experts are damaged: {error}") from error
        return made

    def apply(self, model: nn.Module) -> ExpertMixture:
        """Put the mixture on a model just loaded, which runs it from then on.

        Raises:
            TritterError: the model is not the one that the experts were taken from: sizes differ.
        """
        head = self.head
        if self.counts is not None and self.counts.shape[1] != _config_size(model, "vocab_size"):
            raise TritterError(
                f"the experts don't fit the model: they count {self.counts.shape[1]} tokens, its "
                f"vocabulary has {_config_size(model, 'vocab_size')}."
            )
        mixture = ExpertMixture(
            model,
            router=head.router,
            has_base=head.has_base,
            is_shared=head.is_shared,
            evidence=None if head.evidence is None else asdict(head.evidence),
        )
        for name, adapter in self.adapters.items():
            mixture.open(name, adapter.shape, seed=0)
            put_values(model, name, adapter)
        live = list(mixture.routers())
        if len(live) != len(self.routers):
            raise TritterError(
                f"the experts don't fit the model: they have {len(self.routers)} routers, it takes "
                f"{len(live)}."
            )
        device = next(model.parameters()).device
        for own, (weight, bias) in zip(live, self.routers, strict=True):
            if weight.shape[1] != own.weight.shape[1]:
                raise TritterError(
                    f"the experts don't fit the model: their routers read {weight.shape[1]} "
                    f"numbers, its layers give {own.weight.shape[1]}."
                )
            own.weight = nn.Parameter(weight.to(device, copy=True))
            own.bias = nn.Parameter(bias.to(device, copy=True))
        if mixture.evidence is not None and self.counts is not None:
            mixture.evidence.counts.copy_(self.counts)
        mixture.routing = Routing(
            top_k=head.top_k, temperature=head.temperature, capacity_factor=head.capacity_factor
        )
        model.eval()
        return mixture


def adopt(mixture: ExpertMixture, name: str, folder: Path) -> None:
    """Let a PEFT adapter, of ours or from anywhere, be one more expert of a mixture.

    Its rows of the learned routers are zeros, as those of any new expert.

    Raises:
        RequestError: there is an expert of this name, or the adapter asks for a target that the
            model has not; the mixture is as it was.
        TritterError: the folder is no plain LoRA, is damaged, or its sizes are others than the
            model's; the mixture is as it was.
    """
    try:
        check_names([name])
        _check_key(name)
    except TritterError as error:
        raise RequestError(str(error)) from error
    stored = read_adapter(folder)
    mixture.open(name, stored.shape, seed=0)
    try:
        put_values(mixture.model, name, stored)
    except TritterError:
        mixture.close(name)
        raise
    for router in mixture.routers():
        router.weight = nn.Parameter(pad(router.weight.detach(), (0, 0, 0, 1)))
        router.bias = nn.Parameter(pad(router.bias.detach(), (0, 1)))


def _weighing(evidence: Evidence) -> EvidenceHead:
    return EvidenceHead(
        window=evidence.window,
        scale=evidence.scale,
        prior=evidence.prior,
        end_of_text_id=evidence.end_of_text_id,
    )


def _config_size(model: nn.Module, key: str) -> int:
    size: int = getattr(model.config, key)
    return size


def _read_tensors(path: Path, head: ExpertsHead) -> dict[str, Tensor]:
    require_file(path)
    if file_digest(path) != head.tensors_sha256:
        raise TritterError(f"{path} was changed since it was written.")
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (OSError, SafetensorError, ValueError, MemoryError) as error:
        raise TritterError(f"{path} cannot be read ({error}).") from error


def _check_tensors(held: ExpertFolder) -> None:
    """Refuse tensors that are not finite, or that don't fit each other.

    Raises:
        TritterError: says which.
    """
    head, number = held.head, len(held.head.names)
    for name in head.adapters:
        _check_key(name)
    if (head.router == "evidence") != (not held.routers):
        raise TritterError(f"router = {head.router}, and there are {len(held.routers)} of them.")
    if (head.router == "learned") != (held.counts is None):
        raise TritterError(f"router = {head.router}, and counts of tokens {_there(held.counts)}.")
    sizes = set()
    for weight, bias in held.routers:
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(weight) != number:
            raise TritterError(
                f"a router has shapes {list(weight.shape)} and {list(bias.shape)}, of {number} "
                "experts."
            )
        if not all(value.is_floating_point() and is_finite(value) for value in (weight, bias)):
            raise TritterError("a router holds values that are not finite.")
        sizes.add(weight.shape[1])
    if len(sizes) > 1:
        raise TritterError(f"the routers read {sorted(sizes)} numbers; they stand on one model.")
    counts = held.counts
    if counts is not None:
        if counts.dtype != torch.int64 or counts.ndim != 2 or len(counts) != number:
            raise TritterError(
                f"the counts of tokens are {counts.dtype}, {list(counts.shape)}; allowed is int64, "
                f"a row for each of {number} experts."
            )
        if not counts.numel() or int(counts.min()) < 0:
            raise TritterError("a count of tokens is below 0, or there is none.")
    _check_layers(held.adapters)


def _check_key(name: str) -> None:
    """Refuse what PEFT can't keep an adapter under: its layers hold them in such."""
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise TritterError(f"{name} can't be an expert's name: something of torch's is called so.")


def _check_layers(adapters: Mapping[str, StoredAdapter]) -> None:
    """Refuse adapters that can't stand on one model."""
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in adapters.items():
        for layer, (down, up) in adapter.factors.items():
            size = down.shape[1], up.shape[0]
            other, known = sizes.setdefault(layer, (name, size))
            if known != size:
                raise TritterError(
                    f"{name} and {other} don't stand on one model: {layer} is {size[0]} → "
                    f"{size[1]} for the one, {known[0]} → {known[1]} for the other."
                )


def _there(value: object) -> str:
    return "are missing" if value is None else "are there"

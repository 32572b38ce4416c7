"""A mixture of experts in a checkpoint folder: taken from a live model, written, read, put back.

The base stands at the root, as if there were no experts. `experts/NAME/` is one expert as stock
PEFT reads it; `state/experts.*` says how they are mixed. `tritter.checkpoints.expert_files` knows
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

from tritter.checkpoints.expert_files import (
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
from tritter.checkpoints.folder import EXPERTS_FOLDER
from tritter.errors import RequestError, TritterError
from tritter.methods.experts.adapters import (
    AdapterShape,
    adapted_layers,
    base_bits,
    factors,
    is_embedding,
    shape_of,
)
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import ExpertMixture
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
        if held is None:
            continue
        found[layer_name] = held.down.detach().cpu().clone(), held.up.detach().cpu().clone()
        if not all(map(is_finite, found[layer_name])):
            raise TritterError(f"the adapter {name} of {layer_name} is not finite.")
        if is_embedding(layer):
            embeddings.add(layer_name)
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
    path = folder / TENSORS_NAME
    layers: dict[str, dict[str, str]] = {}  # layer → A, B and base → name of the tensor
    embeddings: dict[str, set[bool]] = {}  # layer → whether its factors look tokens up
    for name in tensors.headers:
        match = _KEY.fullmatch(name)
        if match is None:
            raise TritterError(
                f"{path}: {name} is no factor of LoRA on a linear layer or an embedding."
            )
        part = match["part"] or match["looked_up"]
        layers.setdefault(match["layer"], {})[part or "base"] = name
        if part:
            embeddings.setdefault(match["layer"], set()).add(match["part"] is None)
    if not layers:
        raise TritterError(f"{path} holds no tensors.")
    found = {}
    for layer, own in layers.items():
        if len(embeddings.get(layer, ())) > 1:
            raise TritterError(f"{path}: {layer} is a linear layer and an embedding at once.")
        if missing := [part for part in ("B", "A") if part not in own]:
            raise TritterError(f"{path}: {layer} lacks its {missing[0]}.")
        down, up = tensors.shape(own["A"]), tensors.shape(own["B"])
        if (len(down), len(up)) != (2, 2) or (down[0], up[1]) != (config.rank, config.rank):
            raise TritterError(
                f"{path}: {layer} has factors of shapes {[list(down), list(up)]}; its config says "
                f"r = {config.rank}."
            )
        found[layer] = tensors.get(own["A"]), tensors.get(own["B"])
        if not all(map(is_finite, found[layer])):
            raise TritterError(f"{path}: {layer} holds values that are not finite.")
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in found}))
    return StoredAdapter(
        AdapterShape(config.rank, config.alpha, targets),
        found,
        frozenset(layer for layer, kinds in embeddings.items() if True in kinds),
        {layer: tensors.get(own["base"]) for layer, own in layers.items() if "base" in own},
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
        base = layers[layer].get_base_layer().get_parameter("weight").detach()
        theirs = stored.base.get(layer, base)
        narrower = min(base.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if theirs is not base and not torch.equal(base.cpu().to(narrower), theirs.to(narrower)):
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
            evidence=None
            if evidence is None
            else EvidenceHead(
                window=evidence.window,
                scale=evidence.scale,
                prior=evidence.prior,
                end_of_text_id=evidence.end_of_text_id,
            ),
            usage={domain: dict(gates) for domain, gates in (usage or {}).items()},
            base_bits=base_bits(mixture.model),
        )
        held: dict[str, Tensor] = {}
        plain = encode(extra or {}, held, key_path=_EXTRA)
        made = cls(
            head=head,
            adapters={name: taken(mixture.model, name) for name in head.adapters},
            routers=tuple(
                (router.weight.detach().cpu().clone(), router.bias.detach().cpu().clone())
                for router in mixture.routers()
            ),
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
        extra = encode(self.extra, tensors, key_path=_EXTRA)
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
        require_file(folder / TENSORS)
        if file_digest(folder / TENSORS) != files.head.tensors_sha256:
            raise TritterError(f"{folder / TENSORS} was changed since it was written.")
        try:
            tensors: dict[str, Tensor] = load_file(folder / TENSORS)
        except (OSError, SafetensorError, ValueError, MemoryError) as error:
            raise TritterError(f"{folder / TENSORS} cannot be read ({error}).") from error
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
        head, size = self.head, model.config.vocab_size  # type: ignore[union-attr]
        if self.counts is not None and self.counts.shape[1] != size:
            raise TritterError(
                f"the experts don't fit the model: they count {self.counts.shape[1]} tokens, its "
                f"vocabulary has {size}."
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
    except TritterError as error:
        raise RequestError(str(error)) from error
    stored = read_adapter(folder)
    mixture.open(name, stored.shape, seed=0)
    try:
        put_values(mixture.model, name, stored)
    except TritterError:
        mixture.close(name)
        raise
    mixture.add_router_rows()


def _check_tensors(held: ExpertFolder) -> None:
    """Refuse tensors that are not finite, or that don't fit each other.

    Raises:
        TritterError: says which.
    """
    head, number = held.head, len(held.head.names)
    for name in head.adapters:  # PEFT's layers hold them in such
        if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            raise TritterError(
                f"{name} can't be an expert's name: something of torch's is called so."
            )
    if (head.router == "evidence") != (not held.routers):
        raise TritterError(f"router = {head.router}, and there are {len(held.routers)} of them.")
    if (head.router == "learned") != (held.counts is None):
        there = "are missing" if held.counts is None else "are there"
        raise TritterError(f"router = {head.router}, and counts of tokens {there}.")
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
    layers: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in held.adapters.items():
        for layer, (down, up) in adapter.factors.items():
            size = down.shape[1], up.shape[0]
            other, known = layers.setdefault(layer, (name, size))
            if known != size:
                raise TritterError(
                    f"{name} and {other} don't stand on one model: {layer} is {size[0]} → "
                    f"{size[1]} for the one, {known[0]} → {known[1]} for the other."
                )

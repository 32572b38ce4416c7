"""Experts in a checkpoint folder: capturing a live mixture, writing, reading and applying it.

The base is in the root folder, as without experts. `experts/NAME/` is one expert in the format of
stock PEFT, and `state/experts.*` describes the mixture. `tritter.checkpoints.expert_files` defines
the files and validates the JSON; this module handles tensors and live models.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tritter.checkpoints.expert_files import (
    AdapterShape,
    EvidenceHead,
    ExpertFiles,
    ExpertsHead,
    check_names,
    is_plain_setting,
)
from tritter.checkpoints.record import EXPERTS_FOLDER
from tritter.core.families import Model
from tritter.core.models import load_model
from tritter.errors import RequestError, TritterError
from tritter.evaluation.inference import eval_mode
from tritter.methods.experts.adapters import Factors, LoraLayers
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import ExpertMixture
from tritter.storage.atomic import atomic_folder
from tritter.storage.hashing import file_digest
from tritter.storage.reading import require_file
from tritter.storage.records import record_text
from tritter.storage.tensors import TensorFolder, is_finite
from tritter.training.checkpoint_io import decode, encode

# One adapter as a folder in PEFT's format, written for stock PEFT and read from any source.
#
# Only plain LoRA of linear layers and embeddings is read. Other settings in a config are refused by
# name instead of being ignored. Nothing in such a folder is run or unpickled.
#
# If an adapter targets the vocabulary, stock PEFT also writes the base's weights of it, which
# replace those of the model on loading. Here they are never written. If they are read, they must
# equal those of the model; otherwise the adapter belongs to another base.

_CONFIG_NAME, _TENSORS_NAME = AdapterShape.FILES
_PREFIX = "base_model.model."
_KEY = re.compile(
    rf"{re.escape(_PREFIX)}(?P<layer>[\w.]+)\."
    r"(?:lora_(?P<part>[AB])\.weight|lora_embedding_(?P<looked_up>[AB])|(?P<base>base_layer\.weight))"
)
_ROOT_OF_AN_EXPERT = "../.."  # base of an expert in a checkpoint folder
_COUNTS, _ROUTER, _EXTRA = "evidence.counts", "router", "extra"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitChange:
    """Difference of a merged adapter from the mixture, on some tokens.

    Args:
        largest: max |Δ logit| in standard deviations of the mixture's logits.
        mean: root mean square of Δ logit, in the same unit.
        same_best: share of tokens with the same most probable next token.
        num_tokens: number of tokens.
    """

    largest: float
    mean: float
    same_best: float
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredAdapter:
    """One adapter as plain tensors.

    Args:
        shape: its size; the targets are the last names of the layers below.
        factors: layer of the stock model → its A and B.
        base: layer → the base's weight, if the folder contains it.
    """

    shape: AdapterShape
    factors: Mapping[str, Factors]
    base: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "StoredAdapter":
        """Return a copy of a live model's adapter on the CPU."""
        lora = LoraLayers(model)
        found = {}
        for layer_name, layer in lora:
            if (live := Factors.of(layer, name)) is None:
                continue
            down, up = (each.detach().cpu().clone() for each in (live.down, live.up))
            if not (is_finite(down) and is_finite(up)):
                raise TritterError(f"the adapter {name} of {layer_name} is not finite.")
            found[layer_name] = replace(live, down=down, up=up, gain=None)
        return cls(lora.shape(name), found)

    @classmethod
    def read(cls, folder: Path) -> "StoredAdapter":
        """Read an adapter folder written by Tritter or stock PEFT."""
        config = AdapterShape.read(folder)
        tensors = TensorFolder.open_file(folder, _TENSORS_NAME)
        path = folder / _TENSORS_NAME
        layers: dict[str, dict[str, str]] = {}  # layer → A, B and base → name of the tensor
        embeddings: dict[str, set[bool]] = {}  # layer → {True} for an embedding, else {False}
        for name in tensors.headers:
            match = _KEY.fullmatch(name)
            if match is None:
                raise TritterError(
                    f"{path}: {name} is not a LoRA factor of a linear layer or an embedding."
                )
            part = match["part"] or match["looked_up"]
            layers.setdefault(match["layer"], {})[part or "base"] = name
            if part:
                embeddings.setdefault(match["layer"], set()).add(match["part"] is None)
        if not layers:
            raise TritterError(f"{path} contains no tensors.")
        found = {}
        for layer, own in layers.items():
            if len(embeddings.get(layer, ())) > 1:
                raise TritterError(
                    f"{path}: {layer} has factors of both a linear layer and an embedding."
                )
            if missing := [part for part in ("B", "A") if part not in own]:
                raise TritterError(f"{path}: {layer} lacks its {missing[0]}.")
            down, up = tensors.shape(own["A"]), tensors.shape(own["B"])
            if (len(down), len(up)) != (2, 2) or (down[0], up[1]) != (config.rank, config.rank):
                raise TritterError(
                    f"{path}: {layer} has factors of shapes {[list(down), list(up)]}; its config "
                    f"has r = {config.rank}."
                )
            found[layer] = one = Factors(
                tensors[own["A"]],
                tensors[own["B"]],
                config.scaling,
                is_embedding=True in embeddings[layer],
            )
            if not (is_finite(one.down) and is_finite(one.up)):
                raise TritterError(f"{path}: {layer} has values that are not finite.")
        targets = tuple(sorted({layer.rpartition(".")[2] for layer in found}))
        return cls(
            AdapterShape(config.rank, config.alpha, targets),
            found,
            {layer: tensors[own["base"]] for layer, own in layers.items() if "base" in own},
        )

    def write(
        self,
        folder: Path,
        *,
        base: str,
        overwrite: bool = False,
        whole: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the adapter in the format of PEFT's `save_pretrained`.

        Args:
            folder: destination.
            base: hub id or path of the base model, for the adapter's config.
            overwrite: replace an existing adapter.
            whole: layer → its weight with the adapter, in place of factors; only for stock PEFT.
        """
        from peft import LoraConfig  # slow to import

        shape, whole = self.shape, whole or {}
        tensors = {f"{_PREFIX}{layer}.weight": weight for layer, weight in whole.items()}
        adapted = {layer: one for layer, one in self.factors.items() if layer not in whole}
        for layer, one in adapted.items():
            part = "lora_embedding_{}" if one.is_embedding else "lora_{}.weight"
            tensors[f"{_PREFIX}{layer}.{part.format('A')}"] = one.down.contiguous()
            tensors[f"{_PREFIX}{layer}.{part.format('B')}"] = one.up.contiguous()
        alpha = int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=sorted(set(shape.targets) - {name.rpartition(".")[2] for name in whole}),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
        )
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            save_file(tensors, temporary / _TENSORS_NAME, metadata={"format": "pt"})
            (temporary / _TENSORS_NAME).chmod(0o644)  # save_file restricts it to the owner
            # Options of newer PEFT versions have their defaults and need no entry
            settings = {k: v for k, v in config.to_dict().items() if is_plain_setting(k, v)}
            settings |= {"modules_to_save": sorted(whole)} if whole else {}
            plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
            (temporary / _CONFIG_NAME).write_text(
                json.dumps(plain, indent=2, sort_keys=True) + "\n"
            )

    def load_into(self, model: nn.Module, name: str) -> None:
        """Load the values into an adapter on a model."""
        layers = dict(LoraLayers(model))
        own = {n: f for n, layer in layers.items() if (f := Factors.of(layer, name)) is not None}
        if own.keys() != self.factors.keys():
            first = sorted(own.keys() ^ self.factors.keys())[0]
            where = "the folder" if first in self.factors else "the model"
            raise TritterError(f"the adapter does not fit the model: {first} is only in {where}.")
        for layer, stored in self.factors.items():
            if own[layer].is_embedding != stored.is_embedding:
                raise TritterError(
                    f"the adapter does not fit the model: {layer} is an embedding only in the "
                    f"{'folder' if stored.is_embedding else 'model'}."
                )
            base = layers[layer].get_base_layer().get_parameter("weight").detach()
            stored_base = self.base.get(layer, base)
            narrower = min(base.dtype, stored_base.dtype, key=lambda dtype: dtype.itemsize)
            if stored_base is not base and not torch.equal(
                base.cpu().to(narrower), stored_base.to(narrower)
            ):
                raise TritterError(
                    "the adapter does not fit the model: the folder contains other base weights "
                    f"of {layer}."
                )
            for parameter, value in ((own[layer].down, stored.down), (own[layer].up, stored.up)):
                if parameter.shape != value.shape:
                    raise TritterError(
                        f"the adapter does not fit the model: {layer} has shape "
                        f"{list(value.shape)} in the folder and {list(parameter.shape)} in the "
                        "model."
                    )
        with torch.no_grad():
            for layer, stored in self.factors.items():
                own[layer].down.copy_(stored.down)
                own[layer].up.copy_(stored.up)

    def logit_change(self, mixture: ExpertMixture, input_ids: Tensor) -> LogitChange:
        """Measure the change of the logits if the adapter replaces a mixture, in the model's dtype.

        One sequence at a time, since logits take much memory. The mixture is the same afterwards.

        Args:
            input_ids: int64 [B, T].
        """
        model, largest, sums = mixture.model, torch.zeros(()), torch.zeros(4, dtype=torch.float64)
        name = next(each for n in range(300) if (each := f"merged_{n}") not in mixture.names)

        def logits(ids: Tensor) -> Tensor:
            with eval_mode(model) as device:
                return model(input_ids=ids.to(device), use_cache=False).logits.double()

        for ids in input_ids.split(1):
            before = logits(ids)
            mixture.open(name, self.shape, seed=0)
            self.load_into(model, name)
            with mixture.only(name):
                after = logits(ids)
            mixture.close(name)
            moved, same_best = after - before, (after.argmax(-1) == before.argmax(-1)).sum()
            largest = torch.maximum(largest, moved.abs().max().cpu())  # keeps NaN
            parts = before.sum(), before.square().sum(), moved.square().sum(), same_best
            sums += torch.stack(parts).cpu()
        total, squares, moves, best = sums
        number = input_ids.numel() * before.shape[-1]
        deviation = ((squares - total**2 / number).clamp(min=0) / (number - 1)).sqrt()
        return LogitChange(
            largest=float(largest / deviation),
            mean=float((moves / number).sqrt() / deviation),
            same_best=float(best / input_ids.numel()),
            num_tokens=input_ids.numel(),
        )

    def deltas(self) -> dict[str, Tensor]:
        """Return layer → change of its weight; for an embedding [V, H]."""
        found = ((n, one.delta(), one.is_embedding) for n, one in self.factors.items())
        return {n: delta.T if is_embedding else delta for n, delta, is_embedding in found}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertFolder:
    """Experts and their mixing as plain tensors, independent of a live model.

    Args:
        head: everything except tensors.
        adapters: expert → its adapter, for all except the base.
        routers: (weight [n, H], bias [n]) of each learned router, in layer order.
        counts: int64 [n, V], token counts of evidence; None if the router is `learned`.
        extra: further state of a run: nested dictionaries with string keys, lists, numbers,
            strings, tensors. It is read back unchanged, without validation.
    """

    head: ExpertsHead
    adapters: Mapping[str, StoredAdapter]
    routers: tuple[tuple[Tensor, Tensor], ...] = ()
    counts: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        mixture: ExpertMixture,
        *,
        usage: Mapping[str, Mapping[str, float]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "ExpertFolder":
        """Return a snapshot of a live mixture.

        Args:
            mixture: the mixture.
            usage: domain → expert → mean gate on its data, used when experts are merged later.
            extra: see above.

        Raises:
            TritterError: a weight is not finite, or a name is not a valid folder name.
            TypeError: something in `extra` is neither plain nor a tensor; names its position.
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
                inner_prior=evidence.inner_prior,
                end_of_text_id=evidence.end_of_text_id,
                start_ids=evidence.start_ids,
            ),
            usage={domain: dict(gates) for domain, gates in (usage or {}).items()},
            base_bits=mixture.lora.base_bits,
        )
        tensors: dict[str, Tensor] = {}
        plain = encode(extra or {}, tensors, key_path=_EXTRA)
        made = cls(
            head=head,
            adapters={name: StoredAdapter.of(mixture.model, name) for name in head.adapters},
            routers=tuple(
                (router.weight.detach().cpu().clone(), router.bias.detach().cpu().clone())
                for router in mixture.routers()
            ),
            counts=None if evidence is None else evidence.counts.detach().cpu().clone(),
            extra=decode(plain, tensors),
        )
        _check_tensors(made)
        return made

    def write(self, folder: Path) -> None:
        """Write the experts to the folder of their base, in place of experts written before."""
        is_ours = (folder / ExpertsHead.PATH).exists()
        if self.adapters or is_ours:
            with atomic_folder(folder / EXPERTS_FOLDER, overwrite=is_ours) as temporary:
                for name, adapter in self.adapters.items():
                    adapter.write(temporary / name, base=_ROOT_OF_AN_EXPERT)
        tensors: dict[str, Tensor] = {}
        for number, (weight, bias) in enumerate(self.routers):
            tensors[f"{_ROUTER}.{number}.weight"] = weight.contiguous()
            tensors[f"{_ROUTER}.{number}.bias"] = bias.contiguous()
        if self.counts is not None:
            tensors[_COUNTS] = self.counts.contiguous()
        extra = encode(self.extra, tensors, key_path=_EXTRA)
        path = folder / ExpertsHead.TENSORS
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # as all files of a checkpoint
        head = replace(self.head, extra=extra, tensors_sha256=file_digest(path))
        (folder / ExpertsHead.PATH).write_text(record_text(head), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "ExpertFolder | None":
        """Return the experts of a checkpoint folder; None if there are none."""
        files = ExpertFiles.read(folder)
        return None if files is None else cls.of_files(files)

    @classmethod
    def of_files(cls, files: ExpertFiles) -> "ExpertFolder":
        """Return the experts of files whose heads were already read."""
        folder, path = files.source, files.source / ExpertsHead.TENSORS
        require_file(path)
        if file_digest(path) != files.head.tensors_sha256:
            raise TritterError(f"{path} was changed since it was written.")
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError, ValueError, MemoryError) as error:
            raise TritterError(f"{path} cannot be read ({error}).") from error
        try:
            extra = decode(files.head.extra, tensors)
            if not isinstance(extra, dict):
                raise ValueError("it is not a JSON object")
        except (KeyError, TypeError, ValueError) as error:
            head = folder / ExpertsHead.PATH
            raise TritterError(f"{head} is damaged: extra ({error!r}).") from error
        number = sum(name.endswith(".bias") for name in tensors if name.startswith(_ROUTER))
        try:
            parts = ("weight", "bias")
            routers = [[tensors[f"{_ROUTER}.{n}.{p}"] for p in parts] for n in range(number)]
        except KeyError as error:
            raise TritterError(f"{path} is damaged: {error} is missing.") from error
        made = cls(
            head=files.head,
            adapters={
                n: StoredAdapter.read(folder / EXPERTS_FOLDER / n) for n in files.head.adapters
            },
            routers=tuple((weight, bias) for weight, bias in routers),
            counts=tensors.get(_COUNTS),
            extra=extra,
        )
        try:
            _check_tensors(made)
        except TritterError as error:
            raise TritterError(f"{folder}: its experts are damaged: {error}") from error
        return made

    def merged(
        self, gates: Mapping[str, float], *, rank: int | None = None
    ) -> tuple[StoredAdapter, float]:
        """Merge the experts into one adapter, each weighted by its gate.

        Args:
            gates: expert → gate; the gates of adapters plus the base's share sum to 1.
            rank: rank of the adapter. None: the smallest that loses nothing.

        Returns:
            The adapter nearest to the sum of all adapters times their gates, and the lost share
            ‖sum − adapter‖ / ‖sum‖, maximum over layers; 0 if the rank suffices.
        """
        layers: dict[str, list[tuple[str, Factors]]] = {}
        for name, stored in self.adapters.items():
            for layer, one in stored.factors.items():
                wide = torch.promote_types(one.down.dtype, torch.float32)
                one = replace(one, down=one.down.to(wide), up=one.up.to(wide))
                layers.setdefault(layer, []).append((name, one))
        if not layers:
            raise RequestError(
                "there is no expert to merge: the mixture consists of its base only."
            )
        whole = max(_whole_rank([part for _, part in parts]) for parts in layers.values())
        size, lost, found = rank or whole, 0.0, {}
        for layer, parts in layers.items():
            factors, weights = [part for _, part in parts], [gates[name] for name, _ in parts]
            found[layer] = Factors.merged(factors, weights, rank=size, alpha=float(size))
            if size < _whole_rank(factors):
                lost = max(lost, found[layer].lost_share(factors, weights))
        targets = tuple(sorted({layer.rpartition(".")[2] for layer in layers}))
        shape = AdapterShape(size, float(size), targets)
        return StoredAdapter(shape, found), lost

    def apply(self, model: nn.Module) -> ExpertMixture:
        """Add the mixture to a model that was just loaded.

        Raises:
            TritterError: sizes differ from those of the model.
        """
        config: Any = model.config
        head, size = self.head, config.get_text_config(decoder=True).vocab_size
        if self.counts is not None and self.counts.shape[1] != size:
            raise TritterError(
                f"the experts don't fit the model: they count {self.counts.shape[1]} tokens, and "
                f"its vocabulary has {size}."
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
            adapter.load_into(model, name)
        live, device = list(mixture.routers()), next(model.parameters()).device
        sizes = [weight.shape[1] for weight, _ in self.routers]
        if (needed := [own.weight.shape[1] for own in live]) != sizes:
            raise TritterError(
                f"the experts don't fit the model: their routers have input sizes {sizes}, and it "
                f"needs {needed}."
            )
        for own, (weight, bias) in zip(live, self.routers, strict=True):
            own.weight = nn.Parameter(weight.to(device, copy=True))
            own.bias = nn.Parameter(bias.to(device, copy=True))
        if mixture.evidence is not None and self.counts is not None:
            mixture.evidence.counts.copy_(self.counts)
        mixture.routing = Routing(
            top_k=head.top_k, temperature=head.temperature, capacity_factor=head.capacity_factor
        )
        model.eval()
        return mixture


def load_with_experts(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    base_bits: int | None = None,
    model: Model | None = None,
) -> nn.Module:
    """Load a checkpoint's model with its experts, or for its first ones.

    Args:
        folder: the checkpoint.
        dtype: data type of the weights.
        base_bits: 8 or 4, to quantise the base for new experts. Existing experts run on a base
            quantised as during their training.
        model: as `load_model`.
    """
    stored = ExpertFolder.read(folder)
    bits = base_bits if stored is None else stored.head.base_bits
    live = load_model(folder, dtype=dtype, model=model)
    if bits is not None:
        from tritter.methods.experts.quantised import quantise  # slow to import

        quantise(live, bits)
    if stored is not None:
        stored.apply(live)
    return live


def adopt(mixture: ExpertMixture, name: str, folder: Path) -> None:
    """Add a PEFT adapter, from Tritter or elsewhere, to a mixture as another expert.

    Its rows of the learned routers are zeros, as for any new expert.

    Raises:
        RequestError: the name is already in use, or a target does not exist in the model; the
            mixture is unchanged.
        TritterError: the folder is not a plain LoRA adapter, is damaged, or has other sizes than
            the model; the mixture is unchanged.
    """
    try:
        check_names([name])
    except TritterError as error:
        raise RequestError(str(error)) from error
    stored = StoredAdapter.read(folder)
    mixture.open(name, stored.shape, seed=0)
    try:
        stored.load_into(mixture.model, name)
    except TritterError:
        mixture.close(name)
        raise
    mixture.add_router_rows()


def _check_tensors(experts: ExpertFolder) -> None:
    """Refuse tensors that are not finite or don't match each other."""
    head, number = experts.head, len(experts.head.names)
    if (head.router == "evidence") != (not experts.routers):
        raise TritterError(
            f"router = {head.router}, but there are {len(experts.routers)} learned routers."
        )
    if (head.router == "learned") != (experts.counts is None):
        state = "missing" if experts.counts is None else "present"
        raise TritterError(f"router = {head.router}, but token counts are {state}.")
    for weight, bias in experts.routers:
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(weight) != number:
            raise TritterError(
                f"a router has shapes {list(weight.shape)} and {list(bias.shape)}, which don't "
                f"match {number} experts."
            )
        if not all(value.is_floating_point() and is_finite(value) for value in (weight, bias)):
            raise TritterError("a router has values that are not finite.")
    counts = experts.counts
    if counts is not None:
        if counts.dtype != torch.int64 or counts.ndim != 2 or len(counts) != number:
            raise TritterError(
                f"the token counts are {counts.dtype}, {list(counts.shape)}; they must be int64 "
                f"with one row for each of {number} experts."
            )
        if not counts.numel() or int(counts.min()) < 0:
            raise TritterError("token counts are negative or empty.")


def _whole_rank(parts: list[Factors]) -> int:
    """Return the maximum rank of a sum of adapters of one layer."""
    sizes = parts[0].down.shape[1], parts[0].up.shape[0]
    return min(sum(part.rank for part in parts), *sizes)

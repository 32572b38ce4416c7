"""A mixture of experts in a checkpoint folder: taken from a live model, written, read, put back.

The base stands at the root, as if there were no experts. `experts/NAME/` is one expert as stock
PEFT reads it; `state/experts.*` says how they are mixed. `tritter.checkpoint.expert_files` knows
where everything lies and what may stand in the JSON; tensors and live models are known here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from tritter.checkpoint.expert_files import (
    HEAD,
    TENSORS,
    EvidenceHead,
    ExpertFiles,
    ExpertsHead,
    check_names,
)
from tritter.checkpoint.folder import EXPERTS_FOLDER
from tritter.errors import RequestError, TritterError
from tritter.experts.adapters import base_bits
from tritter.experts.evidence import Evidence
from tritter.experts.gates import Routing
from tritter.experts.mixture import ExpertMixture
from tritter.experts.peft_folder import (
    StoredAdapter,
    put_values,
    read_adapter,
    taken,
    write_stored,
)
from tritter.storage.hashing import file_digest
from tritter.storage.reading import require_file
from tritter.storage.records import record_text
from tritter.storage.tensors import is_finite
from tritter.training.checkpoint_io import decode, encode

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

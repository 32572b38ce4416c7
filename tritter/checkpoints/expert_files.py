"""LoRA expert files of a checkpoint: `experts/NAME/` per adapter, `state/experts.*` for routing.

This module opens no tensors, so checkpoints can be copied, listed and checked without a model.
`tritter.methods.experts.stored` builds the mixture from these files.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.checkpoints.record import EXPERTS_FOLDER, Lineage
from tritter.errors import TritterError, brief, refused, show
from tritter.limits import MAX_COUNT
from tritter.options import Count, WholeNumber
from tritter.storage.reading import check_links, read_object, require_file
from tritter.storage.records import read_record, record
from tritter.storage.tensors import TensorFolder

_BASE = "base"  # the expert without an adapter; always the first
_MAX_EXPERTS = 256
RouterKind = Literal["learned", "evidence", "both"]
_MAX_RANK = 1024
# Keys of PEFT's LoRA config that affect neither the function nor the loading of an adapter
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type",
    "peft_version", "r", "lora_alpha", "lora_dropout", "revision", "target_modules", "task_type",
    "ephemeral_gpu_offload", "runtime_config", "eva_config", "corda_config", "loftq_config",
    "lora_ga_config", "qalora_group_size",
    "fan_in_fan_out",  # PEFT derives it from the layer: true if the matrix is stored transposed
}  # fmt: skip
# Other keys: values that plain LoRA has in addition to null, false and empty ones. Others than
# these initialisations change the base, too (pissa, olora, corda, loftq, lora_ga)
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none",), "megatron_core": ("megatron.core",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_Positive = Annotated[float, Field(gt=0, le=MAX_COUNT)]
_Share = Annotated[float, Field(ge=0, le=1)]


@record
class EvidenceHead:
    """Evidence router settings: the keywords of `tritter.methods.experts.mixture.Evidence`."""

    window: Count
    scale: _Positive
    prior: Annotated[float, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
    end_of_text_id: WholeNumber | None
    inner_prior: Annotated[float, Field(ge=-MAX_COUNT, le=MAX_COUNT)] | None = None
    start_ids: tuple[WholeNumber, ...] = ()


@record
class ExpertsHead:
    """The content of `state/experts.json`.

    Args:
        names: experts in gate order. If the base is one of them, it comes first.
        has_base: True if the base is one of the experts.
        is_shared: True if all layers share one learned router.
        router: kind of router that assigns tokens to experts.
        top_k: experts per token; None means all.
        temperature: divisor of the router logits.
        capacity_factor: expert capacity factor during training; None means no limit.
        evidence: settings of the evidence router, if there is one.
        usage: domain → expert → mean gate on the domain's data, where measured.
        base_bits: 8 or 4 if bitsandbytes quantised the base during training; inference uses the
            same. None means unquantised.
        extra: other data from training, encoded by `tritter.training.checkpoint_io`.
        tensors_sha256: SHA-256 of the tensor file next to it.
    """

    FORMAT: ClassVar[str] = "mixture of experts"
    PATH: ClassVar[str] = "state/experts.json"
    TENSORS: ClassVar[str] = "state/experts.safetensors"

    names: tuple[str, ...]
    has_base: bool = False
    is_shared: bool = False
    router: RouterKind = "learned"
    top_k: Count | None = None
    temperature: _Positive = 1.0
    capacity_factor: _Positive | None = None
    evidence: EvidenceHead | None = None
    usage: Mapping[Annotated[str, Field(max_length=256)], Mapping[str, _Share]] = field(
        default_factory=dict
    )
    base_bits: Literal[4, 8] | None = None
    extra: Any = None
    tensors_sha256: str = ""

    def __post_init__(self) -> None:
        check_names(self.names)
        if self.has_base and self.names[0] != _BASE:
            raise TritterError(f"names = {brief(self.names)}: the first must be {_BASE}.")
        if (self.evidence is None) != (self.router == "learned"):
            is_learned = self.router == "learned"
            found, allowed = ("an object", "null") if is_learned else ("null", "an object")
            raise TritterError(f"evidence = {found}; must be {allowed} if router = {self.router}.")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The experts that have an adapter."""
        return self.names[1:] if self.has_base else self.names


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """The size of one adapter, equal in all its layers.

    Args:
        rank: r, rows of A and columns of B.
        alpha: α; the output of the adapter is scaled by α / r.
        targets: last names of its layers: linear layers of decoder layers, such as `q_proj`, and
            the vocabulary, `embed_tokens` and `lm_head`.
    """

    FILES: ClassVar[tuple[str, str]] = ("adapter_config.json", "adapter_model.safetensors")

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """α / r."""
        return self.alpha / self.rank

    @classmethod
    def read(cls, folder: Path) -> "AdapterShape":
        """Read and check the config of a plain LoRA adapter, saved by Tritter or stock PEFT."""
        path = folder / AdapterShape.FILES[0]
        config = read_object(path)
        if config.get("peft_type") != "LORA":
            found = brief(config.get("peft_type"))
            raise TritterError(f"{path}: peft_type = {found}; must be 'LORA'.")
        for key, value in config.items():
            if not is_plain_setting(key, value):
                raise TritterError(
                    f"{path}: {show(key)} = {brief(value)} is not supported; only plain LoRA is."
                )
        rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
        if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
            raise TritterError(f"{path}: r = {brief(rank)}; must be 1 to {_MAX_RANK}.")
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:  # type: ignore[operator]
            raise TritterError(f"{path}: lora_alpha = {brief(alpha)}; must be above 0, below 1e6.")
        names = [targets] if isinstance(targets, str) else targets
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            allowed = "must be a name, or a list of names"
            raise TritterError(f"{path}: target_modules = {brief(targets)}; {allowed}.")
        return cls(rank, float(alpha), tuple(sorted(names)))  # type: ignore[arg-type]


def is_plain_setting(key: str, value: object) -> bool:
    """Return True if plain LoRA allows this setting in an adapter's config."""
    return key in _HARMLESS or value in (*_PLAIN.get(key, ()), None, False, {}, [])


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """The expert files of a checkpoint folder.

    Args:
        source: the checkpoint folder.
        head: the content of `state/experts.json`.
        configs: adapter name → its config.
        num_parameters: adapter name → number of parameters.
    """

    source: Path
    head: ExpertsHead
    configs: Mapping[str, AdapterShape]
    num_parameters: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path) -> "ExpertFiles | None":
        """Return the experts of a checkpoint folder, or None if there are none. Opens no tensor."""
        check_links(folder)
        path = folder / ExpertsHead.PATH
        if not path.exists():
            if (
                lineage := Lineage.read(folder)
            ) is not None and ExpertsHead.PATH in lineage.file_digests:
                raise TritterError(f"{path} is missing; the experts in {folder} can't be read.")
            patterns = (
                *(f"{EXPERTS_FOLDER}/*/{file}" for file in AdapterShape.FILES),
                ExpertsHead.TENSORS,
            )
            unlisted = [path for pattern in patterns for path in folder.glob(pattern)]
            if found := sorted(str(path.relative_to(folder)) for path in unlisted):
                raise TritterError(
                    f"{folder} contains {found[0]}, but {ExpertsHead.PATH} is missing, so its "
                    f"experts can't be read. Restore that file, or remove {ExpertsHead.TENSORS} "
                    f"and {EXPERTS_FOLDER}/ to use only the base."
                )
            return None
        head = read_record(path, ExpertsHead)
        adapters = {name: folder / EXPERTS_FOLDER / name for name in head.adapters}
        for file in _paths(head):
            require_file(folder / file, is_read_whole=not file.startswith(EXPERTS_FOLDER))
        sizes = {}
        for name, adapter in adapters.items():
            headers = TensorFolder.open_file(adapter, AdapterShape.FILES[1]).headers.values()
            sizes[name] = sum(prod(header.shape) for header in headers)
        configs = {name: AdapterShape.read(adapter) for name, adapter in adapters.items()}
        return cls(folder, head, configs, sizes)

    @classmethod
    def within(cls, folder: Path | None, *, key: str) -> "ExpertFiles | None":
        """Return the experts of a checkpoint, or None without experts or without a local folder.

        Args:
            folder: the checkpoint folder; None for a hub id.
            key: the key that named the folder.
        """
        if folder is None or not folder.is_dir():
            return None
        try:
            return cls.read(folder)
        except TritterError as error:
            raise refused(key, folder, str(error).rstrip(".")) from error

    def write(self, folder: Path) -> None:
        """Copy the files unchanged to another checkpoint folder."""
        for name in _paths(self.head):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, folder / name)

    def mean_gates(self) -> dict[str, float] | None:
        """Return name → mean gate over all measured domains, or None if none was measured."""
        measured = self.head.usage.values()
        if not measured:
            return None
        share = 1 / len(measured)
        return {n: share * sum(each.get(n, 0.0) for each in measured) for n in self.head.names}


def _paths(head: ExpertsHead) -> Iterator[str]:
    """Yield the paths of the experts' files, relative to their checkpoint folder."""
    for name in head.adapters:
        yield from (f"{EXPERTS_FOLDER}/{name}/{file}" for file in AdapterShape.FILES)
    yield from (ExpertsHead.PATH, ExpertsHead.TENSORS)


def check_names(names: Sequence[str]) -> None:
    """Check that expert names are distinct and valid folder names."""
    if not 1 <= len(names) <= _MAX_EXPERTS:
        allowed = f"a list of 1 to {_MAX_EXPERTS} names"
        raise TritterError(f"names = {brief(names)}; must be {allowed}.")
    for name in names:
        if _NAME.fullmatch(name) is None:
            allowed = "1 to 64 letters, digits, - and _, a letter or digit first"
            raise TritterError(f"names = {brief(name)}; must be {allowed}.")
    if len(set(names)) < len(names):
        raise TritterError(f"names = {brief(names)}: one occurs twice.")

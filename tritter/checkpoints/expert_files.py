"""LoRA experts as files beside a model: `experts/NAME/` for each, `state/experts.*` for the rest.

What can be said of them without opening a tensor stands here, so that a checkpoint is copied,
listed and checked by whatever needs no model. `tritter.methods.experts.stored` makes a mixture of
them.
"""

import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.checkpoints.folder import EXPERTS_FOLDER, read_lineage
from tritter.errors import Problem, RequestError, TritterError, brief, refused, show
from tritter.limits import MAX_COUNT
from tritter.storage.reading import check_links, read_object, require_file
from tritter.storage.records import Count, WholeNumber, read_record, record
from tritter.storage.tensors import TensorFolder

HEAD, TENSORS = "state/experts.json", "state/experts.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE = "base"  # the expert without an adapter, the first where there is one
MAX_EXPERTS = 256
RouterKind = Literal["learned", "evidence", "both"]
_MAX_RANK = 1024
# Keys of PEFT's LoRA config that change neither the function nor how an adapter is read
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_type",
    "peft_version", "r", "lora_alpha", "lora_dropout", "revision", "target_modules", "task_type",
    "ephemeral_gpu_offload", "runtime_config", "eva_config", "corda_config", "loftq_config",
    "lora_ga_config", "qalora_group_size",
    "fan_in_fan_out",  # PEFT goes by the layer: true where its matrix lies transposed
}  # fmt: skip
# The other keys whose default in PEFT is neither null, false nor empty
_DEFAULTS = {"bias": "none", "megatron_core": "megatron.core"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_Positive = Annotated[float, Field(gt=0, le=MAX_COUNT)]
_Share = Annotated[float, Field(ge=0, le=1)]


@record
class EvidenceHead:
    """How evidence routes: the keywords of `tritter.methods.experts.mixture.Evidence`."""

    window: Count
    scale: _Positive
    prior: Annotated[float, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
    end_of_text_id: WholeNumber | None


@record
class ExpertsHead:
    """What `state/experts.json` says.

    Args:
        names: experts in the order of gates, the base first where it is one of them.
        has_base: it is.
        is_shared: one learned router for all layers.
        router: what routes tokens to experts.
        top_k: experts that a token takes; None: all.
        temperature: which logits are divided by.
        capacity_factor: in training; None: no limit.
        evidence: its settings, where evidence routes.
        usage: domain → expert → mean gate on its text, as far as it was measured.
        base_bits: 8 or 4, that bitsandbytes held the base in when they were trained, and in which
            it is run; None: as it is in the folder.
        extra: whatever else a training left, as `tritter.training.checkpoint_io` encodes it.
        tensors_sha256: of the file of tensors next to it.

    Raises:
        TritterError: the values do not fit each other; names one of them.
    """

    FORMAT: ClassVar[str] = "mixture of experts"

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
        if self.has_base and self.names[0] != BASE:
            raise TritterError(f"names = {brief(self.names)}: the first is {BASE}.")
        if (self.evidence is None) != (self.router == "learned"):
            found, allowed = "null", "an object"
            if self.router == "learned":
                found, allowed = allowed, found
            raise TritterError(
                f"evidence = {found}; allowed is {allowed} where router = {self.router}."
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The experts that have an adapter."""
        return self.names[1:] if self.has_base else self.names


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The config of a plain LoRA adapter, ours or stock PEFT's."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read the config of an adapter folder; the one check of all commands.

        Raises:
            TritterError: it can't be read, or asks for more than plain LoRA; names the key.
        """
        path = folder / ADAPTER_FILES[0]
        config = read_object(path)
        if config.get("peft_type") != "LORA":
            found = brief(config.get("peft_type"))
            raise TritterError(f"{path}: peft_type = {found}; allowed is 'LORA'.")
        for key, value in config.items():
            if not is_plain_setting(key, value):
                raise TritterError(
                    f"{path}: {show(key)} = {brief(value)} is not read; plain LoRA is."
                )
        rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
        if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
            raise TritterError(f"{path}: r = {brief(rank)}; must be 1 to {_MAX_RANK}.")
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:  # type: ignore[operator]
            allowed = "must be above 0 and below 1e6"
            raise TritterError(f"{path}: lora_alpha = {brief(alpha)}; {allowed}.")
        names = [targets] if isinstance(targets, str) else targets
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            allowed = "must be a name, or a list of names"
            raise TritterError(f"{path}: target_modules = {brief(targets)}; {allowed}.")
        return cls(rank, float(alpha), tuple(sorted(names)))  # type: ignore[arg-type]


def is_plain_setting(key: str, value: object) -> bool:
    """Return whether an adapter's config with this setting is one of plain LoRA."""
    return key in _HARMLESS or value in (_DEFAULTS.get(key), None, False, {}, [])


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """The experts of a checkpoint folder, as they lie there.

    Args:
        configs: expert that has an adapter → its config.
        num_parameters: expert → parameters of its adapter.
    """

    source: Path
    head: ExpertsHead
    configs: Mapping[str, AdapterConfig]
    num_parameters: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path, *, recorded: Collection[str] | None = None) -> "ExpertFiles | None":
        """Return the experts of a folder, None where there are none; opens no tensor.

        Args:
            recorded: files that the folder's lineage names; None: the lineage was not read yet.

        Raises:
            TritterError: a file is missing, damaged, too large or of a newer format, or a link
                leads out of the folder.
        """
        check_links(folder)
        path = folder / HEAD
        if not path.exists():
            if HEAD in (_recorded(folder) if recorded is None else recorded):
                raise TritterError(f"{path} is missing: the experts in {folder} can't be read.")
            patterns = (*(f"{EXPERTS_FOLDER}/*/{file}" for file in ADAPTER_FILES), TENSORS)
            unlisted = [path for pattern in patterns for path in folder.glob(pattern)]
            if found := sorted(str(path.relative_to(folder)) for path in unlisted):
                raise TritterError(
                    f"{folder} contains {found[0]}, but {HEAD} is missing: its experts can't be "
                    f"read. Restore that file, or remove {TENSORS} and {EXPERTS_FOLDER}/ to use "
                    "the base alone."
                )
            return None
        head = read_record(path, ExpertsHead)
        places = {name: folder / EXPERTS_FOLDER / name for name in head.adapters}
        for file in _paths(head):
            require_file(folder / file, is_read_whole=not file.startswith(EXPERTS_FOLDER))
        sizes = {}
        for name, place in places.items():
            headers = TensorFolder.open_file(place, ADAPTER_FILES[1]).headers.values()
            sizes[name] = sum(prod(header.shape) for header in headers)
        configs = {name: AdapterConfig.read(place) for name, place in places.items()}
        return cls(folder, head, configs, sizes)

    def write(self, folder: Path) -> None:
        """Copy them beside another copy of the model, as they are."""
        for name in _paths(self.head):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / name, folder / name)

    def mean_gates(self) -> dict[str, float] | None:
        """Return name → mean gate over the domains that it was measured on; None of none."""
        measured = self.head.usage.values()
        if not measured:
            return None
        share = 1 / len(measured)
        return {n: share * sum(each.get(n, 0.0) for each in measured) for n in self.head.names}


def _paths(head: ExpertsHead) -> Iterator[str]:
    """Yield the files of experts, relative to their checkpoint folder."""
    for name in head.adapters:
        yield from (f"{EXPERTS_FOLDER}/{name}/{file}" for file in ADAPTER_FILES)
    yield from (HEAD, TENSORS)


def _recorded(folder: Path) -> Collection[str]:
    """Return the files that a folder's lineage names."""
    lineage = read_lineage(folder)
    return () if lineage is None else lineage.file_digests


def experts_in(
    folder: Path | None, *, key: str, recorded: Collection[str] | None = None
) -> ExpertFiles | None:
    """Return the experts of a checkpoint; None where it has none, or is not at hand.

    Args:
        key: that named the folder.
        recorded: as `ExpertFiles.read`.

    Raises:
        RequestError: they are damaged.
    """
    if folder is None or not folder.is_dir():
        return None
    try:
        return ExpertFiles.read(folder, recorded=recorded)
    except TritterError as error:
        raise refused(key, folder, str(error).rstrip(".")) from error


def refuse_experts(
    folder: Path, *, doing: str, key: str = "checkpoint", recorded: Collection[str] | None = None
) -> None:
    """Refuse a checkpoint with experts for what would leave them behind, or break them.

    Args:
        doing: what was asked for, as `an expansion`.
        key: that named the folder.
        recorded: as `ExpertFiles.read`.

    Raises:
        RequestError: it has experts, or they are damaged; says what to do instead.
        TritterError: its lineage is damaged, or of a newer format.
    """
    if recorded is None:
        recorded = _recorded(folder)  # what is wrong with that is no matter of experts
    if (files := experts_in(folder, key=key, recorded=recorded)) is not None:
        reason = (
            f"it holds experts ({', '.join(files.head.names)}), which stand on its base as it is; "
            f"{doing} would leave them behind"
        )
        advice = (
            "merge them into a plain model first: tritter export --checkpoint "
            f"{shlex.quote(str(folder))} --output MERGED --format hf --merge"
        )
        raise RequestError(Problem(key, folder, reason=reason, advice=advice))


def check_names(names: Sequence[str]) -> None:
    """Refuse names of experts that are no names of folders, or that occur twice.

    Raises:
        TritterError: names the first.
    """
    if not 1 <= len(names) <= MAX_EXPERTS:
        allowed = f"a list of 1 to {MAX_EXPERTS} names"
        raise TritterError(f"names = {brief(names)}; allowed is {allowed}.")
    for name in names:
        if _NAME.fullmatch(name) is None:
            allowed = "1 to 64 letters, digits, - and _, a letter or digit first"
            raise TritterError(f"names = {brief(name)}; allowed is {allowed}.")
    if len(set(names)) < len(names):
        raise TritterError(f"names = {brief(names)}: one occurs twice.")

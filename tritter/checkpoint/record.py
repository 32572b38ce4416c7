"""What a checkpoint knows of itself: parents, expansions, cost, scores. Plain, versioned data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tritter.checkpoint.learned import LearnedDomain, TextSplit, learned_from, split_to_plain
from tritter.checkpoint.typed import read_record
from tritter.errors import TritterError, brief

FORMAT_VERSION = 4  # 2: stock_loadable; 3: split and domains; 4: ffn_sizes
StockLoadable = Literal["yes", "after adaptation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionRecord:
    """One expansion, and what the training after it made of it.

    Args:
        timestamp: UTC, ISO 8601.
        expansion_type: depth, width, moe, growth or experts.
        method: the option's name, such as `llama_pro`.
        options: the method's options as given.
        seed: what random fills and choices were drawn from.
        source_config: config.json before.
        target_config: config.json after.
        layer_sources: the source layer of every target layer.
        map_digest: SHA-256 of the parameter map; the map itself follows from the entries above.
        claims_exact: the method claims to preserve the function.
        step0_error: measured max |Δ logits| / std(logits) of the whole expansion, when measured.
        continued_training_steps: optimizer steps taken after it, once gated.
        performance_delta: domain → relative change of the loss per byte, once gated.
    """

    timestamp: str
    expansion_type: str
    method: str
    options: Mapping[str, Any]
    seed: int
    source_config: Mapping[str, Any]
    target_config: Mapping[str, Any]
    layer_sources: tuple[int, ...]
    map_digest: str
    claims_exact: bool
    step0_error: float | None = None
    continued_training_steps: int = 0
    performance_delta: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The content of tritter.json.

    Args:
        model_hash: Merkle hash over the tensors.
        parent_hash: the model hash of the checkpoint that this one was made from.
        parent_path: where the parent lay, relative to this folder; a hint, the hash decides.
        parent_tensor_digests: tensor name → SHA-256 of a parent that keeps no lineage itself.
        parent_file_digests: the same of the files beside its tensors.
        base_model_hash: the model hash at the start of the chain.
        tensor_digests: tensor name → SHA-256.
        file_digests: file name → SHA-256 of everything else in the folder.
        expansion_history: every expansion since the base, oldest first.
        step: optimizer steps of the last training.
        epoch: passes over its new data that the last training completed.
        best_loss: lowest mean loss over the new domains' validation documents, nats per token.
        benchmark_scores: domain or task → score.
        training_config: what the last training was told, with data sources and their hashes.
        split: how texts are held out, the same in all trainings; None before the first one.
        domains: name → every domain that this checkpoint or an ancestor learned, oldest first.
        stock_loadable: `yes`, or `after adaptation` while appended experts are not wholly open:
            until then stock classes load the tensors and compute something else.
        ffn_sizes: width of each layer's FFN where they differ; the files are padded to the widest.
        record_digest: SHA-256 of everything else in the record, filled in when it is written.
    """

    model_hash: str
    base_model_hash: str
    tensor_digests: Mapping[str, str]
    file_digests: Mapping[str, str]
    parent_hash: str | None = None
    parent_path: str | None = None
    parent_tensor_digests: Mapping[str, str] | None = None
    parent_file_digests: Mapping[str, str] | None = None
    expansion_history: tuple[ExpansionRecord, ...] = ()
    step: int = 0
    epoch: int = 0
    best_loss: float | None = None
    benchmark_scores: Mapping[str, float] = field(default_factory=dict)
    training_config: Mapping[str, Any] = field(default_factory=dict)
    split: TextSplit | None = None
    domains: Mapping[str, LearnedDomain] = field(default_factory=dict)
    stock_loadable: StockLoadable = "yes"
    ffn_sizes: tuple[int, ...] = ()
    format_version: int = FORMAT_VERSION
    record_digest: str | None = None

    def to_dict(self) -> dict[str, Any]:
        split = None if self.split is None else split_to_plain(self.split)
        return {**asdict(self), "split": split}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], *, origin: str) -> "Lineage":
        """Rebuild a lineage.

        Raises:
            TritterError: it comes from a newer format, or an entry is missing, unknown, of
                another type or out of range.
        """
        version = plain.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise TritterError(
                f"{origin}: format_version {brief(version)}; this Tritter reads up to "
                f"{FORMAT_VERSION}."
            )
        rest = {name: value for name, value in plain.items() if name not in ("split", "domains")}
        read: Lineage = read_record(cls, rest, origin=origin)
        learned = learned_from(plain, origin=origin)
        return replace(
            read,
            split=learned.split,
            domains=learned.domains,
            format_version=FORMAT_VERSION,
        )


def training_record(training_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of `training`, or of a base's `pretraining`, that a lineage records.

    Empty where it records neither.
    """
    made_from = training_config.get("made_from")
    base = made_from.get("pretraining") if isinstance(made_from, Mapping) else None
    found = training_config.get("training", base)
    return found if isinstance(found, Mapping) else {}

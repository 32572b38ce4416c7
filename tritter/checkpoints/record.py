"""Records in checkpoint and run folders: lineage, training state, ledger. Plain data."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.data.split import SplitRule
from tritter.limits import MAX_LAYERS
from tritter.storage.records import Finite, InnerName, Seed, Sha256, Text, WholeNumber, record

_MOST_ENTRIES = Field(max_length=2**20)
_MOST_LAYERS = Field(max_length=MAX_LAYERS)
_Plain = Annotated[Mapping[str, Any], _MOST_ENTRIES]
_TensorDigests = Annotated[Mapping[str, Sha256], _MOST_ENTRIES]
_FileDigests = Annotated[Mapping[InnerName, Sha256], _MOST_ENTRIES]
_Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]


@record
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

    timestamp: Text
    expansion_type: Text
    method: Text
    options: _Plain
    seed: Seed
    source_config: _Plain
    target_config: _Plain
    layer_sources: Annotated[tuple[_Layer, ...], _MOST_LAYERS]
    map_digest: Sha256
    claims_exact: bool
    step0_error: Finite | None = None
    continued_training_steps: WholeNumber = 0
    performance_delta: Mapping[str, Finite] = field(default_factory=dict)


@record
class LearnedDomain:
    """A domain that a lineage was trained on.

    Args:
        origin: in words.
        num_documents: of all its documents; `num_bytes` and `sha256` likewise.
        paths: where it was; none where that was not recorded.
        text_field: of its records.
    """

    origin: str = ""
    num_documents: int = 0
    num_bytes: int = 0
    sha256: str = ""
    paths: tuple[str, ...] = ()
    text_field: str = "text"


@record
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
    """

    FORMAT: ClassVar[str] = "lineage"

    model_hash: Sha256
    base_model_hash: Sha256
    tensor_digests: _TensorDigests
    file_digests: _FileDigests
    parent_hash: Sha256 | None = None
    parent_path: Text | None = None
    parent_tensor_digests: _TensorDigests | None = None
    parent_file_digests: _FileDigests | None = None
    expansion_history: Annotated[tuple[ExpansionRecord, ...], _MOST_LAYERS] = ()
    step: WholeNumber = 0
    epoch: WholeNumber = 0
    best_loss: Finite | None = None
    benchmark_scores: Mapping[str, Finite] = field(default_factory=dict)
    training_config: _Plain = field(default_factory=dict)
    split: SplitRule | None = None
    domains: Mapping[str, LearnedDomain] = field(default_factory=dict)
    stock_loadable: Literal["yes", "after adaptation"] = "yes"
    ffn_sizes: Annotated[tuple[WholeNumber, ...], _MOST_LAYERS] = ()


@record
class StateRule:
    """How a kind of state follows a map, as a checkpoint states it; see `StateKind`."""

    quantity: Literal[
        "weight", "gradient", "squared_gradient", "path_integral", "penalty", "displacement"
    ]
    new_entries: Literal["zero", "mean", "as_weights"]


@record
class StateHead:
    """The content of `state/state.json`.

    Args:
        step: optimizer steps behind the state.
        kinds: what there is, each in a folder of its name.
        other_steps: name on disk → steps, of parameters that have another number of them.
        rules: how kinds follow a map that are not Tritter's own.
    """

    FORMAT: ClassVar[str] = "training state"

    step: WholeNumber
    kinds: tuple[str, ...]
    other_steps: Mapping[str, WholeNumber] = field(default_factory=dict)
    rules: Mapping[str, StateRule] = field(default_factory=dict)


@record
class StageRecord:
    """A finished stage of a run, as its ledger has it.

    Args:
        found: fields of the stage's own record.
        left: place in the run folder → digest of what the stage left there.
        disk: kind → the most bytes of it in the run folder during the stage.
    """

    found: Mapping[str, Any]
    flops: Mapping[str, float]
    seconds: Mapping[str, float]
    left: Mapping[InnerName, str]
    disk: Mapping[str, int]


@record
class LedgerRecord:
    """The content of `ledger.json` in a run folder.

    Args:
        stages: finished ones, in the order in which they ended.
        removed: places whose weights no later stage needs.
        released: places whose weights can be made again, and may be gone.
    """

    FORMAT: ClassVar[str] = "ledger"

    stages: Mapping[str, StageRecord]
    removed: tuple[InnerName, ...] = ()
    released: tuple[InnerName, ...] = ()


def training_record(training_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of `training`, or of a base's `pretraining`, that a lineage records.

    Empty where it records neither.
    """
    made_from = training_config.get("made_from")
    base = made_from.get("pretraining") if isinstance(made_from, Mapping) else None
    found = training_config.get("training", base)
    return found if isinstance(found, Mapping) else {}

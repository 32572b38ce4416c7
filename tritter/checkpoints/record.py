"""JSON records in checkpoint and run folders: lineage, training state and ledger."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tritter.data.built_in import built_in_path, is_built_in
from tritter.data.documents import PIECE_CHARACTERS, Documents
from tritter.data.split import SplitRule
from tritter.errors import TritterError
from tritter.limits import MAX_LAYERS
from tritter.options import WholeNumber, leaves
from tritter.storage.reading import LINEAGE_NAME, check_links
from tritter.storage.records import (
    Finite,
    InnerName,
    Seed,
    Sha256,
    Text,
    read_record,
    record,
)

_MIN_RANGE, _MOST_PARTS = 4, 32  # of printed layer sources
_MAX_ENTRIES = Field(max_length=2**20)
_MAX_LAYERS = Field(max_length=MAX_LAYERS)
_Plain = Annotated[Mapping[str, Any], _MAX_ENTRIES]
_TensorDigests = Annotated[Mapping[str, Sha256], _MAX_ENTRIES]
_FileDigests = Annotated[Mapping[InnerName, Sha256], _MAX_ENTRIES]
_Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
_LONGEST_WINDOW = 1024  # by default
EXPERTS_FOLDER = "experts"
_EXPERT = re.compile(rf"{EXPERTS_FOLDER}/(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)/adapter_config\.json")
_ADVICE = (
    "To use its weights, export them as a plain Hugging Face folder: tritter export --checkpoint "
    "FOLDER --output NEW --format hf --ignore-lineage"
)


def layers_text(sources: Sequence[int]) -> str:
    """Return the source layer of each layer: 0 1 1 2; four or more in order as 0-3.

    Of a list that is still long, only both ends.
    """
    starts = [at for at, source in enumerate(sources) if not at or source != sources[at - 1] + 1]
    parts = list[str]()
    for first, end in pairwise([*starts, len(sources)]):
        run = [str(source) for source in sources[first:end]]
        parts += run if len(run) < _MIN_RANGE else [f"{run[0]}-{run[-1]}"]
    if len(parts) > _MOST_PARTS:
        half = _MOST_PARTS // 2
        parts[half:-half] = ["…"]
        parts.append(f"({len(sources)} layers)")
    return " ".join(parts)


@record
class ExpansionRecord:
    """One expansion, with the results of the training run after it.

    Args:
        timestamp: UTC, ISO 8601.
        expansion_type: depth, width, moe, growth or experts.
        method: method name, such as `llama_pro`.
        options: options of the method, as requested.
        seed: seed of random initialisation and choices.
        source_config: config.json before the expansion.
        target_config: config.json after the expansion.
        layer_sources: source layer of every target layer.
        map_digest: SHA-256 of the parameter map, which can be rebuilt from the fields above.
        claims_exact: True if the method claims to preserve the function.
        step0_error: max |Δ logits| / std(logits) of the whole expansion, if measured.
        continued_training_steps: optimizer steps after the expansion, set by the gate.
        performance_delta: domain → relative change of the loss per byte, set by the gate.
        discovered: what was found about a model type without a table. Information for people:
            nothing reads it.
    """

    timestamp: Text
    expansion_type: Text
    method: Text
    options: _Plain
    seed: Seed
    source_config: _Plain
    target_config: _Plain
    layer_sources: Annotated[tuple[_Layer, ...], _MAX_LAYERS]
    map_digest: Sha256
    claims_exact: bool
    step0_error: Finite | None = None
    continued_training_steps: WholeNumber = 0
    performance_delta: Mapping[str, Finite] = field(default_factory=dict)
    discovered: _Plain = field(default_factory=dict)


@record
class LearnedDomain:
    """A data domain that a checkpoint was trained on.

    Args:
        origin: description of the data source.
        num_documents: number of documents.
        num_bytes: size of all documents.
        sha256: checksum of all documents.
        paths: recorded paths of the data; empty if unknown.
        text_field: field of the records with the text.
    """

    origin: str = ""
    num_documents: int = 0
    num_bytes: int = 0
    sha256: str = ""
    paths: tuple[str, ...] = ()
    text_field: str = "text"

    def documents(
        self, split: SplitRule | None, *, key: str, is_streamed: bool = False
    ) -> Documents:
        """Read the documents again, cut as the split of the lineage does."""
        from tritter.data.sources import TextRequest

        return TextRequest(
            self.paths,
            key=key,
            text_field=self.text_field,
            is_streamed=is_streamed,
            is_recorded=True,
            piece_characters=PIECE_CHARACTERS if split is None else split.piece_characters,
        ).documents()

    def problem(self, split: SplitRule, *, is_streamed: bool = False) -> str | None:
        """Return the reason why the documents are unavailable or changed, or None."""
        if not self.paths:
            return "its paths were not recorded"
        try:
            if all(map(is_built_in, self.paths)):
                for path in self.paths:
                    built_in_path("data", path)
                return None
            documents = self.documents(split, key="data", is_streamed=is_streamed)
        except TritterError as error:
            return str(error).removesuffix(".")
        is_same = documents.digest(is_exact=False) == self.sha256
        return None if is_same else f"{', '.join(self.paths)} has changed since"


@record
class Lineage:
    """The content of tritter.json.

    Args:
        model_hash: Merkle hash over the tensors.
        base_model_hash: model hash at the start of the chain.
        tensor_digests: tensor name → SHA-256.
        file_digests: file name → SHA-256 of all other files in the folder.
        parent_hash: model hash of the parent checkpoint.
        parent_path: path of the parent relative to this folder. Only a hint: the hash decides.
        parent_tensor_digests: tensor name → SHA-256 for a parent without a lineage.
        parent_file_digests: file name → SHA-256 for a parent without a lineage.
        expansion_history: every expansion since the base, oldest first.
        step: optimizer steps of the last training run.
        epoch: completed epochs of the last training run over its new data.
        best_loss: lowest mean validation loss over the new domains, in nats per token.
        benchmark_scores: domain or task → score.
        training_config: config of the last training run, with data sources and their hashes.
        split: validation split, shared by all training runs; None before the first one.
        domains: name → domain learned by this checkpoint or an ancestor, oldest first.
        stock_loadable: `yes`, or `after adaptation` until appended experts are fully open. Until
            then stock classes load the tensors but compute a different function.
        ffn_sizes: FFN width of each layer if widths differ; the files are padded to the widest.
    """

    FORMAT: ClassVar[str] = "lineage"
    OWN_STAGE: ClassVar[str] = "own stage"  # `stage` in the training config of a stage from outside
    HEADER_MARK: ClassVar[str] = "#header"  # after the name of a file of which only it is hashed

    model_hash: Sha256
    base_model_hash: Sha256
    tensor_digests: _TensorDigests
    file_digests: _FileDigests
    parent_hash: Sha256 | None = None
    parent_path: Text | None = None
    parent_tensor_digests: _TensorDigests | None = None
    parent_file_digests: _FileDigests | None = None
    expansion_history: Annotated[tuple[ExpansionRecord, ...], _MAX_LAYERS] = ()
    step: WholeNumber = 0
    epoch: WholeNumber = 0
    best_loss: Finite | None = None
    benchmark_scores: Mapping[str, Finite] = field(default_factory=dict)
    training_config: _Plain = field(default_factory=dict)
    split: SplitRule | None = None
    domains: Mapping[str, LearnedDomain] = field(default_factory=dict)
    stock_loadable: Literal["yes", "after adaptation"] = "yes"
    ffn_sizes: Annotated[tuple[WholeNumber, ...], _MAX_LAYERS] = ()

    @property
    def file_names(self) -> set[str]:
        """The names of the files with a digest."""
        return {name.removesuffix(self.HEADER_MARK) for name in self.file_digests}

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the adapters among its files."""
        names = map(_EXPERT.fullmatch, self.file_digests)
        return tuple(match["name"] for match in names if match is not None)

    @property
    def training(self) -> Mapping[str, Any]:
        """The section `training` of its config, or a base's `pretraining`; empty without both."""
        made_from = self.training_config.get("made_from")
        base = made_from.get("pretraining") if isinstance(made_from, Mapping) else None
        found = self.training_config.get("training", base)
        return found if isinstance(found, Mapping) else {}

    @property
    def pretraining_tokens(self) -> float | None:
        """The tokens of the training that made the base model; None if they are not recorded."""
        made_from = self.training_config.get("made_from")
        if not isinstance(made_from, Mapping):
            return None
        found = {"trainer.accumulate_grad_batches": 1, **leaves(made_from)}
        keys = ("pretraining.max_steps", "data.batch_size", "data.sequence_length")
        counts = [found.get(key) for key in (*keys, "trainer.accumulate_grad_batches")]
        numbers = [float(count) for count in counts if isinstance(count, int)]
        return math.prod(numbers) if len(numbers) == len(counts) else None

    def with_step0_error(self, error: float | None, *, num_new: int) -> "Lineage":
        """Return the lineage with the measured error of an expansion in its newest records.

        Args:
            error: max |Δ logits| / std(logits); None if it is not finite.
            num_new: number of records that the expansion added.
        """
        old, new = self.expansion_history[:-num_new], self.expansion_history[-num_new:]
        measured = (replace(each, step0_error=error) for each in new)
        return replace(self, expansion_history=(*old, *measured))

    @classmethod
    def read(cls, folder: Path) -> "Lineage | None":
        """Return the lineage of a folder, or None for a plain Hugging Face folder."""
        check_links(folder)
        path = folder / LINEAGE_NAME
        if not path.exists():
            return None
        found = path.stat()
        return _lineage_in(path, (found.st_ino, found.st_mtime_ns, found.st_size))

    @classmethod
    def of(cls, folder: Path) -> "Lineage":
        """Return the lineage of a folder written by Tritter; see `read`."""
        lineage = cls.read(folder)
        assert lineage is not None, f"{folder} has no {LINEAGE_NAME}"
        return lineage


@record
class StateRule:
    """The rule by which an expansion maps a kind of state; see `StateKind`."""

    quantity: Literal[
        "weight", "gradient", "squared_gradient", "path_integral", "penalty", "displacement"
    ]
    new_entries: Literal["zero", "mean", "as_weights"]


@record
class StateHead:
    """The content of `state/state.json`.

    Args:
        step: optimizer steps taken so far.
        kinds: kinds of state, each in a subfolder of the same name.
        other_steps: not used; earlier versions wrote it.
        rules: kind → mapping rule, for kinds not built into Tritter.
    """

    FORMAT: ClassVar[str] = "training state"
    PATH: ClassVar[str] = "state/state.json"

    step: WholeNumber
    kinds: tuple[str, ...]
    other_steps: Mapping[str, WholeNumber] = field(default_factory=dict)
    rules: Mapping[str, StateRule] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "StateHead | None":
        """Return that of a checkpoint, or None if it has no training state."""
        path = folder / cls.PATH
        return read_record(path, cls) if path.exists() else None

    @classmethod
    def kinds_in(cls, folder: Path) -> set[str]:
        """Return the kinds of training state in a checkpoint."""
        head = cls.read(folder)
        return set() if head is None else set(head.kinds)


@record
class StageRecord:
    """A finished stage in a run's ledger.

    Args:
        found: fields of the stage's own record.
        flops: stage name in reports → FLOPs.
        seconds: stage name in reports → wall time in seconds.
        left: path in the run folder → digest of an output of the stage.
        disk: kind → peak disk usage in the run folder during the stage, in bytes.
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
        stages: finished stages, in order of completion.
        removed: paths of checkpoints whose weights no later stage needs.
        released: paths of checkpoints whose weights can be recomputed and may be deleted.
    """

    FORMAT: ClassVar[str] = "ledger"
    FILE_NAME: ClassVar[str] = "ledger.json"

    stages: Mapping[str, StageRecord]
    removed: tuple[InnerName, ...] = ()
    released: tuple[InnerName, ...] = ()


def window_length(lineage: Lineage | None, positions: int | None) -> int:
    """Return the default number of tokens in a window of text.

    Args:
        lineage: of the checkpoint; the windows are those of its last training run.
        positions: that the model supports; None if unknown or unlimited.
    """
    data = lineage.training_config.get("data") if lineage is not None else None
    recorded = data.get("sequence_length") if isinstance(data, Mapping) else None
    preferred = recorded if isinstance(recorded, int) and recorded >= 2 else _LONGEST_WINDOW
    return min(preferred, positions or preferred)


@lru_cache(maxsize=32)
def _lineage_in(path: Path, state: tuple[int, ...]) -> Lineage:
    """Return the lineage in a file, cached until the file changes."""
    # An edited file is read too: `history --verify` lists the changes
    return read_record(path, Lineage, advice=_ADVICE, is_signed=False)

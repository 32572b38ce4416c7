"""A checkpoint folder by the names of the specification (6.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor

from tritter.checkpoint import ExpansionRecord, Source, read_lineage
from tritter.checkpoint.state import LazyTensors
from tritter.families import Config
from tritter.models import read_config
from tritter.storage.hashing import merkle_hash
from tritter.storage.reading import named_path


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveCheckpoint:
    """What a checkpoint holds; tensors are read when they are asked for.

    Args:
        model_state_dict: name on disk → tensor.
        optimizer_state_dict: kind (`exp_avg`, `exp_avg_sq`, and what methods against forgetting
            keep) → name on disk → tensor; None where no state lies beside the model.
        scheduler_state_dict: `last_epoch`, the steps taken, from which the rate follows; None
            where no state lies beside the model.
        base_model_hash: Merkle hash at the start of the chain.
        training_config: what the last training was told; None where there was none.
        best_loss: nats per token; None where none was taken.
        benchmark_scores: domain or task → score, when it was last gated.
    """

    model_state_dict: Mapping[str, Tensor]
    optimizer_state_dict: Mapping[str, Mapping[str, Tensor]] | None
    scheduler_state_dict: Mapping[str, int] | None
    expansion_history: Sequence[ExpansionRecord]
    base_model_hash: str
    model_config: Config
    training_config: Mapping[str, Any] | None
    step: int
    epoch: int
    best_loss: float | None
    benchmark_scores: Mapping[str, float]

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "ProgressiveCheckpoint":
        """Open a checkpoint folder; a plain one of Hugging Face begins a chain.

        Raises:
            TritterError: it is damaged, or of a newer format.
        """
        place = named_path(folder, key="folder")
        config, lineage = read_config(place), read_lineage(place)
        source = Source(place, config, lineage)
        state = source.state
        if lineage is None:
            source.check()
            base_hash = merkle_hash(source.read_digests())
        else:
            base_hash = lineage.base_model_hash
        kinds = None if state is None else {k: LazyTensors(v) for k, v in state.kinds.items()}
        return cls(
            model_state_dict=LazyTensors(source.tensors),
            optimizer_state_dict=kinds,
            scheduler_state_dict=None if state is None else {"last_epoch": state.step},
            expansion_history=lineage.expansion_history if lineage else (),
            base_model_hash=base_hash,
            model_config=config,
            training_config=(lineage.training_config or None) if lineage else None,
            step=lineage.step if lineage else 0,
            epoch=lineage.epoch if lineage else 0,
            best_loss=lineage.best_loss if lineage else None,
            benchmark_scores=lineage.benchmark_scores if lineage else {},
        )

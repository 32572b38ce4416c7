"""Training sequences that lie beside a model for trainings to come: `state/replay.safetensors`.

Left where `forgetting.replay.keep` asks for it, a uniform sample of each domain's training text.
They stand for the text of a domain that a later training has no more. The file is that of a
`ReplayBuffer`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.checkpoint.state import STATE_FOLDER
from tritter.data.batches import read_sequences
from tritter.data.packing import Packing
from tritter.data.replay import ReplayBuffer
from tritter.errors import Problem, TritterError

if TYPE_CHECKING:
    from torch import Tensor

KEPT_FILE = "replay.safetensors"
_OF_DOCUMENTS = "of_documents/"  # before a domain's name


@dataclass(frozen=True, slots=True, eq=False)
class KeptSequences:
    """What is kept of each domain; where nothing is, nothing is written.

    Args:
        sequences: domain → int32 [N, T].
        losses: domain → float32 [N], mean nats per token under the model that was trained on it;
            absent of what was not measured yet.
        num_seen: domain → sequences that they were drawn from.
        of_documents: domains that were packed as whole documents, with padding.
    """

    sequences: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    num_seen: Mapping[str, int] = field(default_factory=dict)
    of_documents: frozenset[str] = frozenset()

    def write(self, folder: Path) -> None:
        """Write it beside a model; meant for a checkpoint folder that is still being made."""
        import torch

        if not self.sequences:
            return
        sizes = {name: len(each) for name, each in self.sequences.items()}
        buffer = ReplayBuffer.of_reservoirs(sizes, seed=0)
        for name, each in self.sequences.items():
            buffer.add(each, self.losses[name], domain=name)
            buffer.reservoirs[name].num_seen = self.num_seen[name]
        marks = {f"{_OF_DOCUMENTS}{name}": torch.tensor([1]) for name in self.of_documents}
        buffer.save(folder / STATE_FOLDER / KEPT_FILE, beside=marks)

    @classmethod
    def read(cls, folder: Path) -> KeptSequences:
        """Return what lies beside a model.

        Raises:
            TritterError: the file is damaged, or too large.
        """
        path = folder / STATE_FOLDER / KEPT_FILE
        if not path.exists():
            return cls()
        held = ReplayBuffer.load(path, seed=0).reservoirs
        marked = (key for key in read_sequences(path) if key.startswith(_OF_DOCUMENTS))
        for name, each in held.items():
            if not each.sequences.numel() or int(each.sequences.min()) < 0:
                raise TritterError(f"{path} is damaged: {name} has no sequence, or no tokens.")
        return cls(
            {name: each.sequences for name, each in held.items()},
            {name: each.losses for name, each in held.items()},
            {name: each.num_seen for name, each in held.items()},
            frozenset(key.removeprefix(_OF_DOCUMENTS) for key in marked),
        )

    def without(self, names: Collection[str]) -> KeptSequences:
        """Return the same without some domains."""
        left = [name for name in self.sequences if name not in names]
        return KeptSequences(
            {name: self.sequences[name] for name in left},
            {name: self.losses[name] for name in left if name in self.losses},
            {name: self.num_seen[name] for name in left},
            self.of_documents.intersection(left),
        )

    def misfits(
        self, *, sequence_length: int, packing: Packing, vocab_size: int | None = None
    ) -> Iterator[Problem]:
        """Yield what keeps a training from taking them.

        Args:
            sequence_length: tokens of its sequences.
            packing: of its sequences. What was one stream may be read as documents, not the other
                way round: padding would be learned.
            vocab_size: of its model.
        """
        key = "data.sequence_length"
        for name, each in self.sequences.items():
            kept = f"the sequences of {name} that lie beside the checkpoint"
            if each.shape[1] != sequence_length:
                reason = f"{kept} have {each.shape[1]} tokens; allowed is that"
                yield Problem(key, sequence_length, reason=reason)
            if vocab_size is not None and int(each.max()) >= vocab_size:
                reason = f"{kept} have tokens that the model does not know"
                yield Problem(key, sequence_length, reason=reason)
            if packing == "stream" and name in self.of_documents:
                reason = f"{kept} are documents, and padding; allowed is documents"
                yield Problem("data.packing", packing, reason=reason)

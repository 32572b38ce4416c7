"""The `state/` folder of a checkpoint: training state by kind and parameter.

Each kind (`fisher`, `anchor`, …) has a subfolder of safetensors with the tensor names of the
model files. `state.json` contains the step. A parameter that is missing from a kind has no state
yet. For a kind that is not built into Tritter, `state.json` also records the mapping rule, so any
command can expand it without the code that registered it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tritter.checkpoints.record import StateHead, StateRule
from tritter.core.parameter_map import Quantity
from tritter.core.parameter_map.carry import BUILT_IN_KINDS, STATE_KINDS, StateKind, is_kind_name
from tritter.data.batches import read_sequences
from tritter.data.chat import ids_of
from tritter.data.packing import Packing
from tritter.data.replay import ReplayBuffer
from tritter.errors import Problem, TritterError, brief
from tritter.storage.records import record_text
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorStream

if TYPE_CHECKING:
    from torch import Tensor

_OF_DOCUMENTS = "of_documents/"  # prefix of a domain's name


@dataclass(frozen=True, slots=True)
class State:
    """State on disk, read lazily.

    Args:
        step: optimizer steps taken so far.
        kinds: kind → its tensors.
        rules: kind → mapping rule.
    """

    FOLDER: ClassVar[str] = "state"

    step: int
    kinds: Mapping[str, TensorFolder]
    rules: Mapping[str, StateKind] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Copy the state unchanged to another checkpoint folder, tensor by tensor."""
        streams = {}
        for kind, tensors in self.kinds.items():
            streams[kind] = TensorStream(tuple(tensors.headers.values()), iter(tensors.items()))
        write_state(folder, streams, step=self.step, rules=self.rules)

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """Return the training state of a checkpoint, or None if it has none."""
        path, head = folder / StateHead.PATH, StateHead.read(folder)
        if head is None:
            return None
        rules = {}
        for kind in head.kinds:  # the registered rule, or else the rule in the file
            registered, stated = STATE_KINDS.get(kind), head.rules.get(kind)
            if stated is not None:
                rule = StateKind(Quantity(stated.quantity), stated.new_entries)
            elif registered is not None:
                rule = registered
            if not is_kind_name(kind) or (registered is None and stated is None):
                raise TritterError(
                    f"{path} names an unknown kind of state without a mapping rule: {brief(kind)}."
                )
            if registered not in (None, rule):
                raise TritterError(f"{path}: the rule of {kind} differs from the registered one.")
            rules[kind] = rule
        opened = {kind: TensorFolder.open(folder / State.FOLDER / kind) for kind in head.kinds}
        return cls(head.step, opened, rules)


def write_state(
    folder: Path,
    kinds: Mapping[str, TensorStream],
    *,
    step: int,
    rules: Mapping[str, StateKind] = STATE_KINDS,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `folder/state` in a checkpoint folder that is still being created.

    Args:
        folder: the checkpoint folder.
        kinds: kind → its tensors.
        step: optimizer steps taken so far.
        rules: mapping rules of the kinds, including kinds that are not registered.
        max_shard_bytes: maximum size of a safetensors file.
    """
    state_folder = folder / State.FOLDER
    state_folder.mkdir()
    written = []
    for kind, stream in kinds.items():
        assert kind in rules, kind
        if stream.entries:
            (state_folder / kind).mkdir()
            stream.write(state_folder / kind, max_shard_bytes=max_shard_bytes)
            written.append(kind)
    head = StateHead(
        step=step,
        kinds=tuple(written),
        rules={
            kind: StateRule(
                quantity=rules[kind].quantity.value, new_entries=rules[kind].new_entries
            )
            for kind in written
            if kind not in BUILT_IN_KINDS
        },
    )
    (folder / StateHead.PATH).write_text(record_text(head), encoding="utf-8")


# Training sequences for later training runs: `state/replay.safetensors`. With
# `forgetting.replay.keep` a checkpoint contains a uniform sample of each domain's training data,
# for runs that no longer have that data. The file format is that of `ReplayBuffer`.


@dataclass(frozen=True, slots=True, eq=False)
class KeptSequences:
    """Training sequences stored in a checkpoint. Without any, no file is written.

    Args:
        sequences: domain → int32 [N, T].
        losses: domain → float32 [N], mean nats per token under the model that was trained on them;
            missing if not measured yet.
        num_seen: domain → number of sequences that the sample was drawn from.
        of_documents: domains packed as whole documents, with padding.
    """

    FILE_NAME: ClassVar[str] = "replay.safetensors"

    sequences: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    num_seen: Mapping[str, int] = field(default_factory=dict)
    of_documents: frozenset[str] = frozenset()

    def write(self, folder: Path) -> None:
        """Write the sequences into a checkpoint folder that is still being created."""
        import torch

        if not self.sequences:
            return
        sizes = {name: len(each) for name, each in self.sequences.items()}
        buffer = ReplayBuffer.of_reservoirs(sizes, seed=0)
        for name, each in self.sequences.items():
            buffer.add(each, self.losses[name], domain=name)
            buffer.reservoirs[name].num_seen = self.num_seen[name]
        marks = {f"{_OF_DOCUMENTS}{name}": torch.tensor([1]) for name in self.of_documents}
        buffer.save(folder / State.FOLDER / KeptSequences.FILE_NAME, extra=marks)

    @classmethod
    def read(cls, folder: Path) -> KeptSequences:
        """Return the sequences stored in a checkpoint."""
        path = folder / State.FOLDER / KeptSequences.FILE_NAME
        if not path.exists():
            return cls()
        reservoirs = ReplayBuffer.load(path, seed=0).reservoirs
        marked = (key for key in read_sequences(path) if key.startswith(_OF_DOCUMENTS))
        for name, each in reservoirs.items():
            if not each.sequences.numel() or int(each.sequences.min()) < 0:
                raise TritterError(f"{path} is damaged: {name} has no valid sequences.")
        return cls(
            {name: each.sequences for name, each in reservoirs.items()},
            {name: each.losses for name, each in reservoirs.items()},
            {name: each.num_seen for name, each in reservoirs.items()},
            frozenset(key.removeprefix(_OF_DOCUMENTS) for key in marked),
        )

    def without(self, names: Collection[str]) -> KeptSequences:
        """Return a copy without some domains."""
        others = [name for name in self.sequences if name not in names]
        return KeptSequences(
            {name: self.sequences[name] for name in others},
            {name: self.losses[name] for name in others if name in self.losses},
            {name: self.num_seen[name] for name in others},
            self.of_documents.intersection(others),
        )

    def mapped(self, change: Callable[[Tensor, bool], Tensor]) -> KeptSequences:
        """Return a copy with changed sequences; each has the mean loss of its domain.

        Args:
            change: returns sequences [M, T] for sequences [N, T], and whether they are documents.
        """
        sequences = {n: change(each, n in self.of_documents) for n, each in self.sequences.items()}
        seen = {n: max(len(each), self.num_seen[n]) for n, each in sequences.items()}
        if all(each is self.sequences[name] for name, each in sequences.items()):
            return self
        losses = {n: self.losses[n].mean().repeat(len(sequences[n])) for n in self.losses}
        return replace(self, sequences=sequences, losses=losses, num_seen=seen)

    def problems(
        self, *, sequence_length: int, packing: Packing | None, vocab_size: int | None = None
    ) -> Iterator[Problem]:
        """Yield the reasons why a training run can't use the sequences.

        Args:
            sequence_length: sequence length of the run.
            packing: packing of the run; None if the data decides. Streamed sequences may be used
                as documents, but not the reverse, since the model would learn padding.
            vocab_size: vocabulary size of the run's model.
        """
        key = "data.sequence_length"
        for name, each in self.sequences.items():
            kept = f"the sequences of {name} in the checkpoint"
            if each.shape[1] != sequence_length:
                reason = f"{kept} have {each.shape[1]} tokens; must be that length"
                yield Problem(key, sequence_length, reason=reason)
            if vocab_size is not None and int(ids_of(each).max()) >= vocab_size:
                reason = f"{kept} contain token ids outside the model's vocabulary"
                yield Problem(key, sequence_length, reason=reason)
            if packing == "stream" and name in self.of_documents:
                reason = f"{kept} are padded documents; must be documents"
                yield Problem("data.packing", packing, reason=reason)

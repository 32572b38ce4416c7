"""The `state/` folder of a checkpoint: what a training can go on from, by kind and parameter.

One subfolder of safetensors for each kind (`exp_avg`, `fisher`, …), tensors named as on disk, and
`state.json` with the step. A parameter that is absent from a kind has no state yet. A kind that is
not Tritter's own states its rule there, so that it follows an expansion by any command, whoever
left it: what registered it isn't asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.checkpoints.record import StateHead, StateRule
from tritter.core.parameter_map import Quantity
from tritter.core.parameter_map.carry import BUILT_IN_KINDS, STATE_KINDS, StateKind, is_kind_name
from tritter.data.batches import read_sequences
from tritter.data.packing import Packing
from tritter.data.replay import ReplayBuffer
from tritter.errors import Problem, TritterError, brief
from tritter.storage.records import read_record, record_text
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorEntry, TensorStream, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

STATE_FOLDER = "state"
_HEAD = "state.json"
KEPT_FILE = "replay.safetensors"
_OF_DOCUMENTS = "of_documents/"  # before a domain's name


@dataclass(frozen=True, slots=True)
class State:
    """State on disk, read lazily.

    Args:
        step: optimizer steps behind it.
        kinds: kind → its tensors.
        other_steps: name on disk → steps, of parameters that have another number of them behind
            them: an optimizer counts for each parameter, and what is new begins later.
        rules: kind → how it follows a map.
    """

    step: int
    kinds: Mapping[str, TensorFolder]
    other_steps: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[str, StateKind] = field(default_factory=dict)

    def step_of(self, name: str) -> int:
        """Return the optimizer steps behind one parameter, by name on disk."""
        return self.other_steps.get(name, self.step)

    def write(self, folder: Path) -> None:
        """Write it beside another model as it is, tensor by tensor."""
        copy_states([self], folder)


def write_state(
    folder: Path,
    kinds: Mapping[str, TensorStream],
    *,
    step: int,
    other_steps: Mapping[str, int] | None = None,
    rules: Mapping[str, StateKind] = STATE_KINDS,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `folder/state`; meant for a checkpoint folder that is still being made.

    Args:
        rules: of kinds that nobody need have registered: those of the state that this stems from.
    """
    place = folder / STATE_FOLDER
    place.mkdir()
    written = []
    for kind, stream in kinds.items():
        assert kind in rules, kind
        if stream.entries:
            (place / kind).mkdir()
            write_tensors(place / kind, stream, max_shard_bytes=max_shard_bytes)
            written.append(kind)
    head = StateHead(
        step=step,
        kinds=tuple(written),
        other_steps=dict(other_steps or {}),
        rules={
            kind: StateRule(
                quantity=rules[kind].quantity.value, new_entries=rules[kind].new_entries
            )
            for kind in written
            if kind not in BUILT_IN_KINDS
        },
    )
    (place / _HEAD).write_text(record_text(head), encoding="utf-8")


def read_state(folder: Path) -> State | None:
    """Return the state beside a model, or None where there is none.

    Raises:
        TritterError: it is damaged, or of another format.
    """
    path = folder / STATE_FOLDER / _HEAD
    if not path.exists():
        return None
    head = read_record(path, StateHead)
    rules = {}
    for kind in head.kinds:  # which follow a map as registered, or else as the file states
        registered, stated = STATE_KINDS.get(kind), head.rules.get(kind)
        if stated is not None:
            rule = StateKind(Quantity(stated.quantity), stated.new_entries)
        elif registered is not None:
            rule = registered
        if not is_kind_name(kind) or (registered is None and stated is None):
            raise TritterError(
                f"{path} names a kind that is not known, and states no rule for it: {brief(kind)}."
            )
        if registered not in (None, rule):
            raise TritterError(
                f"{path}: the rule of {kind} is another than the one registered for it."
            )
        rules[kind] = rule
    opened = {kind: TensorFolder.open(folder / STATE_FOLDER / kind) for kind in head.kinds}
    return State(head.step, opened, head.other_steps, rules)


def copy_states(
    states: Sequence[State],
    folder: Path,
    *,
    is_kept: Callable[[str, str], bool] = lambda kind, name: True,
) -> None:
    """Write states beside a model as one, tensor by tensor; steps are those of the last. Of no
    state nothing is written.

    Args:
        is_kept: says of a kind and a name on disk whether it goes along.
    """
    if not states:
        return
    kinds = {}
    for state in states:
        for kind, tensors in state.kinds.items():
            names = [name for name in tensors.files if is_kept(kind, name)]
            entries = tuple(
                TensorEntry(name, tensors.torch_dtype(name), tensors.shape(name)) for name in names
            )
            kinds[kind] = TensorStream(entries, zip(names, map(tensors.get, names), strict=True))
    last, rules = states[-1], {k: rule for state in states for k, rule in state.rules.items()}
    write_state(folder, kinds, step=last.step, other_steps=last.other_steps, rules=rules)


@dataclass(frozen=True, slots=True)
class LazyTensors(Mapping[str, "Tensor"]):
    """The tensors of one kind by name on disk, each read whenever it is asked for."""

    folder: TensorFolder

    def __getitem__(self, name: str) -> Tensor:
        return self.folder.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self.folder.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.folder.headers)

    def __len__(self) -> int:
        return len(self.folder.headers)


# Training sequences next to a model for later training runs: `state/replay.safetensors`. Written
# where `forgetting.replay.keep` asks for it, a uniform sample of each domain's training text, for
# runs that no longer have the text of a domain. The file is that of a `ReplayBuffer`.


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
        buffer.save(folder / STATE_FOLDER / KEPT_FILE, extra=marks)

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

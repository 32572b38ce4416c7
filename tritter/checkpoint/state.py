"""The `state/` folder of a checkpoint: what a training can go on from, by kind and parameter.

One subfolder of safetensors for each kind (`exp_avg`, `fisher`, …), tensors named as on disk, and
`state.json` with the step. A parameter that is absent from a kind has no state yet. A kind that is
not Tritter's own states its rule there, so that it follows an expansion by any command, whoever
left it: what registered it isn't asked for.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tritter.errors import TritterError, brief
from tritter.limits import MAX_COUNT
from tritter.parameter_map import Quantity
from tritter.parameter_map.carry import OURS, STATE_KINDS, StateKind, is_kind_name
from tritter.storage.reading import read_object
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorEntry, TensorStream, write_tensors

FORMAT_VERSION = 2  # written where parameters differ in their steps; else 1, which is the same
STATE_FOLDER = "state"
_HEAD = "state.json"


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
    head: dict[str, Any] = {"format_version": 1, "step": step, "kinds": written}
    if stated := {kind: rules[kind].to_dict() for kind in written if kind not in OURS}:
        head["rules"] = stated
    if other_steps:
        head |= {"format_version": FORMAT_VERSION, "other_steps": dict(other_steps)}
    (place / _HEAD).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path) -> State | None:
    """Return the state beside a model, or None where there is none.

    Raises:
        TritterError: it is damaged, or of a newer format.
    """
    path = folder / STATE_FOLDER / _HEAD
    if not path.exists():
        return None
    try:
        head = read_object(path)
        version, step, kinds = head["format_version"], head["step"], head["kinds"]
        others, rules = head.get("other_steps", {}), head.get("rules", {})
    except TritterError as error:
        raise TritterError(f"{path} is damaged: {error}") from error
    except KeyError as error:
        raise TritterError(f"{path} is damaged ({error!r}).") from error
    if version not in (1, FORMAT_VERSION):
        raise TritterError(
            f"{path}: format_version {brief(version)}; this Tritter reads 1 and {FORMAT_VERSION}."
        )
    if not isinstance(others, dict):
        raise TritterError(f"{path} is damaged: other_steps = {brief(others)}; allowed is a table.")
    for steps in (step, *others.values()):
        if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= MAX_COUNT:
            raise TritterError(
                f"{path} is damaged: step = {brief(steps)}; allowed is a whole number from 0 to "
                f"{MAX_COUNT}."
            )
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise TritterError(f"{path} is damaged: kinds = {brief(kinds)}; allowed are names.")
    if not isinstance(rules, dict):
        raise TritterError(f"{path} is damaged: rules = {brief(rules)}; allowed is a table.")
    known = {kind: _rule(path, kind, rules.get(kind)) for kind in kinds}
    opened = {kind: TensorFolder.open(folder / STATE_FOLDER / kind) for kind in kinds}
    return State(step, opened, others, known)


def _rule(path: Path, kind: str, stated: object) -> StateKind:
    """Return how a kind of state follows a map: as registered, or else as the file states."""
    registered = STATE_KINDS.get(kind)
    if not is_kind_name(kind) or stated is None:
        if registered is None:
            raise TritterError(
                f"{path} names a kind that is not known, and states no rule for it: {brief(kind)}."
            )
        return registered
    try:
        rule = StateKind.from_dict(stated)
    except (LookupError, TypeError, ValueError) as error:
        allowed = ", ".join(quantity.value for quantity in Quantity)
        raise TritterError(
            f"{path} is damaged: the rule of {brief(kind)} is {brief(stated)}; allowed are "
            f"quantity ({allowed}) and new_entries (zero, mean, as_weights)."
        ) from error
    if registered not in (None, rule):
        raise TritterError(f"{path}: the rule of {kind} is another than the one registered for it.")
    return rule


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
            kinds[kind] = _stream(tensors, [name for name in tensors.files if is_kept(kind, name)])
    last, rules = states[-1], {k: rule for state in states for k, rule in state.rules.items()}
    write_state(folder, kinds, step=last.step, other_steps=last.other_steps, rules=rules)


def _stream(tensors: TensorFolder, names: Sequence[str]) -> TensorStream:
    entries = tuple(
        TensorEntry(name, tensors.torch_dtype(name), tensors.shape(name)) for name in names
    )
    return TensorStream(entries, ((name, tensors.get(name)) for name in names))


@dataclass(frozen=True, slots=True)
class LazyTensors(Mapping[str, Tensor]):
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

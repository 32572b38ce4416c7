"""What lives beside the weights (moments, importances, anchors), as it follows an expansion."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tritter.checkpoint.state import State, write_state
from tritter.expand.planned import PlannedExpansion
from tritter.families import family_of
from tritter.parameter_map.carry import Policy, StateKind, followed, has_state
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorEntry, TensorStream


def state_stream(
    plan: PlannedExpansion, rule: StateKind, tensors: TensorFolder, *, moments: Policy = "carry"
) -> TensorStream:
    """Return one kind of state of the expanded model, by name on disk; absent what starts anew."""
    source_family, family = family_of(plan.config), family_of(plan.target_config)
    disk_names = {t.name: t.disk_name for t in source_family.logical_tensors(plan.config)}
    held = {name: on_disk for name, on_disk in disk_names.items() if on_disk in tensors.headers}
    maps = plan.parameter_map.tensors
    targets = [
        t
        for t in family.logical_tensors(plan.target_config)
        if has_state(maps[t.name], rule, held.__contains__, policy=moments)
    ]
    entries = tuple(
        TensorEntry(
            t.disk_name,
            tensors.torch_dtype(held[maps[t.name].origin or ""]),
            family.shape(t, plan.target_config),
        )
        for t in targets
    )

    def read(name: str) -> Tensor:
        return tensors.get(held[name])

    values = ((t.disk_name, followed(maps[t.name], rule, read, policy=moments)) for t in targets)
    return TensorStream(entries, values)


def state_streams(
    plan: PlannedExpansion, state: State, *, moments: Policy = "carry"
) -> dict[str, TensorStream]:
    """Return all kinds of a state, of the expanded model."""
    return {
        kind: state_stream(plan, state.rules[kind], held, moments=moments)
        for kind, held in state.kinds.items()
    }


@dataclass(frozen=True, slots=True)
class MappedState:
    """State that follows an expansion, tensor by tensor."""

    plan: PlannedExpansion
    state: State
    moments: Policy
    max_shard_bytes: int

    def write(self, folder: Path) -> None:
        state = self.state
        write_state(
            folder,
            state_streams(self.plan, state, moments=self.moments),
            step=state.step,
            other_steps=_carried_steps(self.plan, state),
            rules=state.rules,
            max_shard_bytes=self.max_shard_bytes,
        )


def _carried_steps(plan: PlannedExpansion, state: State) -> dict[str, int]:
    """Return the steps of parameters that are not those of most, by name on disk."""
    names = {t.name: t.disk_name for t in family_of(plan.config).logical_tensors(plan.config)}
    targets = family_of(plan.target_config).logical_tensors(plan.target_config)
    maps = plan.parameter_map.tensors
    origins = {t.disk_name: names.get(maps[t.name].origin or "", "") for t in targets}
    return {n: state.other_steps[o] for n, o in origins.items() if o in state.other_steps}

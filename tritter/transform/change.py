"""The change of a model's parameters, by their names in memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, reduce

import torch
from torch import Tensor

from tritter.checkpoints import ExpansionRecord
from tritter.core.expansions import (
    BoundVocab,
    ExpansionSpec,
    MoeAdd,
    ResolvedExpansion,
    build_steps,
)
from tritter.core.families import LogicalTensor, Model, StoredTensor, pack_all, unpack_all
from tritter.core.families.layout import Part
from tritter.core.parameter_map import ParameterMap, TensorMap
from tritter.core.parameter_map.carry import STATE_KINDS, Policy, StateKind
from tritter.core.stock_routers import AddedExperts
from tritter.errors import Problem, RequestError
from tritter.storage.tensors import TensorFolder, TensorHeader
from tritter.storage.writer import TensorStream

_Tensors = Mapping[str, Tensor]


def declared(name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Return a parameter that no family defines, such as a LoRA factor, under its own name."""
    return StoredTensor(name, shape, (Part(LogicalTensor(kind=name, disk_name=name, axes=())),))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """A parameter map over the names of a live model's parameters.

    Args:
        model: the changed model; None if the parameters belong to no family.
        before: parameters that the change reads or removes.
        after: parameters of the changed model, in forward order.
        tensors: logical tensor of the changed model → its map from the tensors before.
    """

    model: Model | None
    before: tuple[StoredTensor, ...]
    after: tuple[StoredTensor, ...]
    tensors: Mapping[str, TensorMap]

    @classmethod
    def of(cls, parameter_map: ParameterMap, source: Model, target: Model) -> "Change":
        """Return the change that a map applies to a model of the shapes of `source`."""
        before, after = (model.layout("live") for model in (source, target))
        return cls(model=target, before=before, after=after, tensors=parameter_map.tensors)

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the removed parameters."""
        names = {stored.name for stored in self.after}
        return tuple(stored.name for stored in self.before if stored.name not in names)

    def digest(self) -> str:
        """Return the SHA-256 of maps, fills and seeds, as for a parameter map."""
        return ParameterMap(self.tensors, ()).digest()

    @property
    def altered(self) -> tuple[StoredTensor, ...]:
        """The parameters whose weights, state or name change."""
        origins = {
            stored.name: tuple(part.tensor.name for part in stored.parts) for stored in self.before
        }
        altered = []
        for stored in self.after:
            maps = [self.tensors[part.tensor.name] for part in stored.parts]
            is_kept = all(m.is_verbatim and m.state == "carry" and not m.is_copy for m in maps)
            if not is_kept or origins.get(stored.name, ()) != tuple(m.origin or "" for m in maps):
                altered.append(stored)
        return tuple(altered)

    @property
    def stems(self) -> dict[str, str]:
        """Parameter of the changed model → the parameter that it derives from."""
        owners = {part.tensor.name: s.name for s in self.before for part in s.parts}
        origins = {s.name: self.tensors[s.parts[0].tensor.name].origin for s in self.after}
        return {name: owners[origin] for name, origin in origins.items() if origin is not None}

    def weights(self, old: _Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of each altered parameter.

        Args:
            old: all parameters before the change.
        """
        by_name, example = unpack_all(self.before, old), next(iter(old.values()))
        for stored in self.altered:
            maps = [self.tensors[part.tensor.name] for part in stored.parts]
            stems = [by_name[m.origin].dtype for m in maps if m.origin is not None]
            dtype = reduce(torch.promote_types, stems) if stems else example.dtype
            values = {
                part.tensor.name: tensor_map.rounded_weight(by_name.__getitem__, dtype)
                for part, tensor_map in zip(stored.parts, maps, strict=True)
            }
            is_shared = stored.is_whole and maps[0].is_verbatim  # else both models train it
            yield stored.name, stored.pack(values.__getitem__).to(example.device, copy=is_shared)

    def masks(self) -> dict[str, Tensor]:
        """Return parameter → bool mask of the entries that derive from old weights."""
        by_name = unpack_all(self.before, {s.name: torch.full(s.shape, True) for s in self.before})
        return pack_all(
            self.after,
            {name: m.carried_mask(by_name.__getitem__) for name, m in self.tensors.items()},
        )

    def new_units(self) -> dict[str, tuple[Tensor | None, ...]]:
        """Return parameter → mask of new entries along each dimension, bool [size], if it grew.

        A mask is None for a dimension without new entries. Tensors that several experts share and
        entirely new parameters are omitted.
        """
        grown = {}
        for stored in self.after:
            if stored.is_of_experts:
                continue
            maps = [self.tensors[part.tensor.name] for part in stored.parts]
            output = maps[0].new_coordinates(0)
            if len(maps) > 1:  # the concatenated outputs of its parts
                size = stored.shape[-1 if stored.is_transposed else 0]
                whole = torch.zeros(size, dtype=torch.bool)
                for part, tensor_map in zip(stored.parts, maps, strict=True):
                    if (own := tensor_map.new_coordinates(0)) is not None:
                        whole[part.index[-1]] = own
                output = whole if bool(whole.any()) else None
            others = (maps[0].new_coordinates(dim) for dim in range(1, len(stored.shape)))
            flags = (output, *others)
            if any(each is not None for each in flags):
                grown[stored.name] = flags[::-1] if stored.is_transposed else flags
        return grown

    def state(self, kind: str, old: _Tensors, *, policy: Policy = "carry") -> dict[str, Tensor]:
        """Return one kind of state of the changed model, by the rule of that kind.

        A parameter is absent if none of its parts has state; parts without state are zero.
        Parameters that the change does not name keep their state.

        Args:
            kind: a key of `STATE_KINDS`.
            old: parameter → its state before the change.
            policy: of Adam's moments.
        """
        by_name, rule = unpack_all(self.before, old), STATE_KINDS[kind]
        named = {stored.name for stored in (*self.before, *self.after)}
        others = {name: value for name, value in old.items() if name not in named}
        return others | pack_all(
            self.after,
            {
                name: rule.mapped(tensor_map, by_name.__getitem__, policy=policy)
                for name, tensor_map in self.tensors.items()
                if rule.has_state(tensor_map, by_name.__contains__, policy=policy)
            },
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedExpansion:
    """The plan of an expansion.

    Args:
        source: the model to expand.
        steps: the expansions in order, with their maps; an empty tuple changes nothing.
        seed: of random fills and choices.
        added_experts: new experts of the result that the router does not fully use yet, if any.
        is_confirmed: transformers checked the configs; else that of `source` lacks its defaults.
    """

    source: Model
    steps: tuple[ResolvedExpansion, ...]
    seed: int
    added_experts: AddedExperts | None = None
    is_confirmed: bool = False

    @classmethod
    def of(
        cls,
        source: Model,
        specs: Sequence[ExpansionSpec],
        *,
        seed: int,
        added: AddedExperts | None = None,
    ) -> "PlannedExpansion":
        """Resolve expansions against a model.

        Args:
            source: the model.
            specs: the expansions in order, checked.
            seed: of random fills and choices.
            added: new experts of the model that its router does not fully use yet, if any.
        """
        steps = build_steps(source, specs, seed=seed)
        added = _added_experts(added, steps)
        return cls(source=source, steps=steps, seed=seed, added_experts=added)

    @cached_property
    def parameter_map(self) -> ParameterMap:
        """The composed map of all steps; the identity without steps."""
        if self.steps:
            return reduce(ParameterMap.then, (step.parameter_map for step in self.steps))
        names, layers = (tensor.name for tensor in self.source.tensors), self.source.sizes
        return ParameterMap.identity(names, num_layers=layers.num_hidden_layers)

    @property
    def records(self) -> tuple[ExpansionRecord, ...]:
        """The lineage's records of the expansions in order, with the time of now."""
        return tuple(
            ExpansionRecord(
                timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
                expansion_type=step.spec.expansion_type,
                method=step.spec.name,
                options=step.options,
                seed=self.seed + position,
                source_config=step.source.config,
                target_config=step.target.config,
                layer_sources=step.parameter_map.layer_sources,
                map_digest=step.parameter_map.digest(),
                claims_exact=step.is_exact,
                discovered=step.source.family.findings(step.source.config),
            )
            for position, step in enumerate(self.steps)
        )

    @property
    def is_exact(self) -> bool:
        """True if all steps are function-preserving."""
        return all(step.is_exact for step in self.steps)

    @property
    def target(self) -> Model:
        """The model of the result."""
        return self.steps[-1].target if self.steps else self.source

    @property
    def vocabulary(self) -> BoundVocab | None:
        """The expansion of the vocabulary, if there is one."""
        return next((s.spec for s in self.steps if isinstance(s.spec, BoundVocab)), None)

    @property
    def change(self) -> Change:
        """The change by names of parameters in memory."""
        return Change.of(self.parameter_map, self.source, self.target)

    def state_stream(self, rule: StateKind, tensors: TensorFolder) -> TensorStream:
        """Return one kind of state of the expanded model, by name on disk.

        Tensors whose state is reset are absent.
        """
        disk_names = {t.name: t.disk_name for t in self.source.tensors}
        known = {
            name: on_disk for name, on_disk in disk_names.items() if on_disk in tensors.headers
        }
        maps, shapes = self.parameter_map.tensors, self.target.shapes
        targets = [
            t for t in self.target.tensors if rule.has_state(maps[t.name], known.__contains__)
        ]
        entries = tuple(
            TensorHeader(
                t.disk_name, tensors.headers[known[maps[t.name].origin or ""]].dtype, shapes[t.name]
            )
            for t in targets
        )

        def read(name: str) -> Tensor:
            return tensors[known[name]]

        values = ((t.disk_name, rule.mapped(maps[t.name], read)) for t in targets)
        return TensorStream(entries, values)


def _added_experts(
    current: AddedExperts | None, steps: Sequence[ResolvedExpansion]
) -> AddedExperts | None:
    """Return the new experts of the result whose router offset is not 0 yet, if any.

    Args:
        current: those of the source.
        steps: the expansions in order.
    """
    is_open = current is None or current.is_settled
    closed = () if current is None or is_open else current.experts
    for step in steps:
        if not isinstance(step.spec, MoeAdd):
            continue
        if closed:
            reason = (
                f"the router offset of the appended experts {closed[0]} to {closed[-1]} is not 0 "
                "yet; train the model until it is, then add more"
            )
            raise RequestError(Problem("expansion.moe_add", reason=reason))
        if step.spec.is_append:
            old, new = (model.sizes.num_experts for model in (step.source, step.target))
            closed = tuple(range(old, new))
    if not is_open:
        return current
    return AddedExperts(experts=closed) if closed else None

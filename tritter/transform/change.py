"""What a model's parameters become, by the names that they have in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tritter.core.expansions import ResolvedExpansion
from tritter.core.families import (
    Config,
    LogicalTensor,
    StoredTensor,
    layout,
    pack_all,
    unpack_all,
)
from tritter.core.families.layout import Part
from tritter.core.parameter_map import (
    ParameterMap,
    TensorMap,
    carried_mask,
    new_along,
    rounded_weight,
)
from tritter.core.parameter_map.carry import STATE_KINDS, Policy, followed, has_state
from tritter.core.stock_routers import AddedExperts

PeakBytes = Mapping[str, Tensor]


def declared(name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Return a parameter that no family knows, such as a factor of LoRA, known by its own name."""
    return StoredTensor(name, shape, (Part(LogicalTensor(kind=name, disk_name=name, axes=())),))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """A parameter map as those see it that know a model's parameters by name.

    Args:
        config: config.json of the model after it.
        before: what each parameter holds that the change reads or takes away.
        after: what each parameter holds then, in forward order.
        tensors: name of what is held after it → how that follows from what was held before.
    """

    config: Config
    before: tuple[StoredTensor, ...]
    after: tuple[StoredTensor, ...]
    tensors: Mapping[str, TensorMap]

    @classmethod
    def of(cls, parameter_map: ParameterMap, source: Config, target: Config) -> "Change":
        """Return the change that a map makes to a model of the config `source`."""
        before, after = (layout(c, "live") for c in (source, target))
        return cls(config=target, before=before, after=after, tensors=parameter_map.tensors)

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the parameters that go."""
        names = {stored.name for stored in self.after}
        return tuple(stored.name for stored in self.before if stored.name not in names)

    def digest(self) -> str:
        """SHA-256 of maps, fills and seeds, as that of a parameter map."""
        return ParameterMap(self.tensors, ()).digest()

    @property
    def altered(self) -> tuple[StoredTensor, ...]:
        """The parameters whose weights, state or name are not what they were."""
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
        """Name of each parameter that carries one on → name of that one, before the change."""
        owners = {part.tensor.name: s.name for s in self.before for part in s.parts}
        origins = {s.name: self.tensors[s.parts[0].tensor.name].origin for s in self.after}
        return {name: owners[origin] for name, origin in origins.items() if origin is not None}

    def weights(self, held: PeakBytes) -> Iterator[tuple[str, Tensor]]:
        """Yield the altered parameters, of all those before the change."""
        by_name, example = unpack_all(self.before, held), next(iter(held.values()))
        for stored in self.altered:
            maps = [self.tensors[part.tensor.name] for part in stored.parts]
            stems = [by_name[m.origin].dtype for m in maps if m.origin is not None]
            dtype = reduce(torch.promote_types, stems) if stems else example.dtype
            values = {
                part.tensor.name: rounded_weight(tensor_map, by_name.__getitem__, dtype)
                for part, tensor_map in zip(stored.parts, maps, strict=True)
            }
            is_taken = stored.is_whole and maps[0].is_verbatim  # it stands elsewhere as well
            yield stored.name, stored.pack(values.__getitem__).to(example.device, copy=is_taken)

    def masks(self) -> dict[str, Tensor]:
        """Return by name, as bool masks, which entries carry on what was known before."""
        everything = {s.name: torch.ones(s.shape, dtype=torch.bool) for s in self.before}
        by_name = unpack_all(self.before, everything)
        return pack_all(
            self.after,
            {name: carried_mask(m, by_name.__getitem__) for name, m in self.tensors.items()},
        )

    def new_units(self) -> dict[str, tuple[Tensor | None, ...]]:
        """Return by name, of parameters that grew: along each dimension, bool [size], what is new.

        None where nothing is. What several experts share is left out, and what is new as a whole.
        """
        grown = {}
        for stored in self.after:
            if stored.is_of_experts:
                continue
            maps = [self.tensors[part.tensor.name] for part in stored.parts]
            output = new_along(maps[0], 0)
            if len(maps) > 1:  # its outputs are those of its parts, behind one another
                size = stored.shape[-1 if stored.is_transposed else 0]
                whole = torch.zeros(size, dtype=torch.bool)
                for part, tensor_map in zip(stored.parts, maps, strict=True):
                    if (own := new_along(tensor_map, 0)) is not None:
                        whole[part.index[-1]] = own
                output = whole if bool(whole.any()) else None
            others = (new_along(maps[0], dim) for dim in range(1, len(stored.shape)))
            flags = (output, *others)
            if any(each is not None for each in flags):
                grown[stored.name] = flags[::-1] if stored.is_transposed else flags
        return grown

    def state(self, kind: str, held: PeakBytes, *, policy: Policy = "carry") -> dict[str, Tensor]:
        """Return what becomes of one kind of state, by the rule of that kind.

        A parameter is absent where nothing that it holds has any; parts that have none are zero.
        What the change does not name stays as it is.
        """
        by_name, rule = unpack_all(self.before, held), STATE_KINDS[kind]
        named = {stored.name for stored in (*self.before, *self.after)}
        others = {name: value for name, value in held.items() if name not in named}
        return others | pack_all(
            self.after,
            {
                name: followed(tensor_map, rule, by_name.__getitem__, policy=policy)
                for name, tensor_map in self.tensors.items()
                if has_state(tensor_map, rule, by_name.__contains__, policy=policy)
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedExpansion:
    """What an expansion would make.

    Args:
        config: config.json of the source.
        steps: the expansions in order, with their maps; none leave everything as it is.
        parameter_map: of all of them.
        seed: what random fills and choices are drawn from.
        parameters_before: counted from shapes, ties once.
        parameters_after: the same of the result.
        added_experts: those of the result that are not open yet, if any.
        is_confirmed: transformers was asked; else `config` lacks the defaults that only it knows.
    """

    config: Config
    steps: tuple[ResolvedExpansion, ...]
    parameter_map: ParameterMap
    seed: int
    parameters_before: int
    parameters_after: int
    added_experts: AddedExperts | None = None
    is_confirmed: bool = True

    @property
    def target_config(self) -> Config:
        return self.steps[-1].target_config if self.steps else self.config

    @property
    def change(self) -> Change:
        """The same by the names of parameters in memory."""
        return Change.of(self.parameter_map, self.config, self.target_config)

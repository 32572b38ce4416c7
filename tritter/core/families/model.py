"""A model as its config describes it: sizes, tensors with shapes, names on disk and in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Literal

from tritter.core.families.dimensions import FFN_SIZES, Config, Dimensions, ffn_sizes, on_disk
from tritter.core.families.family import Family
from tritter.core.families.layout import LayoutKind, Part, StoredTensor, pack_all
from tritter.core.families.logical import LogicalTensor
from tritter.core.families.tables import family_of
from tritter.errors import RequestError, TritterError, brief, shortened
from tritter.limits import MAX_PARAMETERS, MAX_TENSORS
from tritter.storage.reading import LINEAGE_NAME, read_object

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """A model as its config describes it; each property is derived once, when it is first used.

    Args:
        config: its config.json, with `ffn_sizes` if its FFNs differ in width.
        known_family: its family, if the caller knows it.
    """

    config: Config
    known_family: Family | None = field(default=None, repr=False, compare=False)
    _layouts: dict[LayoutKind, tuple[StoredTensor, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        return f"Model({self.model_type}, {self.num_parameters:,} parameters)"

    @cached_property
    def family(self) -> Family:
        """The family of its `model_type`."""
        return self.known_family or family_of(self.config)

    @property
    def model_type(self) -> str:
        return self.family.model_type

    @cached_property
    def sizes(self) -> Dimensions:
        """Its sizes, with the widest FFN."""
        return self.family.dimensions(self.config)

    @cached_property
    def ffn_sizes(self) -> tuple[int, ...]:
        """The FFN width of each layer; empty if all layers have the same."""
        return ffn_sizes(self.config)

    @cached_property
    def layer_kinds(self) -> list[Literal["dense", "sparse"]]:
        """The kind of each layer: with experts (sparse) or one FFN (dense)."""
        return self.family.layer_kinds(self.config, self.sizes.num_hidden_layers)

    @cached_property
    def tensors(self) -> tuple[LogicalTensor, ...]:
        """All tensors in forward order, one for each layer and expert."""
        return self.family.logical_tensors(self.config, self.sizes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical name → shape of each tensor."""
        layers: dict[int | None, Dimensions] = {
            layer: replace(self.sizes, intermediate_size=width)
            for layer, width in enumerate(self.ffn_sizes)
        }
        return {
            tensor.name: self.family.shape(tensor, layers.get(tensor.layer, self.sizes))
            for tensor in self.tensors
        }

    @cached_property
    def _counts(self) -> tuple[int, int]:
        return self.family.count(self.config, self.sizes)

    @property
    def num_tensors(self) -> int:
        """Its tensors on disk, counted without naming them."""
        return self._counts[0]

    @property
    def num_parameters(self) -> int:
        """Its parameters, counted from shapes; a tied head counts once."""
        return self._counts[1]

    @cached_property
    def num_active_parameters(self) -> int:
        """The active parameters of a token: of the experts, those it is routed to."""
        experts = (each for each in self.tensors if each.kind.startswith("experts."))
        routed = sum(prod(self.shapes[each.name]) for each in experts)
        unused = 1 - self.sizes.experts_per_token / max(1, self.sizes.num_experts)
        return round(self.num_parameters - unused * routed)

    @property
    def is_tied(self) -> bool:
        """The embedding is also the head."""
        return self.family.is_tied(self.config)

    @property
    def position_limit(self) -> int | None:
        """The context length in tokens, or None if the config does not set it."""
        return self.family.position_limit(self.config)

    @property
    def positions_key(self) -> str:
        """The key of config.json that sets the context length."""
        usual = self.family.positions_key
        keys = (usual, "n_positions", "max_seq_len")
        return next((key for key in keys if key in self.config), usual)

    @property
    def fixed_neurons(self) -> str:
        """The reason if single layers can't get neurons; empty if they can."""
        return self.family.fixed_neurons(self.config)

    @property
    def separates_documents(self) -> bool:
        """Position ids that restart keep a token from reading earlier documents."""
        return self.family.separates_documents(self.config)

    def attention_window(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens, or None for full attention."""
        return self.family.attention_window(self.config, layer)

    @cached_property
    def widened(self) -> "Model":
        """The model with all that growth in width needs to know of its family."""
        wide = self.family.widened(self.config)
        return self if wide is self.family else Model(self.config, wide)

    def changed(self, config: Config) -> "Model":
        """Return a model with another config, of the same family if the model type is the same."""
        is_same = config.get("model_type") == self.config.get("model_type")
        return Model(config, self.family if is_same else None)

    def with_ffn_sizes(self, sizes: Sequence[int]) -> "Model":
        """Return a model with the given FFN width per layer."""
        return self.changed(self.family.with_ffn_sizes(self.config, sizes))

    def with_widths_of(self, shapes: Mapping[str, tuple[int, ...]]) -> "Model":
        """Return a model with the FFN widths of live parameters: name in memory → shape."""
        if self.fixed_neurons:
            return self
        family, sizes = self.widened.family, []
        for tensor in self.widened.tensors:
            if family.ffn_part(tensor) == "up":
                shape = shapes.get(tensor.live_name or tensor.disk_name)
                if shape is None:  # a part of a model
                    return self
                stored = shape[:: -1 if tensor.is_transposed else 1]
                sizes.append(stored[family.neuron_axis(tensor)])
        return self.with_ffn_sizes(sizes) if sizes else self

    def with_live_sizes(self, folder: Path, *, ffn_sizes: Sequence[int] | None = None) -> "Model":
        """Return this model of a folder's config.json with the FFN widths of its tritter.json.

        Args:
            folder: the checkpoint folder.
            ffn_sizes: FFN width per layer; None reads tritter.json.
        """
        if FFN_SIZES in self.config:
            raise RequestError(
                f"config.json: {FFN_SIZES} = {brief(self.config[FFN_SIZES])}; the widths of single "
                f"layers belong in {LINEAGE_NAME}, next to a model that is padded to the widest."
            )
        path = folder / LINEAGE_NAME
        if ffn_sizes is None and path.exists():
            ffn_sizes = read_object(path).get(FFN_SIZES)
        if not ffn_sizes:
            return self
        live = self.changed({**self.config, FFN_SIZES: ffn_sizes})
        try:
            live.check_ffn_sizes()
        except RequestError as error:
            raise TritterError(f"{path}: {error}") from error
        return live

    def with_layers(self, layer_sources: Sequence[int]) -> "Model":
        """Return a model whose layer t is a copy of layer `layer_sources[t]`."""
        return self.changed(self.family.with_layers(self.config, layer_sources))

    @cached_property
    def on_disk(self) -> "Model":
        """The padded model, which stock classes can build; itself if all FFNs are as wide."""
        return self.changed(on_disk(self.config)) if FFN_SIZES in self.config else self

    def layout(self, kind: LayoutKind) -> tuple[StoredTensor, ...]:
        """Return all stored tensors in forward order, on disk (`hub`) or in memory (`live`)."""
        if kind not in self._layouts:
            self._layouts[kind] = _arranged(self.tensors, self.shapes, kind)
        return self._layouts[kind]

    def padded_shapes(self, kind: LayoutKind = "hub") -> dict[str, tuple[int, ...]]:
        """Return name → shape of the tensors that are padded on disk; usually empty."""
        if self.on_disk is self:
            return {}
        live = {tensor.name: tensor.shape for tensor in self.layout(kind)}
        stock = self.on_disk.layout(kind)
        return {tensor.name: tensor.shape for tensor in stock if tensor.shape != live[tensor.name]}

    def match(self, names: Iterable[str]) -> tuple[StoredTensor, ...]:
        """Return the layout of a checkpoint's tensors.

        Args:
            names: of all tensors in the checkpoint.
        """
        found = set(names) - self.family.tied_names(self.config).keys()
        expected = self.layout("hub")
        if found != {stored.name for stored in expected}:
            # Files of a model without its head, as `LlamaModel` saves them, omit the prefix
            prefix = mode(stored.name.partition(".")[0] for stored in expected) + "."
            bare = tuple(replace(s, name=s.name.removeprefix(prefix)) for s in expected)
            others = [expected, self.layout("live"), bare]
            expected = max(others, key=lambda each: len(found & {s.name for s in each}))
        names = {stored.name for stored in expected}
        if read_as := self.family.read_as(self.config, found - names, names - found):
            files = {name: former for former, name in read_as.items()}
            expected = tuple(replace(s, name=files.get(s.name, s.name)) for s in expected)
            found, names = found - read_as.keys(), names - files.keys()
        extra = f"that {self.model_type} does not have"
        told = {extra: sorted(found - names), "are missing": sorted(names - found)}
        problems = [f"{len(n)} tensors {what}: {shortened(n)}" for what, n in told.items() if n]
        if text := "; ".join(problems):
            raise TritterError(f"The checkpoint does not match its config.json: {text}")
        return expected

    def check_ffn_sizes(self) -> None:
        """Refuse FFN widths that do not match the layers, or layers that must have one width."""
        if FFN_SIZES not in self.config:
            return
        if reason := self.family.fixed_neurons(self.config):
            raise RequestError(f"{FFN_SIZES}: all layers have one width: {reason}.")
        wide = self.widened
        sizes, widest = self.ffn_sizes, wide.sizes
        layers = widest.num_hidden_layers
        are_valid = len(sizes) == layers and all(type(size) is int and size >= 1 for size in sizes)
        if not are_valid or max(sizes) != widest.intermediate_size:
            raise RequestError(
                f"{FFN_SIZES} = {brief(self.config[FFN_SIZES])}; must be a width of at least 1 for "
                f"each of the {layers} layers, the widest "
                f"{wide.family.sizes['intermediate_size']} = {widest.intermediate_size}."
            )

    def check_size(self) -> None:
        """Refuse a model with too many tensors or parameters, which are only counted."""
        _ = self.sizes  # reading checks them
        tensors, parameters = self.num_tensors, self.num_parameters
        if tensors > MAX_TENSORS:
            raise RequestError(
                f"config.json: layers and experts amount to {tensors:,} tensors; must be at most "
                f"{MAX_TENSORS:,}."
            )
        if parameters > MAX_PARAMETERS:
            raise RequestError(
                f"config.json: the sizes amount to {parameters:,} parameters; must be at most "
                f"{MAX_PARAMETERS:,}."
            )

    def disk_tensors(self, state: Mapping[str, "Tensor"]) -> Iterator[tuple[str, "Tensor"]]:
        """Yield (name on disk, tensor) of a live model's state dict, in the family's order.

        Tied tensors are yielded once. Experts that are stacked in memory only are yielded one by
        one, as views.
        """
        for stored in self.match(state):
            whole = state[stored.name].detach()
            if stored.is_whole:
                yield stored.parts[0].tensor.disk_name, whole
            elif stored.is_of_experts:
                yield from ((tensor.disk_name, value) for tensor, value in stored.unpack(whole))
            else:
                yield stored.name, whole

    def live_tensors(self, tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Return name in memory → tensor, for values (of a state, a mask) by their name on disk."""
        values = {t.name: tensors[t.disk_name] for t in self.tensors if t.disk_name in tensors}
        return pack_all(self.layout("live"), values)


def _arranged(
    tensors: Iterable[LogicalTensor],
    logical_shapes: Mapping[str, tuple[int, ...]],
    kind: LayoutKind,
) -> tuple[StoredTensor, ...]:
    """Return the stored tensors of a model's logical tensors, in forward order."""
    parts_by_name, shapes = dict[str, list[Part]](), dict[str, tuple[int, ...]]()
    for tensor in tensors:
        shape = logical_shapes[tensor.name]
        part, name = Part(tensor), tensor.disk_name
        if kind == "live" and (fused := tensor.fused) is not None:
            rows = slice(fused.block * shape[0], (fused.block + 1) * shape[0])
            shape = (fused.num_blocks * shape[0], *shape[1:])
            part, name = Part(tensor, (rows,)), fused.name
            if tensor.expert is not None:
                count = max(tensor.expert + 1, shapes.get(name, (0,))[0])
                part, shape = Part(tensor, (tensor.expert, rows)), (count, *shape)
        elif tensor.within:
            name, first = tensor.within, shapes.get(tensor.within, (0,))[0]
            end = first + shape[0]
            before = (slice(None),) if tensor.is_transposed else ()
            part, shape = Part(tensor, (*before, slice(first, end))), (end, *shape[1:])
        elif kind == "live":
            name = tensor.live_name or name
        parts_by_name.setdefault(name, []).append(part)
        shapes[name] = shape
    stored = []
    for name, parts in parts_by_name.items():
        shape = shapes[name][::-1] if parts[0].tensor.is_transposed else shapes[name]
        stored.append(StoredTensor(name, shape, tuple(parts)))
    return tuple(stored)

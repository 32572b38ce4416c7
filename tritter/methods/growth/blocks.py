"""Where neurons can grow, in live models and modules of one's own, and which tokens they saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tritter.core.families import family_of
from tritter.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

FFN = "ffn"  # kind of the space that grows


@dataclass(frozen=True, slots=True)
class FfnBlock:
    """One FFN: a neuron of it is a row of gate, a row of up and a column of down.

    Args:
        layer: which layer's it is.
        gate: name of the parameter [intermediate_size, hidden_size]; `up` likewise. Without up a
            neuron computes σ(gate·x) alone.
        down: name of the parameter [hidden_size, intermediate_size]; None: whoever reads the
            neurons is not known.
        is_transposed: all of them lie the other way round, inputs first.
    """

    layer: int
    gate: str
    up: str | None
    down: str | None
    is_transposed: bool = False

    @property
    def module(self) -> str:
        """Name of the module that holds the three."""
        return self.gate.rpartition(".")[0].rpartition(".")[0]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the parameters that compute neurons, of which each is a row."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @property
    def of_rows(self) -> int:
        """The dimension that neurons lie along in `rows`; in down it is the other."""
        return 1 if self.is_transposed else 0

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Names of the weights, and the dimension that neurons lie along in each."""
        columns = () if self.down is None else ((self.down, 1 - self.of_rows),)
        return (*((name, self.of_rows) for name in self.rows), *columns)

    def axes(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield the same of all parameters, biases included."""
        for name, dim in self.parts:
            yield name, dim
            if name in self.rows and _owner(model, name).bias is not None:
                yield f"{name.removesuffix('.weight')}.bias", 0

    def weights(self, model: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return gate [F, H], up [F, H] and down [H, F], detached, in float32."""
        gate, up, down = (
            None if name is None else self.turned(model.get_parameter(name).detach().float())
            for name in (self.gate, self.up, self.down)
        )
        assert gate is not None
        return gate, up, down

    def bias(self, model: nn.Module, name: str) -> Tensor | None:
        """Return what neurons add to what one of `rows` reads [F], detached, in float32."""
        from torch import Tensor

        held = _owner(model, name).bias
        return held.detach().float() if isinstance(held, Tensor) else None

    def turned(self, weight: Tensor) -> Tensor:
        """Return a weight, or its gradient, with its outputs first."""
        return weight.T if self.is_transposed else weight

    def is_trained(self, model: nn.Module) -> bool:
        return all(model.get_parameter(name).requires_grad for name, _ in self.parts)

    def activation(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return σ, by which a gate opens; where the module has none, nothing stands for it."""
        module = model.get_submodule(self.module)
        name = "act_fn" if hasattr(module, "act_fn") else "act"
        activation: Callable[[Tensor], Tensor] = getattr(module, name, lambda values: values)
        return activation

    def width(self, model: nn.Module) -> int:
        return model.get_parameter(self.gate).shape[self.of_rows]


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a weight belongs to."""
    return model.get_submodule(name.removesuffix(".weight"))


def ffn_blocks(model: nn.Module) -> tuple[FfnBlock, ...]:
    """Return the FFNs of a model, in the order of its layers.

    Raises:
        RequestError: it has experts, adapters, or no config of a family that is known.
    """
    import torch

    from tritter.core.models import config_of

    config = config_of(model)
    family = family_of(config)
    if family.has_experts:
        raise RequestError(
            f"growth: {config['model_type']} has experts in place of FFNs, and neurons grow in "
            "dense FFNs only; add experts instead (expansion=moe_add)."
        )
    if family.has_stacked_ffn:
        raise RequestError(
            f"growth: in {config['model_type']} gate and up are one tensor, and neurons grow in "
            "FFNs in which they are two; width makes them wider."
        )
    names: dict[int, dict[str, str]] = {}
    is_transposed = False
    for tensor in family.logical_tensors(config):
        if tensor.kind in ("ffn.gate", "ffn.up", "ffn.down"):
            assert tensor.layer is not None
            part, is_transposed = tensor.kind.removeprefix("ffn."), tensor.is_transposed
            names.setdefault(tensor.layer, {})[part] = tensor.live_name or tensor.disk_name
    places = tuple(
        FfnBlock(
            layer,
            gate=parts.get("gate", parts["up"]),
            up=parts["up"] if family.has_gate else None,
            down=parts["down"],
            is_transposed=is_transposed,
        )
        for layer, parts in sorted(names.items())
    )
    parameters = dict(model.named_parameters())
    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for name in (name for place in places for name, _ in place.parts):
        if name not in parameters:  # something stands in front of it, such as an adapter
            owner = name.removesuffix(".weight")
            found = [other for other in parameters if other.startswith(f"{owner}.")]
            has = f"it has {', '.join(found[:3])}" if found else "there is none"
            raise RequestError(
                f"growth: {name} is no plain weight of a linear layer ({has}): neurons can't "
                "grow below LoRA adapters; merge them into the model before, or leave them out."
            )
        if parameters[name].dtype not in plain:
            raise RequestError(f"growth: {name} is quantised; load the model without it.")
    return places


def freeze_all_but_ffns(model: nn.Module) -> None:
    """Let the FFNs alone be trained; what is frozen already stays so."""
    places = ffn_blocks(model)
    names = {name for place in places for name, _ in place.axes(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)


MAX_TOKENS = 1024  # of a step, of all processes


@dataclass(frozen=True, slots=True, eq=False)
class ActivationProbe:
    """Some tokens of a step, as one FFN saw them.

    Args:
        inputs: float32 [T, H], what the FFN reads.
        output_gradients: float32 [T, H], of the loss by what it writes.
        computed: float32 [T, F], what its neurons computed; None: it follows from the weights.
    """

    inputs: Tensor
    output_gradients: Tensor
    computed: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        return bool(self.output_gradients.isfinite().all() and self.inputs.isfinite().all())


@dataclass(slots=True)
class ActivationRecorder:
    """Collects tokens of FFNs during the forward and backward passes of a step.

    Args:
        max_tokens: of each batch; spread over it.
    """

    max_tokens: int = MAX_TOKENS
    _inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    _gradients: dict[int, list[Tensor]] = field(default_factory=dict)

    def hook(self, layer: int) -> Callable[..., None]:
        """Return a forward hook of the FFN of a layer."""

        import torch

        def see(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if not (module.training and output.requires_grad):
                return
            read, index = arguments[0].detach(), len(self._inputs.setdefault(layer, []))
            self._inputs[layer].append(some_rows(read, self.max_tokens))
            self._gradients.setdefault(layer, []).append(torch.empty(0))

            def keep(gradient: Tensor) -> None:
                self._gradients[layer][index] = some_rows(gradient, self.max_tokens)

            output.register_hook(keep)

        return see

    def probes(self) -> dict[int, ActivationProbe]:
        """Return layer → what was seen of it; a pass without a backward one counts for nothing."""
        import torch

        found = {}
        for layer, inputs in self._inputs.items():
            pairs = [
                (x, g) for x, g in zip(inputs, self._gradients[layer], strict=True) if g.numel()
            ]
            if pairs:
                found[layer] = ActivationProbe(
                    *(torch.cat(each).float() for each in zip(*pairs, strict=True))
                )
        return found

    def clear(self) -> None:
        """Forget what was seen."""
        self._inputs.clear()
        self._gradients.clear()


def some_rows(values: Tensor, count: int) -> Tensor:
    """Return at most so many tokens of values [..., H] as rows: always those of the same places.

    At random places of the batch: evenly spaced ones may all begin a sequence.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows[_places(len(rows), count).to(rows.device)]


@lru_cache(maxsize=16)
def _places(size: int, count: int) -> Tensor:
    import torch

    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return drawn[:count].sort().values


def attach(
    model: nn.Module, places: Iterable[FfnBlock], seen: ActivationRecorder
) -> list[RemovableHandle]:
    """Let `seen` collect until the handles that are returned are removed."""
    return [
        model.get_submodule(place.module).register_forward_hook(seen.hook(place.layer))
        for place in places
    ]

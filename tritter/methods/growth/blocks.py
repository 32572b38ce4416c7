"""The FFNs whose neurons can grow, and the activations recorded for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class FfnBlock:
    """One FFN. A neuron is a row of gate, a row of up and a column of down.

    Args:
        layer: index of its layer.
        gate: name of the parameter [intermediate_size, hidden_size].
        up: name of another; None: a neuron computes σ(gate·x) alone.
        down: name of the parameter [hidden_size, intermediate_size]; None: the reader of the
            neurons is not known.
        is_transposed: the weights are stored with inputs first.
        activation_name: name of the module that computes σ; empty: the attribute `act_fn` or `act`
            of the module that contains the three, or else no σ.
    """

    layer: int
    gate: str
    up: str | None
    down: str | None
    is_transposed: bool = False
    activation_name: str = ""

    @classmethod
    def all_of(cls, model: nn.Module) -> tuple[FfnBlock, ...]:
        """Return the FFNs of a model, in layer order."""
        import torch

        from tritter.core.models import model_of

        shapes = model_of(model)
        if reason := shapes.family.fixed_neurons(shapes.config):
            raise RequestError(f"growth: {reason}.")
        shapes = shapes.widened
        family = shapes.family
        names: dict[int, dict[str, str]] = {}
        is_transposed = False
        for tensor in shapes.tensors:
            if part := family.ffn_part(tensor):
                assert tensor.layer is not None
                names.setdefault(tensor.layer, {})[part] = tensor.live_name or tensor.disk_name
                is_other = family.neuron_axis(tensor) != (part == "down")
                is_transposed = tensor.is_transposed or is_other
        blocks = tuple(
            cls(
                layer,
                gate=parts.get("gate", parts["up"]),
                up=parts["up"] if "gate" in parts else None,
                down=parts["down"],
                is_transposed=is_transposed,
                activation_name=family.activation_name(parts["up"]),
            )
            for layer, parts in sorted(names.items())
        )
        parameters = dict(model.named_parameters())
        plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for name in (name for block in blocks for name, _ in block.parts):
            if name not in parameters:  # wrapped, for example by an adapter
                owner = name.removesuffix(".weight")
                found = [other for other in parameters if other.startswith(f"{owner}.")]
                has = f"it has {', '.join(found[:3])}" if found else "there is none"
                raise RequestError(
                    f"growth: {name} is not a plain weight of a linear layer ({has}). Neurons "
                    "can't grow below LoRA adapters; merge or remove the adapters first."
                )
            if parameters[name].dtype not in plain:
                raise RequestError(
                    f"growth: {name} is quantised; load the model without quantisation."
                )
        return blocks

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the parameters with one row per neuron."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @property
    def neuron_dim(self) -> int:
        """The neuron dimension in `rows`; down has the other one."""
        return 1 if self.is_transposed else 0

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Names of the weights, and the neuron dimension of each."""
        columns = () if self.down is None else ((self.down, 1 - self.neuron_dim),)
        return (*((name, self.neuron_dim) for name in self.rows), *columns)

    def axes(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield name and neuron dimension of all parameters, biases included."""
        for name, dim in self.parts:
            yield name, dim
            if name in self.rows and _module_of(model, name).bias is not None:
                yield f"{name.removesuffix('.weight')}.bias", 0

    def weights(self, model: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return gate [F, H], up [F, H] and down [H, F], detached, in float32."""
        gate, up, down = (
            None if name is None else self.outputs_first(model.get_parameter(name).detach().float())
            for name in (self.gate, self.up, self.down)
        )
        assert gate is not None
        return gate, up, down

    def bias(self, model: nn.Module, name: str) -> Tensor | None:
        """Return the bias of one of `rows`, [F], detached, in float32; None if there is none."""
        from torch import Tensor

        bias = _module_of(model, name).bias
        return bias.detach().float() if isinstance(bias, Tensor) else None

    def outputs_first(self, weight: Tensor) -> Tensor:
        """Return a weight, or its gradient, with its outputs first."""
        return weight.T if self.is_transposed else weight

    def is_trained(self, model: nn.Module) -> bool:
        return all(model.get_parameter(name).requires_grad for name, _ in self.parts)

    def activation(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return σ; the identity if the module has no activation."""
        if self.activation_name:
            return model.get_submodule(self.activation_name)
        module = model.get_submodule(self.gate.rpartition(".")[0].rpartition(".")[0])
        name = "act_fn" if hasattr(module, "act_fn") else "act"
        activation: Callable[[Tensor], Tensor] = getattr(module, name, lambda values: values)
        return activation

    def width(self, model: nn.Module) -> int:
        return model.get_parameter(self.gate).shape[self.neuron_dim]


def _module_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a weight belongs to."""
    return model.get_submodule(name.removesuffix(".weight"))


def freeze_all_but_ffns(model: nn.Module) -> None:
    """Freeze all parameters except the FFNs; frozen parameters stay frozen."""
    names = {name for block in FfnBlock.all_of(model) for name, _ in block.axes(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in names)


@dataclass(frozen=True, slots=True, eq=False)
class ActivationProbe:
    """Sampled activations of one FFN in a step.

    Args:
        inputs: float32 [T, H], inputs of the FFN.
        output_gradients: float32 [T, H], gradient of the loss in its outputs.
        computed: float32 [T, F], activations of its neurons; None: computed from the weights.
    """

    inputs: Tensor
    output_gradients: Tensor
    computed: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        return bool(self.output_gradients.isfinite().all() and self.inputs.isfinite().all())


@dataclass(slots=True)
class ActivationRecorder:
    """Records activations of FFNs during the forward and backward passes of a step.

    Args:
        max_tokens: number of sampled tokens per batch; by default, as of a whole step.
    """

    limit: ClassVar[int] = 1024  # tokens per step, over all processes

    max_tokens: int = limit
    _inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    _gradients: dict[int, list[Tensor]] = field(default_factory=dict)

    def record_activations(self, layer: int, inputs: Tensor, output: Tensor) -> None:
        """Record some tokens, if a backward pass follows.

        Args:
            inputs: [..., H], inputs of the FFN.
            output: [..., H], its output.
        """
        import torch

        if not output.requires_grad:
            return
        index = len(self._inputs.setdefault(layer, []))
        self._inputs[layer].append(sample_rows(inputs, self.max_tokens))
        self._gradients.setdefault(layer, []).append(torch.empty(0))

        def keep(gradient: Tensor) -> None:
            self._gradients[layer][index] = sample_rows(gradient, self.max_tokens)

        output.register_hook(keep)

    def attach(self, model: nn.Module, blocks: Iterable[FfnBlock]) -> list[RemovableHandle]:
        """Record activations of FFNs in training mode until the returned handles are removed."""
        return [
            handle
            for block in blocks
            for handle in FfnObserver(
                self.record_activations, block.layer, in_training=True
            ).attach(model, block)
        ]

    def probes(self) -> dict[int, ActivationProbe]:
        """Return layer → its probe; forward passes without a backward pass are ignored."""
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
        """Discard all recorded activations."""
        self._inputs.clear()
        self._gradients.clear()


def sample_rows(values: Tensor, count: int) -> Tensor:
    """Return at most `count` tokens of values [..., H] as rows, always at the same positions.

    The positions are random: evenly spaced ones may all be first tokens of sequences.
    """
    rows = values.detach().reshape(-1, values.shape[-1])
    return rows[_random_positions(len(rows), count).to(rows.device)]


@lru_cache(maxsize=16)
def _random_positions(size: int, count: int) -> Tensor:
    import torch

    return torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count].sort().values


class FfnObserver:
    """Forward hooks of an FFN's first and last matrix; they can be copied with the model.

    Args:
        record: is called with layer, inputs [..., H] and output [..., H] of the FFN.
        layer: of the FFN.
        in_training: observe modules in training mode only.
    """

    def __init__(
        self,
        record: Callable[[int, Tensor, Tensor], None],
        layer: int,
        *,
        in_training: bool = False,
    ) -> None:
        self.record, self._layer, self._in_training = record, layer, in_training
        self._read: Tensor | None = None

    def attach(self, model: nn.Module, block: FfnBlock) -> tuple[RemovableHandle, RemovableHandle]:
        """Observe an FFN until the handles are removed."""
        assert block.down is not None
        gate, down = _module_of(model, block.gate), _module_of(model, block.down)
        return gate.register_forward_pre_hook(self.before), down.register_forward_hook(self.after)

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._read = arguments[0].detach() if module.training or not self._in_training else None

    def after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._read is not None:
            self.record(self._layer, self._read, output)
        self._read = None

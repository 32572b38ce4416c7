"""A linear layer whose outputs grow, in the place of `nn.Linear`."""

import warnings
from typing import Any, Unpack
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from tritter.errors import RequestError
from tritter.growth.growable import GrowableLayer
from tritter.growth.keywords import GrowthKeywords, made_grower
from tritter.growth.places import FfnPlace
from tritter.growth.plain_loop import PlainLoop


class GrowableLinear(GrowableLayer, nn.Linear):
    """`nn.Linear` that gets more outputs while it is trained, and whoever reads them more inputs.

    With a consumer both are widened in one event, and what the two compute together is kept. With
    none the layer returns the indices of its new outputs and is wider than before, which the rest
    of the model has to follow. Saved as any `nn.Linear`; a wider one's state makes it as wide.

    Args:
        consumer: a linear layer that reads all outputs and nothing else, directly or through a
            function of each element.
        growth: see `tritter.growth.keywords.GrowthKeywords`.

    Raises:
        RequestError: a keyword or a value that there is not, or a consumer that can't follow.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        consumer: nn.Linear | None = None,
        **growth: Unpack[GrowthKeywords],
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._has_warned = False
        self._read: Tensor | None = None
        self._reader = () if consumer is None else (consumer,)  # no module of this one
        modules: dict[str, nn.Module] = {"layer": self}
        if consumer is not None:
            _check_consumer(consumer, out_features)
            consumer.register_forward_hook(self._see_consumer)
            modules["consumer"] = consumer
        place = FfnPlace(
            layer=0,
            gate="layer.weight",
            up=None,
            down=None if consumer is None else "consumer.weight",
        )
        self._loop = PlainLoop(
            nn.ModuleDict(modules),
            made_grower(growth),
            places=[place],
            check_every=growth.get("check_every", 1),
        )

    @property
    def consumer(self) -> nn.Linear | None:
        """The layer that reads the outputs."""
        return self._reader[0] if self._reader else None

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if self._reader:
            self._read = input.detach() if torch.is_grad_enabled() else None
        else:
            self._loop.tokens.see(0, input, output, computed=output)
        return output

    def _see_consumer(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._read is not None:
            self._loop.tokens.see(0, self._read, output, computed=arguments[0])
        self._read = None

    def _check_growth_is_safe(self) -> None:
        """Refuse growth that leaves others behind.

        Raises:
            RequestError: this is a part of an adapter, or of a model with a config.
        """
        for parent in _PARENTS.get(self, ()):
            if not any(child is self for child in parent.children()):
                continue  # another stands in its place by now
            if hasattr(parent, "lora_A"):
                raise RequestError(
                    "growth: LoRA adapters stand around this layer, and neurons can't grow below "
                    "them; merge them before."
                )
            if hasattr(getattr(parent, "config", None), "to_dict"):
                raise RequestError(
                    f"growth: this layer is a part of a Hugging Face model ({type(parent).__name__}"
                    "), whose other tensors and config have to follow; let the whole model grow "
                    "with GrowableCausalLM(model)."
                )
        if not self._reader and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "growth: this GrowableLinear has no consumer: it gets more outputs, and whatever "
                "reads them has to be widened by you; name it with consumer= to have that done.",
                stacklevel=4,
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.ndim == 2:
            width, size = weight.shape
            if size == self.in_features and width > self.out_features:
                self._loop.widen(width)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)


_PARENTS: WeakKeyDictionary[GrowableLinear, "WeakSet[nn.Module]"] = WeakKeyDictionary()


def _note_parent(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(submodule, GrowableLinear):
        _PARENTS.setdefault(submodule, WeakSet()).add(module)


register_module_module_registration_hook(_note_parent)


def _check_consumer(consumer: object, out_features: int) -> None:
    if hasattr(consumer, "base_layer"):
        raise RequestError(
            f"consumer = {type(consumer).__name__}: LoRA adapters stand around it, and can't "
            "follow; merge them before."
        )
    if not isinstance(consumer, nn.Linear):
        raise RequestError(
            f"consumer = {type(consumer).__name__}: an nn.Linear is needed, whose columns read "
            "the outputs; experts and others can't follow."
        )
    if consumer.in_features != out_features:
        raise RequestError(
            f"consumer reads {consumer.in_features} features, and the layer has out_features = "
            f"{out_features}; it has to read all of them, and nothing else."
        )

"""A mixture of LoRA experts on a live model: adapters, a router in each layer, and the gates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from tritter.errors import RequestError, did_you_mean
from tritter.experts.adapters import (
    AdapterShape,
    adapted_layers,
    adapter_names,
    decoder_layers,
    factors,
    layer_number,
    put_on,
    take_off,
)
from tritter.experts.gates import Gates, Routing, gates_of
from tritter.experts.mixing import Dispatch, mixed
from tritter.experts.router import ExpertRouter

ROUTER = "expert_router"


class _LayerMix:
    """What the linear layers of one decoder layer need to know during a forward pass."""

    def __init__(self, router: ExpertRouter) -> None:
        self.router = router
        self.gates: Gates | None = None
        self.dispatch: Dispatch | None = None


class ExpertMixture:
    """LoRA experts on a model, mixed per token in one forward pass.

    The base is frozen. Everything hangs on the model by hooks: calling the model runs the mixture,
    and its output is that of the stock class.

    Args:
        model: a causal language model whose decoder layers are named `…layers.N`.
        is_shared: one router for all layers, in place of one for each.

    Attributes:
        names: the experts, in the order of gates.
        routing: how logits become gates from now on.

    Raises:
        RequestError: the model has adapters or experts already, or no decoder layers.
    """

    def __init__(self, model: nn.Module, *, is_shared: bool = False) -> None:
        if adapter_names(model):
            raise RequestError(f"the model has adapters already: {', '.join(adapter_names(model))}")
        self.model = model
        self.names: list[str] = []
        self.routing = Routing()
        self.is_shared = is_shared
        self._alone: str | None = None
        self._is_off = False
        self._hooked: set[str] = set()
        layers = decoder_layers(model)
        if not layers:
            raise RequestError("the model has no decoder layers named layers.N to put experts on.")
        model.requires_grad_(False)
        size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        like = next(model.parameters())
        self._mixes: dict[int, _LayerMix] = {}
        for number, layer in layers.items():
            owner = model if is_shared else layer
            if not hasattr(owner, ROUTER):
                owner.add_module(ROUTER, ExpertRouter(size, 0).to(like.device))
            self._mixes[number] = _LayerMix(owner.get_submodule(ROUTER))  # type: ignore[arg-type]
            layer.register_forward_pre_hook(self._route(number), with_kwargs=True)

    def add(self, name: str, shape: AdapterShape, *, seed: int) -> None:
        """Add an expert that computes nothing yet (B = 0), with router rows of zeros.

        Raises:
            RequestError: there is one of this name, or a target that the model has not.
        """
        self.open(name, shape, seed=seed)
        for router in self.routers():
            router.weight = nn.Parameter(_with_row(router.weight))
            router.bias = nn.Parameter(_with_row(router.bias))

    def remove(self, name: str) -> None:
        """Take an expert off, with its rows of the routers.

        Raises:
            RequestError: there is none of this name, or it is the only one.
        """
        self.check_can_go(name)
        kept = [number for number, each in enumerate(self.names) if each != name]
        self.close(name)
        for router in self.routers():
            router.weight = nn.Parameter(router.weight.detach()[kept].clone())
            router.bias = nn.Parameter(router.bias.detach()[kept].clone())

    def open(self, name: str, shape: AdapterShape, *, seed: int) -> None:
        """Put an expert's adapter on; its rows of the routers are the caller's.

        Raises:
            RequestError: there is one of this name, or a target that the model has not.
        """
        put_on(self.model, name, shape, seed=seed)
        self.names.append(name)
        self._hook_adapted()

    def close(self, name: str) -> None:
        """Take an expert's adapter off; its rows of the routers are the caller's."""
        take_off(self.model, name)
        self.names.remove(name)

    def check_can_go(self, name: str) -> None:
        """Raise a RequestError where there is no expert of a name, or no other one."""
        self._check_known(name)
        if len(self.names) == 1:
            raise RequestError(f"{name} is the only expert; a mixture has one at least.")

    def routers(self) -> Iterator[ExpertRouter]:
        """Yield the routers, a shared one once."""
        yield from dict.fromkeys(mix.router for mix in self._mixes.values())

    def gates(self) -> list[Gates]:
        """Return the gates of the last forward pass, layer by layer; none without routers."""
        return [mix.gates for mix in self._mixes.values() if mix.gates is not None]

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let one expert compute every token with a gate of 1, as an adapter by itself would.

        Raises:
            RequestError: there is none of this name.
        """
        self._check_known(name)
        before, self._alone = self._alone, name
        try:
            yield
        finally:
            self._alone = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the base compute without experts."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            raise RequestError(
                f"no expert {name}; there are {', '.join(self.names) or 'none'}."
                f"{did_you_mean(name, self.names)}"
            )

    def _route(self, number: int) -> Callable[..., None]:
        mix = self._mixes[number]

        def hook(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            mix.gates = mix.dispatch = None
            if self._is_off or not self.names:
                return
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if self._alone is not None:
                mix.dispatch = _only(hidden, self.names.index(self._alone), len(self.names))
                return
            logits = mix.router(hidden)
            mix.gates = gates_of(logits, self.routing, is_training=layer.training)
            mix.dispatch = Dispatch.of(mix.gates)

        return hook

    def _hook_adapted(self) -> None:
        for name, layer in adapted_layers(self.model):
            number = layer_number(name)
            if name not in self._hooked and number is not None:
                layer.register_forward_hook(self._add(self._mixes[number]))
                self._hooked.add(name)

    def _add(self, mix: _LayerMix) -> Callable[..., Tensor]:
        def hook(layer: LoraLinear, args: Sequence[Any], output: Tensor) -> Tensor:
            dispatch = mix.dispatch
            if dispatch is None:
                return output
            found = {n: each for n, name in enumerate(self.names) if (each := factors(layer, name))}
            if not found:
                return output
            return output + mixed(args[0], found, dispatch).to(output.dtype)

        return hook


def _with_row(rows: Tensor) -> Tensor:
    """Return [n, ...] with a row of zeros behind."""
    return torch.cat([rows.detach(), rows.new_zeros(1, *rows.shape[1:])])


def _only(hidden: Tensor, number: int, size: int) -> Dispatch:
    """Return the dispatch of one expert that computes every token of [B, T, H]."""
    tokens = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
    weights = hidden.new_zeros(len(tokens), size)
    weights[:, number] = 1.0
    places = tuple(slice(0, len(tokens)) if n == number else slice(0, 0) for n in range(size))
    return Dispatch(weights, tokens, places)

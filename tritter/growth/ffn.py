"""A feed-forward block that grows, for models of one's own."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from tritter.errors import Problem, RequestError, nearest
from tritter.growth.growable import GrowableLayer
from tritter.growth.keywords import GrowthKeywords, made_grower
from tritter.growth.places import FfnPlace
from tritter.growth.plain_loop import PlainLoop

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
}


class GrowableFFN(GrowableLayer, nn.Module):
    """y = down(σ(gate(x)) · up(x)), or down(σ(up(x))), whose neurons grow while it is trained.

    Args:
        hidden_size: of x and of y.
        intermediate_size: neurons that it begins with.
        activation: σ, by name or as a function of each element.
        gated: whether neurons have a gate.
        bias: of all projections.
        growth: see `tritter.growth.keywords.GrowthKeywords`.

    Raises:
        RequestError: a keyword or a value that there is not.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
        **growth: Unpack[GrowthKeywords],
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            reason = f"allowed is one of {', '.join(ACTIVATIONS)}, or a function"
            near = nearest(activation, ACTIVATIONS)
            raise RequestError(Problem("activation", activation, reason=reason, nearest=near))
        self.act_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        place = FfnPlace(
            layer=0,
            gate="gate_proj.weight" if gated else "up_proj.weight",
            up="up_proj.weight" if gated else None,
            down="down_proj.weight",
        )
        check_every = growth.get("check_every", 1)
        self._loop = PlainLoop(self, made_grower(growth), places=[place], check_every=check_every)

    @property
    def intermediate_size(self) -> int:
        """How many neurons there are."""
        return self.up_proj.out_features

    def forward(self, x: Tensor) -> Tensor:
        computed = self.up_proj(x)
        if self.gate_proj is None:
            computed = self.act_fn(computed)
        else:
            computed = self.act_fn(self.gate_proj(x)) * computed
        output: Tensor = self.down_proj(computed)
        self._loop.tokens.see(0, x, output, computed=computed)
        return output

    def get_extra_state(self) -> dict[str, Any]:
        """Return the growth so far, which goes along in `state_dict`."""
        return self._loop.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the shapes of a grown block before its weights are loaded."""
        self._loop.load_state_dict(state)

    def extra_repr(self) -> str:
        return f"intermediate_size={self.intermediate_size}"

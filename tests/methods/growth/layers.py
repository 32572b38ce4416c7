"""Small models with a growable layer in front, and a training loop for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritter import GrowableFFN, GrowableLinear
from tritter.methods.growth.growable import _GrowableLayer

GROWING: dict[str, Any] = {"trigger": "schedule", "growth_cooldown": 3, "max_growth_per_step": 4}


def pair(activation: nn.Module, *, out: int = 3, bias: bool = True, **growth: Any) -> nn.Sequential:
    reader = nn.Linear(12, out, bias=bias)
    return nn.Sequential(
        GrowableLinear(8, 12, bias, consumer=reader, **{**GROWING, **growth}), activation, reader
    )


def block(*, gated: bool, out: int = 3, **growth: Any) -> nn.Sequential:
    activation = growth.pop("activation", "silu")
    ffn = GrowableFFN(8, 12, activation, gated=gated, **{**GROWING, **growth})
    return nn.Sequential(ffn, nn.Linear(8, out))


MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "linear, relu": lambda **growth: pair(nn.ReLU(), **growth),
    "linear, gelu": lambda **growth: pair(nn.GELU(), **growth),
    "linear, no bias": lambda **growth: pair(nn.Tanh(), bias=False, **growth),
    "gated": lambda **growth: block(gated=True, **growth),
    "gated, biases": lambda **growth: block(gated=True, bias=True, **growth),
    "plain, biases": lambda **growth: block(gated=False, bias=True, activation="gelu", **growth),
}


def growing(model: nn.Sequential) -> _GrowableLayer:
    layer = model[0]
    assert isinstance(layer, _GrowableLayer)
    return layer


def adam(model: nn.Module, rate: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)


def data(model: nn.Module, rows: int = 64, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(rows, 8, generator=generator).to(dtype)
    return x, torch.sin(x @ torch.randn(8, 3, generator=generator).to(dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> float:
    x, y = data(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()

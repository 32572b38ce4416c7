"""Options, growers and layers for the tests of growth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tritter.conf_folder import config_folder
from tritter.errors import Problem, raise_problems
from tritter.methods.growth.blocks import ActivationProbe, ActivationRecorder, FfnBlock
from tritter.methods.growth.grower import Grower
from tritter.methods.growth.initialisers import Initialiser, Layer
from tritter.methods.growth.triggers import GrowthOptions, Timing, Trigger
from tritter.options import read_options


def growth_options(name: str = "foam", **changes: Any) -> GrowthOptions:
    """Return the options of `conf/growth`, with changes."""
    path: Path = config_folder() / f"growth/{name}.yaml"
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    problems: list[Problem] = []
    del body["_target_"]
    options = read_options(GrowthOptions, {**body, **changes}, prefix="growth", problems=problems)
    raise_problems(problems)
    assert options is not None
    return options


def scheduled(*at: int) -> dict[str, Any]:
    """Return a `growth.trigger` that fires after these steps."""
    return {"name": "schedule", "at": list(at)}


def grower(
    options: GrowthOptions,
    *,
    max_steps: int | None = 12,
    seed: int = 0,
    trigger: Trigger | None = None,
    initialiser: Initialiser | None = None,
    tokens_per_step: int = 64,
) -> Grower:
    parts = {"trigger": trigger, "initialiser": initialiser}
    return Grower(
        replace(options, **{name: part for name, part in parts.items() if part is not None}),
        timing=Timing.of(options, max_steps=max_steps),
        seed=seed,
        tokens_per_step=tokens_per_step,
    )


def probes_of(
    model: nn.Module, input_ids: Tensor, *, max_tokens: int = 4096
) -> dict[int, ActivationProbe]:
    """Run one forward and backward pass; return the probes of the FFNs, with gradients in place."""
    seen, was = ActivationRecorder(max_tokens), model.training
    handles = seen.attach(model, FfnBlock.all_of(model))
    model.zero_grad()
    model.train()
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.train(was)
    for handle in handles:
        handle.remove()
    return seen.probes()


def layer_of(
    model: nn.Module, block: FfnBlock, probe: ActivationProbe, *, count: int = 4, seed: int = 0
) -> Layer:
    gate, up, down = block.weights(model)
    activation: Callable[[Tensor], Tensor] = block.activation(model)
    return Layer(
        gate=gate,
        up=up,
        down=down,
        activation=activation,
        probe=probe,
        sources=torch.arange(count),
        seed=seed,
    )

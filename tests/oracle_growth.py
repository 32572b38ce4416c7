"""Growth in memory: maps applied to a stock model's tensors, and gradients sent through them.

Nothing of `tritter.expand` or of the storage stands between, so a test over many shapes is quick,
and a map can be spoiled on purpose before it is applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests import oracle
from tests.oracle_qwen3 import float64_casts
from tritter.expansion import ExpansionStep
from tritter.families import Config, family_of
from tritter.parameter_map import Quantity, carried, map_tensor


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a grown model is from what the map promises.

    Args:
        logits: max |Δ logits| in float64.
        gradients: by parameter, max |gradient − mapped gradient| over the largest gradient of
            the tensor, where entries carry a history.
        compared: how many gradient entries that were.
    """

    logits: float
    gradients: dict[str, float]
    compared: int

    @property
    def worst_gradient(self) -> float:
        return max(self.gradients.values())


def config_of(model: PreTrainedModel) -> Config:
    return model.config.to_dict()


def stock_model(config: Config, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return a stock model of `config` with whatever weights."""
    options = {key: value for key, value in config.items() if key != "model_type"}
    built = AutoConfig.for_model(str(config["model_type"]), **options)
    return AutoModelForCausalLM.from_config(built, dtype=dtype).eval()


def logical_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a stock model's tensors by logical name; ties once."""
    config, state = config_of(model), model.state_dict()
    return {t.name: state[t.disk_name].detach() for t in family_of(config).logical_tensors(config)}


def grown(model: PreTrainedModel, steps: Sequence[ExpansionStep]) -> PreTrainedModel:
    """Return the stock model that `steps` make of `model`, in its dtype."""
    values = logical_state(model)
    for step in steps:
        maps = step.parameter_map.tensors
        values = {name: map_tensor(maps[name], values[maps[name].source]) for name in maps}
    target = steps[-1].target_config
    names = {t.name: t.disk_name for t in family_of(target).logical_tensors(target)}
    result = stock_model(target, dtype=next(model.parameters()).dtype)
    state = {names[name]: value for name, value in values.items()}
    missing, unexpected = result.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if target.get("tie_word_embeddings") else set()
    assert not unexpected
    assert set(missing) == tied
    return result


def mapped_gradients(
    steps: Sequence[ExpansionStep], gradient: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return disk name → (mapped gradient, mask of the entries that carry a history)."""
    source, target = steps[0].source_config, steps[-1].target_config
    family = family_of(source)
    values = {t.name: gradient[t.disk_name] for t in family.logical_tensors(source)}
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
    for step in steps:
        maps = step.parameter_map.tensors
        values = {
            name: map_tensor(tensor_map, values[tensor_map.source], quantity=Quantity.GRADIENT)
            for name, tensor_map in maps.items()
        }
        masks = {
            name: carried(tensor_map, masks[tensor_map.source]) for name, tensor_map in maps.items()
        }
    names = {t.name: t.disk_name for t in family.logical_tensors(target)}
    return {names[name]: (values[name], masks[name]) for name in values}


def errors(model: PreTrainedModel, steps: Sequence[ExpansionStep]) -> Errors:
    """Grow a float64 model and hold logits and gradients against the maps' promises."""
    ids = oracle.tokens(model.config.vocab_size)
    result = grown(model, steps)
    with float64_casts():
        difference = (oracle.logits(model, ids) - oracle.logits(result, ids)).abs().max()
        before, after = oracle.gradients(model, ids), oracle.gradients(result, ids)
    found, compared = {}, 0
    for name, (mapped, mask) in mapped_gradients(steps, before).items():
        compared += int(mask.sum())
        if bool(mask.any()):
            scale = after[name].abs().max().clamp(min=1e-6)
            found[name] = float((after[name] - mapped)[mask].abs().max() / scale)
    return Errors(float(difference), found, compared)

"""Growth in memory: maps applied to a stock model's tensors, and gradients sent through them.

Nothing of `tritter.transform.folder` or of the storage stands between, so a test over many shapes
is quick, and a map can be spoiled on purpose before it is applied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from tests import oracle
from tests.oracle.families import stock_of
from tritter.core.expansions import ResolvedExpansion
from tritter.core.families import Config, Model, pack_all, unpack_all
from tritter.core.parameter_map import Quantity, TensorMap
from tritter.transform import PlannedExpansion


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a grown model is from what the map promises.

    Args:
        logits: max |Δ logits| in float64.
        gradients: by name on disk, max |gradient − mapped gradient| over the largest gradient
            of the tensor, where entries carry a history.
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
    return stock_of(AutoConfig.for_model(str(config["model_type"]), **options), dtype=dtype)


def logical_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a stock model's tensors by logical name; ties once, experts one by one."""
    config = config_of(model)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return unpack_all(Model(config).layout("live"), state)


def grown(model: PreTrainedModel, steps: Sequence[ResolvedExpansion]) -> PreTrainedModel:
    """Return the stock model that `steps` make of `model`, in its dtype."""
    values = logical_state(model)
    for step in steps:
        values = {name: m.mapped(values.__getitem__) for name, m in maps_of(step).items()}
    target = steps[-1].target.config
    result = stock_model(target, dtype=next(model.parameters()).dtype)
    expected = {stored.name for stored in Model(target).layout("live")}
    state = pack_all(Model(target).layout("live"), values)
    assert state.keys() == expected
    missing, unexpected = result.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if target.get("tie_word_embeddings") else set()
    assert not unexpected
    assert set(missing) == tied
    return result


def masks_of(config: Config, steps: Sequence[ResolvedExpansion]) -> dict[str, Tensor]:
    """Return which entries of the result carry on what was known, by name in memory."""
    return PlannedExpansion(source=Model(config), steps=tuple(steps), seed=0).change.masks()


def maps_of(step: ResolvedExpansion) -> Mapping[str, TensorMap]:
    return step.parameter_map.tensors


def mapped_gradients(
    steps: Sequence[ResolvedExpansion], gradient: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return logical name → (mapped gradient, mask of the entries that carry a history)."""
    values = gradient
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
    for step in steps:
        maps = maps_of(step)
        values = {
            name: tensor_map.apply(values[tensor_map.source], quantity=Quantity.GRADIENT)
            for name, tensor_map in maps.items()
        }
        masks = {
            name: tensor_map.carried_mask(masks.__getitem__) for name, tensor_map in maps.items()
        }
    return {name: (values[name], masks[name]) for name in values}


def logical_gradients(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    config = config_of(model)
    return unpack_all(Model(config).layout("live"), oracle.gradients(model, input_ids))


def errors(model: PreTrainedModel, steps: Sequence[ResolvedExpansion]) -> Errors:
    """Grow a float64 model and hold logits and gradients against the maps' promises."""
    ids = oracle.tokens(model.config.vocab_size)
    result = grown(model, steps)
    with oracle.float64_casts():
        difference = (oracle.logits(model, ids) - oracle.logits(result, ids)).abs().max()
        before, after = logical_gradients(model, ids), logical_gradients(result, ids)
    target = steps[-1].target.config
    names = {t.name: t.disk_name for t in Model(target).tensors}
    found, compared = {}, 0
    for name, (expected, mask) in mapped_gradients(steps, before).items():
        compared += int(mask.sum())
        if bool(mask.any()):
            scale = after[name].abs().max().clamp(min=1e-6)
            found[names[name]] = float((after[name] - expected)[mask].abs().max() / scale)
    return Errors(float(difference), found, compared)

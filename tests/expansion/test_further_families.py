"""What the further families add to the mechanisms that the others prove, and each of them once.

Their part in the generic tests of every family is in the slow suite.
"""

from pathlib import Path

import pytest

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import FURTHER, tiny
from tritter.errors import RequestError
from tritter.expand import expand
from tritter.expansion import ExpansionSpec, Interpolate, LlamaPro, Moe, Stack, Width, build_steps
from tritter.families import family_of

IDENTITY, STOCK, GRADIENT = 1e-10, 1e-4, 1e-9


@pytest.mark.parametrize("family", FURTHER)
def test_stock_classes_compute_the_same_from_disk(tmp_path: Path, family: str) -> None:
    model = tiny(family, tie_word_embeddings=True)
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [Width(init="net2net"), Interpolate(identity_init=True)]
    result = expand(source, tmp_path / "result", specs)
    after = oracle.stock(result.folder)
    assert after.config.model_type == family
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
    assert sum(p.numel() for p in after.parameters()) == result.parameters_after


@pytest.mark.parametrize("family", FURTHER)
def test_the_gradient_is_the_mapped_one(family: str) -> None:
    model = tiny(family).double()
    size = 36 if family_of(oracle_growth.config_of(model)).heads_divide_hidden else 37
    specs: list[ExpansionSpec] = [LlamaPro(), Width(hidden_size=size, intermediate_size=61)]
    found = oracle_growth.errors(model, build_steps(model.config.to_dict(), specs, seed=0))
    assert found.logits < IDENTITY
    assert found.worst_gradient < GRADIENT, max(found.gradients, key=found.gradients.__getitem__)
    assert found.compared >= sum(parameter.numel() for parameter in model.parameters())


def test_layers_without_rotary_positions_stay_so_wherever_they_are_copied_to() -> None:
    model = tiny("smollm3", use_sliding_window=False).double()
    (step,) = build_steps(model.config.to_dict(), [Stack(target_layers=6)], seed=0)
    assert model.config.no_rope_layers == [1, 0, 1]
    assert step.target_config["no_rope_layers"] == [1, 0, 1, 1, 0, 1]  # of 6 alone: 1, 0, 1, 0, ...
    (step,) = build_steps(model.config.to_dict(), [LlamaPro(positions=(0,))], seed=0)
    assert step.target_config["no_rope_layers"] == [1, 1, 0, 1]
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    step.target_config["no_rope_layers"] = [1, 0, 1, 0]
    assert oracle_growth.errors(model, [step]).logits > 1e-3


def test_the_constants_of_granite_stay_whatever_grows() -> None:
    model = tiny("granite").double()
    config = model.config.to_dict()
    (step,) = build_steps(config, [Width()], seed=0)
    names = [name for name in config if name.endswith(("_multiplier", "logits_scaling"))]
    assert len(names) == 4
    for name in names:
        assert step.target_config[name] == config[name]
        other = {**step.target_config, name: config[name] * 2**0.5}
        step_of_other = type(step)(
            **{f: getattr(step, f) for f in step.__dataclass_fields__} | {"target_config": other}
        )
        assert oracle_growth.errors(model, [step_of_other]).logits > 1e-3, name


@pytest.mark.parametrize("family", FURTHER)
def test_none_has_a_partner_with_experts_that_would_compute_the_same(family: str) -> None:
    with pytest.raises(RequestError, match="without a MoE partner"):
        build_steps(tiny(family).config.to_dict(), [Moe()], seed=0)

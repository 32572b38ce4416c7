"""Shapes reachable with one expansion: valid, in ascending order, found by parameter count."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig

from tests.oracle import tiny_llama
from tritter.core.expansions import Dus, Layers, LlamaPro, Width, target_model
from tritter.core.families import Config, Model
from tritter.core.families.presets import PRESETS
from tritter.errors import RequestError
from tritter.planning.shapes import GrowthMethods, Shape, _WidthGrid
from tritter.planning.strategy import PathRequest

SMALL: Config = tiny_llama().config.to_dict()
WIDTHS = GrowthMethods(width=Width())


@pytest.mark.quick_cases(9)
@pytest.mark.parametrize("grid", get_args(_WidthGrid))
@pytest.mark.parametrize("name", PRESETS)
def test_wider_shapes_are_real_ones(name: str, grid: _WidthGrid) -> None:
    config = PRESETS[name].config()
    old = Model(config).sizes
    shapes = [
        Shape.of(Model(config), spec) for spec in WIDTHS.width_specs(Model(config), grid=grid)
    ]
    assert shapes or grid == "fine"  # without key/value groups, every size is proportional
    for shape in shapes:
        new = shape.model.sizes
        assert old.hidden_size < new.hidden_size <= 2 * old.hidden_size
        assert new.hidden_size % new.num_attention_heads == 0
        assert new.head_dim == old.head_dim
        assert new.intermediate_size % 256 == 0
        ratio = old.intermediate_size / old.hidden_size
        assert new.intermediate_size / new.hidden_size == pytest.approx(ratio, rel=0.07)
        growth = new.hidden_size / old.hidden_size
        grown = (old.num_attention_heads * growth, old.num_key_value_heads * growth)
        if grid != "fine":
            assert (new.num_attention_heads, new.num_key_value_heads) == grown
        else:
            assert not all(map(float.is_integer, grown))
    assert [s.parameters for s in shapes] == sorted(s.parameters for s in shapes)


def test_fine_widths_are_steps_of_a_sixteenth_as_round_as_the_source() -> None:
    """As in Gemma 3 270M: 4 heads of 256, where a sixteenth of 640 is no multiple of 64."""
    sizes = {"hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = Model({**SMALL, **sizes, "head_dim": 256})
    widths = [spec.hidden_size for spec in WIDTHS.width_specs(model, grid="fine")]  # type: ignore[attr-defined]
    assert widths == list(range(704, 1280, 64))


def test_depth_takes_what_the_method_takes() -> None:
    """From 3 layers, SOLAR's rule reaches 4 and 6; identity blocks reach every count."""
    config = {**SMALL, "num_hidden_layers": 3}
    solar = GrowthMethods(depth=Dus()).depth_specs(Model(config))
    assert [s.target_layers for s in solar] == [4, 6]  # type: ignore[attr-defined]
    pro = GrowthMethods(depth=LlamaPro())
    deeper = pro.depth_specs(Model(config))
    assert [s.target_layers for s in deeper] == [4, 5, 6]  # type: ignore[attr-defined]
    slender = pro.depth_specs(Model(config), min_aspect_ratio=24 / 5)
    assert [s.target_layers for s in slender] == [4, 5]  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(st.floats(1.01, 2.5))
def test_the_nearest_shape_is_that_of_a_plain_search(growth: float) -> None:
    config = PRESETS["tritter_350m"].config()
    specs = WIDTHS.width_specs(Model(config), grid="proportional")
    wanted = growth * Model(config).num_parameters
    counts = [target_model(Model(config), [spec]).num_parameters for spec in specs]
    found = Shape.nearest(Model(config), specs, wanted)
    assert found is not None
    best = min(counts, key=lambda count: max(count / wanted, wanted / count))
    assert found.parameters == best


def test_methods_are_sorted_by_direction() -> None:
    width, depth = Width(init="net2net"), LlamaPro()
    model = Model(SMALL)
    assert GrowthMethods.of([width, depth], model) == GrowthMethods(depth=depth, width=width)
    assert GrowthMethods.of([], model) == GrowthMethods(depth=Dus(), width=Width())
    assert GrowthMethods.of([depth], model) == GrowthMethods(depth=depth)


def test_layer_norms_are_widened_by_copies_unless_another_method_is_asked_for() -> None:
    names = {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256}
    config = {**names, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
    source = Model(GPTNeoXConfig(**config).to_dict())
    request = {"source": source, "target_parameters": 924_416}
    methods = GrowthMethods.of([], source)
    wider = PathRequest(**request, strategy="width_first", methods=methods)
    (shapes,) = wider.find_paths().values()
    assert shapes[0].model.sizes.hidden_size == 128
    fresh = GrowthMethods.of([Width()], source)
    with pytest.raises(RequestError, match=r"LayerNorms grow in width only with .*=net2net"):
        PathRequest(**request, strategy="width_first", methods=fresh).find_paths()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([Dus(), LlamaPro()], "dus, llama_pro: both grow depth"),
        ([Width(hidden_size=64)], r"expansion\.width\.hidden_size = 64: the plan chooses"),
        ([Dus(target_layers=6)], r"expansion\.dus\.target_layers = 6"),
        ([Layers(sources=(0, 0, 1))], "layers: it lists the layers of the result"),
    ],
)
def test_methods_that_cannot_be_planned_are_refused(specs: list, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GrowthMethods.of(specs, Model(SMALL))

"""From a parameter count to the nearest real shape."""

from types import SimpleNamespace

import pytest

from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    LlamaPro,
    Stack,
    Width,
    target_model,
)
from tritter.core.expansions.targets import reach_parameters
from tritter.core.families import Config, Model, llama_config
from tritter.errors import RequestError


def config(**changes: object) -> Config:
    """A shape of 1.6 B parameters: 24 layers of 2048 with a Llama FFN of 5504."""
    shape = {
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5504,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "max_position_embeddings": 4096, "initializer_range": 0.02,
    }  # fmt: skip
    return llama_config(**{**shape, **changes})  # type: ignore[arg-type]


def reached(spec: ExpansionSpec, target: int, **changes: object) -> tuple[ExpansionSpec, int]:
    source = config(**changes)
    (found,) = reach_parameters(Model(source), [spec], target)
    return found, Model(target_model(Model(source), [found]).config).num_parameters


def test_dus_picks_the_even_layer_count_that_comes_nearest() -> None:
    found, count = reached(Dus(), 2_300_000_000)
    assert isinstance(found, Dus) and found.target_layers == 42
    for layers in (40, 44):
        other = Model(
            target_model(Model(config()), [Dus(target_layers=layers)]).config
        ).num_parameters
        assert abs(other - 2.3e9) > abs(count - 2.3e9)


def test_width_picks_a_hidden_size_the_family_accepts() -> None:
    found, count = reached(Width(init="net2net"), 7_000_000_000)
    assert isinstance(found, Width) and found.init == "net2net"
    assert found.hidden_size is not None and found.hidden_size % 16 == 0
    assert abs(count - 7e9) < 0.05 * 7e9


def test_llama_pro_picks_a_layer_count() -> None:
    found, count = reached(LlamaPro(), 2_000_000_000)
    assert isinstance(found, LlamaPro) and found.target_layers is not None
    assert abs(count - 2e9) < 30e6


def test_stack_takes_whole_copies_unless_told_otherwise() -> None:
    found, _ = reached(Stack(identity_init=True), 3_700_000_000)
    assert found == Stack(target_layers=72, identity_init=True)
    found, count = reached(Stack(partial=True), 3_100_000_000)
    assert isinstance(found, Stack) and found.target_layers is not None and found.partial
    assert found.target_layers % 24
    assert abs(count - 3.1e9) < 30e6
    with pytest.raises(RequestError, match="more than 10 % off"):
        reached(Stack(), 3_100_000_000)


def test_interpolate_picks_any_layer_count() -> None:
    found, count = reached(Interpolate(), 4_000_000_000)
    assert isinstance(found, Interpolate) and found.target_layers is not None
    assert found.target_layers > 48
    assert abs(count - 4e9) < 30e6


def test_what_cannot_be_reached_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"has 2,\d+,\d+,\d+ parameters \(target_layers 48\)"):
        reach_parameters(Model(config()), [Dus()], 7_000_000_000)


def test_a_target_that_is_not_above_the_model_is_refused_as_that() -> None:
    for target in (1_000_000, Model(config()).num_parameters):
        with pytest.raises(RequestError, match="already has"):
            reach_parameters(Model(config()), [Width()], target)


def test_it_must_be_open_and_clear_what_grows() -> None:
    with pytest.raises(RequestError, match="dus, width"):
        reach_parameters(Model(config()), [Dus(), Width()], 7_000_000_000)
    for spec in (Stack(target_layers=48), Interpolate(target_layers=30)):
        with pytest.raises(RequestError, match=f"{spec.name} already has a target"):
            reach_parameters(Model(config()), [spec], 7_000_000_000)
    with pytest.raises(RequestError, match="interpolated has no size"):
        own = SimpleNamespace(name="interpolated", expansion_type="depth")
        reach_parameters(Model(config()), [own], 7_000_000_000)  # type: ignore[list-item]
    with pytest.raises(RequestError, match="hidden_size 4096"):
        reach_parameters(Model(config()), [Width(hidden_size=4096)], 7_000_000_000)


def test_a_hidden_size_for_a_target_is_one_that_quantisers_take() -> None:
    found, count = reached(Width(), 5_000_000_000, hidden_size=2560, num_attention_heads=20,
                           num_key_value_heads=20)  # fmt: skip
    assert isinstance(found, Width) and found.hidden_size is not None
    assert found.hidden_size % 64 == 0 and abs(count - 5e9) < 0.1 * 5e9
    found, count = reached(Width(multiple_of=256), 5_000_000_000)
    assert isinstance(found, Width) and found.hidden_size is not None
    assert found.hidden_size % 256 == 0


def test_where_such_a_size_is_too_far_another_is_chosen() -> None:
    odd = {"num_attention_heads": 62, "num_key_value_heads": 62}
    found, count = reached(Width(), 2_300_000_000, hidden_size=1984, **odd)
    assert isinstance(found, Width) and found.multiple_of == 1
    assert abs(count - 2.3e9) < 0.1 * 2.3e9
    with pytest.raises(RequestError, match="more than 10 % off"):
        reached(Width(multiple_of=64), 2_300_000_000, hidden_size=1984, **odd)


def test_heads_that_do_not_divide_the_hidden_size_do_not_coarsen_it() -> None:
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
             "num_key_value_heads": 2}  # fmt: skip
    llama = config(**shape)
    source = Model({**llama, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    target = source.num_parameters * 11 // 10
    for spec, multiple in ((Width(), 64), (Width(multiple_of=32), 32)):
        (found,) = reach_parameters(source, [spec], target)
        assert isinstance(found, Width) and found.hidden_size is not None
        assert found.hidden_size % multiple == 0 and found.multiple_of == spec.multiple_of

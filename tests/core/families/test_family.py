"""The tables against stock transformers: names, shapes, counts and refusals."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from tests import oracle
from tests.oracle.families import HEADS_DIVIDE_HIDDEN, OWN, SPARSE, final_norm_of, tiny
from tritter.core.families import FAMILIES, Config, Model, Port, family_of, llama_config
from tritter.core.families.config_file import read_model_file
from tritter.core.models import read_model
from tritter.errors import RequestError, TritterError

VARIANTS = [
    {"tie_word_embeddings": tied, "attention_bias": attention, "mlp_bias": mlp}
    for tied, attention, mlp in product([False, True], repeat=3)
]


def _plain(model: PreTrainedModel) -> Config:
    return model.config.to_dict()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_names_shapes_and_counts_are_those_of_the_stock_model(variant: dict[str, bool]) -> None:
    model = oracle.tiny_llama(**variant)
    config = _plain(model)
    found = Model(config).shapes
    shapes = {t.disk_name: found[t.name] for t in Model(config).tensors}
    # named_parameters has a tied head once, as the files do.
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert Model(config).num_parameters == sum(p.numel() for p in model.parameters())


# Family → config keys that add or remove tensors, except the tie
FLAGS: dict[str, list[dict[str, object]]] = {
    "qwen3": [{"attention_bias": True}],
    "smollm3": [{"attention_bias": True, "mlp_bias": True}],
    "granite": [{"attention_bias": True, "mlp_bias": True}],
    "olmo2": [{"attention_bias": True}],
    "glm4": [{"attention_bias": False}],
    "gemma2": [{"attention_bias": True}],
    "gemma3_text": [{"attention_bias": True}],
    "gpt_neox": [{"attention_bias": False}],
    "qwen2_moe": [{"qkv_bias": False}, {"mlp_only_layers": [], "decoder_sparse_step": 2}],
    "qwen3_moe": [{"attention_bias": True}, {"mlp_only_layers": [0], "decoder_sparse_step": 1}],
}
CASES = [
    pytest.param(family, {"tie_word_embeddings": tied, **flags}, id=f"{family}-{tied}-{flags}")
    for family in OWN
    for tied in (False, True)
    for flags in ({}, *FLAGS.get(family, []))
]


def test_every_table_has_its_oracle() -> None:
    assert set(OWN) == set(FAMILIES)
    assert {f for f in OWN if FAMILIES[f].heads_divide_hidden} == set(HEADS_DIVIDE_HIDDEN)
    assert {f for f in OWN if FAMILIES[f].has_experts} == set(SPARSE)


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(("family", "options"), CASES)
def test_names_in_memory_and_on_disk_are_those_of_the_stock_class(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    model, table = tiny(family, **options), FAMILIES[family]
    config = _plain(model)
    live = {stored.name: stored.shape for stored in Model(config).layout("live")}
    assert live == {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved == {stored.name: stored.shape for stored in Model(config).layout("hub")}
    assert Model(config, table).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.quick_cases(11)
@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("is_odd", [False, True])
def test_the_class_refuses_what_the_table_says_it_refuses(family: str, is_odd: bool) -> None:
    """Some families require a hidden size divisible by the number of heads."""
    if not (is_odd and FAMILIES[family].heads_divide_hidden):
        assert tiny(family, hidden_size=23 if is_odd else 24).config.hidden_size in (23, 24)
        return
    message = r"not (a multiple of|divisible by) the number of attention|divisible by num_heads"
    with pytest.raises(Exception, match=message):
        tiny(family, hidden_size=23)


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("family", OWN)
def test_what_a_block_adds_to_the_stream(family: str) -> None:
    """With these tensors zeroed a model passes its embeddings to the final norm."""
    model, table = tiny(family), FAMILIES[family]
    config = _plain(model)
    silent = {
        stored.name: -table.norm_offset if part.tensor.axes[0].port is Port.GAIN else 0.0
        for stored in Model(config).layout("live")
        for part in stored.parts
        if table.branch_output(part.tensor)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in silent:
                parameter.fill_(silent[name])
        output = model.base_model(input_ids=oracle.tokens(), output_hidden_states=True)
    embedded, *_, last = output.hidden_states  # as the model scales them
    torch.testing.assert_close(last, final_norm_of(model)(embedded))


def test_head_dim_need_not_be_hidden_size_over_heads() -> None:
    model = oracle.tiny_llama(head_dim=10)
    config = _plain(model)
    assert Model(config).sizes.query_size == 40
    assert Model(config).sizes.key_value_size == 20
    assert Model(config).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[-1:], ids=str)
def test_every_axis_lives_in_a_space_and_logical_names_are_unique(
    variant: dict[str, bool],
) -> None:
    config = _plain(oracle.tiny_llama(**variant))
    tensors = Model(config).tensors
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        assert "{layer}" not in tensor.name + tensor.disk_name
        is_norm = [axis.port is Port.GAIN for axis in tensor.axes]
        assert not any(is_norm) or len(is_norm) == 1
    spaces = {axis.space.name for tensor in tensors for axis in tensor.axes}
    assert {"vocab", "residual", "layers.2.ffn", "head_input"} <= spaces
    assert "layers.3.ffn" not in spaces


def test_a_tensor_knows_its_kind_its_layer_and_its_expert() -> None:
    config = _plain(tiny("qwen2_moe"))
    known = {t.name: t for t in Model(config).tensors}
    keys = {name: (t.kind, t.layer, t.expert) for name, t in known.items()}
    assert len(set(keys.values())) == len(keys)
    assert keys["embed"] == ("embed", None, None)
    assert keys["layers.1.ffn.gate"] == ("ffn.gate", 1, None)
    assert keys["layers.2.experts.3.down"] == ("experts.down", 2, 3)
    assert keys["layers.0.shared_expert.up"] == ("shared_expert.up", 0, None)
    spaces = [axis.space for axis in known["layers.2.experts.3.down"].axes]
    assert [space.name for space in spaces] == ["residual", "layers.2.experts.3.ffn"]


def test_missing_sizes_get_the_defaults_of_transformers() -> None:
    config: Config = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "num_key_value_heads": None,
        "head_dim": None,
    }
    stock = LlamaConfig(**config)
    dimensions = FAMILIES["llama"].dimensions(config)
    assert dimensions.num_key_value_heads == stock.num_key_value_heads == 4
    assert dimensions.head_dim == stock.head_dim == 6


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("family", OWN)
def test_keys_that_a_config_may_lack_have_the_defaults_of_transformers(
    family: str, tmp_path: Path
) -> None:
    config, refused = tiny(family).config.to_dict(), set()
    for key in sorted(config.keys() - {"model_type", "architectures"}):
        folder = tmp_path / key
        folder.mkdir()
        lacking = {name: value for name, value in config.items() if name != key}
        (folder / "config.json").write_text(json.dumps(lacking))
        try:
            found = [read(folder).sizes for read in (read_model, read_model_file)]
        except (RequestError, TritterError):
            refused.add(key)
        else:
            assert found[0] == found[1], key
    # Sizes have no default
    assert not refused & {"n_positions", "max_position_embeddings", "num_key_value_heads"}


@pytest.mark.parametrize("value", [None, 0, -4, 2.5, "24", True])
def test_a_size_that_is_no_whole_number_is_refused(value: object) -> None:
    config = {**_plain(oracle.tiny_llama()), "hidden_size": value}
    with pytest.raises(RequestError, match="hidden_size = "):
        _ = Model(config).sizes


def test_a_checkpoint_is_matched_in_full() -> None:
    model = oracle.tiny_llama()
    config, names = _plain(model), set(dict(model.named_parameters()))
    matched = {stored.name: stored.parts[0].tensor for stored in Model(config).match(names)}
    assert set(matched) == names
    assert matched["model.layers.1.mlp.up_proj.weight"].name == "layers.1.ffn.up"
    with pytest.raises(TritterError, match=r"1 tensors are missing: lm_head\.weight"):
        Model(config).match(names - {"lm_head.weight"})
    with pytest.raises(
        TritterError, match=r"llama does not have: model\.layers\.0\.extra"
    ) as error:
        Model(config).match({*names, "model.layers.0.extra"})
    assert "missing" not in str(error.value)


def test_many_wrong_names_are_counted_and_five_are_shown() -> None:
    config = _plain(oracle.tiny_llama())
    with pytest.raises(TritterError, match=r"30 tensors are missing: .*\(25 more\)"):
        Model(config).match([])


def test_a_redundant_tied_head_is_allowed_and_not_counted() -> None:
    config = _plain(oracle.tiny_llama(tie_word_embeddings=True))
    names = {tensor.disk_name for tensor in Model(config).tensors}
    assert "lm_head.weight" not in names
    assert {s.name for s in Model(config).match({*names, "lm_head.weight"})} == names


@pytest.mark.parametrize("model_type", ["t5", "lama", None])
def test_an_unknown_model_type_is_refused(model_type: object) -> None:
    with pytest.raises(RequestError) as error:
        family_of({"model_type": model_type})
    assert f"'{model_type}'" in str(error.value)
    assert "the installed transformers has no causal language model" in str(error.value)
    assert "Did you mean" not in str(error.value)  # a similar name is not a similar model


def test_llama_config_is_what_transformers_makes_of_it() -> None:
    config = llama_config(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        max_position_embeddings=64,
        initializer_range=0.03,
    )
    options = {key: value for key, value in config.items() if key != "model_type"}
    stock = AutoConfig.for_model("llama", **options).to_dict()
    assert {key: stock[key] for key in config} == config


@pytest.mark.parametrize("step", [0, -1, "two", None])
def test_a_pattern_of_sparse_layers_that_is_none_is_refused(step: object) -> None:
    config = {**_plain(tiny("qwen3_moe")), "decoder_sparse_step": step}
    with pytest.raises(RequestError, match="decoder_sparse_step"):
        assert Model(config).num_parameters


def test_the_key_of_the_context_length_is_that_of_the_config() -> None:
    found = {"gpt2": "n_positions", "gptj": "n_positions", "llama": "max_position_embeddings"}
    for name, key in found.items():
        config = AutoConfig.for_model(name).to_dict()
        assert Model(config).positions_key == key and Model(config).position_limit == config[key]

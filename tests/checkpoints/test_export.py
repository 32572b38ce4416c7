"""Export: plain folders of one dtype that stock classes load, nothing of ours left in them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.checkpoints.test_folder import write_words
from tests.oracle import logits, relative_difference, saved, stock, tiny_llama, tokens
from tests.oracle.qwen3 import tiny_qwen3
from tests.storage.test_tensors import file_size_limit
from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.export import Exported, Weights
from tritter.checkpoints.folder import copy_small_files
from tritter.core.expansions import LlamaPro, Width
from tritter.core.models import load_model, read_model
from tritter.errors import RequestError, TritterError
from tritter.pipeline.trained import round_weights
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.transform import expand

MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3}


def weights_of(folder: Path) -> Weights:
    return Weights.of(Source.open(folder, read_model(folder)))


def export(folder: Path, destination: Path, **options: Any) -> Exported:
    return weights_of(folder).export(
        destination,
        artifacts=[partial(copy_small_files, folder)],
        **options,
    )


def held(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


# Selection biases, and attention sinks: some that files name otherwise (flint, hy_v3), some that no
# list names (lfm2_moe), and some that are float32 in float16 models alone (afmoe)
FLOAT32: dict[str, dict[str, Any]] = {
    "glm4_moe": {"n_routed_experts": 4},
    "flint": {"num_experts": 4},
    "hy_v3": {"num_experts": 4, "first_k_dense_replace": 1},
    "lfm2_moe": {"num_experts": 4, "layer_types": ["conv", "full_attention", "conv"]},
    "afmoe": {"num_experts": 4, "num_dense_layers": 1},
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("model_type", FLOAT32)
def test_16_bits_spare_the_tensors_that_stock_classes_keep_in_float32(
    tmp_path: Path, model_type: str
) -> None:
    """Rounded, the selection bias of sigmoid routers selects other experts."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    shape = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, **FLOAT32[model_type]}
    config = AutoConfig.for_model(model_type, **shape, **heads, **experts)
    model = AutoModelForCausalLM.from_config(config)
    for name, bias in model.state_dict().items():
        if name.endswith(("correction_bias", "expert_bias", "sinks")):
            bias.copy_(7.3 + 0.003 * torch.arange(len(bias)))
    saved(model, tmp_path / "whole")
    dtype = torch.float16 if model_type == "afmoe" else torch.bfloat16
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
    half.save_pretrained(tmp_path / "stock")
    export(tmp_path / "whole", tmp_path / "exported", dtype=dtype)
    expand(tmp_path / "whole", tmp_path / "expanded", [LlamaPro()], dtype=dtype)
    expected = held(tmp_path / "stock")
    assert {value.dtype for value in expected.values()} == {torch.float32, dtype}
    for name, value in held(tmp_path / "exported").items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name])
    ends = ("correction_bias", "expert_bias", "softmax_offset")
    biases = [v for n, v in held(tmp_path / "expanded").items() if n.endswith(ends)]
    assert biases and all(v.dtype == torch.float32 for v in biases)
    assert all(len(v.unique()) == len(v) for v in biases)
    # A run rounds the live model before it is scored
    whole = load_model(tmp_path / "whole")
    before = {name: value.clone() for name, value in whole.named_parameters()}
    round_weights(whole, str(dtype).removeprefix("torch."))
    for name, value in whole.named_parameters():
        live = half.get_parameter(name)
        assert torch.equal(value, live.float()), name
        assert live.dtype == dtype or torch.equal(value, before[name])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stock_loads_what_the_model_is_in_that_type(
    tmp_path: Path, family: str, is_tied: bool, dtype: torch.dtype
) -> None:
    model = MODELS[family](tie_word_embeddings=is_tied)
    base = saved(model, tmp_path / "base")
    exported = export(base, tmp_path / "out", dtype=dtype)
    assert {value.dtype for value in held(tmp_path / "out").values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert ("lm_head.weight" in held(tmp_path / "out")) != is_tied
    rounded = logits(stock(base, dtype=dtype), tokens())
    assert torch.equal(logits(stock(tmp_path / "out", dtype=dtype), tokens()), rounded)
    assert exported.num_bytes == sum(value.nbytes for value in held(tmp_path / "out").values())


def test_the_default_is_the_dtype_of_most_values_and_every_tensor_has_it(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    mixed = held(base)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].double()
    mixed["lm_head.weight"] = mixed["lm_head.weight"].bfloat16()
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    assert weights_of(base).widest_dtype == torch.float64
    export(base, tmp_path / "out")
    assert {value.dtype for value in held(tmp_path / "out").values()} == {torch.float32}


def test_of_a_grown_checkpoint_only_the_card_tells(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    write_words(base)
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    grown = expand(base, tmp_path / "grown", [Width(), LlamaPro()]).folder
    (grown / "state").mkdir()
    exported = export(grown, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    lineage = Lineage.read(grown)
    assert lineage is not None
    assert exported.origin_hash == lineage.model_hash
    card = (tmp_path / "out" / "README.md").read_text()
    for word in (lineage.model_hash, lineage.base_model_hash, exported.model_hash, "(grown)"):
        assert word in card
    assert "| width |" in card
    assert "| llama_pro |" in card
    assert "tritter.json" not in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b a").input_ids == [2, 1]
    # What was exported can be expanded again, as the start of a chain of its own
    again = expand(tmp_path / "out", tmp_path / "again", [LlamaPro()])
    assert again.lineage.base_model_hash == exported.model_hash


def test_shards_do_not_change_the_hash(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    whole = export(base, tmp_path / "whole")
    shards = export(base, tmp_path / "shards", max_shard_bytes=10_000)
    assert (whole.num_files, shards.num_files > 3) == (1, True)
    digests = {name: tensor_digest(name, value) for name, value in held(shards.folder).items()}
    assert whole.model_hash == shards.model_hash == merkle_hash(digests)
    assert torch.equal(
        logits(stock(shards.folder), tokens()), logits(stock(whole.folder), tokens())
    )


def test_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    weights = weights_of(saved(tiny_llama(), tmp_path / "base"))
    order: list[str] = []

    def read(name: str) -> Tensor:
        order.append(f"read {name}")
        return weights.read(name)

    replace(weights, read=read).export(
        tmp_path / "out",
        artifacts=(),
        progress=lambda done, total: order.append(f"{done}/{total} written"),
    )
    total = len(held(tmp_path / "out"))
    assert order[1::2] == [f"{done}/{total} written" for done in range(1, total + 1)]
    assert all(entry.startswith("read ") for entry in order[0::2])


# Experts


def _sizes(**more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "num_experts_per_tok": 2,
    }
    return sizes | more


def tiny_experts(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**_sizes(num_local_experts=4))).eval()
    sizes = _sizes(num_experts=4, moe_intermediate_size=12, head_dim=6)
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, mlp_only_layers=[0])).eval()
    sizes.pop("head_dim")
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=16)).eval()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_apart_and_together_are_the_same_model(tmp_path: Path, family: str) -> None:
    model = tiny_experts(family)
    base = saved(model, tmp_path / "base")
    export(base, tmp_path / "hub", dtype=torch.float32)
    export(base, tmp_path / "fused", dtype=torch.float32, expert_layout="live")
    assert set(held(tmp_path / "hub")) == set(held(base))
    assert any(name.endswith("experts.gate_up_proj") for name in held(tmp_path / "fused"))
    for name in ("hub", "fused"):
        loaded = stock(tmp_path / name)
        assert relative_difference(model, loaded, tokens()) < 1e-5
        expected = model.state_dict()
        assert all(torch.equal(v, expected[key]) for key, v in loaded.state_dict().items())
    back = export(tmp_path / "fused", tmp_path / "back", dtype=torch.float32)
    assert back.model_hash == export(base, tmp_path / "same", dtype=torch.float32).model_hash


# Refusals: nothing is written


def _refused(tmp_path: Path, base: Path, *words: str, **options: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TritterError) as error:
        export(base, tmp_path / "out", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(tmp_path.iterdir()) == before


def _changed(base: Path, value: float) -> None:
    tensors = held(base)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_values_that_the_type_cannot_hold(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    _changed(base, 1e6)
    _refused(tmp_path, base, "dtype = float16", "final_norm", "1e+06", dtype=torch.float16)
    export(base, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    _changed(base, value)
    _refused(tmp_path, base, "base: final_norm", "not finite")


def test_a_tensor_that_changed_since_its_lineage_was_written(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    grown = expand(base, tmp_path / "grown", [LlamaPro()]).folder
    _changed(grown, 2.0)
    _refused(tmp_path, grown, "model.norm.weight", "was changed since")


def test_what_stands_there_stays(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(RequestError, match="already exists"):
        export(base, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(RequestError, match=r"contains other files.*: mine"):
        export(base, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    (tmp_path / "out").rmdir()
    export(base, tmp_path / "out")
    export(base, tmp_path / "out", overwrite=True)
    with file_size_limit(10_000), pytest.raises(TritterError, match="could not be written"):
        export(base, tmp_path / "out", overwrite=True)
    assert stock(tmp_path / "out")

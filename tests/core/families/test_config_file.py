"""config.json read as JSON gives the values of transformers, for all keys of the tables."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests import oracle
from tests.oracle.families import OWN, key_of, tiny
from tritter.checkpoints.location import checkpoint_model
from tritter.core.families import Config, Model, family_of
from tritter.core.families.config_file import read_model_file
from tritter.core.models import read_model
from tritter.errors import TritterError

# Keys that a config may omit without changing its sizes
SILENT = (
    ("tie_word_embeddings",),
    ("head_dim", "num_key_value_heads"),
    ("attention_bias", "mlp_bias", "qkv_bias"),
    ("layer_types", "max_window_layers"),
    ("layer_types", "sliding_window"),
    ("use_sliding_window", "layer_types"),
    ("no_rope_layers", "layer_types"),
    ("no_rope_layers", "no_rope_layer_interval", "layer_types"),
    ("mlp_only_layers", "decoder_sparse_step"),
    ("num_local_experts",),
    ("rms_norm_eps",),
)


def table_values(config: Config) -> dict[str, Any]:
    """Return all values that a table derives from a config."""
    family = family_of(config)
    layers = range(Model(config).sizes.num_hidden_layers)
    return {
        "epsilon": config.get("rms_norm_eps"),
        "dimensions": Model(config).sizes,
        "tensors": Model(config).tensors,
        "parameters": Model(config).num_parameters,
        "active": Model(config).num_active_parameters,
        "ties": family.tied_names(config),
        "kinds": Model(config).layer_kinds,
        "windows": [family.attention_window(config, layer) for layer in layers],
    }


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("left_out", [(), *SILENT], ids=" ".join)
@pytest.mark.parametrize("name", OWN)
def test_what_is_left_out_is_what_transformers_takes(
    tmp_path: Path, name: str, left_out: tuple[str, ...]
) -> None:
    plain = json.loads(tiny(name).config.to_json_string(use_diff=False))
    # 32 heads of any size: the classes' own counts of key/value heads divide them
    sizes = {"num_attention_heads": 32, "hidden_size": 64, "head_dim": 2}
    plain |= {key_of(name, size): value for size, value in sizes.items()}
    if "num_local_experts" in plain:
        plain["num_experts"] = plain["num_local_experts"]
    kept = {key: value for key, value in plain.items() if key not in left_out}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert table_values(read_model_file(tmp_path).config) == table_values(
        read_model(tmp_path).config
    )


def test_a_null_is_a_size_that_follows(tmp_path: Path) -> None:
    plain = json.loads(tiny("llama").config.to_json_string(use_diff=False))
    plain |= {"num_key_value_heads": None, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert table_values(read_model_file(tmp_path).config) == table_values(
        read_model(tmp_path).config
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "t5"}, "t5"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None"),
        ({"sliding_window_pattern": 0, "layer_types": None}, "not a usable config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ],
)
def test_what_no_table_can_read_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    plain = json.loads(tiny("gemma3_text").config.to_json_string(use_diff=False)) | change
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(TritterError, match=words):
        read_model_file(tmp_path)


def test_a_run_is_checked_with_the_sizes_that_a_file_leaves_out(tmp_path: Path) -> None:
    folder = oracle.saved(tiny("gemma2"), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    plain = json.loads((folder / "config.json").read_text())
    del plain["head_dim"]
    (folder / "config.json").write_text(json.dumps(plain))
    model = checkpoint_model(str(folder))
    stock = AutoConfig.from_pretrained(folder)
    assert model is not None
    assert model.sizes.head_dim == stock.head_dim != stock.hidden_size // stock.num_attention_heads

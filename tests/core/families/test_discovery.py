"""Model types without a table: what discovery finds, against the tables and the stock classes."""

import json
import os
import random
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers import __version__ as transformers_version

import tritter
from tests.core.families.model_types import (
    MODEL_TYPES,
    PAGE,
    depth_requests,
    example,
    expanded,
    is_possible,
    measured,
)
from tests.oracle.families import OWN, tiny
from tritter.checkpoints import Lineage
from tritter.cli import main
from tritter.core.expansions import LlamaPro, Width
from tritter.core.expansions.targets import growth_examples
from tritter.core.families import FAMILIES, Config, Model, forward_flops, training_flops
from tritter.core.families.discovery import family
from tritter.core.families.discovery.configs import StockConfig
from tritter.core.families.discovery.family import DiscoveredFamily, shallow
from tritter.core.families.discovery.skeleton import layers_on_disk
from tritter.core.families.discovery.twin import Block, Twin
from tritter.core.models import read_model
from tritter.errors import RequestError, TritterError
from tritter.evaluation.jump import Jump

_between = Jump.of_folders
QUICK = ("llama", "gemma2", "gpt2", "qwen3_moe")
LENGTH = 20
IDS = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def full_matrix(names: tuple[str, ...]) -> list[Any]:
    """Return parameters of a test over the tables; those that are not quick are full."""
    marks = pytest.mark.full
    return [pytest.param(name, marks=() if name in QUICK else marks) for name in names]


def example_folder(model_type: str, place: Path, **changes: Any) -> Path:
    """Save a tiny random model of a type with the default config of its class."""
    folder = place / model_type
    Twin.of(example(model_type, **changes)).model.float().save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()  # float32, as experts require
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


# Against the tables


def tables(model_type: str) -> tuple[Config, DiscoveredFamily]:
    config = tiny(model_type).config.to_dict()
    return config, DiscoveredFamily.of(config)


@pytest.mark.parametrize("model_type", full_matrix(tuple(OWN)))
def test_it_zeroes_what_the_table_zeroes(model_type: str) -> None:
    config, found = tables(model_type)
    table = FAMILIES[model_type]
    expected = {t.disk_name for t in Model(config, table).tensors if table.branch_output(t)}
    names = {t.disk_name for t in Model(config, found).tensors if found.branch_output(t)}
    assert names == expected
    assert found.norm_offset == table.norm_offset or not any(found.writers.values())


@pytest.mark.parametrize("model_type", full_matrix(tuple(OWN)))
def test_names_shapes_and_counts_are_those_of_the_table(model_type: str) -> None:
    config, found = tables(model_type)
    table = FAMILIES[model_type]
    expected = {t.within or t.disk_name for t in Model(config, table).tensors}
    assert {t.disk_name for t in Model(config, found).tensors} == expected
    assert Model(config, found).num_parameters == Model(config, table).num_parameters
    assert Model(config, found).layer_kinds == Model(config, table).layer_kinds
    sizes, known = Model(config, found).sizes, Model(config, table).sizes
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        assert getattr(sizes, name) == getattr(known, name)


# Configs of deeper models


def deeper(sources: list[int], **config: Any) -> list[Config]:
    return [
        {key: each[key] for key in config}
        for each in StockConfig({"num_hidden_layers": 4, **config}).deeper(sources)
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": list("abab")}, {"layer_types": list("abbab")}),
        ({"attn_layers": [1, 3]}, {"attn_layers": [1, 2, 4]}),
        ({"moe_layers": [0, 1, 2, 3]}, {"moe_layers": [0, 1, 2, 3, 4]}),
        ({"moe_layer_end_index": 3}, {"moe_layer_end_index": 4}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
        ({"num_kv_shared_layers": 2}, {"num_kv_shared_layers": 2}),
        ({"num_kv_shared_layers": 3}, {"num_kv_shared_layers": 4}),
        ({"rescale_every": 4, "num_blocks": 4}, {"rescale_every": 5, "num_blocks": 5}),
        (
            {"per_layer_config": {"01": {"head_dim": 8}, "3": {"head_dim": 4}}},
            {
                "per_layer_config": {
                    "1": {"head_dim": 8},
                    "2": {"head_dim": 8},
                    "4": {"head_dim": 4},
                }
            },
        ),
    ],
)
def test_settings_per_layer_follow_the_copies(config: Config, expected: Config) -> None:
    assert deeper([0, 1, 1, 2, 3], **config)[0] == expected


def test_first_layers_of_another_kind_may_be_copied_or_not() -> None:
    found = deeper([0, 0, 1, 2, 3], first_k_dense_replace=1)
    assert found == [{"first_k_dense_replace": 1}, {"first_k_dense_replace": 2}]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (["model.layers.0.w", "model.layers.1.w"], "model.layers."),
        (["backbone.layers.0.w", "vision.blocks.0.w"], "backbone.layers."),
        # EXAONE in transformers 5.24: the class renames the list itself
        (["transformer.h.0.mlp.experts.0.w", "transformer.h.1.w", "vision.0.w"], "transformer.h."),
    ],
)
def test_layers_are_found_by_the_names_of_files(own: list[str], expected: str) -> None:
    assert layers_on_disk("model.layers", dict.fromkeys(["embed.weight", *own])) == expected


def test_a_repeated_pattern_becomes_a_list_of_layers() -> None:
    found = deeper([0, 1, 2, 2, 3], block_types=["a", "a", "b"])
    assert found[-1] == {"block_types": ["a", "a", "b", "b", "a"]}


def test_keys_that_a_file_omits_or_spells_otherwise_are_known() -> None:
    full = example("bloom", n_layer=2)
    plain = {key: value for key, value in full.items() if key not in ("n_head", "hidden_size")}
    for config in ({**plain, "num_attention_heads": 8, "n_embed": 64}, full):
        sizes = Model(config, DiscoveredFamily.of(config)).sizes
        assert (sizes.hidden_size, sizes.num_attention_heads) == (64, 8)


# Blocks


class Gain(nn.Module):
    """A norm whose gain is stored minus an offset."""

    def __init__(self, size: int, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(size).double()), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) * (self.offset + self.weight)


class Layer(nn.Module):
    """A pre-norm, post-norm or sandwich block with one branch of two matrices.

    In other kinds a vector or a number scales the stream, or two streams have half the size each.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, size = kind, 8
        self.up, self.down = (nn.Linear(size, size).double() for _ in range(2))
        self.norm = Gain(size, 1.0 if kind == "offset" else 0.0)
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(1 if kind == "number" else size).double())
        self.pair = nn.Linear(size, size // 2, bias=False).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "pre":
            return x + self.down(self.up(self.norm(x)).relu())
        if self.kind == "post":
            return self.norm(x + self.down(self.up(x).relu()))
        if self.kind in ("vector", "number"):
            return self.scale * (x + self.down(self.up(self.norm(x)).relu()))
        if self.kind == "two":
            return x + self.pair(self.norm(x)).repeat(1, 1, 2)
        return x + self.norm(self.down(self.up(x).relu()))


def writers(kind: str) -> dict[str, float]:
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    layer = Layer(kind)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found = Block(layer, (hidden,), {}, hidden).writers()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    return found


def test_the_smallest_set_that_writes_the_stream_is_found() -> None:
    assert writers("pre") == {"down.weight": 0.0, "down.bias": 0.0}
    assert writers("sandwich") == {"norm.weight": 0.0}
    assert writers("offset") == {"norm.weight": -1.0}
    assert writers("two") == {"pair.weight": 0.0}


@pytest.mark.parametrize("kind", ["vector", "number"])
def test_what_scales_the_stream_becomes_one(kind: str) -> None:
    assert writers(kind) == {"scale": 1.0, "down.weight": 0.0, "down.bias": 0.0}


def test_a_norm_of_the_stream_itself_is_refused() -> None:
    with pytest.raises(RequestError, match="post-norm"):
        writers("post")


# Growth from files


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "model_type",
    [
        *("opt", "doge", "gemma4_text"),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("starcoder2", "gpt_oss")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("mamba", "deepseek_v3")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("gemma3", "rwkv", "blt")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("dbrx", "xlstm", "zaya")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("gemma4", "dots3_note")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("qwen4_exp", "qwen4_exp_text")),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("gemma4_unified",)),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("gemma4_unified_text",)),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("dots3_note_text",)),
    ],
)
def test_new_layers_keep_the_logits_and_learn(model_type: str, tmp_path: Path) -> None:
    few = {"num_hidden_layers": 6} if model_type in ("deepseek_v3", "doge", "gemma4_text") else {}
    folder = example_folder(model_type, tmp_path, **few)
    result = tritter.expand(folder, "llama_pro", output=tmp_path / "grown")
    before, after = logits(folder), logits(result)
    assert float((after - before).abs().max()) < 1e-5 * float(before.std())
    if untrained := untrained_after_two_steps(result):  # such as image encoders and indexers
        assert untrained <= untrained_after_two_steps(folder)


def untrained_after_two_steps(folder: Path) -> set[str]:
    """Return the parameters that two steps of AdamW leave without a gradient, of all layers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: set[str] = set()
    draws = torch.Generator().manual_seed(1)
    for _ in range(2):
        input_ids = torch.randint(3, 60, (8, 32), generator=draws)
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    left = [n for n, p in model.named_parameters() if p.requires_grad and n not in seen]
    return {re.sub(r"\.\d+\.", ".N.", name) for name in left}


SHARED = {"num_hidden_layers": 12, "num_kv_shared_layers": 6}


@pytest.mark.parametrize(
    ("model_type", "changes", "method", "options"),
    [
        ("gpt_neox_japanese", {"num_hidden_layers": 4}, "llama_pro", {"positions": [0, 2]}),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in (
                ("gemma4_text", SHARED, "llama_pro", {"positions": [0, 7]}),
                ("zamba2", {}, "llama_pro", {"positions": [5, 7]}),
                ("hy_v4", {}, "llama_pro", {"positions": [0, 2]}),
                ("diffllama", {}, "llama_pro", {"positions": [15]}),
                ("jamba", {}, "stack", {"identity_init": True}),
            )
        ),
    ],
)
def test_options_copy_the_layers_that_can_be_copied(
    model_type: str,
    changes: dict[str, Any],
    method: str,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = example_folder(model_type, tmp_path, **changes)
    with pytest.raises(RequestError, match="position"):
        tritter.expand(folder, "llama_pro", output=tmp_path / "grown")
    result = tritter.expand(folder, method, output=tmp_path / "grown", **options)
    before, after = logits(folder), logits(result)
    assert float((after - before).abs().max()) < 1e-5 * float(before.std())


SWAPPED = (1, 0, *range(2, 8))


@pytest.mark.parametrize(
    ("model_type", "sources"),
    [
        ("gemma4_text", SWAPPED),
        pytest.param("gemma3n_text", SWAPPED, marks=pytest.mark.full),
        pytest.param("opt", tuple(reversed(range(8))), marks=pytest.mark.full),
    ],
)
def test_layers_that_are_moved_there_and_back_compute_the_same(
    model_type: str, sources: tuple[int, ...], tmp_path: Path
) -> None:
    """Blocks outside the layers follow: Gemma has an embedding with a block for each layer."""
    changes = {"num_hidden_layers": 8, "num_kv_shared_layers": 0}
    folder = example_folder(model_type, tmp_path, **changes)
    moved = tritter.expand(folder, "layers", sources=sources, output=tmp_path / "moved")
    back = tritter.expand(moved, "layers", sources=sources, output=tmp_path / "back")
    before, after = logits(folder), logits(moved)
    assert float((after - before).abs().max()) > 1e-2 * float(before.std())
    assert torch.equal(logits(back), before)


@pytest.mark.parametrize(
    ("sources", "identity"), [([3, 0, 1, 2, 3], [0]), ([0, 1, 2, 3, 3, 3], [3, 4])]
)
def test_identities_that_move_layers_are_verified_on_the_twin(
    sources: list[int], identity: list[int], tmp_path: Path
) -> None:
    folder = example_folder("diffllama", tmp_path, num_hidden_layers=4)
    options = {"sources": sources, "identity": identity}
    with pytest.raises(RequestError, match="depends on their position"):
        tritter.expand(folder, "layers", output=tmp_path / "grown", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": [0, 1, 2, 3, 4]}, "gemma4_text derives the kind of a layer from its position"),
        ({"sources": [*range(8), 6], "identity": True}, "no config has these copies"),
    ],
)
def test_a_layer_whose_kind_the_class_would_change_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The class gives full attention to the last layer of Gemma 4, whatever its config says."""
    folder = example_folder("gemma4_text", tmp_path, num_hidden_layers=8, num_kv_shared_layers=0)
    with pytest.raises(RequestError, match=message):
        tritter.expand(folder, "layers", output=tmp_path / "grown", **options)
    assert not (tmp_path / "grown").exists()


def test_dropped_layers_and_identities_without_a_table(tmp_path: Path) -> None:
    folder = example_folder("opt", tmp_path)
    spec = {"sources": (3, *range(12)), "identity": (0,)}
    exact = tritter.expand(folder, "layers", output=tmp_path / "exact", **spec)
    assert torch.equal(logits(exact), logits(folder))
    fewer = tritter.expand(exact, "layers", sources=[*range(1, 12)], output=tmp_path / "fewer")
    assert AutoModelForCausalLM.from_pretrained(fewer).config.num_hidden_layers == 11


def test_a_kind_of_layer_without_identity_refuses_its_own_copies(tmp_path: Path) -> None:
    folder = example_folder("rwkv", tmp_path, num_hidden_layers=4)
    with pytest.raises(RequestError, match=r"layer 0: .*; use other positions, dus or stack"):
        tritter.expand(folder, "llama_pro", positions=[0], output=tmp_path / "grown")


def with_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_5_text", "mtp.fc.weight"),
        pytest.param("glm4_moe", "model.layers.46.eh_proj.weight", marks=pytest.mark.slow),
    ],
)
def test_heads_for_later_tokens_are_left_out(
    model_type: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stock classes do not read them; other unknown tensors are refused."""
    folder = example_folder(model_type, tmp_path, num_hidden_layers=4)
    with_tensors(folder, lambda tensors: tensors | {name: torch.ones(4, 4)})
    out = tmp_path / "out"
    words = ["expand", str(folder), "--method", "llama-pro", "--output", str(out)]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == [name]
    assert main(words) == 0
    assert "left out" in (text := capsys.readouterr().out) and name in text
    assert torch.equal(logits(out), logits(folder))
    assert name not in load_file(out / "model.safetensors")
    with_tensors(folder, lambda tensors: tensors | {"other.weight": torch.ones(4)})
    with pytest.raises(TritterError, match=r"does not have: other\.weight"):
        tritter.expand(folder, "llama_pro", output=tmp_path / "refused")


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_text_of_a_multimodal_model_grows(tied: bool, tmp_path: Path) -> None:
    """AutoModelForCausalLM loads Qwen3.5 without its encoder, from files with other names."""
    text = Twin.of(example("qwen3_5_text", num_hidden_layers=4, tie_word_embeddings=tied))
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    text_config: dict[str, Any] = text.model.config.to_dict()  # type: ignore[operator, union-attr]
    vision |= {"out_hidden_size": text_config["hidden_size"], "patch_size": 4}
    config = Qwen3_5Config(text_config=text_config, vision_config=vision)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    folder, out = tmp_path / "whole", tmp_path / "out"
    Qwen3_5ForConditionalGeneration(config).float().save_pretrained(folder)
    names = load_file(folder / "model.safetensors")
    assert {"model.language_model.norm.weight", "model.visual.pos_embed.weight"} <= names.keys()
    tritter.expand(folder, "llama_pro", output=out)
    assert torch.equal(logits(out), logits(folder))
    found = json.loads((out / "config.json").read_text())
    assert found["model_type"] == "qwen3_5_text" and "vision_config" not in found
    assert found["architectures"] == ["Qwen3_5ForCausalLM"]


@pytest.mark.full
def test_the_decoder_grows_and_the_image_encoder_stays(tmp_path: Path) -> None:
    folder = example_folder("gemma3", tmp_path)
    result = tritter.expand(folder, "llama_pro", output=tmp_path / "grown")
    layers = [
        json.loads((each / "config.json").read_text())["text_config"]["num_hidden_layers"]
        for each in (folder, result)
    ]
    assert layers == [26, 39]
    states = [AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (folder, result)]
    towers = {name for name in states[0] if "vision" in name}
    assert towers and all(torch.equal(states[0][name], states[1][name]) for name in towers)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", r"post-norm.*use dus or stack"),
        pytest.param("diffllama", "depends on their position", marks=pytest.mark.full),
    ],
)
def test_what_can_not_be_exact_is_refused(model_type: str, message: str, tmp_path: Path) -> None:
    folder = example_folder(model_type, tmp_path, is_decoder=True)
    with pytest.raises(RequestError, match=message):
        tritter.expand(folder, "llama_pro", output=tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("moe", {}, "opt has no table; its depth and its width can grow"),
        ("width", {"intermediate_size": 192, "init": "aki"}, "opt has no table"),
        ("width", {"num_attention_heads": 8}, "the size of a head follows from the hidden size"),
        ("width", {"hidden_size": 96}, "use init=net2net with hidden_size=128"),
        ("width", {"hidden_size": 100}, "use init=net2net with hidden_size=128"),
    ],
)
def test_what_has_no_table_is_refused(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = example_folder("opt", tmp_path)
    with pytest.raises(RequestError, match=message):
        tritter.expand(folder, method, output=tmp_path / "grown", **options)
    assert not (tmp_path / "grown").exists()


# Untrusted configs

_VALUES = (0, -1, 3, 10**6, 10**12, "x", None, [], {}, [1] * 5, {"__float__": "abc"}, True, 2.5)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_config_is_refused_or_grown(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = example_folder(("opt", "mamba", "gpt_oss")[seed], tmp_path)
    plain, rng = json.loads((source / "config.json").read_text()), random.Random(seed)
    for number in range(20):
        changed = {**plain, rng.choice(sorted(plain)): rng.choice(_VALUES)}
        if rng.random() < 0.5:
            changed["model_type"] = rng.choice(MODEL_TYPES)
        (source / "config.json").write_text(json.dumps(changed))
        output = tmp_path / f"grown-{number}"
        method = rng.choice(("llama-pro", "width"))
        words = [str(source), "--method", method, "--output", str(output)]
        code = main(["inspect", str(source)] if number % 4 == 0 else ["expand", *words])
        assert code in (0, 2, 3), (changed, capsys.readouterr().err)
        assert "Traceback" not in capsys.readouterr().err
        assert code == 0 or not output.exists()


# FLOPs


@pytest.mark.parametrize("model_type", full_matrix(tuple(OWN)))
def test_flops_are_those_of_the_table(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = tables(model_type)
    expected = forward_flops(Model(config)), training_flops(Model(config))
    monkeypatch.setitem(FAMILIES, model_type, found)
    assert (forward_flops(Model(config)), training_flops(Model(config))) == expected


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("model_type", ["opt", "starcoder2", "gpt_oss", "granitemoe"])
def test_flops_are_those_that_torch_counts(model_type: str) -> None:
    model = Twin.of(example(model_type)).model.float()
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    flops = forward_flops(Model(config))
    square = flops.matrices * LENGTH + sum(flops.attention.values()) * LENGTH**2
    assert square == pytest.approx(counter.get_total_flops(), rel=0.01)


# Every model type


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_page_has_what_is_measured(model_type: str, tmp_path: Path) -> None:
    row = str(measured(model_type, tmp_path))
    assert "WRONG" not in row
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [name for name in MODEL_TYPES if f"| `{name}` | exact |" in PAGE.read_text()]
)
def test_new_layers_that_are_not_quite_zero_are_caught(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the page: what is zeroed in new layers is not quite zero."""

    def damaged(source: Path, result: Path, *arguments: Any, **options: Any) -> Any:
        (file,) = result.glob("*.safetensors")
        tensors, noise = load_file(file), torch.Generator().manual_seed(0)
        for (
            name,
            value,
        ) in tensors.items():  # several, since one alone may feed another that is zero
            # A gain of 1 + weight is zero at -1
            if name.endswith(zeroed) and value.unique().tolist() in ([0], [-1]):
                # Not the same for all outputs: a LayerNorm takes that away
                value += 0.01 * torch.randn(value.shape, generator=noise)
        save_file(tensors, file, metadata={"format": "pt"})
        return _between(source, result, *arguments, **options)

    monkeypatch.setattr(Jump, "of_folders", damaged)
    folder = example_folder(model_type, tmp_path)
    zeroed = DiscoveredFamily.of(read_model(folder).config).zeroed_names
    assert not expanded(folder, tmp_path / "grown", LlamaPro())


def _without_exact_depth() -> list[str]:
    """Return the types that grow exactly, but not by new layers anywhere."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    words = {"exact", "multiples", "with options"}
    grown = [row for row in rows if row[1] != "exact" and words & set(row[1:6])]
    return [row[0].strip("|` ") for row in grown]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", _without_exact_depth())
def test_damaged_results_of_other_growth_are_caught(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the other rows: all matrices of the result are a little wrong."""

    def damaged(source: Path, result: Path, *arguments: Any, **options: Any) -> Any:
        (file,) = result.glob("*.safetensors")
        noise = torch.Generator().manual_seed(0)
        tensors = {
            name: value + 0.05 * torch.randn(value.shape, generator=noise) * (value.ndim > 1)
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        return _between(source, result, *arguments, **options)

    monkeypatch.setattr(Jump, "of_folders", damaged)
    folder = tmp_path / "few"
    Twin.of(shallow(example(model_type))).model.float().save_pretrained(folder)
    config = read_model(folder).config
    deeper = (request for request, _ in depth_requests(config))
    requests = chain(deeper, *growth_examples(Model(config)).values())
    request = next(each for each in requests if is_possible(Model(config), each))
    assert not expanded(folder, tmp_path / "grown", request)


def test_twins_run_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several, a busy machine takes 40 times as long."""
    monkeypatch.setattr(family, "_FOUND", {})
    monkeypatch.setattr(family, "_WIDENED", {})
    threads, seen = torch.get_num_threads(), set[int]()
    torch.set_num_threads(2)
    handle = register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        config = example("opt", num_hidden_layers=2)
        DiscoveredFamily.of(config).widened(config)
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        handle.remove()
        torch.set_num_threads(threads)


def test_the_lineage_has_what_was_found(tmp_path: Path) -> None:
    folder = example_folder("opt", tmp_path, num_hidden_layers=2)
    request = Width(hidden_size=64, intermediate_size=120)
    for name, method in (("deeper", "llama_pro"), ("wider", request)):
        tritter.expand(folder, method, output=tmp_path / name)
        lineage = Lineage.read(tmp_path / name)
        assert lineage is not None
        found = lineage.expansion_history[-1].discovered
        assert found["in_new_layers"]["fc2.weight"] == 0.0
        assert found["transformers"] == transformers_version
    assert found["axes"]["fc1.weight.0"] == "ffn: write"
    assert found["axes"]["fc2.weight.1"] == "ffn: read"


@pytest.mark.full
def test_a_terminal_shows_what_takes_seconds(tmp_path: Path) -> None:
    folder = example_folder("opt", tmp_path, num_hidden_layers=2)
    command = [sys.executable, "-m", "tritter", "inspect", str(folder), "--family"]
    environment = {**os.environ, "TTY_COMPATIBLE": "1"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "opt has no table: probing its class" in shown.stderr
    assert "finding the axes of opt" in shown.stderr
    assert "probing" not in shown.stdout
    silent = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not silent.stderr


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("model_type", "limit"),
    [("openai-gpt", 512), ("dbrx", 2048), ("gemma3", 131072), ("whisper", 448), ("bloom", None)],
)
def test_the_context_length_is_known_by_any_name(model_type: str, limit: int | None) -> None:
    """Without it, a window longer than a table of learned positions would be accepted."""
    assert Model(example(model_type)).position_limit == limit

"""Loading with transformers: accepted and refused folders; code of a folder never runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests import oracle
from tritter import GrowableCausalLM, depth_upscale, width_upscale
from tritter.checkpoints.expert_files import AdapterShape
from tritter.core.families import Model
from tritter.core.models import (
    _warn_of_untested_version,
    load_model,
    load_tokenizer,
    new_model,
    read_model,
    save_tokenizer,
)
from tritter.errors import RequestError, TritterError
from tritter.methods.experts.adapters import LoraLayers

ATTACK = """
from pathlib import Path
Path({trace!r}).write_text("code from a checkpoint ran")
class Evil: pass
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = oracle.saved(oracle.tiny_llama(), tmp_path_factory.mktemp("sound") / "model")
    words = {"<|endoftext|>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(tokenizer, folder, end_of_text="<|endoftext|>")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def _edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; `...` removes one."""
    plain = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in plain.items() if v is not ...}))


def test_a_config_round_trips(folder: Path, tmp_path: Path) -> None:
    config = read_model(folder).config
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path / "again").config == config
    assert "_name_or_path" not in config


def test_missing_keys_get_the_defaults_of_transformers(folder: Path) -> None:
    _edit(folder / "config.json", rms_norm_eps=..., hidden_act=..., tie_word_embeddings=...)
    config = read_model(folder).config
    assert config["rms_norm_eps"] == 1e-6
    assert config["hidden_act"] == "silu"
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "t5"}, RequestError, "'t5' is not supported"),
        ({"model_type": "lama"}, RequestError, "'lama' is not supported: the installed"),
        ({"model_type": ...}, RequestError, "'None' is not supported"),
        ({"model_type": ["llama"]}, RequestError, "is not supported"),
        ({"hidden_size": "big"}, TritterError, "hidden_size"),
        ({"num_hidden_layers": 2.5}, TritterError, "num_hidden_layers"),
        ({"num_attention_heads": 5}, TritterError, "not a multiple"),
        ({"num_attention_heads": 0, "head_dim": ...}, TritterError, "not a usable config"),
        ({"rms_norm_eps": "tiny"}, TritterError, "rms_norm_eps"),
    ],
)
def test_an_unusable_config_is_refused(
    folder: Path, changes: dict[str, object], kind: type[TritterError], message: str
) -> None:
    _edit(folder / "config.json", **changes)
    with pytest.raises(TritterError) as error:
        read_model(folder)
    assert type(error.value) is kind
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null", b"[" * 200_000], ids=repr
)
def test_what_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(TritterError, match=r"config\.json cannot be read"):
        read_model(folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TritterError, match=r"holds no config\.json"):
        read_model(tmp_path)
    with pytest.raises(TritterError, match=r"nowhere is not a folder"):
        read_model(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TritterError, match=r"holds a PEFT adapter .* merge_and_unload"):
        read_model(tmp_path)


def test_new_model_follows_its_seed_and_leaves_the_global_one_alone(folder: Path) -> None:
    config = read_model(folder).config
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (new_model(Model(config), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_load_model_is_what_stock_loads(folder: Path) -> None:
    ids = oracle.tokens()
    loaded = load_model(folder)
    assert torch.equal(oracle.logits(loaded, ids), oracle.logits(oracle.stock(folder), ids))
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_sharded_folder_loads(sound: Path, tmp_path: Path) -> None:
    stock = oracle.stock(sound)
    stock.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    loaded = load_model(tmp_path / "sharded")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), stock.parameters(), strict=True)
    )


def _weights(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_weights(**{"model.norm.weight": None}), "model.norm.weight"),
        (_weights(**{"model.mystery": torch.ones(1)}), "model.mystery"),
        (_weights(**{"model.norm.weight": torch.ones(23)}), "norm.weight has shape (23,)"),
        (_half, "cannot be read"),
        (_pickled, "pytorch_model.bin: Tritter never reads pickles"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "contains no model.saf"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: _edit(folder / "config.json", hidden_size="big"), "hidden_size"),
    ],
    ids=["missing", "leftover", "shape", "half", "pickle", "empty", "gone", "json", "type"],
)
def test_a_damaged_model_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(TritterError) as error:
        load_model(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_named_tensors_come_in_the_familys_order_ties_once(tied: bool) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=tied)
    config = model.config.to_dict()
    named = dict(Model(config).disk_tensors(model.state_dict()))
    assert list(named) == [tensor.disk_name for tensor in Model(config).tensors]
    assert ("lm_head.weight" in named) == (not tied)
    assert not any(tensor.requires_grad for tensor in named.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(named[name], parameter)


def test_a_tokenizer_round_trips(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer("b a b").input_ids == [2, 1, 2]
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<|endoftext|>",) * 3


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[]", '{"version": "1.0", "added_tokens": [], "model": {"type": "Magic"}}'],
)
def test_a_damaged_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TritterError, match="has no usable tokenizer"):
        load_tokenizer(folder)


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(TritterError, match="has no usable tokenizer"):
        load_tokenizer(folder)


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (folder / "evil.py").write_text(ATTACK.format(trace=str(trace)))
    targets = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    _edit(folder / "config.json", auto_map=dict.fromkeys(targets, "evil.Evil"))
    _edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
    )
    read_model(folder)
    load_model(folder)
    try:
        load_tokenizer(folder)
    except TritterError as error:
        assert "tokenizer" in str(error)
    assert not trace.exists()
    exec((folder / "evil.py").read_text(), {})  # the trap itself works
    assert trace.exists()


def test_a_new_model_leaves_all_random_generators_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    new_model(read_model(folder), seed=3)
    LoraLayers(load_model(folder)).add("one", AdapterShape(2, 4.0, ("q_proj",)), seed=3)
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_a_peft_model_is_named_as_such() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(oracle.tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for use in (width_upscale, depth_upscale, GrowableCausalLM):
        with pytest.raises(RequestError, match=r"is a PeftModel.*model\.merge_and_unload\(\)"):
            use(wrapped)
    merged = wrapped.merge_and_unload()
    assert depth_upscale(merged, 4).config.num_hidden_layers == 4


@pytest.mark.parametrize("version", ["5.14.0", "5.24.1"])
def test_a_tested_version_is_not_warned_of(version: str, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_untested_version(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["5.0.0", "5.13.1", "5.99.0.dev0", "6.0.0"])
def test_an_untested_version_is_one_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_untested_version(version)
    (record,) = caplog.records
    assert version in record.message and "5.14 to 5.24" in record.message

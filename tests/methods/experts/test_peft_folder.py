"""Adapter folders: stock PEFT loads ours with equal logits, and we load PEFT's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.methods.experts.mixtures import TARGETS, mixture_of
from tests.oracle import tiny_llama, tokens
from tritter.checkpoints.expert_files import AdapterShape, is_plain_setting
from tritter.errors import RequestError, TritterError
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import _CONFIG_NAME, _TENSORS_NAME, StoredAdapter


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An adapter that stock PEFT made and saved."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_every_expert_is_a_stock_adapter(tmp_path: Path) -> None:
    mixture = mixture_of()
    for name in mixture.names:
        StoredAdapter.of(mixture.model, name).write(tmp_path / name, base="somebody/base")
        with mixture.only(name):
            expected = logits(mixture.model)
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
        assert (logits(stock) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert stock.peft_config["default"].base_model_name_or_path == "somebody/base"
    with pytest.raises(RequestError, match="already"):
        StoredAdapter.of(mixture.model, "e0").write(tmp_path / "e0", base="somebody/base")
    with pytest.raises(RequestError, match="no adapter e7"):
        StoredAdapter.of(mixture.model, "e7").write(tmp_path / "e7", base="somebody/base")


def test_an_adapter_of_theirs_is_an_expert(theirs: Path) -> None:
    stored = StoredAdapter.read(theirs)
    assert stored.shape == AdapterShape(3, 5.0, ("q_proj",))
    mixture = ExpertMixture(tiny_llama())
    mixture.add("theirs", stored.shape, seed=0)
    stored.load_into(mixture.model, "theirs")
    stock = PeftModel.from_pretrained(tiny_llama(), theirs)
    expected = logits(stock)
    assert (expected - logits(mixture.model)).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(stock) - logits(tiny_llama())).abs().max() > 0.1
    mixture.add("wider", AdapterShape(3, 5.0, TARGETS), seed=0)
    with pytest.raises(TritterError, match=r"down_proj is only in the model"):
        stored.load_into(mixture.model, "wider")
    mixture.add("larger", AdapterShape(4, 5.0, ("q_proj",)), seed=0)
    with pytest.raises(TritterError, match=r"\[3, 24\] in the folder and \[4, 24\]"):
        stored.load_into(mixture.model, "larger")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type = 'IA3'"),
        ("use_dora", True, "use_dora = True is not supported"),
        ("use_rslora", True, "use_rslora"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
        ("bias", "all", "bias = 'all'"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("something_new", 3, "something_new"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' is not supported"),
        ("init_lora_weights", "olora", "init_lora_weights"),
        ("r", 4, "config has r = 4"),
        ("r", True, "r = True; must be"),
        ("r", 10**9, "must be 1 to 1024"),
        ("lora_alpha", "16", "lora_alpha = '16'"),
        ("lora_alpha", -1, "lora_alpha = -1"),
    ],
)
def test_what_a_config_may_not_ask_for(theirs: Path, key: str, value: object, message: str) -> None:
    path = theirs / _CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(TritterError, match="adapter") as caught:
        StoredAdapter.read(theirs)
    assert message in str(caught.value)


def test_the_defaults_of_peft_are_plain() -> None:
    """`tritter inspect` recognises it without importing PEFT."""
    refused = [k for k, v in LoraConfig().to_dict().items() if not is_plain_setting(k, v)]
    assert refused == []


def test_damaged_and_foreign_tensors(theirs: Path, tmp_path: Path) -> None:
    path = theirs / _TENSORS_NAME
    own = load_file(path)
    name = next(iter(own))
    for change, message in [
        ({name: own[name] * float("nan")}, "not finite"),
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "not a LoRA factor"),
        ({name: torch.zeros(5, 24)}, "r = 3"),
    ]:
        save_file(own | change, path)
        with pytest.raises(TritterError, match=message):
            StoredAdapter.read(theirs)
    save_file({key: value for key, value in own.items() if key != name}, path)
    with pytest.raises(TritterError, match=r"lacks its [AB]"):
        StoredAdapter.read(theirs)
    path.write_bytes(b"nothing")
    with pytest.raises(TritterError, match="cannot be read"):
        StoredAdapter.read(theirs)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TritterError):
        StoredAdapter.read(theirs)

"""LoRA experts on GPT-2, whose matrices are transposed: matches PEFT, folders."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import oracle
from tests.methods.experts.mixtures import mixture_of
from tests.oracle.families import tiny
from tritter.checkpoints.expert_files import AdapterShape
from tritter.checkpoints.export import Weights
from tritter.checkpoints.source import Source
from tritter.core.models import read_model
from tritter.errors import RequestError
from tritter.methods.experts.adapters import LoraLayers
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import StoredAdapter

TARGETS = ("c_attn", "c_proj", "c_fc", "wte", "lm_head")
LINEAR = ("c_attn", "c_proj", "c_fc")


def model() -> PreTrainedModel:
    return tiny("gpt2", tie_word_embeddings=True)


@torch.no_grad()
def logits(of: nn.Module) -> Tensor:
    found: Tensor = of(input_ids=oracle.tokens(), use_cache=False).logits
    return found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_expert_is_a_stock_adapter(tmp_path: Path) -> None:
    assert LoraLayers(model()).adaptable() == set(TARGETS)
    mixture = mixture_of(model(), targets=[TARGETS, LINEAR, ("c_attn",)], router="evidence")
    for name in mixture.names:
        StoredAdapter.of(mixture.model, name).write(tmp_path / name, base="somebody/base")
        with mixture.only(name):
            expected = logits(mixture.model)
        stock = PeftModel.from_pretrained(model(), tmp_path / name)
        assert (logits(stock) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (logits(model()) - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_of_theirs_is_an_expert(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(LINEAR), fan_in_fan_out=True)
    theirs = get_peft_model(model(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = StoredAdapter.read(tmp_path / "theirs")
    assert stored.shape == AdapterShape(3, 5.0, tuple(sorted(LINEAR)))
    mixture = ExpertMixture(model())
    mixture.add("theirs", stored.shape, seed=0)
    stored.load_into(mixture.model, "theirs")
    expected = logits(theirs)
    assert (expected - logits(mixture.model)).abs().max() < 1e-5 * expected.abs().max()


def test_an_expert_is_added_to_the_weights_as_they_lie(tmp_path: Path) -> None:
    """c_proj of attention is square, so its shape does not reveal its orientation."""
    source = oracle.saved(model(), tmp_path / "source")
    mixture = mixture_of(model(), ranks=(3,), targets=[LINEAR])
    weights = Weights.of(Source.open(source, read_model(source)))
    added = weights.with_added(StoredAdapter.of(mixture.model, "e0").deltas())
    added.export(tmp_path / "out", dtype=torch.float32, artifacts=())
    after = oracle.stock(tmp_path / "out")
    assert (logits(after) - logits(mixture.model)).abs().max() < 1e-4


def test_new_experts_train_alone_and_change_nothing_at_first() -> None:
    mixture = ExpertMixture(model())
    before = logits(model())
    mixture.add("new", AdapterShape(2, 4.0, LINEAR), seed=0)
    assert torch.equal(logits(mixture.model), before)
    ids = oracle.tokens()
    mixture.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {name for name, p in mixture.model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name or "expert_router" in name for name in trained)


def test_what_can_not_be_quantised_is_refused() -> None:
    from tritter.methods.experts.quantised import quantise

    with pytest.raises(RequestError, match="no linear layer that bitsandbytes can quantise"):
        quantise(model(), 8)

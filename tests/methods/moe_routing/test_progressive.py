"""Experts for live models: `ProgressiveMoE` and its configuration."""

from pathlib import Path

import pytest
import torch

import tritter
from tests import oracle
from tests.core.stock_routers.models import shared_names, tiny_moe
from tests.methods.moe_routing.test_stages import DOMAIN, moved, values
from tritter.core.stock_routers import AddedExperts
from tritter.data.documents import Document
from tritter.data.tokens import train_tokenizer
from tritter.errors import RequestError

TEXT = "the model grows an expert where data asks for one and keeps what it knew\n"


def test_the_defaults_are_the_specifications() -> None:
    config = tritter.MoEExpansionConfig()
    assert (config.base_experts, config.new_experts) == (8, 4)
    assert (config.freeze_base, config.router_update) == (True, "fine_tune")
    assert (config.domain, config.domain_data_path) == (None, None)


@pytest.mark.full
def test_experts_are_added_behind_a_closed_door_and_opened_by_the_stages() -> None:
    model = tiny_moe("mixtral")
    before = values(model)
    config = tritter.MoEExpansionConfig(base_experts=4, new_experts=2, domain="code")
    grown = tritter.ProgressiveMoE().add_experts(model, config)
    ids = DOMAIN[0]["input_ids"]
    assert torch.equal(oracle.logits(grown, ids), oracle.logits(model, ids))
    assert not moved(model, before) and grown.config.num_local_experts == 6
    tritter.adapt_router(grown, [4, 5], DOMAIN)
    tritter.train_new_experts(grown, [4, 5], DOMAIN)
    assert AddedExperts.of(grown) is None
    assert not torch.equal(oracle.logits(grown, ids), oracle.logits(model, ids))


@pytest.mark.full
def test_with_text_they_are_trained_at_once(tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text(TEXT * 60)
    tokenizer = train_tokenizer([Document("d", TEXT * 20)], vocab_size=260)
    model = tiny_moe("qwen3_moe", vocab_size=260)
    config = tritter.MoEExpansionConfig(
        base_experts=4, new_experts=2, domain="code", domain_data_path=str(tmp_path)
    )
    grown = tritter.ProgressiveMoE(tokenizer, seed=1).add_experts(model, config)
    assert AddedExperts.of(grown) is None
    for name in shared_names(grown):
        assert torch.equal(grown.get_parameter(name)[:4], model.get_parameter(name))
    assert torch.equal(grown.lm_head.weight, model.lm_head.weight)
    again = tritter.ProgressiveMoE(tokenizer, seed=1).add_experts(model, config)
    assert not moved(again, values(grown))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "base_experts = 8: the model has 4"),
        ({"base_experts": 4, "router_update": "none"}, "fine_tune, retrain, frozen"),
        ({"base_experts": 4, "domain_data_path": "nowhere"}, "no tokenizer"),
    ],
)
def test_wrong_requests(config: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tritter.ProgressiveMoE().add_experts(
            tiny_moe("mixtral"),
            tritter.MoEExpansionConfig(**config),  # type: ignore[arg-type]
        )


def test_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Document("d", TEXT)], vocab_size=260)
    config = tritter.MoEExpansionConfig(base_experts=4, domain_data_path=str(tmp_path / "x"))
    with pytest.raises(RequestError, match=r"domain_data_path.*no such file"):
        tritter.ProgressiveMoE(tokenizer).add_experts(tiny_moe("mixtral"), config)

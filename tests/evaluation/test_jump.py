import math
from types import SimpleNamespace

import pytest
import torch

from tritter.errors import TritterError
from tritter.evaluation.jump import Jump

INPUT_IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])


def test_jump_by_hand(bigram, table):
    moved = table.clone()
    moved[4, 2] += 0.25
    moved[6, 0] += 9.0  # a row that no token here reads
    jump = Jump.between(bigram(table), bigram(moved), INPUT_IDS)
    assert jump.max_absolute == pytest.approx(0.25)
    assert jump.relative_to_std == pytest.approx(0.25 / float(table[INPUT_IDS].std()))
    size = table.shape[-1]
    assert jump.rms_to_std == pytest.approx(
        jump.relative_to_std / math.sqrt(INPUT_IDS.numel() * size)
    )
    old, new = (each[INPUT_IDS].log_softmax(dim=-1) for each in (table, moved))
    expected = (old.exp() * (old - new)).sum(dim=-1).mean()
    assert jump.divergence == pytest.approx(float(expected), rel=1e-4)


def test_sequences_are_compared_a_few_at_a_time(bigram, table, monkeypatch):
    """With Gemma's vocabulary, the logits of two domains would take 2 GB for each model."""
    before, after = bigram(table), bigram(torch.cat([table + 0.1, table], dim=1))
    whole = Jump.between(before, after, INPUT_IDS, has_yardstick=True).to_dict()
    read = list[int]()
    before.register_forward_pre_hook(
        lambda module, args, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("tritter.evaluation.losses._MAX_LOGITS", 1)
    parts = Jump.between(before, after, INPUT_IDS, has_yardstick=True).to_dict()
    assert read == [1] * 4 and parts == pytest.approx(whole, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "change", "relative"),
    [(0.5, 0.0, 0.0), (0.5, 0.5, 1.0), (0.0, 0.5, math.inf), (0.0, 0.0, 0.0)],
)
def test_logits_that_are_all_equal_have_no_deviation(bigram, table, value, change, relative):
    """Then changes are compared with their size: rounding alone is no jump."""
    constant = torch.full_like(table, value)
    jump = Jump.between(bigram(constant), bigram(constant + change), INPUT_IDS)
    assert (jump.max_absolute, jump.relative_to_std) == (change, relative)


def test_the_yardstick_is_the_source_in_bfloat16(bigram, table):
    jump = Jump.between(bigram(table), bigram(table.clone()), INPUT_IDS, has_yardstick=True)
    assert jump.rms_to_std == 0.0 and jump.bfloat16_rms_to_std is not None


def test_same_function_does_not_jump_even_in_training_mode(bigram, table):
    before, after = bigram(table).train(), bigram(table.clone()).train()
    assert Jump.between(before, after, INPUT_IDS).to_dict() == {
        "max_absolute": 0.0,
        "relative_to_std": 0.0,
        "rms_to_std": 0.0,
        "divergence": 0.0,
    }
    assert before.training and after.dropout.training


def test_broken_model_jumps_to_no_number(bigram, table):
    jump = Jump.between(bigram(table), bigram(torch.full_like(table, math.nan)), INPUT_IDS)
    assert math.isnan(jump.relative_to_std) and jump.to_dict()["max_absolute"] is None


def test_autocast_around_it_does_not_blur_the_comparison(table):
    class Head(torch.nn.Linear):
        def forward(self, input_ids, use_cache=False):
            return SimpleNamespace(logits=super().forward(table[input_ids]))

    torch.manual_seed(0)
    head, moved = Head(7, 7), Head(7, 7)
    moved.load_state_dict({k: v + 1e-6 for k, v in head.state_dict().items()})
    with torch.autocast("cpu", torch.bfloat16):
        jump = Jump.between(head, moved, INPUT_IDS)
    assert 0 < jump.max_absolute < 1e-4


def test_a_smaller_vocabulary_is_refused(bigram, table):
    with pytest.raises(TritterError, match="old tokens are missing"):
        Jump.between(bigram(torch.zeros(7, 8)), bigram(table), INPUT_IDS)

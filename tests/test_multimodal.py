"""Multimodal models, whose config nests that of the text decoder: texts are read as in others."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import tritter
from tests.data.test_text_bounds import END, STOCK, TEXTS, written
from tritter.core.models import read_model
from tritter.data.mixed_rows import PackedText
from tritter.data.tokens import PretrainedTokenizer

DOCUMENTS = [f"{text} {number}" for text in TEXTS[:3] for number in range(10)]


@pytest.fixture(scope="module")
def model() -> Any:
    text = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 64, "sliding_window": 8, "eos_token_id": [END, 5],
        "initializer_range": 0.3,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(1)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert getattr(config, "eos_token_id", None) is None
    return Gemma3ForConditionalGeneration(config).eval()


def test_the_gate_of_live_models(model: Any, tmp_path: Path) -> None:
    folder = written(tmp_path, "start")
    tokenizer = copy.deepcopy(STOCK)
    named = tritter.gate(model, model, {"old": DOCUMENTS}, tokenizer=tokenizer)
    tokenizer.eos_token = None  # then that of the text config
    for each in (tokenizer, folder):
        assert tritter.gate(model, model, {"old": DOCUMENTS}, tokenizer=each) == named
    assert named.status == "kept"


def test_rows_of_a_trainer_begin_and_end(model: Any) -> None:
    tokenizer = copy.deepcopy(STOCK)
    tokenizer.eos_token = None
    text = PackedText(tokenizer, config=model.config, rows=[], sequence_length=8)
    assert text.bounds.end == END and text.bounds.start


def test_a_folder_names_its_end_and_its_context(model: Any, tmp_path: Path) -> None:
    folder = written(tmp_path, "start")
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token": None}))
    bounds = PretrainedTokenizer.read(folder, vocab_size=300).bounds
    assert bounds.end == END and 5 in bounds.stops
    assert read_model(folder).position_limit == 64

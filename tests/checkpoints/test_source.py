"""A folder opened for reading: ties that its files cut."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests import oracle
from tritter.checkpoints import Source
from tritter.core.expansions import LlamaPro, Width
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.errors import TritterError
from tritter.storage.hashing import DigestQueue
from tritter.storage.tensors import TensorFolder
from tritter.transform import expand


def _with_head(folder: Path, *, change: float) -> Path:
    """Save a tied model whose file holds a head all the same."""
    oracle.saved(oracle.tiny_llama(tie_word_embeddings=True), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    head[0, 0] += change
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    return folder


def test_a_redundant_head_is_left_out(tmp_path: Path) -> None:
    folder = _with_head(tmp_path / "tied", change=0.0)
    source = Source.open(folder, read_model(folder))
    assert "head" not in source.stored_parts


def test_a_head_that_the_files_untie_is_refused(tmp_path: Path) -> None:
    """Stock transformers uses both, so leaving one out would change the function in silence."""
    folder = _with_head(tmp_path / "cut", change=1.0)
    stock = oracle.stock(folder)
    assert not torch.equal(stock.lm_head.weight, stock.model.embed_tokens.weight)
    with pytest.raises(TritterError, match=r"lm_head\.weight differs .* tie_word_embeddings"):
        expand(folder, tmp_path / "grown", [LlamaPro()])
    assert not (tmp_path / "grown").exists()


def test_each_tied_tensor_is_compared_with_the_one_that_it_repeats(tmp_path: Path) -> None:
    """Files of RoBERTa from before transformers 5 store the tied bias of the head twice."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
    config = AutoConfig.for_model("roberta", **sizes, num_hidden_layers=1, is_decoder=True)
    oracle.saved(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    tensors = load_file(path := tmp_path / "model/model.safetensors")
    twice = {**tensors, "lm_head.decoder.bias": tensors["lm_head.bias"].clone()}
    save_file(twice, path, metadata={"format": "pt"})
    source = Source.open(path.parent, read_model(path.parent))
    assert {each.name for each in source.stored} == tensors.keys() and source.unread == []
    save_file({**twice, "lm_head.bias": twice["lm_head.bias"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(TritterError, match=r"decoder\.bias differs from lm_head\.bias"):
        Source.open(path.parent, read_model(path.parent))


@pytest.mark.parametrize("is_open", [False, True])
def test_a_source_that_changes_behind_its_hash_gives_no_result(
    tmp_path: Path, is_open: bool
) -> None:
    """Bytes are hashed ahead of being read: the record would name another source."""
    folder = oracle.saved(oracle.tiny_llama(), tmp_path / "source")
    ahead, digests = TensorFolder.open(folder), DigestQueue()
    digests.begin(ahead.raw(), files=[folder / "model.safetensors"])
    while len(digests.results()) < len(ahead):
        pass
    config = read_model(folder).config
    source = Source.open(folder, Model(config)) if is_open else None
    tensors = {name: each + 1 for name, each in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = replace(source or Source.open(folder, Model(config)), digests=digests)
    with pytest.raises(TritterError, match=r"model\.safetensors has changed"):
        expand(source, tmp_path / "result", [LlamaPro()])
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("name", ["tritter.json", "generation_config.json (missing)"])
def test_a_new_record_certifies_no_changed_folder(tmp_path: Path, name: str) -> None:
    oracle.saved(oracle.tiny_llama(), tmp_path / "source")
    expand(tmp_path / "source", tmp_path / "grown", [Width()])
    if name == "tritter.json":
        record = tmp_path / "grown" / name
        record.write_text(record.read_text().replace('"step": 0', '"step": 1'))
    else:
        (tmp_path / "grown/generation_config.json").unlink()
    with pytest.raises(TritterError, match=f"was changed since .*: {re.escape(name)}"):
        expand(tmp_path / "grown", tmp_path / "deep", [LlamaPro()])
    assert not (tmp_path / "deep").exists()

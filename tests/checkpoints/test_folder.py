"""Checkpoint folders: stock classes load them, and the record covers every byte."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests import oracle
from tritter.checkpoints import Lineage, write_checkpoint, write_lineage
from tritter.core.expansions import Dus, LlamaPro, Width
from tritter.core.families import Model
from tritter.core.models import save_tokenizer
from tritter.errors import RequestError, TritterError
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.tensors import TensorFolder, TensorHeader
from tritter.storage.writer import TensorStream
from tritter.transform import expand

EMPTY = Lineage(model_hash="", base_model_hash="", tensor_digests={}, file_digests={})


def write_words(folder: Path) -> None:
    words = {"<|endoftext|>": 0, "a": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(tokenizer, folder, end_of_text="<|endoftext|>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    return oracle.tiny_llama(num_hidden_layers=2)


def _write(model: LlamaForCausalLM, target: Path, *, lineage: Lineage = EMPTY) -> Lineage:
    config = model.config.to_dict()
    return write_checkpoint(
        target,
        config=config,
        tensors=TensorStream.of(Model(config).disk_tensors(model.state_dict())),
        lineage=lambda: lineage,
        artifacts=[write_words],
    )


def test_stock_classes_load_model_and_tokenizer(model: LlamaForCausalLM, tmp_path: Path) -> None:
    _write(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = oracle.tokens()
    assert torch.equal(oracle.logits(loaded.eval(), ids), oracle.logits(model, ids))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("b a").input_ids == [2, 1]
    assert tokenizer.eos_token == "<|endoftext|>"


def test_no_pickle_is_written(model: LlamaForCausalLM, tmp_path: Path) -> None:
    _write(model, tmp_path / "out")
    suffixes = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert suffixes <= {".safetensors", ".json", ".md"}


def test_digests_cover_every_file(model: LlamaForCausalLM, tmp_path: Path) -> None:
    written = _write(model, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md"} <= set(written.file_digests)
    header = written.file_digests["model.safetensors#header"]
    assert set(written.file_digests) - {"model.safetensors#header"} == names - {
        "model.safetensors",
        "tritter.json",
    }
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    assert header == hashlib.sha256(weights[:length]).hexdigest()
    for name, digest in written.file_digests.items():
        if "#" in name:
            continue
        content = (tmp_path / "out" / name).read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()
    folder = TensorFolder.open(tmp_path / "out")
    assert written.tensor_digests == {n: tensor_digest(n, each) for n, each in folder.items()}
    assert written.model_hash == merkle_hash(written.tensor_digests)


def test_what_is_read_is_what_was_written(model: LlamaForCausalLM, tmp_path: Path) -> None:
    written = _write(model, tmp_path / "out")
    assert Lineage.read(tmp_path / "out") == written
    assert written.base_model_hash == written.model_hash
    assert written.parent_hash is None


def test_a_given_base_hash_is_kept(model: LlamaForCausalLM, tmp_path: Path) -> None:
    lineage = replace(EMPTY, base_model_hash="b" * 64, parent_hash="9" * 64)
    written = _write(model, tmp_path / "out", lineage=lineage)
    assert (written.base_model_hash, written.parent_hash) == ("b" * 64, "9" * 64)
    assert written.model_hash not in ("b" * 64, "9" * 64, "")


def test_a_failing_tensor_stream_leaves_nothing(model: LlamaForCausalLM, tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "model.norm.weight", torch.ones(24)
        raise TritterError("stop")

    names = ("model.norm.weight", "lm_head.weight")
    entries = tuple(TensorHeader.of(name, torch.float32, (24,)) for name in names)
    with pytest.raises(TritterError, match="stop"):
        write_checkpoint(
            tmp_path / "out",
            config=model.config.to_dict(),
            tensors=TensorStream(entries, stream()),
            lineage=lambda: EMPTY,
            artifacts=[write_words],
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_kept(model: LlamaForCausalLM, tmp_path: Path) -> None:
    first = _write(model, tmp_path / "out")
    with pytest.raises(RequestError, match="already exists"):
        _write(oracle.tiny_llama(), tmp_path / "out")
    assert Lineage.read(tmp_path / "out") == first


def test_write_lineage_replaces_record_and_card_alone(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    written = _write(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    scores = {"code": 3.25, "sorting/accuracy": 0.125}
    scored = replace(written, benchmark_scores=scores, step=10)
    write_lineage(folder, scored, model.config.to_dict())
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"README.md", "tritter.json"}
    text = (folder / "README.md").read_text()
    assert "| domain | loss (nats per token) |\n|---|---|\n| code | 3.2500 |\n\n" in text
    assert "| task | accuracy |\n|---|---|\n| sorting | 12.5% |\n\n" in text
    read = Lineage.read(folder)
    assert read is not None
    assert read.step == 10
    for lineage in (written, read):  # the card lists experts in this order
        assert list(lineage.file_digests) == sorted(lineage.file_digests)
    card = (folder / "README.md").read_bytes()
    assert read.file_digests["README.md"] == hashlib.sha256(card).hexdigest()


def test_the_card_tells_what_the_model_is_and_how_it_grew(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    source = _write(model, tmp_path / "source")
    card = (tmp_path / "source" / "README.md").read_text()
    total = sum(p.numel() for p in model.parameters())
    assert f"# LlamaForCausalLM, {total:,} parameters" in card
    assert "2 layers, hidden size 24, FFN 40, 4 attention heads (2 key/value)" in card
    assert "Not expanded" in card
    assert source.model_hash in card
    expand(tmp_path / "source", tmp_path / "grown", [Dus(), Width()])
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "| dus | depth | not measured | 0 | 0 1 0 1 |" in card
    assert "| width | width | not measured | 0 | 0-3 |" in card
    assert card.startswith("---\n")


def test_a_chain_of_two_expansions(model: LlamaForCausalLM, tmp_path: Path) -> None:
    base = _write(model, tmp_path / "base")
    first = expand(tmp_path / "base", tmp_path / "a" / "first", [Width()], seed=3).lineage
    expand(tmp_path / "a" / "first", tmp_path / "second", [LlamaPro(positions=(0, 1)), Dus()])
    second = Lineage.read(tmp_path / "second")
    assert second is not None
    assert first.parent_hash == base.model_hash
    assert second.parent_hash == first.model_hash
    assert len({base.model_hash, first.model_hash, second.model_hash}) == 3
    assert first.base_model_hash == second.base_model_hash == base.model_hash
    assert [record.method for record in second.expansion_history] == ["width", "llama_pro", "dus"]
    assert [record.seed for record in second.expansion_history] == [3, 0, 1]
    assert second.expansion_history[1].options["positions"] == [0, 1]
    history = second.expansion_history
    for earlier, later in pairwise(history):
        assert earlier.target_config == later.source_config
    assert (tmp_path / "a" / "first" / str(first.parent_path)).resolve() == tmp_path / "base"
    assert (tmp_path / "second" / str(second.parent_path)).resolve() == tmp_path / "a" / "first"


def test_the_hash_of_a_plain_folder_starts_the_chain(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    source = oracle.saved(model, tmp_path / "plain")
    first = expand(source, tmp_path / "first", [Width()]).lineage
    digests = {name: tensor_digest(name, p) for name, p in model.named_parameters()}
    assert first.parent_hash == first.base_model_hash == merkle_hash(digests)


def test_sharding_of_source_or_result_does_not_enter_the_hash(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    whole = oracle.saved(model, tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one = expand(whole, tmp_path / "one", [Width()])
    two = expand(tmp_path / "sharded", tmp_path / "two", [Width()], max_shard_bytes=9_000)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    assert one.lineage.parent_hash == two.lineage.parent_hash
    assert one.lineage.model_hash == two.lineage.model_hash
    assert one.lineage.tensor_digests == two.lineage.tensor_digests
    ids = oracle.tokens()
    logits = [oracle.logits(oracle.stock(result.folder), ids) for result in (one, two)]
    assert torch.equal(*logits)


def test_the_seed_decides_the_result(model: LlamaForCausalLM, tmp_path: Path) -> None:
    source = oracle.saved(model, tmp_path / "source")
    hashes = [
        expand(source, tmp_path / f"result{position}", [Width()], seed=seed).lineage.model_hash
        for position, seed in enumerate([0, 0, 1])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_tokenizer_files_travel_along(model: LlamaForCausalLM, tmp_path: Path) -> None:
    _write(model, tmp_path / "source")
    result = expand(tmp_path / "source", tmp_path / "result", [Width()])
    tokenizer = (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert (result.folder / "tokenizer.json").read_bytes() == tokenizer
    assert result.lineage.file_digests["tokenizer.json"] == hashlib.sha256(tokenizer).hexdigest()
    assert AutoTokenizer.from_pretrained(result.folder)("a b").input_ids == [1, 2]


def _flip_one_bit(folder: Path) -> str:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    return "lm_head.weight"


def _raise_eps(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    return "config.json"


def _swap_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"c"'))
    return "tokenizer.json"


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("change", [_flip_one_bit, _raise_eps, _swap_tokenizer])
def test_a_source_changed_since_its_lineage_was_written_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, change: Callable[[Path], str]
) -> None:
    _write(model, tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "untouched")
    name = change(tmp_path / "source")
    with pytest.raises(TritterError, match="changed since its lineage was written") as error:
        expand(tmp_path / "source", tmp_path / "result", [Width()])
    assert name in str(error.value) and "export --ignore-lineage" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "untouched"}
    expand(tmp_path / "untouched", tmp_path / "result", [Width()])

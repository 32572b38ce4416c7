"""All commands read the weights that transformers reads, or refuse the folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import VOCABULARY, Run, place, run, snapshot, sources
from tests.oracle import logits, stock, tiny_llama, tokens

__all__ = ["place", "run", "sources"]
TOKENS = tokens(VOCABULARY)
INDEX = "model.safetensors.index.json"
READING = (
    "export --checkpoint base --output out --dtype float32",
    "expand --checkpoint base --method width --output out --no-measure",
    "inspect base",
    "generate --checkpoint base --prompt the --max-new-tokens 1",
)


def _other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {n: v.clone() for n, v in tiny_llama(vocab_size=VOCABULARY).state_dict().items()}


def _sharded(base: Path) -> None:
    model = stock(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _both(base: Path) -> None:
    """Shards of one model with their index, and the single file of another."""
    _sharded(base)
    save_file(_other_weights(), base / "model.safetensors", metadata={"format": "pt"})


def _unnamed(base: Path) -> None:
    """An index that leaves out a tensor of a file that it names."""
    _sharded(base)
    _edit(base / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))


def _consolidated(base: Path) -> None:
    for name in ("consolidated", "model-best", "pytorch_model", "model.fp16"):
        save_file(_other_weights(), base / f"{name}.safetensors", metadata={"format": "pt"})


def _mixed_types(base: Path) -> None:
    held = load_file(base / "model.safetensors")
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    mixed = {name: held[name].to(kinds[i % 4]) for i, name in enumerate(sorted(held))}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})


def _no_metadata(base: Path) -> None:
    """safetensors without a word on who wrote them."""
    save_file(load_file(base / "model.safetensors"), base / "model.safetensors")


FOLLOWED = {
    "single file and index": _both,
    "a tensor that the index leaves out": _unnamed,
    "other files": _consolidated,
    "mixed types": _mixed_types,
    "no metadata": _no_metadata,
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_what_transformers_loads_is_what_is_read(
    run: Run, place: Path, change: Callable[[Path], object]
) -> None:
    change(place / "base")
    wanted = logits(stock(place / "base"), TOKENS)
    assert run("export --checkpoint base --output out --dtype float32").code == 0
    assert torch.allclose(logits(stock(place / "out"), TOKENS), wanted, atol=1e-6)
    result = run("expand --checkpoint base --method width --output wide --json")
    assert result.code == 0, result.err
    assert torch.allclose(logits(stock(place / "wide"), TOKENS), wanted, atol=2e-2)
    assert run("inspect base").code == 0
    assert run("generate --checkpoint base --prompt the --max-new-tokens 1").code == 0


def _integers(base: Path) -> None:
    held = load_file(base / "model.safetensors")
    held["model.norm.weight"] = torch.ones_like(held["model.norm.weight"], dtype=torch.int32)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})


def _bytes(base: Path) -> None:
    held = load_file(base / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})


def _twice(base: Path) -> None:
    _sharded(base)
    first = sorted(base.glob("model-0*"))[0]
    held = load_file(first)
    held["model.norm.weight"] = torch.zeros(24)
    save_file(held, first, metadata={"format": "pt"})


def _index_without_metadata(base: Path) -> None:
    _sharded(base)
    _edit(base / INDEX, lambda index: index.pop("metadata"))


def _index_of_lists(base: Path) -> None:
    _sharded(base)
    _edit(base / INDEX, lambda index: index.update(weight_map=["model.norm.weight"]))


def _named_in_config(base: Path) -> None:
    save_file(_other_weights(), base / "other.safetensors", metadata={"format": "pt"})
    change = {"transformers_weights": "other.safetensors"}
    _edit(base / "config.json", lambda config: config.update(change))


def _of_ranks(base: Path) -> None:
    shutil.copy(base / "model.safetensors", base / "shard-00001-model-00001-of-00001.safetensors")


def _adapter(base: Path) -> None:
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "integers": (_integers, ["model.norm.weight has dtype I32"]),
    "float8": (_bytes, ["model.norm.weight has dtype F8_E4M3"]),
    "a tensor in two files": (_twice, ["'model.norm.weight' is in both model-00001", "remove it"]),
    "an index without metadata": (_index_without_metadata, ["is not a safetensors index"]),
    "an index of lists": (_index_of_lists, ["is not a safetensors index"]),
    "another file, by config": (_named_in_config, ["transformers_weights = 'other.safetensors'"]),
    "files of ranks": (_of_ranks, ["distributed checkpoint (shard-00001-"]),
    "an adapter": (_adapter, ["adapter_config.json"]),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_followed_is_refused_by_all(
    run: Run, place: Path, change: Callable[[Path], object], said: list[str]
) -> None:
    change(place / "base")
    before = snapshot(place)
    for words in READING:
        result = run(words)
        assert result.code == 2, words
        assert result.err.endswith("Nothing was written.\n")
        for text in said:
            assert text in result.err, words
    assert snapshot(place) == before


def test_transformers_takes_the_file_that_the_config_names(place: Path) -> None:
    """Why such a folder is refused: what stands at the usual name is another model."""
    _named_in_config(place / "base")
    (place / "plain").mkdir()
    shutil.copy(place / "base" / "config.json", place / "plain")
    shutil.copy(place / "base" / "other.safetensors", place / "plain" / "model.safetensors")
    _edit(place / "plain" / "config.json", lambda config: config.pop("transformers_weights"))
    named, other = stock(place / "base"), stock(place / "plain")
    assert torch.equal(logits(named, TOKENS), logits(other, TOKENS))


def test_verifying_names_weights_of_another_type(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method dus --output grown --no-measure").code == 0
    _integers(place / "grown")
    result = run("history grown --verify")
    assert result.code == 3
    assert "model.norm.weight has dtype I32" in " ".join(result.out.split())

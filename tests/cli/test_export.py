"""`tritter export`: what it writes stock classes load, what it refuses is told, nothing is lost."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.checkpoints.test_export import held, tiny_experts
from tests.checkpoints.test_lightning_file import Trap, trained
from tests.cli.conftest import VOCABULARY, Run, snapshot
from tests.oracle import logits, saved, stock, tiny_llama, tokens

TOKENS = tokens(VOCABULARY)


def test_a_checkpoint_becomes_a_plain_folder(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width").code == 0
    before = snapshot(place / "base-width")
    assert run("export --checkpoint base-width --output own").code == 0
    assert {value.dtype for value in held(place / "own").values()} == {torch.float32}
    result = run("export --checkpoint base-width --output out --format hf --dtype bfloat16")
    assert result.code == 0, result.err
    assert result.err == ""  # no progress bar without a terminal
    for words in ("LlamaForCausalLM", "dtype bfloat16", "in 1 file", "written out"):
        assert words in " ".join(result.out.split())
    assert {value.dtype for value in held(place / "out").values()} == {torch.bfloat16}
    assert not (place / "out" / "tritter.json").exists()
    rounded = logits(stock(place / "base-width", dtype=torch.bfloat16), TOKENS)
    assert torch.equal(logits(stock(place / "out", dtype=torch.bfloat16), TOKENS), rounded)
    assert AutoTokenizer.from_pretrained(place / "out")("the")["input_ids"]
    assert snapshot(place / "base-width") == before
    assert run("inspect out").code == 0
    assert run("generate --checkpoint out --prompt the --max-new-tokens 3").code == 0


def test_on_a_terminal_a_bar_shows_what_is_left(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "30/30" in run("export --checkpoint base --output out").err


def test_every_option_reaches_the_export(run: Run, place: Path) -> None:
    words = "--dtype float32 --max-shard-size 20KB --json"
    plain = run(f"export --checkpoint base --output out {words}").json
    config = json.loads((place / "out" / "config.json").read_text())
    assert plain["dtype"] == config["dtype"] == "float32"
    assert plain["files"] == len(list((place / "out").glob("*.safetensors"))) > 2
    assert plain["bytes"] == sum(value.nbytes for value in held(place / "out").values())
    assert (plain["format"], plain["notes"]) == ("hf", [])
    assert plain["source_hash"] == plain["model_hash"]  # the same tensors
    assert run("export --checkpoint base --output out").code == 2
    again = run("export --checkpoint base --output out --overwrite --dtype bfloat16 --json").json
    assert again["model_hash"] != plain["model_hash"]


def test_experts_lie_apart_or_together(run: Run, place: Path) -> None:
    saved(tiny_experts("mixtral"), place / "experts")
    assert run("export --checkpoint experts --output hub").code == 0
    assert run("export --checkpoint experts --output fused --expert-layout fused").code == 0
    assert held(place / "hub").keys() == held(place / "experts").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in held(place / "fused")


# A .ckpt of Lightning


@pytest.fixture
def ckpt(place: Path) -> Path:
    trained(place / "run.ckpt", tiny_llama(vocab_size=VOCABULARY))
    return place


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("config", "has_tokenizer"), [("base", True), ("base/config.json", False)])
def test_a_ckpt_keeps_its_type(run: Run, ckpt: Path, config: str, has_tokenizer: bool) -> None:
    result = run(f"export --checkpoint run.ckpt --config {config} --output out")
    assert result.code == 0, result.err
    for words in ("dtype float32", "next tritter"):
        assert words in " ".join(result.out.split())
    assert (ckpt / "out" / "tokenizer.json").exists() == has_tokenizer
    assert not (ckpt / "out" / "state").exists()
    assert stock(ckpt / "out")


def test_a_ckpt_for_others_to_load(run: Run, ckpt: Path) -> None:
    words = "--config base --output out --dtype bfloat16 --json"
    plain = run(f"export --checkpoint run.ckpt {words}").json
    assert (plain["dtype"], plain["notes"]) == ("bfloat16", [])


# Refusals


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--checkpoint base", "Missing option '--output'"),
        ("--checkpoint nowhere --output out", "--checkpoint = nowhere: no such folder"),
        ("--checkpoint base --output out --format peft", "peft: base has no LoRA experts"),
        ("--checkpoint base --output out --dtype bf16", "Did you mean bfloat16?"),
        ("--checkpoint base --output base", "base already exists"),
        ("--checkpoint base --output base --overwrite", "outside the source"),
        ("--checkpoint base --output base/out", "outside the source"),
        ("--checkpoint base --output . --overwrite", "outside the source"),
        ("--checkpoint base --output out --expert-layout hub", "llama model has no experts"),
        ("--checkpoint base --output out --config base --prefix a.", "--config, --prefix: "),
        ("--checkpoint run.ckpt --output out", "--config is missing"),
        ("--checkpoint run.ckpt --output out --config run.ckpt", "must be a config.json"),
        ("--checkpoint run.ckpt --output out --config elsewhere", "elsewhere: no such folder"),
        ("--checkpoint run.ckpt --output out --config empty", "holds no config.json"),
        ("--checkpoint run.ckpt --output out --config base --prefix a.", "--prefix = a.: "),
        ("--checkpoint trap.ckpt --output out --config base", "Nothing was executed"),
        ("--checkpoint list.ckpt --output out --config base", "it contains a list"),
        ("--checkpoint wide --output out --dtype float16", "--dtype = float16: the largest value"),
    ],
)
def test_a_wrong_request_is_told_and_nothing_is_written(
    run: Run, place: Path, words: str, told: str
) -> None:
    (place / "empty").mkdir()
    model = tiny_llama(vocab_size=VOCABULARY)
    torch.save({"state_dict": model.state_dict()}, place / "run.ckpt")
    torch.save({"state_dict": Trap(place / "sprung")}, place / "trap.ckpt")
    torch.save([1], place / "list.ckpt")
    model.model.norm.weight.data.fill_(1e5)
    saved(model, place / "wide")
    before = snapshot(place)
    result = run(f"export {words}")
    assert result.code == 2, result.out
    assert told in " ".join(result.err.split())
    assert snapshot(place) == before


def test_a_checkpoint_of_a_development_version_is_read_as_a_plain_folder(
    run: Run, place: Path
) -> None:
    assert run("expand --checkpoint base --method width --output grown --no-measure").code == 0
    path = place / "grown/tritter.json"
    plain = json.loads(path.read_text())
    del plain["format"]
    path.write_text(json.dumps(plain | {"format_version": 4}))
    for words in ("inspect grown", "export --checkpoint grown --output out"):
        refused = run(words)
        assert refused.code == 2 and "development version" in refused.err
        assert "--ignore-lineage" in refused.err and not (place / "out").exists()
    words = "export --checkpoint grown --output out --ignore-lineage --dtype float32"
    assert run(words).code == 0 and not (place / "out/tritter.json").exists()
    assert run("inspect out").code == 0


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/tool_use.jinja", "vocab.txt", "tekken.json"]
)
def test_tokenizer_files_are_kept_and_recorded(run: Run, place: Path, name: str) -> None:
    """transformers writes further templates in a folder of their own, and classes name files."""
    (place / "base" / name).parent.mkdir(exist_ok=True)
    (place / "base" / name).write_text("{{ messages }}")
    assert name in run("inspect base --json").json["beside"]
    assert run("expand base --method llama-pro --output grown").code == 0
    for _ in range(2):
        assert run("export grown --output plain --overwrite").code == 0
    assert (place / "plain" / name).read_text() == "{{ messages }}"
    assert ", 0 changed" in run("history grown --verify").out
    recorded = json.loads((place / "grown/tritter.json").read_text())["parent_file_digests"]
    assert recorded[name] == sha256(b"{{ messages }}").hexdigest()
    for folder in ("grown", "plain"):
        assert name in run(f"push {folder} owner/name --dry-run --json").json["files"]

"""`tritter expand --method vocab`: learned and given tokens, what is printed, what is refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.cli.conftest import VOCABULARY, Run, snapshot
from tests.oracle import logits, stock, tokens
from tests.oracle.families import tiny
from tritter.checkpoints import Lineage
from tritter.errors import RequestError

EXPAND = "expand --checkpoint base --method vocab"
CODE = "def grows(self, layer):\n    return self.model.grows(layer) if layer else None\n"


@pytest.fixture
def base(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import shutil

    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(sources / "llama", tmp_path / "base"))
    lines = (json.dumps({"text": f"# part {n}\n{CODE * 3}"}) for n in range(40))
    (tmp_path / "code.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_tokens_are_learned_from_data(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = list[str]()

    def show(text: str) -> nullcontext[None]:
        shown.append(text)
        return nullcontext()

    monkeypatch.setattr("tritter.cli.expand.status", show)
    result = run(f"{EXPAND} --new-tokens 20 --domain-data code.jsonl --output grown")
    assert result.code == 0, result.err
    assert shown == ["learning tokens"]  # it may take long
    text = " ".join(result.out.split())
    assert "20 new tokens, and 0" not in text and "vocabulary 300 320" in text
    assert "exact yes: function-preserving for old tokens" in text
    assert "new tokens get" in text and "of the probability" in text
    old, new = (Tokenizer.from_file(f"{folder}/tokenizer.json") for folder in ("base", "grown"))
    assert len(new.encode(CODE).ids) < 0.7 * len(old.encode(CODE).ids)
    before, after = (stock(Path(folder)) for folder in ("base", "grown"))
    ids = tokens(VOCABULARY)
    assert torch.allclose(logits(after, ids)[..., :VOCABULARY], logits(before, ids), atol=1e-5)
    assert run("history grown --verify").code == 0
    checked = run("validate --source base --result grown")
    assert "forward equivalence logits" in " ".join(checked.out.split())
    assert "not comparable" not in checked.out and " passed" in checked.out
    inspected = run("inspect grown")
    assert inspected.code == 0 and "rows of old tokens are kept" in inspected.out


def test_documents_that_a_lineage_holds_out_give_no_tokens(run: Run, base: Path) -> None:
    """A fifth of the documents is held out; a word in one of those alone is not learned."""
    words = [f"zq{chr(97 + n)}" for n in range(26)]
    lines = (
        json.dumps({"text": f"{n} {word} {word} {word} {word}"}) for n, word in enumerate(words)
    )
    Path("words.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert run(f"{EXPAND} --domain-data words.jsonl --output grown").code == 0
    known = Tokenizer.from_file("grown/tokenizer.json")
    learned = [word for word in words if len(known.encode(f" {word}").ids) == 1]
    assert 0 < len(learned) < len(words)


def test_a_recipe_of_the_result_makes_it_again(run: Run, base: Path) -> None:
    run(f"{EXPAND} --new-tokens 9 --domain-data code.jsonl --output grown")
    recipe = run("history grown --recipe").out
    Path("grow.yaml").write_text(recipe, encoding="utf-8")
    again = run("expand --checkpoint base --recipe grow.yaml --output again")
    assert again.code == 0, again.err
    first, second = (Lineage.read(Path(folder)) for folder in ("grown", "again"))
    assert first is not None and second is not None and first.model_hash == second.model_hash


def test_a_dry_run_and_json_write_nothing(
    run: Run, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("code").mkdir()
    Path("code.jsonl").rename("code/code.jsonl")
    Path("code/package.json").write_text('{"name": "code"}')
    before = snapshot(base.parent)
    result = run(f"{EXPAND} --new-tokens 20 --domain-data code --dry-run --json")
    assert result.code == 0, result.err
    assert "--domain-data: 1 file read; skipped 1 (.json of one object 1)" in caplog.text
    plain = result.json
    assert plain["shapes"]["after"]["vocab_size"] == 320 and plain["steps"][0]["is_exact"]
    assert snapshot(base.parent) == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "--domain-data is missing"),
        ("--tokens [grows] --domain-data code.jsonl", "--domain-data is not needed"),
        ("--new-tokens 5 --domain-data none.txt", "none.txt"),
        ("--new-tokens 5 --domain-data code.jsonl --steps 3", "vocab trains nothing"),
        ("--new-tokens 90000 --domain-data code.jsonl", "frequent pairs of tokens; set at most"),
        ("--tokens [grows] --head-init quieter", "quiet"),
        ("--tokens [grows] --new-tokens 2", "--tokens lists the new tokens"),
        ("--vocab-init omp --new-tokens 2 --domain-data code.jsonl", "--tokenizer"),
    ],
)
def test_bad_requests_write_nothing(run: Run, base: Path, words: str, reason: str) -> None:
    before = snapshot(base.parent)
    result = run(f"{EXPAND} {words}")
    assert result.code == 2 and reason in " ".join(result.err.split()), result.err
    assert snapshot(base.parent) == before


@pytest.mark.full
@pytest.mark.parametrize("family", ["opt", "falcon", "gemma4_text"])
def test_model_types_without_a_table_get_tokens(
    run: Run, base: Path, tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "falcon": {},
        "gemma4_text": {  # a second embedding has rows of all tokens too
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "head_dim": 8,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
        },
    }
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=None,
        **sizes[family],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((base / name).read_bytes())
    result = run("expand other --method vocab --tokens [grows] --output grown")
    assert result.code == 0, result.err
    before, after = (stock(tmp_path / folder) for folder in ("other", "grown"))
    ids = tokens(VOCABULARY)
    assert torch.allclose(logits(after, ids)[..., :VOCABULARY], logits(before, ids), atol=1e-5)
    assert logits(after, torch.full((1, 3), after.config.vocab_size - 1)).isfinite().all()


@pytest.mark.full
def test_an_embedding_that_has_more_rows_than_tokens_is_refused(run: Run, base: Path) -> None:
    """Moshi has one row more, of the start of a text."""
    from transformers import MoshiConfig, MoshiForCausalLM

    config = MoshiConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
    )
    MoshiForCausalLM(config).save_pretrained("other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("other", name).write_bytes((base / name).read_bytes())
    result = run("expand other --method vocab --tokens [grows] --output grown")
    assert result.code == 2 and "are not exactly the tokens" in result.err
    assert not Path("grown").exists()


def test_a_live_model_has_no_tokenizer_to_extend() -> None:
    import tritter

    with pytest.raises(RequestError, match="needs a checkpoint folder"):
        tritter.expand(tiny("llama"), "vocab", tokens=["grows"])


def test_the_python_api_adds_tokens(base: Path) -> None:
    import tritter

    tritter.expand("base", "vocab", tokens=["grows", " layers"], output="grown")
    assert tritter.load("grown").config.vocab_size == 320

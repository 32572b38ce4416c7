"""`tritter generate`: what stock transformers would say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.cli.conftest import Run
from tests.oracle import stock


def _greedy(folder: Path, prompt: str, steps: int) -> str:
    """Take the likeliest token, the whole text read anew each time."""
    model, tokenizer = stock(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
        if int(best) == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_by_default(run: Run, sources: Path, family: str) -> None:
    folder = sources / family
    words = f"generate --checkpoint {folder} --max-new-tokens 12 --json --prompt"
    result = run(words, "the model grows")
    assert result.code == 0, result.err
    assert result.json["text"] == _greedy(folder, "the model grows", 12)
    assert result.json["prompt"] == "the model grows"


def test_a_grown_model_says_the_same(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width,llama-pro").code == 0
    words = "--max-new-tokens 12 --prompt layer"
    before = run(f"generate --checkpoint base {words}")
    after = run(f"generate --checkpoint base-width-llama-pro {words}")
    assert before.out == after.out
    assert before.out.startswith("layer")


def test_a_seed_decides_what_is_drawn(run: Run, place: Path) -> None:
    words = "generate --checkpoint base --prompt data --temperature 1.5 --max-new-tokens 20 --json"
    state = torch.random.get_rng_state()
    first, again, other = (run(f"{words} --seed {seed}").json["text"] for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", ""], "at least one token"),
        (
            ["--prompt", "data", "--max-new-tokens", "64"],
            "the model supports 64 positions; at most",
        ),
        (["--prompt", "data " * 80], "a shorter --prompt"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, place: Path, words: list[str], said: str) -> None:
    result = run("generate --checkpoint base", *words)
    assert result.code == 2
    assert said in result.err


def test_without_a_tokenizer(run: Run, place: Path) -> None:
    for path in (place / "base").glob("tokenizer*"):
        path.unlink()
    result = run("generate --checkpoint base --prompt hello")
    assert result.code == 2
    assert "base contains no tokenizer" in result.err
    (place / "base" / "tokenizer.json").write_text("{")
    assert run("generate --checkpoint base --prompt hello").code == 2


def test_a_damaged_model_is_refused(run: Run, place: Path) -> None:
    shutil.copyfile(place / "base" / "tokenizer.json", place / "base" / "model.safetensors")
    result = run("generate --checkpoint base --prompt hello")
    assert result.code == 2
    assert "Traceback" not in result.err


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_weights_that_are_not_finite_are_named(run: Run, place: Path, temperature: str) -> None:
    model = stock(place / "base")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(place / "base")
    result = run(f"generate --checkpoint base --prompt hello --temperature {temperature}")
    assert result.code == 2
    assert "model.norm.weight has values that are not finite" in result.err
    assert "model.norm.weight has values that are not finite" in result.err
    assert result.out == ""


def test_weights_that_overflow_are_told(run: Run, place: Path) -> None:
    model = stock(place / "base")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
        model.model.norm.weight.fill_(3e38)
    model.save_pretrained(place / "base")
    result = run("generate --checkpoint base --prompt hello --temperature 1")
    assert result.code == 1
    assert "not finite" in result.err and "Traceback" not in result.err


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"is_encoder_decoder": True}, "can't generate from base: "),
        ("generation_config.json", {"output_hidden_states": ["a"]}, "can't generate from base: "),
        ("tokenizer_config.json", {"model_max_length": "x"}, "base contains no usable tokenizer: "),
    ],
)
def test_settings_that_transformers_fails_over_are_told(
    run: Run, place: Path, file: str, change: dict[str, object], said: str
) -> None:
    path = place / "base" / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | change))
    result = run("generate --checkpoint base --prompt the --max-new-tokens 2")
    assert result.code in (1, 2) and said in result.err

"""`tritter generate`: what stock transformers would say."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from tests.cli.conftest import Run
from tests.oracle import chat as chat_oracle
from tests.oracle import stock
from tritter.cli.generate import _Answer
from tritter.evaluation.inference import continued_text


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


def test_a_terminal_shows_that_the_model_is_loaded(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run("generate base --max-new-tokens 2 --prompt layer --json")
    assert "loading the model" in result.err and result.json["prompt"] == "layer"


def test_a_grown_model_says_the_same(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width,llama-pro").code == 0
    words = "--max-new-tokens 12 --prompt layer"
    before = run(f"generate --checkpoint base {words}")
    after = run(f"generate --checkpoint base-width-llama-pro {words}")
    assert before.out == after.out
    assert before.out.startswith("layer")


@pytest.mark.parametrize(
    ("temperature", "settings"),
    [
        ("1.5", {"do_sample": True, "min_p": 0.9}),
        ("0", {"num_beams": 4, "min_new_tokens": 9}),
        ("0", {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}),
        ("0.7", {"suppress_tokens": [*range(40, 200)], "stop_strings": "a"}),
    ],
)
def test_settings_of_generation_config_are_not_used(
    run: Run, place: Path, temperature: str, settings: dict[str, object]
) -> None:
    words = f"generate --checkpoint base --prompt data --temperature {temperature} --json"
    before = run(words).json["text"]
    path = place / "base" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    assert run(words).json["text"] == before


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


def test_of_a_prompt_only_the_last_logits_are_computed(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    head = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        if self.out_features == vocabulary:
            found.append(hidden.shape[1])
        return head(self, hidden)

    vocabulary = stock(place / "base").lm_head.out_features
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    assert run("generate --checkpoint base --prompt hello_there --max-new-tokens 3").code == 0
    assert found and set(found) == {1}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"is_encoder_decoder": True}, "can't generate from base: "),
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


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A chat checkpoint in the working folder."""
    monkeypatch.chdir(tmp_path)
    return chat_oracle.checkpoint(Path("chat"))


def _answer(folder: Path, messages: list[dict[str, str]], steps: int) -> str:
    """Return the answer of stock transformers."""
    model, tokenizer = stock(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=steps, do_sample=False)
    text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text).rstrip("\ufffd")  # a part of a character


def test_a_message_is_rendered_and_answered(run: Run, chat: Path) -> None:
    messages = [{"role": "system", "content": "Keep."}, {"role": "user", "content": "Who are you?"}]
    words = "generate chat --chat --max-new-tokens 9 --system Keep. --prompt"
    result = run(f"{words.replace('--prompt', '')} --json --prompt", "Who are you?")
    assert result.code == 0, result.err
    assert result.json["text"] == _answer(chat, messages, 9)
    assert result.json["finish_reason"] == "length" and result.json["num_new_tokens"] == 9
    shown = run(words, "Who are you?")
    assert shown.out == result.json["text"] + "\n" != "\n"
    assert "cut after 9 tokens" in shown.err


def test_turns_at_a_terminal_keep_their_history(
    run: Run, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Who are you?", "a gate", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    result = run("generate chat --chat --max-new-tokens 5")
    assert result.code == 0, result.err
    messages, answers = [], []
    for text in ("Who are you?", "a gate"):
        messages.append({"role": "user", "content": text})
        answers.append(_answer(chat, messages, 5))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert result.out == "".join(f"{each}\n" for each in answers)


@pytest.mark.parametrize("words", ["", " --max-new-tokens 400"])
def test_a_conversation_ends_where_the_model_has_no_more_positions(
    run: Run, chat: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """An answer is cut at the last position, whatever was typed; the next turn has no room."""
    config = json.loads((chat / "config.json").read_text("utf-8"))
    (chat / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}), "utf-8")
    lines = iter(["Who are you?", "a gate"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    result = run(f"generate chat --chat{words}")
    assert result.code == 0, result.err
    assert "the conversation fills the 40 positions of the model; begin another" in result.err
    assert ": the model has 40 positions" in result.err


@pytest.mark.parametrize("end", ["template", "generation_config"])
def test_an_answer_stops_at_every_end_token(run: Run, chat: Path, end: str) -> None:
    model = stock(chat)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # equal logits: token 0, <|im_end|>, is always written
    model.config.eos_token_id = model.generation_config.eos_token_id = 3
    if end == "generation_config":  # of a template without an end of turn
        model.generation_config.eos_token_id = [3, 0]
    model.save_pretrained(chat)
    template = None if end == "template" else "{{ messages[0]['content'] }}"
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(chat)
    result = run("generate chat --chat --json --prompt hello").json
    assert (result["text"], result["num_new_tokens"], result["finish_reason"]) == ("", 1, "stop")


def test_a_prompt_comes_from_standard_input(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("generate base --max-new-tokens 5 --prompt", "the model").out
    for words in ("", "--prompt -"):
        monkeypatch.setattr("sys.stdin", io.StringIO("the model\n"))
        assert run(f"generate base --max-new-tokens 5 {words}").out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("caf\udce9"))  # a byte of Latin-1, in a C locale
    result = run("generate base")
    assert result.code == 2 and "--prompt: standard input is not text" in result.err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    result = run("generate base")
    assert result.code == 2 and "Missing --prompt" in result.err


def test_a_conversation_needs_a_template(run: Run, place: Path, chat: Path) -> None:
    chat.joinpath("chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    result = run("generate chat --chat --system keep --prompt a")
    assert result.code == 2 and "no system" in result.err and "without --system" in result.err
    result = run(f"generate {place / 'base'} --chat --prompt a")
    assert result.code == 2 and "no chat template" in result.err
    result = run("generate chat --system keep --prompt a")
    assert result.code == 2 and "--system = keep: requires --chat" in result.err
    result = run("generate chat --prompt a --max-new-tokens 1")
    assert result.code == 0 and "--chat sends a message" in result.err


def test_a_part_of_a_character_waits_for_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chat_oracle.tokenizer()
    ids = tokenizer.encode("a 猫<|im_end|>", add_special_tokens=False)
    shown = _Answer(lambda new: continued_text(tokenizer.decode, [], new), {ids[-1]}, is_shown=True)
    shown.put(torch.tensor([[1, 2]]))  # the prompt
    seen = []
    for token in ids:
        shown.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    assert "".join(seen) == "a 猫" and set(seen) <= {"a", " ", "a ", "", "猫"}


def test_a_continuation_keeps_its_space() -> None:
    inner = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    inner.decoder = decoders.Metaspace()
    assert inner.decode([1]) == "b" and continued_text(inner.decode, [0], [1, 0]) == " b a"

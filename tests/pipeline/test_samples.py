"""Samples of a run: before, during and after training, of domains and of own prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import oracle
from tests.oracle.chat import tokenizer as chat_tokenizer
from tests.oracle.families import tiny
from tests.pipeline.offline_wandb import offline_runs
from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.core.models import load_tokenizer
from tritter.data.chat import START, Chat, ids_of
from tritter.data.documents import Documents
from tritter.data.records import Conversation
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.errors import RequestError
from tritter.evaluation.inference import generated_tokens
from tritter.pipeline import Outcome
from tritter.pipeline.samples import _prompt_of, generate_samples

Run = Callable[..., Outcome]
PROMPTS = "evaluation.prompts=['the old house','one']"


@pytest.mark.parametrize("positions", [2, 16, 40])
def test_no_more_is_read_than_a_model_has_learned_positions_for(positions: int) -> None:
    model = tiny("gpt2", max_position_embeddings=positions)
    longest = list[int]()
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: longest.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    document = torch.arange(1, 97)
    held = SimpleNamespace(validation=SimpleNamespace(document=lambda _: document))
    corpus = SimpleNamespace(
        domains={"old": held},
        chat=None,
        tokenizer=SimpleNamespace(
            decode=lambda ids, **_: "".join(f" w{i}" for i in ids),
            encode=lambda *_, **__: SimpleNamespace(ids=[*range(1, 90)]),
        ),
    )
    run: Any = SimpleNamespace(
        data=SimpleNamespace(
            corpus=corpus,
            domains=("old",),
            stock_tokenizer=None,
            bounds=TextBounds(0),
            has_tokens_of=lambda _: True,
        ),
        config=SimpleNamespace(evaluation=SimpleNamespace(sample_tokens=60, prompts=["long"])),
    )
    found, _ = generate_samples(run, model, run, model)
    hook.remove()
    assert max(longest) <= positions and len(found) == 2
    assert all(each["before"] and each["prompt"] for each in found)


@pytest.mark.full
def test_own_prompts_are_continued_before_during_and_after_training(
    run_tiny: Run, tmp_path: Path
) -> None:
    asked = (PROMPTS, "evaluation.every_n_steps=3", "logger=wandb")
    run_tiny(tmp_path / "run", *asked)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    own = {each["prompt"]: each for each in summary["samples"] if not each["domain"]}
    assert own.keys() == {"the old house", "one"} and len(summary["samples"]) == 4
    lines = (tmp_path / "run/attempt_1/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 6, 6]
    assert [row["prompt"] for row in rows[:2]] == ["the old house", "one"]
    # The last ones are those of the published model, which stock transformers continues equally
    assert [row["continuation"] for row in rows[-2:]] == [
        own[row["prompt"]]["after"] for row in rows[-2:]
    ]
    folder = tmp_path / "run/checkpoint"
    tokenizer, model = load_tokenizer(folder), oracle.stock(folder)
    ids = [tokenizer.eos_token_id, *tokenizer("one", add_special_tokens=False).input_ids]
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4)[0, len(ids) :]
    assert own["one"]["after"] == tokenizer.decode(made, skip_special_tokens=True)
    (logged,) = (each for each in offline_runs(tmp_path / "run") if each.job_type == "run")
    steps = [row["trainer/global_step"] for row in logged.rows if "samples/training.path" in row]
    assert steps == [0, 3, 6]


@pytest.mark.full
def test_a_resumed_run_logs_the_same_samples(run_tiny: Run, tmp_path: Path) -> None:
    asked = (PROMPTS, "evaluation.every_n_steps=1", "trainer.save_every_n_steps=4")
    run_tiny(tmp_path / "whole", *asked)
    failing = (
        "callbacks.fail={_target_: tests.pipeline.test_loggers.FailOnce, folder: attempt_1, "
        f"marker: {tmp_path / 'failed'}}}"
    )
    with pytest.raises(KeyError, match="broken off"):
        run_tiny(tmp_path / "parts", *asked, failing)
    run_tiny(tmp_path / "parts", *asked, failing)
    whole, parts = (
        (tmp_path / name / "attempt_1/samples.jsonl").read_text() for name in ("whole", "parts")
    )
    assert whole == parts


@pytest.mark.full
def test_later_rounds_log_theirs(run_tiny: Run, tmp_path: Path) -> None:
    asked = (PROMPTS, "evaluation.every_n_steps=3", "logger=wandb", "pipeline.target_params=40000")
    run_tiny(tmp_path / "run", *asked)
    rounds = len([*(tmp_path / "run").glob("round_*/samples.jsonl")])
    (logged,) = (each for each in offline_runs(tmp_path / "run") if each.job_type == "run")
    steps = {row["trainer/global_step"] for row in logged.rows if "samples/training.path" in row}
    assert rounds > 1 and max(steps) == 6 * rounds and len(steps) >= 2 * rounds + 1


@pytest.mark.full
def test_processes_log_them_at_the_end(run_tiny: Run, tmp_path: Path) -> None:
    asked = (PROMPTS, "evaluation.every_n_steps=3", "logger=wandb", "data.batch_size=2")
    run_tiny(tmp_path / "run", *asked, "trainer=ddp", "trainer.devices=2")
    lines = (tmp_path / "run/attempt_1/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 3, 3, 6, 6]
    (logged,) = (each for each in offline_runs(tmp_path / "run") if each.job_type == "run")
    steps = [row["trainer/global_step"] for row in logged.rows if "samples/training.path" in row]
    assert steps == [6]


def test_greedy_answers_ignore_penalties_of_a_generation_config() -> None:
    model: Any = oracle.tiny_llama()
    expected = generated_tokens(model, [1, 2, 1, 2], max_new_tokens=40, end_ids=[0])
    model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=2)
    assert generated_tokens(model, [1, 2, 1, 2], max_new_tokens=40, end_ids=[0]) == expected


@pytest.mark.parametrize("has_template", [True, False])
def test_only_a_rendered_conversation_brings_its_own_start(has_template: bool) -> None:
    """Without a template, the start of a text precedes it, as in training."""
    own = chat_tokenizer()
    turns = {"role": "user", "content": "the class"}, {"role": "assistant", "content": "it"}
    found = Conversation(turns)
    chat = Chat(own if has_template else None, loss_on="answers")
    tokens = TokenisedDocuments.of(Documents.of([found]), own.backend_tokenizer, chat=chat)
    domain = SimpleNamespace(validation=tokens)
    run: Any = SimpleNamespace(data=SimpleNamespace(corpus=SimpleNamespace(domains={"a": domain})))
    prompt = _prompt_of(run, "a", 64)
    assert (prompt[0] >= START) == has_template and len(prompt) > 1


def test_a_prompt_is_a_message_of_the_user_if_there_is_a_template() -> None:
    tokenizer = chat_tokenizer()
    ids = Chat(tokenizer).prompt("the class")
    assert ids[0] >= START
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the class"}], add_generation_prompt=True
    )["input_ids"]
    assert [ids_of(each) for each in ids] == [*expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((PROMPTS, "evaluation.sample_tokens=0"), "they need evaluation.sample_tokens above 0"),
        (("evaluation.prompts=[a,a]",), "list each prompt once"),
        (("evaluation.prompts=['']",), "evaluation.prompts"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_config([*TINY, *words])

"""Options of other tools: each is rejected with a replacement, through the real command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.conftest import FakePipeline, Result
from tests.config.test_text_and_checkpoints import write_checkpoint
from tritter.cli.main import _COMMANDS, _SYNONYMS
from tritter.cli.main import main as cli_main
from tritter.conf_folder import config_folder
from tritter.config.components import known_keys
from tritter.config.suggestions import _HINTS, Hint

# words of train.py → what the message has to contain
HABITS = {
    "--expansion dus": "Did you mean expansion=dus?",
    "--expansion=dus": "Did you mean expansion=dus?",
    "--training.max_steps 3": "Did you mean training.max_steps=3?",
    "--seed 3": "Did you mean seed=3?",
    "--model base": "Did you mean: tritter train --checkpoint base, or model=hf model.path=base",
    "--model_name_or_path base": "tritter train --checkpoint base",
    "--checkpoint": "tritter train --checkpoint DIR, or model=hf model.path=DIR",
    "--model tiny": "Did you mean model=tiny?",
    "--epochs 3": "Epochs are not supported: set training.max_tokens or training.max_steps.",
    "--gpus 2": "Did you mean: trainer=gpu trainer.devices=2",
    "training.epochs=3": "epochs are not supported: set training.max_tokens or training.max_steps.",
    "training.num_train_epochs=3": "set training.max_tokens or training.max_steps.",
    "trainer.max_epochs=3": "set training.max_tokens or training.max_steps.",
    "gate.threshold=0.1": "Did you mean gate.retention?",
    "trainer.gpus=2": "Did you mean: trainer=gpu trainer.devices=2",
    "model=base": "Did you mean: model=hf model.path=base",
    "model=owner/name": "Did you mean: model=hf model.path=owner/name",
    "model.path=base": "model.path requires model=hf. Did you mean: model=hf model.path=base",
    "data.new=notes.jsonl": "data.new is not a key of data=stdlib (the current source). Did you "
    "mean: data=text data.new=notes.jsonl",
    "data.new=hf:owner/name": "Did you mean: data=hf data.new=hf:owner/name",
    "forgetting=EWC": "Did you mean ewc?",
    "expansion.width=768": "expansion.width.hidden_size, ",
    "data.text_field=body": "Did you mean: data=text data.text_field=body",
}


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("command", HABITS)
def test_a_habit_is_refused_with_what_to_type(
    run: Callable[..., Result],
    pipeline: FakePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    write_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    result = run(*command.split())
    assert result.code == 2 and pipeline.configs == []
    assert HABITS[command] in result.err
    assert not (tmp_path / "outputs").exists()


def test_keys_that_exist_get_no_hint() -> None:
    with_a_source = ("data.new", "data.old", "data.tasks", "model.path")
    hinted = {key for key in known_keys() if Hint.of(key, "3") is not None}
    assert hinted <= {*with_a_source}
    assert Hint.of("model", "tinny") is None  # a misspelled preset, not a folder


def test_every_group_may_be_typed_as_an_option() -> None:
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    shown = {group for group in groups if Hint.of(f"--{group}", "x") is not None}
    assert shown >= groups - {"hydra", "schema", "ladder"}


def test_what_is_advised_exists() -> None:
    further = {"seed", "resume", "hydra.run.dir", "trainer.accumulate_grad_batches"}
    known = {*known_keys(), *further}
    for hint in _HINTS:
        for word in hint.advice.replace(",", "").split():
            key = word.partition("=")[0]
            assert "." not in key or key in known, hint


@pytest.mark.parametrize(
    ("typed", "value", "command", "advice"),
    [
        ("--lr", "1e-4", "train", "training.learning_rate=1e-4"),
        ("--batch-size", "8", "train", "data.batch_size=8"),
        ("--max-steps", "8", "train", "training.max_steps=8"),
        ("--dataset", "x", "train", "data=text data.new=x"),
        ("--data", "notes.jsonl", "train", "data=text data.new=notes.jsonl"),
        ("data.train", "x", "train", "data=text data.new=x"),
        ("model", "gpt2", "train", "model=hf model.path=gpt2"),
        ("model.name", "x", "train", "model=hf model.path=x"),
        ("--output-dir", "x", "train", "hydra.run.dir=x"),
        ("--output-dir", "x", "expand", "--output x"),
        ("gradient_accumulation_steps", "4", "train", "trainer.accumulate_grad_batches=4"),
        ("bf16", "true", "train", "trainer.precision=bf16-mixed"),
        ("--device", "cuda", "train", "trainer=gpu"),
        ("hidden_size", "768", "train", "expansion=width expansion.width.hidden_size=768"),
        ("expand", "width", "train", "expansion=width"),
        ("--lr", "1e-4", "expand", "--learning-rate 1e-4"),
    ],
)
def test_natural_words_of_other_tools(typed: str, value: str, command: str, advice: str) -> None:
    hint = Hint.of(typed, value, command=command)
    assert hint is not None and hint.advice == advice


def test_natural_commands(capsys: pytest.CaptureFixture[str]) -> None:
    names = {each.__name__ for each, _ in _COMMANDS}
    assert set(_SYNONYMS.values()) <= names and not set(_SYNONYMS) & names
    assert cli_main(["finetune", "base"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err

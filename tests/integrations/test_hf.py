"""Methods against forgetting in the Hugging Face Trainer, compared with Tritter's own loop."""

import inspect
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests import oracle
from tests.oracle import chat
from tests.pipeline.outside_method import Widening
from tests.training.shipped import trainer_settings
from tritter.core.models import wrapped_tokenizer
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.chat import ids_of, is_unpredicted
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import RequestError
from tritter.integrations.hf import with_forgetting
from tritter.methods.forgetting import EWC, L2SP, SI, Distill, Freeze, OnlineEWC, Replay, SelfReplay
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.methods.forgetting.si import _estimated_importance
from tritter.seeds import derived_seed
from tritter.terminal import Console
from tritter.training import BaseModule, ForgettingMethod, OptimizerSettings, Schedule, Task, fit

LENGTH, RATE, CLIP = 16, 0.2, 0.5
NEW, OLD = oracle.tokens(batch=40, length=LENGTH, seed=5), oracle.tokens(batch=20, length=LENGTH)
Methods = Callable[[], Sequence[str | ForgettingMethod]]


def model_of() -> nn.Module:
    return oracle.tiny_llama(initializer_range=0.05, eos_token_id=0, pad_token_id=0)


def rows_of(sequences: Tensor) -> Dataset:
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in sequences.tolist()])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**options, **changes})


class Recording(Trainer):
    """Keeps the gradients of each step as the trainer finds them, below any method."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.__dict__.setdefault("seen", []).append(gradients_of(self.model))
        return loss


def recording(trainer_class: type[Any]) -> type[Any]:
    """Return a trainer that keeps the gradients of each step right before they are clipped."""
    return type("Above", (Recording, trainer_class), {})


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class RecordingModule(BaseModule):
    """Keeps, of each step of Tritter's loop, gradients before clipping and penalties after it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, Tensor]] = []
        self.penalties: list[list[float | None]] = []

    def apply_methods_to_gradients(self) -> None:
        super().apply_methods_to_gradients()
        self.seen.append(gradients_of(self.model))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.penalties.append([method.logged_loss(self.model) for method in self.methods])


def in_our_loop(folder: Path, methods: Sequence[ForgettingMethod], count: int) -> RecordingModule:
    """Train in Tritter's loop; what methods need is computed here from its definition."""
    model, seed = model_of(), derived_seed(42, "forgetting")
    fisher = diagonal_fisher(model, OLD)
    task = Task(
        seed=seed,
        old_sequences={"old": OLD.int()},
        latest=("old",),
        carried={n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()},
        state={"fisher": fisher, "si_importance": _estimated_importance(fisher, length=LENGTH)},
        state_before={"fisher": fisher},
        teacher=model_of(),
    )
    module = RecordingModule(
        model,
        schedule=Schedule.constant(RATE, max_steps=4),
        optimizer=OptimizerSettings(target="torch.optim.SGD", arguments={}, weight_decay=None),
        methods=methods,
    )
    settings = trainer_settings(
        log_every_n_steps=1,
        gradient_clip_val=CLIP,
        arguments={"accumulate_grad_batches": count},
    )
    fit(
        module,
        BatchStream(SequenceStream(NEW.int(), seed=0), batch_size=4, num_batches=4 * count),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=task,
    )
    return module


def in_trainer(
    folder: Path, methods: Sequence[str | ForgettingMethod], count: int, **changes: Any
) -> Any:
    """Train on the rows of Tritter's loop, in their order."""
    stream = BatchStream(SequenceStream(NEW.int(), seed=0), batch_size=4)
    order = torch.cat([batch["input_ids"] for _, batch in zip(range(16), stream, strict=False)])
    options = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": count}
    trainer = recording(with_forgetting(Trainer, methods))(
        model_of(),
        arguments(folder, **options, **changes),
        train_dataset=rows_of(order),
        old_data=rows_of(OLD),
    )
    trainer.train()
    return trainer


COMPARED: dict[str, Methods] = {
    "ewc": lambda: [EWC(ewc_lambda=1e3, refresh_steps=2)],
    "online_ewc, normalised": lambda: [OnlineEWC(ewc_lambda=1.0, normalise="mean")],
    "l2sp": lambda: [L2SP(l2sp_lambda=0.5)],
    "si": lambda: [SI(si_lambda=2.0)],
    "distill": lambda: [Distill(weight=3.0)],
    "si and distill": lambda: [SI(si_lambda=2.0), Distill(weight=3.0)],
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", COMPARED)
def test_gradients_and_penalties_are_those_of_our_loop(
    tmp_path: Path, name: str, count: int
) -> None:
    ours = in_our_loop(tmp_path / "ours", COMPARED[name](), count)  # type: ignore[arg-type]
    trainer = in_trainer(tmp_path / "theirs", COMPARED[name](), count)
    assert len(ours.seen) == len(trainer.seen) == 4
    for expected, found in zip(ours.seen, trainer.seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    for key, value in ours.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(key), value, rtol=1e-4, atol=1e-6)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    penalties = ours.penalties[count - 1 :: count]
    for row, expected_values in zip(logged, penalties, strict=True):
        for method, expected_value in zip(ours.methods, expected_values, strict=True):
            if expected_value is not None:
                key = f"forgetting/{method.name}/loss"
                assert row[key] == pytest.approx(expected_value, rel=1e-3, abs=1e-9)


@pytest.mark.full
def test_a_wrong_factor_would_be_seen(tmp_path: Path) -> None:
    """The negative control of the comparison above: a penalty counted once per micro-batch."""
    ours = in_our_loop(tmp_path / "ours", [L2SP(l2sp_lambda=0.5)], 4)
    trainer = in_trainer(tmp_path / "theirs", [L2SP(l2sp_lambda=2.0)], 4)
    key = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trainer.seen[3][key], ours.seen[3][key], rtol=1e-3, atol=1e-6)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("variant", ["default", "replay", "no counts", "own loss", "declared mean"])
def test_distillation_counts_once_however_the_trainer_scales(tmp_path: Path, variant: str) -> None:
    """Four micro-batches of 4 rows against one batch of 16."""
    found = {}
    for count in (1, 4):
        methods: list[Any] = [Distill(weight=5.0, temperature=1.0)]
        if variant == "replay":  # every other micro-batch has an old row
            methods.append(Replay(fraction=0.125))
        own = with_forgetting(Trainer, methods)
        trainer = recording(own)(
            model_of(),
            arguments(
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=16 // count,
                gradient_accumulation_steps=count,
                # replay sets the order of the rows, the same for both
                train_sampling_strategy="random" if variant == "replay" else "sequential",
                max_grad_norm=0.0,
            ),
            train_dataset=rows_of(NEW),
            compute_loss_func=own_loss if variant == "own loss" else None,
            **({"old_data": rows_of(OLD)} if variant == "replay" else {}),
        )
        if variant == "no counts":
            trainer.model_accepts_loss_kwargs = False
        if variant == "declared mean":
            trainer.model_accepts_loss_kwargs = False
            trainer.loss_is_scaled_for_ga = False
        trainer.train()
        found[count] = trainer
    torch.testing.assert_close(found[4].seen[1], found[1].seen[1], rtol=1e-3, atol=1e-6)
    rows = [each.state.log_history[1] for each in found.values()]
    assert rows[0]["forgetting/distill/loss"] > 0
    for key in ("loss", "forgetting/distill/loss"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3)


@pytest.mark.parametrize("template", [chat.CHATML, None])
def test_an_instruct_model_also_writes_conversations(tmp_path: Path, template: str | None) -> None:
    torch.manual_seed(0)
    own = chat.tokenizer(template)
    model = oracle.tiny_llama(
        vocab_size=len(own), eos_token_id=own.eos_token_id, bos_token_id=own.bos_token_id
    )
    rows = rows_of(torch.randint(4, len(own), (16, 40)))
    options = {"num_sequences": 8, "max_perplexity": 1e6, "min_distinct": 0.0, "fraction": 0.5}
    methods = [SelfReplay(**options), EWC(refresh_steps=1, num_sequences=4)]  # which reads it
    trainer = with_forgetting(Trainer, methods)(
        model, arguments(tmp_path), train_dataset=rows, processing_class=own
    )
    trainer.train()
    written = trainer.forgetting._task.written
    opened = own.encode("<|im_start|>user\n", add_special_tokens=False)
    begins = written[:, : len(opened)]
    is_chat = (ids_of(begins) == torch.tensor(opened)).all(dim=1)
    assert is_chat.tolist() == [bool(template) and bool(n % 2) for n in range(8)]
    assert bool(is_unpredicted(begins[is_chat]).all())
    trainer.forgetting.is_running = True
    batch = next(iter(trainer.get_train_dataloader()))
    is_old = batch["is_replay"]
    assert bool(is_old.any()) and not bool((batch["labels"][~is_old] == -100).any())
    assert bool((batch["labels"][is_old] == -100).any()) == bool(template)


def test_old_and_generated_rows_have_their_shares(tmp_path: Path) -> None:
    methods = [Replay(fraction=0.25), SelfReplay(num_sequences=8, fraction=0.125)]
    trainer = with_forgetting(Trainer, methods)(
        oracle.tiny_llama(eos_token_id=0, pad_token_id=0),
        arguments(tmp_path, per_device_train_batch_size=8, max_steps=1),
        train_dataset=rows_of(NEW),
        old_data={"first": rows_of(OLD), "second": rows_of(OLD + 1)},
    )
    trainer.train()
    trainer.forgetting.is_running = True
    written = {tuple(row) for row in ids_of(trainer.forgetting._task.written).tolist()}
    loader = trainer.get_train_dataloader()
    found: Counter[str] = Counter()
    for batch in islice(iter(loader), 6):
        for ids, is_old in zip(batch["input_ids"].tolist(), batch["is_replay"], strict=True):
            found["new" if not is_old else "written" if tuple(ids) in written else "old"] += 1
    assert found == {"new": 30, "old": 12, "written": 6}
    assert len(loader) == math.ceil(len(NEW) / 5)


RESUMED: dict[str, tuple[Methods, int]] = {
    "ewc and replay": (lambda: [EWC(ewc_lambda=1e3, refresh_steps=2), Replay(fraction=0.3)], 3),
    "in the second epoch": (lambda: [SI(si_lambda=2.0), Distill(), Replay(fraction=0.3)], 9),
    "at an epoch's end": (lambda: [L2SP(), Replay(fraction=0.5)], 5),
    "text of two kinds": (
        lambda: [Replay(fraction=0.3), SelfReplay(num_sequences=8, max_perplexity=1e6)],
        4,
    ),
    "no old data": (
        lambda: [
            OnlineEWC(ewc_lambda=1.0, normalise="mean", refresh_steps=5, num_sequences=6),
            SelfReplay(num_sequences=8, max_perplexity=1e6),
        ],
        4,
    ),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, name: str) -> None:
    methods, at = RESUMED[name]

    def trainer(folder: Path, **changes: Any) -> Any:
        torch.manual_seed(0)
        changes = {"max_steps": 12, "optim": "adamw_torch", "learning_rate": 1e-2, **changes}
        return with_forgetting(Trainer, methods())(
            oracle.tiny_llama(
                initializer_range=0.05, attention_dropout=0.2, eos_token_id=0, pad_token_id=0
            ),
            arguments(folder, **changes),
            train_dataset=rows_of(NEW[:20]),
            old_data=None if name == "no old data" else rows_of(OLD),
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    parts = trainer(tmp_path / "parts", save_strategy="steps", save_steps=at)

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    parts.add_callback(Stop())
    parts.train()
    assert parts.state.global_step == at
    folder = tmp_path / "parts" / f"checkpoint-{at}"
    assert {path.name for path in (folder / "forgetting").iterdir()} == {
        "checkpoint.json",
        "tensors.safetensors",
    }
    torch.manual_seed(99)
    again = trainer(tmp_path / "parts")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    for key, value in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(key), value), key
    for one, other in zip(whole.forgetting.methods, again.forgetting.methods, strict=True):
        assert str(one.state_dict()) == str(other.state_dict())


def test_si_observes_task_gradients_before_clipping_and_actual_steps(tmp_path: Path) -> None:
    """ω = −Σ g·Δθ, with gradients taken below the methods and weights around each step."""

    class Weights(TrainerCallback):
        def __init__(self) -> None:
            self.before: list[dict[str, Tensor]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            copies = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}
            self.before.append(copies)

    weights = Weights()
    trainer = with_forgetting(Recording, [SI(si_lambda=5.0), L2SP(l2sp_lambda=0.5)])(
        model_of(),
        arguments(tmp_path, max_grad_norm=0.05, gradient_accumulation_steps=2),
        train_dataset=rows_of(NEW),
        old_data=rows_of(OLD),
        callbacks=[weights],
    )
    trainer.train()
    weights.on_step_begin(None, None, None, model=trainer.model)
    (si, _), seen = trainer.forgetting.methods, trainer.seen
    assert all(row["grad_norm"] > 0.05 for row in trainer.state.log_history[:4]), "it is clipped"
    for key, omega in si.path.path_integral.items():
        steps = zip(seen, weights.before[:-1], weights.before[1:], strict=True)
        expected = sum(-grads[key] * (after[key] - before[key]) for grads, before, after in steps)
        torch.testing.assert_close(omega, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_the_fisher_is_refreshed_whatever_is_around_the_model(tmp_path: Path, option: str) -> None:
    """A refresh is at step 2, with autocast or hooks on the model; the values are nearly equal."""
    found = []
    for changes in ({}, {option: True}):
        trainer = with_forgetting(Trainer, [EWC(ewc_lambda=1e3, refresh_steps=2)])(
            model_of(),
            arguments(tmp_path, **changes),
            train_dataset=rows_of(NEW),
            old_data=rows_of(OLD),
        )
        trainer.train()
        found.append(trainer)
    plain, other = (trainer.forgetting.methods[0].importance for trainer in found)
    for key, value in plain.items():
        torch.testing.assert_close(other[key].mean(), value.mean(), rtol=0.03, atol=0)
    if option == "bf16":
        assert "forward" in vars(found[1].model), "accelerate's autocast is around it again"
    assert found[0].state.log_history[-2]["loss"] == pytest.approx(
        found[1].state.log_history[-2]["loss"], rel=0.01
    )


def test_what_si_leaves_protects_the_next_training(tmp_path: Path) -> None:
    first = with_forgetting(Trainer, ["si"])(
        model_of(), arguments(tmp_path), train_dataset=rows_of(NEW), old_data=rows_of(OLD)
    )
    first.train()
    first.save_model(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    second = with_forgetting(Trainer, ["si"])(
        model, arguments(tmp_path), train_dataset=rows_of(NEW)
    )
    second.train()
    (before,), (after,) = first.forgetting.methods, second.forgetting.methods
    key = "model.layers.1.mlp.down_proj.weight"
    moved = before.path.recorded(first.model)["displacement"][key]
    latest = before.path.path_integral[key].clamp(min=0) / (moved.square() + before.options.xi)
    expected = before.importance[key] + latest
    torch.testing.assert_close(after.importance[key], expected, rtol=1e-3, atol=1e-6)


def test_the_best_model_comes_with_what_the_methods_knew_at_its_step(tmp_path: Path) -> None:
    class Worse(Trainer):
        """The third step is the best, which is not saved; the second is the best of the saved."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": (0.0, 3.0, 2.0, 1.0, 4.0)[self.state.global_step]}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    def trained(folder: Path, **changes: Any) -> Path:
        trainer = with_forgetting(Worse, ["si"])(
            model_of(),
            arguments(folder, **changes),
            train_dataset=rows_of(NEW),
            eval_dataset=rows_of(NEW[:4]),
            old_data=rows_of(OLD),
        )
        trainer.train()
        trainer.save_model(str(folder / "model"))
        return folder / "model"

    every = {f"{each}_strategy": "steps" for each in ("save", "eval")} | {"eval_steps": 1}
    best = trained(tmp_path / "best", load_best_model_at_end=True, save_steps=2, **every)
    alone = trained(tmp_path / "alone", max_steps=2)
    files = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    files -= {Path("training_args.bin")}
    assert Path("state/state.json") in files
    for name in files:
        assert (best / name).read_bytes() == (alone / name).read_bytes(), name


# Replay


TEXTS = [f"A line about the number {number}, and one more word.\n" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    documents = [Document(str(at), text) for at, text in enumerate(TEXTS)]
    plain = train_tokenizer(documents, vocab_size=280)
    wrapped = wrapped_tokenizer(plain, end_of_text=END_OF_TEXT)
    wrapped.pad_token = wrapped.eos_token
    return wrapped


def wide_model() -> nn.Module:
    return oracle.tiny_llama(vocab_size=280, initializer_range=0.05, eos_token_id=0)


class Batches(Trainer):
    """Keeps the rows that it is trained on."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        self.__dict__.setdefault("batches", []).append(dict(inputs))
        return super().training_step(model, inputs, *args)


def test_a_fraction_of_the_rows_is_old_text(tmp_path: Path, tokenizer: Any) -> None:
    """Exactly over time, through the trainer's collator, and new rows keep their random order."""
    new = oracle.tokens(280, batch=24, length=20, seed=3)
    trainer = with_forgetting(Batches, [Replay(fraction=0.3)])(
        wide_model(),
        arguments(tmp_path, max_steps=-1, num_train_epochs=2),
        train_dataset=Dataset.from_dict({"input_ids": new.tolist()}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        old_data={"lines": TEXTS},
    )
    trainer.train()
    epoch = -(-24 * 10 // (4 * 7))  # batches with 24 new rows among them
    assert len(trainer.batches) == trainer.state.global_step == 2 * epoch
    replayed, seen = 0, []
    text = "".join(TEXTS)
    for number, batch in enumerate(trainer.batches, 1):
        is_replay = batch["is_replay"]
        replayed += int(is_replay.sum())
        assert replayed == number * 4 * 3 // 10
        seen += batch["input_ids"][~is_replay].tolist()
        for ids in batch["input_ids"][is_replay].tolist():
            assert len(ids) == 20
            assert all(part in text for part in tokenizer.decode(ids).split(END_OF_TEXT))
    rows = new.tolist()
    order = [rows.index(row) for row in seen]
    assert sorted(order[:24]) == list(range(24)) and order[:24] != sorted(order[:24])
    assert sorted(order[24:48]) == list(range(24)) and order[24:48] != order[:24]


def test_rows_that_were_padded_count_as_if_they_stood_alone(tokenizer: Any) -> None:
    """Distillation and SI on a batch with padding against each of its rows alone, without."""
    student, teacher = wide_model(), oracle.tiny_llama(vocab_size=280, initializer_range=0.2)
    rows = [oracle.tokens(280, batch=1, length=length, seed=length)[0] for length in (20, 13, 7)]
    padded = tokenizer.pad({"input_ids": [row.tolist() for row in rows]}, return_tensors="pt")
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    labels[:, :4] = -100  # a prompt
    batch = {**padded, "labels": labels, "is_replay": torch.tensor([False] * 3)}

    def distilled(one: Mapping[str, Tensor]) -> tuple[float, int]:
        method = Distill(weight=1.0, temperature=1.0)
        method.begin_task(student, Task(seed=0, teacher=teacher))
        options = {n: v for n, v in one.items() if n == "attention_mask"}
        logits = student(input_ids=one["input_ids"], **options).logits
        return float(method.extra_loss(student, one, logits).detach()), one["input_ids"].numel()

    alone = [distilled({"input_ids": row[None]}) for row in rows]
    expected = sum(value * count for value, count in alone) / sum(count for _, count in alone)
    assert distilled(batch)[0] == pytest.approx(expected, rel=1e-4)

    method = SI()
    method.observe_batch(student, batch)
    student.zero_grad()
    method.observe_gradients(student)
    loss = sum(
        nn.functional.cross_entropy(
            student(input_ids=row[None]).logits[0, 3:-1], row[4:], reduction="sum"
        )
        for row in rows
    )
    (loss / sum(len(row) - 4 for row in rows)).backward()
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(
            method.path._gradients[key], parameter.grad, rtol=1e-3, atol=1e-6
        )


# The gate


def test_the_gate_compares_before_and_after(tmp_path: Path, tokenizer: Any) -> None:
    def trainer(texts: list[str], **changes: Any) -> Any:
        new = oracle.tokens(280, batch=24, length=20, seed=3)
        return with_forgetting(Trainer, ["l2sp"])(
            wide_model(),
            arguments(tmp_path, **changes),
            train_dataset=rows_of(new),
            processing_class=tokenizer,
            gate_documents={"lines": texts},
            retention=0.01,
        )

    harmful = trainer(TEXTS, learning_rate=10.0, max_grad_norm=0.0)
    harmful.train()
    assert harmful.gate.status == "rolled_back"
    (check,) = harmful.gate.checks
    assert check.n == 60 and check.value > 0.01
    assert harmful.state.log_history[-1]["gate/lines/change"] == check.value
    few = trainer(TEXTS[:29])
    few.train()
    assert few.gate.status == "undecided"
    still = trainer(TEXTS, learning_rate=0.0, save_strategy="steps", save_steps=3)
    still.train()
    assert still.gate.status == "kept" and still.gate.checks[0].value == 0.0
    resumed = trainer(TEXTS, learning_rate=0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.gate.checks[0].value == 0.0


# Refusals


@pytest.mark.parametrize(
    ("methods", "word"),
    [
        (["ewcc"], "Did you mean ewc"),
        ("ewcc", "methods = ewcc"),
        (["ewc", "ewc"], "once"),
        ([Freeze()], "requires_grad_"),
        ([Widening()], "its hook peak_rate needs train.py"),
        ([Widening()], "its hook load needs train.py"),
        ([Widening()], "its hook attach needs train.py"),
        ([Replay(fraction=0.75), SelfReplay()], "the sum must be below 1"),
        ([Distill(rows="old")], "no method replays"),
        ([EWC(ewc_lambda=-1.0)], "methods.ewc.ewc_lambda"),
    ],
)
def test_methods_that_do_not_go_together(methods: Any, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        with_forgetting(Trainer, methods)


def test_only_trainers_are_extended() -> None:
    with pytest.raises(RequestError, match="trainer_class"):
        with_forgetting(nn.Module, ["ewc"])


@pytest.mark.parametrize(
    ("methods", "changes", "options", "word"),
    [
        (["ewc"], {}, {"old_data": None}, "old_data"),
        (["ewc"], {}, {"old_data": "one text"}, "list of texts"),
        (["ewc"], {}, {"old_data": Dataset.from_dict({"text": ["a"]})}, "input_ids"),
        (["ewc"], {}, {"old_data": rows_of(OLD).select([])}, "old_data.old: it has no rows"),
        (["ewc"], {}, {"old_data": ["text"]}, "fast tokenizer"),
        (["self_replay"], {}, {"old_data": {"written": ["text"]}}, "rename this domain"),
        (["replay", "self_replay"], {}, {"old_data": None}, "replay needs old_data"),
        (["l2sp"], {"auto_find_batch_size": True}, {}, "auto_find_batch_size"),
        (["replay"], {"train_sampling_strategy": "sequential"}, {}, "train_sampling_strategy"),
        ([Replay(weights={"nwe": 2.0})], {}, {"old_data": {"new": rows_of(OLD)}}, "mean new"),
        (
            ["replay"],
            {},
            {"train_dataset": rows_of(NEW).to_iterable_dataset()},
            "train_dataset",
        ),
        (
            ["replay"],
            {},
            {"old_data": Dataset.from_dict({"input_ids": OLD.tolist()})},
            "have labels, which old rows lack",
        ),
    ],
)
def test_settings_that_methods_cannot_work_with(
    tmp_path: Path, methods: Any, changes: Any, options: Any, word: str
) -> None:
    given = {"train_dataset": rows_of(NEW), "old_data": rows_of(OLD), **options}
    with pytest.raises(RequestError, match=word):
        with_forgetting(Trainer, methods)(
            model_of(), arguments(tmp_path, **changes), **given
        ).train()


def test_a_model_wrapped_by_peft_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model_of(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RequestError, match="merge_and_unload"):
        with_forgetting(Trainer, ["l2sp"])(wrapped, arguments(tmp_path), train_dataset=rows_of(NEW))
    trainer = with_forgetting(Trainer, ["replay"])(
        wrapped, arguments(tmp_path), train_dataset=rows_of(NEW), old_data=rows_of(OLD)
    )
    trainer.train()  # rows need no weights


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    def trainer(*methods: Any, model: Any = None) -> Any:
        return with_forgetting(Trainer, methods)(
            model or model_of(),
            arguments(tmp_path, save_strategy="steps", save_steps=3),
            train_dataset=rows_of(NEW),
        )

    trainer(Distill()).train()
    with pytest.raises(RequestError, match="methods"):
        trainer("l2sp").train(resume_from_checkpoint=True)
    with pytest.raises(RequestError, match="another teacher"):
        trainer(Distill(), model=oracle.tiny_llama()).train(resume_from_checkpoint=True)
    plain = Trainer(
        model_of(),
        arguments(tmp_path / "plain", save_strategy="steps", save_steps=3),
        train_dataset=rows_of(NEW),
    )
    plain.train()
    with pytest.raises(RequestError, match="no forgetting/ folder"):
        trainer("l2sp").train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))


# TRL


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL, which reports nothing home."""
    monkeypatch.setenv("CI", "1")
    return pytest.importorskip("trl")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_padding_free", [False, True])
def test_sft_trainer_has_the_gradients_of_the_trainer(
    tmp_path: Path, tokenizer: Any, trl: Any, is_padding_free: bool
) -> None:
    """TRL's fused head makes no logits; distillation and penalties are those of the Trainer."""
    methods = [EWC(ewc_lambda=1e3, refresh_steps=2), Distill(weight=3.0)]
    options = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    trainers = []
    for kind in (Trainer, trl.SFTTrainer):
        args = arguments(tmp_path, **options)
        if kind is trl.SFTTrainer:
            extra = {"padding_free": is_padding_free, "max_length": None}
            args = trl.SFTConfig(**{**arguments(tmp_path, **options).to_dict(), **extra})
        trainer = recording(with_forgetting(kind, methods))(
            wide_model(),
            args,
            train_dataset=rows_of(NEW),
            processing_class=tokenizer,
            old_data=rows_of(OLD),
        )
        trainer.train()
        trainers.append(trainer)
    ours, theirs = trainers
    torch.testing.assert_close(theirs.seen, ours.seen, rtol=1e-3, atol=1e-6)
    for row, other in zip(ours.state.log_history[:4], theirs.state.log_history, strict=False):
        for name in ("loss", "forgetting/ewc/loss", "forgetting/distill/loss"):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-8)


def test_rows_that_packing_joins_with_replayed_ones_are_refused(
    tmp_path: Path, tokenizer: Any, trl: Any
) -> None:
    """TRL's packing is padding-free unless its strategy is `wrapped`."""

    def train(**changes: Any) -> None:
        options = {**arguments(tmp_path).to_dict(), "packing": True, "max_length": 16, **changes}
        with_forgetting(trl.SFTTrainer, [Distill(), Replay()])(
            wide_model(),
            trl.SFTConfig(**options),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
            old_data=TEXTS,
        ).train()

    with pytest.raises(RequestError, match="packing_strategy=wrapped"):
        train()
    train(packing_strategy="wrapped")


def test_sft_trainer_learns_prompts_and_replays_old_texts(
    tmp_path: Path, tokenizer: Any, trl: Any
) -> None:
    """From strings to a resumed run: prompt and completion, padded, with every kind of method."""

    def trainer(folder: Path, **changes: Any) -> Any:
        new = [{"prompt": text[:12], "completion": text[12:]} for text in TEXTS[:20]]
        methods = [EWC(ewc_lambda=10.0), Distill(weight=0.5), Replay(fraction=0.5)]
        args = trl.SFTConfig(**arguments(folder, max_steps=6, **changes).to_dict())
        return with_forgetting(trl.SFTTrainer, methods)(
            wide_model(),
            args,
            train_dataset=Dataset.from_list(new),
            processing_class=tokenizer,
            old_data={"lines": TEXTS[20:]},
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    parts = trainer(tmp_path / "parts", save_strategy="steps", save_steps=4)
    parts.train()
    again = trainer(tmp_path / "parts")
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for key, value in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(key), value), key


# Several processes


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """By DDP, with the same rows in each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for name, rank, count in (("one", 0, 1), ("two", 0, 2), ("two", 1, 2)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count} if count > 1 else {}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.integrations.ddp", str(tmp_path / name)]
        environment = {**os.environ, **address, **{k: str(v) for k, v in place.items()}}
        started.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
    one, two, other = (
        load_file(tmp_path / name) for name in ("one/rank_0", "two/rank_0", "two/rank_1")
    )
    for key, value in one.items():
        assert torch.equal(two[key], other[key]), key
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-6)


def test_what_is_overridden_is_there() -> None:
    """A signature or an attribute that goes away in a later transformers is seen here."""
    saving = inspect.signature(Trainer.save_model).parameters
    assert list(saving)[1:] == ["output_dir", "_internal_call"]
    losing = inspect.signature(Trainer.compute_loss).parameters
    assert list(losing)[1:] == ["model", "inputs", "return_outputs", "num_items_in_batch"]
    assert getattr(Trainer, "loss_is_scaled_for_ga", None) is None  # some have none
    source = inspect.getsource(Trainer)
    assert "loss / self.current_gradient_accumulation_steps" in source

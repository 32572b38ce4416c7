"""Resume inside a stage: bitwise what an uninterrupted training gives, wherever it was killed."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import oracle
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SETTINGS, task
from tritter.data.batches import BatchStream, SequenceStream
from tritter.errors import TritterError
from tritter.methods.forgetting import EWC, L2SP, SI, Distill, Freeze, OnlineEWC, Replay
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    OptimizerSettings,
    Schedule,
    Task,
    fit,
    fitting,
    read_metrics,
)
from tritter.training.callbacks import StepProgress, _rate_text
from tritter.training.checkpoint_io import SafetensorsCheckpointIO, decode, encode
from tritter.training.metrics import rotate_metrics

STEPS = 25  # of 4 sequences out of 40: epochs of the data end at steps 10 and 20
Methods = Callable[[], Sequence[ForgettingMethod]]
SLOW = pytest.mark.slow  # each method is killed once and twice in the quick tests
METHODS: dict[str, Methods] = {
    "none": tuple,
    "l2sp and replay": lambda: (L2SP(l2sp_lambda=0.1), Replay(fraction=0.3)),
    "ewc": lambda: (EWC(ewc_lambda=1e3),),
    "freeze": lambda: (Freeze(new_only=True, until=12, thaw="top_down"),),
    "distill": lambda: (Distill(weight=1.0), Replay(fraction=0.3)),
    "si, online_ewc and replay": lambda: (
        SI(si_lambda=1.0),
        OnlineEWC(ewc_lambda=1e3, refresh_steps=4),
        Replay(fraction=0.3),
    ),
}


def with_something_new(told: Task) -> Task:
    """Let a part of one parameter, and another one, have come with an expansion."""
    told.carried["model.layers.2.mlp.down_proj.weight"][:, :10] = False
    told.carried["model.norm.weight"][...] = False
    return told


def train(
    folder: Path,
    methods: Methods,
    monkeypatch: pytest.MonkeyPatch,
    *,
    kill_at: int | None = None,
) -> tuple[nn.Module, FitResult]:
    """Train a model with dropout, so that the random state counts; perhaps be killed."""
    torch.manual_seed(7)
    model = oracle.tiny_llama(initializer_range=0.05, attention_dropout=0.2)
    plain = with_something_new(task(model))
    fisher = diagonal_fisher(model, oracle.tokens(batch=4))
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    batches = BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=STEPS)
    # A resumed process begins with another random state, which must not matter
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-2, max_steps=STEPS),
        optimizer=OptimizerSettings(),
        methods=methods(),
    )
    if kill_at is not None:
        whole = fitting._build_trainer

        def with_killer(settings, callbacks, max_steps, *, loggers):  # type: ignore[no-untyped-def]
            return whole(settings, [KillAt(kill_at), *callbacks], max_steps, loggers=loggers)

        monkeypatch.setattr(fitting, "_build_trainer", with_killer)
    told = Task(
        carried=plain.carried,
        old_sequences=plain.old_sequences,
        seed=0,
        latest=("old",),
        state={"fisher": fisher, "online_fisher": fisher, "si_importance": fisher},
        teacher=oracle.tiny_llama(),
    )
    for method in module.methods:
        method.freeze(model, told, max_steps=STEPS)
    try:
        result = fit(
            module,
            batches,
            settings=replace(SETTINGS, save_every_n_steps=5),
            folder=folder,
            label="test",
            console=Console(quiet=True),
            task=told,
        )
    finally:
        monkeypatch.undo()
    return model, result


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "kills",
    [(3,), (9, 10), *(pytest.param(at, marks=SLOW) for at in [(7,), (10, 12, 21), (24,)])],
    ids=str,
)
def test_bitwise_as_if_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kills: tuple[int, ...]
) -> None:
    methods = METHODS[name]
    whole, expected = train(tmp_path / "whole", methods, monkeypatch)
    for step in kills:
        with pytest.raises(Killed):
            train(tmp_path / "parts", methods, monkeypatch, kill_at=step)
    parts, result = train(tmp_path / "parts", methods, monkeypatch)
    for parameter_name, parameter in whole.named_parameters():
        assert torch.equal(parameter, parts.get_parameter(parameter_name)), parameter_name
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    rows, before = read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole")
    losses = [[(row["step"], row["train/loss"]) for row in r if row["train/loss"]]
              for r in (rows, before)]  # fmt: skip
    assert losses[0] == losses[1] and losses[0][0][0] == "2"  # steps that are finished


@pytest.mark.full
def test_without_saved_state_it_starts_again_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path / "whole", METHODS["none"], monkeypatch)
    with pytest.raises(Killed):
        train(tmp_path / "parts", METHODS["none"], monkeypatch, kill_at=3)
    assert not (tmp_path / "parts" / "saved").exists()
    parts, _ = train(tmp_path / "parts", METHODS["none"], monkeypatch)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, parts.get_parameter(name)), name


def test_a_saved_state_holds_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        train(tmp_path / "parts", METHODS["l2sp and replay"], monkeypatch, kill_at=12)
    files = sorted(path.name for path in (tmp_path / "parts" / "saved").iterdir())
    assert files == ["checkpoint.json", "tensors.safetensors"]
    content = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "parts" / "saved")
    assert content["global_step"] == 10
    assert set(content["callbacks"]) >= {"ForgettingCallback", "RandomState", "FiniteGuard"}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("damage", ["truncated", "newer", "empty"])
def test_a_damaged_saved_state_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, METHODS["none"], monkeypatch, kill_at=7)
    if damage == "truncated":
        path = tmp_path / "saved" / "tensors.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    else:
        text = (
            json.dumps({"format": "saved training", "format_version": 99})
            if damage == "newer"
            else ""
        )
        (tmp_path / "saved" / "checkpoint.json").write_text(text)
    with pytest.raises(TritterError, match="format_version 99" if damage == "newer" else "damaged"):
        train(tmp_path, METHODS["none"], monkeypatch)


def test_codec_keeps_what_it_is_given() -> None:
    given = {
        "numbers": [1, 2.5, True, None, float("inf")],
        "keys": {0: "zero", 1: {"deep": (1, (2, "x"))}, "1": "text", (1, 2): []},
        "tensors": {
            "half": torch.ones(2, dtype=torch.bfloat16),
            "scalar": torch.tensor(3),
            "view": torch.arange(6).view(2, 3).T,
            "empty": torch.zeros(0),
            "shared": [torch.ones(2**18)] * 2,
            "large": torch.ones(2**18),
            "large view": torch.ones(2, 2**18)[1],
        },
    }
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(given, tensors, key_path="it"))
    back = decode(json.loads(text), tensors)
    assert back["numbers"] == given["numbers"] and back["keys"] == given["keys"]
    assert list(back["keys"]) == list(given["keys"])  # type: ignore[arg-type]
    for name, tensor in given["tensors"].items():  # type: ignore[union-attr]
        other = back["tensors"][name]
        if isinstance(tensor, torch.Tensor):
            assert other.dtype == tensor.dtype and torch.equal(other, tensor)
            # Copies of all moments took a third of a run's memory
            assert (other.data_ptr() == tensor.data_ptr()) == (name in ("large", "empty"))
    first, second = back["tensors"]["shared"]
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    with pytest.raises(TypeError, match=r"it\.where\.1 is a set"):
        encode({"where": [0, {1}]}, {}, key_path="it")


@pytest.mark.full
@pytest.mark.parametrize("name", METHODS)
def test_killed_after_the_last_step_and_before_the_result_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The saved state is that of the last step: nothing is left to train, and nothing is lost."""
    whole, expected = train(tmp_path, METHODS[name], monkeypatch)
    rows = read_metrics(tmp_path)
    again, result = train(tmp_path, METHODS[name], monkeypatch)
    for parameter_name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(parameter_name)), parameter_name
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    assert read_metrics(tmp_path) == rows


def test_a_part_without_rows_takes_none_away(tmp_path: Path) -> None:
    rows = "step,train/loss,train/learning_rate\n1,3.0,0.1\n3,2.0,0.1\n"
    (tmp_path / "metrics.0.csv").write_text(rows)
    (tmp_path / "metrics.csv").write_text("step,train/loss\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == ["1", "3"]


def test_a_part_takes_no_place_of_another_after_one_was_deleted(tmp_path: Path) -> None:
    for name, step in (("metrics.1.csv", 1), ("metrics.csv", 2)):
        (tmp_path / name).write_text(f"step,train/loss,train/learning_rate\n{step},3.0,0.1\n")
    rotate_metrics(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.1.csv", "metrics.2.csv"}
    assert [row["step"] for row in read_metrics(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize(("mode", "is_told"), [("on", True), ("auto", True), ("off", False)])
def test_a_training_that_goes_on_says_from_which_step(mode: str, is_told: bool) -> None:
    for step in (0, 7):
        file = io.StringIO()
        progress = StepProgress(
            label="training", max_steps=9, mode=mode, console=Console(file=file)
        )
        trainer: Any = SimpleNamespace(global_step=step, is_global_zero=True)
        module: Any = None
        progress.on_train_start(trainer, module)
        progress.teardown(trainer, module, "fit")
        assert ("training: resuming from step 7/9" in file.getvalue()) == (is_told and step > 0)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.42, "0.42"), (3.4, "3"), (37.2, "37"), (999.4, "999"), (999.6, "1.0k"), (15_320, "15.3k")],
)
def test_slow_trainings_have_a_speed_too(rate: float, text: str) -> None:
    assert _rate_text(rate) == text

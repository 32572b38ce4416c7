"""A fit with a part of the weights in each of two processes, against one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle.families import tiny
from tests.training.killed import KillAt
from tests.training.test_fit import SETTINGS, task
from tests.training.test_validation import text
from tests.training.written import Written
from tritter.data.batches import BatchStream, SequenceStream
from tritter.methods.forgetting import Replay
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    fit,
    read_metrics,
)
from tritter.training.fitting import start_method

STEPS = 8
ONE = replace(SETTINGS, save_every_n_steps=3)
SHARED = replace(ONE, devices=2, strategy="fsdp")

pytestmark = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)


class Parts(Callback):
    """Leave in a file of each rank how much of the weights and moments it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        (optimizer,) = trainer.optimizers
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        held = [*pl_module.parameters(), *moments]
        assert all(isinstance(each, DTensor) for each in held)
        count = sum(each.to_local().numel() for each in held)
        (self.folder / f"rank_{distributed.get_rank()}").write_text(str(count))


def train(
    folder: Path,
    settings: TrainerSettings,
    *watching: Callback,
    dropout: float = 0.0,
    model: PreTrainedModel | None = None,
) -> tuple[nn.Module, FitResult]:
    """Train a tied model with replay and evaluations; it is read from what was written."""
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    model = model or oracle.tiny_llama(
        initializer_range=0.05, attention_dropout=dropout, tie_word_embeddings=True
    )
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-3, max_steps=STEPS),
        optimizer=OptimizerSettings(),
        methods=(Replay(fraction=0.3),),
    )
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    batches = STEPS * settings.accumulate_grad_batches
    written = Written(folder.with_name(f"{folder.name}-written"))
    result = fit(
        module,
        BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=batches),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=task(model),
        controls=watching,
        write_result=written,
        evaluation=text(),
    )
    assert not any(isinstance(each, DTensor) for each in model.parameters())
    written.read_into(model)
    return model, result


def assert_close(
    first: nn.Module, second: nn.Module, *, atol: float = 1e-5, but: str = "nothing"
) -> None:
    for name, parameter in first.named_parameters():
        difference = (second.get_parameter(name) - parameter).abs().max().item()
        assert difference < atol or name.endswith(but), name


_ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and recomputed": {
        "activation_checkpointing": True,
        "arguments": {"accumulate_grad_batches": 2},
    },
}


@pytest.mark.full
@pytest.mark.parametrize(
    "engine", ["plain", pytest.param("accumulated and recomputed", marks=pytest.mark.slow)]
)
def test_parts_in_two_processes_give_the_weights_of_one(tmp_path: Path, engine: str) -> None:
    one, expected = train(tmp_path / "one", replace(ONE, **_ENGINES[engine]))
    two, result = train(tmp_path / "two", replace(SHARED, **_ENGINES[engine]), Parts(tmp_path))
    assert_close(one, two)
    same: dict[str, Any] = {"seconds": 0.0, "update_norms": {}, "memory": {}}
    assert replace(result, **same) == replace(expected, **same)
    assert result.update_norms == pytest.approx(expected.update_norms, rel=1e-4)
    assert result.memory["parameters"] == expected.memory["parameters"]
    assert result.memory["trained"] == expected.memory["trained"]
    size = sum(parameter.numel() for parameter in one.parameters())
    counts = [int((tmp_path / f"rank_{rank}").read_text()) for rank in (0, 1)]
    assert sum(counts) == 2 * size and max(counts) < 1.1 * size  # weights and one moment
    for name in ("train/loss", "train/gradient_norm", "eval/old/loss"):
        rows = (read_metrics(tmp_path / each) for each in ("one", "two"))
        values = [[float(row[name]) for row in each if row.get(name)] for each in rows]
        assert values[0] and values[1] == pytest.approx(values[0], rel=1e-5), name


@pytest.mark.full
def test_layers_are_found_whatever_their_class_calls_them(tmp_path: Path) -> None:
    still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    models = [tiny("gpt2", tie_word_embeddings=True, **still) for _ in range(2)]
    one, _ = train(tmp_path / "one", ONE, model=models[0])
    two, _ = train(tmp_path / "two", SHARED, Parts(tmp_path), model=models[1])
    # Nothing depends on a key's bias, and Adam steps by what its gradient is rounded to
    assert_close(one, two, but="c_attn.bias")


@pytest.mark.slow
def test_the_comparison_would_find_another_batch(tmp_path: Path) -> None:
    """The negative control: a process that skips a row of its batch."""
    one, _ = train(tmp_path / "one", ONE)
    two, _ = train(tmp_path / "two", SHARED, Skip())
    with pytest.raises(AssertionError):
        assert_close(one, two)


class Skip(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if distributed.get_rank() == 1:
            batch["input_ids"][1] = batch["input_ids"][0]


@pytest.mark.full
def test_bitwise_as_if_never_killed(tmp_path: Path) -> None:
    whole, expected = train(tmp_path / "whole", SHARED, dropout=0.2)
    with pytest.raises(Exception, match="Killed: killed"):
        train(tmp_path / "parts", SHARED, KillAt(4), dropout=0.2)
    parts, result = train(tmp_path / "parts", SHARED, dropout=0.2)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parts.get_parameter(name), parameter), name
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)


@pytest.mark.full
@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_resumed_with_the_other_strategy(tmp_path: Path, first: str) -> None:
    """The saved state is that of whole tensors, by position or by name."""
    second = {"ddp": "fsdp", "fsdp": "ddp"}[first]
    whole, _ = train(tmp_path / "whole", SHARED)
    with pytest.raises(Exception, match="Killed: killed"):
        train(tmp_path / "parts", replace(SHARED, strategy=first), KillAt(4))
    parts, _ = train(tmp_path / "parts", replace(SHARED, strategy=second))
    assert_close(whole, parts)

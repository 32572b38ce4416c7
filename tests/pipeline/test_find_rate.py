"""The learning-rate range test: what it finds, and what it leaves untouched."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests import oracle
from tests.cli.conftest import Run, run
from tests.pipeline.tiny import TINY
from tests.training.test_fit import SCHEDULE, SETTINGS, module_of
from tritter.config.launch.composition import load_config
from tritter.data.batches import BatchStream, SequenceStream
from tritter.errors import TritterError
from tritter.pipeline import run_pipeline
from tritter.pipeline.find_rate import _NUM_STEPS, FoundRates, RateTest, find_rate, smoothed
from tritter.stopping import Stopped, stopping
from tritter.terminal import Console
from tritter.training import fit
from tritter.training.fitting import start_method
from tritter.training.optimizer import Schedule

__all__ = ["run"]
RATES = [1e-7 * 10 ** (7 * step / (_NUM_STEPS - 1)) for step in range(_NUM_STEPS)]


def found(losses: list[float]) -> FoundRates:
    return FoundRates.of([*zip(RATES, losses, strict=False)], configured=1e-3)


def test_the_rates_rise_exponentially() -> None:
    schedule = Schedule(
        learning_rate=1.0, max_steps=_NUM_STEPS, warmup_ratio=0.0, shape="range", minimum_ratio=1e-7
    )
    assert [schedule.rate(step) for step in range(_NUM_STEPS)] == pytest.approx(RATES)


def test_the_steepest_fall_is_found_despite_noise() -> None:
    """A loss that falls around 1e-3, with noise from batch to batch that is larger at the start."""
    noise = [0.3 * math.sin(7 * step) for step in range(_NUM_STEPS)]
    curve = [
        6 - 3 / (1 + (1e-3 / rate) ** 2) + each for rate, each in zip(RATES, noise, strict=True)
    ]
    rates = found([*curve[:80], *(20.0 for _ in range(5))])
    assert rates.steepest is not None and 3e-4 < rates.steepest < 6e-3
    assert rates.lowest > rates.steepest and rates.diverged == RATES[84]


def test_without_a_fall_nothing_is_recommended() -> None:
    assert found([3.0] * 40).steepest is None
    assert found([3.0, 2.0]).steepest is None
    assert found([3.0, math.nan]).diverged == RATES[1]


def test_an_easy_first_batch_is_no_minimum(tmp_path: Path) -> None:
    """The first batches differ as those of conversations with short answers do."""
    losses = [1.0, *(4.0 + 0.8 * (-1) ** step for step in range(20))]
    rates = found([*losses, *(3.0 for _ in range(40)), *(9.0 for _ in range(8))])
    assert rates.lowest > RATES[40] and rates.steepest is not None

    schedule = Schedule(
        learning_rate=1.0, max_steps=_NUM_STEPS, warmup_ratio=0.0, shape="range", minimum_ratio=1e-7
    )
    test = RateTest(schedule, tmp_path / "points.json")
    trainer = SimpleNamespace(
        global_step=0,
        should_stop=False,
        is_global_zero=True,
        accumulate_grad_batches=1,
        strategy=SingleDeviceStrategy(),
    )
    for loss in losses:
        trainer.global_step += 1
        test.on_train_batch_end(trainer, None, {"loss": loss}, None, 0)  # type: ignore[arg-type]
        assert not trainer.should_stop
    trainer.global_step += 1
    test.on_train_batch_end(trainer, None, {"loss": 60.0}, None, 0)  # type: ignore[arg-type]
    assert trainer.should_stop


def test_smoothing_has_no_bias() -> None:
    assert smoothed([2.0] * 30) == pytest.approx([2.0] * 30)


@pytest.mark.full
def test_it_leaves_the_plot_and_the_rates_and_changes_no_run(tmp_path: Path) -> None:
    cache = f"cache_dir={tmp_path / 'cache'}"
    config = load_config([*TINY, cache])
    before = run_pipeline(config, run_folder=tmp_path / "before")
    find_rate(config, folder=tmp_path / "tests/first")
    left = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "tests").rglob("*.*"))
    assert left == ["tests/first/find_lr.json", "tests/first/find_lr.png"]
    rates = json.loads((tmp_path / "tests/first/find_lr.json").read_text())
    assert 10 < len(rates["losses"]) == len(rates["rates"]) <= _NUM_STEPS
    assert rates["rates"] == pytest.approx(RATES[: len(rates["rates"])])
    assert rates["configured"] == config.training.learning_rate
    after = run_pipeline(config, run_folder=tmp_path / "after")
    hashes = {
        json.loads((each.summary_path.parent / "checkpoint/tritter.json").read_text())["model_hash"]
        for each in (before, after)
    }
    assert len(hashes) == 1


@pytest.mark.full
@pytest.mark.skipif(start_method("cpu") != "fork", reason="spawning takes seconds")
def test_losses_are_those_of_all_batches_and_processes_of_a_step(tmp_path: Path) -> None:
    found, two = [], replace(SETTINGS, strategy="ddp", devices=2)
    parts = replace(two, arguments={"accumulate_grad_batches": 2})
    for count, settings in enumerate((SETTINGS, parts), start=1):
        stream = SequenceStream(oracle.tokens(batch=40, length=16).int(), seed=0)
        path = tmp_path / f"{count}.json"
        fit(
            module_of(), BatchStream(stream, batch_size=8 // count, window=count),
            settings=settings, folder=tmp_path / str(count), label="test",
            console=Console(quiet=True), controls=[RateTest(SCHEDULE, path)],
        )  # fmt: skip
        found.append([loss for _, loss in json.loads(path.read_text())])
    assert len(found[0]) == SCHEDULE.max_steps
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ("experts=single_lora", "forgetting=[replay]", "expansion=none"),
        ("growth=gradmax",),
        ("expansion=moe", "expansion.moe.num_experts=2"),
        ("trainer=ddp", "trainer.devices=2", "data.batch_size=2"),
        (
            "callbacks=[early_stopping,model_checkpoint]",
            "trainer.accumulate_grad_batches=2",
            "callbacks.early_stopping.patience=1",
            "callbacks.model_checkpoint.every_n_train_steps=2",
            "evaluation.every_n_steps=2",
        ),
        ("expansion=none", "logger=wandb"),
    ],
)
def test_every_kind_of_training_can_be_tested(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = load_config([*TINY, f"cache_dir={tmp_path / 'cache'}", *words])
    find_rate(config, folder=tmp_path / "test")
    left = sorted(path.name for path in (tmp_path / "test").iterdir())
    assert left == ["find_lr.json", "find_lr.png"]


@pytest.mark.full
def test_the_command_prints_a_table(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"cache_dir={tmp_path / 'cache'}", "gate=strict"]
    result = run("train --find-lr", *words)
    assert result.code == 0, result.err
    assert "learning rate at which" in result.out and "configured" in result.out
    assert len(sorted(tmp_path.glob("outputs/find_lr/*/find_lr.png"))) == 1
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["find_lr"]


@pytest.mark.full
def test_a_signal_leaves_nothing(tmp_path: Path) -> None:
    class Signal(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    config = load_config([*TINY, f"cache_dir={tmp_path / 'cache'}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateTest, "on_train_batch_end", Signal.on_train_batch_end)
        with pytest.raises(Stopped), stopping():
            find_rate(config, folder=tmp_path / "tests/first")
    assert not (tmp_path / "tests").exists()


def test_no_finite_loss_is_an_error() -> None:
    with pytest.raises(TritterError, match="not finite, even at the lowest rate"):
        found([math.nan, math.inf])


def test_a_folder_of_a_run_is_left_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for words, message in (
        (["resume=latest"], "resume: not with --find-lr; name its folder"),
        (["hydra.run.dir=mine"], "hydra.run.dir: not with --find-lr"),
        (["--output", "mine"], "mine already exists"),
        (["-m", "seed=0,1"], "--find-lr takes the arguments of one run"),
        (["--cfg", "job"], "--find-lr takes the arguments of one run"),
        (["expansion=widht"], "Did you mean"),
    ):
        result = run("train --find-lr", *words)
        assert result.code == 2 and message in result.err
    assert not any((tmp_path / "mine").iterdir())

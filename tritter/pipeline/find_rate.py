"""Learning-rate range test: the loss of the run's own training while the rate rises."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from tritter.config.schema import RunConfig
from tritter.errors import TritterError
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.pipeline import prepare_branch
from tritter.pipeline.run import Run
from tritter.pipeline.stages.baseline import check_source, run_baseline
from tritter.pipeline.stages.fit import BranchTraining
from tritter.pipeline.verdict import Candidate
from tritter.report.drawing import BLUE, GREY, ORANGE, new_figure
from tritter.report.table import Table
from tritter.storage.atomic import parents_of, write_text_atomic
from tritter.storage.reading import read_text
from tritter.terminal import Console
from tritter.training.callbacks import ends_step
from tritter.training.optimizer import Schedule

_LOWEST, _HIGHEST, _NUM_STEPS = 1e-7, 1.0, 100
_RESULT_NAME, _PLOT_NAME = "find_lr.json", "find_lr.png"
_SMOOTHING = 0.9  # of the moving average of the loss
_MAX_RISE = 2.0  # nats of the smoothed loss above its lowest value
_LEAST_FALL = 0.05  # nats to the lowest smoothed loss
_BEFORE = 10  # first steps, at rates that change nothing; the average of fewer is too noisy
_WINDOW = 6  # steps over which a slope is measured


class RateTest(Callback):
    """Record rate and loss of every step, and end the training when the loss diverges.

    Args:
        schedule: rates of the steps.
        path: JSON file to write: [rate, loss] of each step.
    """

    def __init__(self, schedule: Schedule, path: Path) -> None:
        self._schedule, self._path = schedule, path
        self._step: list[float] = []  # losses of the batches of a step, divided by their number
        self._points: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step.append(float(outputs["loss"]) if outputs else math.nan)
        if not ends_step(trainer, batch_idx):
            return
        own = torch.tensor(sum(self._step), device=trainer.strategy.root_device)
        loss = float(trainer.strategy.reduce(own, reduce_op="mean"))  # of all processes
        self._points.append((self._schedule.rate(trainer.global_step - 1), loss))
        self._step.clear()
        curve = smoothed([loss for _, loss in self._points])
        lowest = min(curve[_BEFORE - 1 :], default=curve[-1])
        trainer.should_stop |= not curve[-1] <= lowest + _MAX_RISE  # also if it is NaN
        if trainer.is_global_zero:
            write_text_atomic(self._path, json.dumps(self._points))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRates:
    """The result of a range test.

    Args:
        configured: the learning rate of the run.
        steepest: the rate at which the smoothed loss falls fastest; None if it hardly falls.
        lowest: the rate of the lowest smoothed loss.
        diverged: the rate at which the test ended because the loss rose; None if it did not.
        rates: rate of each step.
        losses: training loss of each step, nats.
    """

    configured: float
    steepest: float | None
    lowest: float
    diverged: float | None
    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], *, configured: float) -> "FoundRates":
        """Return the result of [rate, loss] of each step, in order."""
        finite = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
        if not finite:
            raise TritterError("--find-lr: the loss is not finite, even at the lowest rate.")
        rates, losses = [rate for rate, _ in finite], [loss for _, loss in finite]
        curve = smoothed(losses)
        low = min(range(min(_BEFORE, len(curve)) - 1, len(curve)), key=lambda at: curve[at])
        fall = fmean(losses[:_BEFORE]) - curve[low]
        # Between a tenth of the fall and the minimum, where batches differ less than the loss falls
        begun = max(at for at in range(low + 1) if at == 0 or curve[at] > curve[low] + 0.9 * fall)
        span = range(begun, low + 1 - _WINDOW)
        # Equal distances on a logarithmic axis: differences are slopes
        steep = min(span, key=lambda at: curve[at + _WINDOW] - curve[at], default=begun)
        return cls(
            configured=configured,
            steepest=rates[steep + _WINDOW // 2] if fall >= _LEAST_FALL and span else None,
            lowest=rates[low],
            diverged=points[-1][0] if len(points) < _NUM_STEPS else None,
            rates=tuple(rates),
            losses=tuple(losses),
        )

    def table(self) -> Table:
        """Return the rates with their meanings."""
        rows = (
            ("the loss falls fastest", self.steepest),
            ("the loss is lowest", self.lowest),
            ("the loss diverges", self.diverged),
            ("configured", self.configured),
        )
        cells = tuple((text, "none" if rate is None else f"{rate:.1e}") for text, rate in rows)
        return Table(("learning rate at which", "value"), cells, numbers=(1,))

    def draw(self, path: Path) -> None:
        """Draw losses over rates (PNG)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure, (axes,) = new_figure(width=6.4, height=4)
        axes.plot(self.rates, self.losses, color=GREY, alpha=0.4, linewidth=0.8, label="loss")
        axes.plot(self.rates, smoothed(self.losses), color=BLUE, label="smoothed")
        if self.steepest is not None:
            axes.axvline(self.steepest, color=ORANGE, label=f"falls fastest, {self.steepest:.1e}")
        axes.axvline(
            self.configured, color=GREY, linestyle="--", label=f"configured, {self.configured:.1e}"
        )
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss [nats]")
        axes.legend()
        FigureCanvasAgg(figure).print_png(path)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the moving average of losses, without the bias of its start (Adam, eq. 3)."""
    average, found = 0.0, list[float]()
    for number, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        found.append(average / (1 - _SMOOTHING**number))
    return found


def find_rate(config: RunConfig, *, folder: Path) -> FoundRates:
    """Train a run's expanded model at rising learning rates, and write the plot and the rates.

    The rate rises exponentially over 100 steps (Smith 2017, arXiv 1506.01186). Everything else is
    as in the run: data, optimizer, forgetting methods, growth and experts. The weights are
    dropped.

    Args:
        config: the run, which is not started.
        folder: a new folder for the results.
    """
    schedule = Schedule(
        learning_rate=_HIGHEST,
        max_steps=_NUM_STEPS,
        warmup_ratio=0.0,
        shape="range",
        minimum_ratio=_LOWEST / _HIGHEST,
    )
    console = Console()
    with parents_of(folder):
        with TemporaryDirectory(dir=folder.parent, prefix=".find_lr-") as stages_folder:
            found = _tested(config, schedule, Path(stages_folder), console)
        folder.mkdir()
    write_text_atomic(folder / _RESULT_NAME, json.dumps(asdict(found), indent=2) + "\n")
    found.draw(folder / _PLOT_NAME)
    console.print()
    console.print(found.table().to_rich(console))
    console.print()
    console.print(f"plot   {folder / _PLOT_NAME}\nrates  {folder / _RESULT_NAME}", soft_wrap=True)
    return found


def _tested(config: RunConfig, schedule: Schedule, folder: Path, console: Console) -> FoundRates:
    """Run the stages up to the training, and the test, in a folder for what they write."""
    run = Run(
        config=replace(config, logger=(), wandb=None),
        folder=folder,
        console=console,
        ledger=Ledger(folder),
    )
    run.say("find-lr", f"{_NUM_STEPS} steps from {_LOWEST:.0e} to {_HIGHEST:.0e}")
    check_source(run)
    run.data.check_text()
    run_baseline(run)
    candidate = Candidate.planned(run)[0]
    run, branch = candidate.run, candidate.branches[0]
    branch, points = prepare_branch(run, branch), folder / "points.json"
    run = run.reading(branch.location)
    training = BranchTraining(run, branch)
    training.fit(schedule=schedule, observer=RateTest(schedule, points))
    return FoundRates.of(json.loads(read_text(points)), configured=training.peak_rate)

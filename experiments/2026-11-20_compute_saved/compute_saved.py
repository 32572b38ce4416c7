"""Compute to a loss: a small model grown and trained on, beside from scratch, beside itself.

    python experiments/2026-11-20_compute_saved/compute_saved.py tune --seeds 3
    python experiments/2026-11-20_compute_saved/compute_saved.py run --seeds 0 1 2

`tune` finds the learning rate of every arm on a seed that is not reported (tuning.csv); `run`
trains all arms of each seed at them and writes one row per measured loss (curves.csv). With
`--work`, a killed run continues from the last measurement of each arm.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER)]

from compute_arms import GrowthPath, Seed, Size, Training, growth_paths  # noqa: E402

from tritter.core.expansions import ExpansionSpec, target_model  # noqa: E402
from tritter.core.families import Model  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402

DECAY_RATIO = 0.2
GROWN_AT = (0.3, 0.6)  # shares of the from-scratch steps
MAX_COMPUTE = 1.15  # of from-scratch: where a grown arm that never gets there is given up
RATES = (3e-3, 6e-3, 1.2e-2)
TUNING_TOLERANCE = 0.015  # nats; near the rate that diverges, a lower one is safer


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One loss; FLOPs of training (forward × 3) up to there.

    `step` counts all batches seen, the small model's included; `flops` likewise, and
    `flops_after_growth` without them. `kind`: `average`, along a trunk, or `decayed`.
    """

    seed: int
    arm: str
    target: str
    grown_at: int
    rate: float
    kind: str
    step: int
    flops: float
    flops_after_growth: float
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Loss of one arm at one rate, on the seed that tunes."""

    seed: int
    arm: str
    target: str
    rate: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What training from scratch reached: loss of the average, and what it cost."""

    loss: float
    flops: float


class Table:
    """A CSV that grows row by row, so that a run that is stopped has written what it knows.

    `work`: a folder for states of trainings; rows that a killed run has measured are not repeated.
    """

    def __init__(self, path: Path, kind: type, *, work: Path | None = None) -> None:
        self.path, self.names, self.work = path, [field.name for field in fields(kind)], work
        if not path.exists():
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(self.names)

    def add(self, row: Row | Tuned) -> None:
        if self.work is not None:
            keys = ("seed", "arm", "target", "grown_at", "kind", "step")
            with self.path.open(encoding="utf-8", newline="") as file:
                measured = [[row[key] for key in keys] for row in csv.DictReader(file)]
            if [str(getattr(row, key)) for key in keys] in measured:
                return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.names, lineterminator="\n")
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One training that is followed, and where its rows go."""

    name: str
    target: str
    training: Training
    data: Seed
    table: Table

    def __post_init__(self) -> None:
        state = self._state()
        if state is not None and state.is_file():
            self.training.load(state)

    def _state(self, part: str = "") -> Path | None:
        name = f"{self.data.seed}-{self.name}-{self.target}-{self.training.born}{part}.pt"
        return self.table.work and self.table.work / name

    def follow(self, until: int) -> float:
        """Train to a step, measure along the way, and return the last loss."""
        training, size, loss = self.training, self.data.size, None
        while training.step < until:
            left = size.eval_every - training.step % size.eval_every
            training.stable(min(left, until - training.step), batch_size=size.batch_size)
            loss = self.record(training, "average")
        return self.data.loss(training.average) if loss is None else loss

    def snapshot(self, step: int) -> Training:
        """Return a copy of the training at a step."""
        state = self._state(f"-{step}")
        copied = copy.deepcopy(self.training)
        if state is not None and state.is_file():
            copied.load(state)
            return copied
        self.follow(step)
        if state is not None:
            self.training.save(state)
        return copy.deepcopy(self.training)

    def decay(self, steps: int, *, at: int) -> None:
        """Train to a step, and measure what the arm would be if it decayed there, once."""
        self.follow(at)
        done = self._state(f"-decayed-{at}")
        if done is not None and done.is_file():
            return
        branch = self.training.decayed(steps, batch_size=self.data.size.batch_size)
        self.record(branch, "decayed")
        if done is not None:
            done.touch()

    def record(self, training: Training, kind: str) -> float:
        model = training.average if kind == "average" else training.model
        loss = self.data.loss(model)
        self.table.add(
            Row(
                seed=self.data.seed,
                arm=self.name,
                target=self.target,
                grown_at=training.born,
                rate=training.rate,
                kind=kind,
                step=training.step,
                flops=training.flops,
                flops_after_growth=training.own_flops,
                loss=loss,
                seconds=training.seconds,
            )
        )
        state = self._state() if training is self.training else None
        if state is not None:
            training.save(state)
        return loss


def run(
    data: Seed, table: Table, rates: dict[str, float], *, paths: Mapping[str, GrowthPath]
) -> None:
    """Train every arm of one seed."""
    size = data.size
    growing_steps = [round(share * size.steps) for share in GROWN_AT]
    small = Arm(
        name="small",
        target="",
        training=data.new(data.config, rate=rates["small"], name="small"),
        data=data,
        table=table,
    )
    snapshots = {}
    for step in growing_steps:
        snapshots[step] = small.snapshot(step)
    goals = {}
    for name, specs in {path.target: path.specs for path in paths.values()}.items():
        goals[name] = from_scratch(data, table, name, specs, rate=rates[f"scratch_{name}"])
    for step in growing_steps:
        for name, path in paths.items():
            training = snapshots[step].grown(
                path.specs, rate=rates[name], seed=derived_seed(data.seed, "expansion")
            )
            arm = Arm(name=name, target=path.target, training=training, data=data, table=table)
            to_goal(arm, goals[path.target], is_late=step == growing_steps[-1])
    control(small, sorted(goal.flops for goal in goals.values()))


def from_scratch(
    data: Seed, table: Table, name: str, specs: Sequence[ExpansionSpec], *, rate: float
) -> Goal:
    """Train a target from scratch, trunk and decayed branch."""
    size = data.size
    training = data.new(target_model(Model(data.config), specs).config, rate=rate, name=name)
    arm = Arm(name="scratch", target=name, training=training, data=data, table=table)
    decay_steps = round(DECAY_RATIO * size.steps)
    arm.decay(decay_steps, at=size.steps - decay_steps)
    loss = arm.follow(size.steps)
    return Goal(loss=loss, flops=training.flops)


def to_goal(arm: Arm, goal: Goal, *, is_late: bool) -> None:
    """Train a grown arm until it is as good as from scratch; a late one also decays, as WSD does.

    The branch ends at the tokens of from-scratch.
    """
    size, training = arm.data.size, arm.training
    if training.step == training.born:
        arm.record(training, "average")
    if is_late:
        decay_steps = round(DECAY_RATIO * size.steps)
        arm.decay(decay_steps, at=size.steps - decay_steps)
    loss = arm.follow(training.step)
    while loss > goal.loss and training.flops < MAX_COMPUTE * goal.flops:
        loss = arm.follow((training.step // size.eval_every + 1) * size.eval_every)


def control(small: Arm, budgets: Sequence[float]) -> None:
    """Leave the small model alone up to each target's FLOPs, and decay it there."""
    training = small.training
    per_step = training.flops_per_token * small.data.size.batch_tokens
    for budget in budgets:
        steps = round(budget / per_step)
        decay_steps = round(DECAY_RATIO * steps)
        small.decay(decay_steps, at=steps - decay_steps)
    small.follow(round(budgets[-1] / per_step))


def tune(data: Seed, table: Table, *, paths: Mapping[str, GrowthPath]) -> None:
    """Measure every arm at several rates over half the steps, wider where an end is best."""
    size = data.size
    configs = {"small": data.config}
    for path in paths.values():
        configs[f"scratch_{path.target}"] = target_model(Model(data.config), path.specs).config
    best: dict[str, float] = {}

    def measured(arm: str, rate: float) -> float:
        if arm in configs:
            training = data.new(configs[arm], rate=rate, name=arm.removeprefix("scratch_"))
        else:
            training = start.grown(paths[arm].specs, rate=rate, seed=data.seed)
        training.stable(size.steps // 2 - training.step, batch_size=size.batch_size)
        loss = data.loss(training.average)
        target = paths[arm].target if arm in paths else arm.partition("scratch_")[2]
        table.add(Tuned(seed=data.seed, arm=arm, target=target, rate=rate, loss=loss))
        return loss

    def best_rate(arm: str) -> float:
        losses = {rate: measured(arm, rate) for rate in RATES}
        while (rate := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
            if len(losses) > len(RATES):
                break
            beyond = rate * 2 if rate == max(losses) else rate / 2
            losses[beyond] = measured(arm, beyond)
        return rate

    for arm in configs:
        best[arm] = best_rate(arm)
    start = data.new(data.config, rate=best["small"], name="small")
    start.stable(round(GROWN_AT[0] * size.steps), batch_size=size.batch_size)
    for arm in paths:
        best[arm] = best_rate(arm)


def read_rates(path: Path) -> dict[str, float]:
    """Return each arm's rate: the lowest whose loss is the best, but for what one seed can tell."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["arm"], float(row["rate"])))
    losses: dict[str, dict[float, float]] = {}
    for (arm, rate), group in groupby(rows, key=lambda row: (row["arm"], float(row["rate"]))):
        losses.setdefault(arm, {})[rate] = statistics.mean(float(row["loss"]) for row in group)
    return {
        arm: min(rate for rate in found if found[rate] <= min(found.values()) + TUNING_TOLERANCE)
        for arm, found in losses.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = list(growth_paths(Size()))
    parser.add_argument("--paths", nargs="+", choices=names, default=names, help="default: all")
    for field in fields(Size):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    parser.add_argument("--work", type=Path, help="folder for states of one setting")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tritter")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    size = Size(**{field.name: getattr(asked, field.name) for field in fields(Size)})
    torch.set_num_threads(asked.threads)  # equal seeds give equal rows with one thread
    for folder in filter(None, (asked.output, asked.work)):
        folder.mkdir(parents=True, exist_ok=True)
    tuning = asked.output / "tuning.csv"
    paths = {name: path for name, path in growth_paths(size).items() if name in asked.paths}
    for seed in asked.seeds:
        data = Seed(seed, size, cache_dir=asked.cache_dir)
        if asked.what == "tune":
            tune(data, Table(tuning, Tuned), paths=paths)
        else:
            curves = Table(asked.output / "curves.csv", Row, work=asked.work)
            run(data, curves, read_rates(tuning), paths=paths)


if __name__ == "__main__":
    main()

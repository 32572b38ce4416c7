"""Do learned growth operators (LiGO, arXiv 2303.00980) pay? Beside exact and copied growth.

    python experiments/2026-11-20_ligo/ligo.py tune --seeds 3
    python experiments/2026-11-20_ligo/ligo.py run --seeds 0 1 2

`tune` tries rates for the operators on a seed that is not reported (tuning.csv); `run` trains all
arms of each seed at the best of them (results.csv). All arms of a seed grow one base, which has
trained on the same data, and go on with new optimizer state and warm-up. Operators see the batches
that the other arms train on at the same place; their FLOPs are counted in full.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import csv
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
sys.path.append(str(FOLDER.parent / "2026-11-20_compute_saved"))
sys.path.append(str(FOLDER))

from compute_arms import CLIP_NORM, Seed, Size, Training  # noqa: E402
from compute_saved import Table  # noqa: E402
from operators import Init, Operators  # noqa: E402

from tritter.core.expansions import ExpansionSpec, LlamaPro, Stack, Width  # noqa: E402
from tritter.core.families import Model  # noqa: E402
from tritter.core.models import new_model  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402
from tritter.training.optimizer import OptimizerSettings  # noqa: E402

RATE = 3e-3
OPERATOR_RATES = (1e-3, 3e-3, 1e-2)
OPERATOR_WARMUP_STEPS = 10
LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Steps of the base, of the operators, of the grown model; the smoke test takes fewer."""

    base_steps: int = 1200
    tuning_base_steps: int = 600
    operator_steps: int = 100
    steps: int = 500
    tuning_steps: int = 100
    evaluated: tuple[int, ...] = (0, 50, 100, 250, 500)

    def of(self, target: str) -> int:
        """Return the steps of a target: of both at once, which costs twice as much, half."""
        return self.steps // 2 if target == "both" else self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One arm: expansions, and how operators begin where it has some."""

    target: str
    name: str
    specs: tuple[ExpansionSpec, ...]
    init: Init | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One loss on held-out documents: the running average of the weights, nats per token.

    `step` counts batches of normal training after growth; at −1 stands the grown model before its
    operators are trained. `equivalent_steps` is all that was spent since growth, in normal steps
    of the grown model.
    """

    seed: int
    target: str
    arm: str
    operator_rate: float
    step: int
    equivalent_steps: float
    flops: float
    loss: float
    seconds: float


def growths() -> tuple[Growth, ...]:
    wide, zeroed = Width(), LlamaPro(target_layers=2 * LAYERS)
    stack = Stack(target_layers=2 * LAYERS)
    return (
        Growth(target="width", name="fresh", specs=(wide,)),
        Growth(target="width", name="net2net", specs=(Width(init="net2net"),)),
        Growth(target="width", name="ligo_paper", specs=(wide,), init="paper"),
        Growth(target="width", name="ligo_exact", specs=(wide,), init="exact"),
        Growth(target="depth", name="stack", specs=(stack,)),
        Growth(target="depth", name="llama_pro", specs=(zeroed,)),
        Growth(target="depth", name="ligo_paper", specs=(stack,), init="paper"),
        Growth(target="depth", name="ligo_exact", specs=(zeroed,), init="exact"),
        Growth(target="both", name="fresh_stack", specs=(wide, stack)),
        Growth(target="both", name="fresh_llama_pro", specs=(wide, zeroed)),
        Growth(target="both", name="ligo_paper", specs=(wide, stack), init="paper"),
        Growth(target="both", name="ligo_exact", specs=(wide, zeroed), init="exact"),
    )


def trained_base(data: Seed, *, steps: int) -> Training:
    base = data.new(data.config, rate=RATE, name="base")
    base.stable(steps, batch_size=data.size.batch_size)
    return base


class Run:
    """One arm of one seed, from growth on."""

    def __init__(
        self, growth: Growth, base: Training, data: Seed, table: Table, *, operator_rate: float
    ) -> None:
        self.growth, self.data, self.table = growth, data, table
        self.operator_rate = operator_rate if growth.init else 0.0
        self.operator_flops = 0.0
        self.since = time.perf_counter()
        self.base = base
        self.expansion_seed = derived_seed(data.seed, "expansion")

    def follow(self, lengths: Lengths) -> float:
        """Grow, train, measure along the way; return the last loss.

        Arms with operators are also measured where they cost as much as the others at the places
        that are evaluated.
        """
        training = self._grown(lengths)
        per_step = training.flops_per_token * self.data.size.batch_tokens
        spent = self.operator_flops / per_step
        last = lengths.of(self.growth.target)
        places = {step for step in lengths.evaluated if step <= last}
        places |= {round(step - spent) for step in places if step >= spent}
        loss = float("nan")
        for place in sorted(places):
            taken = training.step - training.born
            training.stable(place - taken, batch_size=self.data.size.batch_size)
            model = training.average if place else training.model
            loss = self._record(model, step=place, flops=training.own_flops, per_step=per_step)
        return loss

    def _grown(self, lengths: Lengths) -> Training:
        specs, seed = self.growth.specs, self.expansion_seed
        if self.growth.init is None:
            return self.base.grown(specs, rate=RATE, seed=seed)
        operators = Operators(self.base.model, specs, init=self.growth.init, seed=seed)
        stream = copy.deepcopy(self.base.stream)
        start = Training(operators.folded(), stream, rate=RATE, step=self.base.step)
        per_step = start.flops_per_token * self.data.size.batch_tokens
        self._record(start.model, step=-1, flops=0.0, per_step=per_step)
        batches = [
            stream.next_sequences(self.data.size.batch_size) for _ in range(lengths.operator_steps)
        ]
        train_operators(operators, batches, rate=self.operator_rate)
        self.operator_flops = len(batches) * (per_step + operators.flops())
        return Training(operators.folded(), stream, rate=RATE, step=self.base.step)

    def _record(self, model: nn.Module, *, step: int, flops: float, per_step: float) -> float:
        loss = self.data.loss(model)
        total = flops + self.operator_flops
        self.table.add(
            Row(  # type: ignore[arg-type]
                seed=self.data.seed,
                target=self.growth.target,
                arm=self.growth.name,
                operator_rate=self.operator_rate,
                step=step,
                equivalent_steps=total / per_step,
                flops=total,
                loss=loss,
                seconds=time.perf_counter() - self.since,
            )
        )
        return loss


def train_operators(operators: Operators, batches: Iterable[Tensor], *, rate: float) -> list[float]:
    """Train operators on the grown model's loss; return the loss of every batch.

    Warm-up, then a linear decay to zero: what counts is where the operators end.
    """
    parameters = operators.parameters()
    optimizer = OptimizerSettings(weight_decay=0.0).build(
        ((str(index), parameter) for index, parameter in enumerate(parameters)), learning_rate=rate
    )
    shell = new_model(Model(operators.target_config), seed=0).train().requires_grad_(False)
    batches, losses = list(batches), []
    for step, batch in enumerate(batches):
        factor = min(1.0, (step + 1) / OPERATOR_WARMUP_STEPS) * (1 - step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        inputs = {"input_ids": batch, "labels": batch, "use_cache": False}
        loss = functional_call(shell, operators.weights(), kwargs=inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def tune(data: Seed, table: Table, lengths: Lengths, arms: Iterable[Growth]) -> None:
    """Measure each arm with operators at each rate, wider where an end is best.

    A few steps of normal training stand behind each, so that what counts is where it leads.
    """
    short = Lengths(
        operator_steps=lengths.operator_steps,
        steps=lengths.tuning_steps,
        evaluated=(0, lengths.tuning_steps),
    )
    base = trained_base(data, steps=lengths.tuning_base_steps)
    for growth in arms:
        if not growth.init:
            continue
        losses: dict[float, float] = {}
        rates = list(OPERATOR_RATES)
        while rates:
            rate = rates.pop(0)
            losses[rate] = Run(growth, base, data, table, operator_rate=rate).follow(short)
            best = min(losses, key=losses.__getitem__)
            if not rates and len(losses) < 5 and best in (min(losses), max(losses)):
                rates.append(best * 3 if best == max(losses) else best / 3)


def read_rates(path: Path, *, tuning_steps: int) -> dict[tuple[str, str], float]:
    """Return the best rate by target and arm."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if int(row["step"]) == tuning_steps:
                found = (float(row["loss"]), float(row["operator_rate"]))
                key = (row["target"], row["arm"])
                best[key] = min(best.get(key, found), found)
    return {key: rate for key, (_, rate) in best.items()}


def run(
    datas: Iterable[Seed],
    table: Table,
    lengths: Lengths,
    *,
    arms: Iterable[Growth],
    rates: dict[tuple[str, str], float],
) -> None:
    """Train every arm, one target after the other; an untuned target takes the rates of width."""
    bases = [(data, trained_base(data, steps=lengths.base_steps)) for data in datas]
    for target, group in groupby(arms, key=lambda growth: growth.target):
        growths_of_target = list(group)
        for data, base in bases:
            for growth in growths_of_target:
                rate = rates.get((target, growth.name), rates.get(("width", growth.name), 0.0))
                Run(growth, base, data, table, operator_rate=rate).follow(lengths)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for option in ("target", "name"):
        known = list(dict.fromkeys(getattr(growth, option) for growth in growths()))
        parser.add_argument(f"--{option}s", nargs="+", choices=known, default=known)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tritter")
    return parser.parse_args()


def main(lengths: Lengths) -> None:
    asked = arguments()
    size = Size(
        layers=LAYERS,
        hidden_size=asked.hidden_size,
        batch_size=asked.batch_size,
        eval_sequences=64,
    )
    torch.set_num_threads(1)  # so that equal seeds give equal rows
    arms = [g for g in growths() if g.target in asked.targets and g.name in asked.names]
    datas = (Seed(seed, size, cache_dir=asked.cache_dir) for seed in asked.seeds)
    tuning = asked.output / "tuning.csv"
    if asked.what == "tune":
        for data in datas:
            tune(data, Table(tuning, Row), lengths, arms)
        return
    table = Table(asked.output / "results.csv", Row)
    rates = read_rates(tuning, tuning_steps=lengths.tuning_steps)
    run(datas, table, lengths, arms=arms, rates=rates)


if __name__ == "__main__":
    main(Lengths())

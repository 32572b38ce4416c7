"""One layer, grown to eight late under WSD, beside eight from scratch and beside one layer alone.

    python experiments/2026-11-22_one_layer/one_layer.py tune --seeds 3
    python experiments/2026-11-22_one_layer/one_layer.py run --seeds 0 1 2

`tune` finds the learning rate of every arm on a seed that is not reported (tuning.csv); `run`
trains all arms of each seed at them (results.csv). Trainings share their constant phase: every
row is a branch of a trunk, decayed to zero, so that none is measured before its end.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent / "2026-11-20_compute_saved")]

from compute_arms import Seed, Size, Training  # noqa: E402
from compute_saved import Table, read_rates  # noqa: E402

from tritter.core.expansions import ExpansionSpec, LlamaPro, Stack, target_model  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402

LAYERS = 8
SIZE = Size(layers=1, hidden_size=32, batch_size=8, eval_sequences=384, vocab_size=512)
MEASURED = (2.5, 5.0, 10.0, 20.0, 40.0, 60.0)  # tokens per parameter of the target, from scratch
TUNED_AT = 20.0
DECAY = 0.1  # of the steps, in which the rate falls to zero
WARMUP_STEPS, WARMUP_GROWN = 50, 20
PATHS: Mapping[str, ExpansionSpec] = {
    "stack": Stack(target_layers=LAYERS),
    "llama_pro": LlamaPro(target_layers=LAYERS),
}
ALL = (5.0, 20.0, 60.0)
GROWN: Mapping[str, tuple[str, float, tuple[float, ...]]] = {
    # path, share of the tokens after which the one layer becomes eight, tokens per parameter
    "stack_0.2": ("stack", 0.2, (5.0, 20.0)),
    "stack_0.6": ("stack", 0.6, ALL),
    "stack_0.8": ("stack", 0.8, ALL),
    "llama_pro_0.6": ("llama_pro", 0.6, ALL),
    "llama_pro_0.8": ("llama_pro", 0.8, ALL),
}
RATES = {
    "small": (6e-3, 1.2e-2, 2.4e-2),
    **dict.fromkeys(("scratch", *GROWN), (3e-3, 6e-3, 1.2e-2)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A training at its end, the rate decayed to zero.

    Args:
        tokens_per_parameter: tokens of all batches seen, the one layer's included, for each
            parameter of the eight layers; of `small`, of the training from scratch whose FLOPs
            it had.
        grown_at: share of the steps before the expansion; 0: none.
        flops: of training (forward × 3), all steps.
        loss: held out, nats per token.
    """

    seed: int
    arm: str
    tokens_per_parameter: float
    grown_at: float
    rate: float
    steps: int
    flops: float
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Loss of one arm at one rate, on the seed that tunes."""

    seed: int
    arm: str
    rate: float
    loss: float


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Arms:
    """The trainings of one seed: their steps for a budget, their ends."""

    def __init__(self, data: Seed) -> None:
        self.data = data
        self.target = target_model(Model(data.config), (PATHS["stack"],)).config
        self.parameters = Model(self.target).num_parameters
        per_token = [
            training_flops(Model(config)).per_token(data.validation.shape[1])
            for config in (data.config, self.target)
        ]
        self.cost_ratio = per_token[1] / per_token[0]

    def steps(self, budget: float) -> int:
        return round(budget * self.parameters / self.data.size.batch_tokens)

    def small(self, rate: float) -> Training:
        return self.data.new(self.data.config, rate=rate, name="small")

    def scratch(self, rate: float) -> Training:
        return self.data.new(self.target, rate=rate, name="scratch")

    def grown(self, trunk: Training, path: str, *, rate: float) -> Training:
        seed = derived_seed(self.data.seed, "expansion")
        return trunk.grown((PATHS[path],), rate=rate, seed=seed)

    def advance(self, training: Training, until: int, *, warmup: int = WARMUP_STEPS) -> None:
        """Go on at the constant rate; the first steps of a model warm up."""
        first = training.step - training.born
        factors = [min(1.0, (first + i + 1) / warmup) for i in range(until - training.step)]
        training.advance(factors, batch_size=self.data.size.batch_size)

    def ended(self, training: Training, steps: int) -> float:
        """Return the loss of a branch that decays from here to `steps`, and count its cost."""
        branch = training.decayed(steps - training.step, batch_size=self.data.size.batch_size)
        self.last = branch
        return self.data.loss(branch.model)


def decay_begins(steps: int) -> int:
    return round((1 - DECAY) * steps)


def run(data: Seed, table: Table, rates: Mapping[str, float]) -> None:
    """Train every arm of one seed; each trunk goes on from one event to the next."""
    arms = Arms(data)

    def record(arm: str, training: Training, budget: float, steps: int, share: float = 0) -> None:
        loss = arms.ended(training, steps)
        table.add(
            Row(
                seed=data.seed,
                arm=arm,
                tokens_per_parameter=budget,
                grown_at=share,
                rate=training.rate,
                steps=steps,
                flops=arms.last.flops,
                loss=loss,
                seconds=arms.last.seconds,
            )
        )

    small, scratch = arms.small(rates["small"]), arms.scratch(rates["scratch"])

    def grow(arm: str, budget: float) -> None:
        path, share, _ = GROWN[arm]
        grown = arms.grown(small, path, rate=rates[arm])
        steps = arms.steps(budget)
        arms.advance(grown, decay_begins(steps), warmup=WARMUP_GROWN)
        record(path, grown, budget, steps, share)

    def alone(budget: float) -> None:
        record("small", small, budget, round(arms.steps(budget) * arms.cost_ratio))

    events: list[tuple[int, Callable[[], None]]] = []
    for arm, (_, share, budgets) in GROWN.items():
        for budget in budgets:
            events.append((round(share * arms.steps(budget)), partial(grow, arm, budget)))
    for budget in MEASURED:
        steps = round(arms.steps(budget) * arms.cost_ratio)
        events.append((decay_begins(steps), partial(alone, budget)))
    for step, measure in sorted(events, key=lambda event: event[0]):
        arms.advance(small, step)
        measure()
    for budget in MEASURED:
        arms.advance(scratch, decay_begins(arms.steps(budget)))
        record("scratch", scratch, budget, arms.steps(budget))


def tune(data: Seed, table: Table) -> None:
    """Measure every arm at several rates over one budget, wider where an end is best."""
    arms = Arms(data)
    steps = arms.steps(TUNED_AT)
    known = {
        (row["arm"], float(row["rate"])): float(row["loss"])
        for row in read_rows(table.path)
        if int(row["seed"]) == data.seed
    }
    born = {"small": arms.small, "scratch": arms.scratch}

    def measured(arm: str, rate: float) -> float:
        if (arm, rate) in known:
            return known[arm, rate]
        if arm in born:
            training, warmup = born[arm](rate), WARMUP_STEPS
        else:
            path, share, _ = GROWN[arm]
            training, warmup = arms.grown(trunks[share], path, rate=rate), WARMUP_GROWN
        arms.advance(training, decay_begins(steps), warmup=warmup)
        loss = arms.ended(training, steps)
        table.add(Tuned(seed=data.seed, arm=arm, rate=rate, loss=loss))
        return loss

    def best_rate(arm: str) -> float:
        losses = {rate: measured(arm, rate) for rate in RATES[arm]}
        while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
            beyond = best * 2 if best == max(losses) else best / 2
            losses[beyond] = measured(arm, beyond)
        return best

    trunks = {}
    trunk = arms.small(best_rate("small"))
    for share in sorted({share for _, share, _ in GROWN.values()}):
        arms.advance(trunk, round(share * steps))
        trunks[share] = trunk.decayed(0, batch_size=data.size.batch_size)  # a copy
    for arm in RATES:
        if arm != "small":
            best_rate(arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "tritter")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so that equal seeds give equal rows
    for seed in asked.seeds:
        data = Seed(seed, SIZE, cache_dir=asked.cache_dir)
        if asked.what == "tune":
            tune(data, Table(asked.output / "tuning.csv", Tuned))
        else:
            rates = read_rates(asked.output / "tuning.csv")
            run(data, Table(asked.output / "results.csv", Row), rates)


if __name__ == "__main__":
    main()

"""Processor seconds and memory of training steps with forgetting mitigation, and without any.

    python experiments/benchmarks/methods.py --output experiments/benchmarks/methods.csv

Each step is Lightning's own, in the real fit, on the same batches; the ways follow each other in
every round, each in a process of its own, and are compared within a round. The first steps of a fit
are left out. Memory is the largest resident memory beyond that before the model was built.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.benchmarks.precision import new_llama  # noqa: E402
from experiments.benchmarks.table import tell  # noqa: E402

BATCH_SIZE, LENGTH, LEFT_OUT = 16, 128, 2
WAYS = (
    *("none", "l2sp", "ewc", "online_ewc", "si", "replay", "self_replay", "distill", "freeze"),
    "si and replay",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One way: milliseconds are medians over the rounds, ratios those within them.

    `extra_copies` is the median memory beyond that of `none`, in copies of the weights.
    """

    way: str
    parameters: int
    tokens: int
    step_ms: float
    over_none: float
    lowest: float
    highest: float
    extra_copies: float
    rounds: int


class Clock(Callback):
    """Note when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.process_time())


@dataclass(frozen=True, slots=True)
class Measured:
    """One fit: the median time of a step, the most memory, and the model's parameters."""

    seconds: float
    memory: int
    parameters: int


def measure(way: str, *, hidden_size: int, layers: int, steps: int) -> Measured:
    """Train a few steps; for a process of its own."""
    from tritter.config.launch.composition import load_config
    from tritter.data.batches import BatchStream, SequenceStream
    from tritter.methods import forgetting
    from tritter.terminal import Console
    from tritter.training import BaseModule, OptimizerSettings, Schedule, Task, fit

    words = ("trainer=cpu", "trainer.progress=off", "trainer.save_every_n_steps=0")
    settings = load_config(words).trainer
    torch.set_num_threads(1)  # processor seconds are then those of the step
    torch.manual_seed(0)
    before = most_resident()
    model = new_llama(hidden_size, num_layers=layers)
    ewc = {"ewc_lambda": 1e3, "at": "carried", "refresh_steps": None}
    methods = {
        "ewc": lambda: forgetting.EWC(**ewc),  # type: ignore[arg-type]
        "online_ewc": lambda: forgetting.OnlineEWC(**ewc),  # type: ignore[arg-type]
        "si": lambda: forgetting.SI(si_lambda=1.0),
        "l2sp": lambda: forgetting.L2SP(l2sp_lambda=0.03),
        "replay": lambda: forgetting.Replay(fraction=0.25),
        "self_replay": lambda: forgetting.SelfReplay(fraction=0.25),
        "distill": lambda: forgetting.Distill(weight=2.0),
        "freeze": lambda: forgetting.Freeze(layers=("attention",)),
    }
    chosen = [methods[name]() for name in way.split(" and ") if name in methods]
    tokens = torch.randint(0, 1024, (200, LENGTH), generator=torch.Generator().manual_seed(0))
    stream = SequenceStream(tokens.int(), seed=0)
    clock, needs = Clock(), [type(each).needs(each.options) for each in chosen]
    has_teacher = any(each.teacher for each in needs)
    task = Task(
        seed=0,
        old_sequences={"old": tokens},
        written=tokens,
        carried={n: torch.ones_like(p).bool() for n, p in model.named_parameters()},
        state=made_up_state(model) if any(each.state for each in needs) else {},
        teacher=copy.deepcopy(model).eval().requires_grad_(False) if has_teacher else None,
    )
    for method in chosen:
        method.freeze(model, task, max_steps=steps + LEFT_OUT)
    with tempfile.TemporaryDirectory() as folder:
        fit(
            BaseModule(
                model,
                schedule=Schedule(learning_rate=1e-4, max_steps=steps + LEFT_OUT),
                optimizer=OptimizerSettings(),
                methods=chosen,
            ),
            BatchStream(stream, batch_size=BATCH_SIZE, num_batches=steps + LEFT_OUT),
            settings=settings,
            folder=Path(folder),
            label="benchmark",
            console=Console(quiet=True),
            task=task,
            observers=[clock],
        )
    spans = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(statistics.median(spans[LEFT_OUT - 1 :]), most_resident() - before, parameters)


def most_resident() -> int:
    """Return the most resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def made_up_state(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    values = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    return dict.fromkeys(("fisher", "online_fisher", "si_importance"), values)


def measured(
    ways: Sequence[str], *, hidden_size: int, layers: int, steps: int, rounds: int
) -> list[Row]:
    found: dict[str, list[Measured]] = {way: [] for way in ways}
    sizes = {"hidden_size": hidden_size, "layers": layers, "steps": steps}
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for _ in range(rounds):
            for way in ways:
                found[way].append(processes.submit(measure, way, **sizes).result())
    rows = []
    for way, own in found.items():
        pairs = list(zip(own, found["none"], strict=True))
        ratios = [each.seconds / none.seconds for each, none in pairs]
        extra = statistics.median(each.memory - none.memory for each, none in pairs)
        rows.append(
            Row(
                way=way,
                parameters=own[0].parameters,
                tokens=BATCH_SIZE * LENGTH,
                step_ms=round(1000 * statistics.median(each.seconds for each in own)),
                over_none=round(statistics.median(ratios), 3),
                lowest=round(min(ratios), 3),
                highest=round(max(ratios), 3),
                extra_copies=round(extra / (4 * own[0].parameters), 2),
                rounds=rounds,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    sizes = {"hidden_size": given.hidden_size, "layers": given.layers, "steps": given.steps}
    tell(map(asdict, measured(given.ways, rounds=given.rounds, **sizes)), given.output)


if __name__ == "__main__":
    main()

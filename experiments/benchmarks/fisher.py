"""Seconds of the Fisher from per-sequence gradients beside plain backward passes.

    python experiments/benchmarks/fisher.py --output experiments/benchmarks/fisher.csv

Both go over the same tokens, in turn, in one process; the ratio of the medians is what to look
at. The third figure is a loop of one backward pass per sequence.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.benchmarks.precision import new_llama  # noqa: E402
from experiments.benchmarks.table import tell  # noqa: E402


@dataclass(frozen=True, slots=True)
class Row:
    """One model; milliseconds are medians over the runs."""

    hidden_size: int
    sequences: int
    batch_size: int
    plain_ms: float
    fisher_ms: float
    loop_ms: float
    fisher_over_plain: float
    loop_over_plain: float


def plain(model: nn.Module, sequences: Tensor, batch_size: int) -> None:
    for batch in sequences.split(batch_size):
        model.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()


def measured(hidden_size: int, *, sequences: int, batch_size: int, runs: int) -> Row:
    from tritter.methods.forgetting.quadratic import diagonal_fisher

    model = new_llama(hidden_size, num_layers=3).eval()
    tokens = torch.randint(0, 1024, (sequences, 128), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, tokens, batch_size),
        "fisher": lambda: diagonal_fisher(model, tokens, batch_size=batch_size),
        "loop": lambda: plain(model, tokens, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            since = time.perf_counter()
            way()
            if run:  # the first warms up
                seconds[name].append(time.perf_counter() - since)
    median = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    return Row(
        hidden_size=hidden_size,
        sequences=sequences,
        batch_size=batch_size,
        plain_ms=round(median["plain"]),
        fisher_ms=round(median["fisher"]),
        loop_ms=round(median["loop"]),
        fisher_over_plain=round(median["fisher"] / median["plain"], 2),
        loop_over_plain=round(median["loop"] / median["plain"], 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = (
        measured(size, sequences=given.sequences, batch_size=given.batch_size, runs=given.runs)
        for size in given.hidden_sizes
    )
    tell(map(asdict, rows), given.output)


if __name__ == "__main__":
    main()

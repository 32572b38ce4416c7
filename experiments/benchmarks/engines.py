"""Processor time and memory of a training step: activations computed again, and a compiled model.

    python experiments/benchmarks/engines.py

Each case is a process of its own, since memory is that of a process at its highest; those of a
round follow each other, and ratios are to the plain case of the same round.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.benchmarks.table import tell  # noqa: E402

CASES = ("plain", "recomputed", "compiled")
WARM_UP = 2


def step_of(case: str, options: argparse.Namespace) -> dict[str, float]:
    """Train some steps in this process; return processor ms, and MB beyond the start's."""
    from experiments.benchmarks.precision import new_llama
    from tritter.core.models import checkpoint_activations
    from tritter.training.module import CompiledModel

    model = new_llama(options.hidden_size, num_layers=options.layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    call = CompiledModel(model) if case == "compiled" else model
    shape = (options.batch_size, options.sequence_length)
    tokens = torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # what any step holds, so that the rest is activations
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before = _peak_megabytes()
    seconds, walls = list[float](), list[float]()

    def train() -> None:
        for _ in range(WARM_UP + options.steps):
            started, wall = time.process_time(), time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - started)
            walls.append(time.perf_counter() - wall)

    if case == "recomputed":
        with checkpoint_activations(model):
            train()
    else:
        train()
    return {
        "first_step_s": round(walls[0], 1),
        "step_ms": round(1e3 * statistics.median(seconds[WARM_UP:]), 1),
        "activations_mb": round(_peak_megabytes() - before, 1),
    }


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--alone", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="CSV file for the rows")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(step_of(options.alone, options)))
        return
    rows = (
        {"round": number, "case": case, **_in_a_process(case, options)}
        for number in range(options.rounds)
        for case in options.cases
    )
    tell(rows, options.output)


def _in_a_process(case: str, options: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, "--alone", case, *_shape_words(options)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(said.splitlines()[-1])
    return measured


def _shape_words(options: argparse.Namespace) -> list[str]:
    words = ["--bf16"] if options.bf16 else []
    for name in ("steps", "hidden_size", "layers", "batch_size", "sequence_length"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return words


if __name__ == "__main__":
    main()

"""What a look and a step's penalty take on one thread, beside those of `ewc`.

    python experiments/2026-11-21_kronecker/cost.py --checkpoints RUN/attempt_1/expanded …

Processor seconds, the least of five; memory is what a training holds between steps.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kronecker import Kronecker
from torch import nn

from tritter.core.models import load_model
from tritter.methods.forgetting import EWC
from tritter.methods.forgetting.quadratic import QuadraticPenalty
from tritter.training import Task

SEQUENCES, LENGTH, RUNS = 256, 128, 5


def least_seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def peak_bytes(value: object) -> int:
    """Return the bytes of all tensors in plain containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(peak_bytes, parts)) if isinstance(value, dict | list | tuple) else 0


def costs(model: nn.Module, method: QuadraticPenalty) -> str:
    tokens = torch.randint(0, model.config.vocab_size, (SEQUENCES, LENGTH))
    method.begin_task(model, Task(seed=0, old_sequences={"old": tokens}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    look = least_seconds(lambda: method.observe_step(model, 0))
    step = least_seconds(lambda: method.add_to_gradients(model))
    copies = peak_bytes(method.state_dict()) / peak_bytes(dict(model.named_parameters()))
    return f"look {look:.2f} s, step {1e3 * step:.2f} ms, {copies:.2f} copies of the weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    torch.set_num_threads(1)
    for place in parser.parse_args().checkpoints:
        model = load_model(place)
        for method in (
            EWC(ewc_lambda=2e3, num_sequences=SEQUENCES, at="expanded"),
            Kronecker(strength=2e3, num_sequences=SEQUENCES, refresh_steps=10, looks="mean"),
        ):
            print(f"{place} {method.name}: {costs(model, method)}")


if __name__ == "__main__":
    main()

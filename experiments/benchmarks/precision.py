"""Seconds of a training step on this CPU: bfloat16 autocast beside float32, by hidden size.

    python experiments/benchmarks/precision.py

Steps of both precisions alternate in one process, so that whatever else runs slows both; the
ratio of the medians is what to look at, not the milliseconds.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.table import tell  # noqa: E402

WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One model. Milliseconds are medians over the steps after the warm-up."""

    hidden_size: int
    num_layers: int
    tokens: int
    threads: int
    float32_ms: float
    bf16_ms: float

    @property
    def ratio(self) -> float:
        """Time of bfloat16 over time of float32: below 1, bfloat16 is the quicker one."""
        return round(self.bf16_ms / self.float32_ms, 2)


def new_llama(hidden_size: int, *, num_layers: int) -> nn.Module:
    from tritter.core.families import Model, llama_config
    from tritter.core.models import new_model

    config = llama_config(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        num_key_value_heads=max(1, hidden_size // 64),
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=256,
        initializer_range=0.02,
    )
    return new_model(Model(config), seed=0)


def step_seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, *, bf16: bool
) -> float:
    """Train one step and return how long it took."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started


def benchmark(
    hidden_sizes: Sequence[int], *, steps: int, batch_size: int, sequence_length: int
) -> Iterator[Row]:
    """Measure each hidden size, the two precisions in turn."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (batch_size, sequence_length), generator=generator)
    for hidden_size in hidden_sizes:
        num_layers = 3
        model = new_llama(hidden_size, num_layers=num_layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(steps + WARM_UP):
            for bf16, times in seconds.items():
                times.append(step_seconds(model, optimizer, tokens, bf16=bf16))
        yield Row(
            hidden_size=hidden_size,
            num_layers=num_layers,
            tokens=tokens.numel(),
            threads=torch.get_num_threads(),
            float32_ms=_median_ms(seconds[False]),
            bf16_ms=_median_ms(seconds[True]),
        )


def _median_ms(seconds: Sequence[float]) -> float:
    return round(1e3 * statistics.median(seconds[WARM_UP:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--output", type=Path, help="CSV file for the rows")
    options = parser.parse_args()
    rows = (
        {"run": run, **asdict(row), "ratio": row.ratio}
        for run in range(options.runs)
        for row in benchmark(
            options.hidden_sizes,
            steps=options.steps,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
        )
    )
    tell(rows, options.output)


if __name__ == "__main__":
    main()

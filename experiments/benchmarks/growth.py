"""What growth costs a training: steps without an event, and an event, beside steps without growth.

    python experiments/benchmarks/growth.py > experiments/benchmarks/growth.csv

A plain loop over a stock Llama of 11.9 M parameters and AdamW. Blocks of steps with the engine
watching (pressure of every neuron, hooks of the optimizer) and without alternate, so that whatever
else the machine does falls on both; an event is timed as a whole, with the looks that it takes.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tritter.methods.growth.blocks import ActivationRecorder
from tritter.methods.growth.grower import Grower
from tritter.methods.growth.triggers import INITIALISERS, TRIGGERS, GrowthOptions, Timing
from tritter.training.surgery import apply_plain

BLOCKS, STEPS, EVENTS = 12, 3, 5
BATCH, LENGTH = 8, 128


def options(initialiser: str) -> GrowthOptions:
    return GrowthOptions(
        trigger=TRIGGERS["schedule"](), initialiser=INITIALISERS[initialiser](),
        gradient_percentile=90.0, pressure_decay=0.9,
        history_checks=100, check_every=10**6, growth_cooldown=1, warmup_steps=0,
        max_growth_per_step=10, maturation_age=500, maturation_factor=2.0, plateau_threshold=None,
        plateau_steps=100, max_new_parameters=None, max_extra_flops=None,
        enable_replacement=False, dead_quantile=0.01, freeze_attention=False,
    )  # fmt: skip


def engine(model: LlamaForCausalLM, initialiser: str) -> Grower:
    asked = options(initialiser)
    made = Grower(
        asked, timing=Timing.of(asked, max_steps=None), seed=0,
    )  # fmt: skip
    made.begin(model)
    return made


def seconds(function: Callable[[], object]) -> float:
    since = time.process_time()
    function()
    return time.process_time() - since


def main() -> None:
    """Print a row for each measure: ratio of the medians, its smallest and largest part."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=1152, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 1024, (BATCH, LENGTH))
    grower = engine(model, "gradmax")
    count = 0

    def step(*, is_watched: bool) -> None:
        nonlocal count
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if is_watched:
            grower.pressure.observe(model, grower.blocks)
            grower.maturity.before_update(model, grower.blocks, count)
        optimizer.step()
        if is_watched:
            grower.maturity.after_update(model, grower.blocks)
        optimizer.zero_grad()
        count += 1

    for _ in range(2):
        step(is_watched=True)
    bare, watched = [], []
    for _ in range(BLOCKS):
        for is_watched, times in ((False, bare), (True, watched)):
            times += [seconds(lambda on=is_watched: step(is_watched=on)) for _ in range(STEPS)]
    writer = csv.writer(sys.stdout)
    writer.writerow(["measure", "parameters", "step_seconds", "ratio", "low", "high"])
    usual, size = statistics.median(bare), sum(p.numel() for p in model.parameters())
    blocks = [
        statistics.median(watched[n : n + STEPS]) / statistics.median(bare[n : n + STEPS])
        for n in range(0, BLOCKS * STEPS, STEPS)
    ]
    ratio = statistics.median(watched) / usual
    row = ["idle step", size, f"{usual:.3f}"]
    writer.writerow([*row, *map("{:.3f}".format, (ratio, min(blocks), max(blocks)))])
    for initialiser in INITIALISERS:
        grower = engine(model, initialiser)
        events = [event(model, optimizer, grower, ids) for _ in range(EVENTS)]
        parts = [statistics.median(events), min(events), max(events)]
        row = [f"event of {initialiser}, 60 neurons in 6 layers", size, f"{usual:.3f}"]
        writer.writerow([*row, *(f"{each / usual:.3f}" for each in parts)])


def event(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, grower: Grower, ids: torch.Tensor
) -> float:
    """Let all layers grow; return the seconds beyond the forward and backward pass of its step."""
    seen = ActivationRecorder(1024)
    handles = seen.attach(model, grower.blocks)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    since = time.process_time()
    for handle in handles:
        handle.remove()
    grower.pressure.observe(model, grower.blocks)
    growths = grower.growth(model, dict.fromkeys(range(6), 10), seen.probes(), step=10**6)
    apply_plain(model, grower.change(model, growths), optimizer=optimizer)
    grower.record_event(model, growths, step=10**6)
    return time.process_time() - since


if __name__ == "__main__":
    main()

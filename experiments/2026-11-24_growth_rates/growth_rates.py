"""Learning rates after growth: one rate for all parameters, or rates that depend on growth.

    python experiments/2026-11-24_growth_rates/growth_rates.py

Runs that are already in results.csv are skipped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from experiments.jobs import append, rows_of  # noqa: E402
from tritter.core.expansions import ExpansionSpec, LlamaPro, Width  # noqa: E402
from tritter.core.families import training_flops  # noqa: E402
from tritter.core.models import config_of, new_model  # noqa: E402
from tritter.data.batches import BatchStream, SequenceStream  # noqa: E402
from tritter.data.corpus import Corpus, stdlib_corpus  # noqa: E402
from tritter.data.tokens import END_OF_TEXT, TextBounds, pack  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402
from tritter.training import (  # noqa: E402
    BaseModule,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    fit,
)
from tritter.training.growth_scaling import GrowthScaling, width_factors  # noqa: E402
from tritter.transform.live import ModelExpander  # noqa: E402

BATCH, LENGTH = 16, 64
BASE_STEPS, STEPS = 1500, 600
BASE_RATE = 6e-3
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
WARMUP_RATIO = 0.05  # of the schedule, and of new entries
GROWTHS: dict[str, ExpansionSpec | None] = {
    "none": None,
    "width_2": Width(hidden_size=64),
    "width_4": Width(hidden_size=128),
    "depth": LlamaPro(),
}
# Part → growth, rule, multiplier and learning rates of its runs
ARMS = {
    "none": [("none", "none", 1.0, RATES[:5])],
    "width_2": [("width_2", "none", 1.0, RATES[:5]), ("width_2", "mup", 1.0, RATES)],
    "parts": [(growth, "parts", 2.0, RATES[1:4]) for growth in ("width_2", "depth")],
    "multipliers": [
        (growth, "parts", multiplier, RATES[2:3])
        for growth in ("width_2", "depth")
        for multiplier in (0.5, 1.0, 4.0)
    ],
    "depth": [("depth", "none", 1.0, RATES[1:4])],
    "width_4": [
        ("width_4", "none", 1.0, RATES[2:5]),
        ("width_4", "parts", 2.0, RATES[1:4]),
        ("width_4", "mup", 1.0, RATES[2:]),
    ],
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
CACHE = Path("outputs/growth_rates")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One continued training run.

    Args:
        growth: A key of GROWTHS.
        rule: `none`, `mup`, or `parts`.
        multiplier: Learning rate of new entries, for `parts`.
        rate: Peak learning rate.
    """

    growth: str
    rule: str = "none"
    multiplier: float = 1.0
    rate: float
    seed: int


def runs(part: str, seeds: Sequence[int]) -> Iterator[Run]:
    """Yield the runs of a part of the experiment."""
    for arm, seed in product(ARMS[part], seeds):
        growth, rule, multiplier, rates = arm
        for rate in rates:
            yield Run(growth=growth, rule=rule, multiplier=multiplier, rate=rate, seed=seed)


@cache
def corpus_of(seed: int) -> Corpus:
    return stdlib_corpus(
        vocab_size=1024,
        validation_fraction=0.2,
        max_validation_tokens_per_document=512,
        seed=seed,
        cache_dir=CACHE,
    )


@cache
def sequences(side: str, seed: int) -> Tensor:
    corpus = corpus_of(seed)
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    documents = getattr(corpus.domains["prose"], side)
    return pack(documents, sequence_length=LENGTH, bounds=TextBounds(end))


def train(
    model: nn.Module,
    schedule: Schedule,
    *,
    seed: int,
    purpose: str,
    scaling: GrowthScaling | None = None,
) -> None:
    order = SequenceStream(sequences("train", seed), seed=derived_seed(seed, purpose))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            BaseModule(model, schedule=schedule, optimizer=OptimizerSettings(weight_decay=0.01)),
            BatchStream(order, batch_size=BATCH, num_batches=schedule.max_steps),
            settings=TrainerSettings(
                accelerator="cpu",
                devices=1,
                strategy="auto",
                precision="32-true",
                gradient_clip_val=1.0,
                log_every_n_steps=50,
                max_non_finite_steps=10,
                save_every_n_steps=0,
                progress="off",
                check_memory=False,
                activation_checkpointing=False,
                compile=False,
            ),
            folder=Path(folder),
            label=purpose,
            console=Console(quiet=True),
            surgery_callbacks=() if scaling is None else (scaling,),
        )


def base_of(seed: int) -> nn.Module:
    """Load the base of a seed, or train it at a constant learning rate."""
    model = new_model(CONFIG, seed=derived_seed(seed, "model"))
    path = CACHE / f"base_{seed}_{BASE_STEPS}.pt"
    if not path.is_file():
        schedule = Schedule(learning_rate=BASE_RATE, max_steps=BASE_STEPS, shape="constant")
        train(model, schedule, seed=seed, purpose="base")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


@torch.inference_mode()
def validation_loss(model: nn.Module, seed: int) -> float:
    """Return the mean next-token loss in nats per token."""
    losses = [
        float(model(input_ids=rows, labels=rows, use_cache=False).loss)
        for rows in sequences("validation", seed)[:512].long().split(64)
    ]
    return sum(losses) / len(losses)


def result_of(run: Run) -> dict[str, object]:
    since = time.perf_counter()
    model, scaling = base_of(run.seed), None
    if (spec := GROWTHS[run.growth]) is not None:
        base, expander = config_of(model), ModelExpander([spec], seed=run.seed)
        change, model = expander.change(model), expander.expand(model)
        if run.rule == "mup":
            scaling = GrowthScaling(factors=width_factors(base, config_of(model)))
        elif run.rule == "parts":
            scaling = GrowthScaling(
                new=change.new_entries(),
                multiplier=run.multiplier,
                warmup_steps=round(WARMUP_RATIO * STEPS),
            )
    start = validation_loss(model, run.seed)
    schedule = Schedule(learning_rate=run.rate, max_steps=STEPS, warmup_ratio=WARMUP_RATIO)
    train(model, schedule, seed=run.seed, purpose="grown", scaling=scaling)
    return {
        **asdict(run),
        "loss_0": round(start, 5),
        "loss": round(validation_loss(model, run.seed), 5),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": float(training_flops(config_of(model)).of(LENGTH)) * BATCH * STEPS,
        "seconds": round(time.perf_counter() - since, 1),
    }


def key_of(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in Run.__dataclass_fields__)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(words)
    path = options.output / "results.csv"
    for part in options.parts:
        for run in runs(part, options.seeds):
            if key_of(asdict(run)) in map(key_of, rows_of(path)):
                continue
            append(path, [result_of(run)])


if __name__ == "__main__":
    main()

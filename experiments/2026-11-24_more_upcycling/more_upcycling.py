"""Upcycling: renormalised weights or not, shared experts, sigmoid routers; dense as the control.

    python experiments/2026-11-24_more_upcycling/more_upcycling.py

Runs that are already in results.csv are skipped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

import torch  # noqa: E402
from lightning import Callback  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from experiments.jobs import append, done  # noqa: E402
from tritter.core.expansions import Moe  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.core.models import model_of, new_model  # noqa: E402
from tritter.data.batches import BatchStream, SequenceStream  # noqa: E402
from tritter.data.corpus import Corpus  # noqa: E402
from tritter.data.tokens import END_OF_TEXT, TextBounds  # noqa: E402
from tritter.methods.moe_routing.objective import RoutingObjective  # noqa: E402
from tritter.methods.moe_routing.options import RoutingOptions  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402
from tritter.terminal import Console  # noqa: E402
from tritter.training import (  # noqa: E402
    BaseModule,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    fit,
)
from tritter.transform.live import ModelExpander  # noqa: E402

BATCH, LENGTH = 16, 64
BASE_STEPS, STEPS = 600, 300  # STEPS of the dense control; the other arms get its FLOPs
RATE = 3e-3
POINTS = (0.1, 0.3, 0.6, 1.0)  # shares of the FLOPs at which all are scored
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3"},
}
COMMON = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "dtype": "float32",
}
# Arm → base, expansion; `scratch` starts from random weights instead of copies
ARMS: dict[str, tuple[str, Moe | None]] = {
    "dense": ("llama", None),
    "mixtral": ("llama", Moe()),
    "qwen2_moe": ("llama", Moe(target="qwen2_moe")),
    "glm4_moe": ("llama", Moe(target="glm4_moe")),
    "scratch": ("llama", Moe()),
    "dense_qwen3": ("qwen3", None),
    "qwen3_moe": ("qwen3", Moe()),
    "not_renormalised": ("qwen3", Moe(norm_topk_prob=False)),
}
CACHE = Path("outputs/more_upcycling")


@cache
def corpus_of(seed: int) -> Corpus:
    return Corpus.of_stdlib(
        vocab_size=1024,
        validation_fraction=0.2,
        max_validation_tokens_per_document=512,
        seed=seed,
        cache_dir=CACHE,
    )


@cache
def sequences(domain: str, side: str, seed: int) -> Tensor:
    corpus = corpus_of(seed)
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    documents = getattr(corpus.domains[domain], side)
    return documents.pack(sequence_length=LENGTH, bounds=TextBounds(end))


def mixed(seed: int) -> Tensor:
    """Return as many training sequences of prose as of code."""
    prose, code = (sequences(domain, "train", seed) for domain in ("prose", "code"))
    count = min(len(prose), len(code))
    return torch.cat([prose[:count], code[:count]])


@torch.inference_mode()
def losses(model: nn.Module, seed: int) -> dict[str, float]:
    """Return the loss on each domain in nats per token."""
    found, was_training = {}, model.training
    model.eval()
    for domain in ("prose", "code"):
        rows = sequences(domain, "validation", seed)[:192].long()
        parts = [
            float(model(input_ids=part, labels=part, use_cache=False).loss)
            for part in rows.split(64)
        ]
        found[domain] = round(sum(parts) / len(parts), 5)
    model.train(was_training)
    return found


class Scores(Callback):
    """Score a model at some steps of its training."""

    def __init__(self, model: nn.Module, seed: int, steps: Mapping[int, float]) -> None:
        self.model, self.seed, self.steps = model, seed, steps
        self.found: dict[float, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.found[self.steps[trainer.global_step]] = losses(self.model, self.seed)


def train(model: nn.Module, rows: Tensor, steps: int, *, seed: int, scores: Scores | None) -> None:
    order = SequenceStream(rows, seed=derived_seed(seed, "base" if scores is None else "order"))
    has_experts = bool(getattr(model.config, "num_experts_per_tok", None))
    sides = [RoutingObjective(model, RoutingOptions())] if has_experts else []
    schedule = Schedule(learning_rate=RATE, max_steps=steps, shape="constant", warmup_ratio=0.02)
    module = BaseModule(
        model,
        schedule=schedule,
        optimizer=OptimizerSettings(weight_decay=0.01),
        side_losses=sides,
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(
            module,
            BatchStream(order, batch_size=BATCH, num_batches=steps),
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
            label="upcycling",
            console=Console(quiet=True),
            surgery_callbacks=() if scores is None else (scores,),
        )


def base_of(name: str, seed: int) -> nn.Module:
    """Load the base of a seed, or train it on prose."""
    model = new_model(Model({**COMMON, **BASES[name]}), seed=derived_seed(seed, "model"))
    path = CACHE / f"{name}_{seed}_{BASE_STEPS}.pt"
    if not path.is_file():
        train(model, sequences("prose", "train", seed), BASE_STEPS, seed=seed, scores=None)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def rows_of(arm: str, seed: int) -> list[dict[str, object]]:
    """Train an arm, and return its scores at equal FLOPs."""
    since = time.perf_counter()
    base, spec = ARMS[arm]
    model = base_of(base, seed)
    of_step = float(training_flops(model_of(model)).of(LENGTH)) * BATCH
    budget = of_step * STEPS
    if spec is not None:
        model = ModelExpander([spec], seed=seed).expand(model)
        of_step = float(training_flops(model_of(model)).of(LENGTH)) * BATCH
    if arm == "scratch":
        model = new_model(model_of(model), seed=derived_seed(seed, "scratch"))
    num_steps = round(budget / of_step)
    at = {max(1, round(share * num_steps)): share for share in POINTS}
    scores = Scores(model, seed, at)
    found = {0.0: losses(model, seed)}
    train(model, mixed(seed), num_steps, seed=seed, scores=scores)
    return [
        {
            "arm": arm,
            "seed": seed,
            "share": share,
            **of_domains,
            "steps": num_steps,
            "flops": of_step * num_steps,
            "seconds": round(time.perf_counter() - since, 1),
        }
        for share, of_domains in {**found, **scores.found}.items()
    ]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(words)
    path = options.output / "results.csv"
    for seed in options.seeds:
        for arm in options.arms:
            if (str(seed), arm) not in done(path):
                append(path, rows_of(arm, seed))


if __name__ == "__main__":
    main()

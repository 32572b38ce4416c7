"""Depth by choice: layers duplicated by importance, and predicted layers, against even spread.

    python experiments/2026-11-24_depth_by_choice/depth_by_choice.py

Arms that are already in results.csv are skipped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from experiments.jobs import append, rows_of  # noqa: E402
from tritter.core.expansions import Interpolate, Layers, LlamaPro, Stack  # noqa: E402
from tritter.core.expansions.depth import repeated_layers  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.core.models import layers_of, model_of, new_model  # noqa: E402
from tritter.data.batches import SequenceStream  # noqa: E402
from tritter.data.corpus import Corpus  # noqa: E402
from tritter.data.tokens import END_OF_TEXT, TextBounds  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402
from tritter.training.optimizer import (  # noqa: E402
    OptimizerSettings,
    Schedule,
)
from tritter.transform.live import ModelExpander  # noqa: E402

BATCH, LENGTH = 16, 64
BASE_STEPS, BASE_RATE = 1500, 6e-3
RATE = 6e-3
EVALUATED = (0, 24, 80, 240)  # steps of the grown model
SCORED = 128  # sequences of old training data that importances are measured on
VALIDATION = 256  # sequences of each domain
LONG_UPDATES = 2000  # of LESA's network, in `lesa_long`
LAYERS, ADDED = 8, 3
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
CACHE = Path("outputs/depth_by_choice")
MEASURES = ("skip", "influence", "fisher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """Where new layers go, and how they start.

    Args:
        name: Rule of the choice.
        init: `plain` copies, `identity` copies, `average` of both neighbours, `lesa` (10 epochs,
            as the reference code) or `lesa_long` (2,000 updates), or `none`.
        positions: The layers that a new layer follows; for `stack`, the copies are on top.
    """

    name: str
    init: str
    positions: tuple[int, ...] = ()


# Data and bases


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
    documents = getattr(corpus.domains[domain], side)
    return documents.pack(sequence_length=LENGTH, bounds=TextBounds(end)).long()


def batches(domains: Sequence[str], seed: int, purpose: str) -> Iterator[Tensor]:
    """Yield batches with equal parts of the domains."""
    streams = [
        SequenceStream(sequences(domain, "train", seed), seed=derived_seed(seed, purpose, domain))
        for domain in domains
    ]
    while True:
        yield torch.cat([stream.next_sequences(BATCH // len(streams)) for stream in streams])


def train(
    model: nn.Module,
    data: Iterator[Tensor],
    schedule: Schedule,
    *,
    at: Mapping[int, Callable[[], None]],
) -> None:
    """Train a model; `at` maps numbers of finished steps to what happens then."""
    optimizer = OptimizerSettings(weight_decay=0.01).build(
        model.named_parameters(), learning_rate=RATE
    )
    model.train()
    for step in range(schedule.max_steps + 1):
        if step in at:
            at[step]()
        if step == schedule.max_steps:
            return
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        batch = next(data)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def base_of(seed: int) -> nn.Module:
    """Load the base of a seed, or train it on prose at a constant learning rate."""
    model = new_model(Model(CONFIG), seed=derived_seed(seed, "model"))
    path = CACHE / f"base_{seed}_{BASE_STEPS}.pt"
    if not path.is_file():
        schedule = Schedule(learning_rate=BASE_RATE, max_steps=BASE_STEPS, shape="constant")
        train(model, batches(["prose"], seed, "base"), schedule, at={})
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


@torch.inference_mode()
def loss_of(model: nn.Module, rows: Tensor) -> float:
    """Return the mean next-token loss in nats per token."""
    pieces = rows.split(64)
    losses = [float(model(input_ids=b, labels=b, use_cache=False).loss) * len(b) for b in pieces]
    return sum(losses) / len(rows)


# Importance of layers


@contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """Replace a layer by the identity."""
    handle = layer.register_forward_hook(lambda _, inputs, output: inputs[0])
    try:
        yield
    finally:
        handle.remove()


def importances(model: nn.Module, rows: Tensor) -> dict[str, list[float]]:
    """Return the importance of each layer by three measures.

    `skip`: change of the loss without the layer. `influence`: 1 − cosine of its input and output,
    averaged over tokens (ShortGPT, arXiv 2403.03853). `fisher`: summed squared gradients of its
    weights, of single sequences.
    """
    layers = layers_of(model)
    cosines: list[list[float]] = [[] for _ in layers]
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, output, found=found: found.append(
                float(nn.functional.cosine_similarity(inputs[0], output, dim=-1).mean())
            )
        )
        for layer, found in zip(layers, cosines, strict=True)
    ]
    whole = loss_of(model, rows)
    for handle in handles:
        handle.remove()
    skip = []
    for layer in layers:
        with skipped(layer):
            skip.append(loss_of(model, rows) - whole)
    fisher = [0.0] * len(layers)
    for row in rows.split(1):
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        for number, layer in enumerate(layers):
            fisher[number] += sum(float(p.grad.square().sum()) for p in layer.parameters())
        model.zero_grad()
    influence = [1 - sum(found) / len(found) for found in cosines]
    return {"skip": skip, "influence": influence, "fisher": [f / len(rows) for f in fisher]}


# Arms


def arms(scores: Mapping[str, Sequence[float]], seed: int) -> list[Arm]:
    """Return the arms of a seed."""
    interpolated = new_positions(Interpolate(target_layers=LAYERS + ADDED).layer_sources(LAYERS))
    spread = new_positions(LlamaPro(target_layers=LAYERS + ADDED).layer_sources(LAYERS))
    bottom, top = tuple(range(ADDED)), tuple(range(LAYERS - 1 - ADDED, LAYERS - 1))
    chosen = {"bottom": bottom, "top": top}
    for measure in ("skip", "influence"):
        by_rank = sorted(range(LAYERS), key=scores[measure].__getitem__)
        chosen[f"{measure}_least"] = tuple(sorted(by_rank[:ADDED]))
        chosen[f"{measure}_most"] = tuple(sorted(by_rank[-ADDED:]))
    for number in (1, 2):
        draw = random.Random(derived_seed(seed, "positions", str(number)))
        chosen[f"random_{number}"] = tuple(sorted(draw.sample(range(LAYERS), ADDED)))
    found = [Arm(name="none", init="none"), Arm(name="stack", init="plain")]
    for init in ("plain", "identity"):
        found.append(Arm(name="even", init=init, positions=interpolated))
        found += [Arm(name=name, init=init, positions=of) for name, of in chosen.items()]
    found.append(Arm(name="llama_pro", init="identity", positions=spread))
    for init in ("average", "lesa"):
        found.append(Arm(name="even", init=init, positions=interpolated))
        found.append(Arm(name="top", init=init, positions=top))
    return [*found, Arm(name="even", init="lesa_long", positions=interpolated)]


def new_positions(sources: Sequence[int]) -> tuple[int, ...]:
    """Return the layers that an additional layer follows."""
    return tuple(source for source, following in pairwise(sources) if source == following)


def grown(base: nn.Module, arm: Arm, *, seed: int) -> nn.Module:
    if arm.init == "none":
        return base
    if arm.name == "stack":
        spec: Any = Stack(target_layers=LAYERS + ADDED, partial=True)
        return ModelExpander([spec], seed=seed).expand(base)
    sources = tuple(sorted([*range(LAYERS), *arm.positions]))
    spec = Layers(sources=sources, identity=arm.init == "identity")
    model = ModelExpander([spec], seed=seed).expand(base)
    if arm.init in ("plain", "identity"):
        return model
    if arm.init == "average":
        made = average_layers(base, arm.positions)
    else:
        made = predicted_layers(base, arm.positions, is_long=arm.init == "lesa_long", seed=seed)
    places = sorted(repeated_layers(sources))
    for place, tensors in zip(places, made, strict=True):
        parameters = dict(layers_of(model)[place].named_parameters())
        for name, value in tensors.items():
            parameters[name].data.copy_(value)
    return model


def matrices(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the matrices of all layers by name."""
    layers = [dict(layer.named_parameters()) for layer in layers_of(model)]
    names = [name for name, parameter in layers[0].items() if parameter.ndim == 2]
    return {name: [layer[name].detach() for layer in layers] for name in names}


def average_layers(model: nn.Module, positions: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return the mean of the matrices before and after each position."""
    found = matrices(model)
    return [{n: (of[at] + of[at + 1]) / 2 for n, of in found.items()} for at in positions]


def predicted_layers(
    model: nn.Module, positions: Sequence[int], *, is_long: bool, seed: int
) -> list[dict[str, Tensor]]:
    """Return the matrices that LESA (arXiv 2502.13794) predicts between layers.

    Per kind of matrix, one SVD of all layers side by side. A network learns the right singular
    vectors of a layer from those of its neighbours; then it gets two adjacent layers.
    """
    predicted: list[dict[str, Tensor]] = [{} for _ in positions]
    for name, of_layers in matrices(model).items():
        left, singular, right = torch.linalg.svd(torch.cat(of_layers, 1), full_matrices=False)
        parts = right.split(of_layers[0].shape[1], dim=1)
        triples = list(zip(parts, parts[1:], parts[2:], strict=False))
        inputs = torch.cat([torch.cat([a, c], 1) for a, _, c in triples])
        outputs = torch.cat([b for _, b, _ in triples])
        network = fitted(inputs, outputs, is_long=is_long, seed=derived_seed(seed, "lesa", name))
        for found, at in zip(predicted, positions, strict=True):
            with torch.no_grad():
                found[name] = (left * singular) @ network(torch.cat([parts[at], parts[at + 1]], 1))
    return predicted


def fitted(inputs: Tensor, outputs: Tensor, *, is_long: bool, seed: int) -> nn.Module:
    """Fit LESA's network; sizes, loss and optimizer are those of its reference code."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(inputs.shape[1], 256), nn.ReLU(),
            nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, outputs.shape[1]),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    per_epoch = -(-len(inputs) // 64)
    for _ in range(LONG_UPDATES // per_epoch if is_long else 10):
        for rows in torch.randperm(len(inputs), generator=generator).split(64):
            guess, wanted = network(inputs[rows]), outputs[rows]
            norms = (guess.norm() - wanted.norm()).square()
            loss = (1 - 5e-4) * nn.functional.mse_loss(guess, wanted) + 5e-4 * norms
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


# Runs


def follow(arm: Arm, seed: int, *, rate: float = RATE) -> list[dict[str, object]]:
    """Grow, train on both domains, and return a row for each evaluated step."""
    since, base = time.perf_counter(), base_of(seed)
    grown_flops = training_flops(Model({**CONFIG, "num_hidden_layers": LAYERS + ADDED})).of(LENGTH)
    model = grown(base, arm, seed=seed)
    flops = training_flops(model_of(model)).of(LENGTH)
    steps = {round(step * grown_flops / flops): step for step in EVALUATED}
    rows: list[dict[str, object]] = []

    def evaluate(step: int) -> None:
        losses = {
            domain: loss_of(model, sequences(domain, "validation", seed)[:VALIDATION])
            for domain in ("prose", "code")
        }
        rows.append(
            {
                "seed": seed,
                "arm": arm.name,
                "init": arm.init,
                "positions": " ".join(map(str, arm.positions)),
                "rate": rate,
                "budget": steps[step],
                "steps": step,
                "flops": float(flops) * BATCH * step,
                **{domain: round(loss, 5) for domain, loss in losses.items()},
                "seconds": round(time.perf_counter() - since, 1),
            }
        )

    schedule = Schedule(learning_rate=rate, max_steps=max(steps))
    data = batches(["prose", "code"], seed, "grown")
    train(model, data, schedule, at={step: lambda s=step: evaluate(s) for step in steps})
    return rows


def run_seed(seed: int, folder: Path) -> None:
    """Run the arms of a seed; arms with equal layers share one run."""
    base, path = base_of(seed), folder / "importance.csv"
    scores = importances(base, sequences("prose", "train", seed)[:SCORED])
    if str(seed) not in {row["seed"] for row in rows_of(path)}:
        append(
            path,
            [
                {"seed": seed, "layer": n, **{m: f"{scores[m][n]:.6g}" for m in MEASURES}}
                for n in range(LAYERS)
            ],
        )
    runs: dict[tuple[object, ...], Sequence[Mapping[str, object]]] = {}
    done = rows_of(folder / "results.csv")
    for arm in arms(scores, seed):
        key = (str(seed), arm.name, arm.init)
        known = [row for row in done if (row["seed"], row["arm"], row["init"]) == key]
        table = (arm.init, arm.positions)
        if known:
            runs[table] = known
            continue
        if table not in runs:
            runs[table] = follow(arm, seed)
        append(folder / "results.csv", [{**row, "arm": arm.name} for row in runs[table]])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    for seed in options.seeds:
        run_seed(seed, options.output)


if __name__ == "__main__":
    main()

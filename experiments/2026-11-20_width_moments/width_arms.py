"""One arm of the experiment: a trained base, its width doubled, trained on.

Every arm of a seed starts from one base with its optimizer and sees the same batches.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from tritter.core.expansions import Width  # noqa: E402
from tritter.core.families import Config, Model  # noqa: E402
from tritter.core.models import model_of, model_with_tensors, new_model  # noqa: E402
from tritter.core.parameter_map import AxisFactor, ParameterMap  # noqa: E402
from tritter.data.batches import BatchStream, SequenceStream  # noqa: E402
from tritter.data.corpus import Corpus  # noqa: E402
from tritter.data.replay import ReplayBuffer  # noqa: E402
from tritter.data.tokens import END_OF_TEXT, TextBounds  # noqa: E402
from tritter.seeds import derived_seed  # noqa: E402
from tritter.training.optimizer import OptimizerSettings  # noqa: E402
from tritter.training.surgery import carried_moments, put_moments  # noqa: E402
from tritter.transform import Change  # noqa: E402
from tritter.transform.live import ModelExpander  # noqa: E402

EVALUATED_STEPS = (0, 10, 25, 50, 100, 175, 250)
BASE_RATE = 3e-3
ZERO_SECOND = "_zero_second"
WIDTHS: dict[str, Width] = {
    "fresh": Width(),
    "net2net": Width(init="net2net"),
    "net2net_equal_noise": Width(init="net2net", shares="equal", noise=0.01),
    "zero_pad": Width(init="zero_pad"),
    "aki": Width(init="aki"),  # not exact: copies from the layer above
    "random_padding": Width(),  # not exact: see plainly_padded
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How long and how large; the smoke test takes smaller ones."""

    base_steps: int = 600
    steps: int = 250
    batch_size: int = 16
    sequence_length: int = 128
    validation_sequences: int = 128
    cache: Path = Path("outputs/width_moments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One continued training.

    Args:
        growth: a key of WIDTHS, or `ungrown`.
        policy: of Adam's moments, see `tritter.core.parameter_map.carry`; with `_zero_second`
            behind it the second moment of new entries starts at zero too, not at the mean of the
            others.
        factor: of each entry's update: none, `share` of the coordinate, or the weight's factor.
        domain: `prose`, what the base was trained on, or `code` with a quarter of prose.
    """

    part: str
    growth: str
    policy: str = "carry"
    rewarm_steps: int = 0
    factor: str = "none"
    learning_rate: float
    domain: str = "prose"
    steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Base:
    """A trained model, its optimizer and the place in its data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    place: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grown:
    """A model after growth, with what carries its optimizer's state over."""

    model: nn.Module
    configs: tuple[Config, ...]
    maps: tuple[ParameterMap, ...]


def base_config() -> dict[str, object]:
    return {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }


@lru_cache(maxsize=1)
def corpus_of(seed: int, cache: Path) -> Corpus:
    return Corpus.of_stdlib(
        vocab_size=1024,
        validation_fraction=0.2,
        max_validation_tokens_per_document=512,
        seed=seed,
        cache_dir=cache,
    )


def sequences(domain: str, side: str, *, seed: int, sizes: Sizes) -> Tensor:
    corpus = corpus_of(seed, sizes.cache)
    documents = getattr(corpus.domains[domain], side)
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    return documents.pack(sequence_length=sizes.sequence_length, bounds=TextBounds(end))


def prose_batches(seed: int, sizes: Sizes) -> BatchStream:
    prose = sequences("prose", "train", seed=seed, sizes=sizes)
    order = SequenceStream(prose, seed=derived_seed(seed, "prose"))
    return BatchStream(order, batch_size=sizes.batch_size)


def batches_of(arm: Arm, base: Base, sizes: Sizes) -> BatchStream:
    """Return prose from where the base stopped, or code with a quarter of replayed prose."""
    if arm.domain == "prose":
        batches = prose_batches(arm.seed, sizes)
        batches.load_state_dict(base.place)
        return batches
    code = sequences("code", "train", seed=arm.seed, sizes=sizes)
    prose = sequences("prose", "train", seed=arm.seed, sizes=sizes)
    order = SequenceStream(code, seed=derived_seed(arm.seed, "code"))
    replayed = ReplayBuffer.of_domains({"old": prose}, seed=arm.seed)
    return replayed.mixed_into(BatchStream(order, batch_size=sizes.batch_size), 0.25)


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    settings = OptimizerSettings()
    return settings.build(model.named_parameters(), learning_rate=learning_rate)


def base_of(seed: int, sizes: Sizes) -> Base:
    """Load the base of a seed, or train it: constant rate, so that its moments are in use."""
    model = new_model(Model(base_config()), seed=derived_seed(seed, "model"))
    optimizer = optimizer_of(model, BASE_RATE)
    path = sizes.cache / f"base_{seed}_{sizes.base_steps}.pt"
    if not path.is_file():
        batches = prose_batches(seed, sizes)
        train(model, optimizer, batches, steps=sizes.base_steps, rewarm_steps=30)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = (model.state_dict(), optimizer.state_dict(), batches.state_dict())
        torch.save(dict(zip(("model", "optimizer", "place"), parts, strict=True)), path)
    held = torch.load(path, weights_only=True)
    model.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    return Base(model, optimizer, held["place"])


def grow(model: nn.Module, spec: Width, *, seed: int) -> Grown:
    expander = ModelExpander([spec], seed=seed)
    config = model_of(model).config
    steps = expander.steps(Model(config))
    configs = (config, *(step.target.config for step in steps))
    return Grown(expander.expand(model), configs, tuple(step.parameter_map for step in steps))


def grown_as(growth: str, model: nn.Module, *, seed: int) -> Grown:
    """Return the model grown by a key of WIDTHS, or as it is."""
    if growth == "ungrown":
        return Grown(model, (model_of(model).config,), ())
    grown = grow(model, WIDTHS[growth], seed=seed)
    if growth == "random_padding":
        return replace(grown, model=plainly_padded(model, grown, seed=seed))
    return grown


def plainly_padded(model: nn.Module, grown: Grown, *, seed: int) -> nn.Module:
    """Return a newly drawn wide model that the old weights were copied into, norms untouched."""
    source, target = grown.configs
    unscaled = {**target, "rms_norm_eps": source["rms_norm_eps"]}
    drawn = new_model(Model(unscaled), seed=derived_seed(seed, "padding"))
    held, old = (
        dict(Model(unscaled).disk_tensors(drawn.state_dict())),
        dict(Model(source).disk_tensors(model.state_dict())),
    )
    padded: dict[str, Tensor] = {}
    for tensor in Model(target).tensors:
        tensor_map = grown.maps[0].tensors[tensor.name]
        ones = tuple(
            axis and AxisFactor(axis.index, torch.ones_like(axis.weight), axis.gradient)
            for axis in tensor_map.axes
        )
        value = old[tensor.disk_name]
        copied = replace(tensor_map, axes=ones).apply(value)
        every_entry = torch.ones(value.shape, dtype=torch.bool)
        is_old = tensor_map.carried_mask({tensor_map.origin: every_entry}.__getitem__)
        padded[tensor.name] = torch.where(is_old, copied, held[tensor.disk_name])
    return model_with_tensors(Model(unscaled), padded)


def optimizer_after(
    base: Base, grown: Grown, *, policy: str, learning_rate: float
) -> torch.optim.Optimizer:
    optimizer = optimizer_of(grown.model, learning_rate)
    if not grown.maps and policy == "carry":
        optimizer.load_state_dict(base.optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    elif policy != "zero":
        change = Change.of(grown.maps[0], *map(Model, grown.configs))
        moments = carried_moments(
            base.optimizer,
            base.model,
            change,
            stored_tensors=change.after,
            policy=policy.removesuffix(ZERO_SECOND),  # type: ignore[arg-type]
        )
        for name, values in moments.items():
            put_moments(optimizer, grown.model.get_parameter(name), values)
    if policy.endswith(ZERO_SECOND):
        # With β₁ 0.9 and β₂ 0.95 no update gets larger than 1.10 times a settled one
        for state in optimizer.state.values():
            state["exp_avg_sq"] *= state["exp_avg"] != 0
    return optimizer


def update_factors(grown: Grown, kind: str) -> dict[nn.Parameter, Tensor]:
    """Return what each entry's update is multiplied with; where nothing is, nothing.

    Args:
        kind: `none`; `share`, the product of weight and gradient factor, which adds up to 1 over
            the copies of a coordinate; or `weight`, under which copies stay copies.
    """
    if kind == "none":
        return {}
    parameters = dict(grown.model.named_parameters())
    factors: dict[nn.Parameter, Tensor] = {}
    for tensor in Model(grown.configs[-1]).tensors:
        parameter = parameters[tensor.disk_name]
        factor = torch.ones(())
        for axis in grown.maps[0].tensors[tensor.name].axes or (None,) * parameter.ndim:
            along = torch.ones(1) if axis is None else _along(axis, kind)
            factor = factor.unsqueeze(-1) * along
        factors[parameter] = factor.expand(parameter.shape)
    return factors


def _along(axis: AxisFactor, kind: str) -> Tensor:
    values = axis.weight * axis.gradient if kind == "share" else axis.weight
    return torch.where(axis.index >= 0, values, 1.0).float()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    rewarm_steps: int,
    factors: Mapping[nn.Parameter, Tensor] | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train at the optimizer's rate, after a linear warm-up; return the loss of every batch."""
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    model.train()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / rewarm_steps) if rewarm_steps else rate
        losses.append(backward(model, batch["input_ids"]))
        scaled_step(optimizer, factors or {})
        after_step(step)
    return losses


def backward(model: nn.Module, input_ids: Tensor) -> float:
    model.zero_grad()
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


@torch.no_grad()
def scaled_step(optimizer: torch.optim.Optimizer, factors: Mapping[nn.Parameter, Tensor]) -> None:
    """Take a step, weight decay included, and keep the given part of each entry's move."""
    before = {parameter: parameter.clone() for parameter in factors}
    optimizer.step()
    for parameter, factor in factors.items():
        parameter.copy_(torch.lerp(before[parameter], parameter, factor))


@torch.inference_mode()
def validation_loss(model: nn.Module, rows: Tensor) -> float:
    """Return the mean next-token loss, nats per token."""
    losses = [
        float(model(input_ids=batch, labels=batch, use_cache=False).loss)
        for batch in rows.long().split(32)
    ]
    return sum(losses) / len(losses)


def run(arm: Arm, sizes: Sizes) -> list[dict[str, object]]:
    """Run one arm; a row for each domain that is evaluated."""
    since = time.perf_counter()
    base = base_of(arm.seed, sizes)
    grown = grown_as(arm.growth, base.model, seed=arm.seed)
    optimizer = optimizer_after(base, grown, policy=arm.policy, learning_rate=arm.learning_rate)
    domains = ("prose",) if arm.domain == "prose" else ("code", "prose")
    held_out = {
        name: sequences(name, "validation", seed=arm.seed, sizes=sizes)[
            : sizes.validation_sequences
        ]
        for name in domains
    }
    found: dict[str, dict[int, float]] = {name: {} for name in domains}

    def evaluate(step: int) -> None:
        if step in EVALUATED_STEPS or step == arm.steps:
            for name, rows in held_out.items():
                found[name][step] = validation_loss(grown.model, rows)

    evaluate(0)
    losses = train(
        grown.model,
        optimizer,
        batches_of(arm, base, sizes),
        steps=arm.steps,
        rewarm_steps=arm.rewarm_steps,
        factors=update_factors(grown, arm.factor),
        after_step=evaluate,
    )
    shared = {
        **asdict(arm),
        "train_loss": round(sum(losses) / len(losses), 5),
        "parameters": sum(parameter.numel() for parameter in grown.model.parameters()),
        "seconds": round(time.perf_counter() - since, 1),
    }
    return [{**shared, "evaluated": name, **_columns(found[name])} for name in domains]


def _columns(losses: Mapping[int, float]) -> dict[str, object]:
    columns = {f"loss_{step}": losses.get(step) for step in EVALUATED_STEPS}
    columns["loss_last"] = losses[max(losses)]
    return {name: None if loss is None else round(loss, 5) for name, loss in columns.items()}

"""What trains in the experiment: the small model, growth paths, one seed's data, a training.

Every training is a trunk at a constant rate. What is measured along it is the loss of a running
average of its weights, which stands for a decayed model without a schedule that would have to know
its end (arXiv 2405.18392); and at a few places a branch decays the rate to zero, as WSD does.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Width
from tritter.core.families import Config, Model, family_of, training_flops
from tritter.core.models import model_of, new_model
from tritter.data.batches import SequenceStream
from tritter.data.built_in import Stdlib
from tritter.data.corpus import Corpus
from tritter.data.tokens import END_OF_TEXT, TextBounds
from tritter.methods.moe_routing.objective import RoutingObjective
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.seeds import derived_seed
from tritter.training.optimizer import OptimizerSettings, Schedule
from tritter.transform.live import ModelExpander

SEQUENCE_LENGTH = 128
WARMUP_STEPS = 50
CLIP_NORM = 1.0
AVERAGE_DECAY = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a run costs: the small model, steps from scratch, batch.

    `library`: an installed package whose Python sources are the data, instead of the embedded
    corpus. `precision`: `32` or `bf16` (autocast of training).
    """

    layers: int = 2
    hidden_size: int = 32
    steps: int = 1200
    batch_size: int = 8
    eval_every: int = 40
    eval_sequences: int = 96
    vocab_size: int = 1024
    library: str = ""
    precision: str = "32"

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * SEQUENCE_LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPath:
    """Expansions, and the target that they share with other paths."""

    target: str
    specs: tuple[ExpansionSpec, ...]


def growth_paths(size: Size) -> dict[str, GrowthPath]:
    """Return the paths by name; from twice-as-deep by dus no layer is dropped: it is stacking."""
    stack, wide = Dus(target_layers=2 * size.layers), Width(hidden_size=2 * size.hidden_size)
    experts = Moe(num_experts=4, experts_per_token=2, noise=0.01)
    partly_new = replace(experts, noise=0.0, reinit_fraction=0.5)
    return {
        "stack": GrowthPath(target="depth", specs=(stack,)),
        "llama_pro": GrowthPath(target="depth", specs=(LlamaPro(target_layers=2 * size.layers),)),
        "width": GrowthPath(target="width", specs=(wide,)),
        "width_stack": GrowthPath(target="depth_width", specs=(wide, stack)),
        "moe": GrowthPath(target="moe", specs=(experts,)),
        "moe_reinit": GrowthPath(target="moe", specs=(partly_new,)),
    }


def small_config(size: Size, *, vocab_size: int) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": 3 * size.hidden_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden_size // 16,
        "num_key_value_heads": size.hidden_size // 32,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
    }


class Training:
    """A model in training: weights, optimizer, place in the data, running average, FLOPs.

    Routers, where there are some, are balanced as in a run of train.py.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: SequenceStream,
        *,
        rate: float,
        precision: str = "32",
        step: int = 0,
        flops_before: float = 0.0,
    ) -> None:
        self.precision = precision
        self.model = model.train()
        self.average = copy.deepcopy(model)
        self.stream = stream
        self.rate = rate
        self.step = self.born = step
        self.flops_before = flops_before
        self.seconds = 0.0
        config = model_of(model).config
        family = family_of(config)
        self.flops_per_token = training_flops(Model(config)).per_token(SEQUENCE_LENGTH)
        self.routers: RoutingObjective | None = None
        if family.has_experts:
            self.routers = RoutingObjective(model, RoutingOptions())
            self.routers.routing.start_recording()
        self.own_flops = 0.0
        self.optimizer = OptimizerSettings().build(model.named_parameters(), learning_rate=rate)

    @property
    def flops(self) -> float:
        return self.flops_before + self.own_flops

    def advance(self, factors: Iterator[float] | Sequence[float], *, batch_size: int) -> None:
        """Take one optimizer step for every factor of the rate."""
        since = time.perf_counter()
        for factor in factors:
            batch = self.stream.next_sequences(batch_size)  # [B, T]
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * factor
            self._loss(batch).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.own_flops += batch.numel() * self.flops_per_token
            self._average()
        self.seconds += time.perf_counter() - since

    def stable(self, steps: int, *, batch_size: int) -> None:
        """Train at the constant rate; the first steps of a model warm up."""
        schedule = Schedule(
            learning_rate=self.rate,
            max_steps=WARMUP_STEPS,
            warmup_ratio=1.0,
            shape="constant",
        )
        start = self.step - self.born
        self.advance([schedule.factor(start + i) for i in range(steps)], batch_size=batch_size)

    def decayed(self, steps: int, *, batch_size: int) -> "Training":
        """Return a branch whose rate fell linearly to zero; the trunk stays as it is."""
        branch = copy.deepcopy(self)
        branch.advance([1 - i / steps for i in range(steps)], batch_size=batch_size)
        return branch

    def grown(self, specs: Sequence[ExpansionSpec], *, rate: float, seed: int) -> "Training":
        """Return the training of the expanded model, with new optimizer state and warm-up."""
        model = ModelExpander(specs, seed=seed).expand(self.model)
        return Training(
            model,
            copy.deepcopy(self.stream),
            rate=rate,
            precision=self.precision,
            step=self.step,
            flops_before=self.flops,
        )

    def save(self, path: Path) -> None:
        """Write what a killed training continues from."""
        parts = self.model, self.average, self.optimizer, self.stream
        states = [part.state_dict() for part in parts]
        partial = path.with_suffix(".partial")
        torch.save([*states, self.step, self.own_flops, self.seconds], partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        *states, self.step, self.own_flops, self.seconds = torch.load(path, weights_only=True)
        parts = self.model, self.average, self.optimizer, self.stream
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)

    def _loss(self, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        if self.routers is not None:
            loss = loss + self.routers.weighted(self.routers.terms({"input_ids": batch}))
        return loss

    def _average(self) -> None:
        taken = self.step - self.born
        decay = min(AVERAGE_DECAY, taken / (taken + 9))
        with torch.no_grad():
            for held, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                held.lerp_(new, 1 - decay)


class Seed:
    """The data of one seed, and what is measured on it."""

    def __init__(self, seed: int, size: Size, *, cache_dir: Path) -> None:
        self.seed, self.size = seed, size
        corpus = _corpus(seed, size, cache_dir=cache_dir)
        self.config = small_config(size, vocab_size=corpus.tokenizer.get_vocab_size())
        self.train = torch.cat(list(_packed(corpus, side="train")))
        half = size.eval_sequences // 2
        held_out = [_spread(each, half) for each in _packed(corpus, side="validation")]
        self.validation = torch.cat(held_out).long()

    def new(self, config: Config, *, rate: float, name: str) -> Training:
        """Return a training from scratch; data come in the same order in every arm."""
        stream = SequenceStream(self.train, seed=derived_seed(self.seed, "order"))
        model = new_model(Model(config), seed=derived_seed(self.seed, "initialisation", name))
        return Training(model, stream, rate=rate, precision=self.size.precision)

    @torch.inference_mode()
    def loss(self, model: nn.Module) -> float:
        """Return the mean next-token loss on held-out documents, nats per token."""
        losses = [
            float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
            for batch in torch.split(self.validation, 32)
        ]
        return sum(losses) / len(self.validation)


def _corpus(seed: int, size: Size, *, cache_dir: Path) -> Corpus:
    options: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "validation_fraction": 0.2,
        "max_validation_tokens_per_document": 2000,
        "seed": seed,
        "cache_dir": cache_dir,
    }
    if not size.library:
        return Corpus.of_stdlib(**options)
    found = find_spec(size.library)
    assert found is not None and found.submodule_search_locations is not None
    library = Stdlib(Path(found.submodule_search_locations[0]))
    domains = {name: library.documents(name) for name in ("prose", "code")}
    return Corpus.build(domains, origin=f"Python sources of {size.library}", **options)


def _packed(corpus: Corpus, *, side: str) -> Iterator[Tensor]:
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    for domain in corpus.domains.values():
        yield getattr(domain, side).pack(sequence_length=SEQUENCE_LENGTH, bounds=TextBounds(end))


def _spread(sequences: Tensor, count: int) -> Tensor:
    return sequences[torch.linspace(0, len(sequences) - 1, min(count, len(sequences))).long()]

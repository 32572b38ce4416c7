"""Replay: a fixed share of every batch comes from the old domains.

When to use: whenever old data is at hand; at our scale two fifths cost a tenth of the gain in the
same steps and lose nothing of the old domain (compare arXiv 2403.08763). The share is exact over
time, and so is that of each old domain among them; the new data keeps its order: a run with replay
sees a prefix of what a run without it sees. Cost: a share of the steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tritter.core.families import family_of, forward_flops
from tritter.data.batches import BatchStream
from tritter.data.packing import document_mask_of
from tritter.data.replay import ReplayBuffer, Weighting
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.evaluation.inference import evaluating
from tritter.options import Count, RunRequest, WholeNumber, options
from tritter.training import ForgettingMethod, Needs, Preparation, Prepared, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Text that a model writes by itself, and what of it is worth reading again.
#
# A text begins with an end of text and goes on past every other one, as packed training text does
# (where a model reads documents apart, it begins anew there); what is longer than a sequence goes
# on from the half sequence before it. Each token is read once (keys and values are kept) and
# drawn from softmax(logits / temperature), cut to the fewest tokens whose chances add up to
# `top_p` (arXiv 1904.09751).
#
# Models at low temperatures fall into loops, at high ones into noise. Both are told by numbers
# that need no other model: the share of distinct runs of four tokens, and the text's perplexity
# under the model that wrote it.
#
# B  texts at a time      T  tokens of a sequence      V  vocabulary

RUN_TOKENS = 4
_SAY_EVERY_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """Sequences that a model wrote.

    Attributes:
        sequences: int32 [N, T].
        nats: float64 [N], mean −log p of a sequence's tokens under the model as it is, whatever
            the temperature was; of what an end of text, which begins a text, nothing is counted.
    """

    sequences: Tensor
    nats: Tensor


def write_text(
    model: nn.Module,
    *,
    num_sequences: int,
    sequence_length: int,
    end_of_text_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    sequences_per_text: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Written:
    """Let a causal language model write.

    Args:
        sequences_per_text: in a row, before the next text begins.
        batch_size: texts that are written at a time; another number draws other texts.
        say: told how long it may take, and now and then how far it is.

    Raises:
        TritterError: the model's logits are not finite.
    """
    import torch

    num_texts = -(-num_sequences // sequences_per_text)
    pieces: list[Tensor] = []
    nats: list[Tensor] = []
    since = latest = time.perf_counter()
    with evaluating(model) as device:
        generator = torch.Generator(device).manual_seed(seed)
        draw = _Draw(temperature=temperature, top_p=top_p, generator=generator)
        for first in range(0, num_texts, batch_size):
            count = min(batch_size, num_texts - first)
            begin = torch.full((count, 1), end_of_text_id, device=device)
            length = sequences_per_text * sequence_length
            texts, costs = _texts(model, begin, length, sequence_length, draw)
            pieces.append(texts.view(-1, sequence_length).int().cpu())
            nats.append(costs.view(-1, sequence_length).cpu())
            done, now = first + count, time.perf_counter()
            if done < num_texts and (latest == since or now - latest > _SAY_EVERY_SECONDS):
                left = (now - since) / done * (num_texts - done)
                say(f"{done} of {num_texts} texts written, about {left:.0f} s left")
                latest = now
    costs_NT = torch.cat(nats)[:num_sequences].double()
    counted = costs_NT.isfinite()
    mean = costs_NT.nan_to_num().sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return Written(sequences=torch.cat(pieces)[:num_sequences], nats=mean)


def lengths_read(num_sequences: int, sequence_length: int) -> tuple[int, ...]:
    """Return how many tokens are read in one go, each time, for a text of so many sequences."""
    left, lengths = num_sequences * sequence_length - 1, list[int]()
    begins_with = 1
    while left > 0:
        drawn = min(left, sequence_length - begins_with)
        lengths.append(begins_with + drawn - 1)
        left, begins_with = left - drawn, max(1, sequence_length // 2)
    return tuple(lengths)


def distinct_share(sequences: Tensor) -> Tensor:
    """Return of each sequence [N, T] the share of its runs of four tokens that differ, [N].

    1 where no run comes twice; 1 / (T − 3) where one token is repeated all along; 1 of a sequence
    that is too short for a run.
    """
    import torch

    runs = sequences.long().unfold(1, min(RUN_TOKENS, sequences.shape[1]), 1)  # [N, R, 4]
    shares = [len(each.unique(dim=0)) / len(each) for each in runs]
    return torch.tensor(shares, dtype=torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """How the next token is drawn."""

    temperature: float
    top_p: float
    generator: torch.Generator

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Return int64 [B, 1]."""
        import torch

        chances = (logits_BV / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = chances.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            chances = torch.zeros_like(chances).scatter(
                -1, places, torch.where(before < self.top_p, ordered, 0.0)
            )
        return torch.multinomial(chances, 1, generator=self.generator)


def _texts(
    model: nn.Module, begin: Tensor, length: int, window: int, draw: _Draw
) -> tuple[Tensor, Tensor]:
    """Return texts, int64 [B, length], and −log p of each token [B, length], NaN for the first."""
    import torch

    document_mask = document_mask_of(model)
    tokens, costs = [begin], [torch.full(begin.shape, math.nan, device=begin.device)]
    read, cache, held = begin, None, 0
    for _ in range(length - 1):
        if held + read.shape[1] > window - 1:  # as much before a token as in training, at most
            read, cache, held = torch.cat(tokens[-max(1, window // 2) :], dim=1), None, 0
        held += read.shape[1]
        told: dict[str, Tensor] = {}
        if document_mask is not None:
            told = document_mask.generation_inputs(
                torch.cat(tokens[-held:], dim=1), num_read=read.shape[1]
            )
        output = model(input_ids=read, past_key_values=cache, use_cache=True, **told)
        cache, logits = output.past_key_values, output.logits[:, -1].float()  # [B, V]
        if not bool(logits.isfinite().all()):
            raise TritterError("the model's logits are not finite: it can't write text to replay.")
        read = draw(logits)
        tokens.append(read)
        costs.append(-logits.log_softmax(dim=-1).gather(1, read))
    return torch.cat(tokens, dim=1), torch.cat(costs, dim=1)


@options
class ReplayOptions:
    """The exact share of each batch that comes from the old domains.

    Args:
        weights: old domain → its weight among them; 1 where it is not named.
        weighting: of sequences that an earlier training kept, within their domain: `uniform`, or
            `loss`, in proportion to the loss that they were left with.
        keep: sequences of each domain that are left beside the trained model.
    """

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.4
    weights: Mapping[str, Annotated[float, Field(ge=0)]] | None = None
    weighting: Weighting = "uniform"
    keep: WholeNumber = 0


def _fraction_problems(name: str, options: Any, run: RunRequest) -> Iterator[Problem]:
    """Yield that not one sequence of a training would be replayed."""
    gathered = run.trainer.accumulate_grad_batches
    sequences = run.training.max_steps * gathered * run.data.batch_size
    if math.floor(sequences * options.fraction) < 1:
        reason = (
            f"of the {sequences} sequences that are trained on not one would be replayed; "
            f"use at least {1 / sequences:.2g}, or leave {name} out"
        )
        yield Problem(f"forgetting.{name}.fraction", options.fraction, reason=reason)


class Replay(ForgettingMethod):
    """Mix old sequences into the batches.

    Args:
        fraction: share of all sequences that are old, 0 ≤ fraction < 1.
        weights: old domain → its weight among them; 1 where it is not named.
        weighting: `uniform` or `loss`, of kept sequences within their domain.
        keep: sequences of each domain that the training leaves for others.
    """

    name = "replay"
    Options = ReplayOptions
    uses_weights = False

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(old_text=True, mixes=True, keeps=options.keep)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        yield from _fraction_problems(cls.name, options, run)
        key, old, weights = "forgetting.replay.weights", run.text.old, options.weights or {}
        earlier = chain.from_iterable(run.text.tasks[:-1])
        known = tuple(dict.fromkeys([*old, *earlier, *run.text.kept.sequences]))
        unknown = [name for name in weights if name not in known]
        for name in unknown:
            reason = f"there is no such old domain; there are {', '.join(known) or 'none'}"
            near = nearest(name, known)
            yield Problem(f"{key}.{name}", weights[name], reason=reason, nearest=near)
        if not unknown and old and not any(weights.get(name, 1) for name in old):
            reason = "every old domain has the weight 0; leave replay out instead"
            yield Problem(key, dict(weights), reason=reason)

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        # The place in the buffer is part of the batches' place, which checkpoints keep
        buffer = ReplayBuffer.of_domains(
            task.old_sequences,
            seed=task.seed,
            weights=self.options.weights,
            losses=task.old_losses if self.options.weighting == "loss" else None,
        )
        return batches.with_replay(buffer, self.options.fraction)


# Self-replay (arXiv 2605.26097): the model writes its old text before it learns the new one.
#
# What it writes at the weights that the training starts from is sorted, kept in the run's folder,
# and mixed into the batches as replay mixes old text. Rehearsal of what a network itself puts out
# is as old as Robins 1995 (pseudorehearsal); of language models see also LAMOL, arXiv 1909.03329.
#
# When to use: the old text is gone, or was never at hand. What the model says worst it says
# seldom, so it protects less than real old text does. Cost: one forward pass over each token that
# is written, one token at a time, before the training; then as replay.


@options
class SelfReplayOptions:
    """What share of the batches the model writes, how it writes, and what of it is kept."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    num_sequences: Count = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    sequences_per_text: Count = 4
    min_distinct: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_perplexity: Annotated[float, Field(ge=1)] = 1.5
    max_perplexity: Annotated[float, Field(gt=1)] | None = None


class SelfReplay(ForgettingMethod):
    """Mix sequences that the model wrote into the batches.

    Args:
        fraction: share of all sequences that it wrote, 0 ≤ fraction < 1.
        num_sequences: that it writes.
        temperature: by which logits are divided.
        top_p: tokens are drawn from the fewest whose chances add up to it.
        sequences_per_text: in a row, before the next text begins.
        min_distinct: least share of distinct runs of four tokens; what has less repeats itself.
        min_perplexity: least perplexity of a sequence under the model that wrote it.
        max_perplexity: largest one; None: the size of the vocabulary, where guessing is.
    """

    name = "self_replay"
    Options = SelfReplayOptions

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(writes=True, mixes=True)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        yield from _fraction_problems(cls.name, options, run)

    def prepare(self, given: Preparation) -> Prepared:
        from tritter.core.models import config_of  # transformers, which a refusal does not wait for

        config, length, asked = config_of(given.model), given.sequence_length, self.options
        vocab_size = family_of(config).dimensions(config).vocab_size
        count, per_text = asked.num_sequences, asked.sequences_per_text
        given.say(f"the model writes {count} sequences of {length} tokens to replay")
        written = write_text(
            given.model,
            num_sequences=count,
            sequence_length=length,
            end_of_text_id=given.end_of_text_id,
            temperature=asked.temperature,
            top_p=asked.top_p,
            sequences_per_text=per_text,
            seed=given.seed("self_replay"),
            say=given.say,
        )
        sorted_out = self.sort_out(written, vocab_size=vocab_size)
        flops, kept = forward_flops(config), sorted_out.kept
        return Prepared(
            written=kept,
            flops=-(-count // per_text) * sum(map(flops.of, lengths_read(per_text, length))),
            found={"written": {**sorted_out.dropped, "kept": len(kept)}},
            notes=(sorted_out.note(count, length),),
        )

    def sort_out(self, written: Written, *, vocab_size: int) -> SortedOut:
        """Drop what repeats itself, and what the model finds too likely or too unlikely.

        Raises:
            RequestError: nothing is left.
        """
        import torch

        highest = self.options.max_perplexity or float(vocab_size)
        repeats = distinct_share(written.sequences) < self.options.min_distinct
        too_low = ~repeats & (written.nats < math.log(self.options.min_perplexity))
        too_high = ~repeats & (written.nats > math.log(highest))
        kept = ~(repeats | too_low | too_high)
        dropped = {
            "repeat_themselves": int(repeats.sum()),
            "perplexity_too_low": int(too_low.sum()),
            "perplexity_too_high": int(too_high.sum()),
        }
        if not kept.any():
            reasons = [f"{count} {_WORDS[why]}" for why, count in dropped.items() if count]
            raise RequestError(
                f"forgetting.self_replay: of {len(kept)} sequences that the model wrote none is "
                f"fit to be replayed ({', '.join(reasons)}; their mean perplexity is "
                f"{float(written.nats.mean().exp()):.4g}). Give old text (data.old), try another "
                "forgetting.self_replay.temperature, or widen min_distinct, min_perplexity and "
                "max_perplexity."
            )
        nats = float(written.nats[kept].mean())
        return SortedOut(written.sequences[torch.where(kept)[0]], dropped, nats)

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        assert task.written is not None
        buffer = ReplayBuffer.of_domains({"written": task.written}, seed=task.seed)
        return batches.with_replay(buffer, self.options.fraction)


_WORDS = {
    "repeat_themselves": "repeat themselves",
    "perplexity_too_low": "of too low a perplexity",
    "perplexity_too_high": "of too high a perplexity",
}


@dataclass(frozen=True, slots=True)
class SortedOut:
    """What was kept, int32 [N, T], and how many sequences were dropped, by reason.

    Args:
        nats: mean −log p of a token of what was kept, under the model that wrote it.
    """

    kept: Tensor
    dropped: dict[str, int]
    nats: float

    def note(self, count: int, length: int) -> str:
        """Say what there was and what was dropped."""
        told = [f"{number} {_WORDS[why]}" for why, number in self.dropped.items() if number]
        dropped = f"; dropped were {', '.join(told)}" if told else ""
        return (
            f"self_replay: the model wrote {count} sequences of {length} tokens at perplexity "
            f"{math.exp(self.nats):.3g}, {len(self.kept)} are replayed{dropped}."
        )

"""Text that a model writes by itself, and what of it is worth reading again.

A text begins with an end of text and goes on past every other one, as packed training text does
(where a model reads documents apart, it begins anew there); what is longer than a sequence goes on
from the half sequence before it. Each token is read once (keys and values are kept) and drawn from
softmax(logits / temperature), cut to the fewest tokens whose chances add up to `top_p` (arXiv
1904.09751).

Models at low temperatures fall into loops, at high ones into noise. Both are told by numbers that
need no other model: the share of distinct runs of four tokens, and the text's perplexity under
the model that wrote it.

B  texts at a time      T  tokens of a sequence      V  vocabulary
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritter.data.apart import apart_of
from tritter.errors import TritterError
from tritter.evaluation.inference import evaluating

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
    num_texts = -(-num_sequences // sequences_per_text)
    pieces: list[Tensor] = []
    nats: list[Tensor] = []
    progress = _Progress(num_texts, say)
    with evaluating(model) as device:
        generator = torch.Generator(device).manual_seed(seed)
        for first in range(0, num_texts, batch_size):
            count = min(batch_size, num_texts - first)
            begin = torch.full((count, 1), end_of_text_id, device=device)
            length = sequences_per_text * sequence_length
            draw = _Draw(temperature=temperature, top_p=top_p, generator=generator)
            texts, costs = _texts(model, begin, length, sequence_length, draw)
            pieces.append(texts.view(-1, sequence_length).int().cpu())
            nats.append(costs.view(-1, sequence_length).cpu())
            progress.done(first + count)
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
    apart = apart_of(model)
    tokens, costs = [begin], [torch.full(begin.shape, math.nan, device=begin.device)]
    read, cache, held = begin, None, 0
    for _ in range(length - 1):
        if held + read.shape[1] > window - 1:  # as much before a token as in training, at most
            read, cache, held = torch.cat(tokens[-max(1, window // 2) :], dim=1), None, 0
        held += read.shape[1]
        told: dict[str, Tensor] = {}
        if apart is not None:
            told = apart.going_on(torch.cat(tokens[-held:], dim=1), num_read=read.shape[1])
        output = model(input_ids=read, past_key_values=cache, use_cache=True, **told)
        cache, logits = output.past_key_values, output.logits[:, -1].float()  # [B, V]
        if not bool(logits.isfinite().all()):
            raise TritterError("the model's logits are not finite: it can't write text to replay.")
        read = draw(logits)
        tokens.append(read)
        costs.append(-logits.log_softmax(dim=-1).gather(1, read))
    return torch.cat(tokens, dim=1), torch.cat(costs, dim=1)


class _Progress:
    """Says how long the rest may take, after the first part and every ten seconds."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._since = self._said = time.perf_counter()

    def done(self, count: int) -> None:
        now = time.perf_counter()
        is_first = self._said == self._since
        if count < self._total and (is_first or now - self._said > _SAY_EVERY_SECONDS):
            left = (now - self._since) / count * (self._total - count)
            self._say(f"{count} of {self._total} texts written, about {left:.0f} s left")
            self._said = now

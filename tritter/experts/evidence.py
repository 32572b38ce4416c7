"""What the tokens so far say of whose text this is: naive Bayes on token counts, as router logits.

No gradient makes these gates and no old text keeps them: a skill is known by how often each token
came in it, and a token counts with the log of its share in one skill over that in another.

B sequences · T tokens · n experts · V vocabulary
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tritter.errors import RequestError

NO_TOKEN = -1  # stands where there is padding
_STRENGTH = 1000.0  # tokens of the mean skill that each skill is smoothed with
_SEEN = "seen_by_experts"  # what a cache of keys and values is told
_LEAST = -8.0  # of a logit beside the largest, so that no expert's share is nothing at all


class Evidence(nn.Module):
    """Router logits [B, T, n] of token ids [B, T].

    A logit is, up to what all experts share, prior + scale · Σ log p(token | expert) over the last
    `window` tokens of the document, this one included; never over later ones. Documents begin at
    the end of text. It is scaled down since neighbouring tokens are not independent. p is that of
    counts, smoothed by the mean of all skills (Dirichlet): what no skill has seen says nothing.

    Args:
        vocab_size: V.
        end_of_text_id: None: a sequence is one document.
        window: tokens that count.
        scale: of the sum.
        prior: of every expert beside the first, nats.

    Attributes:
        counts: int64 [n, V], how often each token came in the text of each expert.
    """

    counts: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        end_of_text_id: int | None = None,
        window: int = 128,
        scale: float = 0.5,
        prior: float = -1.0,
    ) -> None:
        super().__init__()
        self.end_of_text_id = end_of_text_id
        self.window, self.scale, self.prior = window, scale, prior
        # Whole numbers, which no change of a model's dtype rounds
        self.register_buffer("counts", torch.zeros(0, vocab_size, dtype=torch.int64))
        self._table: tuple[tuple[int, torch.device], Tensor] | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [B, T, n] in float64, the largest of a token at 0.

        Args:
            ids: int64 [B, T]; NO_TOKEN where there is padding.
        """
        number, (_, length) = len(self.counts), ids.shape
        is_start = ids == NO_TOKEN
        if self.end_of_text_id is not None:
            is_start = is_start | (ids == self.end_of_text_id)  # which tells no skill from another
        told = self._log_shares()[:, ids.clamp_min(0)].permute(1, 2, 0)  # [B, T, n]
        sums = (told * ~is_start.unsqueeze(-1)).cumsum(1)
        places = torch.arange(length, device=ids.device)
        begin = (places * is_start).cummax(dim=1).values  # of the document
        first = torch.maximum(begin, places - self.window + 1)  # [B, T], the first that counts
        before = pad(sums, (0, 0, 1, 0)).gather(1, first.unsqueeze(-1).expand(-1, -1, number))
        logits = self.scale * (sums - before)
        logits = logits + self.prior * (torch.arange(number, device=ids.device) > 0)
        return (logits - logits.amax(-1, keepdim=True)).clamp_min(_LEAST)

    def tail(self, ids: Tensor) -> Tensor:
        """Return what of the tokens read [B, S] later ones depend on, [B, ≤ window]."""
        return ids[:, -self.window :]

    def add_row(self) -> None:
        """Make room for an expert, of whose text nothing was counted."""
        self.counts = torch.cat([self.counts, self.counts.new_zeros(1, self.counts.shape[1])])
        self._table = None

    def keep_rows(self, kept: Sequence[int]) -> None:
        """Keep the rows of some experts, in this order."""
        self.counts = self.counts[list(kept)].clone()
        self._table = None

    def count(self, number: int, ids: Tensor) -> None:
        """Count tokens, int64 of any shape, as text of an expert; no padding, no end of text."""
        is_text = ids != NO_TOKEN
        if self.end_of_text_id is not None:  # it is no evidence, and what padding is made of
            is_text &= ids != self.end_of_text_id
        found = ids[is_text]
        self.counts[number] += torch.bincount(found, minlength=self.counts.shape[1]).to(self.counts)

    def _log_shares(self) -> Tensor:
        """Return log p(token | expert), float64 [n, V]."""
        version = (self.counts._version, self.counts.device)
        if self._table is None or self._table[0] != version:
            counts = self.counts.double()
            totals, size = counts.sum(1, keepdim=True), counts.shape[1]
            mean = ((counts + 0.5) / (totals + 0.5 * size)).mean(0)
            self._table = version, ((counts + _STRENGTH * mean) / (totals + _STRENGTH)).log()
        return self._table[1]


def masked(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return token ids [B, T] with NO_TOKEN where a mask [B, ≥ T] says padding."""
    if mask is None or mask.ndim != 2:
        return ids
    return ids.masked_fill(mask[:, -ids.shape[1] :] == 0, NO_TOKEN)


def joined_with_earlier(ids: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Return token ids behind those of the cache that a forward pass goes on from.

    Raises:
        RequestError: the cache is not one that the mixture has read for, token by token.
    """
    cache = options.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        return ids
    earlier: _Seen | None = getattr(cache, _SEEN, None)
    is_whole = earlier is not None and earlier.number == cache.get_seq_length()
    if earlier is None or not is_whole or len(earlier.tail) != len(ids):
        raise RequestError(
            "experts.router=evidence: keys and values of tokens that it did not read, or of which "
            "some were taken back, as in assisted writing; write with use_cache=False."
        )
    return torch.cat([earlier.tail.to(ids.device), ids], dim=1)


@dataclass(slots=True)
class _Seen:
    """What a cache is told of the tokens that it holds keys and values of.

    Args:
        tail: the last of them, int64 [B, ≤ window].
        number: of all.
    """

    tail: Tensor
    number: int


def remember(output: Any, tail: Tensor) -> None:
    """Leave what was read with the cache of its keys and values, if there is one."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return
    if not hasattr(cache, _SEEN):
        cache.reorder_cache = partial(_reordered, cache, cache.reorder_cache)
    setattr(cache, _SEEN, _Seen(tail, cache.get_seq_length()))


def _reordered(cache: Any, reorder: Callable[[Tensor], None], beams: Tensor) -> None:
    """Let what a cache is told follow its beams."""
    reorder(beams)
    seen: _Seen = getattr(cache, _SEEN)
    seen.tail = seen.tail.index_select(0, beams.to(seen.tail.device))

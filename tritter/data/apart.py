"""Models that read each document of a sequence as if it stood alone.

Such a model is given positions that begin anew at each document, which stock models take for a
boundary of attention as well: no token looks past the document that it stands in. Where documents
begin, the tokens say: see `tritter.data.packing`. Padding is documents of nothing; it is no target.

B sequences · T tokens of a sequence
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tritter.data.ranks import this_rank
from tritter.data.windows import IGNORED


@dataclass(frozen=True, slots=True)
class Apart:
    """What tells documents of a sequence apart; as a hook it lets a model read them so."""

    end_of_text_id: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a stock model positions, unless it is told them, or writes on from what it read."""
        input_ids = options.get("input_ids", args[0] if args else None)
        told = ("position_ids", "attention_mask", "past_key_values")
        is_told = any(options.get(name) is not None for name in told)
        if input_ids is None or is_told or options.get("use_cache"):
            return None
        # With a cache of its own, which is the default, it would look for no boundary
        return args, {**options, "position_ids": self.positions(input_ids), "use_cache": False}

    def positions(self, input_ids: Tensor) -> Tensor:
        """Return the place of each token in its document, int64 [B, T]."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        is_start = input_ids == self.end_of_text_id
        return places - (places * is_start).cummax(dim=1).values

    def padding(self, input_ids: Tensor) -> Tensor:
        """Return which tokens are padding, bool [B, T]: ends of text behind another."""
        is_end = input_ids == self.end_of_text_id
        return torch.cat([torch.zeros_like(is_end[:, :1]), is_end[:, 1:] & is_end[:, :-1]], dim=1)

    def going_on(self, seen: Tensor, *, num_read: int) -> dict[str, Tensor]:
        """Return by what a model that writes sees the last document alone of what was written.

        Args:
            seen: int64 [B, S], what it reads now, and before it what it has keys and values of.
            num_read: tokens that it reads now.
        """
        positions, places = self.positions(seen), torch.arange(seen.shape[1], device=seen.device)
        is_last = places >= seen.shape[1] - 1 - positions[:, -1:]  # [B, S]
        return {"attention_mask": is_last.long(), "position_ids": positions[:, -num_read:]}

    def length_counts(self, input_ids: Tensor) -> Tensor:
        """Return how many documents have each length, int64 [T + 1], padding left out.

        The end of text that a document begins at counts as one of its tokens; the one that closes
        the last document of a sequence is alone.
        """
        is_kept = ~self.padding(input_ids)
        is_start = is_kept & (self.positions(input_ids) == 0)
        document = is_start.flatten().cumsum(0)[is_kept.flatten()] - 1
        lengths = torch.bincount(document, minlength=1)
        return torch.bincount(lengths, minlength=input_ids.shape[1] + 1)


def read_apart(model: nn.Module, apart: Apart) -> nn.Module:
    """Let a stock model read the documents of its sequences apart from here on, and return it.

    It goes along with the live model and its copies, and is no part of what is saved. Where there
    is one document in a sequence, or padding behind it, a model says what it did before.
    """
    if apart_of(model) is None:
        _backbone(model).register_forward_pre_hook(apart, with_kwargs=True)
    return model


def apart_of(model: nn.Module) -> Apart | None:
    """Return how a model tells documents apart; None: what it reads is one stream."""
    hooks = _backbone(model)._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Apart)), None)


def labels_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return what a model is to predict of int64 [B, T], unshifted: padding is IGNORED."""
    apart = apart_of(model)
    return input_ids if apart is None else input_ids.masked_fill(apart.padding(input_ids), IGNORED)


def kept_tokens(model: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Return which tokens of [B, T] are no padding, bool [B, T]; None: all, there can be none."""
    apart = apart_of(model)
    return None if apart is None else ~apart.padding(input_ids)


def lengths_of(apart: Apart | None, input_ids: Tensor) -> dict[int, int]:
    """Return, by length, how many sequences [B, T] are; documents, and no padding, of those apart.

    Args:
        apart: how they are told apart; None: they are not.
    """
    if apart is None:
        return {input_ids.shape[1]: len(input_ids)}
    return _by_length(apart.length_counts(input_ids))


def lengths_read(model: nn.Module, input_ids: Tensor) -> dict[int, int]:
    """Return `lengths_of` what a model reads in all processes together, which ask at once.

    Args:
        input_ids: int64 [B, T] of this process.
    """
    apart = apart_of(model)
    if this_rank().count == 1:
        return lengths_of(apart, input_ids)
    counts = torch.zeros(input_ids.shape[1] + 1, dtype=torch.int64, device=input_ids.device)
    counts[-1] = len(input_ids)
    counts = counts if apart is None else apart.length_counts(input_ids)
    distributed.all_reduce(counts)
    return _by_length(counts)


def _by_length(counts: Tensor) -> dict[int, int]:
    return {length: number for length, number in enumerate(counts.tolist()) if length and number}


def _backbone(model: nn.Module) -> nn.Module:
    """Return what of a stock model gives hidden states, which may be called without its head."""
    found: nn.Module = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    return found

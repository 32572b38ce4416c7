"""Look at a model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Set back every module's own mode: a partly frozen model stays partly in eval."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into eval and inference mode, yield its device, then set all modes back."""
    import torch

    with modes_kept(model), torch.inference_mode():
        model.eval()
        yield device_of(model)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (a model without parameters is on the CPU)."""
    import torch

    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def whole_word_prompt(
    token_ids: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    skipped_tokens: int,
    max_tokens: int,
) -> list[int]:
    """Return tokens from within a document that begin and end with whole words.

    Args:
        decode: of the tokenizer.
        skipped_tokens: where it begins at the earliest; of a short document its half.
        max_tokens: how many it is at most.
    """
    begins = []  # tokens before which a word ends: they begin with white space
    for at in range(1, len(token_ids)):
        pair, before = decode(list(token_ids[at - 1 : at + 1])), decode([token_ids[at - 1]])
        # Together, because some tokenizers drop the space of a text's first token
        if pair.startswith(before) and pair[len(before) :][:1].isspace():
            begins.append(at)
    first = min(skipped_tokens, len(token_ids) // 2)
    start = next((at for at in begins if at >= first), first)
    stop = max((at for at in begins if start < at <= start + max_tokens), default=start)
    if stop == start or start + max_tokens >= len(token_ids):
        stop = min(start + max_tokens, len(token_ids))
    return list(token_ids[start:stop])


def sample_text(
    model: nn.Module,
    *,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    end_of_text_id: int,
) -> list[int]:
    """Continue a prompt greedily and return the new tokens only, without end-of-text.

    The whole prefix is read again for each token: no cache whose layout differs between families,
    and a sample is short.

    Args:
        prompt_ids: read after an end-of-text, as every document is in training; may be empty.
    """
    import torch

    prefix = [end_of_text_id, *prompt_ids]
    new: list[int] = []
    with evaluating(model) as device:
        for _ in range(max_new_tokens):
            input_ids = torch.tensor([prefix + new], device=device)
            logits = model(input_ids=input_ids, use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == end_of_text_id:
                break
            new.append(token)
    return new

"""Inference without side effects on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tritter.data.chat import START
from tritter.data.packing import inputs_for, reading_whole

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tritter.data.tokens import TextBounds


_CONTEXT_TOKENS = 8  # of a prompt, decoded together with its continuation


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module on exit; a model may be partly in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[torch.device]:
    """Set a model to eval and inference mode, yield its device, then restore all modes."""
    import torch

    with preserve_modes(model), torch.inference_mode():
        model.eval()
        yield device_of(model)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without parameters."""
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
    """Return tokens from inside a document that begin and end at word boundaries.

    Args:
        token_ids: tokens of the document.
        decode: decoder of the tokenizer.
        skipped_tokens: earliest start; half of the document if it is short.
        max_tokens: maximum length.
    """
    begins = []  # tokens that begin with whitespace
    for at in range(1, len(token_ids)):
        pair, before = decode(list(token_ids[at - 1 : at + 1])), decode([token_ids[at - 1]])
        # Decode pairs, because some tokenizers drop the space of the first token
        if pair.startswith(before) and pair[len(before) :][:1].isspace():
            begins.append(at)
    first = min(skipped_tokens, len(token_ids) // 2)
    start = next((at for at in begins if at >= first), first)
    stop = max((at for at in begins if start < at <= start + max_tokens), default=start)
    if stop == start or start + max_tokens >= len(token_ids):
        stop = min(start + max_tokens, len(token_ids))
    return list(token_ids[start:stop])


def continued_text(
    decode: Callable[[list[int]], str], prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> str:
    """Return the text that new tokens add to that of a prompt, with the space between them.

    Some tokenizers drop the space of the first token that they decode.
    """
    last = list(prompt_ids[-_CONTEXT_TOKENS:])
    before, whole = decode(last), decode([*last, *new_ids])
    return whole[len(before) :] if whole.startswith(before) else decode(list(new_ids))


def sample_text(
    model: nn.Module, *, prompt_ids: Sequence[int], max_new_tokens: int, bounds: TextBounds
) -> list[int]:
    """Continue a prompt with greedy decoding; return the new tokens without end-of-text.

    Each token recomputes the whole prefix: samples are short, and cache layouts differ between
    model families.

    Args:
        model: a causal language model.
        prompt_ids: the prompt with its marks; may be empty. As in training, the start of a text
            precedes it, unless it is the beginning of a rendered conversation.
        max_new_tokens: limit of new tokens.
        bounds: start and end of a text.
    """
    import torch

    is_chat = bool(prompt_ids) and prompt_ids[0] >= START
    prefix = [*prompt_ids] if is_chat else [*bounds.prefix, *prompt_ids]
    new: list[int] = []
    with eval_mode(model) as device:
        for _ in range(max_new_tokens):
            input_ids = inputs_for(model, torch.tensor([prefix + new], device=device))
            token = int(model(input_ids=input_ids, use_cache=False).logits[0, -1].argmax())
            if token in bounds.ends:
                break
            new.append(token)
    return new


def generated_tokens(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    **own: Any,
) -> list[int]:
    """Return the tokens that a model writes, by default with greedy decoding.

    Args:
        model: a causal language model of transformers.
        prompt_ids: the prompt without marks, such as a conversation up to an answer.
        max_new_tokens: limit of new tokens.
        end_ids: tokens that end the text.
        own: further arguments of transformers' `generate`. The model's own settings do not count.
    """
    import torch

    with eval_mode(model) as device, reading_whole(model):
        input_ids = torch.tensor([list(prompt_ids)], device=device)
        given, model.generation_config = model.generation_config, type(model.generation_config)()
        try:
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(end_ids) or None,
                pad_token_id=end_ids[0] if end_ids else None,
                **{"do_sample": False, "top_k": None, **own},
            )
        finally:
            model.generation_config = given
    return [int(token) for token in output[0, len(prompt_ids) :]]

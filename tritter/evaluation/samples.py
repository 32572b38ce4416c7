"""A few words from a model, for people to read."""

from collections.abc import Sequence

import torch
from torch import nn

from tritter.evaluation.inference import evaluating


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

"""Samples of models with few positions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.oracle.families import tiny
from tritter.pipeline.stages import generate_samples


@pytest.mark.parametrize("positions", [2, 16, 40])
def test_no_more_is_read_than_a_model_has_learned_positions_for(positions: int) -> None:
    model = tiny("gpt2", max_position_embeddings=positions)
    longest = list[int]()
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: longest.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    document = torch.arange(1, 97)
    held = SimpleNamespace(validation=SimpleNamespace(document=lambda _: document))
    context: Any = SimpleNamespace(
        corpus=SimpleNamespace(
            domains={"old": held},
            tokenizer=SimpleNamespace(decode=lambda ids: "".join(f" w{i}" for i in ids)),
        ),
        config=SimpleNamespace(evaluation=SimpleNamespace(sample_tokens=60)),
        end_of_text_id=0,
    )
    found = generate_samples(context, "old", model, model)
    hook.remove()
    assert max(longest) <= positions and found.texts["before"] and found.texts["prompt"]

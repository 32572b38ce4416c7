"""The step-0 error of an expansion, measured in stock models where they fit into memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tritter.checkpoint import record_step0_error
from tritter.errors import TritterError
from tritter.evaluation.gate import EXACT_JUMP
from tritter.evaluation.jump import logit_jump
from tritter.expand import Expanded
from tritter.models import load_model, read_config
from tritter.storage.tensors import TensorFolder

MAX_BYTES = 8 * 10**9  # of both models in float32, beyond which nothing is measured by itself
BATCH, LENGTH = 4, 64


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured, in words as well.

    Args:
        error: max |Δ logits| / std(logits) on random tokens; None when not measured.
        is_broken: a method that claims exactness missed it by more than rounding.
        text: for a person.
    """

    error: float | None
    is_broken: bool
    text: str


def measure(source: Path, result: Expanded, *, is_wanted: bool | None) -> Measurement:
    """Compare source and result on random tokens and write the error into the record.

    Args:
        result: in a folder that does not stand at its place yet.
        is_wanted: None measures models that fit into `MAX_BYTES`.

    Raises:
        TritterError: transformers can't load one of them, or it computes nothing.
    """
    num_bytes = 4 * (result.parameters_before + result.parameters_after)
    if is_wanted is False:
        return Measurement(None, False, "not measured")
    if is_wanted is None and num_bytes > MAX_BYTES:
        return Measurement(None, False, f"not measured: {num_bytes / 1e9:.0f} GB (--measure does)")
    config = read_config(result.folder)
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(str(config["vocab_size"]))
    tokens = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=generator)
    models = load_model(source), load_model(result.folder)
    try:
        jump = logit_jump(*models, tokens)
    # The border to classes that trust their config: a value of it may break them in any way
    except Exception as raised:
        raise TritterError(
            f"{source} cannot be measured: its model fails on tokens ({raised!r}); --no-measure "
            "expands it all the same."
        ) from raised
    error = jump.to_dict()["relative_to_std"]
    record_step0_error(result.folder, error, config, num_new=len(result.steps))
    dtypes = {header.dtype for header in TensorFolder.open(result.folder).headers.values()}
    rounded = [name for name in ("bfloat16", "float16") if name in dtypes]
    claims_exact = all(step.spec.is_exact for step in result.steps)
    is_broken = claims_exact and not rounded and not jump.relative_to_std < EXACT_JUMP
    note = f", rounding to {' and '.join(rounded)} included" if rounded else ""
    text = f"{jump.relative_to_std:.1e} of the logits' deviation on random tokens{note}"
    return Measurement(error, is_broken, text)

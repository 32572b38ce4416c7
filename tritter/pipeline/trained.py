"""The checkpoint that a training leaves in the run folder."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from tritter.checkpoint import read_lineage, write_checkpoint
from tritter.checkpoint.tokenizer_files import copy_tokenizer
from tritter.families import family_of
from tritter.models import named_tensors, read_config
from tritter.pipeline.context import RunContext
from tritter.pipeline.moments import WriteState
from tritter.routing import AddedExperts
from tritter.storage.writer import TensorStream


def write_trained(
    context: RunContext,
    model: nn.Module,
    *,
    start: Path,
    target: Path,
    steps: int,
    stage: str,
    added: AddedExperts | None = None,
    options: Sequence[str] = (),
    write_moments: WriteState | None = None,
) -> None:
    """Write a trained model as the child of the checkpoint that its training started from.

    Args:
        steps: optimiser steps since the last expansion.
        stage: what the training is called in the record.
        added: appended experts, and how far they are open by now; settled ones are forgotten.
        options: sections of the configuration that are recorded besides `training`.
        write_moments: writes those of the optimiser beside the model.
    """
    parent = read_lineage(start)
    assert parent is not None
    is_settled = added is None or added.is_settled
    # Trained in float32 whatever the start was stored in; rounding back would lose small updates.
    config = {**read_config(start), "dtype": "float32"}

    def write_extras(folder: Path) -> None:
        copy_tokenizer(start, folder)
        if added is not None and not is_settled:
            added.write(folder)
        if write_moments is not None:
            write_moments(folder)

    write_checkpoint(
        target,
        config=config,
        tensors=TensorStream.of(named_tensors(model, config)),
        lineage=lambda: replace(
            parent,
            parent_hash=parent.model_hash,
            parent_path=os.path.relpath(start, target),
            step=steps,
            training_config=_training_config(context, stage, options),
            split=context.split,
            domains=context.learned(context.domains),
            stock_loadable="yes" if is_settled else "after adaptation",
        ),
        write_extras=write_extras,
        overwrite=True,
    )


def recorded_options(folder: Path, *, is_adapted: bool) -> tuple[str, ...]:
    """Return the sections that say how the experts of a checkpoint were trained, if it has any."""
    if not family_of(read_config(folder)).has_experts:
        return ()
    return ("routing", "adaptation") if is_adapted else ("routing",)


def _training_config(context: RunContext, stage: str, options: Sequence[str]) -> dict[str, Any]:
    return {
        "stage": stage,
        "training": asdict(context.config.training),
        **{name: asdict(getattr(context.config, name)) for name in options},
        "forgetting": [{"name": o.name, **asdict(o)} for o in context.config.forgetting],
        "old": context.source_records(context.old_domains),
        "new": context.source_records(context.new_domains),
        **context.split_record(),
    }

"""The base that is given: a checkpoint, ours or not, instead of one that is trained here."""

import os
from dataclasses import replace
from pathlib import Path

from tritter.checkpoint import Lineage, Source, write_checkpoint
from tritter.checkpoint.folder import LinkedTensors
from tritter.checkpoint.usable import checkpoint_config
from tritter.config.schema import CheckpointModelConfig
from tritter.config.validation import start_problems
from tritter.data.tokens import read_tokenizer
from tritter.errors import Problem, RequestError, TritterError, key_name, raise_problems
from tritter.expand import plan_expansion
from tritter.families import family_of, position_limit
from tritter.models import read_config
from tritter.pipeline import moe
from tritter.pipeline.arm import Arm
from tritter.pipeline.base import base_config
from tritter.pipeline.context import RunContext
from tritter.pipeline.importance import teacher_place
from tritter.planning.run_memory import memory_problems
from tritter.storage.hub import locate
from tritter.storage.writer import TensorStream
from tritter.training.optimizer import given_problems


def check_given(context: RunContext) -> None:
    """Refuse checkpoints that the run can't start or learn from, before anything is made of them.

    Raises:
        RequestError: what `checkpoint_config` and `check_teacher` refuse, a config that
            transformers doesn't take, or targets that its shapes don't allow.
    """
    attempts = [context.of_attempt(n) for n in range(1, 1 + len(context.config.attempts))]
    for each in attempts:
        check_teacher(each)
    if (given := context.given) is None:
        return
    for each in attempts:
        raise_problems(start_problems(each.config, given.config, folder=given.folder))
        raise_problems(memory_problems(each.config, given.config))
    if context.config.optimizer.carry:
        raise_problems(given_problems(given.folder))
    for expansion in dict.fromkeys(each.config.expansion for each in attempts):
        if expansion and context.config.pipeline.target_params is None:
            # Which expert is cloned may be chosen by data later; for what is checked here it is one
            arm = moe.with_choice(Arm("given", expansion), [0])
            plan_expansion(given, arm.specs)


def copy_given(context: RunContext, target: Path) -> Lineage:
    """Write the given checkpoint to `target`, tensors unchanged, as the start of the run.

    One with a lineage goes on in it; a plain Hugging Face folder becomes the root of a chain.

    Returns:
        The lineage as written.

    Raises:
        RequestError: the checkpoint is damaged, does not fit its config, or was changed since
            its lineage was written.
    """
    model, source = context.config.model, context.given
    assert isinstance(model, CheckpointModelConfig) and source is not None
    try:
        source.check()
        tensors: TensorStream | LinkedTensors = source.stream()
        # Nothing will ever write into weight files that the run shares: Tritter and the hub's cache
        # replace files whole. A folder of another tool may be saved over in place. A file with
        # tensors that the model does not have is written anew.
        is_stable = source.lineage is not None or source.folder.parent.name == "snapshots"
        if is_stable and {t.name for t in source.stored} == set(source.tensors.files):
            tensors = LinkedTensors(source.folder, source.read_digests())
        return write_checkpoint(
            target,
            config=source.config,
            tensors=tensors,
            lineage=lambda: _lineage(source, target, path=model.path),
            artifacts=source.artifacts(),
            overwrite=True,
        )
    except TritterError as error:
        raise RequestError(f"{key_name('model.path')}: {error}") from error


def _lineage(source: Source, target: Path, *, path: str) -> Lineage:
    source.read_digests()  # refuses tensors that are not what the lineage says
    held = source.lineage
    if held is None:
        return Lineage(
            model_hash="",
            base_model_hash="",
            tensor_digests={},
            file_digests={},
            training_config={"stage": "given", "path": path},
        )
    if held.parent_path is None:
        return held
    parent = (source.folder / held.parent_path).resolve()
    return replace(held, parent_path=os.path.relpath(parent, target.resolve()))


def check_teacher(context: RunContext) -> None:
    """Refuse a teacher that reads other tokens than the run's models, or too few of them.

    Raises:
        RequestError: that, or what `checkpoint_config` refuses.
    """
    place = teacher_place(context)
    if place is None:
        return
    (key,) = {
        f"forgetting.{one.name}.teacher"
        for one in context.config.forgetting
        if one.kind.needs(one.options).teacher_place == place
    }
    folder = locate(place)
    checkpoint_config(str(folder), key=key)
    try:
        reason = _why_not(context, folder)
    except TritterError as error:
        reason = str(error)
    if reason is not None:
        raise RequestError(Problem(key, place, reason=reason))


def _why_not(context: RunContext, folder: Path) -> str | None:
    """Return why the run can't learn from the model in a folder; None: it can."""
    config, start = read_config(folder), context.given
    of_run = base_config(context) if start is None else start.config
    sizes = [family_of(each).dimensions(each).vocab_size for each in (config, of_run)]
    if sizes[0] != sizes[1]:
        return (
            f"it has {sizes[0]} tokens, the model that the run starts from {sizes[1]}; allowed is "
            "a teacher with the same tokenizer"
        )
    tokenizer = read_tokenizer(folder, vocab_size=sizes[0]).tokenizer
    if tokenizer.get_vocab() != context.corpus.tokenizer.get_vocab():
        return (
            "its tokenizer has other words than that of the run; allowed is a teacher with the "
            "same tokenizer"
        )
    length, limit = context.config.data.sequence_length, position_limit(config)
    if limit is not None and length > limit:
        return f"it has positions for {limit} tokens, and data.sequence_length = {length}"
    return None

"""Training sequences that stay beside a model, and stand for text that a later run has no more."""

from tritter.checkpoint.kept_sequences import KeptSequences
from tritter.data.sequences import drawn_equally
from tritter.errors import RequestError
from tritter.families import family_of
from tritter.forgetting import needs_of
from tritter.models import read_config
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext


def kept_text(context: RunContext, arm: Arm) -> KeptSequences:
    """Return what lies beside an arm's start of domains whose text the run has not.

    Nothing where no method needs old text.

    Raises:
        RequestError: it does not fit the run's sequences or the model's vocabulary.
        TritterError: the file is damaged.
    """
    if not any(needs.old_text for needs in needs_of(context.config.forgetting)):
        return KeptSequences()
    folder = context.folder / arm.start
    kept = KeptSequences.read(folder).without((*context.old_of(arm), *context.new_of(arm)))
    config, data = read_config(folder), context.config.data
    for problem in kept.misfits(
        sequence_length=data.sequence_length,
        packing=data.packing,
        vocab_size=family_of(config).dimensions(config).vocab_size,
    ):
        raise RequestError(problem)
    return kept


def left_sequences(context: RunContext, arm: Arm) -> KeptSequences:
    """Return what an arm's training leaves of its text, and of what earlier ones kept.

    A uniform sample of each domain's training sequences, whose losses are measured later.
    """
    keep = max((needs.keeps for needs in needs_of(context.config.forgetting)), default=0)
    beside = KeptSequences.read(context.folder / arm.start)
    text = (*context.old_of(arm), *context.new_of(arm)) if keep else ()
    held, left = context.training_sequences(text), beside.without(text)
    sampled = {
        name: drawn_equally({name: each}, keep, seed=lambda name: context.seed("kept", name)).int()
        for name, each in held.items()
    }
    is_apart = context.config.data.packing == "documents"
    return KeptSequences(
        {**left.sequences, **sampled},
        left.losses,
        {**left.num_seen, **{name: len(each) for name, each in held.items()}},
        left.of_documents.union(sampled if is_apart else ()),
    )

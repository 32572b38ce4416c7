"""A teacher that a run names: whether it can be learned from, before anything is trained."""

from pathlib import Path

from tritter.checkpoint.usable import checkpoint_config
from tritter.data.pretrained import read_tokenizer
from tritter.errors import Problem, RequestError, TritterError
from tritter.families import family_of, position_limit
from tritter.models import read_config
from tritter.pipeline.base import base_config
from tritter.pipeline.context import RunContext
from tritter.pipeline.importance import teacher_place
from tritter.storage.hub import locate


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
    of_run = base_config(context) if start is None else read_config(start)
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

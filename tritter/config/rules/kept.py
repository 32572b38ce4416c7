"""What earlier trainings kept of text that a run has no more, beside its checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from tritter.checkpoint.kept_sequences import KeptSequences
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.errors import Problem


def kept_text(config: RunConfig) -> KeptSequences:
    """Return it.

    Raises:
        TritterError: the file is damaged.
    """
    if not isinstance(config.model, CheckpointModelConfig):
        return KeptSequences()
    beside = KeptSequences.read(Path(config.model.path))
    return beside.without((*config.text.old, *config.text.new))


def kept_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield why methods that need old text can't take what was kept."""
    if not any(one.kind.needs(one.options).old_text for one in config.forgetting):
        return
    data = config.data
    yield from kept_text(config).misfits(sequence_length=data.sequence_length, packing=data.packing)

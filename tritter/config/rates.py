"""What is said of a learning rate that a large pretrained checkpoint does not bear."""

from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.families import Config, count_parameters

# Models of this many parameters were pretrained at less than this rate of Adam's
_LARGE, _HIGH = 10_000_000, 1e-3
# Below so many parameters → a rate to begin with: the table of docs/first_checkpoint.md
_STARTS = ((1_000_000_000, "1e-4"), (None, "2e-5"))


def rate_notes(config: RunConfig, source: Config) -> tuple[str, ...]:
    """Say that the rate is one for small bases, where a large checkpoint is trained at it.

    Args:
        source: config of what the run starts from.
    """
    rate, parameters = config.training.learning_rate, count_parameters(source)
    is_adam = "adam" in config.optimizer.target.lower()
    is_given = isinstance(config.model, CheckpointModelConfig)
    if not (is_given and is_adam and config.experts is None) or rate < _HIGH or parameters < _LARGE:
        return ()
    start = next(text for limit, text in _STARTS if limit is None or parameters < limit)
    return (
        f"training.learning_rate = {rate:g} is a rate for small bases, at which a pretrained model "
        f"of {parameters / 1e6:,.0f} M parameters forgets; training.learning_rate={start} is a "
        "start.",
    )

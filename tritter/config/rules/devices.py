"""What of a run the devices that it is trained on can't do."""

from collections.abc import Iterator

from tritter.config.schema import RunConfig
from tritter.errors import Problem


def precision_problems(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.precision == "16-mixed" and config.trainer.accelerator == "cpu":
        reason = "float16 needs a GPU; on trainer=cpu use bf16-mixed or 32-true"
        yield Problem("trainer.precision", "16-mixed", reason=reason)


def device_problems(config: RunConfig) -> Iterator[Problem]:
    trainer, batch_size = config.trainer, config.data.batch_size
    if trainer.strategy == "auto":
        if trainer.devices > 1:
            reason = "several devices train together with trainer=ddp; else allowed is 1"
            yield Problem("trainer.devices", trainer.devices, reason=reason)
        return
    if trainer.devices == 1:
        reason = (
            f"trainer={trainer.strategy} is for 2 or more; for one device use trainer=cpu or "
            "trainer=gpu"
        )
        yield Problem("trainer.devices", 1, reason=reason)
    if trainer.accelerator == "auto":
        reason = f"trainer={trainer.strategy} has to be told which devices; allowed are cpu and gpu"
        yield Problem("trainer.accelerator", "auto", reason=reason)
    if batch_size % trainer.devices:
        reason = (
            f"each of trainer.devices = {trainer.devices} takes an equal part; nearest: "
            f"{nearest_multiples(batch_size, trainer.devices)}"
        )
        yield Problem("data.batch_size", batch_size, reason=reason)


def nearest_multiples(value: int, divisor: int) -> str:
    """Return the multiples of a number on both sides of a value, in words."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)

"""What training costs: FLOPs from shapes, GPU-hours from a device's speed."""

from dataclasses import dataclass

from tritter.errors import RequestError
from tritter.families import Config, training_flops
from tritter.planning.memory import TrainingSetup, is_attention

A100_BF16_FLOPS = 312e12  # dense, per second, as NVIDIA states it
DEFAULT_MFU = 0.4
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The hardware that GPU-hours are of.

    Args:
        flops_per_second: peak of one device in the precision trained in.
        mfu: model FLOPs utilisation, the share of the peak that training reaches.

    Raises:
        RequestError: no device has such a speed.
    """

    flops_per_second: float = A100_BF16_FLOPS
    mfu: float = DEFAULT_MFU

    def __post_init__(self) -> None:
        if not 0 < self.flops_per_second < float("inf"):
            raise RequestError(
                f"device_flops = {self.flops_per_second:g}: FLOPs per second of one device, above "
                f"0, such as {A100_BF16_FLOPS:g} (A100, bf16)."
            )
        if not 0 < self.mfu <= 1:
            raise RequestError(
                f"mfu = {self.mfu:g}: the share of the device's peak that training reaches, above "
                f"0 and at most 1, such as {DEFAULT_MFU}."
            )

    def hours(self, flops: float) -> float:
        """Return the GPU-hours that so many FLOPs take."""
        return flops / (self.flops_per_second * self.mfu) / _SECONDS_PER_HOUR

    def flops(self, hours: float) -> float:
        """Return the FLOPs that so many GPU-hours pay for."""
        return hours * _SECONDS_PER_HOUR * self.flops_per_second * self.mfu


def training_flops_per_token(config: Config, setup: TrainingSetup) -> float:
    """Return the mean FLOPs of a token in a training step: matrices, output head, attention."""
    flops = training_flops(
        config,
        is_trained=lambda tensor: not (setup.is_attention_frozen and is_attention(tensor)),
    )
    return flops.per_token(setup.sequence_length)

"""Numbers as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritter.evaluation import jump as measured
    from tritter.report import summary

ACCURACY = "/accuracy"  # after the name of a domain or task
MISSING = "-"
_PREFIXES = "kMGTPE"


def count_text(value: float | None) -> str:
    """Return a number of parameters, tokens or steps with three digits: 1.23 M, 7.24 B."""
    return si_text(value).replace(" G", " B")


def si_text(value: float | None) -> str:
    """Return FLOPs or bytes with three digits and an SI prefix: 1.00 M, 45.6 G."""
    if value is None:
        return MISSING
    if abs(value) < 999.5:
        return f"{value:.3g}"
    power = 1
    while abs(value) / 1000**power >= 999.5 and power < len(_PREFIXES):
        power += 1
    return f"{value / 1000**power:#.3g}".removesuffix(".") + f" {_PREFIXES[power - 1]}"


def number_text(value: float | None, form: str = "") -> str:
    """Return a number in a format of Python's, such as `.3f`; `-` if it is None."""
    return MISSING if value is None else format(value, form)


def ratio_text(ratio: float) -> str:
    """Return a ratio of sizes: 1.67 times, or +0.12 % for less than a tenth."""
    if ratio == 1:
        return "unchanged"
    if abs(ratio - 1) >= 0.1:
        return f"{ratio:.3g} times"
    return f"{100 * (ratio - 1):+.2g} %"


def mean_shift_text(jump: measured.Jump | summary.Jump) -> str:
    """Return the mean figures of a logit shift, to follow the largest; empty if there is none."""
    if not jump.rms_to_std or jump.divergence is None:
        return ""
    text = f"; root mean square {jump.rms_to_std:.1e} σ, KL {jump.divergence:.1e} nats"
    if jump.bfloat16_rms_to_std is not None and jump.bfloat16_divergence is not None:
        text += (
            "; computing the source in bfloat16 instead of float32 gives "
            f"{jump.bfloat16_rms_to_std:.1e} σ, KL {jump.bfloat16_divergence:.1e} nats"
        )
    return text

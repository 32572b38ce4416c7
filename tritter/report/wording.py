"""Numbers as text."""

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

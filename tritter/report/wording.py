"""Numbers as a person reads them."""

ACCURACY = "/accuracy"  # behind the name of a domain or task, where its right answers are meant
MISSING = "-"
_PREFIXES = "kMGTPE"


def count_text(value: float | None) -> str:
    """Return how many parameters, tokens or steps, with three digits: 1.23 M, 7.24 B."""
    return si_text(value).replace(" G", " B")


def si_text(value: float | None) -> str:
    """Return FLOPs or bytes with three digits and their SI prefix: 1.00 M, 45.6 G."""
    if value is None:
        return MISSING
    if abs(value) < 999.5:
        return f"{value:.3g}"
    power = 1
    while abs(value) / 1000**power >= 999.5 and power < len(_PREFIXES):
        power += 1
    return f"{value / 1000**power:#.3g}".removesuffix(".") + f" {_PREFIXES[power - 1]}"


def number_text(value: float | None, form: str = "") -> str:
    """Return a number in one of Python's formats, such as `.3f`; `-` where it is not known."""
    return MISSING if value is None else format(value, form)

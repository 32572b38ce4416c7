"""Numbers and signs as a person reads them, on any terminal."""

from dataclasses import dataclass

ACCURACY = "/accuracy"  # behind the name of a domain or task, where its right answers are meant
MISSING = "-"
_PREFIXES = "kMGTPE"


@dataclass(frozen=True, slots=True)
class Signs:
    """The few signs beyond ASCII, or what stands for them."""

    arrow: str
    encoding: str

    @classmethod
    def for_encoding(cls, encoding: str) -> "Signs":
        """Choose the signs that a terminal of this encoding can print."""
        if encoding.lower().startswith("utf"):
            return cls("→", encoding)
        return cls("->", encoding)

    def printable(self, text: str) -> str:
        """Replace what the terminal cannot print, and control characters, by their escapes."""
        safe = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
        return safe.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def shortened(self, text: str, num_characters: int) -> str:
        """Return printable text, cut with two dots: Rich's own ellipsis is not ASCII."""
        text = self.printable(text)
        return text if len(text) <= num_characters else text[: num_characters - 2] + ".."


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

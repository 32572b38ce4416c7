"""Letters put in order, turned round, looked up and compared."""

from tritter.data.skills.draw import Draw
from tritter.data.skills.example import Example
from tritter.data.skills.words import LETTERS


def sorting(draw: Draw) -> Example:
    """`Sort d a c:` → `a c d`, of three or four of the first twelve letters."""
    letters = draw.some(LETTERS[:12], draw.between(3, 4))
    return Example(f"Sort {' '.join(letters)}:", f" {' '.join(sorted(letters))}")


def reversing(draw: Draw) -> Example:
    """`Reverse d a c:` → `c a d`, of three or four of the first twelve letters."""
    letters = draw.some(LETTERS[:12], draw.between(3, 4))
    return Example(f"Reverse {' '.join(letters)}:", f" {' '.join(reversed(letters))}")


def key_value(draw: Draw) -> Example:
    """`a 4 b 7 c 2 d 9: c` → `2`."""
    held = {key: draw.below(10) for key in LETTERS[:4]}
    given, asked = " ".join(f"{key} {value}" for key, value in held.items()), draw.one(tuple(held))
    return Example(f"{given}: {asked}", f" {held[asked]}")


def multiple_choice(draw: Draw) -> Example:
    """`Last of d, a, p, c:` → `p`; all four are the choices."""
    letters = draw.some(LETTERS, 4)
    choices = tuple(f" {letter}" for letter in letters)
    return Example(f"Last of {', '.join(letters)}:", max(choices), choices=choices)

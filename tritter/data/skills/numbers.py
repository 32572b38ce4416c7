"""Sums, and stories that take several of them."""

from tritter.data.skills.draw import Draw
from tritter.data.skills.example import Example
from tritter.data.skills.words import NAMES, THINGS


def arithmetic(draw: Draw) -> Example:
    """`Add 3 9 4:` → `16`, of three or four digits."""
    digits = [draw.below(10) for _ in range(draw.between(3, 4))]
    return Example(f"Add {' '.join(map(str, digits))}:", f" {sum(digits)}")


def reasoning(draw: Draw) -> Example:
    """A story of two or three changes, and the way to its end, step by step."""
    name, thing = draw.one(NAMES), draw.one(THINGS)
    held = draw.between(2, 9)
    prompt, steps = f"{name} has {held} {thing}", list[str]()
    for _ in range(draw.between(2, 3)):
        if draw.below(2) and held > 1:
            taken = draw.between(1, min(9, held))
            prompt += f", gives {taken} away"
            steps.append(f"{held} - {taken} = {held - taken}")
            held -= taken
        else:
            found = draw.between(1, 9)
            prompt += f", finds {found}"
            steps.append(f"{held} + {found} = {held + found}")
            held += found
    answer = f" {', '.join(steps)}: {held} {thing}."
    return Example(f"{prompt}. How many are left?", answer)

"""Places of a model in plain words: layers by number, parts by name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tritter.errors import RequestError, did_you_mean
from tritter.families.logical import LogicalTensor

# Word → kinds of logical tensors, whole or up to a dot or a dash; norms go with what they feed
PARTS: dict[str, tuple[str, ...]] = {
    "embed": ("embed",),
    "head": ("head",),
    "norm": ("final_norm",),
    "attention": ("attention",),
    "ffn": ("ffn", "shared_expert"),
    "experts": ("experts",),
    "router": ("router",),
}
_RANGE = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")
_ALLOWED = f"allowed are layers by number, 0 or 0-3, and {', '.join(PARTS)}"


@dataclass(frozen=True, slots=True)
class Places:
    """What some words mean; a tied head is the embedding, by either name.

    Args:
        parts: words of `PARTS`.
        layers: first and last layer of each range.
    """

    parts: tuple[str, ...]
    layers: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, words: Sequence[str | int]) -> "Places":
        """Read words such as `0-3`, `7` and `embed`; commas within one part it, too.

        Raises:
            RequestError: there are none, or one is no such word.
        """
        single = [each.strip() for word in words for each in str(word).split(",")]
        if not single:
            raise RequestError(f"it is empty; {_ALLOWED}.")
        parts, layers = [], []
        for word in single:
            if word in PARTS:
                parts.append(word)
                continue
            found = _RANGE.fullmatch(word)
            first, last = (int(n or found[1]) for n in found.groups()) if found else (1, 0)
            if first > last:
                raise RequestError(f"{word or 'nothing'}: {_ALLOWED}.{did_you_mean(word, PARTS)}")
            layers.append((first, last))
        return cls(tuple(parts), tuple(layers))

    @property
    def last_layer(self) -> int:
        """The highest number of all; -1 where there is none."""
        return max((last for _, last in self.layers), default=-1)

    def has(self, tensor: LogicalTensor, *, is_tied: bool) -> bool:
        """Say whether a tensor lies at one of the places."""
        layer = tensor.layer
        if layer is not None and any(first <= layer <= last for first, last in self.layers):
            return True
        if is_tied and tensor.kind == "embed" and "head" in self.parts:
            return True
        return any(_is_of(tensor.kind, kind) for word in self.parts for kind in PARTS[word])


def _is_of(kind: str, part: str) -> bool:
    return kind == part or kind.startswith((f"{part}.", f"{part}_"))

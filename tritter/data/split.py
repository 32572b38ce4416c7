"""The train/validation split of all domains of a run.

A document is used for validation if the hash of the lineage's seed and its text, as a number in
[0, 1), is below the fraction. The side therefore depends only on the text and is the same in
every training run of the lineage: runs never train on each other's validation documents.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Annotated, Literal

from pydantic import Field

from tritter.data.documents import PIECE_CHARACTERS, Documents, text_key
from tritter.data.records import NO_ANSWERS, Conversation, Text
from tritter.errors import RequestError
from tritter.storage.records import Seed, record


@record
class SplitRule:
    """The rule by which a lineage splits documents.

    Args:
        seed: seed of the hash.
        validation_fraction: share of validation documents.
        piece_characters: size of the `pieces` of long texts, each of which has a side of its own.
    """

    seed: Seed
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    piece_characters: Annotated[int, Field(ge=PIECE_CHARACTERS, le=10**8)] = PIECE_CHARACTERS

    def side(self, key: str) -> Literal["train", "validation"]:
        """Return the side of a text from its `text_key`."""
        number = int.from_bytes(sha256(f"{self.seed}\0{key}".encode()).digest(), "big")
        return "validation" if number / 2**256 < self.validation_fraction else "train"

    def split(self, domains: Mapping[str, Documents]) -> dict[str, tuple[Documents, Documents]]:
        """Return domain → its training and its validation documents, in their order."""
        import numpy as np

        splits = {}
        for name, documents in domains.items():
            sides = {"train": array("q"), "validation": array("q")}
            for index, key in enumerate(documents.keys()):
                sides[self.side(key)].append(index)
            train, validation = (
                documents.select(np.frombuffer(side, dtype="i8")) for side in sides.values()
            )
            if (reason := self._one_sided(len(train), len(validation))) is not None:
                raise RequestError(f"data: domain {name}: {reason}.")
            splits[name] = (train, validation)
        return splits

    def training_texts(
        self, domains: Mapping[str, Documents], names: Iterable[str]
    ) -> Iterator[str]:
        """Yield the texts of the training documents of some domains."""
        parted = self.split(domains)
        for name in names:
            train, _ = parted[name]
            yield from (document.text for document in train)

    def problem(self, texts: Iterable[Text], *, needs_answers: bool = False) -> str | None:
        """Return the problem of texts that leave one side of the split empty; None otherwise.

        Args:
            texts: the pieces of a domain; reading stops once both sides have one.
            needs_answers: whether conversations without an answer are not used.
        """
        keys: dict[str, set[str]] = {"train": set(), "validation": set()}
        used: set[str] = set()
        for text in texts:
            key = text_key(str(text))
            side = self.side(key)
            keys[side].add(key)
            if not needs_answers or not isinstance(text, Conversation) or text.answers:
                used.add(side)
            if len(used) == len(keys):
                return None
        if all(keys.values()):
            without = " or ".join(sorted(keys.keys() - used))
            return f"its conversations for {without} have {NO_ANSWERS}"
        return self._one_sided(len(keys["train"]), len(keys["validation"]))

    def _one_sided(self, train: int, validation: int) -> str | None:
        if train and validation:
            return None
        return (
            f"the split gives {train} training and {validation} validation documents "
            f"(of {train + validation}); each side needs at least one. A hash of its text assigns "
            f"each document (data.validation_fraction = {self.validation_fraction}): add "
            "documents, or start a new base with another fraction or seed"
        )

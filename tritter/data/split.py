"""Which documents train and which validate: one decision over all domains of a run.

A document validates when the hash of the lineage's seed and its text, as a number between 0 and
1, lies below the fraction. So its side follows from its text alone, and stays what it was in
every training of the lineage: what one training learned never validates, and what one held out is
never trained on.
"""

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Literal

from pydantic import Field

from tritter.data.documents import Documents, text_key
from tritter.errors import RequestError
from tritter.storage.records import Seed, record

Side = Literal["train", "validation"]


@record
class SplitRule:
    """How a lineage tells held-out documents from others.

    Args:
        seed: what a text's hash is drawn with.
        validation_fraction: share of the documents that validate.
    """

    seed: Seed
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCounts:
    """How a domain's documents were parted.

    Args:
        documents: distinct ones.
        train: of these, that train.
        validation: that validate.
        held_out_before: that an old domain of the run holds out; they are not trained on.
    """

    documents: int
    train: int
    validation: int
    held_out_before: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides of a domain, each in the order in which the documents came."""

    train: Documents
    validation: Documents
    counts: DomainCounts


def threshold_side(key: str, rule: SplitRule) -> Side:
    """Return the side of a text, given its `text_key`."""
    number = int.from_bytes(sha256(f"{rule.seed}\0{key}".encode()).digest(), "big")
    return "validation" if number / 2**256 < rule.validation_fraction else "train"


def part_documents(domains: Mapping[str, Documents], *, rule: SplitRule) -> dict[str, Split]:
    """Return name → the two sides of each domain of a run.

    Args:
        domains: old ones first.

    Raises:
        RequestError: a fraction out of range, or a domain that has an empty side; names it.
    """
    if not (math.isfinite(rule.validation_fraction) and 0 < rule.validation_fraction < 1):
        raise RequestError(
            f"data.validation_fraction={rule.validation_fraction}: must lie between 0 and 1 "
            f"(both excluded), for example 0.1."
        )
    import numpy as np

    held_out: set[str] = set()
    parted = {}
    for name, documents in domains.items():
        train, validation, num_known = array("q"), array("q"), 0
        for index, key in enumerate(documents.keys()):
            if threshold_side(key, rule) == "train":
                train.append(index)
            else:
                validation.append(index)
                num_known += key in held_out
        counts = DomainCounts(
            documents=len(documents),
            train=len(train),
            validation=len(validation),
            held_out_before=num_known,
        )
        train_side, held_side = (
            documents.chosen(np.frombuffer(side, dtype="i8")) for side in (train, validation)
        )
        parted[name] = Split(train_side, held_side, counts)
        if (reason := _one_sided(counts, rule)) is not None:
            raise RequestError(f"data: domain {name}: {reason}.")
        held_out.update(parted[name].validation.keys())
    return parted


def one_sided(texts: Iterable[str], *, rule: SplitRule) -> str | None:
    """Return why `part_documents` would refuse texts; None where both sides get a document.

    Args:
        texts: the pieces of a domain; reading stops once both sides have one.
    """
    keys: dict[Side, set[str]] = {"train": set(), "validation": set()}
    for key in map(text_key, texts):
        keys[threshold_side(key, rule)].add(key)
        if all(keys.values()):
            return None
    train, validation = len(keys["train"]), len(keys["validation"])
    counts = DomainCounts(documents=train + validation, train=train, validation=validation)
    return _one_sided(counts, rule)


def _one_sided(counts: DomainCounts, rule: SplitRule) -> str | None:
    if counts.train and counts.validation:
        return None
    return (
        f"of its documents ({counts.documents}) {counts.train} would train and "
        f"{counts.validation} would validate, and each side needs one. The text of a "
        f"document decides its side (data.validation_fraction = {rule.validation_fraction}): add "
        "documents, or begin with a new base and another fraction or seed"
    )

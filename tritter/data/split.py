"""Which documents train and which validate: one decision over all domains of a run.

A document validates when the hash of the lineage's seed and its text, as a number between 0 and
1, lies below the fraction. So its side follows from its text alone, and stays what it was in
every training of the lineage. Checkpoints of format 2 and before were split by rank, where names
and neighbours count; that rule is kept for the domains that they recorded.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal, get_args

from tritter.data.documents import Document, chosen, distinct, pieces, text_key, text_keys
from tritter.errors import RequestError

Rule = Literal["threshold", "ranked"]
Side = Literal["train", "validation", "left_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """How a training told held-out documents from others.

    Args:
        rule: `threshold` on the text, or `ranked`: the share with the lowest hashes of seed and
            file name.
    """

    rule: Rule
    seed: int
    validation_fraction: float


@dataclass(frozen=True, slots=True)
class DomainDocuments:
    """A domain's documents, and the splits by rank that it was trained under, if any."""

    documents: Sequence[Document]
    ranked: tuple[SplitRule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCounts:
    """How a domain's documents were parted, and what was not as its own split would have it.

    Args:
        documents: distinct ones.
        train: of these, that train.
        validation: that validate.
        left_out: that do neither: one training learned them, another held them out.
        learned_before: that an earlier training learned; they don't validate.
        held_out_before: that an earlier training or an old domain of the run holds out; they are
            not trained on.
    """

    documents: int
    train: int
    validation: int
    left_out: int = 0
    learned_before: int = 0
    held_out_before: int = 0


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides of a domain, each in the order in which the documents came."""

    train: Sequence[Document]
    validation: Sequence[Document]
    counts: DomainCounts


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier trainings of a lineage did with texts.

    Args:
        sides: text key → side, where the lineage records another than the threshold's.
        domains: domains split by rank that are not among those to be parted.
    """

    sides: Mapping[str, Side] = field(default_factory=dict)
    domains: tuple[DomainDocuments, ...] = ()


@dataclass(frozen=True, slots=True)
class Parted:
    """The domains of a run, parted.

    Args:
        domains: name → the sides.
        exceptions: text key → side, of every text whose side is not that of the threshold.
    """

    domains: Mapping[str, Split]
    exceptions: Mapping[str, Side] = field(default_factory=dict)


def threshold_side(key: str, rule: SplitRule) -> Side:
    """Return the side of a text, given its `text_key`."""
    number = int.from_bytes(sha256(f"{rule.seed}\0{key}".encode()).digest(), "big")
    return "validation" if number / 2**256 < rule.validation_fraction else "train"


def part_documents(
    domains: Mapping[str, DomainDocuments],
    *,
    rule: SplitRule,
    earlier: Earlier,
) -> Parted:
    """Part all domains of a run, so that no text is on two sides, now or in an earlier training.

    What an earlier training learned never validates, what one held out is never trained on, and
    what was both is left out.

    Args:
        domains: old ones first.
        rule: of texts that no earlier training knows.
        earlier: what earlier trainings did.

    Raises:
        RequestError: a fraction out of range, or a domain that has an empty side; names it.
    """
    if not (math.isfinite(rule.validation_fraction) and 0 < rule.validation_fraction < 1):
        raise RequestError(
            f"data.validation_fraction={rule.validation_fraction}: must lie between 0 and 1 "
            f"(both excluded), for example 0.1."
        )
    sides = _earlier_sides([*earlier.domains, *domains.values()], earlier.sides)
    exceptions = {k: side for k, side in sides.items() if side != threshold_side(k, rule)}
    held_out: set[str] = set()
    parted = {}
    for name, domain in domains.items():
        parted[name] = _part_one(domain, rule=rule, earlier=sides, held_out=held_out)
        if (reason := _one_sided(parted[name].counts, rule)) is not None:
            raise RequestError(f"data: domain {name}: {reason}.")
        held_out.update(text_keys(parted[name].validation))
    return Parted(parted, exceptions)


def ranked_split(
    documents: Sequence[Document], rule: SplitRule
) -> tuple[list[Document], list[Document]]:
    """Return the training and the validation side as checkpoints of format 2 were split.

    The `round(fraction · n)` documents with the smallest hashes of seed and identifier validate.
    """
    ranked = sorted(
        documents, key=lambda each: sha256(f"{rule.seed}\0{each.identifier}".encode()).digest()
    )
    count = round(rule.validation_fraction * len(ranked))
    return ranked[count:], ranked[:count]


def _earlier_sides(
    domains: Iterable[DomainDocuments], known: Mapping[str, Side]
) -> dict[str, Side]:
    """Return text key → side of every text that an earlier training is known to have parted."""
    sides = dict(known)

    def note(documents: Sequence[Document], side: Side) -> None:
        for key in (key for document in documents for key in _keys(document)):
            if sides.setdefault(key, side) != side:
                sides[key] = "left_out"

    for domain in domains:
        documents = distinct(domain.documents) if domain.ranked else []
        for rule in domain.ranked:
            train, validation = ranked_split(documents, rule)
            note(train, "train")
            note(validation, "validation")
    return sides


def _part_one(
    domain: DomainDocuments, *, rule: SplitRule, earlier: Mapping[str, Side], held_out: set[str]
) -> Split:
    documents = distinct(domain.documents)
    sides = {side: array("q") for side in get_args(Side)}
    why: Counter[str] = Counter()
    # Cut by its own size a document of an older split may be several texts
    all_keys = map(_keys, documents) if domain.ranked else ((key,) for key in text_keys(documents))
    for index, keys in enumerate(all_keys):
        found = {earlier.get(key) or threshold_side(key, rule) for key in keys}
        side: Side = found.pop() if len(found) == 1 else "left_out"
        sides[side].append(index)
        is_moved = not domain.ranked and side != threshold_side(keys[0], rule)
        if side == "train" and is_moved:
            why["learned_before"] += 1
        if side == "validation" and (is_moved or not held_out.isdisjoint(keys)):
            why["held_out_before"] += 1
    counts = DomainCounts(
        documents=len(documents), **{name: len(members) for name, members in sides.items()}, **why
    )
    return Split(chosen(documents, sides["train"]), chosen(documents, sides["validation"]), counts)


def _keys(document: Document) -> tuple[str, ...]:
    """Return the keys of a document as it is and of the pieces that it would be cut into now."""
    parts = (text_key(piece) for piece in pieces(document.text))
    return tuple(dict.fromkeys((text_key(document.text), *parts)))


def one_sided(texts: Iterable[str], *, rule: SplitRule, sides: Mapping[str, Side]) -> str | None:
    """Return why `part_documents` would refuse texts; None where both sides get a document.

    Args:
        texts: the pieces of a domain; reading stops once both sides have one.
        rule: of texts that no earlier training knows.
        sides: text key → side, as in `Earlier`.
    """
    found: dict[str, Side] = {}
    counts: Counter[Side] = Counter()
    for key in map(text_key, texts):
        if key not in found:
            found[key] = sides.get(key) or threshold_side(key, rule)
            counts[found[key]] += 1
        if counts["train"] and counts["validation"]:
            return None
    numbers = {side: counts[side] for side in get_args(Side)}
    return _one_sided(DomainCounts(documents=len(found), **numbers), rule)


def _one_sided(counts: DomainCounts, rule: SplitRule) -> str | None:
    if counts.train and counts.validation:
        return None
    left_out = f", {counts.left_out} would do neither" if counts.left_out else ""
    return (
        f"of its documents ({counts.documents}) {counts.train} would train and "
        f"{counts.validation} would validate{left_out}, and each side needs one. The text of a "
        f"document decides its side (data.validation_fraction = {rule.validation_fraction}): add "
        "documents, or begin with a new base and another fraction or seed"
    )

"""The text that a lineage learned: where it lay, and which part of it was held out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tritter.data.split import Rule, Side, SplitRule
from tritter.errors import TritterError, brief

BUILT_IN = {"prose": "stdlib:prose", "code": "stdlib:code"}
_SIDES: tuple[Side, ...] = ("train", "validation", "left_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSplit:
    """How a lineage tells held-out texts from others.

    Args:
        rule: of texts that it meets; `ranked` of one that format 2 wrote and nothing trained since.
        exceptions: text key → side, of every text whose side is not that of the threshold.
    """

    rule: Rule
    seed: int
    validation_fraction: float
    exceptions: Mapping[str, Side] = field(default_factory=dict)

    @property
    def as_rule(self) -> SplitRule:
        return SplitRule(
            rule=self.rule, seed=self.seed, validation_fraction=self.validation_fraction
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedDomain:
    """A domain that a lineage was trained on.

    Args:
        origin: in words.
        sha256: of all its documents, as `read_under` reads them; empty where it was not recorded.
        paths: where it lay; none where that was not recorded.
        text_field: of its records.
        read_under: the splits that trainings read it under, oldest first.
    """

    origin: str = ""
    num_documents: int = 0
    num_bytes: int = 0
    sha256: str = ""
    paths: tuple[str, ...] = ()
    text_field: str = "text"
    read_under: tuple[SplitRule, ...] = ()

    @property
    def ranked(self) -> tuple[SplitRule, ...]:
        """The splits by rank among them, for which names and neighbours of documents count."""
        return tuple(rule for rule in self.read_under if rule.rule == "ranked")


Domains = dict[str, LearnedDomain]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a lineage says of text: its split, None before the first training, and its domains."""

    split: TextSplit | None = None
    domains: Domains = field(default_factory=dict)


def learned_from(plain: Mapping[str, Any], *, origin: str) -> Learned:
    """Read `split` and `domains` of a record; of format 2 and before, what `training_config` says.

    Raises:
        TritterError: they are not what a record holds.
    """
    if plain["format_version"] < 3:
        return _migrated(plain.get("training_config", {}))
    try:
        split = plain.get("split")
        return Learned(
            None if split is None else _split(split),
            {str(name): _domain(record) for name, record in plain.get("domains", {}).items()},
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TritterError(
            f"{origin} is not a lineage: its split or its domains can't be read ({brief(error)})."
        ) from error


def with_domains(domains: Domains, others: Mapping[str, LearnedDomain]) -> Domains:
    """Return domains with older ones put behind: the same text under one name, other text apart."""
    merged = dict(domains)
    for name, other in others.items():
        held = merged.get(name)
        if held is not None and _is_same_text(held, other):
            rules = dict.fromkeys((*other.read_under, *held.read_under))
            merged[name] = replace(held, read_under=tuple(rules))
        else:
            merged[told_apart(name, merged)] = other
    return merged


def told_apart(name: str, taken: Mapping[str, object]) -> str:
    """Return a name that is not taken: NAME, else NAME_2, NAME_3 and so on."""
    numbers = (f"{name}_{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbers) if each not in taken)


def _is_same_text(one: LearnedDomain, other: LearnedDomain) -> bool:
    if one.sha256 and other.sha256:
        return one.sha256 == other.sha256
    return one.paths == other.paths


def _split(plain: Mapping[str, Any]) -> TextSplit:
    exceptions = {
        key: side for side in _SIDES for key in plain["exceptions"].get(side, ()) if str(key) == key
    }
    return TextSplit(**_rule_values(plain), exceptions=exceptions)


def _rule_values(plain: Mapping[str, Any]) -> dict[str, Any]:
    rule, seed, fraction = (plain[key] for key in ("rule", "seed", "validation_fraction"))
    if rule not in ("threshold", "ranked"):
        raise ValueError(f"rule = {brief(rule)}")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise ValueError(f"seed = {brief(seed)}")
    if not (isinstance(fraction, int | float) and 0 < fraction < 1):
        raise ValueError(f"validation_fraction = {brief(fraction)}")
    return {"rule": rule, "seed": seed, "validation_fraction": float(fraction)}


def _domain(plain: Mapping[str, Any]) -> LearnedDomain:
    rules = tuple(SplitRule(**_rule_values(rule)) for rule in plain["read_under"])
    return replace(_source(plain), read_under=rules)


def _source(plain: Mapping[str, Any]) -> LearnedDomain:
    """Read where a domain's text lay, as far as it is recorded."""
    texts = {key: plain.get(key, "") for key in ("origin", "sha256")}
    counts = {key: plain.get(key, 0) for key in ("num_documents", "num_bytes")}
    paths, text_field = plain.get("paths", ()), plain.get("text_field", "text")
    is_list = isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths)
    if not all(isinstance(value, str) for value in (*texts.values(), text_field)):
        raise TypeError("a domain's origin, sha256 and text_field are text")
    if not is_list or not all(type(value) is int for value in counts.values()):
        raise TypeError("a domain has paths and counts")
    return LearnedDomain(**texts, **counts, paths=tuple(paths), text_field=text_field)


# Format 2 and before: the split was by rank, and its seed and share stand in `training_config`


def _migrated(told: Mapping[str, Any]) -> Learned:
    rule = _recorded_rule(told)
    rules = () if rule is None else (rule,)
    domains: Domains = {}
    for name, source in _recorded_sources(told):
        domains[told_apart(name, domains)] = replace(source, read_under=rules)
    if rule is None:
        return Learned(None, domains)
    return Learned(
        TextSplit(rule="ranked", seed=rule.seed, validation_fraction=rule.validation_fraction),
        domains,
    )


def _recorded_rule(told: Mapping[str, Any]) -> SplitRule | None:
    made_from = told.get("made_from")
    origin = made_from if isinstance(made_from, Mapping) else {}
    data = told.get("data", origin.get("data"))
    seed = told.get("seed", origin.get("seed"))
    fraction = data.get("validation_fraction") if isinstance(data, Mapping) else None
    try:
        return SplitRule(
            **_rule_values({"rule": "ranked", "seed": seed, "validation_fraction": fraction})
        )
    except ValueError:
        return None


def _recorded_sources(told: Mapping[str, Any]) -> Iterator[tuple[str, LearnedDomain]]:
    for side in ("old", "new"):
        recorded = told.get(side)
        if isinstance(recorded, Mapping):
            for name, source in recorded.items():
                if isinstance(source, Mapping):
                    yield str(name), _recorded_source(str(name), source)
    made_from = told.get("made_from")
    data = made_from.get("data") if isinstance(made_from, Mapping) else None
    if "old" not in told and isinstance(data, Mapping) and data.get("source") == "stdlib":
        yield "prose", LearnedDomain(paths=(BUILT_IN["prose"],))


def _recorded_source(name: str, plain: Mapping[str, Any]) -> LearnedDomain:
    try:
        source = _source(plain)
    except TypeError:
        return LearnedDomain()
    if source.paths or not source.origin.endswith("standard library") or name not in BUILT_IN:
        return source
    return replace(source, paths=(BUILT_IN[name],))


def split_to_plain(split: TextSplit) -> dict[str, Any]:
    """Return a split as a record holds it: exceptions as a list of keys for each side."""
    sides: dict[str, list[str]] = {side: [] for side in _SIDES}
    for key, side in sorted(split.exceptions.items()):
        sides[side].append(key)
    return {
        "rule": split.rule,
        "seed": split.seed,
        "validation_fraction": split.validation_fraction,
        "exceptions": {side: keys for side, keys in sides.items() if keys},
    }

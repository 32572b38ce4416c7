"""The split: a function of seed and text alone, and of what earlier trainings did with a text."""

import math
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.documents import Document, documents_of, text_key
from tritter.data.split import (
    DomainDocuments,
    Earlier,
    SplitRule,
    part_documents,
    ranked_split,
)
from tritter.errors import RequestError

RULE = SplitRule(rule="threshold", seed=1, validation_fraction=0.3)


def ranked(seed=0, fraction=0.3):
    return SplitRule(rule="ranked", seed=seed, validation_fraction=fraction)


def named(count, start="text"):
    return [Document(f"doc{index}", f"{start} {index}") for index in range(count)]


def parted(domains, *, rule=RULE, earlier=None):
    return part_documents(domains, rule=rule, earlier=earlier or Earlier())


def keys(documents):
    return {text_key(document.text) for document in documents}


def sides(split):
    return keys(split.train), keys(split.validation)


@given(st.sets(st.text(min_size=1, max_size=9).filter(str.strip), min_size=60), st.integers(0, 9))
def test_a_side_follows_from_seed_and_text_alone(texts, seed):
    rule = SplitRule(rule="threshold", seed=seed, validation_fraction=0.5)
    whole = documents_of(sorted(texts))
    train, validation = sides(parted({"a": DomainDocuments(whole)}, rule=rule).domains["a"])
    assert not train & validation and train | validation == keys(whole)
    # Fewer neighbours, another order, other names, other blank around
    half = [Document(f"name {n}", f"\n {each.text}\n") for n, each in enumerate(whole[::-2])]
    again = sides(parted({"b": DomainDocuments(half)}, rule=rule).domains["b"])
    assert again == (train & keys(half), validation & keys(half))


def test_the_threshold_by_hand():
    found = {}
    for number in range(400):
        key = sha256(f"text {number}".encode()).hexdigest()
        drawn = int(sha256(f"1\0{key}".encode()).hexdigest(), 16) / 2**256
        found[f"text {number}"] = drawn < 0.3
    split = parted({"a": DomainDocuments(named(400))}).domains["a"]
    assert {each.text for each in split.validation} == {
        text for text, held in found.items() if held
    }
    assert abs(len(split.validation) / 400 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)
    assert (split.counts.documents, split.counts.validation) == (400, len(split.validation))


def test_a_larger_fraction_holds_out_what_a_smaller_one_did_and_more():
    def held(fraction):
        rule = SplitRule(rule="threshold", seed=1, validation_fraction=fraction)
        return keys(parted({"a": DomainDocuments(named(99))}, rule=rule).domains["a"].validation)

    assert held(0.1) < held(0.3) < held(0.6)


def test_the_old_rule_is_what_it_was():
    documents = named(50)
    train, validation = ranked_split(documents, ranked(seed=2, fraction=0.2))
    by_hand = sorted(documents, key=lambda d: sha256(f"2\0{d.identifier}".encode()).hexdigest())
    assert [each.identifier for each in validation] == [d.identifier for d in by_hand[:10]]
    assert len(train) == 40
    split = parted({"a": DomainDocuments(documents, (ranked(seed=2, fraction=0.2),))}).domains["a"]
    assert sides(split) == (keys(train), keys(validation))


@given(st.integers(0, 20), st.integers(0, 20), st.integers(20, 60), st.booleans())
def test_no_text_changes_sides_between_trainings(seed, first, last, is_old):
    """A domain that was split by rank, met in another one under the threshold."""
    before = DomainDocuments(named(50), (ranked(seed=seed),))
    train, validation = map(keys, ranked_split(before.documents, ranked(seed=seed)))
    met = DomainDocuments(documents_of(d.text for d in [*named(60)[first:last], *named(40, "x")]))
    if is_old:
        found = parted({"before": before, "met": met})
    else:  # its text is at hand, though nothing protects it
        found = parted({"met": met}, earlier=Earlier(domains=(before,)))
    now_train, now_validation = sides(found.domains["met"])
    assert not now_validation & train and not now_train & validation
    assert now_train | now_validation == keys(met.documents)
    counts = found.domains["met"].counts
    alone = parted({"met": met}).domains["met"]
    assert counts.learned_before == len(now_train & keys(alone.validation))
    assert counts.held_out_before >= len(now_validation & keys(alone.train))
    # The next generation needs no text for it
    later = parted({"met": met}, earlier=Earlier(sides=found.exceptions))
    assert sides(later.domains["met"]) == (now_train, now_validation)
    assert later.exceptions == found.exceptions


def test_what_one_training_learned_and_another_held_out_is_left_out():
    rules = (ranked(seed=0), ranked(seed=1))
    documents = named(50)
    split = parted({"a": DomainDocuments(documents, rules)}).domains["a"]
    (train_0, held_0), (train_1, held_1) = (map(keys, ranked_split(documents, r)) for r in rules)
    assert sides(split) == (train_0 & train_1, held_0 & held_1)
    assert split.counts.left_out == len(train_0 ^ train_1) > 0
    both = parted(
        {"a": DomainDocuments(documents, rules[:1]), "b": DomainDocuments(documents, rules[1:])}
    )
    assert sides(both.domains["b"]) == sides(split) == sides(both.domains["a"])
    assert set(both.exceptions.values()) == {"train", "validation", "left_out"}


def test_a_long_document_of_the_old_rule_is_met_again_in_pieces():
    text = "\n\n".join(f"paragraph {number} " + "word " * 90 for number in range(200))
    documents = [Document("book", text), *named(30)]
    before = DomainDocuments(documents, (ranked(seed=3),))
    train, _ = map(keys, ranked_split(documents, ranked(seed=3)))
    met = parted(
        {"before": before, "met": DomainDocuments(documents_of([text, *map(str, range(30))]))}
    )
    in_book = keys(documents_of([text]))
    now_train, now_validation = sides(met.domains["met"])
    assert len(in_book) > 2
    assert in_book <= (now_train if text_key(text) in train else now_validation)


def test_what_an_old_domain_holds_out_is_counted_where_a_new_one_has_it():
    old, new = DomainDocuments(documents_of(d.text for d in named(40))), named(60)[20:]
    found = parted({"old": old, "new": DomainDocuments(documents_of(d.text for d in new))})
    shared = sides(found.domains["old"])[1] & keys(new)
    assert shared and found.domains["new"].counts.held_out_before == len(shared)
    assert not shared & sides(found.domains["new"])[0]
    assert found.exceptions == {}


@pytest.mark.parametrize("count, fraction", [(0, 0.5), (1, 0.5), (3, 1e-9), (3, 1 - 1e-9)])
def test_an_empty_side_is_refused(count, fraction):
    rule = SplitRule(rule="threshold", seed=0, validation_fraction=fraction)
    with pytest.raises(RequestError, match=r"domain few: .*each side.*data\.validation_fraction"):
        parted({"few": DomainDocuments(named(count))}, rule=rule)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    rule = SplitRule(rule="threshold", seed=0, validation_fraction=fraction)
    with pytest.raises(RequestError, match=r"data\.validation_fraction"):
        parted({"a": DomainDocuments(named(9))}, rule=rule)

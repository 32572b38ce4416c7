"""The split depends only on seed and text."""

import math
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.corpus import held_out_before
from tritter.data.documents import Documents, text_key
from tritter.data.split import SplitRule
from tritter.errors import RequestError

RULE = SplitRule(seed=1, validation_fraction=0.3)


def named(count, start="text"):
    return Documents.of(f"{start} {index}" for index in range(count))


def parted(domains, *, rule=RULE):
    return rule.split(domains)


def keys(documents):
    return {text_key(document.text) for document in documents}


def sides(split):
    train, validation = split
    return keys(train), keys(validation)


@given(st.sets(st.text(min_size=1, max_size=9).filter(str.strip), min_size=60), st.integers(0, 9))
def test_a_side_follows_from_seed_and_text_alone(texts, seed):
    rule = SplitRule(seed=seed, validation_fraction=0.5)
    whole = Documents.of(sorted(texts))
    train, validation = sides(parted({"a": whole}, rule=rule)["a"])
    assert not train & validation and train | validation == keys(whole)
    # Fewer neighbours, another order, other blank around
    half = Documents.of(f"\n {each.text}\n" for each in whole[::-2])
    again = sides(parted({"b": half}, rule=rule)["b"])
    assert again == (train & keys(half), validation & keys(half))


def test_the_threshold_by_hand():
    found = {}
    for number in range(400):
        key = sha256(f"text {number}".encode()).hexdigest()
        drawn = int(sha256(f"1\0{key}".encode()).hexdigest(), 16) / 2**256
        found[f"text {number}"] = drawn < 0.3
    train, validation = parted({"a": named(400)})["a"]
    assert {each.text for each in validation} == {text for text, held in found.items() if held}
    assert abs(len(validation) / 400 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)
    assert len(train) + len(validation) == 400


def test_a_larger_fraction_holds_out_what_a_smaller_one_did_and_more():
    def held(fraction):
        rule = SplitRule(seed=1, validation_fraction=fraction)
        return sides(parted({"a": named(99)}, rule=rule)["a"])[1]

    assert held(0.1) < held(0.3) < held(0.6)


def test_what_an_old_domain_holds_out_is_counted_where_a_new_one_has_it():
    new = Documents.of(f"text {index}" for index in range(20, 60))
    found = parted({"old": named(40), "new": new})
    shared = sides(found["old"])[1] & keys(new)
    assert shared and held_out_before(found) == {"old": 0, "new": len(shared)}
    assert not shared & sides(found["new"])[0]


@pytest.mark.parametrize("count, fraction", [(0, 0.5), (1, 0.5), (3, 1e-9), (3, 1 - 1e-9)])
def test_an_empty_side_is_refused(count, fraction):
    rule = SplitRule(seed=0, validation_fraction=fraction)
    with pytest.raises(RequestError, match=r"domain few: .*each side.*data\.validation_fraction"):
        parted({"few": named(count)}, rule=rule)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.documents import Document, documents_digest, split_documents
from tritter.errors import RequestError


def named(count: int) -> list[Document]:
    return [Document(f"doc{index}", f"text {index}") for index in range(count)]


def ids(documents) -> list[str]:
    return [document.identifier for document in documents]


@given(st.integers(3, 60), st.integers(0, 5))
def test_every_document_is_on_one_side_in_its_order(count, seed):
    split = split_documents(named(count), validation_fraction=0.3, seed=seed)
    assert len(split.validation) == round(0.3 * count)
    assert sorted(ids(split.train) + ids(split.validation)) == sorted(ids(named(count)))
    order = {document.identifier: place for place, document in enumerate(named(count))}
    for side in (split.train, split.validation):
        assert [order[name] for name in ids(side)] == sorted(order[name] for name in ids(side))


def test_split_depends_on_seed_and_not_on_order():
    one = split_documents(named(50), validation_fraction=0.2, seed=1)
    again = split_documents(reversed(named(50)), validation_fraction=0.2, seed=1)
    other = split_documents(named(50), validation_fraction=0.2, seed=2)
    assert set(one.validation) == set(again.validation)
    assert set(one.validation) != set(other.validation)


@given(st.integers(0, 1000))
def test_another_document_moves_at_most_one(number):
    before = split_documents(named(40), validation_fraction=0.25, seed=3)
    more = [Document(f"new{number}", "something else"), *named(40)]
    after = split_documents(more, validation_fraction=0.25, seed=3)
    assert len(set(before.validation) - set(after.validation)) <= 1


def test_no_text_stands_on_both_sides():
    copies = [Document(f"copy{index}", f"text {index % 10}") for index in range(40)]
    split = split_documents(copies, validation_fraction=0.5, seed=0)
    assert len(split.train) + len(split.validation) == 10
    assert not {each.text for each in split.train} & {each.text for each in split.validation}
    assert set(ids(split.train + split.validation)) == {f"copy{index}" for index in range(10)}


def test_blank_documents_are_dropped():
    split = split_documents([*named(4), Document("blank", " \n")], validation_fraction=0.5, seed=0)
    assert "blank" not in ids(split.train + split.validation)


@pytest.mark.parametrize("count, fraction", [(0, 0.5), (1, 0.5), (3, 0.1), (3, 0.9)])
def test_an_empty_side_is_refused(count, fraction):
    with pytest.raises(RequestError, match=r"data\.validation_fraction.*each side"):
        split_documents(named(count), validation_fraction=fraction, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(RequestError, match=r"data\.validation_fraction"):
        split_documents(named(9), validation_fraction=fraction, seed=0)


def test_one_name_for_two_texts_is_refused():
    with pytest.raises(RequestError, match="'a'"):
        split_documents([Document("a", "x"), Document("a", "y")], validation_fraction=0.5, seed=0)


def test_digest_sees_text_name_order_and_borders():
    a, b = Document("a", "xy"), Document("b", "z")
    digests = {
        documents_digest(each)
        for each in ([a, b], [b, a], [a], [Document("ax", "y"), b], [Document("a", "x"), b])
    }
    assert len(digests) == 5
    assert documents_digest([a, b]) == documents_digest([a, b])

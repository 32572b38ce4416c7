"""Curriculum learning: difficulties, stable sorting, phases and the sampler."""

import copy
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tests import oracle
from tritter import CurriculumLearning, MemoryReplayBuffer
from tritter.errors import RequestError, TritterError


@dataclass
class Exercise:
    prompt: str
    level: int

    @property
    def text(self) -> str:
        return self.prompt


def by_letter(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) % 90 for letter in text]}


LENGTHS: list[tuple[Any, int]] = [
    ("four", 4),
    (("ab", "c"), 5),  # and a blank line
    (["ab", "c"], 5),
    ({"text": "abc"}, 3),
    ({"prompt": "ab", "answer": "c"}, 5),
    ({"instruction": "ab", "input": "", "output": "c"}, 5),
    ({"instruction": "ab", "output": "c"}, 5),
    ({"question": "ab", "answer": "c", "id": 3}, 5),
    ({"input_ids": [5, 6]}, 2),
    ({"input_ids": torch.tensor([5, 6, 7])}, 3),
    (Exercise("abcdef", 1), 6),
]


def test_length_is_the_default() -> None:
    examples, lengths = zip(*LENGTHS, strict=True)
    assert CurriculumLearning().difficulties(examples) == list(lengths)
    found = CurriculumLearning().sort_by_difficulty(examples)
    assert [CurriculumLearning().difficulties([each])[0] for each in found] == sorted(lengths)


def test_length_in_tokens() -> None:
    def words(text: str) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}

    texts = ["a b c", "incomprehensibilities", ("x y", "z w")]
    assert CurriculumLearning("length", tokenizer=words).difficulties(texts) == [3, 1, 4]
    assert CurriculumLearning("length").difficulties(texts) == [5, 21, 8]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_sorting_is_stable(levels: list[int]) -> None:
    examples = [{"level": level, "place": place} for place, level in enumerate(levels)]
    found = CurriculumLearning("level").sort_by_difficulty(examples)
    assert [(e["level"], e["place"]) for e in found] == sorted(
        (level, place) for place, level in enumerate(levels)
    )


def test_difficulty_is_given_in_each_way() -> None:
    examples = [Exercise("b", 3), Exercise("aaa", 1), Exercise("cc", 2)]
    wanted = [examples[1], examples[2], examples[0]]
    for given_ in ("level", lambda e: -ord(e.prompt[0]) if e.level > 5 else e.level, [3, 1, 2],
                   (0.3, 0.1, 0.2), torch.tensor([3.0, 1.0, 2.0])):  # fmt: skip
        assert CurriculumLearning(given_).sort_by_difficulty(examples) == wanted
    examples = [{"text": "a", "difficulty": 2}, {"text": "bbb", "difficulty": 1}]
    assert CurriculumLearning().sort_by_difficulty(examples) == examples[::-1]
    assert CurriculumLearning("length").sort_by_difficulty(examples) == examples
    buffer = MemoryReplayBuffer()
    for answer, loss in (("x", 2.0), ("yyyy", 0.5)):
        buffer.add("p", answer, loss=loss)
    assert [e.answer for e in CurriculumLearning("loss").sort_by_difficulty(buffer.examples)] == [
        "yyyy",
        "x",
    ]


def test_loss_is_that_of_the_model_as_it_is_now() -> None:
    """Compare with a manual cross-entropy; dropout is disabled only during the call."""
    model = oracle.tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    examples: list[Any] = ["hello", ("some", "thing"), {"input_ids": [3, 1, 4, 1, 5]}]
    ids = [by_letter("hello"), by_letter("some\n\nthing"), examples[2]]
    curriculum = CurriculumLearning("loss", model=model, tokenizer=by_letter)

    def by_hand() -> list[float]:
        still = copy.deepcopy(model).eval()
        found = []
        for each in ids:
            tokens = torch.tensor(each["input_ids"])
            logits = still(input_ids=tokens[None]).logits[0, :-1]
            found.append(float(cross_entropy(logits, tokens[1:]).detach()))
        return found

    before = by_hand()
    assert CurriculumLearning("loss", model=model, tokenizer=by_letter).difficulties(
        examples
    ) == pytest.approx(before)
    assert [module.training for module in model.modules()] == modes
    assert curriculum.order(examples) == sorted(range(3), key=before.__getitem__)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(15):  # what was hardest is learned
        tokens = torch.tensor([ids[before.index(max(before))]["input_ids"]])
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    after = by_hand()
    assert curriculum.order(examples) == sorted(range(3), key=after.__getitem__)
    assert sorted(range(3), key=after.__getitem__) != sorted(range(3), key=before.__getitem__)


def test_any_callable_is_a_model() -> None:
    def model(*, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        assert input_ids.shape == labels.shape and input_ids.ndim == 2
        return SimpleNamespace(loss=input_ids.double().mean())

    assert CurriculumLearning("loss", model=model, tokenizer=by_letter).difficulties(
        ["zz", "aa"]
    ) == [32, 7]


@given(st.integers(1, 60), st.sampled_from([(1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2), (0, 0.5, 0.5)]))
def test_phases_hold_every_example_once_in_their_shares(count: int, fractions: Any) -> None:
    examples = [{"level": (7 * place) % 11, "place": place} for place in range(count)]
    curriculum = CurriculumLearning("level", fractions=fractions)
    easy, medium, hard = phases = curriculum.get_phases(examples)
    assert easy + medium + hard == curriculum.sort_by_difficulty(examples)
    for phase, fraction in zip(phases, fractions, strict=True):
        assert abs(len(phase) - fraction * count) <= 1
    assert phases.easy is easy and phases.hard is hard


def test_thirds() -> None:
    easy, medium, hard = CurriculumLearning().get_phases(
        ["aaa", "b", "cc", "d" * 9, "e" * 5, "ffff"]
    )
    assert (easy, medium, hard) == (["b", "cc"], ["aaa", "ffff"], ["e" * 5, "d" * 9])


TEXTS = ["x" * length for length in (5, 1, 9, 3, 7, 2, 8, 4, 6)]  # phases: 1-3, 4-6, 7-9
EASY, MEDIUM, HARD = {1, 2, 3}, {4, 5, 6}, {7, 8, 9}


def sampler(**changes: Any) -> Any:
    options = {"num_steps": 12, "batch_size": 3, "seed": 5} | changes
    return CurriculumLearning().sampler(TEXTS, **options)


def lengths(places: Any) -> list[int]:
    return [len(TEXTS[place]) for place in places]


def test_phases_open_over_the_steps() -> None:
    drawn = lengths(sampler())
    assert len(drawn) == len(sampler()) == 36
    first, second, third = drawn[:12], drawn[12:24], drawn[24:]
    assert Counter(first) == dict.fromkeys(EASY, 4)
    assert Counter(second) == dict.fromkeys(EASY | MEDIUM, 2)
    assert set(third[:9]) == EASY | MEDIUM | HARD
    assert drawn != lengths(sampler(seed=6)) and drawn == lengths(sampler())
    assert first[:3] != first[3:6] or first[3:6] != first[6:9]
    assert set(lengths(sampler(opens=(0, 0)))[:9]) == EASY | MEDIUM | HARD
    assert set(lengths(sampler(opens=(1, 1)))) == EASY
    assert set(lengths(sampler(opens=(0.5, 1)))[18:]) == EASY | MEDIUM


def test_a_second_pass_has_all_open_and_another_order() -> None:
    own = sampler()
    first, second, third = list(own), lengths(own), lengths(own)
    assert lengths(first) == lengths(sampler()) and second != third
    assert set(second[6:15]) == EASY | MEDIUM | HARD


@pytest.mark.parametrize("stop", [1, 11, 12, 13, 30, 36, 40])
def test_it_goes_on_bit_for_bit(stop: int, tmp_path: Any) -> None:
    whole = sampler()
    expected = list(whole) + list(whole)
    first, second = sampler(), sampler(seed=5)
    begun = []
    while len(begun) < stop:
        for place in first:
            begun.append(place)
            if len(begun) == stop:
                break
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = list(second)
    assert begun + rest == expected[: len(begun) + len(rest)]
    assert len(begun + rest) == (72 if stop >= 36 else 36)


def test_a_loader_goes_on_where_it_was_left() -> None:
    def loader(own: Any) -> DataLoader:
        return DataLoader(TEXTS, batch_size=3, sampler=own)  # type: ignore[arg-type]

    expected = list(loader(sampler()))
    own, other = sampler(), sampler()
    begun = [batch for _, batch in zip(range(5), loader(own), strict=False)]
    other.load_state_dict(own.state_dict() | {"position": 15})
    assert begun + list(loader(other)) == expected
    assert own.state_dict()["position"] in (15, 18)


def test_what_was_easy_when_it_was_saved_stays_so() -> None:
    """A model that has been trained since would sort differently."""
    costs = {text: float(len(text)) for text in TEXTS}
    first = CurriculumLearning(costs.__getitem__).sampler(TEXTS, num_steps=30, seed=1)
    expected = list(first)
    begun = CurriculumLearning(costs.__getitem__).sampler(TEXTS, num_steps=30, seed=1)
    drawn = [next(iter(begun)) for _ in range(7)]
    for text in costs:
        costs[text] *= -1
    later = CurriculumLearning(costs.__getitem__).sampler(TEXTS, num_steps=30, seed=1)
    assert list(CurriculumLearning(costs.__getitem__).sampler(TEXTS, num_steps=30, seed=1)) != (
        expected
    )
    later.load_state_dict(begun.state_dict())
    assert drawn + list(later) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_examples_are_drawn_all_the_same(count: int) -> None:
    own = CurriculumLearning().sampler(TEXTS[:count], num_steps=30)
    assert set(own) == set(range(count))


@pytest.mark.parametrize(
    ("examples", "by", "words"),
    [
        ([], None, "no examples"),
        (["a", "b"], [1.0, float("nan")], "difficulty: example 1 has the value nan; .* finite"),
        (["a", "b"], [float("inf"), 1.0], "example 0 has the value inf"),
        (["a", "b"], [1.0], "there are 1 difficulties for 2 examples"),
        (["a"], lambda e: "much", "example 0 has the value 'much'"),
        ([{"level": 1, "text": "a"}], "levle", "has no 'levle'; it has level, text.*mean level"),
        ([Exercise("a", 1)], "levels", "has prompt, level.*Did you mean level"),
        (["a"], "lenght", "Did you mean length"),
        ([{"text": "a"}], "loss", "needs a model and a tokenizer"),
        ([{"text": "a", "difficulty": 1}, {"text": "b"}], None, "example 1 has no 'difficulty'"),
        (["a", 3], None, "example 1 is a number; must be.*set difficulty to"),
        ([("a", 3)], None, "example 0 is tuple; must"),
        ([{"body": "a"}], None, "example 0 has no field text"),
    ],
)
def test_what_has_no_difficulty_is_refused(examples: Any, by: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        CurriculumLearning(by).sort_by_difficulty(examples)


def test_a_text_of_one_token_and_no_tokenizer() -> None:
    model: nn.Module = oracle.tiny_llama()
    with pytest.raises(RequestError, match="example 1 has the value nan"):
        CurriculumLearning("loss", model=model, tokenizer=by_letter).difficulties(["ab", "a"])
    with pytest.raises(RequestError, match=r"example 0 has no input_ids; .* needs a tokenizer"):
        CurriculumLearning("loss", model=model).difficulties(["ab"])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.2, -0.1, -0.1), ()])
def test_fractions_are_three_of_one(fractions: Any) -> None:
    with pytest.raises(RequestError, match=r"fractions = .*add up to 1"):
        CurriculumLearning(fractions=fractions)


def test_a_course_that_is_none_is_refused() -> None:
    for wrong in ({"num_steps": 0}, {"batch_size": 0}, {"batch_size": 2.5}):
        with pytest.raises(RequestError, match="must be whole numbers of at least 1"):
            sampler(**wrong)
    for opens in ((0.5,), (0.7, 0.3), (0.2, 1.2)):
        with pytest.raises(RequestError, match="opens = "):
            sampler(opens=opens)
    state = sampler().state_dict()
    with pytest.raises(TritterError, match="curriculum has 9 examples"):
        sampler(num_steps=20).load_state_dict(state)
    with pytest.raises(TritterError, match=r"9 examples.*this one has 4"):
        CurriculumLearning().sampler(TEXTS[:4], num_steps=12, batch_size=3).load_state_dict(state)
    with pytest.raises(TritterError, match=r"format 2; .* reads 1"):
        sampler().load_state_dict(state | {"format_version": 2})

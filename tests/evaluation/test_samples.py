from collections.abc import Callable

import pytest
import torch

from tritter.data.tokens import TextBounds
from tritter.evaluation.inference import sample_text, whole_word_prompt


def successor_table(*pairs: tuple[int, int]) -> torch.Tensor:
    table = torch.zeros(7, 7)
    for token, successor in pairs:
        table[token, successor] = 5.0
    return table


def test_greedy_continuation_without_prompt_and_end(bigram):
    model = bigram(successor_table((1, 2), (2, 3), (3, 0))).train()
    words = sample_text(model, prompt_ids=[4, 1], max_new_tokens=10, bounds=TextBounds(0))
    assert words == [2, 3] and model.training


def test_stops_at_the_limit_and_starts_without_a_prompt(bigram):
    model = bigram(successor_table((0, 5), (5, 6), (6, 5)))
    assert sample_text(model, prompt_ids=[], max_new_tokens=3, bounds=TextBounds(0)) == [5, 6, 5]


def test_same_words_each_time_whatever_the_global_seed(summing, table):
    model = summing(table)
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runs.append(sample_text(model, prompt_ids=[3], max_new_tokens=8, bounds=TextBounds(0)))
    assert runs[0] == runs[1]


def _decode(ids: list[int]) -> str:
    """Tokens 0–9 begin a word, tokens from 10 continue one; the first token loses its space."""
    return "".join(f" w{i}" if i < 10 else f"x{i}" for i in ids).lstrip()


@pytest.mark.parametrize("decode", [_decode, lambda ids: " " + _decode(ids)])
def test_a_prompt_begins_and_ends_with_whole_words(decode: Callable[[list[int]], str]) -> None:
    document = [1, 11, 2, 12, 13, 3, 4, 14, 5, 15, 16, 6]
    prompt = whole_word_prompt(document, decode, skipped_tokens=3, max_tokens=5)
    assert prompt == [3, 4, 14]
    assert whole_word_prompt(document, decode, skipped_tokens=5, max_tokens=3) == [3, 4, 14]


@pytest.mark.parametrize("document", [[], [1], [1, 11], [11, 12, 13, 14, 15, 16]])
def test_a_prompt_of_a_document_without_words_or_room(document: list[int]) -> None:
    prompt = whole_word_prompt(document, _decode, skipped_tokens=24, max_tokens=24)
    assert prompt == document[len(document) // 2 :]

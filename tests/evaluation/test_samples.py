import torch

from tritter.evaluation.samples import sample_text


def successor_table(*pairs: tuple[int, int]) -> torch.Tensor:
    table = torch.zeros(7, 7)
    for token, successor in pairs:
        table[token, successor] = 5.0
    return table


def test_greedy_continuation_without_prompt_and_end(bigram):
    model = bigram(successor_table((1, 2), (2, 3), (3, 0))).train()
    words = sample_text(model, prompt_ids=[4, 1], max_new_tokens=10, end_of_text_id=0)
    assert words == [2, 3] and model.training


def test_stops_at_the_limit_and_starts_without_a_prompt(bigram):
    model = bigram(successor_table((0, 5), (5, 6), (6, 5)))
    assert sample_text(model, prompt_ids=[], max_new_tokens=3, end_of_text_id=0) == [5, 6, 5]


def test_same_words_each_time_whatever_the_global_seed(summing, table):
    model = summing(table)
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runs.append(sample_text(model, prompt_ids=[3], max_new_tokens=8, end_of_text_id=0))
    assert runs[0] == runs[1]

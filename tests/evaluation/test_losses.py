import json
import math
from itertools import pairwise

import pytest
import torch

from tests import oracle
from tritter.data.tokens import TextBounds
from tritter.errors import TritterError
from tritter.evaluation.losses import batch_that_fits, document_losses, sequence_losses
from tritter.evaluation.statistics import PairedScores

EOT = 0


def score(model, documents, **changes):
    options = {"sequence_length": 4, "bounds": TextBounds(EOT), "batch_size": 3}
    return document_losses(model, documents, **(options | changes))


def test_two_documents_by_hand(bigram, make_documents):
    # After 0: P(1) = 3/4, P(2) = 1/8; after 1: P(2) = 1/2; after 2: P(1) = 1/4.
    probabilities = torch.tensor(
        [[1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4]]
    )
    documents = make_documents([1, 2, 1], [2])
    losses = score(bigram(probabilities.log()), documents)
    first = -math.log(3 / 4 * 1 / 2 * 1 / 4)
    second = -math.log(1 / 8)
    assert losses.values.tolist() == pytest.approx([first, second], abs=1e-6)
    record = losses.record()
    assert record["loss"] == losses.mean() == pytest.approx((first + second) / 4, abs=1e-6)
    assert record["loss_per_byte"] == pytest.approx((first + second) / 8, abs=1e-6)
    assert record["n"] == 2


def test_every_token_counts_once_across_windows(bigram, table, documents):
    """A bigram model needs one previous token, which every window has: windows have no effect."""
    log_probabilities = table.log_softmax(dim=-1)
    expected = []
    for index in range(len(documents)):
        tokens = [EOT, *documents.document(index).tolist()]
        pairs = pairwise(tokens)
        expected.append(-sum(float(log_probabilities[a, b]) for a, b in pairs))
    for sequence_length in (1, 2, 4, 5, 64):
        losses = score(bigram(table), documents, sequence_length=sequence_length)
        assert losses.values.tolist() == pytest.approx(expected, abs=1e-5)


def test_batch_size_does_not_matter(summing, table, documents):
    reference = score(summing(table), documents, batch_size=1)
    for batch_size in (2, 5, 100):
        losses = score(summing(table), documents, batch_size=batch_size)
        torch.testing.assert_close(losses.values, reference.values, atol=1e-5, rtol=0)


def test_a_large_vocabulary_is_read_in_smaller_batches(make_documents, monkeypatch):
    """16 windows of 1,024 tokens would have 17 GB of logits for the 262,144 tokens of Gemma 3."""
    assert batch_that_fits(16, 1024, 262_144) == 1 and batch_that_fits(16, 1024, 16_384) == 16
    model = oracle.tiny_llama(vocab_size=40)
    documents = make_documents(*([1 + number] * 11 for number in range(6)))
    sequences = documents.tokens.view(6, 11)
    whole = score(model, documents, sequence_length=16, batch_size=16)
    whole_rows = sequence_losses(model, sequences)
    sizes = []
    model.register_forward_hook(lambda *arguments: sizes.append(arguments[-1].logits.numel()))
    monkeypatch.setattr("tritter.evaluation.losses._MAX_LOGITS", 1000)
    monkeypatch.setattr("tritter.evaluation.losses._MAX_LOGITS_OF_LOSS", 150)
    parts = score(model, documents, sequence_length=16, batch_size=16)
    rows = sequence_losses(model, sequences)
    assert sizes == [880] * 6  # two rows each
    torch.testing.assert_close(parts.values, whole.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows, whole_rows, atol=1e-5, rtol=0)


def test_padding_would_matter_if_it_counted(summing, table, documents, monkeypatch):
    """Negative control: if padding counts, the result depends on the batch size."""
    monkeypatch.setattr("tritter.data.packing.IGNORED", EOT)
    monkeypatch.setattr("tritter.evaluation.losses.IGNORED", EOT)
    monkeypatch.setattr(
        "tritter.evaluation.losses.cross_entropy",
        lambda logits, targets, **_: torch.nn.functional.cross_entropy(
            logits, targets, reduction="none"
        ),
    )
    alone = score(summing(table), documents, batch_size=1)
    together = score(summing(table), documents, batch_size=100)
    assert (alone.values - together.values).abs().max() > 0.1


def test_order_of_documents_does_not_matter(summing, table, make_documents):
    lists = [[1, 2, 3, 4, 5, 6], [3], [2, 2, 5]]
    names = ("a", "b", "c")
    losses = score(summing(table), make_documents(*lists, names=names))
    back = score(summing(table), make_documents(*lists[::-1], names=names[::-1]))
    assert back.identifiers == ("c", "b", "a")
    torch.testing.assert_close(back.values.flip(0), losses.values, atol=1e-5, rtol=0)


def test_batches_are_hardly_padded(bigram, table, documents):
    model = bigram(table)
    score(model, documents)
    positions = sum(rows * columns for rows, columns in model.batch_shapes)
    assert documents.num_tokens <= positions <= 1.25 * documents.num_tokens


def test_model_is_scored_in_eval_and_left_as_it_was(bigram, table, documents):
    model = bigram(table)
    model.train()
    model.dropout.eval()
    frozen = score(model, documents)
    assert model.training and not model.dropout.training
    model.dropout.train()
    assert torch.equal(score(model, documents).values, frozen.values)
    assert model.dropout.training
    assert not frozen.values.is_inference() and not frozen.values.requires_grad


def test_modes_come_back_after_an_error(bigram, table, make_documents):
    model = bigram(table).train()
    with pytest.raises(IndexError):
        score(model, make_documents([1, 99, 1]))
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_empty_documents_are_left_out_and_nothing_to_score_is_an_error(
    bigram, table, make_documents
):
    losses = score(bigram(table), make_documents([1], [], [2, 3]))
    assert losses.identifiers == ("d0", "d2")
    assert losses.weights["tokens"].tolist() == [1, 2] and losses.weights["bytes"].tolist() == [
        2,
        4,
    ]
    with pytest.raises(TritterError, match="no token"):
        score(bigram(table), make_documents([], []))


def test_progress_ends_at_the_total(bigram, table, documents):
    seen = []
    score(bigram(table), documents, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted({d for d, _ in seen})


def test_record_survives_json(make_losses):
    losses = make_losses(torch.tensor([1.5, 1 / 3]))
    copy = PairedScores.from_dict(json.loads(json.dumps(losses.to_dict())))
    assert copy.identifiers == losses.identifiers
    assert torch.equal(copy.values, losses.values) and torch.equal(
        copy.weights["bytes"], losses.weights["bytes"]
    )
    with pytest.raises(TritterError, match="format_version"):
        PairedScores.from_dict(losses.to_dict() | {"format_version": 99})


def test_score_of_a_broken_model_is_valid_json(make_losses):
    record = make_losses(torch.tensor([1.0, math.nan])).record()
    assert record["loss"] is None and record["n"] == 2
    json.dumps(record, allow_nan=False)

"""Document masks isolate documents of a sequence: all families, forward and backward."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.oracle.families import generic, tiny
from tritter.core.models import cache_in
from tritter.data.packing import IGNORED, DocumentMask, labels_of
from tritter.data.tokens import TextBounds

EOT = 0
# The third row begins inside a document, and the last is mostly padding
ROWS = torch.tensor(
    [
        [0, 5, 9, 3, 8, 0, 7, 6, 5, 4, 11, 12, 13, 14, 0, 2, 0],
        [0, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46],
        [51, 52, 53, 54, 55, 56, 57, 0, 9, 9, 9, 9, 9, 9, 0, 0, 0],
        [0, 5, 9, 3, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


def documents_of(row: Tensor) -> list[tuple[int, int]]:
    """Return the start and end of each document of a row, in plain Python."""
    begins = [0, *(at for at in range(1, len(row)) if int(row[at]) == EOT), len(row)]
    return list(pairwise(begins))


def document_mask(family: str) -> torch.nn.Module:
    model = tiny(family).double()
    DocumentMask(TextBounds(EOT)).attach(model)
    return model


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic())
def test_a_packed_document_has_the_logits_that_it_has_alone(family: str) -> None:
    alone, model = tiny(family).double(), document_mask(family)
    with torch.no_grad(), oracle.float64_casts():
        logits = model(input_ids=ROWS, use_cache=False).logits
        by_default = model(ROWS).logits  # a cache of its own would see no boundary
        stream = alone(input_ids=ROWS, use_cache=False).logits
    assert torch.equal(logits, by_default)
    for row, actual in zip(ROWS, logits, strict=True):
        for begin, end in documents_of(row):
            with torch.no_grad(), oracle.float64_casts():
                wanted = alone(input_ids=row[None, begin:end], use_cache=False).logits[0]
            torch.testing.assert_close(actual[begin:end], wanted, rtol=0, atol=1e-12)
    # Negative control: without the hook, the logits of the second document differ
    assert not torch.allclose(stream[0, 5:14], logits[0, 5:14], atol=1e-3)
    assert torch.allclose(stream[1], logits[1], atol=1e-12)  # a single document is unchanged


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic())
def test_no_token_sees_another_document_or_the_future(family: str) -> None:
    model = document_mask(family)
    embed = model.get_input_embeddings()
    vectors: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> Tensor:
        vectors.append(output.detach().requires_grad_())
        return vectors[-1]

    embed.register_forward_hook(keep)
    row = ROWS[:1]
    logits = model(input_ids=row, use_cache=False).logits[0]
    for begin, end in documents_of(row[0]):
        for at in range(begin, end):
            (seen,) = torch.autograd.grad(logits[at].square().sum(), vectors[-1], retain_graph=True)
            places = seen[0].abs().sum(dim=1).nonzero().flatten().tolist()
            assert set(places) <= set(range(begin, at + 1))
            assert {begin, at} & set(places)
    changed = row.clone()
    changed[0, 10:14] += 20
    with torch.no_grad():
        other = model(input_ids=changed, use_cache=False).logits[0]
    assert torch.equal(other[:10], logits[:10].detach())
    assert torch.equal(other[14:], logits[14:].detach())
    assert not torch.equal(other[10:14], logits[10:14].detach())


def test_gradients_are_those_of_the_documents_alone() -> None:
    model, alone = document_mask("gemma3_text"), tiny("gemma3_text").double()
    labels = labels_of(model, ROWS)
    model(input_ids=ROWS, labels=labels, use_cache=False, num_items_in_batch=1).loss.backward()
    for row, wanted in zip(ROWS, labels, strict=True):
        for begin, end in documents_of(row):
            # The closing end of text is a target, and belongs to the next document
            logits = alone(input_ids=row[None, begin:end], use_cache=False).logits[0]
            targets = torch.cat([wanted[begin + 1 : end + 1], wanted.new_full((1,), IGNORED)])
            torch.nn.functional.cross_entropy(
                logits.float(), targets[: end - begin], reduction="sum"
            ).backward()
    for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_padding_is_no_target_and_documents_are_counted() -> None:
    model = document_mask("llama")
    labels = labels_of(model, ROWS)
    assert (labels == IGNORED).nonzero().tolist() == [
        *([2, at] for at in (15, 16)),
        *([3, at] for at in range(6, 17)),
    ]
    mask = DocumentMask.of(model)
    assert mask is not None
    lengths = [end - begin for row in ROWS[:2] for begin, end in documents_of(row)] + [
        7,
        7,
        1,
        5,
        1,
    ]
    assert mask.length_counts(ROWS).tolist() == [lengths.count(n) for n in range(18)]
    assert labels_of(tiny("llama"), ROWS) is ROWS


def test_it_goes_along_with_copies_and_leaves_writing_alone() -> None:
    model = document_mask("llama")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert DocumentMask.of(other) == DocumentMask.of(model)
        assert torch.equal(other(ROWS).logits, model(ROWS).logits)
    DocumentMask(TextBounds(EOT)).attach(model)
    assert len(model.model._forward_pre_hooks) == 1
    assert model.state_dict().keys() == tiny("llama").state_dict().keys()
    prefilled = model(input_ids=ROWS, use_cache=True)
    assert torch.equal(prefilled.logits, tiny("llama").double()(ROWS).logits)
    assert cache_in(prefilled) is not None

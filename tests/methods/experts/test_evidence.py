"""Gates from token counts: compared with a loop, causality, caches, padding, documents."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.methods.experts.mixtures import TARGETS
from tests.oracle import tiny_llama
from tritter.checkpoints.expert_files import AdapterShape
from tritter.core.models import cache_in, cache_name
from tritter.data.chat import CONTEXT, PADDING, START
from tritter.data.packing import DocumentMask, reading_whole
from tritter.data.tokens import TextBounds
from tritter.errors import RequestError
from tritter.methods.experts.adapters import LoraLayers
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import _NO_TOKEN, Evidence, ExpertMixture, RouterKind

END, SIZE = 0, 16


def evidence(*, window: int = 6, number: int = 3) -> Evidence:
    made = Evidence(SIZE, end_of_text_id=END, window=window, prior=0.5, inner_prior=-1.5)
    generator = torch.Generator().manual_seed(3)
    for place in range(number):
        made.add_row()
        shares = torch.rand(SIZE, generator=generator) ** 4
        made.count(place, torch.multinomial(shares, 4000, replacement=True, generator=generator))
    return made


def mixture_of(router: RouterKind = "evidence", *, top_k: int | None = None) -> ExpertMixture:
    """Return a mixture with the base and experts of strong effect, in float64."""
    model = tiny_llama().double().eval()
    options = {"end_of_text_id": END, "window": 6, "prior": 0.5, "inner_prior": -1.5}
    mixture = ExpertMixture(model, router=router, has_base=True, evidence=options)
    size = model.config.vocab_size
    torch.manual_seed(4)
    for number in range(2):
        mixture.add(f"e{number}", AdapterShape(3, 6.0, TARGETS), seed=number)
    with torch.no_grad():
        for name in mixture.adapters:
            for key, parameter in LoraLayers(model).parameters(name).items():
                if ".lora_B." in key:
                    parameter.normal_(std=0.3)
        for each in mixture.routers():
            each.weight.normal_(std=0.3)
    assert mixture.evidence is not None
    for number in range(3):
        shares = torch.rand(size) ** 4
        mixture.evidence.count(number, torch.multinomial(shares, 5000, replacement=True))
    mixture.routing = Routing(top_k=top_k)
    return mixture


def by_hand(made: Evidence, ids: list[int]) -> list[list[float]]:
    """Return the logits of a sequence, token by token from the definition."""
    counts = made.counts.double().tolist()
    totals = [sum(row) for row in counts]
    mean = [
        sum((row[v] + 0.5) / (n + 0.5 * SIZE) for row, n in zip(counts, totals, strict=True)) / 3
        for v in range(SIZE)
    ]
    found = []
    for place in range(len(ids)):
        own: list[int] = []
        prior = made.inner_prior
        for token in reversed(ids[max(0, place - made.window + 1) : place + 1]):
            if token in (END, _NO_TOKEN):
                prior = made.prior if token == END else prior
                break
            own.append(token)
        logits = [
            (prior if e else 0.0)
            + made.scale
            * sum(math.log((counts[e][v] + 1000 * mean[v]) / (totals[e] + 1000)) for v in own)
            for e in range(3)
        ]
        found.append([max(-8.0, each - max(logits)) for each in logits])
    return found


def tokens(*shape: int, seed: int = 0, high: int = SIZE) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def test_logits_are_those_of_the_definition() -> None:
    made, ids = evidence(), tokens(2, 40)
    ids[0, :5] = _NO_TOKEN
    found = made(ids)
    for row in range(2):
        expected = torch.tensor(by_hand(made, ids[row].tolist()), dtype=torch.float64)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-10)
    assert found[1].argmax(-1).unique().numel() > 1, "an evidence that never turns tests nothing"


def test_the_inner_prior_counts_where_no_document_starts_in_sight() -> None:
    made, ids = evidence(), tokens(1, 12, seed=1, high=SIZE - 1) + 1
    ids[0, 3] = END
    inner = made(ids)
    made.inner_prior = None
    plain = made(ids)
    moved = (inner - inner[..., :1] - plain + plain[..., :1])[0, :, 1]  # of 6 tokens in sight
    expected = [-2.0] * 3 + [0.0] * 6 + [-2.0] * 3
    is_inside = (inner[0, :, 1] > -8) & (plain[0, :, 1] > -8) & (inner[0, :, 0] > -8)
    assert is_inside[:3].any() and is_inside[9:].any()
    torch.testing.assert_close(moved[is_inside], torch.tensor(expected).double()[is_inside])


def test_counts_are_seen_at_once_and_rows_come_and_go() -> None:
    made, ids = evidence(), tokens(1, 12, seed=1)
    before = made(ids)
    made.count(2, ids.clamp_min(1).expand(400, -1))
    after = made(ids)
    assert (after[..., 2] - before[..., 2]).max() > 0.1
    made.add_row()
    assert made(ids).shape == (1, 12, 4)
    made.keep_rows([0, 1, 2])
    assert torch.equal(made(ids), after)
    assert made.counts.dtype == torch.int64 and made.bfloat16().counts.dtype == torch.int64


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("router", ["evidence", "both"])
@pytest.mark.parametrize("top_k", [None, 2, 1])
def test_a_later_token_changes_no_earlier_logit(router: RouterKind, top_k: int | None) -> None:
    mixture, ids = mixture_of(router, top_k=top_k), tokens(2, 20, seed=2, high=64)
    changed = ids.clone()
    changed[:, 11] = (ids[:, 11] + 7) % 64
    with torch.no_grad():
        one, other = (mixture.model(input_ids=x, use_cache=False).logits for x in (ids, changed))
    assert (one[:, :11] - other[:, :11]).abs().max() < 1e-12
    assert (one[:, 11:] - other[:, 11:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_goes_on_from_what_was_read() -> None:
    mixture, ids = mixture_of(), tokens(2, 20, seed=5, high=64)
    whole = mixture.model(input_ids=ids, use_cache=False).logits
    cache, name = DynamicCache(), cache_name(mixture.model)
    parts = [
        mixture.model(input_ids=part, **{name: cache}, use_cache=True).logits
        for part in ids.split([9, 1, 1, 9], dim=1)
    ]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12
    with mixture.off():
        foreign = cache_in(mixture.model(input_ids=ids, use_cache=True))
    with pytest.raises(RequestError, match="were not read"):
        mixture.model(input_ids=ids[:, :1], **{name: foreign}, use_cache=True)


@torch.no_grad()
def test_generate_writes_what_single_passes_would() -> None:
    mixture, ids = mixture_of(), tokens(1, 7, seed=8, high=64)
    written = mixture.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=END)
    seen = ids
    for _ in range(written.shape[1] - 7):
        logits = mixture.model(input_ids=seen, use_cache=False).logits
        seen = torch.cat([seen, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, seen)


@torch.no_grad()
def test_beams_take_what_was_read_along() -> None:
    mixture, ids = mixture_of(), tokens(2, 7, seed=8, high=64)
    options = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "pad_token_id": END}
    cached, plain = (mixture.model.generate(ids, use_cache=has, **options) for has in (True, False))
    assert torch.equal(cached, plain)
    with pytest.raises(RequestError, match="assisted generation"):
        mixture.model.generate(ids[:1], max_new_tokens=12, prompt_lookup_num_tokens=3)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("top_k", [None, 1])
@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone(top_k: int | None) -> None:
    mixture = mixture_of("both", top_k=top_k)
    DocumentMask(TextBounds(END)).attach(mixture.model)
    one, two = (tokens(1, length, seed=length, high=63) + 1 for length in (7, 11))
    end = torch.full((1, 1), END)
    packed = torch.cat([end, one, end, two, end, end], dim=1)
    only = torch.cat([end, two], dim=1)
    found = mixture.model(input_ids=packed).logits[:, 8:20]
    assert (found - mixture.model(input_ids=only).logits).abs().max() < 1e-12
    (other,) = mixture_of("both", top_k=top_k).model(input_ids=packed, use_cache=False).logits
    assert (found - other[8:20]).abs().max() > 1e-3, "as one stream it is another"


def test_the_end_of_a_turn_is_inside_its_conversation() -> None:
    made, turns = evidence(), tokens(1, 12, seed=1, high=SIZE - 1) + 1
    turns[0, 6] = END
    made.inner_prior = None
    torch.testing.assert_close(made(turns)[:, 7:], made(turns[:, 6:])[:, 1:])
    marked = torch.cat([turns | CONTEXT, torch.tensor([[END | PADDING]]), turns], dim=1)
    for number in range(3):
        before = made.counts[number, END].item()
        made.count(number, marked)
        assert made.counts[number, END] - before == 1  # neither padding nor the end of a document
    whole = made(turns)
    assert (whole[:, 7:] - made(turns[:, 6:])[:, 1:]).abs().max() > 1e-3
    one_document = copy.deepcopy(made)
    one_document.end_of_text_id = None
    torch.testing.assert_close(whole, one_document(turns))
    is_first = torch.zeros(1, 24, dtype=torch.bool)
    is_first[0, ::12] = True
    torch.testing.assert_close(made(torch.cat([turns, turns], dim=1), is_first)[:, 12:], whole)


@torch.no_grad()
def test_left_padding_does_not_change_a_conversation() -> None:
    mixture = mixture_of(top_k=2)
    assert mixture.evidence is not None
    conversation = tokens(1, 9, seed=3, high=63) + 1
    conversation[:, 4] = END
    mixture.evidence.count(1, conversation | CONTEXT)
    alone = torch.cat([torch.tensor([[END]]), conversation], dim=1)
    padded, mask = torch.nn.functional.pad(alone, (3, 0), value=END), torch.ones(1, 13).long()
    mask[:, :3] = 0
    expected = mixture.evidence(alone)
    mixture.model(input_ids=padded, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(mixture.gates()[0].logits[:, 3:], expected)


@torch.no_grad()
def test_boundaries_are_those_of_the_attention() -> None:
    """A document mask restricts no pass with a mask or a cache of its own."""
    mixture = mixture_of(top_k=2)
    DocumentMask(TextBounds(END)).attach(mixture.model)
    assert mixture.evidence is not None
    conversation = tokens(1, 9, seed=3, high=63) + 1
    conversation[:, 4] = END
    mixture.evidence.count(1, conversation | CONTEXT)
    expected = mixture.evidence(conversation)
    mask, cache = torch.ones_like(conversation), {cache_name(mixture.model): DynamicCache()}
    for options in ({"attention_mask": mask}, cache):
        mixture.model(input_ids=conversation, **options)
        torch.testing.assert_close(mixture.gates()[0].logits, expected)


def test_counts_that_are_assigned_are_used() -> None:
    made, other, ids = evidence(), evidence(), tokens(1, 12, seed=1, high=SIZE - 1) + 1
    other.counts = other.counts.flip(0).clone()
    assert (made(ids) - other(ids)).abs().max() > 1e-3
    counts = other.counts.clone()
    while counts._version < made.counts._version:
        counts += 0
    made.load_state_dict({"counts": counts}, assign=True)
    torch.testing.assert_close(made(ids), other(ids))


def test_counts_made_in_inference_mode_are_used_and_may_change() -> None:
    plain, ids = evidence(), tokens(1, 12, seed=1, high=SIZE - 1) + 1
    with torch.inference_mode():
        made = evidence()
        assert torch.equal(made(ids), plain(ids))
        made.count(1, ids)
    plain.count(1, ids)
    assert torch.equal(made(ids), plain(ids))


@pytest.mark.parametrize("is_read_first", [True, False])
@torch.no_grad()
def test_a_packed_conversation_has_the_logits_it_has_alone(is_read_first: bool) -> None:
    mixture = mixture_of(top_k=2)
    if is_read_first:  # as in a run that adds experts; one that continues them reads later
        mixture.model.model._forward_pre_hooks.clear()
    DocumentMask(TextBounds(END)).attach(mixture.model)
    if is_read_first:
        mixture.model.model.register_forward_pre_hook(mixture._read, with_kwargs=True)
    conversations = tokens(2, 9, seed=3, high=63) + 1
    conversations[:, 4] = END
    marked = conversations | CONTEXT
    marked[:, 0] |= START
    end = torch.tensor([END | PADDING])
    packed = torch.cat([end, marked[0], end, marked[1]])[None]
    assert mixture.evidence is not None
    mixture.evidence.count(1, packed)
    found = mixture.model(input_ids=packed).logits[:, -9:]
    with reading_whole(mixture.model):
        alone = mixture.model(input_ids=conversations[1:], use_cache=False).logits
        cache, name = DynamicCache(), cache_name(mixture.model)
        for each in conversations[1:].split(1, dim=1):
            last = mixture.model(input_ids=each, **{name: cache}, use_cache=True).logits
    assert (found - alone).abs().max() < 1e-10
    assert (last[:, -1] - alone[:, -1]).abs().max() < 1e-10


@torch.no_grad()
def test_no_expert_is_preferred_where_a_document_begins() -> None:
    mixture = mixture_of(top_k=2)
    mixture.add("e2", AdapterShape(3, 6.0, TARGETS), seed=2)
    mixture.model(input_ids=torch.tensor([[5, END, 7, 8]]), use_cache=False)
    (gates,) = mixture.gates()
    base, *new = gates.weights[0, 1].tolist()
    assert new == pytest.approx([new[0]] * 3) and new[0] > base > 0
    assert ((gates.weights[0, [0, 2, 3]] > 0).sum(-1) == 2).all()


@torch.no_grad()
def test_padding_on_the_left_is_no_evidence() -> None:
    mixture, ids = mixture_of(), tokens(1, 10, seed=6, high=63) + 1
    plain = mixture.model(input_ids=ids, use_cache=False).logits
    padded = torch.cat([torch.full((1, 4), 9), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 10)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    found = mixture.model(input_ids=padded, **options).logits[:, 4:]
    assert (found - plain).abs().max() < 1e-10


@torch.no_grad()
def test_an_expert_is_left_out_and_a_copy_has_gates_of_its_own() -> None:
    mixture, ids = mixture_of(), tokens(2, 9, seed=7, high=64)
    with pytest.raises(RequestError, match="no expert e9"), mixture.without("e9"):
        pass
    with mixture.without("e1"):
        mixture.model(input_ids=ids, use_cache=False)
    (gates,) = mixture.gates()
    assert gates.weights[..., 2].abs().max() == 0
    assert torch.allclose(gates.weights.sum(-1), torch.ones(2, 9, dtype=torch.float64))
    plain = mixture.model(input_ids=ids, use_cache=False).logits
    for other in (copy.deepcopy(mixture), pickle.load(io.BytesIO(pickle.dumps(mixture)))):
        other.evidence.counts[1] += 1000
        assert other.evidence is other.model.expert_evidence
        assert (other.model(input_ids=ids, use_cache=False).logits - plain).abs().max() > 1e-6
        assert torch.equal(mixture.model(input_ids=ids, use_cache=False).logits, plain)


def test_the_base_is_an_expert_that_stays() -> None:
    mixture = mixture_of()
    assert mixture.names == ["base", "e0", "e1"] and mixture.adapters == ("e0", "e1")
    with pytest.raises(RequestError, match="base itself"):
        mixture.remove("base")
    mixture.remove("e0")
    assert mixture.names == ["base", "e1"]
    assert mixture.evidence is not None and len(mixture.evidence.counts) == 2
    learned = ExpertMixture(tiny_llama())
    with pytest.raises(RequestError, match=r"experts\.targets = lm_head.*evidence"):
        learned.add("e", AdapterShape(2, 4.0, ("lm_head",)), seed=0)

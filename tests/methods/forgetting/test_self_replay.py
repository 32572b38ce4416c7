"""Generated data: sampling, likelihoods, filtering, and exact mixing."""

import math
import re
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.oracle.families import tiny
from tests.training.test_fit import batches
from tritter.core.families import forward_flops
from tritter.core.models import model_of
from tritter.data.chat import ANSWER, CONTEXT, START, ids_of
from tritter.data.packing import MarkedText
from tritter.data.tokens import TextBounds
from tritter.errors import RequestError, TritterError
from tritter.methods.forgetting import SelfReplay, replay
from tritter.methods.forgetting.replay import (
    _distinct_share,
    _draw,
    _stretch_lengths,
    _write_text,
)
from tritter.training import Preparation, Task


def wrote(model: nn.Module, **changes: Any) -> tuple[Tensor, Tensor]:
    asked = {"num_sequences": 6, "sequence_length": 10, "bounds": TextBounds(5), **changes}
    return _write_text(model, **asked)


def nats_by_hand(model: nn.Module, text: list[int], *, window: int) -> list[float]:
    """Return −log p of every token but the first, each from a separate forward pass."""
    start, nats = 0, []
    for position in range(1, len(text)):
        if position - start > window - 1:
            start = position - window // 2
        with torch.no_grad():
            logits = model(torch.tensor([text[start:position]]), use_cache=False).logits[0, -1]
        nats.append(-float(logits.double().log_softmax(-1)[text[position]]))
    return nats


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_nats_are_those_of_passes_without_a_cache(family: str) -> None:
    model = tiny(family)
    made = {"num_sequences": 4, "sequences_per_text": 2, "batch_size": 1, "temperature": 0.8}
    sequences, mean = wrote(model, **made)
    assert sequences.shape == (4, 10) and sequences.dtype == torch.int32
    for number in range(2):
        text = sequences[2 * number : 2 * number + 2].flatten().tolist()
        assert text[0] == 5
        nats = nats_by_hand(model, text, window=10)
        assert float(mean[2 * number]) == pytest.approx(sum(nats[:9]) / 9, rel=1e-4)
        assert float(mean[2 * number + 1]) == pytest.approx(sum(nats[9:]) / 10, rel=1e-4)


TURNS = ((8 | CONTEXT | START, 9 | CONTEXT), (6 | CONTEXT, 7 | CONTEXT))


def test_every_second_text_consists_of_conversations() -> None:
    """A question ends where an answer opens, an answer where the next question does."""
    model = MarkedText(TextBounds(5)).attach(oracle.tiny_llama(vocab_size=12))
    plain, asked = (wrote(model, sequence_length=90, turns=turns)[0] for turns in ((), TURNS))
    texts, chats = asked[::2], asked[1::2]
    assert torch.equal(texts < 12, torch.ones_like(texts, dtype=torch.bool))
    assert texts[:, 0].tolist() == plain[::2, 0].tolist() == [5, 5, 5]
    for chat in chats.tolist():
        text = "".join("?" if token >= ANSWER and not token & CONTEXT else {
            TURNS[0][0]: "<", TURNS[0][1]: "u", TURNS[1][0]: ">", TURNS[1][1]: "a",
        }[token] for token in chat)  # fmt: skip
        assert re.fullmatch(r"(<u\?*>a\?*)*(<u?\?*|<u\?*>a?\?*)", text), text
        assert text.count("<") > 2
        answers = [part.partition("a")[2] for part in text.split("<")[1:-1]]
        ends = [chat[each.start() - 1] for each in re.finditer("<", text)][1:]
        assert all(answers) and {end & ~ANSWER for end in ends} <= {5, 6}


def test_nats_of_conversations_are_those_of_what_was_drawn() -> None:
    """The end of a question is drawn, and then what else opens the answer is given."""
    bounds = TextBounds(ids_of(TURNS[1][0]))
    model = MarkedText(bounds).attach(oracle.tiny_llama(vocab_size=12))
    sequences, mean = wrote(model, num_sequences=2, sequence_length=40, turns=TURNS, bounds=bounds)
    chat = sequences[1]
    with torch.no_grad():
        logits = model(ids_of(chat)[None].long()).logits[0, :-1].double()
    nats = -logits.log_softmax(-1).gather(1, ids_of(chat)[1:, None].long()).squeeze(1)
    was_drawn = ((chat & CONTEXT) == 0) | (chat == TURNS[1][0])
    assert 0 < was_drawn.sum() < 39
    assert float(mean[1]) == pytest.approx(float(nats[was_drawn[1:]].mean()), rel=1e-4)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("sequences_per_text", [1, 2, 5])
def test_what_is_read_is_what_flops_count(sequences_per_text: int) -> None:
    model = oracle.tiny_llama()
    read: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    wrote(model, num_sequences=sequences_per_text, sequences_per_text=sequences_per_text)
    assert sum(read) == sum(_stretch_lengths(sequences_per_text, 10))
    assert len(read) == 10 * sequences_per_text - 1
    assert max(_stretch_lengths(sequences_per_text, 10)) == 9


def test_logits_are_computed_where_a_token_is_drawn() -> None:
    """64 texts that are continued from 512 tokens would have 34 GB for Gemma 3's vocabulary."""
    model, shapes = oracle.tiny_llama(), list[tuple[int, ...]]()
    model.lm_head.register_forward_hook(lambda *seen: shapes.append(tuple(seen[-1].shape[:2])))
    wrote(model, num_sequences=6, sequences_per_text=2, batch_size=3)
    assert set(shapes) == {(3, 1)}


def test_seeded_and_left_as_it_was() -> None:
    model = oracle.tiny_llama().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first, again, other = wrote(model)[0], wrote(model)[0], wrote(model, seed=1)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not first.is_inference(), "gradients are taken on it later"
    assert len(wrote(model, num_sequences=5, sequences_per_text=3)[0]) == 5


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.79, [0.625, 0.375, 0.0, 0.0]),
        (1.0, 0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (1.0, 1e-9, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_said(temperature: float, top_p: float, expected: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(_draw, temperature=temperature, top_p=top_p, generator=generator)
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20_000, 4)
    counts = Counter(draw(logits).flatten().tolist())
    shares = [counts[token] / 20_000 for token in (1, 3, 0, 2)]
    assert shares == pytest.approx(expected, abs=0.012)
    assert all(share == 0 for share, chance in zip(shares, expected, strict=True) if chance == 0)


def test_distinct_runs() -> None:
    loop = [7] * 8
    pair = [1, 2] * 4
    all_differ = list(range(8))
    shares = _distinct_share(torch.tensor([loop, pair, all_differ]))
    assert shares.tolist() == pytest.approx([1 / 5, 2 / 5, 1.0])
    assert _distinct_share(torch.tensor([[1, 1]])).tolist() == [1.0]


def test_a_model_that_is_broken_writes_nothing() -> None:
    model = oracle.tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(TritterError, match="not finite"):
        wrote(model)


def written_of(nats: list[float], *, loops: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    sequences = oracle.tokens(batch=len(nats), length=12).int()
    sequences[list(loops)] = 3
    return sequences, torch.tensor(nats, dtype=torch.float64)


def test_dropped_sequences_are_reported_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    written = written_of([3.0, 0.1, 2.0, 0.1, 9.0], loops=(0, 1))
    monkeypatch.setattr(replay, "_write_text", lambda *_, **__: written)
    method = SelfReplay(num_sequences=5, sequences_per_text=1)
    found = prepared_by(method, oracle.tiny_llama(), length=12)
    assert torch.equal(found.written, written[0][2:3])
    assert list(found.found["written"].values()) == [2, 1, 1, 1]
    assert found.notes == (
        "self_replay: the model generated 5 sequences of 12 tokens at perplexity 7.39, 1 are "
        "used; dropped: 2 repetitive, 1 with too low a perplexity, 1 with too high a "
        "perplexity.",
    )
    anything = SelfReplay(fraction=0.25, min_distinct=0, min_perplexity=1.0, max_perplexity=1e9)
    assert anything.suitable(*written, vocab_size=97)[0].all()


def test_no_suitable_sequence_is_refused() -> None:
    with pytest.raises(RequestError, match="1 repetitive, 1 with too high"):
        SelfReplay(fraction=0.25).suitable(*written_of([1.0, 8.0], loops=(0,)), vocab_size=97)


def prepared_by(method: SelfReplay, model: nn.Module, *, length: int = 16) -> Any:
    def draw(count: int, *words: str) -> Tensor:
        raise AssertionError("there is no old text")

    return method.prepare(
        Preparation(
            model=model, domains=(), draw=draw, sequence_length=length, bounds=TextBounds(5),
            seed=lambda *words: 0, state={}, log=lambda text: None,
        )
    )  # fmt: skip


def test_what_it_writes_is_mixed_in_exactly_and_paid_for() -> None:
    model = oracle.tiny_llama()
    method = SelfReplay(fraction=0.3, num_sequences=7, sequences_per_text=2)
    prepared = prepared_by(method, model)
    assert prepared.found == {
        "written": {
            "repeat_themselves": 0, "perplexity_too_low": 0, "perplexity_too_high": 0, "kept": 7,
        }
    }  # fmt: skip
    flops = forward_flops(model_of(model))
    assert prepared.flops == 4 * (flops.of(15) + 2 * flops.of(15)), "half a sequence is read again"
    mixed = iter(method.mix(batches(), Task(seed=0, written=prepared.written)))
    plain = iter(batches())
    own = {tuple(row) for row in prepared.written.tolist()}
    replayed, new = 0, []
    for step in range(1, 15):
        batch = next(mixed)
        replayed += int(batch["is_replay"].sum())
        assert replayed == step * 4 * 3 // 10
        assert all(tuple(row) in own for row in batch["input_ids"][batch["is_replay"]].tolist())
        new += batch["input_ids"][~batch["is_replay"]].tolist()
    order = [row for _ in range(14) for row in next(plain)["input_ids"].tolist()]
    assert new == order[: len(new)]


@pytest.mark.parametrize(("per_text", "num_texts"), [(None, 8), (1, 2)])
def test_few_long_sequences_are_several_texts(per_text: int | None, num_texts: int) -> None:
    """Otherwise 3 steps of 2 x 1,024 tokens need 1,023 passes of two texts."""
    model, passes = oracle.tiny_llama(), list[tuple[int, ...]]()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    method = SelfReplay(num_sequences=2, sequences_per_text=per_text)
    prepared = prepared_by(method, model, length=512)
    texts = prepared.written.view(num_texts, -1)
    assert (texts[:, 0] == 5).all() and prepared.written.shape == (2, 512)
    assert len(passes) == texts.shape[1] - 1 and passes[-1] == (num_texts, 1)
    length = texts.shape[1] - 1
    assert SelfReplay.passes(method.options, 512) == (texts.shape[1], num_texts)
    assert prepared.flops == num_texts * forward_flops(model_of(model)).of(length)

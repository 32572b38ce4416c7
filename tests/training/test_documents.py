"""Training on whole documents: loss, masks, counts and resuming respect document boundaries."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests import oracle
from tests.oracle.families import tiny
from tests.training.killed import KillAt
from tests.training.test_fit import SETTINGS, module_of
from tests.training.written import Written
from tritter.core.families import training_flops
from tritter.core.models import model_of
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.packing import DocumentMask, packed
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.evaluation.losses import sequence_losses
from tritter.methods.forgetting import SI, Distill, Replay
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.methods.forgetting.replay import _draw, _Openings, _texts
from tritter.methods.moe_routing.objective import RoutingObjective
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    OptimizerSettings,
    Schedule,
    Task,
    TrainerSettings,
    fit,
    fitting,
    read_metrics,
)

EOT = 0
STEPS = 8
ONE = replace(SETTINGS, save_every_n_steps=2)
TWO = replace(ONE, devices=2, strategy="ddp")
# Much padding, little, and a row that begins within a document
ROWS = torch.tensor(
    [
        [0, 5, 9, 3, 0, 7, 6, 5, 4, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [31, 32, 33, 0, 34, 35, 0, 36, 37, 38, 39, 0, 2, 4, 0, 0],
    ]
)


def split(row: Tensor) -> list[tuple[int, int, list[int]]]:
    """Return begin, end and targets of each document of a row, by its list of tokens."""
    ids = row.tolist()
    begins = [0, *(at for at in range(1, len(ids)) if ids[at] == EOT), len(ids)]
    documents = []
    for begin, end in pairwise(begins):
        targets = ids[begin + 1 : end + 1]
        if end - begin > 1:  # an end of text alone is the last one, or padding
            documents.append((begin, end, targets))
    return documents


def nats_alone(model: nn.Module, row: Tensor) -> tuple[Tensor, int]:
    """Return the sum over a row's documents, each read by itself, and the number of targets."""
    total, count = torch.zeros(()), 0
    for begin, end, targets in split(row):
        logits = model(input_ids=row[None, begin:end], use_cache=False).logits[0]
        said = logits[: len(targets)].float()
        total = total + cross_entropy(said, torch.tensor(targets), reduction="sum")
        count += len(targets)
    return total, count


def document_mask(model: nn.Module) -> nn.Module:
    DocumentMask(TextBounds(EOT)).attach(model)
    return model


def batch_of(rows: Tensor, num_old: int = 0) -> dict[str, Tensor]:
    return {"input_ids": rows, "is_replay": torch.arange(len(rows)) >= len(rows) - num_old}


def test_the_loss_is_the_mean_over_what_is_to_be_predicted() -> None:
    module, alone = module_of(), oracle.tiny_llama(initializer_range=0.05)
    document_mask(module.model)
    told = [nats_alone(alone, row) for row in ROWS]
    expected = sum(nats for nats, _ in told) / sum(count for _, count in told)
    torch.testing.assert_close(module.task_loss(batch_of(ROWS))[0], expected)
    rows = torch.stack([(nats / count).detach() for nats, count in told])
    torch.testing.assert_close(sequence_losses(module.model, ROWS), rows)
    nothing = torch.zeros(2, 16, dtype=torch.int64)
    assert module.task_loss(batch_of(nothing))[0] == 0


def test_the_fisher_is_of_documents_alone() -> None:
    model, alone = document_mask(oracle.tiny_llama()), oracle.tiny_llama()
    expected = {name: torch.zeros_like(p) for name, p in alone.named_parameters()}
    for row in ROWS:
        nats, count = nats_alone(alone, row)
        gradients = torch.autograd.grad(nats / count, list(alone.parameters()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.square() / len(ROWS)
    for name, value in diagonal_fisher(model, ROWS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-8)
    true = diagonal_fisher(model, ROWS, estimator="true")
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in true.values())


@pytest.mark.parametrize("mask_gold", [False, True])
def test_a_teacher_is_asked_about_documents_alone(mask_gold: bool) -> None:
    model, teacher = oracle.tiny_llama().double(), oracle.tiny_llama(hidden_size=16).double()
    losses = []
    for row in ROWS[1:]:
        padding = [at for at in range(1, 16) if row[at] == EOT == row[at - 1]]
        ids = row.tolist()
        begins = [0, *(at for at in range(1, 16) if ids[at] == EOT), 16]
        for begin, end in pairwise(begins):
            q, p = (m(row[None, begin:end], use_cache=False).logits[0] for m in (model, teacher))
            for at in range(begin, end):
                keep = torch.ones(97, dtype=torch.bool)
                if mask_gold and at < 15:
                    keep[row[at + 1]] = False
                log_q, log_p = ((e[at - begin][keep] / 2).log_softmax(-1) for e in (q, p))
                if at not in padding:
                    losses.append(4 * (log_p.exp() * (log_p - log_q)).sum())
    method = Distill(weight=0.7, mask_gold=mask_gold, rows="old")
    method.begin_task(model, Task(seed=0, teacher=document_mask(teacher)))
    batch = batch_of(ROWS, num_old=2)
    logits = document_mask(model)(input_ids=ROWS, use_cache=False).logits
    found = method.extra_loss(model, batch, logits)
    torch.testing.assert_close(found, 0.7 * torch.stack(losses).mean(), rtol=1e-9, atol=0)


def test_si_sees_the_gradient_of_the_loss_that_is_trained() -> None:
    module = module_of()
    model = document_mask(module.model)
    method = SI(si_lambda=1.0)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    method.begin_task(model, Task(seed=0, state={"si_importance": ones}))
    module.task_loss(batch_of(ROWS))[0].backward()
    for rows in (ROWS[:1], ROWS[1:]):  # two batches of a step, weighted by predicted tokens
        method.observe_batch(model, batch_of(rows))
    assert method._own is not None
    for name, parameter in model.named_parameters():
        own = method._own[name] / method._own_tokens
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-7)


def test_what_a_model_writes_begins_anew_at_each_end_of_text() -> None:
    model, alone = document_mask(tiny("gemma3_text").double()), tiny("gemma3_text").double()
    draw = partial(_draw, temperature=3.0, top_p=1.0, generator=torch.Generator().manual_seed(1))
    begin = _Openings(TextBounds(EOT), (), 40, torch.device("cpu"))
    with torch.no_grad():
        texts, costs = _texts(model, begin, 60, 40, draw, show=lambda _: None)
        num_checked = 0
        for text, cost in zip(texts, costs, strict=True):
            ids = text.tolist()
            begins = [0, *(at for at in range(1, 60) if ids[at] == EOT), 60]
            for first, end in pairwise(begins):
                # Of documents longer than the half that is read again, only the start is checked
                stop = end if end < 40 else min(end, first + 20)
                said = alone(text[None, first:stop], use_cache=False).logits[0].float()
                wanted = -said.log_softmax(-1)[:-1].gather(1, text[first + 1 : stop, None])
                if first + 20 <= 40 < stop:  # its beginning is out of sight
                    continue
                torch.testing.assert_close(
                    cost[first + 1 : stop], wanted[:, 0], rtol=1e-4, atol=1e-4
                )
                num_checked += first > 0 and stop - first > 1
    assert num_checked > 10


def test_routers_answer_for_tokens_alone() -> None:
    model = document_mask(tiny("qwen3_moe"))
    options = RoutingOptions(hold_old=1.0)
    rows = torch.tensor([[0, 5, 9, 3, 0, 7, 6, 5, 4, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    wide = torch.cat([rows, torch.zeros(2, 6, dtype=torch.int64)], dim=1)
    wide[1, 10:12] = torch.tensor([10, 11])  # so that both rows end in padding
    found = []
    for ids in (wide[:1], rows[:1], wide):
        objective = RoutingObjective(model, options, encouragement=1.0, new_experts=(2, 3))
        before = tiny("qwen3_moe", initializer_range=0.2)
        objective.hold(before, ids, batch_size=len(ids))
        with objective.routing.recording():
            model(input_ids=ids, use_cache=False)
            terms = objective.terms(batch_of(ids))
            divergence = objective.divergence(model, step=0)
        assert divergence is not None
        found.append({**terms, "old": divergence, "load": objective.counts[0].double()})
    padded, alone, both = found
    assert alone["old"] > 0.01 and alone["new_expert_mass"] > 0.1
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-6)
    assert int(both["load"].sum()) == 2 * (10 + 13)


def sequences_of(num_documents: int, seed: int, *, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (num_documents,), generator=generator)
    total = int(lengths.sum())
    documents = TokenisedDocuments(
        tokens=torch.randint(1, 97, (total,), generator=generator, dtype=torch.int32),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        num_bytes=lengths,
        identifiers=tuple(map(str, range(num_documents))),
    )
    rows = packed(documents, packing="documents", sequence_length=length, bounds=TextBounds(EOT))
    half = rows.clone()  # of some the second half is padding, so that numbers of targets differ
    half[:, length // 2 :] = EOT
    return torch.where(torch.arange(len(rows))[:, None] % 3 == 0, half, rows)


def train(
    folder: Path, settings: TrainerSettings, *watching: Callback, dropout: float = 0.0
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(7)
    model = document_mask(oracle.tiny_llama(initializer_range=0.05, attention_dropout=dropout))
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-3, max_steps=STEPS),
        optimizer=OptimizerSettings(),
        methods=(SI(si_lambda=1e-3), Distill(weight=1.0, rows="both"), Replay(fraction=0.3)),
    )
    told = Task(
        seed=0,
        old_sequences={"old": sequences_of(20, 6)},
        state={"si_importance": ones},
        teacher=document_mask(oracle.tiny_llama()),
    )
    whole, written = fitting._build_trainer, Written(folder.with_name(f"{folder.name}-written"))

    def watched(settings, callbacks, max_steps, *, loggers):  # type: ignore[no-untyped-def]
        return whole(settings, [*watching, *callbacks], max_steps, loggers=loggers)

    new = SequenceStream(sequences_of(30, 5), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_build_trainer", watched)
        result = fit(
            module,
            BatchStream(new, batch_size=4, num_batches=STEPS),
            settings=settings,
            folder=folder,
            label="test",
            console=Console(quiet=True),
            task=told,
            write_result=written,
        )
    written.read_into(model)
    return model, result


def test_tokens_lengths_and_flops_are_those_of_documents(tmp_path: Path) -> None:
    module = module_of(schedule=Schedule(learning_rate=1e-3, max_steps=6))
    document_mask(module.model)
    rows = sequences_of(40, 5)
    stream = SequenceStream(rows, seed=0)
    fit(
        module,
        BatchStream(stream, batch_size=4, num_batches=6),
        settings=SETTINGS,
        folder=tmp_path,
        label="test",
        console=Console(quiet=True),
    )
    again = SequenceStream(rows, seed=0).next_sequences(24)
    lengths = Counter(
        end - begin
        for row in again
        for begin, end in pairwise([0, *(at for at in range(1, 16) if row[at] == EOT), 16])
        if not (row[begin] == EOT and begin and row[begin - 1] == EOT)
    )
    flops = training_flops(model_of(module.model))
    (logged,) = [row for row in read_metrics(tmp_path) if row["step"] == "6"]
    told = module.trainer.callbacks  # type: ignore[attr-defined]
    work = next(one for one in told if type(one).__name__ == "WorkCount")
    assert work.lengths == lengths and 1 in lengths
    assert work.tokens == sum(length * n for length, n in lengths.items())
    assert work.tokens + work.padding == 24 * 16
    assert work.flops == pytest.approx(sum(n * flops.of(length) for length, n in lengths.items()))
    record = work.packing()
    assert record["padding_fraction"] == pytest.approx(1 - work.tokens / (24 * 16))
    histogram = record["packed_sequence_length_histogram"]
    assert list(histogram) == ["2-3", "4-7", "8-15", "16-31"]
    assert sum(histogram.values()) == sum(lengths.values()) - lengths[1]
    last = sum(int(row[at] == EOT == row[at - 1]) for row in again[16:] for at in range(1, 16))
    assert float(logged["performance/padding_fraction"]) == pytest.approx(last / (8 * 16))


def test_the_logged_loss_is_that_of_all_batches_of_a_step(tmp_path: Path) -> None:
    module, alone = module_of(), oracle.tiny_llama(initializer_range=0.05)
    document_mask(module.model)
    module.schedule = Schedule(learning_rate=1e-30, max_steps=3)  # the weights stay
    rows = sequences_of(40, 5)
    fit(
        module,
        BatchStream(SequenceStream(rows, seed=0), batch_size=4, num_batches=6, window=2),
        settings=replace(SETTINGS, log_every_n_steps=1, arguments={"accumulate_grad_batches": 2}),
        folder=tmp_path,
        label="test",
        console=Console(quiet=True),
    )
    expected = []
    for step in SequenceStream(rows, seed=0).next_sequences(24).split(8):
        with torch.no_grad():
            told = [nats_alone(alone, row) for row in step.long()]
        expected.append(float(sum(nats for nats, _ in told) / sum(count for _, count in told)))
    logged = [float(row["train/loss"]) for row in read_metrics(tmp_path) if row.get("train/loss")]
    assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
@pytest.mark.skipif(fitting.start_method("cpu") != "fork", reason="spawning takes seconds")
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    one, expected = train(tmp_path / "one", ONE)
    two, result = train(tmp_path / "two", TWO)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), parameter, rtol=0, atol=1e-5)
    same = {"seconds": 0.0, "update_norms": {}}
    assert replace(result, **same) == replace(expected, **same)
    assert 0.1 < result.packing["padding_fraction"] < 0.5
    losses = [
        [float(row["train/loss"]) for row in read_metrics(tmp_path / name) if row["train/loss"]]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.full
def test_bitwise_as_if_never_killed(tmp_path: Path) -> None:
    whole, expected = train(tmp_path / "whole", ONE, dropout=0.2)
    with pytest.raises(Exception, match="killed"):
        train(tmp_path / "parts", ONE, KillAt(5), dropout=0.2)
    parts, result = train(tmp_path / "parts", ONE, dropout=0.2)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)

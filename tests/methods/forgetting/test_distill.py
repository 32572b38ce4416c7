"""Distillation compared with the plain formula on whole models; the teacher is not trained."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.core.families.model_types import example
from tests.oracle.families import OWN, tiny
from tests.training.test_fit import SETTINGS, module_of, task
from tests.training.test_fit import batches as batches_of
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import backbone_of, head_of
from tritter.data.batches import BatchStream, SequenceStream
from tritter.methods.forgetting import Distill, Replay, SelfReplay, build_methods
from tritter.methods.forgetting.distill import _Rows
from tritter.methods.growth.growable import GrowableCausalLM
from tritter.targets import Component
from tritter.training import BaseModule, Task, fit, read_metrics
from tritter.training.checkpoint_io import SafetensorsCheckpointIO


def begun(model: nn.Module, teacher: nn.Module, **options: Any) -> Distill:
    method = Distill(weight=0.7, **options)
    method.begin_task(model, replace(task(model), teacher=teacher.requires_grad_(False)))
    return method


def batch_of(num_old: int) -> dict[str, Tensor]:
    input_ids = oracle.tokens(batch=4, length=6)
    return {"input_ids": input_ids, "is_replay": torch.arange(4) >= 4 - num_old}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("mask_gold", [False, True])
@pytest.mark.parametrize("rows", ["new", "old", "both"])
def test_loss_and_gradients_are_those_of_the_formula(rows: _Rows, mask_gold: bool) -> None:
    model, teacher = oracle.tiny_llama().double(), oracle.tiny_llama(hidden_size=16).double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    method = begun(model, teacher, rows=rows, temperature=2.0, mask_gold=mask_gold)
    batch = batch_of(num_old=1)
    ids, is_old = batch["input_ids"], batch["is_replay"]
    logits = model(input_ids=ids).logits
    found = method.extra_loss(model, batch, logits)
    gradients = torch.autograd.grad(found, list(model.parameters()))

    chosen = {"new": ~is_old, "old": is_old, "both": is_old | ~is_old}[rows]
    losses = []
    said, wanted = model(input_ids=ids[chosen]).logits, teacher(input_ids=ids[chosen]).logits
    for row, sequence in enumerate(ids[chosen]):
        for place in range(len(sequence)):
            keep = torch.ones(97, dtype=torch.bool)
            if mask_gold and place + 1 < len(sequence):
                keep[sequence[place + 1]] = False
            q, p = ((each[row, place][keep] / 2).softmax(-1) for each in (said, wanted))
            losses.append(4 * (p * (p.log() - q.log())).sum())
    expected = 0.7 * torch.stack(losses).mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    slopes = torch.autograd.grad(expected, list(model.parameters()))
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-12)


def test_a_batch_without_such_rows_adds_nothing() -> None:
    model = oracle.tiny_llama()
    method, batch = begun(model, oracle.tiny_llama(), rows="old"), batch_of(num_old=0)
    loss = method.extra_loss(model, batch, model(input_ids=batch["input_ids"]).logits)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert float(loss.detach()) == 0 and not any(bool(g.any()) for g in gradients)
    assert method.observe_step(model, 1) == 0


def test_the_teacher_drops_out_nothing() -> None:
    model, batch = oracle.tiny_llama(), batch_of(num_old=1)
    method = begun(model, oracle.tiny_llama(attention_dropout=0.5).train())
    loss = method.extra_loss(model, batch, model(input_ids=batch["input_ids"]).logits)
    assert abs(float(loss.detach())) < 1e-6


@pytest.mark.parametrize(("others", "kind"), [([], "new"), ([SelfReplay], "old")])
def test_by_default_it_reads_what_another_method_replays(others: list[Any], kind: _Rows) -> None:
    chosen = [Component(name=k.name, kind=k, options=k.Options()) for k in (Distill, *others)]
    model, batch = oracle.tiny_llama(), batch_of(num_old=2)
    teacher = oracle.tiny_llama(hidden_size=16)
    losses = []
    for method in (build_methods(chosen)[0], Distill(rows=kind)):
        method.begin_task(model, Task(seed=0, teacher=teacher))
        logits = model(input_ids=batch["input_ids"]).logits
        losses.append(float(method.extra_loss(model, batch, logits).detach()))
    assert losses[0] == losses[1] > 0


def test_without_marks_all_rows_are_new() -> None:
    model, teacher = oracle.tiny_llama(), oracle.tiny_llama(initializer_range=0.1)
    ids = oracle.tokens(batch=4, length=6)
    logits = model(input_ids=ids).logits
    new, both = (
        begun(model, teacher, rows=rows).extra_loss(model, {"input_ids": ids}, logits)
        for rows in ("new", "both")
    )
    assert float(new.detach()) == float(both.detach()) > 0


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("family", OWN)
def test_a_teacher_of_any_family_says_the_same_in_parts(family: str) -> None:
    model = tiny(family)
    ids = oracle.tokens(model.config.vocab_size, batch=2, length=5)
    with torch.no_grad():
        hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        head = head_of(model)
        assert head is not None
        parts = [head(hidden.flatten(0, 1)[n : n + 3]) for n in range(0, 10, 3)]
    whole = oracle.logits(model, ids).flatten(0, 1)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("modernbert-decoder", {}), ("falcon_h1", {"lm_head_multiplier": 0.04})],
)
def test_a_teacher_without_a_table_says_what_its_class_says(
    model_type: str, changes: dict[str, Any]
) -> None:
    model = Twin.of({**example(model_type), **changes}).model.float().eval()
    ids = torch.randint(3, 60, (2, 11))
    logits = model(input_ids=ids, use_cache=False).logits.detach()
    loss = begun(model, model).extra_loss(model, {"input_ids": ids}, logits)
    assert abs(float(loss)) < 1e-6


def test_in_bfloat16_a_teacher_computes_what_the_stock_model_does(tmp_path: Path) -> None:
    """The frequencies of rotary positions, which no file has, stay in float32."""
    teacher = oracle.tiny_llama()
    teacher.save_pretrained(tmp_path)
    stock, ids = oracle.stock(tmp_path, torch.bfloat16), oracle.tokens(length=64)
    begun(stock, teacher)
    assert torch.equal(oracle.logits(stock, ids), oracle.logits(teacher, ids))
    wrapped = GrowableCausalLM(oracle.tiny_llama(), enable_growth=False)
    begun(stock, wrapped)
    assert {each.dtype for each in wrapped.parameters()} == {torch.bfloat16}


def test_the_softcap_of_logits_is_the_teachers_own() -> None:
    model = tiny("gemma3_text")
    model.config.final_logit_softcapping = 0.5
    ids = oracle.tokens(model.config.vocab_size, batch=1, length=5)
    head = head_of(model)
    assert head is not None
    with torch.no_grad():
        said = head(backbone_of(model)(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(said, oracle.logits(model, ids))
    assert float(said.abs().max()) <= 0.5


def trained(folder: Path, teacher: nn.Module, *methods: Any) -> BaseModule:
    from tritter.terminal import Console

    module = module_of(*methods)
    fit(
        module,
        batches_of(),
        settings=replace(SETTINGS, save_every_n_steps=4),
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=replace(task(module.model), teacher=teacher.requires_grad_(False)),
    )
    return module


def test_the_teacher_is_not_trained_not_saved_and_let_go(tmp_path: Path) -> None:
    teacher = oracle.tiny_llama(hidden_size=16)
    before = copy.deepcopy(teacher.state_dict())
    method = Distill(weight=1.0)
    module = trained(tmp_path, teacher, method, Replay(fraction=0.25))
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {id(p) for p in module.parameters()}.isdisjoint({id(p) for p in teacher.parameters()})
    own = {f"model.{name}" for name in module.model.state_dict()}
    assert set(module.state_dict()) == own | {"_extra_state"}
    saved = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "saved")
    assert len(saved["state_dict"]) == len(module.state_dict())
    slots = [n for group in saved["optimizer_states"][0]["param_groups"] for n in group["params"]]
    assert len(slots) == len([*module.model.parameters()])
    assert saved["callbacks"]["ForgettingCallback"]["distill"] == {}
    assert method._teacher is None


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 8])
def test_replayed_rows_count_the_same_in_accumulated_batches(tmp_path: Path, count: int) -> None:
    """Two of eight rows are old; most of the accumulated batches have none."""
    new, old = (oracle.tokens(batch=40, length=16, seed=seed).int() for seed in (1, 2))
    from tritter.terminal import Console

    found, logged = [], []
    for parts in (1, count):
        module = module_of(Distill(weight=3.0, rows="old"), Replay(fraction=0.25))
        fit(
            module,
            BatchStream(SequenceStream(new, seed=0), batch_size=8 // parts, window=parts),
            settings=replace(
                SETTINGS, gradient_clip_val=0.0, arguments={"accumulate_grad_batches": parts}
            ),
            folder=tmp_path / str(parts),
            label="test",
            console=Console(quiet=True),
            task=replace(
                task(module.model),
                old_sequences={"old": old},
                teacher=oracle.tiny_llama(initializer_range=0.1).requires_grad_(False),
            ),
        )
        found.append(module.model.get_parameter("model.norm.weight").detach().clone())
        rows = read_metrics(tmp_path / str(parts))
        logged.append([float(row["forgetting/distill/loss"]) for row in rows])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert logged[1] == pytest.approx(logged[0], rel=1e-3) and min(logged[0]) > 0


@pytest.mark.full
def test_the_more_it_weighs_the_nearer_the_student_stays(tmp_path: Path) -> None:
    teacher, ids = oracle.tiny_llama(initializer_range=0.05), oracle.tokens(batch=8, length=16)
    document_mask = {}
    for weight in (0.0, 10.0):
        module = trained(tmp_path / str(weight), teacher, Distill(weight=weight))
        said, wanted = (
            oracle.logits(each, ids).log_softmax(dim=-1) for each in (module.model, teacher)
        )
        document_mask[weight] = float((wanted.exp() * (wanted - said)).sum(dim=-1).mean())
    assert document_mask[10.0] < 0.5 * document_mask[0.0]

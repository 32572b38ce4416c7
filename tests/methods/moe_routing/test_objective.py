"""Training with experts: balance, stable routing, opening and freezing, and resume."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from tests import oracle
from tests.core.stock_routers.models import tiny_moe
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SETTINGS
from tests.training.written import Written
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.replay import ReplayBuffer
from tritter.methods.moe_routing.objective import RoutingObjective, _routing_divergence
from tritter.methods.moe_routing.opening import ExpertOpening, Unfreezing
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    WriteResult,
    fit,
    fitting,
    read_metrics,
)
from tritter.training.fitting import start_method

SEQUENCES = oracle.tokens(vocab_size=97, batch=40, length=16, seed=5).int()
UNHELD = RoutingOptions(auxiliary_loss=0.0, z_loss=0.0)


def collapsed() -> nn.Module:
    """Return a model that routes most tokens to the first experts of each layer."""
    model = tiny_moe("mixtral", initializer_range=0.05)
    routing = RouterControl.of(model)
    assert routing is not None
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 0.2  # a component shared by all tokens
        for layer in routing.layers:
            routing.router(layer).weight[:2, 0] += torch.tensor([0.6, 0.5])
    return model


def run(
    model: nn.Module,
    folder: Path,
    *,
    settings: RoutingOptions = UNHELD,
    encouragement: float = 0.0,
    new_experts: Sequence[int] = (),
    old: tuple[Tensor, int] | None = None,
    steps: int = 20,
    learning_rate: float = 1e-2,
    controls: Sequence[Callback] = (),
    save_every_n_steps: int = 0,
    trainer: TrainerSettings = SETTINGS,
    replayed: float = 0.0,
    write_result: WriteResult | None = None,
) -> FitResult:
    objective = RoutingObjective(
        model, settings, encouragement=encouragement, new_experts=new_experts
    )
    if old is not None:
        objective.hold(model, old[0], batch_size=old[1])
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=learning_rate, max_steps=steps, shape="constant"),
        optimizer=OptimizerSettings(),
        side_losses=[objective],
    )
    gathered = trainer.arguments.get("accumulate_grad_batches", 1)
    stream = SequenceStream(SEQUENCES, seed=0)
    batches = BatchStream(stream, batch_size=4, num_batches=steps * gathered)
    if replayed:
        batches = ReplayBuffer.of_domains({"old": SEQUENCES}, seed=1).mixed_into(batches, replayed)
    return fit(
        module,
        batches,
        settings=replace(trainer, save_every_n_steps=save_every_n_steps),
        folder=folder,
        label="test",
        console=Console(quiet=True),
        controls=controls,
        write_result=write_result,
    )


def max_load(model: nn.Module) -> float:
    routing = RouterControl.of(model)
    assert routing is not None
    with routing.recording(), torch.no_grad():
        model(input_ids=SEQUENCES.long())
        loads = [torch.bincount(r.selected.flatten(), minlength=4) for r in routing.recorded()]
    return max(float(load.max() / load.float().mean()) for load in loads)


@pytest.mark.full
@pytest.mark.parametrize(
    "settings", [replace(UNHELD, auxiliary_loss=0.1), replace(UNHELD, bias_update_rate=0.02)],
    ids=["auxiliary loss", "selection bias"],
)  # fmt: skip
def test_balancing_lowers_the_largest_load(tmp_path: Path, settings: RoutingOptions) -> None:
    free, balanced = collapsed(), collapsed()
    assert max_load(free) > 1.7
    run(free, tmp_path / "free", steps=60, learning_rate=2e-3)
    run(balanced, tmp_path / "balanced", settings=settings, steps=60, learning_rate=2e-3)
    assert max_load(balanced) < 1.45
    assert max_load(balanced) < max_load(free) - 0.15


def test_a_refused_step_moves_no_selection_bias(tmp_path: Path) -> None:
    model = collapsed()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    result = run(model, tmp_path, settings=replace(UNHELD, bias_update_rate=0.02), steps=3)
    routing = RouterControl.of(model)
    assert result.refused_steps == 3
    assert routing is not None and not bool(routing.selection_bias(0).any())


def test_the_selection_bias_is_no_part_of_what_is_saved(tmp_path: Path) -> None:
    model = collapsed()
    run(model, tmp_path, settings=replace(UNHELD, bias_update_rate=0.02), steps=5)
    routing = RouterControl.of(model)
    assert routing is not None and bool(routing.selection_bias(0).any())
    assert not any("bias" in name for name in model.state_dict())


@pytest.mark.full
def test_terms_and_statistics_are_logged(tmp_path: Path) -> None:
    model = tiny_moe("qwen3_moe")
    run(
        model,
        tmp_path,
        settings=RoutingOptions(hold_old=0.1),
        encouragement=0.1,
        new_experts=(3,),
        old=(SEQUENCES, 2),
    )
    row = next(csv.DictReader((tmp_path / "metrics.csv").open()))
    logged = {name.removeprefix("routing/") for name in row if name.startswith("routing/")}
    assert logged == {
        "auxiliary_loss", "z_loss", "new_expert_mass", "old_divergence", "entropy", "max_load",
        "dropped_fraction",
    }  # fmt: skip
    assert 1.9 < float(row["routing/auxiliary_loss"]) < 4 and float(row["routing/max_load"]) >= 1
    routing = RouterControl.of(model)
    assert routing is not None and not routing.is_recording


def test_the_selection_bias_moves_once_a_step_by_the_load_of_all_its_batches(
    tmp_path: Path,
) -> None:
    settings, counts = replace(UNHELD, bias_update_rate=0.01), list[Tensor]()

    class Counting(Callback):
        """Adds up the choices of the last layer's router, batch by batch."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            routing = RouterControl.of(pl_module.model)
            assert routing is not None
            selected = routing.recorded()[-1].selected.flatten()
            counts.append(torch.bincount(selected, minlength=routing.num_experts))

    model = tiny_moe("mixtral")
    trainer = replace(SETTINGS, arguments={"accumulate_grad_batches": 3})
    run(model, tmp_path, settings=settings, steps=1, controls=[Counting()], trainer=trainer)
    assert len(counts) == 3
    load = torch.stack(counts).sum(dim=0).double()
    routing = RouterControl.of(model)
    assert routing is not None
    moved = routing.selection_bias(routing.layers[-1])
    torch.testing.assert_close(moved.double(), 0.01 * (load.mean() - load).sign())


def test_the_loss_is_that_of_the_task_plus_the_weighted_terms() -> None:
    model = tiny_moe("mixtral")
    options = RoutingOptions(auxiliary_loss=0.5, z_loss=0.25)
    objective = RoutingObjective(model, options, encouragement=2.0, new_experts=(2, 3))
    batch = {"input_ids": SEQUENCES[:3].long(), "is_replay": torch.tensor([False, False, True])}
    with objective.routing.recording():
        model(input_ids=batch["input_ids"])
        records = objective.routing.recorded()
        terms = objective.terms(batch)
    new = torch.stack([r.probabilities[: 2 * 16, 2:].sum(dim=-1).mean() for r in records]).mean()
    torch.testing.assert_close(terms["new_expert_mass"], new)
    expected = 0.5 * terms["auxiliary_loss"] + 0.25 * terms["z_loss"] - 2 * new
    torch.testing.assert_close(objective.weighted(terms), expected)
    assert not any(record.logits.requires_grad for record in objective.records)


def test_a_batch_that_is_all_replayed_encourages_nothing() -> None:
    model = tiny_moe("mixtral")
    objective = RoutingObjective(model, RoutingOptions(), encouragement=2.0, new_experts=(2, 3))
    batch = {"input_ids": SEQUENCES[:1].long(), "is_replay": torch.tensor([True])}
    with objective.routing.recording():
        model(input_ids=batch["input_ids"])
        terms = objective.terms(batch)
    assert terms["new_expert_mass"] == 0 and objective.weighted(terms).isfinite()


def routing_of(model: nn.Module, sequences: Tensor, *, batch_size: int) -> RoutingObjective:
    objective = RoutingObjective(model, UNHELD)
    objective.hold(model, sequences, batch_size=batch_size)
    return objective


def divergence(model: nn.Module, old: RoutingObjective, sequences: Tensor) -> Tensor:
    routing = RouterControl.of(model)
    assert routing is not None
    with routing.recording(), torch.no_grad():
        model(input_ids=sequences.long())
        pairs = zip(old.old_probabilities, routing.recorded(), strict=True)
        return torch.stack(
            [_routing_divergence(p.flatten(0, 1), r.logits) for p, r in pairs]
        ).mean()


@pytest.mark.full
def test_old_routing_is_held(tmp_path: Path) -> None:
    text = oracle.tokens(vocab_size=97, batch=12, length=16, seed=9).int()
    moved = {}
    for weight in (0.0, 1.0):
        model = tiny_moe("mixtral")
        old = routing_of(model, text, batch_size=4)
        assert float(divergence(model, old, text)) == pytest.approx(0, abs=1e-6)
        settings, held = replace(UNHELD, hold_old=weight), (text, 4) if weight else None
        run(model, tmp_path / str(weight), settings=settings, old=held, steps=40)
        moved[weight] = float(divergence(model, old, text))
    assert moved[0.0] > 0.02 and moved[1.0] < moved[0.0] / 4


def test_old_text_is_gone_through_in_turn() -> None:
    old = routing_of(tiny_moe("mixtral"), SEQUENCES[:5], batch_size=2)
    assert [old.old_rows(step).tolist() for step in range(3)] == [[0, 1], [2, 3], [4, 0]]
    assert [p.shape for p in old.old_probabilities] == [(5, 16, 4)] * 3


class Watch(Callback):
    """Record the actions of opening and freezing before each step."""

    def __init__(self, model: nn.Module) -> None:
        self.routing = RouterControl.of(model)
        self.parameter = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        self.offsets: list[float] = []
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        assert self.routing is not None
        self.offsets.append(float(self.routing.offset(0)[3]))
        self._before = self.parameter.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.moved.append(not torch.equal(self.parameter, self._before))


def test_experts_are_opened_and_the_base_unfrozen_step_by_step(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    watch = Watch(model)
    opening = ExpertOpening(AddedExperts(experts=(3,)), anneal_steps=4)
    held = Unfreezing([watch.parameter], after_steps=3)
    run(model, tmp_path, steps=6, controls=(opening, held, watch))
    assert watch.offsets == [-torch.inf, -15, -10, -5, 0, 0]
    assert watch.moved == [False, False, False, True, True, True]


@pytest.mark.full
@pytest.mark.parametrize("kills", [(3,), (7,), (10, 12)], ids=str)
def test_bitwise_as_if_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, ...]
) -> None:
    """With bias, stable routing, opening and unfreezing; an interrupted run resumes from disk."""

    def train(folder: Path, kill_at: int | None = None) -> nn.Module:
        model = tiny_moe("mixtral", initializer_range=0.05)
        settings = RoutingOptions(bias_update_rate=0.01, hold_old=0.1)
        parameter = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        controls = (
            ExpertOpening(AddedExperts(experts=(2, 3)), anneal_steps=9),
            Unfreezing([parameter], after_steps=8),
        )
        if kill_at is not None:
            _kill_at(kill_at, monkeypatch)
        try:
            run(
                model,
                folder,
                settings=settings,
                old=(SEQUENCES[:6], 2),
                steps=14,
                controls=controls,
                save_every_n_steps=5,
            )
        finally:
            monkeypatch.undo()
        return model

    whole = train(tmp_path / "whole")
    for step in kills:
        with pytest.raises(Killed):
            train(tmp_path / "parts", kill_at=step)
    parts = train(tmp_path / "parts")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, parts.get_parameter(name)), name
    first, second = RouterControl.of(whole), RouterControl.of(parts)
    assert first is not None and second is not None
    for layer in first.layers:
        assert torch.equal(first.selection_bias(layer), second.selection_bias(layer))
        assert torch.equal(first.offset(layer), second.offset(layer))


def _kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Callable[..., object] = fitting._build_trainer

    def with_killer(settings, callbacks, max_steps, *, loggers):  # type: ignore[no-untyped-def]
        return whole(settings, [KillAt(step), *callbacks], max_steps, loggers=loggers)

    monkeypatch.setattr(fitting, "_build_trainer", with_killer)


@pytest.mark.full
@pytest.mark.skipif(start_method("cpu") != "fork", reason="spawning takes seconds")
def test_two_processes_give_the_weights_and_the_routing_of_one(tmp_path: Path) -> None:
    """The balance is that of the whole batch, and opened experts stay open after a resume."""
    models = {}
    for strategy, devices in (("auto", 1), ("ddp", 2)):
        model = tiny_moe("mixtral", initializer_range=0.05)
        written = Written(tmp_path / f"{strategy}-written")
        run(
            model,
            tmp_path / strategy,
            settings=RoutingOptions(bias_update_rate=0.01),
            encouragement=0.1,
            new_experts=(3,),
            steps=6,
            learning_rate=1e-3,
            replayed=0.75,  # so that the second process has no new rows
            controls=(ExpertOpening(AddedExperts(experts=(3,)), anneal_steps=12),),
            trainer=replace(SETTINGS, strategy=strategy, devices=devices),
            write_result=written,
        )
        written.read_into(model)
        models[strategy] = model
    one, two = models.values()
    for name, parameter in one.named_parameters():
        assert (two.get_parameter(name) - parameter).abs().max() < 1e-5, name
    first, second = RouterControl.of(one), RouterControl.of(two)
    assert first is not None and second is not None
    assert float(second.offset(0)[3]) == -10
    for layer in first.layers:
        assert torch.equal(first.selection_bias(layer), second.selection_bias(layer))
        assert torch.equal(first.offset(layer), second.offset(layer))
    rows = [read_metrics(tmp_path / strategy) for strategy in models]
    names = {name for name in rows[0][0] if name.startswith("routing/")}
    assert {"routing/max_load", "routing/entropy", "routing/dropped_fraction"} <= names
    for name in names:
        of_one, of_two = ([float(row[name]) for row in each if row.get(name)] for each in rows)
        assert of_two == pytest.approx(of_one, rel=1e-4) and of_one, name


def test_a_stock_balance_loss_is_not_added_to_ours(tmp_path: Path) -> None:
    def trained(*, adds_its_own: bool) -> nn.Module:
        model = tiny_moe("mixtral", output_router_logits=adds_its_own, router_aux_loss_coef=10.0)
        run(model, tmp_path / str(adds_its_own), steps=3)
        return model

    plain, stock = trained(adds_its_own=False), trained(adds_its_own=True)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, stock.get_parameter(name)), name

"""A live training under an Adam of bitsandbytes is changed: its moments, held to codes by hand."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

import tritter
from tests import oracle
from tests.training.killed import KillAt, Killed
from tests.training.test_surgery import (
    AT,
    ONE,
    SPECS,
    WIDER,
    Grow,
    assert_same_end,
    small_model,
    train,
)
from tritter.core.expansions import Dus
from tritter.errors import TritterError
from tritter.training import OptimizerSettings
from tritter.training.parameters import live_layout
from tritter.training.surgery import (
    _moments_by_name,
    _read_eight_bit,
    _write_eight_bit,
    carried_moments,
    put_moments,
)
from tritter.transform.live import ModelExpander

# FFN matrices have 960 numbers before and 1,440 after: coded in both, in neither, in the second
CODED, FLOAT, CROSSING = 64, 10_000, 1_000
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
OLD, NEW, BLOCK = 40, 60, 256
# Half of the widest gap between two codes; of those with a sign also what −1 is short of
ERRORS = {"1": 0.0071, "2": 0.0036}


def settings(smallest: int = CODED, name: str = "AdamW8bit") -> OptimizerSettings:
    return OptimizerSettings(
        target=f"bitsandbytes.optim.{name}",
        arguments={"betas": [0.9, 0.95], "min_8bit_size": smallest},
    )


def numbers(state: dict[str, Any], suffix: str) -> Tensor:
    """Return the values of the codes, entry by entry from the tables."""
    held = state[f"state{suffix}"]
    if held.dtype == torch.float32:
        return held
    scales = state[f"absmax{suffix}"].repeat_interleave(BLOCK)[: held.numel()]
    return state[f"qmap{suffix}"][held.long()] * scales.view(held.shape)


def bound(state: dict[str, Any], suffix: str) -> Tensor:
    """Return the maximum quantisation error of a value."""
    held = state[f"state{suffix}"]
    if held.dtype == torch.float32:
        return torch.zeros_like(held)
    scales = state[f"absmax{suffix}"].repeat_interleave(BLOCK)[: held.numel()]
    return scales.view(held.shape) * ERRORS[suffix]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


class Noting(Grow):
    """Notes what the optimizer holds right before and right after the change, by name."""

    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:
            self.before = self._held(trainer, pl_module.model)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self.after = self._held(trainer, pl_module.model)

    def _held(self, trainer: Any, model: nn.Module) -> dict[str, dict[str, Any]]:
        states = trainer.optimizers[0].state
        return {name: copied(states[p]) for name, p in model.named_parameters() if p in states}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("smallest", [CODED, FLOAT, CROSSING])
def test_old_entries_keep_their_moments_and_new_ones_begin_at_zero_and_the_mean(
    tmp_path: Path, smallest: int
) -> None:
    noted = Noting()
    train(tmp_path, noted, optimizer=settings(smallest))
    for name, cut in ((UP, (slice(OLD), slice(None))), (DOWN, (slice(None), slice(OLD)))):
        before, after = noted.before[name], noted.after[name]
        assert after["step"] == AT and isinstance(after["step"], int)
        for suffix in "12":
            held = after[f"state{suffix}"]
            assert held.dtype == (torch.float32 if smallest == FLOAT else torch.uint8)
            assert numbers(before, suffix).count_nonzero() > 900
            wanted = torch.zeros(NEW, 24) if name == UP else torch.zeros(24, NEW)
            wanted += numbers(before, suffix).mean() if suffix == "2" else 0.0
            wanted[cut] = numbers(before, suffix)
            error = (numbers(after, suffix) - wanted).abs()
            assert bool((error <= bound(after, suffix) + 1e-12).all()), (name, suffix)
            is_new = torch.ones_like(wanted, dtype=torch.bool)
            is_new[cut] = False
            assert suffix == "2" or not numbers(after, suffix)[is_new].any()
            if smallest != FLOAT:
                assert len(after[f"absmax{suffix}"]) == -(-OLD * 36 // BLOCK) == 6
    same = [n for n in noted.before if "mlp" not in n]
    for name in same:
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(noted.after[name][k]))
            for k, v in noted.before[name].items()
        ), name
    assert len(same) > 10


def test_blocks_that_do_not_shift_keep_their_bits(tmp_path: Path) -> None:
    """Of 40 rows of 24 three blocks are full; without the codes from before some bits change."""
    noted = Noting()
    train(tmp_path, noted, optimizer=settings())
    names = [n for n in noted.before if n.endswith(("up_proj.weight", "gate_proj.weight"))]
    num_blocks, again = OLD * 24 // BLOCK, 0
    for name in names:
        for suffix in "12":
            before, after = noted.before[name], noted.after[name]
            kept = num_blocks * BLOCK
            old, new = (each[f"state{suffix}"].view(-1)[:kept] for each in (before, after))
            scales = before[f"absmax{suffix}"][:num_blocks]
            assert torch.equal(old, new), name
            assert torch.equal(scales, after[f"absmax{suffix}"][:num_blocks]), name
            values = numbers(before, suffix).view(-1)[:kept].view(num_blocks, BLOCK)
            again += int((values.abs().amax(1) != scales).sum())
    assert len(names) == 6 and again > 3


def test_a_layer_that_moves_as_it_is_keeps_its_bits(tmp_path: Path) -> None:
    noted = Noting([Dus(identity_init=False)])
    train(tmp_path, noted, optimizer=settings())
    kinds = ("state1", "absmax1", "state2", "absmax2")
    names = [n for n in noted.after if ".mlp." in n]
    stems = {
        name: [
            old
            for old, held in noted.before.items()
            if held["state1"].shape == noted.after[name]["state1"].shape
            and old.split(".")[3:] == name.split(".")[3:]
            and all(torch.equal(held[k], noted.after[name][k]) for k in kinds)
        ]
        for name in names
    }
    assert all(stems.values()) and len(names) > 9
    assert any(name not in held for name, held in stems.items())


def test_codes_are_the_nearest_and_scales_the_largest() -> None:
    """Codes by trying all 256, for what the optimizer is given without a state from before."""
    parameter = nn.Parameter(torch.randn(30, 50, generator=torch.Generator().manual_seed(0)))
    optimizer = bitsandbytes.optim.Adam8bit([parameter], min_8bit_size=CODED)
    first = torch.randn(30, 50, generator=torch.Generator().manual_seed(1)) ** 3
    values = {"exp_avg": first, "exp_avg_sq": first.square(), "step": torch.tensor(7.0)}
    _write_eight_bit(optimizer, parameter, values)
    state = optimizer.state[parameter]
    for kind, suffix in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        blocks = values[kind].view(-1).split(BLOCK)
        assert torch.equal(state[f"absmax{suffix}"], torch.stack([b.abs().max() for b in blocks]))
        scaled = torch.cat([block / block.abs().max() for block in blocks])
        distances = (scaled[:, None] - state[f"qmap{suffix}"]).abs()
        found = distances.gather(1, state[f"state{suffix}"].view(-1, 1).long())
        # bitsandbytes looks codes up on a grid of its own, on the CPU
        assert float((found - distances.amin(1, keepdim=True)).max()) < 2e-4
    read = _read_eight_bit(state, parameter.device)
    assert torch.equal(read["exp_avg"], numbers(state, "1")) and int(read["step"]) == 7
    fresh = bitsandbytes.optim.Adam8bit([parameter], min_8bit_size=CODED)
    parameter.grad = torch.ones_like(parameter)
    fresh.step()
    assert fresh.state[parameter].keys() == state.keys()
    for key, value in fresh.state[parameter].items():
        assert type(state[key]) is type(value)
        if isinstance(value, Tensor):
            assert (state[key].shape, state[key].dtype) == (value.shape, value.dtype), key


@pytest.mark.full
@pytest.mark.parametrize("kill_at", [AT + 1, AT + 3])
@pytest.mark.parametrize("optimizer", [
    settings(), settings(FLOAT), settings(CROSSING), settings(name="PagedAdamW8bit"),
], ids=["8 bits", "float32", "float32 before", "paged"])  # fmt: skip
def test_bits_are_the_same_when_killed_after_it(
    tmp_path: Path, optimizer: OptimizerSettings, kill_at: int
) -> None:
    every = replace(ONE, save_every_n_steps=2)
    train(tmp_path / "whole", Grow(), settings=every, optimizer=optimizer)
    with pytest.raises(Killed):
        train(tmp_path / "parts", Grow(), KillAt(kill_at), settings=every, optimizer=optimizer)
    train(tmp_path / "parts", Grow(), settings=every, optimizer=optimizer)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.full
@pytest.mark.parametrize("specs", [SPECS["depth"], SPECS["hidden"]], ids=["depth", "hidden"])
def test_other_changes_go_on_as_well(tmp_path: Path, specs: Any) -> None:
    train(tmp_path, Grow(specs), optimizer=settings())


def with_random_gradients(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], *, steps: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the update of each step; all gradient entries have the same magnitude."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        yield {name: (p.detach() - before[name]).abs() for name, p in parameters.items()}


@pytest.mark.parametrize("smallest", [CODED, FLOAT, CROSSING])
@pytest.mark.parametrize("is_mean", [True, False], ids=["mean", "zero"])
def test_new_rows_do_not_leap(smallest: int, is_mean: bool) -> None:
    """After 400 steps; with second moments of zero instead, which must be seen, they do."""
    old, names = small_model(), (UP, DOWN)
    held = {name: old.get_parameter(name) for name in names}
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "min_8bit_size": smallest}
    optimizer = bitsandbytes.optim.AdamW8bit(held.values(), **options)
    list(with_random_gradients(optimizer, held, steps=400, seed=1))
    change = ModelExpander(WIDER, seed=3).change(old)
    stored_tensors = [s for s in change.after if s.name in names]
    moments = carried_moments(optimizer, old, change, stored_tensors=stored_tensors)
    new = ModelExpander(WIDER, seed=3).expand(old)
    grown = {name: new.get_parameter(name) for name in names}
    own = bitsandbytes.optim.AdamW8bit(grown.values(), **options)
    for name, values in moments.items():
        if not is_mean:
            values["exp_avg_sq"][values["exp_avg"] == 0] = 0.0
        put_moments(own, grown[name], values, before=optimizer.state[held[name]])
    largest = {name: [0.0, 0.0] for name in names}
    for moved in with_random_gradients(own, grown, steps=20, seed=2):
        for name, row in ((UP, moved[UP]), (DOWN, moved[DOWN].T)):
            for which, part in enumerate((row[:OLD], row[OLD:])):
                largest[name][which] = max(largest[name][which], float(part.max()))
    for of_old, of_new in largest.values():
        assert (of_new <= 1.5 * of_old) == is_mean, largest


@pytest.mark.parametrize("name", ["Lion8bit", "AdEMAMix8bit", "LAMB8bit"])
def test_others_of_bitsandbytes_are_refused(name: str) -> None:
    model = oracle.tiny_llama()
    optimizer = getattr(bitsandbytes.optim, name)(model.parameters(), lr=0.0)
    oracle.gradients(model, oracle.tokens())
    optimizer.step()
    with pytest.raises(TritterError, match=f"{name} has no exp_avg, exp_avg_sq"):
        _moments_by_name(optimizer, model, live_layout(model))


def test_a_plain_loop_with_eight_bits_continues_after_growth() -> None:
    ids, model = oracle.tokens(), oracle.tiny_llama()
    grown = tritter.grow(model, "schedule", growth_cooldown=2, max_growth_per_step=4)
    optimizer = bitsandbytes.optim.AdamW8bit(grown.parameters(), lr=1e-4, min_8bit_size=16)
    born = 0
    for _ in range(5):
        loss = grown(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        grown.update_loss(loss)
        born += grown.check_and_grow()["born"]
        optimizer.zero_grad()
    assert born and all(p.isfinite().all() for p in grown.parameters())


@pytest.mark.parametrize(
    ("kind", "more", "name"),
    [(torch.optim.AdamW, {"amsgrad": True}, "max_exp_avg_sq"), (torch.optim.NAdam, {}, "mu_prod")],
)
def test_adams_with_more_state_are_refused(kind: Any, more: Any, name: str) -> None:
    model = oracle.tiny_llama()
    optimizer = kind(model.parameters(), lr=0.0, **more)
    oracle.gradients(model, oracle.tokens())
    optimizer.step()
    with pytest.raises(TritterError, match=f"{kind.__name__} has also {name}"):
        _moments_by_name(optimizer, model, live_layout(model))


def test_what_is_not_finite_gets_no_code(tmp_path: Path) -> None:
    class Spoiling(Grow):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == self.at:
                held = trainer.optimizers[0].state[pl_module.model.get_parameter(UP)]
                held["absmax1"][1] = float("nan")
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    with pytest.raises(TritterError, match="exp_avg is not finite"):
        train(tmp_path, Spoiling(), optimizer=settings())


def test_blocks_of_another_size_are_told() -> None:
    parameter = nn.Parameter(torch.zeros(30, 50))
    optimizer = bitsandbytes.optim.Adam8bit([parameter], min_8bit_size=CODED)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {**optimizer.state[parameter], "absmax1": torch.zeros(1)}
    with pytest.raises(
        TritterError, match="1 scales for 1500 values; Tritter supports blocks of 256 values"
    ):
        _read_eight_bit(state, parameter.device)

"""Adam's moments from one training to the next, held to a bare AdamW that never stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests import oracle
from tests.oracle.families import tiny
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SETTINGS
from tritter.checkpoints.state import LazyTensors, State, copy_states, read_state, write_state
from tritter.core.expansions import ExpansionSpec, LlamaPro, MoeAdd, Width
from tritter.core.families import family_of
from tritter.core.models import disk_tensors, load_model, named_tensors
from tritter.core.parameter_map.carry import MOMENTS, carry, is_state_reset
from tritter.data.batches import BatchStream, SequenceStream
from tritter.errors import TritterError
from tritter.methods.moe_routing.stages import only_trainable, separate_experts
from tritter.storage.writer import TensorStream
from tritter.training import BaseModule, OptimizerSettings, Schedule, TrainerSettings, fit, fitting
from tritter.training.moments import MomentKeeper, moments_of
from tritter.transform import expand

RATE, SETTINGS_OF_ADAM = 1e-3, OptimizerSettings(weight_decay=0.01)
PLAIN = replace(SETTINGS, gradient_clip_val=None)
SEQUENCES = oracle.tokens(vocab_size=97, batch=40, length=16, seed=5).int()


def train(
    model: nn.Module,
    folder: Path,
    *,
    batches: Tensor,
    state: State | None = None,
    settings: TrainerSettings = PLAIN,
    optimizer: OptimizerSettings | None = None,
) -> State:
    """Train on batches [N, B, T], from a state or from scratch; return the final state."""
    num_batches, batch_size, length = batches.shape
    stream = _InOrder(batches.reshape(num_batches * batch_size, length), seed=0)
    module = BaseModule(
        model,
        schedule=Schedule(
            learning_rate=RATE, max_steps=num_batches, shape="constant", warmup_ratio=0.0
        ),
        optimizer=optimizer or SETTINGS_OF_ADAM,
        moments=None if state is None else moments_of(state, model),
    )
    fit(
        module,
        BatchStream(stream, batch_size=batch_size, num_batches=num_batches),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        observers=[MomentKeeper(folder / "moments")],
    )
    left = read_state(folder / "moments")
    assert left is not None
    return left


class _InOrder(SequenceStream):
    """Sequences as they stand, so that two training runs can share them."""

    def _move_to(self, *, epoch: int, position: int) -> None:
        super()._move_to(epoch=epoch, position=position)
        self._order = torch.arange(len(self))


def bare(model: nn.Module, batches: Tensor) -> torch.optim.AdamW:
    """Take AdamW's steps without anything of ours."""
    groups = [
        [p for p in model.parameters() if (p.ndim >= 2) is matrix] for matrix in (True, False)
    ]
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": SETTINGS_OF_ADAM.weight_decay},
         {"params": groups[1], "weight_decay": 0.0}],
        lr=RATE, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    model.train()
    for batch in batches.long():
        adam.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        adam.step()
    return adam


def distance(first: nn.Module, second: nn.Module) -> float:
    others = dict(second.named_parameters())
    return max(float((p - others[n]).abs().max()) for n, p in first.named_parameters())


BATCHES = SEQUENCES[:36].view(12, 3, 16)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2_moe"])
def test_two_trainings_with_carried_moments_are_one_of_a_bare_adamw(
    tmp_path: Path, family: str
) -> None:
    options = {"initializer_range": 0.05}
    whole, parts, without = (tiny(family, **options) for _ in range(3))
    adam = bare(whole, BATCHES)
    first = train(parts, tmp_path / "first", batches=BATCHES[:7])
    without.load_state_dict(parts.state_dict())
    last = train(parts, tmp_path / "second", batches=BATCHES[7:], state=first)
    train(without, tmp_path / "without", batches=BATCHES[7:])
    assert first.step == 7 and last.step == 12 and not last.other_steps
    assert distance(parts, whole) < 2e-6
    assert distance(without, whole) > 1e-3  # what is lost without them
    held = {kind: dict(LazyTensors(tensors)) for kind, tensors in last.kinds.items()}
    assert set(held) == set(MOMENTS)
    config = whole.config.to_dict()
    wanted = tiny(family, **options)
    for kind in MOMENTS:
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                wanted.get_parameter(name).copy_(adam.state[parameter][kind])
        for name, value in disk_tensors(config, wanted.state_dict()).items():
            assert torch.allclose(held[kind][name], value, rtol=1e-4, atol=1e-9), (kind, name)


def _with_moments(tmp_path: Path, model: nn.Module) -> Path:
    """Save a model that was trained for 6 steps, with its moments."""
    left = train(model, tmp_path / "before", batches=BATCHES[:6])
    oracle.saved(model, tmp_path / "source")
    copy_states([left], tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.full
def test_after_an_exact_width_the_first_update_is_the_mapped_update(tmp_path: Path) -> None:
    """The state after one step of the grown model is the mapped state after one of the small."""
    source = _with_moments(tmp_path, tiny("llama"))
    spec = Width(hidden_size=48, intermediate_size=80, init="net2net", shares="equal")
    grown = expand(source, tmp_path / "grown", [spec])
    mapped_before = read_state(grown.folder)
    assert mapped_before is not None and mapped_before.step == 6
    small, large = load_model(source), load_model(grown.folder)
    before = dict(named_tensors(load_model(grown.folder), large.config.to_dict()))
    of_small = train(small, tmp_path / "s", batches=BATCHES[6:7], state=read_state(source))
    of_large = train(large, tmp_path / "l", batches=BATCHES[6:7], state=mapped_before)
    assert of_small.step == of_large.step == 7
    (step,) = grown.steps
    for name, tensor_map in step.parameter_map.tensors.items():
        disk_name = _disk_name(large, name)
        expected = {
            kind: carry(tensor_map, of_small.kinds[kind].get(_disk_name(small, name)), kind)
            for kind in MOMENTS
        }
        for kind in MOMENTS:
            found = of_large.kinds[kind].get(disk_name)
            scale = float(expected[kind].abs().max())
            assert torch.allclose(found, expected[kind], rtol=2e-3, atol=1e-4 * scale), name
        first = expected["exp_avg"] / (1 - 0.9**7)
        second = (expected["exp_avg_sq"] / (1 - 0.95**7)).sqrt() + 1e-8
        decayed = before[disk_name] * (1 - RATE * 0.01 * (len(tensor_map.axes or ()) > 1))
        after = dict(named_tensors(large, large.config.to_dict()))[disk_name]
        moved, wanted = after - before[disk_name], decayed - RATE * first / second
        # Where the second moment is tiny, eps decides and maps do not scale it
        is_large = second > 1e-4
        assert is_large.any()
        assert torch.allclose(
            moved[is_large], (wanted - before[disk_name])[is_large], rtol=2e-2, atol=RATE * 2e-2
        ), name


def _disk_name(model: nn.Module, logical: str) -> str:
    config = model.config.to_dict()
    (name,) = (t.disk_name for t in family_of(config).logical_tensors(config) if t.name == logical)
    return name


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "spec"),
    [("llama", LlamaPro()), ("mixtral", MoeAdd(num_experts=2, init="clone"))],
    ids=["new blocks", "new experts"],
)
def test_what_is_new_begins_anew_with_steps_of_its_own(
    tmp_path: Path, family: str, spec: ExpansionSpec
) -> None:
    source = _with_moments(tmp_path, tiny(family))
    grown = expand(source, tmp_path / "grown", [spec])
    model = load_model(grown.folder)
    left = train(model, tmp_path / "l", batches=BATCHES[6:9], state=read_state(grown.folder))
    config = model.config.to_dict()
    (step,) = grown.steps
    fresh = {
        _disk_name(model, name)
        for name, tensor_map in step.parameter_map.tensors.items()
        if is_state_reset(tensor_map, "exp_avg")
    }
    assert fresh
    assert set(left.kinds["exp_avg"].files) == {name for name, _ in named_tensors(model, config)}
    if family == "llama":
        steps = {name: left.step_of(name) for name in left.kinds["exp_avg"].files}
        assert {n for n, count in steps.items() if count == 3} == fresh
        assert {n for n, count in steps.items() if count == 9} == set(steps) - fresh
    else:  # experts share a parameter, and its count
        assert left.step == 9 and not left.other_steps


@pytest.mark.full
def test_steps_of_its_own_follow_the_next_expansion(tmp_path: Path) -> None:
    source = _with_moments(tmp_path, tiny("llama"))
    grown = expand(source, tmp_path / "grown", [LlamaPro()])
    model = load_model(grown.folder)
    left = train(model, tmp_path / "l", batches=BATCHES[6:9], state=read_state(grown.folder))
    oracle.saved(model, tmp_path / "again")
    copy_states([left], tmp_path / "again")
    wider = read_state(
        expand(tmp_path / "again", tmp_path / "wider", [Width(hidden_size=48)]).folder
    )
    assert wider is not None and left.other_steps
    assert (wider.step, wider.other_steps) == (left.step, left.other_steps)


def test_frozen_parameters_take_up_none_and_leave_none(tmp_path: Path) -> None:
    source = _with_moments(tmp_path, tiny("llama"))
    model, state = load_model(source), read_state(source)
    assert state is not None
    with only_trainable(model, lambda tensor: tensor.layer == 1):
        assert {name.split(".")[2] for name in moments_of(state, model)} == {"1"}
        left = train(model, tmp_path / "l", batches=BATCHES[6:8], state=state)
    for kind in MOMENTS:
        assert all(".layers.1." in name for name in left.kinds[kind].files)
    assert left.step == 8


def test_experts_that_stand_apart_have_moments_of_their_own(tmp_path: Path) -> None:
    source = _with_moments(tmp_path, tiny("mixtral"))
    model, state = load_model(source), read_state(source)
    assert state is not None
    with separate_experts(model, 3), only_trainable(model, lambda tensor: tensor.expert == 3):
        found = moments_of(state, model)
        assert found and all(name.endswith("_new") for name in found)
        left = train(model, tmp_path / "l", batches=BATCHES[6:8], state=state)
    names = set(left.kinds["exp_avg"].files)
    assert names and all(".experts.3." in name for name in names)
    assert len(names) == 3 * 3 and left.step == 8
    one = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert not torch.equal(left.kinds["exp_avg"].get(one), state.kinds["exp_avg"].get(one))


@pytest.mark.full
@pytest.mark.parametrize("kill_at", [2, 5])
def test_a_killed_training_goes_on_with_them_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    source = _with_moments(tmp_path, tiny("llama"))
    saving = replace(PLAIN, save_every_n_steps=2)

    def run(folder: str) -> tuple[nn.Module, State]:
        model, state = load_model(source), read_state(source)
        return model, train(
            model, tmp_path / folder, batches=BATCHES[6:], state=state, settings=saving
        )

    whole, expected = run("whole")
    make = fitting.build_trainer

    def with_killer(settings, callbacks, max_steps, *, loggers):  # type: ignore[no-untyped-def]
        return make(settings, [KillAt(kill_at), *callbacks], max_steps, loggers=loggers)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "build_trainer", with_killer)
        with pytest.raises(Killed):
            run("parts")
    assert (tmp_path / "parts/saved").exists()
    parts, left = run("parts")
    assert distance(parts, whole) == 0.0
    assert left.step == expected.step == 12
    for kind in MOMENTS:
        first, second = dict(LazyTensors(left.kinds[kind])), dict(LazyTensors(expected.kinds[kind]))
        assert all(torch.equal(first[name], second[name]) for name in second)


def test_moments_that_are_none_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    name = "model.norm.weight"
    for number, (first, second, message) in enumerate(
        [
            (torch.zeros(5), torch.zeros(5), "shape"),
            (torch.full((24,), float("nan")), torch.zeros(24), "not a valid Adam moment"),
            (torch.zeros(24), -torch.ones(24), "not a valid Adam moment"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        kinds = {
            "exp_avg": TensorStream.of([(name, first)]),
            "exp_avg_sq": TensorStream.of([(name, second)]),
        }
        write_state(folder, kinds, step=3)
        state = read_state(folder)
        assert state is not None
        with pytest.raises(TritterError, match=message):
            moments_of(state, model)

"""Runs that do not fit into memory are rejected early: estimates and messages."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.config.conftest import FakePipeline, Result
from tritter.config.launch.composition import load_config
from tritter.config.schema import RunConfig
from tritter.core.families import Model
from tritter.core.models import new_model
from tritter.data.tokens import TextBounds
from tritter.launched import Launch
from tritter.methods.experts.adapters import is_of_adapter
from tritter.planning import run_memory as memory
from tritter.planning.run_memory import RunMemory, _Need
from tritter.training import OptimizerSettings

Run = Callable[..., Result]
GB = 10**9


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the memory of the machine to a number of bytes."""
    return lambda size: monkeypatch.setattr(memory, "machine_memory", lambda: size)


def held(*words: str) -> dict[str, _Need]:
    config = load_config([*words])
    return {each.model: each for each in RunMemory(config, config.base_model()).needs()}


@pytest.fixture
def no_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse only what is exact, as for a machine whose memory a run exceeds less than twice."""
    monkeypatch.setattr(memory, "_TOO_MUCH", float("inf"))


# So few tokens that their estimated activations do not matter
SHORT = ("data.batch_size=4", "data.sequence_length=8")


def problems(config: RunConfig) -> str:
    return " ".join(map(str, RunMemory(config, config.base_model()).problems()))


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    run: Run, pipeline: FakePipeline, has: Callable[[int], None]
) -> None:
    has(8 * GB)
    result = run("model=tritter_14b")
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    assert "trainer.check_memory = true: training the grown model with 5" in result.err
    assert "this machine has 8.0 GB; at most about " in result.err
    assert "trainer.check_memory=false disables this check" in result.err
    assert run("model=tritter_14b", "trainer.check_memory=false").code == 0
    assert run("model=tritter_14b", "--cfg", "job").code == 0
    assert run("model=tiny").code == 0


@pytest.mark.full
def test_all_jobs_of_a_sweep_are_looked_at_first(
    run: Run, pipeline: FakePipeline, has: Callable[[int], None]
) -> None:
    has(8 * GB)
    result = run("-m", "model=tiny,tritter_7b,tritter_14b")
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    assert "job 2 (model=tritter_14b): trainer.check_memory = true" in result.err
    assert "job 1 (model=tritter_7b): trainer.check_memory = true" in result.err


@pytest.mark.full
def test_a_finished_run_is_not_looked_at(run: Run, has: Callable[[int], None]) -> None:
    assert run("hydra.run.dir=here").code == 0
    has(1)
    assert "nothing to do" in run("hydra.run.dir=here").out
    assert run().code == 2


def test_what_a_training_holds_by_hand() -> None:
    """In float32: weights, gradients and two moments in 16 bytes, a step counter per tensor."""
    found = held("model=tiny", "trainer=cpu", "expansion=llama_pro", "forgetting=[ewc,l2sp]",
                 "control=true")  # fmt: skip
    assert list(found) == ["the base", "the grown model", "the control"]
    base, grown = found["the base"], found["the grown model"]
    for each in found.values():
        assert 0 <= each.states - 16 * each.parameters < 1000
        assert (each.start, each.processes) == (4 * each.parameters, 1)
        assert each.activations > 0
    assert base.copies == 0
    assert grown.copies == 24 * grown.parameters  # anchors, importances, and ewc estimates again
    assert grown.parameters > base.parameters == found["the control"].parameters


def test_methods_without_copies_hold_none() -> None:
    assert held("forgetting=replay")["the grown model"].copies == 0


def test_parts_of_weights_and_activations_computed_again_take_less() -> None:
    whole = held("trainer=ddp", "model=small")["the base"]
    part = held("trainer=fsdp", "model=small")["the base"]
    assert (part.states, part.processes) == (-(-whole.states // 2), 2)
    again = held("trainer=ddp", "trainer.activation_checkpointing=true", "model=small")["the base"]
    assert again.activations < whole.activations and again.states == whole.states


def test_machines_share_states_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("trainer=fsdp", "model=small", "forgetting=replay")
    alone = held(*words)["the base"]
    launch = Launch("srun", rank=0, count=4, local_rank=0, local_count=2)
    monkeypatch.setattr(Launch, "of", lambda: launch)
    shared = held(*words)["the base"]
    assert (shared.states, shared.processes) == (-(-alone.states // 2), alone.processes)
    assert shared.activations == alone.activations // 2


def test_a_note_says_that_activations_computed_again_would_fit(
    has: Callable[[int], None],
) -> None:
    words = ["model=small", "data.batch_size=512", "data.sequence_length=512"]
    config = load_config(words)
    source = config.base_model()
    needed = max(each.states + each.activations for each in RunMemory(config, source).needs())
    has(needed * 3 // 4)
    (note,) = RunMemory(config, source).notes()
    assert note.endswith("trainer.activation_checkpointing=true, with which it fits")


@pytest.mark.full
def test_half_precision_halves() -> None:
    words = ("model=tiny", "forgetting=ewc", "expansion=none")
    whole = held(*words, "trainer.precision=32-true")["the model"]
    half = held(*words, "trainer.precision=bf16-true")["the model"]
    assert half.copies * 2 == whole.copies
    assert half.start == whole.start  # it is taken before the training converts anything
    assert half.states == pytest.approx(whole.states / 2, rel=0.01)


def test_only_new_blocks_have_gradients_and_moments() -> None:
    words = ("model=tiny", "trainer=cpu", "expansion=llama_pro")
    grown = held(*words, "expansion.llama_pro.new_blocks_only=true")["the grown model"]
    base = held(*words)["the base"]
    new = grown.parameters - base.parameters
    assert 0 <= grown.states - 4 * grown.parameters - 12 * new < 1000


def test_what_is_frozen_has_no_gradients_and_no_moments() -> None:
    words = ("model=tiny", "trainer=cpu", "expansion=llama_pro", "control=true")
    freeze = (*words, "forgetting=freeze")
    base = load_config([*words]).base_model()
    fewer = base.with_layers([0] * (base.sizes.num_hidden_layers - 1))
    layer = base.num_parameters - fewer.num_parameters
    found = held(*freeze, "forgetting.freeze.layers=1-2")
    for model in ("the grown model", "the control"):
        each = found[model]
        assert 0 <= each.states - 16 * each.parameters + 12 * 2 * layer < 1000
    for until in ("0.5", "10"):  # it thaws, and all of it is held then
        thaws = held(*freeze, "forgetting.freeze.layers=1-2", f"forgetting.freeze.until={until}")
        assert thaws["the grown model"].states == held(*words)["the grown model"].states
    new = held(*words[:-1], "forgetting=freeze", "forgetting.freeze.new_only=true")
    grown, before = new["the grown model"], new["the base"].parameters
    assert 0 <= grown.states - 4 * grown.parameters - 12 * (grown.parameters - before) < 1000


def test_of_experts_only_the_adapters_have_gradients_and_moments() -> None:
    words = ("model=tiny", "trainer=cpu", "control=true", "expansion=none")
    full = held(*words)["the control"]
    for experts, number in (("single_lora", 1), ("dylora", 4)):
        asked = (*words, f"experts={experts}", "experts.rank=3")
        asked += ("experts.max_experts=4", "experts.top_k=2") if number > 1 else ()
        config = load_config([*asked])
        source = config.base_model()
        model = new_model(source, seed=0)
        assert config.experts is not None
        begun = config.experts.kind(**config.experts.arguments)
        begun.begin(model, bounds=TextBounds(0), seed=0)
        of_one = (p.numel() for n, p in model.named_parameters() if is_of_adapter(n))
        adapters = number * sum(of_one)
        found = held(*asked)
        assert found["the control"] == full
        (name,) = {*found} - {"the base", "the control"}
        assert 0 <= found[name].states - 4 * full.parameters - 16 * adapters < 1000, name


@pytest.mark.full
def test_a_teacher_is_held_once_in_the_machines_memory(has: Callable[[int], None]) -> None:
    words = ["model=tiny", "expansion=llama_pro", "forgetting=[distill,replay]", *SHORT]
    config = load_config([*words, "trainer=ddp", "trainer.devices=4"])
    base, grown = RunMemory(config, config.base_model()).needs()
    assert (base.teacher, grown.teacher) == (0, 4 * base.parameters)
    needed = 4 * grown.device + grown.start + grown.teacher
    has(needed)
    assert not problems(config)
    has(needed - 1)
    assert problems(config)
    assert held(*words, "trainer.precision=bf16-true")["the grown model"].teacher == (
        2 * base.parameters
    )


@pytest.mark.full
def test_of_rounds_the_largest_counts() -> None:
    found = held("model=tiny", "pipeline.target_params=700k")
    assert found["the grown model"].parameters == pytest.approx(700_000, rel=0.1)
    words = ("model=tiny", "pipeline.target_params=400k", "expansion=llama_pro", "trainer=cpu")
    grown = held(*words, "expansion.llama_pro.new_blocks_only=true")["the grown model"]
    assert 4 * grown.parameters < grown.states < held(*words)["the grown model"].states


@pytest.mark.full
def test_each_process_holds_all(has: Callable[[int], None]) -> None:
    config = load_config(["model=tiny", "trainer=ddp", "trainer.devices=4", "expansion=none",
                          "forgetting=replay", *SHORT])  # fmt: skip
    base, one = RunMemory(config, config.base_model()).needs()
    assert (one.processes, one.start) == (4, base.start)
    needed = 4 * base.device + base.start
    has(needed)
    assert not problems(config)
    has(needed - 1)
    assert "for each of 4 processes" in problems(config)
    assert "it fits with trainer.strategy=auto trainer.devices=1" in problems(config)


def test_what_would_fit_is_tried_before_it_is_said(has: Callable[[int], None]) -> None:
    config = load_config(["model=tritter_350m", "expansion=none", "forgetting=[l2sp,replay]",
                          "trainer=cpu"])  # fmt: skip
    base, model = RunMemory(config, config.base_model()).needs()
    has(model.device + model.start)
    assert not problems(config)
    has(base.device + base.start - 10**6)
    message = problems(config)
    assert "'forgetting=" not in message  # the base would not fit either
    assert "it fits with trainer.precision=bf16-true" in message
    assert "it fits with model=tritter_125m" in message
    config = load_config(["model=tritter_350m", "expansion=width", "forgetting=[ewc,replay]",
                          "trainer=cpu"])  # fmt: skip
    grown = list(RunMemory(config, config.base_model()).needs())[1]
    has(grown.states + grown.start)
    assert "it fits with 'forgetting=[replay]'" in problems(config)


def test_an_estimate_of_twice_the_memory_is_refused(
    run: Run, pipeline: FakePipeline, has: Callable[[int], None]
) -> None:
    words = ["model=tiny", "expansion=none", "forgetting=none", "trainer=cpu"]
    words += ["data.batch_size=512", "data.sequence_length=512"]
    config = load_config(words)
    _, need = RunMemory(config, config.base_model()).needs()
    needed = need.device + need.start + need.activations
    has(needed // 2 - 1000)
    result = run(*words)
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    assert "data.batch_size = 512: training the base on 512 sequences of 512" in result.err
    assert run(*words, "trainer.check_memory=false").code == 0
    has(needed // 2 + 1000)
    assert run(*words).code == 0  # a note


def test_a_context_that_needs_too_much_is_named(
    run: Run, pipeline: FakePipeline, has: Callable[[int], None]
) -> None:
    """Training reads windows of the target length, however short those of the base are."""
    words = ["model=tiny", "trainer=cpu", "expansion=context", "forgetting=none"]
    words += ["data.batch_size=4", "data.sequence_length=128"]
    words += ["model.max_position_embeddings=128", "expansion.context.target_length=8192"]
    config = load_config(words)
    *_, need = RunMemory(config, config.base_model()).needs()
    needed = need.device + need.start + need.activations
    has(needed // 2 - 1000)
    result = run(*words)
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    assert "training the grown model on 1 sequences of 8,192 tokens" in result.err
    advice = "; reduce data.batch_size or expansion.context.target_length"
    assert advice in result.err and "sequence_length" not in result.err
    has(needed - 1000)
    (note,) = RunMemory(config, config.base_model()).notes()
    assert advice in note


def test_one_line_says_what_training_needs(has: Callable[[int], None]) -> None:
    has(8 * GB)
    config = load_config(["model=tiny", "expansion=none", "forgetting=ewc"])
    line = RunMemory(config, config.base_model()).line()
    need = held("model=tiny", "expansion=none", "forgetting=ewc")["the model"]
    needed = (need.device + need.start + need.activations + memory._LIBRARIES) / 1e6
    assert f"about {needed:.1f} MB of the 8.0 GB of this machine" in line
    assert "activations" in line and "copies" in line


@pytest.mark.usefixtures("no_estimates")
def test_activations_are_a_note(has: Callable[[int], None]) -> None:
    config = load_config(["model=tiny", "expansion=none", "forgetting=none", "trainer=cpu"])
    base, model = RunMemory(config, config.base_model()).needs()
    has(base.device + base.start)
    assert not problems(config)
    (note,) = RunMemory(config, config.base_model()).notes()
    assert note.startswith("memory: training the base may require ")
    assert "with activations (estimated), but this machine has " in note
    has(base.device + base.start + max(base.activations, model.activations))
    assert RunMemory(config, config.base_model()).notes() == ()
    has(0)
    assert RunMemory(replace(config, trainer=replace(config.trainer, check_memory=False)),
                           config.base_model()).problems() == []  # fmt: skip


def test_where_the_system_does_not_tell_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: None)
    config = load_config(["model=tritter_14b"])
    assert RunMemory(config, config.base_model()).problems() == []
    assert RunMemory(config, config.base_model()).notes() == ()


@pytest.mark.usefixtures("no_estimates")
def test_on_a_gpu_its_memory_counts(
    monkeypatch: pytest.MonkeyPatch, has: Callable[[int], None]
) -> None:
    config = load_config(["model=tiny", "expansion=none", "trainer=gpu"])
    base, _ = RunMemory(config, config.base_model()).needs()
    size = SimpleNamespace(total_memory=base.device)
    # torch built for GPUs queries them at each step once it reports one
    kept = config.optimizer.kept_per_parameter()
    monkeypatch.setattr(OptimizerSettings, "kept_per_parameter", lambda optimizer: kept)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: size)
    has(base.start)
    assert not problems(config)
    size.total_memory -= 1
    assert "but the GPU has" in problems(config)
    size.total_memory += 1
    has(base.start - 1)
    assert "but this machine has" in problems(config)


@pytest.mark.full
def test_a_checkpoint_is_looked_at_too(
    run: Run, tmp_path: Path, has: Callable[[int], None]
) -> None:
    place = tmp_path.parent / f"{tmp_path.name}-base"
    place.mkdir()
    shapes: dict[str, Any] = load_config(["model=tritter_1b"]).base_model().config
    (place / "config.json").write_text(json.dumps(shapes))
    for name in ("model.safetensors", "tokenizer.json"):
        (place / name).write_text("")
    has(8 * GB)
    words = ("model=hf", f"model.path={place}", "expansion=none")
    result = run(*words)
    assert (result.code, result.written) == (2, [])
    count = Model(shapes).num_parameters
    assert f"training the model with {count / 1e6:.1f}M parameters" in result.err
    has(80 * GB)
    assert run(*words).code == 0

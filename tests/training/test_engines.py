"""Ways to compute the same training: activations computed again, a compiled model."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.methods.experts import test_training as spawning
from tests.methods.growth import test_training as growing
from tests.methods.moe_routing import test_objective as routing
from tests.planning.test_memory import kept_bytes
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SETTINGS, batches
from tritter.core.models import checkpoint_activations
from tritter.methods.growth.blocks import ActivationRecorder
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    fit,
)
from tritter.training import module as training_module

PLAIN = replace(SETTINGS, save_every_n_steps=3)
_AGAIN: dict[str, Any] = {"activation_checkpointing": True}
AGAIN = replace(PLAIN, **_AGAIN)
COMPILED = replace(PLAIN, compile=True)
STEPS = 8


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile without making code, which takes minutes, and note how often a graph is made."""
    made: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(training_module, "_BACKEND", backend)
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


def train(
    folder: Path, settings: TrainerSettings, *, watching: tuple[Any, ...] = (), dropout: float = 0.2
) -> tuple[BaseModule, FitResult]:
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = BaseModule(
        oracle.tiny_llama(initializer_range=0.05, attention_dropout=dropout),
        schedule=Schedule(learning_rate=1e-2, max_steps=STEPS),
        optimizer=OptimizerSettings(),
    )
    result = fit(
        module,
        batches(),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        controls=watching,
    )
    return module, result


def weights(module: BaseModule) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.model.named_parameters()}


def assert_same_bits(first: BaseModule, second: BaseModule) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.full
def test_recomputed_activations_give_the_same_bits_and_dropout(tmp_path: Path) -> None:
    plain, expected = train(tmp_path / "plain", PLAIN)
    again, found = train(tmp_path / "again", AGAIN)
    assert_same_bits(again, plain)
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in again.model.modules())


@pytest.mark.full
def test_without_the_random_state_of_the_first_pass_the_bits_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: dropout differs when a layer is recomputed."""
    whole = torch.utils.checkpoint.checkpoint

    def careless(*args: Any, **options: Any) -> Any:
        return whole(*args, **options, preserve_rng_state=False)

    plain, _ = train(tmp_path / "plain", PLAIN)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", careless)
    again, _ = train(tmp_path / "again", AGAIN)
    with pytest.raises(AssertionError):
        assert_same_bits(again, plain)


def test_layers_keep_their_inputs_alone_and_can_be_sent_to_a_process() -> None:
    model, ids = oracle.tiny_llama().train(), oracle.tokens(batch=4, length=32)
    whole = kept_bytes(model, ids, is_autocast=False)
    with checkpoint_activations(model):
        assert kept_bytes(model, ids, is_autocast=False) < whole / 2
        pickle.dumps(model)
        assert not model.get_input_embeddings()._forward_hooks
    assert kept_bytes(model, ids, is_autocast=False) == whole


@pytest.mark.slow
def test_a_model_that_grows_computes_its_activations_again(tmp_path: Path) -> None:
    """Hooks that look at a layer fire again when it computes again; they see nothing twice."""
    plain, _ = growing.train(tmp_path / "plain")
    again, _ = growing.train(tmp_path / "again", settings=replace(growing.ONE, **_AGAIN))
    assert len(plain.journal) > 1
    assert_same_bits(again, plain)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["learned", "evidence", "both"])
def test_experts_compute_their_activations_again(tmp_path: Path, router: str) -> None:
    targets = {"targets": ("q_proj", "up_proj")} if router == "learned" else {}
    options = spawning.dynamic_options(router=router, **targets)
    plain, _ = spawning.train(tmp_path / "plain", options)
    again, _ = spawning.train(tmp_path / "again", options, settings=replace(spawning.ONE, **_AGAIN))
    assert len(plain.journal) > 0
    assert_same_bits(again, plain)


@pytest.mark.full
def test_routers_compute_their_activations_again(tmp_path: Path) -> None:
    models = []
    for name, options in (("plain", {}), ("again", _AGAIN)):
        models.append(routing.collapsed())
        routing.run(
            models[-1],
            tmp_path / name,
            settings=RoutingOptions(auxiliary_loss=0.1, z_loss=0.01, bias_update_rate=0.02),
            steps=6,
            trainer=replace(SETTINGS, **options),
        )
    plain, again = (model.state_dict() for model in models)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.full
def test_a_compiled_step_gives_the_same_weights(tmp_path: Path, calls: list[int]) -> None:
    plain, _ = train(tmp_path / "plain", PLAIN)
    one, _ = train(tmp_path / "one", COMPILED)
    assert len(calls) == 1  # one graph, no break
    assert weights(one).keys() == weights(plain).keys()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(one)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_training_that_was_killed_ends_with_the_same_bits(
    tmp_path: Path, calls: list[int]
) -> None:
    settings = replace(COMPILED, activation_checkpointing=True)
    whole, _ = train(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        train(tmp_path / "parts", settings, watching=(KillAt(4),))
    parts, _ = train(tmp_path / "parts", settings)
    assert_same_bits(parts, whole)


@pytest.mark.slow
def test_a_model_that_grows_is_compiled_anew(tmp_path: Path, calls: list[int]) -> None:
    plain, _ = growing.train(tmp_path / "plain")
    grown, _ = growing.train(tmp_path / "grown", settings=replace(growing.ONE, compile=True))
    assert len(grown.journal) == len(plain.journal) > 1
    assert len(calls) >= len(grown.journal)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(grown)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_code_passes_over_hooks_that_came_later(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: unless the model itself computes, growth sees no tokens."""
    monkeypatch.setattr(training_module.CompiledModel, "__setattr__", _never_watched)
    seen: list[int] = []
    probes = ActivationRecorder.probes
    monkeypatch.setattr(
        ActivationRecorder, "probes", lambda one: seen.append(len(probes(one))) or probes(one)
    )
    growing.train(tmp_path / "grown", settings=replace(growing.ONE, compile=True))
    assert not all(seen)


def _never_watched(model: Any, name: str, value: Any) -> None:
    object.__setattr__(model, name, False if name == "is_watched" else value)

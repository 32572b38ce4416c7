"""Changes during training, compared with runs that are stopped, expanded on disk and resumed."""

import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import DataLoader

from tests import oracle
from tests.oracle.families import tiny
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SETTINGS
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Width
from tritter.core.families import Model
from tritter.core.models import load_model, model_of
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, TensorMap
from tritter.core.parameter_map.carry import MOMENTS, Policy
from tritter.data.batches import BatchStream, SequenceStream
from tritter.errors import RequestError, TritterError
from tritter.methods.forgetting.path_integral import PathIntegral
from tritter.storage.writer import TensorStream
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    ForgettingMethod,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    fit,
    surgery,
)
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.fitting import start_method
from tritter.training.parameters import reshape
from tritter.transform import Change, declared, expand
from tritter.transform.live import ModelExpander

SEED, AT, STEPS = 3, 6, 12
WIDER: list[ExpansionSpec] = [Width(intermediate_size=60)]  # by half, `fresh`
ONE = replace(SETTINGS, save_every_n_steps=AT)
TWO = replace(ONE, devices=2, strategy="ddp")
SPECS: dict[str, list[ExpansionSpec]] = {
    "ffn": WIDER,
    "hidden": [Width(hidden_size=36)],
    "depth": [Dus(identity_init=True)],
    "blocks with reset state, then wider": [LlamaPro(), Width(init="net2net")],
}

needs_fork = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)


class Grow(Callback):
    """Expand the live model after some step."""

    def __init__(
        self, specs: Sequence[ExpansionSpec] = WIDER, *, at: int = AT, policy: Policy = "carry",
        seeds: Sequence[int] = (SEED, SEED),
    ) -> None:  # fmt: skip
        self.specs, self.at, self.policy, self.seeds = specs, at, policy, seeds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:
            expander = ModelExpander(self.specs, seed=self.seeds[trainer.global_rank])
            change = expander.change(pl_module.model)
            surgery.apply(trainer, pl_module, change, reason="test", policy=self.policy)


def small_model(**changes: Any) -> nn.Module:
    return oracle.tiny_llama(initializer_range=0.05, attention_dropout=0.2, **changes)


def train(
    folder: Path,
    *watching: Callback,
    model: nn.Module | None = None,
    settings: TrainerSettings = ONE,
    steps: int = STEPS,
    methods: Sequence[ForgettingMethod] = (),
    optimizer: OptimizerSettings | None = None,
) -> BaseModule:
    """Train a model with dropout, so that the random state counts, from what was saved if any."""
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = BaseModule(
        model or small_model(),
        schedule=Schedule(learning_rate=1e-2, max_steps=steps),
        optimizer=optimizer or OptimizerSettings(),
        methods=methods,
    )
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    fit(
        module,
        BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=steps),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        controls=watching,
    )
    return module


def expanded_on_disk(saved: Path, folder: Path, specs: Sequence[ExpansionSpec]) -> nn.Module:
    """Expand the saved weights, moments and step of a run into the state to resume from.

    Names of the moments come from their positions: matrices of the stock model, then vectors.
    """
    io = SafetensorsCheckpointIO()
    content = io.load_checkpoint(saved)
    weights = {n.removeprefix("model."): v for n, v in content["state_dict"].items() if "." in n}
    stock = small_model()
    stock.load_state_dict(weights)
    source = oracle.saved(stock, folder / "source")
    (optimizer,) = content["optimizer_states"]
    state = dict(zip(_names_in_groups(stock), optimizer["state"].values(), strict=True))
    (step,) = {int(each["step"]) for each in state.values()}
    kinds = {k: TensorStream.of((n, each[k]) for n, each in state.items()) for k in MOMENTS}
    write_state(source, kinds, step=step)
    grown = expand(source, folder / "grown", specs, seed=SEED).folder
    model, after = load_model(grown), State.read(grown)
    assert after is not None
    held = {kind: dict(tensors) for kind, tensors in after.kinds.items()}
    names = _names_in_groups(model)
    optimizer["state"] = {
        position: {k: held[k][name] for k in MOMENTS} | {"step": torch.tensor(float(step))}
        for position, name in enumerate(names)
        if name in held[MOMENTS[0]]
    }
    sizes = [sum(p.ndim >= 2 for p in model.parameters()), len(names)]
    for group, first, end in zip(optimizer["param_groups"], [0, sizes[0]], sizes, strict=True):
        group["params"] = list(range(first, end))
    own = {f"model.{name}": value for name, value in model.state_dict().items()}
    content["state_dict"] = own | {"_extra_state": {"journal": []}}
    io.save_checkpoint(content, folder / "saved")
    return model


def _names_in_groups(model: nn.Module) -> list[str]:
    parameters = dict(model.named_parameters())
    matrices = [name for name, p in parameters.items() if p.ndim >= 2]
    return matrices + [name for name, p in parameters.items() if p.ndim < 2]


def assert_same_end(first: Path, second: Path) -> None:
    """Compare weights, moments, step counts and generators of the last states of two runs."""
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops")
    held = []
    for folder in (first, second):
        end = SafetensorsCheckpointIO().load_checkpoint(folder / "saved")
        del end["state_dict"]["_extra_state"]
        held.append({key: end[key] for key in kept} | {"ranks": end["callbacks"]["RandomState"]})
    assert_same(*held, "")


def assert_same(first: Any, second: Any, place: str) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_same(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{place}.{index}")
    else:
        assert first == second, place


def stopped_and_expanded(
    folder: Path, specs: Sequence[ExpansionSpec], settings: TrainerSettings, *, at: int, steps: int
) -> BaseModule:
    with (
        pytest.raises(Exception, match="Killed") if settings.devices > 1 else pytest.raises(Killed)
    ):
        train(folder / "stopped", KillAt(at), settings=settings, steps=steps)
    model = expanded_on_disk(folder / "stopped" / "saved", folder / "disk", specs)
    return train(folder / "disk", model=model, settings=settings, steps=steps)


@pytest.mark.full
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS.keys())
def test_bits_are_those_of_stopping_expanding_on_disk_and_going_on(
    tmp_path: Path, specs: list[ExpansionSpec]
) -> None:
    live = train(tmp_path / "live", Grow(specs))
    gone_on = stopped_and_expanded(tmp_path, specs, ONE, at=AT, steps=STEPS)
    found, expected = (model_of(module.model).config for module in (live, gone_on))
    assert {k for k in expected if found.get(k) != expected[k]} <= {"architectures", "dtype"}
    assert str(live.model) == str(gone_on.model)
    assert_same_end(tmp_path / "live", tmp_path / "disk")


@pytest.mark.full
@needs_fork
def test_bits_are_the_same_on_two_processes(tmp_path: Path) -> None:
    train(tmp_path / "live", Grow(), settings=TWO)
    stopped_and_expanded(tmp_path, WIDER, TWO, at=AT, steps=STEPS)
    assert_same_end(tmp_path / "live", tmp_path / "disk")
    weights = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "live" / "saved")["state_dict"]
    assert weights["model.model.layers.0.mlp.up_proj.weight"].shape == (60, 24)
    assert [entry["step"] for entry in weights["_extra_state"]["journal"]] == [AT]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ONE, pytest.param(TWO, marks=needs_fork)], ids=["one", "two"])
def test_bits_are_the_same_after_a_hundred_steps(tmp_path: Path, settings: TrainerSettings) -> None:
    settings = replace(settings, save_every_n_steps=100)
    train(tmp_path / "live", Grow(at=100), settings=settings, steps=200)
    stopped_and_expanded(tmp_path, WIDER, settings, at=100, steps=200)
    assert_same_end(tmp_path / "live", tmp_path / "disk")


@pytest.mark.full
@pytest.mark.parametrize("kill_at", [AT + 1, AT + 3])
def test_bits_are_the_same_when_killed_after_it(tmp_path: Path, kill_at: int) -> None:
    settings = replace(ONE, save_every_n_steps=2)
    train(tmp_path / "whole", Grow(), settings=settings)
    process = multiprocessing.get_context("fork").Process(
        target=train,
        args=(tmp_path / "parts", Grow(), KillAt(kill_at, signal_to_rank=0)),
        kwargs={"settings": settings},
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    parts = train(tmp_path / "parts", Grow(), settings=settings)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert [entry["step"] for entry in parts.journal] == [AT]


@pytest.mark.full
@needs_fork
def test_bits_are_the_same_when_one_of_two_processes_is_killed_after_it(tmp_path: Path) -> None:
    settings = replace(TWO, save_every_n_steps=2)
    train(tmp_path / "whole", Grow(), settings=settings)
    with pytest.raises(TritterError, match="SIGKILL"):
        train(tmp_path / "parts", Grow(), KillAt(AT + 3, signal_to_rank=1), settings=settings)
    train(tmp_path / "parts", Grow(), settings=settings)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.full
def test_moments_that_are_not_mapped_end_elsewhere(tmp_path: Path) -> None:
    """The negative control of the proof."""
    train(tmp_path / "live", Grow(policy="zero"))
    stopped_and_expanded(tmp_path, WIDER, ONE, at=AT, steps=STEPS)
    with pytest.raises(AssertionError, match=r"\.state_dict\.model\.model"):
        assert_same_end(tmp_path / "live", tmp_path / "disk")


class Observer(ForgettingMethod):
    """Keeps an anchor, a Fisher and a mask, as methods do."""

    name = "observer"

    def __init__(self, model: nn.Module) -> None:
        self.anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        self.masks: dict[str, Tensor] = {}

    def parameters_changed(self, change: Change) -> None:
        self.anchor = change.state("anchor", self.anchor)
        self.fisher = change.state("fisher", self.fisher)
        self.masks = change.masks()


class ToldCallback(Callback):
    changes: list[Change]

    def __init__(self) -> None:
        self.changes = []

    def parameters_changed(self, change: Change) -> None:
        self.changes.append(change)


def test_listeners_are_told(tmp_path: Path) -> None:
    model, callback = small_model(), ToldCallback()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = Observer(model)
    train(tmp_path, Grow(), callback, model=model, methods=[method])
    (change,) = callback.changes
    assert change.model.config["intermediate_size"] == 60 and not change.removed
    assert {s.name.split(".")[-2] for s in change.altered} == {"gate_proj", "up_proj", "down_proj"}
    for name, parameter in model.named_parameters():
        kept = tuple(map(slice, before[name].shape))
        assert method.anchor[name].shape == method.fisher[name].shape == parameter.shape
        assert torch.equal(method.anchor[name][kept], before[name])
        assert method.fisher[name].sum() == before[name].numel() == method.masks[name].sum()


def test_what_each_weight_did_is_recorded_through_a_change(tmp_path: Path) -> None:
    recorder, held = PathIntegral(tmp_path / "state"), list[dict[str, Tensor]]()

    class NotingGrow(Grow):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == self.at:
                held.append({n: v.clone() for n, v in recorder.path_integral.items()})
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
                held.append({n: v.clone() for n, v in recorder.path_integral.items()})

    model = train(tmp_path / "live", recorder, NotingGrow(), steps=AT + 2).model
    name, (before, after) = "model.layers.0.mlp.up_proj.weight", held
    rows = len(before[name])
    assert torch.equal(after[name][:rows], before[name]) and before[name].count_nonzero()
    assert len(after[name]) == 60 and not after[name][rows:].count_nonzero()
    state = State.read(tmp_path / "state")
    assert state is not None
    left = dict(state.kinds["path_integral"])
    assert {n: v.shape for n, v in left.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert left[name][rows:].count_nonzero() and not torch.equal(left[name], after[name])


@pytest.mark.full
def test_averages_follow_by_the_rule_of_weights_and_through_a_resume(tmp_path: Path) -> None:
    class Averages(EMAWeightAveraging):
        """Notes the averages around the change."""

        held: list[dict[str, Tensor]]

        def note(self) -> None:
            assert self._average_model is not None
            parameters = self._average_model.module.model.named_parameters()
            self.held.append({n: p.detach().clone() for n, p in parameters})

    class NotingGrow(Grow):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == self.at:
                averages.note()
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
                averages.note()

    averages = Averages(decay=0.8)
    averages.held = []
    settings = replace(ONE, save_every_n_steps=2)
    whole = train(tmp_path / "whole", averages, NotingGrow(), settings=settings)
    before, after = averages.held
    source = small_model()
    source.load_state_dict(
        before | {k: v for k, v in source.state_dict().items() if k not in before}
    )
    expanded = expand(
        oracle.saved(source, tmp_path / "average"), tmp_path / "wide", WIDER, seed=SEED
    )
    for name, parameter in oracle.stock(expanded.folder).named_parameters():
        assert torch.equal(after[name], parameter), name
    with pytest.raises(Killed):
        train(
            tmp_path / "parts", EMAWeightAveraging(decay=0.8), Grow(), KillAt(9), settings=settings
        )
    parts = train(tmp_path / "parts", EMAWeightAveraging(decay=0.8), Grow(), settings=settings)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, parts.model.get_parameter(name)), name


class OneLayer(Grow):
    """Widen the FFN of one layer; two others keep their width."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:
            source = model_of(pl_module.model)
            (step,) = ModelExpander(WIDER, seed=SEED).steps(source)
            maps = {
                name: m if name.startswith("layers.1.") else TensorMap(name)
                for name, m in step.parameter_map.tensors.items()
            }
            target = source.changed(source.family.with_ffn_sizes(source.config, [40, 60, 40]))
            change = Change.of(replace(step.parameter_map, tensors=maps), source, target)
            surgery.apply(trainer, pl_module, change, reason="one layer")


@pytest.mark.full
def test_one_layer_alone_gets_wider_and_a_killed_training_goes_on_with_it(tmp_path: Path) -> None:
    settings = replace(ONE, save_every_n_steps=2)
    whole = train(tmp_path / "whole", OneLayer(), settings=settings)
    widths = [layer.mlp.up_proj.out_features for layer in whole.model.model.layers]
    assert widths == [40, 60, 40]
    assert model_of(whole.model).config["ffn_sizes"] == [40, 60, 40]
    with pytest.raises(Killed):
        train(tmp_path / "parts", OneLayer(), KillAt(9), settings=settings)
    train(tmp_path / "parts", OneLayer(), settings=settings)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


RANK = "model.layers.1.mlp.down_proj"
LOW, HIGH, GAIN = f"{RANK}.low", f"{RANK}.high", f"{RANK}.gain"


def with_factors() -> nn.Module:
    """Return a model with a low-rank term next to one layer, which no family has."""
    model = small_model()
    module = model.get_submodule(RANK)
    torch.manual_seed(4)
    module.low = nn.Parameter(0.1 * torch.randn(2, 40))
    module.high = nn.Parameter(0.1 * torch.randn(24, 2))

    def add(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        term = linear(linear(given[0], layer.low), layer.high)
        return output + (term * layer.gain if hasattr(layer, "gain") else term)

    module.register_forward_hook(add)
    return model


class Double(Grow):
    """Double the rank of the term, and give it a gain of its own; later take the gain away."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        rank, config = AxisMap.padded(2, 4), model_of(pl_module.model).config
        low, high, gain = declared(LOW, (4, 40)), declared(HIGH, (24, 4)), declared(GAIN, (24,))
        change = None
        if trainer.global_step == self.at:
            change = Change(
                model=Model(config),
                before=(declared(LOW, (2, 40)), declared(HIGH, (24, 2))),
                after=(low, high, gain),
                tensors={
                    LOW: TensorMap(LOW, (AxisFactor.writes(rank), None), Fill("random", std=0.1)),
                    HIGH: TensorMap(HIGH, (None, AxisFactor.reads(rank))),
                    GAIN: TensorMap.created((24,), Fill("random", std=0.1, seed=1)),
                },
            )
        elif trainer.global_step == self.at + 2:
            change = Change(model=Model(config), before=(gain,), after=(), tensors={})
        if change is not None:
            surgery.apply(trainer, pl_module, change, reason="rank")
            held = pl_module.model.get_submodule(RANK)
            if trainer.global_step == self.at:
                state = trainer.optimizers[0].state[held.high]
                assert not state["exp_avg"][:, 2:].any() and state["exp_avg"][:, :2].all()
                assert held.gain in set(trainer.optimizers[0].param_groups[1]["params"])
            assert hasattr(held, "gain") == (trainer.global_step == self.at)


@pytest.mark.full
@pytest.mark.parametrize("kill_at", [AT + 1, AT + 3])
def test_declared_parameters_are_changed_added_and_removed(tmp_path: Path, kill_at: int) -> None:
    settings = replace(ONE, save_every_n_steps=1)
    train(tmp_path / "whole", Double(), model=with_factors(), settings=settings)
    with pytest.raises(Killed):
        watching = Double(), KillAt(kill_at)
        train(tmp_path / "parts", *watching, model=with_factors(), settings=settings)
    parts = train(tmp_path / "parts", Double(), model=with_factors(), settings=settings)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert [entry["removed"] for entry in parts.journal] == [[], [GAIN]]


class Wrong(Callback):
    """Ask for a change when, or as, it can't be had."""

    def __init__(self, hook: str, specs: Sequence[ExpansionSpec] = WIDER) -> None:
        self.specs = specs

        def ask(trainer: Trainer, pl_module: BaseModule, *_: Any) -> None:
            change = ModelExpander(specs, seed=SEED).change(pl_module.model)
            if hook == "twice":
                surgery.apply(trainer, pl_module, change, reason="first")
            surgery.apply(trainer, pl_module, change, reason="test")

        setattr(self, "on_train_batch_end" if hook == "twice" else hook, ask)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("hook", "specs", "reason"),
    [
        ("on_before_optimizer_step", WIDER, "cannot change in on_before_optimizer_step"),
        ("on_train_epoch_start", WIDER, "cannot change in on_train_epoch_start"),
        ("twice", WIDER, r"gate_proj.weight of shape \[40, 24\]; the model has \[60, 24\]"),
        ("on_train_batch_end", [Moe(num_experts=2)], "between two training runs"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, hook: str, specs: list[ExpansionSpec], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        train(tmp_path, Wrong(hook, specs))


def test_between_two_batches_of_a_step_nothing_changes() -> None:
    class Accumulating(Callback):
        refused = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            change = ModelExpander([Width(intermediate_size=60 + batch_idx)]).change(
                pl_module.model
            )
            try:
                surgery.apply(trainer, pl_module, change, reason="test")
            except RequestError as error:
                assert "between two batches of one step" in str(error)
                assert batch_idx % 2 == 0
                self.refused += 1

    module = BaseModule(
        small_model(),
        schedule=Schedule(learning_rate=1e-2, max_steps=2),
        optimizer=OptimizerSettings(),
    )
    batches = [{"input_ids": oracle.tokens(batch=2, length=8, seed=i)} for i in range(4)]
    watching = Accumulating()
    trainer = Trainer(
        max_steps=2, accumulate_grad_batches=2, accelerator="cpu", callbacks=[watching],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert watching.refused == 2 and len(module.journal) == 2


@pytest.mark.full
@needs_fork
def test_processes_that_disagree_are_told(tmp_path: Path) -> None:
    with pytest.raises(TritterError, match="requested different model changes"):
        train(tmp_path, Grow(seeds=(3, 4)), settings=TWO)


def test_what_is_wrong_afterwards_is_told(tmp_path: Path) -> None:
    class Cut(Grow):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == self.at:
                change = ModelExpander(WIDER, seed=SEED).change(pl_module.model)
                name = "layers.0.ffn.up"
                spoiled = replace(change.tensors[name], fill=Fill("random", std=float("inf")))
                change = replace(change, tensors={**change.tensors, name: spoiled})
                surgery.apply(trainer, pl_module, change, reason="test")

    with pytest.raises(TritterError, match="it has values that are not finite"):
        train(tmp_path, Cut())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["gemma3_text", "qwen2"])
def test_modules_are_those_of_a_stock_model_of_the_new_config(family: str) -> None:
    """Sizes, windows by layer, the scale of the embedding, eps: nothing of the old ones is left."""
    model = tiny(family, tie_word_embeddings=True)
    change = ModelExpander([Width(), LlamaPro()]).change(model)
    expected = ModelExpander([Width(), LlamaPro()]).expand(model)
    weights = dict(change.weights({n: p.detach() for n, p in model.named_parameters()}))
    reshape(model, change.model.config, weights)
    tokens = oracle.tokens(batch=2, length=12)
    assert torch.equal(oracle.logits(model, tokens), oracle.logits(expected.eval(), tokens))
    assert str(model) == str(expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for (name, module), (_, other) in zip(
        model.named_modules(), expected.named_modules(), strict=True
    ):
        for key, value in vars(other).items():
            if isinstance(value, bool | int | float | str) and key != "_is_hf_initialized":
                assert vars(module)[key] == value, (name, key)
    count = sum(p.numel() for p in model.parameters())
    assert count == change.model.num_parameters


def test_private_names_of_lightning_are_those_of_this_version() -> None:
    """`surgery` uses `_current_fx_name`, `_should_accumulate` and `_average_model`."""
    assert lightning.__version__ == "2.6.6"

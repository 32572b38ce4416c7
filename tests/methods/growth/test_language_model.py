"""Stock models that grow in your own training loop, and the snippets of the README."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests import oracle
from tests.core.families.model_types import example
from tests.oracle.families import GROWABLE, generic, key_of, tiny
from tritter import GrowableCausalLM, GrowableLinear, GrowableQwen, expand
from tritter.checkpoints import Lineage
from tritter.core.expansions import LlamaPro, Width
from tritter.core.families import ffn_sizes
from tritter.core.families.discovery.family import shallow
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import load_model, read_model
from tritter.errors import RequestError, TritterError
from tritter.methods.growth import plain_loop
from tritter.methods.growth.triggers import Trigger, View
from tritter.options import options
from tritter.transform.live import ModelExpander

GROWING: dict[str, Any] = {"trigger": "schedule", "growth_cooldown": 3, "max_growth_per_step": 4}
NOTHING = {"born": 0, "replaced": 0, "died": 0}


@options
class SecondLayer(Trigger):
    """A user's own trigger."""

    def decide(self, view: View) -> dict[int, int]:
        return {1: 3}


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, steps: int = 3) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.full
def test_a_compiled_model_is_compiled_once_per_growth() -> None:
    compiled = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = GrowableCausalLM(oracle.tiny_llama(), **GROWING)
    called, optimizer, counts = torch.compile(model, backend=backend), adam(model), []
    for _ in range(2):
        train(called, optimizer, oracle.tokens(), steps=1)
        counts.append(len(compiled))
        train(called, optimizer, oracle.tokens(), steps=12)
        counts.append(len(compiled))
        model.check_and_grow(optimizer=optimizer)
    assert counts[0] == counts[1] < counts[2] == counts[3]
    torch._dynamo.reset()
    with pytest.raises(RequestError, match=r"without torch\.compile, and compile the result"):
        GrowableCausalLM(torch.compile(oracle.tiny_llama()))
    with pytest.raises(RequestError, match="the model grows already"):
        GrowableCausalLM(model)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("initialiser", ["gradmax", "split", "random"])
@pytest.mark.parametrize("family", generic(GROWABLE))
def test_the_function_is_kept_in_two_events(family: str, initialiser: str) -> None:
    stock = tiny(family).double()
    model = GrowableCausalLM(stock, initialiser=initialiser, **GROWING)
    ids, optimizer = oracle.tokens(), adam(model)
    with oracle.float64_casts():
        for neurons in (44, 48):
            train(model, optimizer, ids)
            before = oracle.logits(model, ids)
            assert model.check_and_grow() == {"born": 12, "replaced": 0, "died": 0}
            assert float((oracle.logits(model, ids) - before).abs().max()) < 1e-10
            assert model.neurons == [neurons] * 3
    assert getattr(stock.config, key_of(family, "intermediate_size")) == 48
    assert model.config is stock.config


@pytest.mark.parametrize(
    ("model_type", "initialiser"),
    [
        ("opt", "gradmax"),
        pytest.param("falcon", "random", marks=pytest.mark.full),
        pytest.param("ctrl", "split", marks=pytest.mark.full),
        pytest.param("olmo3", "gradmax", marks=pytest.mark.full),
        pytest.param("gemma3", "split", marks=pytest.mark.full),  # its decoder has its own config
    ],
)
def test_a_model_type_without_a_table(model_type: str, initialiser: str, tmp_path: Path) -> None:
    """FFNs of different width are kept by files, by stock classes and by further growth."""
    base = Twin.of(shallow(example(model_type))).model.float()
    base.save_pretrained(tmp_path / "base")
    model = GrowableCausalLM(
        tmp_path / "base", initialiser=initialiser, max_new_parameters=700, **GROWING
    )
    ids, optimizer = oracle.tokens(), adam(model.eval())  # without dropout
    train(model, optimizer, ids)
    before = oracle.logits(model, ids)
    assert 0 < model.check_and_grow()["born"] < 4 * len(model.neurons)
    error = (oracle.logits(model, ids) - before).abs().max() / before.std()
    assert error < 1e-5 and len(set(model.neurons)) > 1
    train(model, optimizer, ids)
    model.save_pretrained(tmp_path / "grown")
    assert ffn_sizes(read_model(tmp_path / "grown").config) == tuple(model.neurons)
    assert GrowableCausalLM(tmp_path / "grown").neurons == model.neurons
    after = oracle.logits(model, ids)
    wider = Width(hidden_size=64, intermediate_size=2 * max(model.neurons), init="net2net")
    for name, request in (("deeper", "llama_pro"), ("wider", wider)):
        expand(tmp_path / "grown", request, output=tmp_path / name)
        widths = ffn_sizes(read_model(tmp_path / name).config)
        expected = {2 * size if name == "wider" else size for size in model.neurons}
        assert set(widths) == expected
    for name in ("grown", "deeper", "wider"):
        logits = oracle.logits(oracle.stock(tmp_path / name), ids)
        assert (logits - after).abs().max() / after.std() < 1e-5, name
    with torch.no_grad():  # the control
        model.model.get_parameter(model._loop.grower.blocks[0].down).zero_()
    assert (oracle.logits(model, ids) - after).abs().max() / after.std() > 1e-2


@pytest.mark.full
def test_only_the_decoder_is_told_its_width(tmp_path: Path) -> None:
    """The config of GIT's vision tower has the same key."""
    Twin.of(shallow(example("git"))).model.float().save_pretrained(tmp_path / "base")
    model = GrowableCausalLM(tmp_path / "base", **GROWING)
    tower, ids = model.config.vision_config.intermediate_size, oracle.tokens()
    train(model, optimizer := adam(model.eval()), ids)
    assert model.check_and_grow(optimizer=optimizer)["born"] > 0
    assert model.config.vision_config.intermediate_size == tower < model.config.intermediate_size
    model.save_pretrained(tmp_path / "grown")
    difference = oracle.logits(model, ids) - oracle.logits(oracle.stock(tmp_path / "grown"), ids)
    assert difference.abs().max() < 1e-5


def test_only_what_is_under_pressure_grows() -> None:
    """The README's trigger, at a smaller scale."""
    model = GrowableCausalLM(tiny("llama"), growth_cooldown=6, max_growth_per_step=2)
    optimizer, born = adam(model), 0
    for step in range(60):
        train(model, optimizer, oracle.tokens(seed=step), 1)
        if step % 2 == 0:
            born += model.check_and_grow()["born"]
    steps = [event["step"] for event in model.growth_events]
    assert born == sum(model.neurons) - 120 > 0
    assert all(b - a >= 6 for a, b in zip(sorted(set(steps)), sorted(set(steps))[1:], strict=False))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("freeze", [False, True], ids=["all", "FFNs"])
def test_moments_follow_for_all_that_is_trained(freeze: bool) -> None:
    model = GrowableCausalLM(tiny("qwen2"), freeze_attention=freeze, **GROWING)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("mlp" in name for name in trained) is freeze
    ids, optimizer = oracle.tokens(), adam(model)
    train(model, optimizer, ids)
    old = {n: p for n, p in model.named_parameters() if n in trained}
    state = {n: dict(optimizer.state[p]) for n, p in old.items()}
    model.check_and_grow()
    new = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert new.keys() == trained
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, held)) == [id(new[name]) for name in old]  # in their slots
    assert set(optimizer.state) == set(held)
    for name, parameter in new.items():
        index = tuple(map(slice, old[name].shape))
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][kind][index], state[name][kind])
    train(model, optimizer, ids)


def test_a_state_replaces_the_losses_that_were_recorded() -> None:
    born = []
    for reloads in (False, True):
        options = {"trigger": "plateau", "plateau_steps": 8, "growth_cooldown": 1}
        model, ids = GrowableCausalLM(tiny("llama"), **options), oracle.tokens()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for step in range(9):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            model.update_loss(loss)
            born.append(model.check_and_grow()["born"])
            if reloads and step == 3:
                model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert born[:9] == born[9:] and born[6] == 0 < born[7]


@pytest.mark.full
def test_a_state_goes_on_in_a_new_model() -> None:
    ids = oracle.tokens()
    model = GrowableCausalLM(tiny("llama"), enable_replacement=True, **GROWING)
    optimizer = adam(model)
    train(model, optimizer, ids)
    model.check_and_grow()
    train(model, optimizer, ids)
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    other = GrowableCausalLM(tiny("llama"), enable_replacement=True, **GROWING)
    with pytest.raises(RequestError, match="an optimizer refers to"):
        other.attach(kept := adam(other))
        other.load_state_dict(state[0])
    del kept
    other = GrowableCausalLM(tiny("llama"), enable_replacement=True, **GROWING)
    other.load_state_dict(state[0])
    again = adam(other)
    again.load_state_dict(state[1])
    assert other.growth_events == model.growth_events
    results = []
    for each, its in ((model, optimizer), (other, again)):
        train(each, its, ids, 1)
        results.append((each.check_and_grow(), train(each, its, ids)))
    assert results[0] == results[1]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    third = copy.deepcopy(model)  # separately, with its own optimizer
    optimizer = adam(third)
    train(third, optimizer, ids)
    assert third.check_and_grow()["born"] > 0
    assert third.neurons != model.neurons


def test_a_state_goes_on_with_an_optimizer_that_was_there_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, model, other = oracle.tokens(), *(GrowableCausalLM(tiny("llama"), **GROWING) for _ in "ab")
    optimizer, again = adam(model), adam(other)
    train(model, optimizer, ids)
    assert model.check_and_grow()["born"] == 12
    held = other(input_ids=ids, labels=ids).loss  # of the former shape, not freed yet
    with monkeypatch.context() as patched:  # as if it was saved on a GPU
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        state = model.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    results = [
        [train(each, its, ids), each.check_and_grow(), train(each, its, ids)]
        for each, its in ((model, optimizer), (other, again))
    ]
    assert results[0] == results[1] and results[0][1]["born"] == 12 and held.isfinite()


def test_accelerate_saves_it_and_goes_on(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    ids, accelerator, results = oracle.tokens(), Accelerator(cpu=True), []
    for is_resumed in (False, True):
        stock = GrowableCausalLM(tiny("llama"), **GROWING)
        model, optimizer = accelerator.prepare(stock, adam(stock))
        if is_resumed:
            accelerator.load_state(tmp_path)
        else:
            model.attach(optimizer)
            train(model, optimizer, ids)
            assert model.check_and_grow()["born"] == 12
            accelerator.save_state(tmp_path)
        results.append([train(model, optimizer, ids), model.check_and_grow()["born"]])
        accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert results[0] == results[1] and results[0][1] == 12


def test_several_processes_are_refused_at_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GrowableCausalLM(tiny("llama"), **GROWING)
    train(model, adam(model), oracle.tokens(), 1)
    assert model.check_and_grow() == NOTHING
    monkeypatch.setattr(plain_loop, "num_ranks", lambda: 2)
    with pytest.raises(RequestError, match="several processes"):
        model.check_and_grow()


@pytest.mark.full
def test_a_saved_one_is_stock_and_goes_on(tmp_path: Path) -> None:
    base = oracle.saved(tiny("qwen3"), tmp_path / "base")
    model = GrowableCausalLM(base, trigger=SecondLayer(), growth_cooldown=3)
    ids, optimizer = oracle.tokens(), adam(model)
    train(model, optimizer, ids)
    assert model.check_and_grow()["born"] == 3
    assert model.neurons == [40, 43, 40]
    model.save_pretrained(tmp_path / "grown")
    stock = oracle.stock(tmp_path / "grown")
    assert oracle.relative_difference(model.eval(), stock, ids) < 1e-5
    assert stock.config.intermediate_size == max(model.neurons)
    again = GrowableCausalLM(tmp_path / "grown", **GROWING)
    assert again.neurons == model.neurons
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    lineage = Lineage.read(tmp_path / "grown")
    assert lineage is not None
    assert [record.expansion_type for record in lineage.expansion_history] == ["growth"]
    assert lineage.parent_path == "../base"
    optimizer = adam(again)
    train(again, optimizer, ids)
    assert again.check_and_grow()["born"] == 12
    again.save_pretrained(tmp_path / "further")
    lineage = Lineage.read(tmp_path / "further")
    assert lineage is not None
    assert len(lineage.expansion_history) == 2
    with pytest.raises(RequestError):
        again.save_pretrained(tmp_path / "grown")


@pytest.mark.parametrize("found", [{0: -1}, {-1: 1}, {9: 1}, {"a": 1}])
def test_a_trigger_from_outside_with_a_mistake_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr(SecondLayer, "decide", lambda *_: found)
    model = GrowableCausalLM(tiny("llama"), trigger=SecondLayer(), growth_cooldown=3)
    train(model, adam(model), oracle.tokens())
    message = f"SecondLayer must return layers 0 to 2 and their .*, not {re.escape(repr(found))}"
    with pytest.raises(TritterError, match=message):
        model.check_and_grow()
    assert model.neurons == [40, 40, 40]


def test_stock_classes_save_ffns_of_different_width(tmp_path: Path) -> None:
    model = GrowableCausalLM(tiny("llama"), trigger=SecondLayer(), growth_cooldown=3)
    ids, optimizer = oracle.tokens(), adam(model)
    train(model, optimizer, ids)
    assert model.check_and_grow()["born"] == 3
    model.save_pretrained(tmp_path / "grown")
    loaded = load_model(tmp_path / "grown")
    deeper = ModelExpander([LlamaPro()]).expand(loaded)
    for name, each in {"again": loaded, "deeper": deeper}.items():
        each.save_pretrained(tmp_path / name)
        stock = oracle.stock(tmp_path / name)
        assert stock.config.intermediate_size == 43
        assert oracle.relative_difference(model.eval(), stock, ids) < 1e-5


def test_a_wrapped_model_is_the_stock_one() -> None:
    stock, ids = tiny("llama"), oracle.tokens()
    expected = oracle.logits(stock, ids)
    model = GrowableCausalLM(stock, enable_growth=False, **GROWING)
    assert torch.equal(oracle.logits(model, ids), expected)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (3, 19)
    optimizer = adam(model)
    train(model, optimizer, ids, 5)
    assert model.check_and_grow(optimizer=optimizer) == NOTHING
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.nothing_of_the_kind


def test_what_is_seen_in_validation_is_no_batch() -> None:
    """Tokens without a backward pass do not affect new neurons."""
    ids, results = oracle.tokens(), []
    for is_validated in (False, True):
        model = GrowableCausalLM(tiny("llama"), **GROWING)
        optimizer = adam(model)
        train(model, optimizer, ids)
        if is_validated:
            with torch.no_grad():
                model(input_ids=oracle.tokens(seed=5))
            model(input_ids=oracle.tokens(seed=6))
        model.check_and_grow()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


@pytest.mark.full
def test_growth_before_zero_grad_and_after_it_is_the_same() -> None:
    ids, results = oracle.tokens(), []
    for is_before in (False, True):
        model = GrowableCausalLM(tiny("llama"), **GROWING)
        optimizer = adam(model)
        train(model, optimizer, ids)
        if not is_before:
            optimizer.zero_grad()
        model.check_and_grow()
        if is_before:
            optimizer.zero_grad()
        results.append(train(model, optimizer, ids))
    assert results[0] == results[1]


def test_experts_adapters_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has experts"):
        GrowableCausalLM(tiny("mixtral"))
    with pytest.raises(RequestError, match="no Hugging Face config"):
        GrowableCausalLM(nn.Linear(2, 2))
    adapted = tiny("llama")
    up = adapted.model.layers[1].mlp.up_proj
    up.base_layer = nn.Linear(24, 40, bias=False)
    del up.weight
    with pytest.raises(RequestError, match="LoRA"):
        GrowableCausalLM(adapted)
    with pytest.raises(RequestError, match="no such folder"):
        GrowableCausalLM(tmp_path / "nothing")
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE is set"):
        GrowableQwen()
    with pytest.raises(RequestError, match="Did you mean gradmax"):
        GrowableCausalLM(tiny("llama"), initialiser="gradmaks")


def test_optimizers_made_anew_are_followed_from_their_first_step() -> None:
    model, ids = GrowableCausalLM(tiny("llama"), **GROWING), oracle.tokens()
    for _ in range(3):
        optimizer = adam(model)
        train(model, optimizer, ids)
        assert model.check_and_grow()["born"] == 12
        assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())


@pytest.mark.full
def test_the_readmes_snippets(tmp_path: Path) -> None:
    """Verbatim except for the import, the folder, and the loop around them."""
    folder = oracle.saved(tiny("qwen2"), tmp_path / "qwen")

    layer = GrowableLinear(768, 3072, enable_replacement=True)
    should_grow, source_indices = layer.check_growth()
    if should_grow:
        result = layer.perform_growth(source_indices)
    assert not should_grow

    model = GrowableQwen(
        str(folder),
        enable_growth=True,
        enable_replacement=True,
        freeze_attention=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.attach(optimizer)
    ids, results = oracle.tokens(batch=1, length=8), []
    for step in range(301):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_loss(loss.item())
        if step % 100 == 0:
            result = model.check_and_grow()
            results.append(result)
    assert all(result.keys() == NOTHING.keys() for result in results)
    assert all(type(value) is int for result in results for value in result.values())
    assert len(model._loop.grower.map.steps) == 4

    model = GrowableQwen(folder, enable_replacement=True)  # V3
    model = GrowableQwen(folder, enable_replacement=False)  # Grow-only
    assert model.neurons == [40, 40, 40]
    assert model.growth_events == []


def test_the_readmes_growth_to_the_letter() -> None:
    """Every layer has neurons above its own quantile, whenever the cooldown allows it."""
    model = GrowableCausalLM(
        tiny("qwen2"), trigger="within_layer", initialiser="source_noise", growth_cooldown=20
    )
    optimizer, ids, born = adam(model), oracle.tokens(batch=1), []
    for step in range(50):
        train(model, optimizer, ids, 1)
        born += [model.check_and_grow()["born"]] if step % 10 == 0 else []
    assert born == [0, 0, 12, 0, 15]  # 4 of 40, then 5 of 44, in each of 3 layers


def test_a_model_is_taken_over_by_who_comes_last() -> None:
    """As if a notebook cell ran twice."""
    stock, ids = tiny("llama"), oracle.tokens()
    first = GrowableCausalLM(stock, **GROWING)
    optimizer = adam(first)
    train(first, optimizer, ids)
    second = GrowableCausalLM(stock, **GROWING)
    train(second, optimizer, ids)
    assert second.check_and_grow()["born"] == 12
    train(second, optimizer, ids)
    with pytest.raises(RequestError, match="newer GrowableCausalLM"):
        first.check_and_grow()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "gradient checkpointing"])
def test_bfloat16_and_gradient_checkpointing(is_checkpointed: bool) -> None:
    stock, ids = tiny("llama").to(torch.bfloat16).train(), oracle.tokens()
    if is_checkpointed:
        stock.gradient_checkpointing_enable()
    model = GrowableCausalLM(stock, enable_replacement=True, dead_quantile=0.1, **GROWING)
    optimizer = adam(model)
    train(model, optimizer, ids)
    result = model.check_and_grow()
    assert result["born"] + result["replaced"] == 12
    assert result["replaced"] > 0
    assert train(model, optimizer, ids) < 10
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

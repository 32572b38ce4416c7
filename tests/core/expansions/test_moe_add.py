"""More experts, against stock models: exact where claimed, different where not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import oracle
from tests.core.stock_routers.models import FAMILIES, num_experts, tiny_moe
from tests.oracle.growth import masks_of
from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.history import Link
from tritter.checkpoints.state import State, write_state
from tritter.cli.inspect import _rebuild_map
from tritter.core.expansions import (
    EXPANSIONS,
    ExpansionSpec,
    LlamaPro,
    Moe,
    MoeAdd,
    Stack,
    Width,
    build_steps,
    target_model,
)
from tritter.core.expansions.targets import reach_parameters
from tritter.core.families import Model
from tritter.core.models import load_model, read_model
from tritter.core.parameter_map.carry import MOMENTS, STATE_KINDS
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.errors import RequestError, TritterError
from tritter.storage.writer import TensorStream
from tritter.transform import Expanded, expand, plan_expansion
from tritter.transform.live import ModelExpander

CLONES = [(2,), None]


def _expanded(tmp_path: Path, model: nn.Module, *specs: ExpansionSpec, **options: Any) -> Expanded:
    source = oracle.saved(model, tmp_path / "source")
    return expand(source, tmp_path / "result", list(specs), **options)


def _stock64(folder: Path) -> PreTrainedModel:
    model = oracle.stock(folder, torch.float64)
    model.set_experts_implementation("eager")
    return model


def _ours(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = load_model(folder, dtype=dtype)
    model.set_experts_implementation("eager")
    return model.eval()


def _difference64(before: nn.Module, after: nn.Module) -> float:
    with oracle.float64_casts():
        old, new = (oracle.logits(model, oracle.tokens()) for model in (before, after))
    return float((old - new).abs().max())


# replicate: exact in stock classes


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_replicated_experts_keep_the_function_in_stock_classes(
    tmp_path: Path, family: str, is_tied: bool, eps: float
) -> None:
    model = tiny_moe(family, tie_word_embeddings=is_tied, rms_norm_eps=eps)
    result = _expanded(tmp_path, model, MoeAdd(addition="replicate", noise=0))
    stock = oracle.stock(result.folder)
    assert num_experts(stock) == 8 and stock.config.num_experts_per_tok == 4
    assert oracle.relative_difference(model, stock, oracle.tokens()) < 1e-4
    assert _difference64(_stock64(tmp_path / "source"), _stock64(result.folder)) < 1e-10
    assert not (result.folder / "state").exists()
    assert result.lineage.stock_loadable == "yes"
    assert result.lineage.expansion_history[-1].claims_exact


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_noise_makes_replicas_differ_and_the_claim_is_dropped(tmp_path: Path, family: str) -> None:
    model = tiny_moe(family)
    result = _expanded(tmp_path, model, MoeAdd(addition="replicate"))
    assert oracle.relative_difference(model, oracle.stock(result.folder), oracle.tokens()) > 1e-4
    assert not result.lineage.expansion_history[-1].claims_exact


def test_doubling_the_experts_alone_would_change_the_function(tmp_path: Path) -> None:
    """Negative control: with the old k a token is routed to two copies of one expert."""
    model = tiny_moe("qwen3_moe")
    result = _expanded(tmp_path, model, MoeAdd(addition="replicate", noise=0))
    path = result.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts_per_tok": 2}))
    assert oracle.relative_difference(model, oracle.stock(result.folder), oracle.tokens()) > 1e-2


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_replicas_are_the_mapped_gradients(tmp_path: Path, family: str) -> None:
    """With equal copies the routing is the same, so here it is an identity, not a policy."""
    spec = MoeAdd(addition="replicate", noise=0)
    result = _expanded(tmp_path, tiny_moe(family), spec)
    config = read_model(tmp_path / "source").config
    (step,) = build_steps(Model(config), [spec], seed=0)
    with oracle.float64_casts():
        old = oracle.gradients(_stock64(tmp_path / "source"), oracle.tokens())
        new = oracle.gradients(_stock64(result.folder), oracle.tokens())
    source, target = oracle.disk_tensors(Model(config), old), oracle.disk_tensors(step.target, new)
    rule = STATE_KINDS["exp_avg"]
    names = {
        t.name: t.disk_name
        for family_config in (config, step.target.config)
        for t in Model(family_config).tensors
    }
    for name, tensor_map in step.parameter_map.tensors.items():
        expected = rule.mapped(tensor_map, lambda name: source[names[name]])
        difference = (target[names[name]] - expected).abs().max()
        assert difference < 1e-10 * max(1, float(expected.abs().max())), name


# append: exact in our module


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spec",
    [
        MoeAdd(num_experts=3),
        MoeAdd(num_experts=1, clone_from=(2,), noise=0.5),
        MoeAdd(num_experts=2, init="mean"),
        MoeAdd(num_experts=4, init="random"),
    ],
    ids=lambda spec: f"{spec.init}{spec.num_experts}",
)
def test_appended_experts_keep_the_function_in_our_module_alone(
    tmp_path: Path, family: str, spec: MoeAdd
) -> None:
    model = tiny_moe(family)
    result = _expanded(tmp_path, model, spec)
    assert oracle.relative_difference(model, _ours(result.folder), oracle.tokens()) < 1e-5
    wide = _ours(result.folder, torch.float64)
    assert _difference64(_stock64(tmp_path / "source"), wide) < 1e-10
    # Negative control: the stock class routes tokens to the disabled experts
    stock = oracle.stock(result.folder)
    assert num_experts(stock) == 4 + (spec.num_experts or 0)
    if spec.init != "mean":  # a mean of rows is seldom among the best two
        assert oracle.relative_difference(model, stock, oracle.tokens()) > 1e-3
    assert result.lineage.expansion_history[-1].claims_exact
    assert result.lineage.stock_loadable == "after adaptation"


def test_the_state_says_which_experts_are_closed(tmp_path: Path) -> None:
    result = _expanded(tmp_path, tiny_moe("mixtral"), MoeAdd(num_experts=2))
    assert AddedExperts.read(result.folder) == AddedExperts(experts=(4, 5))
    plain = json.loads((result.folder / "state" / "router.json").read_text())
    assert len(plain.pop("record_digest")) == 64
    assert plain == {
        "format": "router state",
        "format_version": 1,
        "new_experts": [4, 5],
        "offset": "-inf",
        "anneal_steps": None,
        "step": 0,
    }
    routing = RouterControl.of(load_model(result.folder))
    assert routing is not None
    assert routing.offset(1).tolist() == [0, 0, 0, 0, -math.inf, -math.inf]


def test_an_open_offset_is_the_stock_class(tmp_path: Path) -> None:
    result = _expanded(tmp_path, tiny_moe("mixtral"), MoeAdd(num_experts=2))
    AddedExperts(experts=(4, 5)).at(9, anneal_steps=9).write(result.folder)
    opened = load_model(result.folder)
    assert torch.equal(
        oracle.logits(opened, oracle.tokens()),
        oracle.logits(oracle.stock(result.folder), oracle.tokens()),
    )


def _experts(folder: Path) -> dict[str, Tensor]:
    source = Source.open(folder, read_model(folder))
    return {name: source.read(name) for name in source.stored_parts}


def test_what_clones_hold(tmp_path: Path) -> None:
    spec = MoeAdd(num_experts=2, clone_from=(1, 3, 0), noise=0)
    found = _experts(_expanded(tmp_path, tiny_moe("mixtral"), spec).folder)
    for layer, source in enumerate(spec.clone_from or ()):
        for new in (4, 5):
            for part in ("gate", "up", "down"):
                stem = f"layers.{layer}.experts"
                assert torch.equal(found[f"{stem}.{new}.{part}"], found[f"{stem}.{source}.{part}"])
            router = found[f"layers.{layer}.router"]
            assert torch.equal(router[new], router[source])


def test_what_means_hold(tmp_path: Path) -> None:
    spec = MoeAdd(num_experts=1, init="mean", noise=0)
    found = _experts(_expanded(tmp_path, tiny_moe("qwen3_moe"), spec).folder)
    for part in ("gate", "up", "down"):
        matrices = torch.stack([found[f"layers.2.experts.{e}.{part}"] for e in range(4)])
        torch.testing.assert_close(found[f"layers.2.experts.4.{part}"], matrices.mean(0))
    router = found["layers.2.router"]
    torch.testing.assert_close(router[4], router[:4].mean(0))


def test_what_random_experts_hold(tmp_path: Path) -> None:
    model = tiny_moe("mixtral", hidden_size=48, head_dim=12)
    found = _experts(_expanded(tmp_path, model, MoeAdd(init="random")).folder)
    for part in ("gate", "up", "down"):
        new = [found[f"layers.0.experts.{e}.{part}"] for e in range(4, 8)]
        old = found[f"layers.0.experts.0.{part}"]
        assert not torch.equal(new[0], new[1])
        assert float(torch.stack(new).std()) == pytest.approx(float(old.std()), rel=0.1)
    router = found["layers.0.router"]
    assert float(router[4:].std()) == pytest.approx(float(router[:4].std()), rel=0.3)


def test_noise_is_relative_to_the_source_and_differs_between_clones(tmp_path: Path) -> None:
    result = _expanded(tmp_path, tiny_moe("mixtral"), MoeAdd(num_experts=2, noise=0.1))
    found = _experts(result.folder)
    for part in ("gate", "up", "down"):
        first, second, old = (found[f"layers.1.experts.{e}.{part}"] for e in (4, 5, 0))
        assert float((first - old).std() / old.std()) == pytest.approx(0.1, rel=0.1)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("init", ["clone", "mean"])
def test_new_router_rows_differ(tmp_path: Path, init: Any) -> None:
    """Equal scores would leave the choice of top-k to rounding."""
    spec = MoeAdd(num_experts=2, init=init, noise=0.1)
    name, result = "layers.1.router", _expanded(tmp_path, tiny_moe("mixtral"), spec)
    old, new = _experts(tmp_path / "source")[name], _experts(result.folder)[name]
    assert torch.equal(new[:4], old) and not torch.equal(new[4], new[5])
    start = old[0] if init == "clone" else old.mean(0)
    assert float((new[4:] - start).std() / old.std()) == pytest.approx(0.1, rel=0.3)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("spec", [MoeAdd(num_experts=3), MoeAdd(addition="replicate")])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_as_predicted(tmp_path: Path, family: str, spec: MoeAdd) -> None:
    result = _expanded(tmp_path, tiny_moe(family), spec)
    counted = sum(p.numel() for p in oracle.stock(result.folder).parameters())
    assert counted == result.parameters_after


@pytest.mark.full
@given(
    experts=st.integers(2, 6),
    top_k=st.integers(1, 3),
    added=st.integers(1, 5),
    family=st.sampled_from(sorted(FAMILIES)),
    init=st.sampled_from(["clone", "mean", "random"]),
)
@settings(max_examples=12)
def test_any_number_may_be_appended(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    top_k: int,
    added: int,
    family: str,
    init: str,
) -> None:
    key = "num_local_experts" if family == "mixtral" else "num_experts"
    changes = {key: experts, "num_experts_per_tok": min(top_k, experts)}
    model = tiny_moe(family, **changes)
    spec = MoeAdd(num_experts=added, init=init)
    result = _expanded(tmp_path_factory.mktemp("any"), model, spec)
    assert oracle.relative_difference(model, _ours(result.folder), oracle.tokens()) < 1e-5
    doubled = ModelExpander([MoeAdd(addition="replicate", noise=0)]).expand(model)
    doubled.set_experts_implementation("eager")
    assert oracle.relative_difference(model, doubled.eval(), oracle.tokens()) < 1e-4


# Further expansions, lineage, state


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "more",
    [Stack(identity_init=True), LlamaPro(), Width(init="net2net"), Width()],
    ids=["stack", "llama_pro", "net2net", "width"],
)
def test_closed_experts_stay_closed_through_depth_and_width(
    tmp_path: Path, family: str, more: ExpansionSpec
) -> None:
    model = tiny_moe(family)
    first = _expanded(tmp_path, model, MoeAdd(num_experts=2))
    second = expand(first.folder, tmp_path / "more", [more])
    at_once = expand(tmp_path / "source", tmp_path / "at_once", [MoeAdd(num_experts=2), more])
    for result in (second, at_once):
        assert AddedExperts.read(result.folder) == AddedExperts(experts=(4, 5))
        assert result.lineage.stock_loadable == "after adaptation"
        assert oracle.relative_difference(model, _ours(result.folder), oracle.tokens()) < 1e-4


def test_lineage_and_state_verify_and_the_map_can_be_rebuilt(tmp_path: Path) -> None:
    spec = MoeAdd(num_experts=2, clone_from=(1,))
    result = _expanded(tmp_path, tiny_moe("mixtral"), spec)
    record = result.lineage.expansion_history[-1]
    assert (record.method, record.expansion_type) == ("moe_add", "moe")
    assert _rebuild_map(record).digest() == record.map_digest
    chain = Link.chain(result.folder)
    assert [link.differences() for link in chain] == [(), ()]
    assert "state/router.json" in result.lineage.file_digests
    AddedExperts(experts=(4, 5), offset=-1.0).write(result.folder)
    (change,) = Link.chain(result.folder)[-1].differences()
    assert (change.file, change.detail) == ("state/router.json", "changed")


def test_the_model_hash_is_of_the_tensors_alone(tmp_path: Path) -> None:
    result = _expanded(tmp_path, tiny_moe("mixtral"), MoeAdd(num_experts=2))
    digests = result.lineage.tensor_digests
    assert not any("router.json" in name for name in digests)
    assert Lineage.read(result.folder) == result.lineage


def test_moments_of_old_experts_are_carried_and_new_ones_start_anew(tmp_path: Path) -> None:
    source = oracle.saved(tiny_moe("mixtral"), tmp_path / "source")
    opened = Source.open(source, read_model(source))
    kinds = {
        kind: TensorStream.of(
            [(t.name, torch.rand_like(opened.tensors[t.name])) for t in opened.stored]
        )
        for kind in MOMENTS
    }
    write_state(source, kinds, step=7)
    result = expand(source, tmp_path / "result", [MoeAdd(num_experts=2)])
    old, new = State.read(source), State.read(result.folder)
    assert old is not None and new is not None and new.step == 7
    stem = "model.layers.0.block_sparse_moe."
    for kind in MOMENTS:
        before, after = old.kinds[kind], new.kinds[kind]
        name = stem + "experts.3.w1.weight"
        assert torch.equal(after.get(name), before.get(name))
        assert stem + "experts.4.w1.weight" not in after.files
        router, grown = (found.get(stem + "gate.weight") for found in (before, after))
        assert torch.equal(grown[:4], router)
        expected = router.mean() if kind == "exp_avg_sq" else torch.tensor(0.0)
        torch.testing.assert_close(grown[4:], expected.expand(2, 24))
    assert AddedExperts.read(result.folder) is not None


def test_an_average_that_not_all_experts_have_is_no_mean_of_them(tmp_path: Path) -> None:
    source = oracle.saved(tiny_moe("mixtral"), tmp_path / "source")
    opened = Source.open(source, read_model(source))
    stem = "model.layers.0.block_sparse_moe.experts."
    found = [(t.name, opened.tensors[t.name]) for t in opened.stored]
    without = [(name, value) for name, value in found if name != f"{stem}2.w1.weight"]
    write_state(source, {"ema": TensorStream.of(without)}, step=7)
    result = expand(source, tmp_path / "result", [MoeAdd(num_experts=1, init="mean"), LlamaPro()])
    state = State.read(result.folder)
    assert state is not None
    absent = {f"{stem}{expert}.w1.weight" for expert in (2, 4)}
    of_layer = set(Source.open(result.folder, read_model(result.folder)).tensors.files)
    assert {name for name in of_layer if stem in name} - set(state.kinds["ema"].files) == absent


def test_nothing_of_new_experts_counts_as_old_knowledge(tmp_path: Path) -> None:
    source = oracle.saved(tiny_moe("mixtral"), tmp_path / "source")
    config = read_model(source).config
    for spec in (MoeAdd(num_experts=2), MoeAdd(num_experts=2, init="random")):
        steps = build_steps(Model(config), [spec], seed=0)
        masks = masks_of(config, steps)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            mask = masks[f"model.layers.1.mlp.{name}"]
            assert mask[:4].all() and not mask[4:].any()


def test_reset_new_gives_replicas_no_moments() -> None:
    config = tiny_moe("mixtral").config.to_dict()
    (step,) = build_steps(Model(config), [MoeAdd(addition="replicate", noise=0)], seed=0)
    tensors = step.parameter_map.tensors
    old, new = (tensors[f"layers.0.experts.{expert}.gate"] for expert in (1, 5))
    rule = STATE_KINDS["exp_avg"]
    assert rule.has_state(old, lambda _: True, policy="reset_new")
    assert not rule.has_state(new, lambda _: True, policy="reset_new")
    assert rule.has_state(new, lambda _: True, policy="carry")


def test_from_dense_in_one_go(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    specs = [Moe(num_experts=4, noise=0), MoeAdd(num_experts=2, init="random")]
    result = _expanded(tmp_path, model, *specs)
    assert AddedExperts.read(result.folder) == AddedExperts(experts=(4, 5))
    assert oracle.relative_difference(model, _ours(result.folder), oracle.tokens()) < 1e-4


def test_fused_files_say_the_same(tmp_path: Path) -> None:
    model = tiny_moe("qwen3_moe")
    hub = _expanded(tmp_path, model, MoeAdd(num_experts=2))
    live = expand(
        tmp_path / "source", tmp_path / "live", [MoeAdd(num_experts=2)], expert_layout="live"
    )
    assert torch.equal(
        oracle.logits(_ours(hub.folder), oracle.tokens()),
        oracle.logits(_ours(live.folder), oracle.tokens()),
    )


def test_experts_that_share_a_tensor_are_not_rounded_to_the_first_one(tmp_path: Path) -> None:
    expand(oracle.saved(tiny_moe("mixtral"), tmp_path / "plain"), tmp_path / "source", [Stack()])
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    first = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tensors[first] = tensors[first].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "source/tritter.json").unlink()
    live = expand(tmp_path / "source", tmp_path / "live", [LlamaPro()], expert_layout="live")
    stored = load_file(live.folder / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    assert stored.dtype == torch.float32
    other = tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    assert torch.equal(stored[1, : len(other)], other)


# Refusals


BAD: list[tuple[MoeAdd, str]] = [
    (MoeAdd(clone_from=(4,)), "there is no expert 4; must be from 0 to 3"),
    (MoeAdd(clone_from=(0, 1)), "one for each of 3 layers"),
    (MoeAdd(clone_from=(0,), init="mean"), "init=mean does not clone"),
    (MoeAdd(init="random", noise=0.5), "init=random makes none"),
    (MoeAdd(init="distill", teacher="x", num_experts=1), "must be at least 2"),
    (MoeAdd(addition="replicate", num_experts=3), "doubles the 4 experts, so it adds 4"),
    (MoeAdd(addition="replicate", init="mean"), "expansion.moe_add.init = mean"),
    (MoeAdd(addition="replicate", clone_from=(1,)), "addition=replicate clones every expert"),
]


@pytest.mark.parametrize(("spec", "words"), BAD, ids=lambda value: getattr(value, "name", value))
def test_targets_that_cannot_be_had(tmp_path: Path, spec: MoeAdd, words: str) -> None:
    source = oracle.saved(tiny_moe("mixtral"), tmp_path / "source")
    with pytest.raises(RequestError) as error:
        expand(source, tmp_path / "result", [spec])
    assert words in str(error.value) and "expansion.moe_add" in str(error.value)
    assert not (tmp_path / "result").exists()


def test_a_dense_model_is_sent_to_moe_first(tmp_path: Path) -> None:
    config = oracle.tiny_llama().config.to_dict()
    with pytest.raises(RequestError, match="apply moe first"):
        target_model(Model(config), [MoeAdd()])
    all_dense = tiny_moe("qwen3_moe", mlp_only_layers=[0, 1, 2]).config.to_dict()
    with pytest.raises(RequestError, match="has no experts"):
        target_model(Model(all_dense), [MoeAdd()])


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("spec", [MoeAdd(), MoeAdd(addition="replicate")])
@pytest.mark.parametrize("is_at_once", [True, False])
def test_no_more_experts_while_the_last_ones_are_closed(
    tmp_path: Path, spec: MoeAdd, is_at_once: bool
) -> None:
    first = _expanded(tmp_path, tiny_moe("mixtral"), MoeAdd(num_experts=2))
    with pytest.raises(RequestError, match="experts 4 to 5"):
        if is_at_once:
            plan_expansion(tmp_path / "source", [MoeAdd(num_experts=2), spec])
        else:
            plan_expansion(first.folder, [spec])
    AddedExperts(experts=(4, 5)).at(3, anneal_steps=3).write(first.folder)
    opened = plan_expansion(first.folder, [MoeAdd(num_experts=1)])
    assert opened.added_experts == AddedExperts(experts=(6,))


@pytest.mark.full
def test_replicas_may_be_followed_by_more(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    specs = [MoeAdd(addition="replicate", noise=0), MoeAdd(num_experts=1)]
    result = _expanded(tmp_path, model, *specs)
    assert AddedExperts.read(result.folder) == AddedExperts(experts=(8,))
    assert oracle.relative_difference(model, _ours(result.folder), oracle.tokens()) < 1e-4


def test_a_folder_whose_state_speaks_of_other_experts(tmp_path: Path) -> None:
    result = _expanded(tmp_path, tiny_moe("mixtral"), MoeAdd(num_experts=2))
    AddedExperts(experts=(6, 7)).write(result.folder)
    with pytest.raises(TritterError, match="does not match the model"):
        load_model(result.folder)


def test_a_number_of_parameters_is_reached(tmp_path: Path) -> None:
    config = tiny_moe("mixtral").config.to_dict()
    wanted = target_model(Model(config), [MoeAdd(num_experts=5)]).num_parameters
    (spec,) = reach_parameters(Model(config), [MoeAdd()], wanted + 50)
    assert isinstance(spec, MoeAdd) and spec.num_experts == 5
    with pytest.raises(RequestError, match="apply moe first"):
        reach_parameters(Model(oracle.tiny_llama().config.to_dict()), [MoeAdd()], wanted)


def test_notes_say_what_stock_classes_need() -> None:
    config = tiny_moe("mixtral").config.to_dict()
    (append,) = build_steps(Model(config), [MoeAdd()], seed=0)
    (replicate,) = build_steps(Model(config), [MoeAdd(addition="replicate")], seed=0)
    assert "experts 4 → 8, still 2 per token" in append.notes[0]
    assert "stock transformers" in append.notes[1]
    assert "experts 4 → 8, 2 → 4 per token" in replicate.notes[0]
    assert EXPANSIONS["moe_add"] is MoeAdd


# Live models


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_keeps_its_function_and_its_closed_experts(family: str) -> None:
    model = tiny_moe(family)
    grown = ModelExpander([MoeAdd(num_experts=2)]).expand(model)
    deeper = ModelExpander([Stack(identity_init=True)]).expand(grown)
    for after in (grown, deeper):
        after.set_experts_implementation("eager")
        assert oracle.relative_difference(model, after, oracle.tokens()) < 1e-5
        assert AddedExperts.of(after) == AddedExperts(experts=(4, 5))
    assert AddedExperts.of(model) is None and RouterControl.attached(model) is None
    with pytest.raises(RequestError, match="experts 4 to 5"):
        ModelExpander([MoeAdd()]).expand(grown)

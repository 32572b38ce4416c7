"""Experts from children: each is a child's FFN, the rest is averaged or of one model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import oracle
from tests.oracle.children import child, parent
from tests.oracle.families import tiny
from tests.oracle.moe import PARTNERS
from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.record import ExpansionRecord, LearnedDomain
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import Moe, MoeAdd, Width
from tritter.core.expansions.moe_children import BoundMoe, router_rows
from tritter.core.families import Model, forward_flops
from tritter.core.models import load_model, read_model
from tritter.core.stock_routers import RouterControl
from tritter.data.sources import TextRequest
from tritter.data.split import SplitRule
from tritter.errors import RequestError
from tritter.transform import DiskNeeds, expand, plan_expansion
from tritter.transform.children import _child_sequences, _ffn_moments, _OpenChild, router_flops

SIZE, NAMES = 300, ("a", "b", "c")
TOKENS = oracle.tokens(SIZE)


def family_of_models(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a float64 parent and three children of it."""
    changes = {"vocab_size": SIZE, "tie_word_embeddings": False, **changes}
    base = parent(folder / "base", tiny(family, **changes).double(), vocab_size=290)
    for number, name in enumerate(NAMES):
        child(folder / name, base, seed=number)
    return base


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return family_of_models(tmp_path)


def learned(place: Path, name: str, file: str, words: str) -> None:
    """Write a child whose lineage records training on a file."""
    lines = (" ".join(words[n % len(words) :: 1 + n % 3]) for n in range(40))
    path = place / file
    path.write_text("\n".join(f'{{"text": "{n} {line}"}}' for n, line in enumerate(lines)))
    documents = TextRequest((str(path),), key="data", text_field="text").documents()
    domain = LearnedDomain(paths=(str(path),), sha256=documents.digest())
    rule = SplitRule(seed=0, validation_fraction=0.1)
    seed = sum(map(ord, name))
    child(place / name, place / "base", seed=seed, domains={file: domain}, split=rule)


def moe(*listed: str, **options: Any) -> Moe:
    return Moe(experts_from=listed or NAMES, **options)


def stock(folder: Path) -> nn.Module:
    """Load with stock transformers; its default kernel has no float64."""
    return oracle.stock(folder, torch.float64, experts_implementation="eager")


def routed_to(model: nn.Module, expert: int) -> nn.Module:
    """Send every token to one expert."""
    routing = RouterControl.of(model)
    assert routing is not None
    routing.set_offset(range(routing.num_experts), 0.0)
    others = [other for other in range(routing.num_experts) if other != expert]
    routing.set_offset(others, -torch.inf)
    return model


def gap(before: nn.Module, after: nn.Module) -> float:
    with oracle.float64_casts():
        difference = oracle.logits(before, TOKENS) - oracle.logits(after, TOKENS)
    return float(difference.abs().max())


# The function


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", PARTNERS)
def test_a_child_is_in_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool
) -> None:
    """With its attention and norms, and all tokens on its expert, it computes its function."""
    monkeypatch.chdir(tmp_path)
    base = family_of_models(tmp_path, family, tie_word_embeddings=tied)
    children = [load_model(tmp_path / name, dtype=torch.float64) for name in NAMES]
    for number, name in enumerate(NAMES):
        spec = moe(attention_from=name, experts_per_token=1)
        made = expand(base, tmp_path / "mixed", [spec], overwrite=True)
        assert not made.plan.is_exact
        mixed = stock(tmp_path / "mixed")
        assert mixed.config.model_type == PARTNERS[family]
        assert gap(children[number], routed_to(mixed, number)) < 1e-10
        assert gap(children[number], routed_to(mixed, (number + 1) % 3)) > 1e-2
        notes = " ".join(made.steps[0].notes)
        assert f"preserved only for {name}, if its tokens are routed to its expert" in notes


def test_with_average_attention_no_child_is(base: Path, tmp_path: Path) -> None:
    made = expand(base, tmp_path / "mixed", [moe(experts_per_token=1)])
    mixed = stock(tmp_path / "mixed")
    for number, name in enumerate(NAMES):
        own = load_model(tmp_path / name, dtype=torch.float64)
        assert gap(own, routed_to(mixed, number)) > 1e-2
    assert "preserved for no model in the list" in " ".join(made.steps[0].notes)


@pytest.mark.full
@settings(max_examples=20)
@given(
    family=st.sampled_from(list(PARTNERS)),
    number=st.integers(2, 5),
    chosen=st.integers(1, 3),
    attention=st.sampled_from([None, "average", "source", "child_1"]),
    seed=st.integers(0, 5),
)
def test_equal_children_compute_the_function_of_the_parent(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    number: int,
    chosen: int,
    attention: str | None,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("equal")
    model = tiny(family, vocab_size=SIZE).double()
    base = parent(folder / "base", model, vocab_size=290)
    names = [str(child(folder / f"child_{n}", base, seed=n, change=_same)) for n in range(number)]
    spec = moe(
        *names,
        experts_per_token=min(chosen, number),
        attention_from=str(folder / attention) if attention == "child_1" else attention,
    )
    expand(base, folder / "mixed", [spec], seed=seed)
    assert gap(model, stock(folder / "mixed")) < 1e-10


def _same(value: Tensor, generator: torch.Generator) -> Tensor:
    """Reorder the neurons of FFNs: another model that computes the same function."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(generator.initial_seed()))
    for dim in (dim for dim, size in enumerate(value.shape) if size == 40):
        value = value.index_select(dim, order)
    return value


# Tensors and state


def test_tensors_are_means_or_bits_of_the_files(base: Path, tmp_path: Path) -> None:
    expand(base, tmp_path / "mixed", [moe("a", "b", "base")])
    made = load_file(tmp_path / "mixed" / "model.safetensors")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "base")]
    for expert, state in enumerate(stored):
        for part, name in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
            own = made[f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"]
            assert torch.equal(own, state[f"model.layers.1.mlp.{name}.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        mean = torch.stack([state[name] for state in stored]).mean(dim=0)
        assert torch.allclose(made[name], mean, rtol=0, atol=1e-14)
    rows = made["model.layers.1.block_sparse_moe.gate.weight"]
    assert rows.shape == (3, 24) and 0.5 < float(rows.std() * 24**0.5) < 2  # random


def test_state_follows_what_is_kept_of_the_source(base: Path, tmp_path: Path) -> None:
    source = Source.open(base, read_model(base))
    kinds = {kind: source.stream() for kind in ("exp_avg", "fisher", "anchor")}
    write_state(base, kinds, step=3)
    for attention, is_kept in {"source": True, "average": False, "a": False}.items():
        expand(base, tmp_path / "mixed", [moe(attention_from=attention)], overwrite=True)
        state = State.read(tmp_path / "mixed")
        found = {} if state is None else {k: set(t.headers) for k, t in state.kinds.items()}
        attention_names = {"model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
        for names in found.values():
            assert (attention_names <= names) == is_kept
            assert not any("block_sparse_moe" in name for name in names)


def test_the_record_names_the_children_and_a_repetition_checks_them(
    base: Path, tmp_path: Path
) -> None:
    made = expand(base, tmp_path / "mixed", [moe("a", "b")])
    record = made.lineage.expansion_history[-1]
    hashes = [Lineage.of(tmp_path / name).model_hash for name in ("a", "b")]
    assert list(record.options["expert_hashes"]) == hashes and not record.claims_exact
    again = plan_expansion(base, [moe("a", "b", expert_hashes=tuple(hashes))])
    assert again.parameter_map.digest() == record.map_digest
    with pytest.raises(RequestError, match="have other hashes"):
        plan_expansion(base, [moe("a", "c", expert_hashes=tuple(hashes))])
    other = plan_expansion(base, [moe("a", "c")])
    assert other.parameter_map.digest() != record.map_digest


def test_more_experts_can_follow(base: Path, tmp_path: Path) -> None:
    expand(base, tmp_path / "more", [moe(), MoeAdd(num_experts=1)])
    assert read_model(tmp_path / "more").config["num_local_experts"] == 4


def test_the_dtype_is_that_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = parent(tmp_path / "base", tiny("llama", vocab_size=SIZE).bfloat16(), vocab_size=290)
    for number, name in enumerate(NAMES):
        child(tmp_path / name, base, seed=number)
    expand(base, tmp_path / "mixed", [moe()])
    made = load_file(tmp_path / "mixed" / "model.safetensors")
    assert {value.dtype for value in made.values()} == {torch.bfloat16}


# The door


def _plain(folder: Path, base: Path) -> None:
    child(folder, base, seed=9)
    (folder / "tritter.json").unlink()


def _of_another(folder: Path, base: Path) -> None:
    child(folder, base, seed=9, parent_hash="0" * 64, base_model_hash="1" * 64, parent_path="../x")


def _of_a_third(folder: Path, base: Path) -> None:
    child(folder.parent / "third", base, seed=8, parent_hash=None, base_model_hash=None)
    child(folder, folder.parent / "third", seed=9)


def _expanded(folder: Path, base: Path) -> None:
    record = ExpansionRecord(
        timestamp="",
        expansion_type="depth",
        method="layers",
        options={},
        seed=0,
        source_config={},
        target_config={},
        layer_sources=(),
        map_digest="0" * 64,
        claims_exact=True,
    )
    child(folder, base, seed=9, expansion_history=(record,))


def _wider(folder: Path, base: Path) -> None:
    expand(base, folder, [Width(intermediate_size=80)])


def _other_tokens(folder: Path, base: Path) -> None:
    """The same weights with another tokenizer: its children have the same hash as a parent."""
    other = parent(base.parent / "same", load_model(base, dtype=torch.float64), vocab_size=280)
    child(folder, other, seed=9)


def _other_norm(folder: Path, base: Path) -> None:
    child(folder, base, seed=9, config={"rms_norm_eps": 0.25})


def _changed(folder: Path, base: Path) -> None:
    child(folder, base, seed=9)
    text = (folder / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(text + " ", encoding="utf-8")


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_plain, "no tritter.json that shows"),
        (_of_another, "its ancestor 000000000000 was not found, .* put that folder next to it"),
        (_of_a_third, "does not contain the source"),
        (_expanded, "it was expanded"),
        (_wider, "other shapes"),
        (_other_tokens, "its tokenizer.json is not that of the source"),
        (_other_norm, "its config.json has rms_norm_eps = 0.25"),
        (_changed, "was changed since its lineage was written: tokenizer.json"),
    ],
)
def test_a_model_that_is_no_child_is_refused(
    base: Path, tmp_path: Path, make: Callable[[Path, Path], None], reason: str
) -> None:
    make(tmp_path / "other", base)
    with pytest.raises(RequestError, match=reason) as error:
        plan_expansion(base, [moe("a", "other")])
    assert "expansion.moe.experts_from" in str(error.value)


def test_one_model_in_two_spellings_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"a and \./a are the same model; list it once"):
        plan_expansion(base, [moe("a", "b", "./a")])
    child(tmp_path / "same", base, seed=0, change=lambda value, _: value)
    with pytest.raises(RequestError, match="base and same are the same model"):
        plan_expansion(base, [moe("a", "base", "same")])


def test_the_record_has_absolute_paths(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, a relative one could even be a hub id."""
    made = expand(base, tmp_path / "mixed", [moe("./a", "b", attention_from="b")])
    options = made.lineage.expansion_history[-1].options
    listed = tuple(str(tmp_path / name) for name in "ab")
    assert tuple(options["experts_from"]) == listed and options["attention_from"] == listed[1]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = plan_expansion(base, [Moe(**options)])
    assert again.parameter_map.digest() == made.plan.parameter_map.digest()


def test_with_attention_of_the_source_the_parent_is_in_the_mixture(
    base: Path, tmp_path: Path
) -> None:
    spec = moe("a", "base", attention_from="source", experts_per_token=1)
    made = expand(base, tmp_path / "mixed", [spec])
    assert "preserved only for base, if its" in " ".join(made.steps[0].notes)
    mixed = stock(tmp_path / "mixed")
    assert gap(load_model(base, dtype=torch.float64), routed_to(mixed, 1)) < 1e-10
    notes = plan_expansion(base, [moe(attention_from="source")]).steps[0].notes
    assert "preserved for no model in the list" in " ".join(notes)


def test_dense_layers_follow_the_attention(base: Path) -> None:
    """Also in the model whose hidden states give the router rows."""
    source = Source.open(base, read_model(base))
    chosen = moe(attention_from="source", layers=(0,), target="qwen2_moe")
    spec = plan_expansion(source, [chosen]).steps[0].spec
    assert isinstance(spec, BoundMoe)
    maps = spec.dense_map(source.model).tensors
    assert maps["layers.1.ffn.up"].source == "layers.1.ffn.up"
    assert maps["layers.0.ffn.up"].source is None


def test_tensors_that_changed_after_training_are_found(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "b" / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(RequestError, match="was changed since its lineage"):
        expand(base, tmp_path / "mixed", [moe()])
    assert not (tmp_path / "mixed").exists()


def test_values_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    def broken(value: Tensor, _: torch.Generator) -> Tensor:
        return value / 0 if value.ndim == 2 else value

    child(tmp_path / "broken", base, seed=1, change=broken)
    with pytest.raises(RequestError, match="not finite"):
        expand(base, tmp_path / "mixed", [moe("a", "broken")])


@pytest.mark.parametrize(
    ("make", "key", "reason"),
    [
        (partial(moe, "a"), "experts_from", "list 2 to"),
        (partial(moe, "a", "a"), "experts_from", "different models"),
        (partial(moe, num_experts=4), "num_experts", "lists 3; remove one of the two"),
        (partial(moe, granularity=2), "granularity", "are not split"),
        (partial(moe, norm_topk_prob=False), "norm_topk_prob", "not scaled up"),
        (partial(moe, target="glm4_moe"), "target", "can.t come from other models"),
        (partial(moe, reinit_fraction=0.5), "reinit_fraction", "neurons of copies"),
        (partial(moe, noise=0.1), "noise", "added to copies"),
        (partial(moe, attention_from="d"), "attention_from", "one of average, source, a, b, c"),
        (partial(Moe, attention_from="average"), "attention_from", "experts_from, which is not"),
        (partial(Moe, router="data"), "router", "experts_from, which is not set"),
    ],
)
def test_options_that_contradict_each_other(make: Callable[[], Moe], key: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as error:
        make()
    assert f"expansion.moe.{key}" in str(error.value)


def test_the_place_among_expansions_and_a_live_model(base: Path) -> None:
    with pytest.raises(RequestError, match="must be the first expansion"):
        plan_expansion(base, [Width(intermediate_size=80), moe()])
    with pytest.raises(RequestError, match="needs a folder"):
        from tests.oracle.moe import upcycled

        upcycled(tiny("llama"), [moe()])
    with pytest.raises(RequestError, match="records no training data; use random"):
        plan_expansion(base, [moe(router="data")])


# The router


def rows_of(samples: list[Tensor]) -> Tensor:
    within = torch.stack([each.T.cov(correction=0) for each in samples]).mean(dim=0)
    return router_rows(torch.stack([each.mean(dim=0) for each in samples]), within)


def test_rows_are_a_linear_discriminant() -> None:
    """Against log densities of normal distributions, which an independent formula computes."""
    torch.manual_seed(0)
    size, number, count = 12, 3, 4000
    common = 3 * torch.randn(size).double()
    means = common + torch.randn(number, size).double()
    root = torch.randn(size, size).double() / size**0.5
    samples = [mean + torch.randn(count, size).double() @ root.T for mean in means]
    rows = rows_of(samples)
    centre = torch.stack([each.mean(dim=0) for each in samples]).mean(dim=0)
    assert (rows @ centre).abs().max() < 1e-9 * rows.norm() * centre.norm()
    normal = [torch.distributions.MultivariateNormal(m, root @ root.T) for m in means]
    fresh = [mean + torch.randn(count, size).double() @ root.T for mean in means]
    hits, best = (
        sum(int((score(each).argmax(dim=1) == n).sum()) for n, each in enumerate(fresh))
        for score in (
            lambda x: x @ rows.T,
            lambda x: torch.stack([each.log_prob(x) for each in normal], dim=1),
        )
    )
    assert hits > 0.93 * best > 0.6 * number * count
    plain = sum(int(((each @ means.T).argmax(dim=1) == n).sum()) for n, each in enumerate(fresh))
    assert plain < hits  # rows that are not centred: the longest mean wins


def test_moments_add_up_over_batches() -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 2))
    tokens = torch.randint(50, (20, 7))
    ((mean, covariance),) = _ffn_moments(model, ["1"], tokens)
    hidden = model[0](tokens).detach().flatten(0, 1).double()
    assert torch.allclose(mean, hidden.mean(dim=0))
    assert torch.allclose(covariance, hidden.T.cov(correction=0))


def test_children_of_the_same_data_get_random_rows(base: Path, tmp_path: Path) -> None:
    """Rows that distinguish them would be zero, so that a tie would always choose the same."""
    for name, file in {"d": "x.jsonl", "e": "y.jsonl", "f": "x.jsonl"}.items():
        learned(tmp_path, name, file, "the quick brown" if file[0] == "x" else "0123 45 6789")
    made = expand(base, tmp_path / "mixed", [moe("d", "e")])
    assert "router rows from training documents" in " ".join(made.steps[0].notes)
    made = expand(base, tmp_path / "same", [moe("d", "e", "f")])
    notes = " ".join(made.steps[0].notes)
    assert "random rows, because d and f learned the same data" in notes
    with pytest.raises(RequestError, match="d and f learned the same data; use random"):
        plan_expansion(base, [moe("d", "e", "f", router="data")])


def test_equal_rows_are_refused() -> None:
    hidden = [torch.randn(50, 6).double() + 1 for _ in range(2)]
    rows_of(hidden)
    with pytest.raises(RequestError, match="on the data of two models are the same; use random"):
        rows_of([*hidden, hidden[0] + 1e-9])


def test_data_that_changed_gives_no_rows(base: Path, tmp_path: Path) -> None:
    for name, words in {"d": "the quick brown", "e": "0123 45 6789"}.items():
        learned(tmp_path, name, f"{name}.jsonl", words)
    planned = plan_expansion(base, [moe("d", "e")])
    (tmp_path / "e.jsonl").write_text('{"text": "other"}')
    with pytest.raises(RequestError, match=r"the data e\.jsonl of e .* has changed since"):
        expand(base, tmp_path / "mixed", planned)
    assert not (tmp_path / "mixed").exists()
    notes = plan_expansion(base, [moe("d", "e")]).steps[0].notes
    assert "random rows, because the data e.jsonl of e can't be used" in " ".join(notes)


def test_rows_of_three_children_are_those_of_their_moments(base: Path, tmp_path: Path) -> None:
    """The sum over children, its FLOPs, and the memory that is promised."""
    texts = {"d": "the quick brown", "e": "0123 45 6789", "f": "lazy dog jumps over"}
    for name, words in texts.items():
        learned(tmp_path, name, f"{name}.jsonl", words)
    source = Source.open(base, read_model(base))
    with_data = plan_expansion(source, [moe(*texts)])
    random = plan_expansion(source, [moe(*texts, router="random")])
    spec = with_data.steps[0].spec
    assert isinstance(spec, BoundMoe) and spec.routers is not None
    rows = spec.routers.rows(1)
    found, number = [], 0
    model = load_model(base)
    maps = spec.dense_map(source.model).tensors
    for stored in Model(source.config).layout("live"):
        value = stored.pack(lambda n: maps[n].rounded_weight(source.read, torch.float32))
        model.get_parameter(stored.name).data.copy_(value)
    for each in spec.experts:
        assert isinstance(each, _OpenChild)
        tokens = _child_sequences(
            each, length=Model(source.config).position_limit or 256, vocab_size=SIZE
        )
        number += len(tokens)
        with torch.no_grad():
            inputs = ffn_inputs(model, tokens)
        found.append(inputs.flatten(0, 1).double())
    assert torch.allclose(rows, rows_of(found).float(), rtol=1e-4, atol=1e-6)
    flops = forward_flops(source.model).of(tokens.shape[1])
    assert router_flops(with_data) == number * flops and router_flops(random) == 0
    more = DiskNeeds.of(source, with_data).in_flight - DiskNeeds.of(source, random).in_flight
    layers = source.model.sizes.num_hidden_layers
    assert more > 4 * with_data.source.num_parameters + 2 * layers * 24 * 24 * 8


def ffn_inputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the inputs of the second layer's FFN."""
    caught: list[Tensor] = []
    module = model.get_submodule("model.layers.1.mlp")
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    model(tokens)
    hook.remove()
    return caught[0]

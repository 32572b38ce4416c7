"""FFNs of different width: live in memory, padded on disk, the same function in stock classes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import oracle
from tests.oracle.families import GROWABLE, HEADS_DIVIDE_HIDDEN, LAYER_NORM, generic, tiny
from tests.oracle.sizes import SIZES, uneven, written
from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.export import Weights
from tritter.checkpoints.history import Link
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Width, build_steps
from tritter.core.families import Model, family_of, ffn_sizes, forward_flops, on_disk
from tritter.core.models import load_model, model_of, model_with_tensors, read_model
from tritter.core.parameter_map.carry import MOMENTS
from tritter.errors import RequestError, TritterError
from tritter.storage.writer import TensorStream
from tritter.transform import expand
from tritter.transform.live import ModelExpander

IDENTITY, STOCK = 1e-10, 1e-4


def logits(model: nn.Module) -> Tensor:
    with oracle.float64_casts():
        return oracle.logits(model.eval(), oracle.tokens(int(model.config.vocab_size)))


def stock_errors(model: nn.Module, folder: Path) -> tuple[float, float]:
    """Return max |Δ logits| of stock classes in float64, in float32 in parts of their spread."""
    expected = logits(model)
    error = float((logits(oracle.stock(folder, torch.float64)) - expected).abs().max())
    ids = oracle.tokens(int(model.config.vocab_size))
    single = oracle.logits(oracle.stock(folder), ids).double() - expected
    return error, float(single.abs().max() / expected.std())


@st.composite
def models(draw: st.DrawFn, family: str) -> nn.Module:
    """A tiny stock model in float64 with FFNs of any widths."""
    sizes = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    hidden = draw(st.integers(5, 20))
    if family in HEADS_DIVIDE_HIDDEN:
        hidden = -(-hidden // 4) * 4
    options = {"tie_word_embeddings": draw(st.booleans()), "vocab_size": 31}
    if family == "llama":
        options["mlp_bias"] = draw(st.booleans())
    return uneven(family, sizes, hidden_size=hidden, **options).double()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic(GROWABLE))
@settings(max_examples=5)
@given(data=st.data())
def test_stock_classes_compute_the_same_from_disk_and_the_padding_comes_off(
    family: str, data: st.DataObject
) -> None:
    model = data.draw(models(family))
    with TemporaryDirectory() as place:
        folder = written(model, Path(place) / "model")
        identity, stock = stock_errors(model, folder)
        assert identity < IDENTITY and stock < STOCK
        loaded = load_model(folder, dtype=torch.float64)
        held = dict(loaded.named_parameters())
        assert held.keys() == dict(model.named_parameters()).keys()
        assert all(held[name].equal(value) for name, value in model.named_parameters())
        # Where weights lie in memory decides how a sum of so few is rounded
        assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-12)
        assert [link.differences() for link in Link.chain(folder)] == [()]


@pytest.mark.parametrize("family", generic(GROWABLE))
def test_shapes_counts_and_flops_are_those_of_the_live_model(family: str) -> None:
    model = uneven(family, SIZES)
    config = model_of(model).config
    table = family_of(config)
    widest = table.sizes["intermediate_size"]
    assert ffn_sizes(config) == SIZES and config[widest] == 40
    assert {stored.name: stored.shape for stored in Model(config).layout("live")} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    count = sum(parameter.numel() for parameter in model.parameters())
    assert Model(config).num_parameters == count < Model(on_disk(config)).num_parameters
    matrices = 3 if table.has_gate else 2  # gate, up and down, or the last two
    saved = sum(2 * matrices * 24 * (40 - size) for size in SIZES)  # a multiply-add
    padded = forward_flops(Model(on_disk(config))).of(1)
    assert forward_flops(Model(config)).of(1) == padded - saved
    even = tiny(family)
    assert "ffn_sizes" not in model_of(even).config and model_of(even).config[widest] == 40


def test_the_folder_says_what_is_padding_and_config_json_does_not(tmp_path: Path) -> None:
    folder = written(uneven("llama", SIZES), tmp_path / "model")
    plain = json.loads((folder / "config.json").read_text())
    assert plain["intermediate_size"] == 40 and "ffn_sizes" not in plain
    lineage = Lineage.read(folder)
    assert lineage is not None and lineage.ffn_sizes == SIZES
    assert read_model(folder).config["ffn_sizes"] == list(SIZES)
    assert "FFN 7 to 40" in (folder / "README.md").read_text()
    gate = load_file(folder / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"]
    assert gate.shape == (40, 24) and not gate[7:].any()


def test_a_model_of_equal_widths_has_none_of_its_own() -> None:
    config = model_of(uneven("llama", (16, 16))).config
    assert "ffn_sizes" not in config and config["intermediate_size"] == 16
    again = family_of(config).with_ffn_sizes({**config, "num_hidden_layers": 3}, [9, 8, 8])
    deeper = family_of(config).with_layers(again, [1, 2, 1, 2])
    assert "ffn_sizes" not in deeper and deeper["intermediate_size"] == 8


def test_models_are_built_in_their_live_widths() -> None:
    model = uneven("qwen3", SIZES).double()
    config = model_of(model).config
    held = dict(Model(config).disk_tensors(model.state_dict()))
    names = Model(config).tensors
    built = model_with_tensors(Model(config), {t.name: held[t.disk_name] for t in names})
    assert torch.equal(logits(built), logits(model))
    up = built.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(up, nn.Linear) and (up.in_features, up.out_features) == (24, 12)


def test_live_models_grow_in_their_live_widths() -> None:
    model = uneven("qwen2", SIZES).double()
    grown = ModelExpander([LlamaPro(target_layers=5), Width(hidden_size=48)]).expand(model)
    assert ffn_sizes(model_of(grown).config) == (24, 80, 80, 14, 14)
    assert float((logits(grown) - logits(model)).abs().max()) < IDENTITY


def _edited(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    plain = json.loads((folder / "tritter.json").read_text())
    change(plain)
    (folder / "tritter.json").write_text(json.dumps(plain))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("sizes", [[7, 40, 12], [12, 40, 6]])
def test_widths_that_would_cut_weights_off_are_refused(tmp_path: Path, sizes: list[int]) -> None:
    """The negative control: a strip that takes more than zeros must fail."""
    folder = written(uneven("llama", SIZES), tmp_path / "model")
    _edited(folder, lambda plain: plain.update(ffn_sizes=sizes))
    with pytest.raises(TritterError, match=r"is not zero outside"):
        load_model(folder)
    source = Source.open(folder, read_model(folder))
    with pytest.raises(TritterError, match=r"mlp\.gate_proj\.weight.* is not zero outside"):
        for name in source.stored_parts:
            source.read(name)


def test_padding_that_was_written_to_is_refused(tmp_path: Path) -> None:
    folder = written(uneven("llama", SIZES), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 20] = 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TritterError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        load_model(folder)


@pytest.mark.parametrize("sizes", [[12, 40], [12, 41, 7], [12, 30, 7], [0, 40, 7], [True, 40, 7]])
def test_widths_of_another_model_are_refused(tmp_path: Path, sizes: list[int]) -> None:
    folder = written(uneven("llama", SIZES), tmp_path / "model")
    _edited(folder, lambda plain: plain.update(ffn_sizes=sizes))
    with pytest.raises(TritterError, match=r"ffn_sizes = .*must be a width"):
        read_model(folder)


def test_config_json_may_not_state_widths(tmp_path: Path) -> None:
    folder = oracle.saved(oracle.tiny_llama(), tmp_path / "model")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "ffn_sizes": list(SIZES)}))
    with pytest.raises(TritterError, match=r"belong in tritter\.json"):
        read_model(folder)


GROWN: list[tuple[list[ExpansionSpec], Sequence[int]]] = [
    ([Width(hidden_size=48)], (24, 80, 14)),
    ([Width(intermediate_size=60, init="net2net")], (18, 60, 10)),
    ([LlamaPro(target_layers=5)], (12, 40, 40, 7, 7)),
    ([Dus(target_layers=4, identity_init=True), Width(init="zero_pad")], (24, 80, 80, 14)),
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic(GROWABLE))
@pytest.mark.parametrize(("specs", "sizes"), GROWN, ids=["fresh", "net2net", "llama_pro", "both"])
def test_expansions_on_top_keep_the_function(
    tmp_path: Path, family: str, specs: list[ExpansionSpec], sizes: Sequence[int]
) -> None:
    if family in LAYER_NORM:
        copies = {"fresh", "zero_pad"}
        specs = [
            replace(spec, init="net2net") if getattr(spec, "init", "") in copies else spec
            for spec in specs
        ]
    model = uneven(family, SIZES).double()
    grown = expand(written(model, tmp_path / "model"), tmp_path / "grown", specs)
    assert grown.lineage.ffn_sizes == tuple(sizes)
    identity, stock = stock_errors(model, grown.folder)
    assert identity < IDENTITY and stock < STOCK
    live = load_model(grown.folder, dtype=torch.float64)
    assert float((logits(live) - logits(model)).abs().max()) < IDENTITY
    assert grown.parameters_after == sum(p.numel() for p in live.parameters())
    assert all(link.differences() == () for link in Link.chain(grown.folder))


def test_an_export_is_stock_and_padded(tmp_path: Path) -> None:
    model = uneven("gemma3_text", SIZES).double()
    folder = written(model, tmp_path / "model")
    weights = Weights.of(Source.open(folder, read_model(folder)))
    exported = weights.export(tmp_path / "out", dtype=torch.float64, artifacts=())
    assert (
        "ffn_sizes" not in exported.model.config and not (exported.folder / "tritter.json").exists()
    )
    assert "ffn_sizes" not in read_model(exported.folder).config
    identity, stock = stock_errors(model, exported.folder)
    assert identity < IDENTITY and stock < STOCK


@pytest.mark.parametrize(
    ("spec", "reason"),
    [(Moe(), "experts have one width in all layers"), (Width(init="aki"), "the layer above")],
)
def test_what_needs_layers_of_one_width_is_refused(spec: ExpansionSpec, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        build_steps(model_of(uneven("llama", SIZES)), [spec], seed=0)


def test_experts_have_one_width(tmp_path: Path) -> None:
    folder = written(tiny("mixtral"), tmp_path / "model")
    _edited(folder, lambda plain: plain.update(ffn_sizes=list(SIZES)))
    with pytest.raises(TritterError, match="all layers have one width"):
        read_model(folder)


def test_state_follows_in_live_widths(tmp_path: Path) -> None:
    model = uneven("llama", SIZES)
    folder = written(model, tmp_path / "model")
    tensors = dict(model_of(model).disk_tensors(model.state_dict()))
    moments = {kind: {n: t.abs() for n, t in tensors.items()} for kind in MOMENTS}
    write_state(folder, {k: TensorStream.of(t.items()) for k, t in moments.items()}, step=3)
    grown = expand(folder, tmp_path / "grown", [LlamaPro(target_layers=4), Width()])
    state = State.read(grown.folder)
    assert state is not None
    down = state.kinds["exp_avg"].get("model.layers.1.mlp.down_proj.weight")
    assert down.shape == (48, 80)
    assert down[:24, :40].equal(moments["exp_avg"]["model.layers.1.mlp.down_proj.weight"])

"""Experts on disk and in memory: separate tensors, or stacked per layer; nothing is lost."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import DENSE, SPARSE, generic, tiny
from tritter.checkpoints.source import Source
from tritter.core.expansions import ExpansionSpec, LlamaPro, Moe, Stack
from tritter.core.families import Model, pack_all, unpack_all
from tritter.core.models import load_model, read_model
from tritter.errors import TritterError
from tritter.transform import expand


def fused(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model under its names in memory, as some tools do."""
    oracle.saved(model, folder)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("family", generic())
def test_the_hub_layout_is_what_stock_saves_and_the_live_one_what_it_holds(
    tmp_path: Path, family: str
) -> None:
    model = tiny(family)
    config = oracle_growth.config_of(model)
    saved = tensors_of(oracle.saved(model, tmp_path / "source"))
    hub = {stored.name: stored.shape for stored in Model(config).layout("hub")}
    live = {stored.name: stored.shape for stored in Model(config).layout("live")}
    assert hub == {name: tuple(value.shape) for name, value in saved.items()}
    assert live == {name: tuple(p.shape) for name, p in model.named_parameters()}
    renamed = {"embed_out.weight", "lm_head.weight"} if family == "gpt_neox" else set()
    assert (hub.keys() ^ live.keys() == renamed) == (family in DENSE)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3_text", "mixtral", "phi3"])
def test_a_folder_of_a_model_without_its_head_is_read_if_the_head_is_tied(
    tmp_path: Path, family: str
) -> None:
    """As embedding models are published: `AutoModel` saves no prefix."""
    model = tiny(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "source")
    assert not any(
        name.startswith(("model.", "transf")) for name in tensors_of(tmp_path / "source")
    )
    result = expand(tmp_path / "source", tmp_path / "result", [LlamaPro()])
    grown = oracle.stock(result.folder)
    assert oracle.relative_difference(model, grown, oracle.tokens()) < 1e-4
    assert {*tensors_of(result.folder)} == {
        name for name, _ in result.plan.target.disk_tensors(grown.state_dict())
    }


@pytest.mark.parametrize("family", SPARSE)
def test_parts_are_those_that_stock_unfuses(tmp_path: Path, family: str) -> None:
    """Gate rows precede up rows; experts are stacked in order."""
    model = tiny(family)
    config = oracle_growth.config_of(model)
    saved = tensors_of(oracle.saved(model, tmp_path / "source"))
    named = dict(Model(config).disk_tensors(model.state_dict()))
    assert named.keys() == saved.keys()
    assert all(torch.equal(named[name], saved[name]) for name in saved)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in Model(config).live_tensors(saved).items())
    assert all(
        torch.equal(v, saved[k]) for k, v in oracle.disk_tensors(Model(config), state).items()
    )


@pytest.mark.parametrize("family", SPARSE)
def test_packing_is_undone_by_unpacking(family: str) -> None:
    model = tiny(family)
    config = oracle_growth.config_of(model)
    values = unpack_all(Model(config).layout("live"), model.state_dict())
    assert set(values) == {tensor.name for tensor in Model(config).tensors}
    again = pack_all(Model(config).layout("live"), values)
    assert all(torch.equal(again[name], model.state_dict()[name]) for name in again)
    one = "layers.2.experts.1.down" if family == "qwen2_moe" else "layers.1.experts.1.down"
    (alone,) = pack_all(Model(config).layout("live"), {one: values[one]}).values()
    assert torch.equal(alone[1], values[one])
    assert not bool(alone[0].any()) and not bool(alone[2:].any())


@pytest.mark.parametrize("family", SPARSE)
def test_a_checkpoint_of_either_layout_is_matched_in_full(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    config = oracle_growth.config_of(model)
    for kind in ("hub", "live"):
        stored = Model(config).layout(kind)  # type: ignore[arg-type]
        names = {tensor.name for tensor in stored}
        assert Model(config).match(names) == stored
        missing = next(name for name in names if "experts" in name)
        with pytest.raises(TritterError, match="1 tensors are missing") as error:
            Model(config).match(names - {missing})
        assert missing in str(error.value)
        with pytest.raises(
            TritterError, match=r"does not have: model\.layers\.0\.mlp\.experts\.extra"
        ):
            Model(config).match({*names, "model.layers.0.mlp.experts.extra"})


SPECS: list[list[ExpansionSpec]] = [[LlamaPro()], [Stack(identity_init=True), LlamaPro()]]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("specs", SPECS, ids=str)
@pytest.mark.parametrize("family", SPARSE)
def test_either_layout_in_and_out(tmp_path: Path, family: str, specs: list[ExpansionSpec]) -> None:
    model = tiny(family)
    sources = {
        "hub": oracle.saved(model, tmp_path / "hub"),
        "live": fused(model, tmp_path / "live"),
    }
    results = {}
    for came in sources:
        for goes in ("hub", "live"):
            folder = tmp_path / f"{came}-{goes}"
            results[came, goes] = expand(
                sources[came], folder, specs, expert_layout=goes, max_shard_bytes=30_000
            )
            after = oracle.stock(folder)
            assert oracle.relative_difference(model, after, oracle.tokens()) < 1e-4
            ours = load_model(folder)
            assert oracle.relative_difference(after, ours, oracle.tokens()) < 1e-5
    for goes in ("hub", "live"):
        first, second = tensors_of(tmp_path / f"hub-{goes}"), tensors_of(tmp_path / f"live-{goes}")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        hashes = {results[came, goes].lineage.model_hash for came in sources}
        assert len(hashes) == 1
    # The hash covers the tensors in their layout on disk
    assert len({result.lineage.model_hash for result in results.values()}) == 2
    assert len({result.lineage.parent_hash for result in results.values()}) == 2


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_upcycling_writes_either_layout(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    source = oracle.saved(model, tmp_path / "source")
    spec = Moe(noise=0.0, num_experts=4)
    hub = expand(source, tmp_path / "hub", [spec])
    live = expand(source, tmp_path / "live", [spec], expert_layout="live")
    assert len(tensors_of(live.folder)) < len(tensors_of(hub.folder))
    assert hub.lineage.parent_hash == live.lineage.parent_hash
    first, second = oracle.stock(hub.folder), oracle.stock(live.folder)
    assert all(
        torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items()
    )


def test_one_expert_is_read_out_of_its_layer(tmp_path: Path) -> None:
    model = tiny("mixtral")
    folder = fused(model, tmp_path / "source")
    source = Source.open(folder, read_model(folder))
    experts = model.model.layers[1].mlp.experts
    up, down = source.read("layers.1.experts.2.up"), source.read("layers.1.experts.2.down")
    assert torch.equal(up, experts.gate_up_proj[2, 40:])
    assert torch.equal(down, experts.down_proj[2])
    assert source.dtype("layers.1.experts.2.up") is torch.float32


def test_a_layer_that_stays_dense_has_the_dense_tensors() -> None:
    config = oracle_growth.config_of(tiny("qwen3_moe"))
    assert Model(config).layer_kinds[:3] == ["dense", "sparse", "dense"]
    names = {tensor.name for tensor in Model(config).tensors}
    assert {"layers.0.ffn.gate", "layers.1.experts.3.gate", "layers.1.router"} <= names
    assert not {"layers.1.ffn.gate", "layers.0.router"} & names
    none = dataclasses.replace(Model(config).family, sparse_layers="none")
    assert not none.has_experts

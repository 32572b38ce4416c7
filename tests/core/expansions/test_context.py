"""A longer context: stock classes read the new rotations, weights and state keep their bits."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests import oracle
from tests.core.families.model_types import example
from tests.oracle.families import generic, tiny
from tritter.checkpoints import Lineage
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import Context, LlamaPro, Width
from tritter.core.expansions.on_twin import check_rotations
from tritter.core.families import Model
from tritter.core.families.discovery.twin import Twin
from tritter.core.models import model_of
from tritter.errors import RequestError
from tritter.limits import MAX_POSITIONS
from tritter.storage.writer import TensorStream
from tritter.transform import expand, plan_expansion

LENGTH = 64  # of the sources
METHODS: tuple[Literal["base", "yarn"], ...] = ("base", "yarn")
WHOLE = {"mistral": None, "phi3": None}  # families whose layers all have a window in the oracle


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def yarn(factor: float, first: int) -> dict[str, Any]:
    """Return the change of a config to YaRN, as published configs have it."""
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor}
    return {"rope_parameters": {**scaled, "original_max_position_embeddings": first}}


def positions(count: int) -> dict[str, Any]:
    return {"max_position_embeddings": count}


def rotations_of(config: Any) -> list[dict[str, Any]]:
    parameters = config["rope_parameters"]
    return [parameters[k] for k in ("full_attention",) if k in parameters] or [parameters]


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", generic())
def test_every_family_reads_longer_sequences(tmp_path: Path, family: str, method: Any) -> None:
    changes = {"sliding_window": None} if family in WHOLE else {}
    model = tiny(family, **changes)
    oracle.saved(model, tmp_path / "base")
    spec, grown = Context(method=method), tmp_path / "grown"
    if family == "gpt2" or (family, method) == ("phi3", "yarn"):
        with pytest.raises(RequestError, match=r"no rotary embeddings|LongRoPE; use base"):
            expand(tmp_path / "base", grown, [spec])
        return
    step = expand(tmp_path / "base", grown, [spec]).steps[0]
    assert not step.is_exact
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "grown"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = config_in(grown)
    assert config["max_position_embeddings"] == 4 * LENGTH
    stock = oracle.stock(grown)
    assert stock.config.to_dict()["rope_parameters"] == config["rope_parameters"]
    assert oracle.logits(stock, oracle.tokens(97, length=3 * LENGTH)).isfinite().all()
    # The control of `is_exact`: near tokens are rotated differently too
    short = oracle.tokens(97, length=LENGTH // 2)
    assert oracle.relative_difference(model, stock, short) > 1e-3
    assert Lineage.of(grown).expansion_history[-1].claims_exact is False


def test_base_follows_the_rule_and_yarn_that_of_transformers(tmp_path: Path) -> None:
    model = tiny("glm4")  # half of each head is rotated
    source = oracle.saved(model, tmp_path / "base")
    old = rotations_of(config_in(source))[0]
    dimensions = int(6 * old["partial_rotary_factor"])
    expand(source, tmp_path / "b", [Context(target_length=160, method="base")])
    new = rotations_of(config_in(tmp_path / "b"))[0]
    expected = old["rope_theta"] * 2.5 ** (dimensions / (dimensions - 2))
    assert math.isclose(new["rope_theta"], expected) and new["rope_type"] == "default"
    expand(source, tmp_path / "y", [Context(target_length=160, method="yarn")])
    new = rotations_of(config_in(tmp_path / "y"))[0]
    assert new["factor"] == 2.5 and new["original_max_position_embeddings"] == LENGTH
    stock = oracle.stock(tmp_path / "y")
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](stock.config)
    assert math.isclose(factor, 0.1 * math.log(2.5) + 1)


def test_the_fastest_rotation_is_kept_by_yarn_and_the_slowest_is_divided(tmp_path: Path) -> None:
    source = oracle.saved(oracle.tiny_llama(head_dim=64, rope_theta=1e4), tmp_path / "base")
    frequencies = {}
    for method in METHODS:
        expand(source, tmp_path / f"by_{method}", [Context(method=method)])
        frequencies[method] = oracle.stock(tmp_path / f"by_{method}").model.rotary_emb.inv_freq
    before = oracle.stock(source).model.rotary_emb.inv_freq
    for after in frequencies.values():  # a period 4 times as long for the slowest
        assert torch.isclose(after[-1], before[-1] / 4, rtol=1e-5)
        assert torch.equal(after[0], before[0])


def test_yarn_gets_the_size_of_a_head_where_the_config_has_none(tmp_path: Path) -> None:
    """Mixtral's configs have `head_dim: null`, which the classes multiply under YaRN."""
    source = oracle.saved(tiny("mixtral", head_dim=6), tmp_path / "base")
    config = {**config_in(source), "head_dim": None}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    expand(source, tmp_path / "grown", [Context()])
    assert config_in(tmp_path / "grown")["head_dim"] == 6
    assert oracle.logits(oracle.stock(tmp_path / "grown"), oracle.tokens()).isfinite().all()


@pytest.mark.full
def test_a_class_that_refuses_yarn_is_one_error() -> None:
    config = Twin.of(example("phimoe")).config.to_dict()
    spec = Context(target_length=256)
    with pytest.raises(RequestError, match="class of phimoe refuses the new rotary parameters"):
        check_rotations(config, spec.target_config(Model(config)))


def test_windowed_layers_keep_their_rotations(tmp_path: Path) -> None:
    source = oracle.saved(tiny("gemma3_text"), tmp_path / "base")
    notes = expand(source, tmp_path / "grown", [Context()]).steps[0].notes
    old, new = (config_in(tmp_path / f)["rope_parameters"] for f in ("base", "grown"))
    assert new["sliding_attention"] == old["sliding_attention"]
    assert new["full_attention"]["rope_type"] == "yarn"
    assert "2 of 3 layers attend to the last 4 tokens only" in " ".join(notes)


def test_it_can_be_repeated_with_the_same_method(tmp_path: Path) -> None:
    source = oracle.saved(oracle.tiny_llama(), tmp_path / "base")
    for method in METHODS:
        twice, once = (
            [Context(target_length=n, method=method) for n in (128, 256)],
            Context(target_length=256, method=method),
        )
        found = [plan_expansion(source, each).target.config for each in (twice, [once])]
        parameters = [each["rope_parameters"] for each in found]
        assert parameters[0] == pytest.approx(parameters[1])
    expand(source, tmp_path / "yarn", [Context()])
    with pytest.raises(RequestError, match="rope_type = yarn; only yarn can be scaled again"):
        plan_expansion(tmp_path / "yarn", [Context(method="base")])


def test_a_published_yarn_is_extended_from_its_first_length(tmp_path: Path) -> None:
    source = oracle.saved(oracle.tiny_llama(**yarn(4.0, LENGTH)), tmp_path / "base")
    target = plan_expansion(source, [Context(target_length=512)]).target.config
    assert target["rope_parameters"] == yarn(8.0, LENGTH)["rope_parameters"]


@pytest.mark.parametrize("others", [[Width(hidden_size=48)], [LlamaPro(target_layers=4)]])
def test_it_composes(tmp_path: Path, others: list[Any]) -> None:
    source = oracle.saved(oracle.tiny_llama(), tmp_path / "base")
    for name, specs in (("first", [Context(), *others]), ("last", [*others, Context()])):
        expand(source, tmp_path / name, specs)
    alone = expand(source, tmp_path / "alone", [Context()]).folder
    ids = oracle.tokens(97, length=3 * LENGTH)
    for name in ("first", "last"):  # exact methods keep the function of the longer model
        model = oracle.stock(tmp_path / name)
        assert oracle.relative_difference(oracle.stock(alone), model, ids) < 1e-4


def test_moments_and_importances_are_carried(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    source = oracle.saved(model, tmp_path / "base")
    described = model_of(model)
    values = {t.disk_name: torch.rand(described.shapes[t.name]) for t in described.tensors}
    kinds = ("exp_avg", "exp_avg_sq", "fisher")
    write_state(source, {kind: TensorStream.of(values.items()) for kind in kinds}, step=7)
    expand(source, tmp_path / "grown", [Context()])
    state = State.read(tmp_path / "grown")
    assert state is not None and state.step == 7
    for kind in kinds:
        assert all(torch.equal(state.kinds[kind].get(n), v) for n, v in values.items())


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"target_length": 64}, "already has max_position_embeddings = 64; must be more"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         {"target_length": 256}, "rope_type = linear; it can't be combined"),
        (yarn(4.0, LENGTH), {"target_length": 128}, "already covers 256 tokens; must be more"),
        (yarn(4.0, LENGTH), {}, "target_length = 256: its yarn already covers 256 tokens"),
        (yarn(4.0, 32), {"target_length": 128}, "already covers 128 tokens"),
        (yarn(32.0, 4096), {"target_length": 128}, "already covers 131072 tokens"),
        (positions(MAX_POSITIONS // 2), {}, "default is 4 times .*; must be at most"),
        (positions(MAX_POSITIONS), {}, "default is 4 times .*; must be at most"),
        (positions(MAX_POSITIONS), {"target_length": MAX_POSITIONS}, "already has .*must be more"),
        ({"head_dim": 2}, {"method": "base"}, "more than 2 rotary dimensions"),
    ],
)  # fmt: skip
def test_impossible_lengths_are_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    source = oracle.saved(oracle.tiny_llama(**changes), tmp_path / "base")
    with pytest.raises(RequestError, match=reason):
        plan_expansion(source, [Context(**options)])


@pytest.mark.parametrize(
    ("family", "path", "value"),
    [
        ("llama", ("rope_theta",), None),
        ("llama", ("rope_theta",), "text"),
        ("llama", ("rope_theta",), {"a": 1}),
        ("llama", ("partial_rotary_factor",), [1, 2]),
        ("llama", ("full_attention",), {"full_attention": {}}),
        ("llama", ("factor",), math.inf),
        ("gemma3_text", ("full_attention", "rope_theta"), True),
        ("gemma3_text", ("full_attention", "rope_type"), 3),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_damaged_rotations_are_one_error(
    family: str, path: tuple[str, ...], value: Any, method: Any
) -> None:
    config = model_of(tiny(family)).config
    damaged = config["rope_parameters"] = json.loads(json.dumps(config["rope_parameters"]))
    for name in path[:-1]:
        damaged = damaged[name]
    damaged[path[-1]] = value
    with pytest.raises(RequestError, match="rope_parameters"):
        Context(method=method).target_config(Model(config))


def test_windows_in_all_layers_are_refused(tmp_path: Path) -> None:
    source = oracle.saved(tiny("mistral"), tmp_path / "base")
    with pytest.raises(RequestError, match="all layers attend to the last 4 tokens"):
        plan_expansion(source, [Context()])


@pytest.mark.parametrize("kind", ["cohere2", "exaone4", "smollm3", "gpt_oss"])
def test_rotations_in_windowed_layers_only_are_refused(tmp_path: Path, kind: str) -> None:
    """SmolLM3 and GPT-OSS rotate in their full layers, so they are the controls."""
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=LENGTH,
        num_local_experts=2, layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16, use_sliding_window=True, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    source = oracle.saved(AutoModelForCausalLM.from_config(config), tmp_path / "base")
    if kind in ("cohere2", "exaone4"):
        with pytest.raises(RequestError, match="rotary embeddings in layers with a window only"):
            plan_expansion(source, [Context()])
    else:
        plan_expansion(source, [Context()])


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_model_types_without_rotations_are_refused(tmp_path: Path, kind: str) -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "vocab_size": 97}
    if kind == "opt":
        model: Any = OPTForCausalLM(
            OPTConfig(**shape, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
                      word_embed_proj_dim=32)
        )  # fmt: skip
    else:
        model = BloomForCausalLM(BloomConfig(**shape, n_layer=2, n_head=4))
    source = oracle.saved(model, tmp_path / "base")
    with pytest.raises(RequestError, match=f"{kind} has no rotary embeddings"):
        plan_expansion(source, [Context()])


def test_a_model_type_without_a_table_is_verified_on_its_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CohereConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    source = oracle.saved(CohereForCausalLM(config), tmp_path / "base")
    expand(source, tmp_path / "grown", [Context()])
    stock = oracle.stock(tmp_path / "grown")
    assert stock.config.rope_parameters["factor"] == 4.0
    assert oracle.logits(stock, oracle.tokens(97, length=200)).isfinite().all()
    from tritter.core.expansions import on_twin

    monkeypatch.setattr(on_twin, "_rotation_change", lambda *_: 0.0)
    with pytest.raises(RequestError, match="computes the same with other rotary parameters"):
        plan_expansion(source, [Context()])


def test_a_config_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    source = oracle.saved(oracle.tiny_llama(), tmp_path / "base")
    old = config_in(source)
    old["rope_theta"], old["rope_scaling"] = old.pop("rope_parameters")["rope_theta"], None
    (source / "config.json").write_text(json.dumps(old), encoding="utf-8")
    expand(source, tmp_path / "grown", [Context()])
    new = config_in(tmp_path / "grown")
    assert new["rope_parameters"]["rope_type"] == "yarn"
    assert new["rope_parameters"] == {**new["rope_scaling"], "rope_theta": new["rope_theta"]}

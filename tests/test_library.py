"""Expansion of live models under the names of the literature."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import RobertaConfig, RobertaForCausalLM

from tests import oracle
from tests.oracle.families import RMS, generic, tiny
from tritter.core.expansions import Dus, ExpansionSpec, Interpolate, LlamaPro, Moe, Stack, Width
from tritter.errors import RequestError
from tritter.transform import expand
from tritter.transform.live import (
    ModelExpander,
    _copied_axis,
    depth_upscale,
    expand_attention_heads,
    expand_linear,
    width_upscale,
)

ALIASES = {"GrowableQwen": "GrowableCausalLM"}  # the README's names
FIXTURES = Path(__file__).parent / "fixtures/tiny_run"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_width_upscale_keeps_the_function_and_its_argument(tied: bool) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for init in ("fresh", "net2net", "zero_pad"):
        wider = width_upscale(model, 48, new_intermediate_size=90, init=init).eval()
        assert wider.config.hidden_size == 48 and wider.config.intermediate_size == 90
        assert oracle.relative_difference(model, wider, oracle.tokens()) < 1e-4
        assert (wider.lm_head.weight is wider.model.embed_tokens.weight) is tied
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_depth_upscale_takes_solars_layers() -> None:
    model = oracle.tiny_llama(num_hidden_layers=4)
    deeper = depth_upscale(model, 6)
    assert deeper.config.num_hidden_layers == 6
    for target, source in enumerate((0, 1, 2, 1, 2, 3)):
        ours = deeper.model.layers[target].state_dict()
        theirs = model.model.layers[source].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(RequestError, match="drop_layers"):
        depth_upscale(model, 6, removal_layers=3)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "spec",
    [Dus(), Stack(), LlamaPro(), Interpolate(), Width(intermediate_size=90), Moe()],
    ids=repr,
)
def test_no_weight_of_a_grown_model_stands_elsewhere_as_well(spec: ExpansionSpec) -> None:
    """Training one layer changes neither another layer nor the source model."""
    model = oracle.tiny_llama(num_hidden_layers=4)
    grown = ModelExpander([spec]).expand(model)
    parameters = [*model.parameters(), *grown.parameters()]
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


def test_no_weight_of_grown_attention_is_the_old_ones() -> None:
    attention = (
        tiny("qwen3", num_attention_heads=4, num_key_value_heads=2).model.layers[0].self_attn
    )
    for strategy in ("copy", "gqa"):
        grown = expand_attention_heads(attention, 12, strategy)
        parameters = [*attention.parameters(), *grown.parameters()]
        assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


def test_a_bfloat16_model_stays_one_and_trains_on() -> None:
    model = oracle.tiny_llama().to(torch.bfloat16).train()
    grown = ModelExpander([LlamaPro(), Width()]).expand(model)
    assert grown.training
    assert {p.dtype for p in grown.parameters()} == {torch.bfloat16}
    oracle.gradients(grown, oracle.tokens())


def test_a_head_that_only_the_config_ties_is_not_left_out(tmp_path: Path) -> None:
    """As after a merge of adapters on the head of a tied model."""
    model = oracle.tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    expander = ModelExpander([LlamaPro()])
    for call in (lambda: expander.expand(model), lambda: expander.write(model, tmp_path / "grown")):
        with pytest.raises(RequestError, match=r"lm_head.weight differs from model.embed_tokens"):
            call()
    assert not any(tmp_path.iterdir())
    model.config.tie_word_embeddings = False  # as the message says
    assert oracle.relative_difference(model, expander.expand(model), oracle.tokens()) < 1e-4


def test_ties_of_biases_are_no_heads() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=64, num_hidden_layers=2, is_decoder=True, **sizes)
    model = RobertaForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    assert ModelExpander([Stack()]).expand(model).config.num_hidden_layers == 4


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="no Hugging Face config"):
        ModelExpander([Width()]).expand(nn.Linear(2, 2))


HEADS = {  # strategy → options, query and key/value heads from 4 in 2 groups
    "fresh": ({}, 12, 6),
    "fresh, larger groups": ({"new_num_kv_heads": 4}, 12, 4),
    "copy": ({"strategy": "copy"}, 12, 6),
    "gqa": ({"strategy": "gqa"}, 12, 2),
    "gqa, equal shares": ({"strategy": "gqa", "shares": "equal", "new_num_kv_heads": 4}, 12, 4),
}


def _attended(attention: nn.Module, rotary: nn.Module, x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[1])[None]
    kinds = [attention.layer_type] if "Gemma3" in type(attention).__name__ else []
    turned = rotary(x, positions, *kinds)
    mask = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    return attention(x, turned, attention_mask=mask)[0]


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("family", generic(RMS))
@pytest.mark.parametrize("case", HEADS)
def test_an_attention_with_more_heads_computes_the_same(family: str, case: str) -> None:
    options, heads, kv_heads = HEADS[case]
    model = tiny(family)
    if family == "olmo2" and case not in ("copy", "gqa"):
        pytest.skip("its common norm wants each head copied as often as the others")
    old = model.model.layers[1].self_attn
    before = {name: value.clone() for name, value in old.state_dict().items()}
    new = expand_attention_heads(old, 12, **options)
    assert type(new) is type(old)
    rows = {name: len(value) for name, value in new.named_parameters() if value.ndim == 2}
    assert rows["o_proj.weight"] == 24
    assert sum(rows.values()) - 24 == (heads + 2 * kv_heads) * 6
    assert old.config.num_attention_heads == 4 and new.config.num_attention_heads == heads
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        expected = _attended(old, model.model.rotary_emb, x)
        torch.testing.assert_close(_attended(new, model.model.rotary_emb, x), expected)
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())


def test_split_heads_are_half_the_size_and_not_the_same() -> None:
    attention = tiny("qwen3", head_dim=8).model.layers[0].self_attn
    new = expand_attention_heads(attention, 8, "split")
    assert new.head_dim == 4 and new.q_norm.weight.shape == (4,)
    assert new.q_proj.weight.shape == attention.q_proj.weight.shape
    wider = width_upscale(tiny("llama", head_dim=8), head_strategy="split")
    assert (wider.config.num_attention_heads, wider.config.head_dim) == (8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_num_heads": 6, "new_num_kv_heads": 4}, "num_attention_heads = 6.*nearest: 4 or 8"),
        ({"new_num_heads": 7, "strategy": "gqa"}, "num_attention_heads = 7.*nearest: 6 or 8"),
        ({"new_num_heads": 5, "strategy": "copy"}, "num_attention_heads = 5.*nearest: 6"),
        ({"new_num_heads": 8, "strategy": "split"}, "head_dim 6 is not a multiple of 4"),
    ],
)
def test_heads_that_cannot_be_had_are_refused(options: dict[str, object], message: str) -> None:
    attention = tiny("mistral").model.layers[0].self_attn
    with pytest.raises(RequestError, match=message):
        expand_attention_heads(attention, **options)


def test_what_is_no_attention_is_refused() -> None:
    model = tiny("llama")
    for module, message in ((nn.Linear(2, 2), "no Hugging Face config"), (model, "no layer_idx")):
        with pytest.raises(RequestError, match=message):
            expand_attention_heads(module, 8)


def test_two_chained_linears_compute_the_same() -> None:
    first, second = nn.Linear(6, 10).double(), nn.Linear(10, 4).double()
    hidden = _copied_axis(10, 25, seed=3)
    same_in, same_out = _copied_axis(6, 6, seed=0), _copied_axis(4, 4, seed=0)
    wide_first = expand_linear(first, 6, 25, input_map=same_in, output_map=hidden)
    wide_second = expand_linear(second, 25, 4, input_map=hidden, output_map=same_out)
    x = torch.randn(7, 6, dtype=torch.float64)
    before = second(torch.tanh(first(x)))
    torch.testing.assert_close(wide_second(torch.tanh(wide_first(x))), before)


def test_one_linear_maps_copies_to_copies() -> None:
    linear = nn.Linear(5, 3)
    inputs, outputs = _copied_axis(5, 8, seed=1), _copied_axis(3, 7, seed=2)
    wide = expand_linear(linear, 8, 7, input_map=inputs, output_map=outputs)
    x = torch.randn(4, 5)
    torch.testing.assert_close(wide(x[:, inputs.source]), linear(x)[:, outputs.source])
    assert expand_linear(nn.Linear(5, 3, bias=False), 8, 7).bias is None


def test_a_linear_does_not_shrink_and_maps_must_fit() -> None:
    with pytest.raises(RequestError, match="fewer"):
        expand_linear(nn.Linear(5, 3), 4, 3)
    with pytest.raises(ValueError, match="from 9 to 9"):
        expand_linear(nn.Linear(5, 3), 5, 3, input_map=_copied_axis(9, 9, seed=0))


def test_the_package_hands_out_the_names_of_the_literature() -> None:
    import tritter

    for name in tritter.__all__:
        found = getattr(tritter, name)
        assert name.isupper() or found.__name__ == ALIASES.get(name, name)
    assert tritter.PROGRESSIVE_BENCHMARKS["math"] == ["gsm8k", "math"]
    with pytest.raises(AttributeError, match="no attribute 'deepen'"):
        tritter.deepen  # noqa: B018


def test_the_package_lists_what_it_hands_out_before_anything_is_imported() -> None:
    program = (
        "import sys, tritter; names = dir(tritter); assert 'torch' not in sys.modules; "
        "assert {*tritter.__all__, '__version__'} <= {*names}; "
        "assert 'import_module' not in names and len(names) == len({*names})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_checkpoint_by_the_specifications_names(tmp_path: Path) -> None:
    from tritter import ProgressiveCheckpoint

    folder = FIXTURES / "with_moments"
    found = ProgressiveCheckpoint.load(folder)
    assert found.optimizer_state_dict is not None
    for name, moment in found.optimizer_state_dict["exp_avg"].items():
        assert moment.shape == found.model_state_dict[name].shape
    assert found.scheduler_state_dict is not None and found.scheduler_state_dict["last_epoch"] > 0
    assert found.step > 0 and found.training_config and found.model_config["hidden_size"]
    plain = oracle.saved(oracle.tiny_llama(), tmp_path / "plain")
    base = ProgressiveCheckpoint.load(plain)
    assert (base.expansion_history, base.optimizer_state_dict, base.step) == ((), None, 0)
    grown = expand(plain, tmp_path / "grown", [Width()])
    after = ProgressiveCheckpoint.load(grown.folder)
    assert after.base_model_hash == base.base_model_hash
    assert [record.method for record in after.expansion_history] == ["width"]

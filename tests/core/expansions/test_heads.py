"""Head strategies: sources of heads, mapped moments, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import DENSE, LAYER_NORM, OWN, RMS, STACKED, generic, tiny
from tritter.core.expansions import ExpansionSpec, LlamaPro, Width, build_steps
from tritter.core.expansions.heads import HeadGrowth, _copy_heads, _split_heads
from tritter.core.families import FAMILIES, Config, Dimensions, Model
from tritter.core.parameter_map import Quantity
from tritter.errors import RequestError

SPLITTING = tuple(family for family in OWN if family not in (*STACKED, *LAYER_NORM))


def _dimensions(heads: int, kv_heads: int, head_dim: int = 2) -> Dimensions:
    return Dimensions(
        num_hidden_layers=1,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=97,
    )


def _heads(coordinates: Tensor, size: int = 2) -> list[int]:
    return (coordinates[::size] // size).tolist()


# Maps by hand


def test_gqa_copies_query_heads_within_their_group() -> None:
    """4 heads in 2 groups become 10 in 2: of each group the first head 3 times, the other twice."""
    maps = _copy_heads(_dimensions(4, 2), _dimensions(10, 2), equal_shares=False)
    assert _heads(maps["query"].source) == [0, 1, 0, 1, 0, 2, 3, 2, 3, 2]
    assert maps["key_value"].is_identity
    group = [81 / 91, 0.9, 9 / 91, 0.1, 1 / 91]
    expected = torch.tensor(2 * group, dtype=torch.float64)
    torch.testing.assert_close(maps["query"].share[::2], expected)


def test_gqa_with_more_groups_multiplies_the_shares() -> None:
    maps = _copy_heads(_dimensions(2, 1), _dimensions(8, 2), equal_shares=False)
    assert _heads(maps["query"].source) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert _heads(maps["key_value"].source) == [0, 0]
    expected = torch.tensor([0.81, 0.81, 0.09, 0.09, 0.09, 0.09, 0.01, 0.01])
    torch.testing.assert_close(maps["query"].share[::2], expected.double())
    torch.testing.assert_close(maps["key_value"].share[::2], torch.tensor([0.9, 0.1]).double())


def test_gqa_spreads_the_queries_of_a_group_over_copies_of_its_key_value_head() -> None:
    """4 heads in 2 groups become 4 in 4: only keys and values are copied."""
    maps = _copy_heads(_dimensions(4, 2), _dimensions(4, 4), equal_shares=False)
    assert _heads(maps["query"].source) == [0, 2, 1, 3]
    assert _heads(maps["key_value"].source) == [0, 1, 0, 1]
    assert maps["query"].share.tolist() == [1.0] * 8
    assert maps["key_value"].share.tolist() == [0.5] * 8


def test_split_keeps_rotary_pairs_together_and_every_other_frequency() -> None:
    """In 8 coordinates i and i + 4 rotate by θ^(−2i/8); in 4, i and i + 2 by θ^(−2i/4)."""
    sizes = _dimensions(2, 1, head_dim=8)
    maps = _split_heads(sizes)
    even, odd = [0, 2, 4, 6], [1, 3, 5, 7]
    assert maps["key_value"].source.tolist() == even + odd
    assert maps["query"].source.tolist() == [
        *even,
        *(8 + i for i in even),
        *odd,
        *(8 + i for i in odd),
    ]
    within_head = HeadGrowth(sizes, sizes, "split").within_head
    assert within_head is not None and within_head.index.tolist() == even
    old = [8.0 ** (-2 * i / 8) for i in range(4)]
    new = [8.0 ** (-2 * i / 4) for i in range(2)]
    assert [old[i] for i in even[:2]] == pytest.approx(new)


@given(data=st.data())
def test_every_query_meets_a_copy_of_its_key_value_head(data: st.DataObject) -> None:
    """Any accepted counts: groups match, no head is lost, shares add up to 1."""
    kv_heads, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    new_kv, new_group = data.draw(st.integers(kv_heads, 12)), data.draw(st.integers(1, 9))
    old, new = _dimensions(kv_heads * group, kv_heads), _dimensions(new_kv * new_group, new_kv)
    try:
        HeadGrowth(old, new, "gqa").check(FAMILIES["llama"])
    except RequestError:
        assert new_group * (new_kv // kv_heads) < group
        return
    maps = _copy_heads(old, new, equal_shares=data.draw(st.booleans()))
    query, key_value = torch.tensor(_heads(maps["query"].source)), _heads(maps["key_value"].source)
    assert (query // group).view(new_kv, new_group).T.tolist() == [key_value] * new_group
    assert set(query.tolist()) == set(range(kv_heads * group))
    total = torch.zeros(kv_heads * group, dtype=torch.float64)
    total.index_add_(0, query, maps["query"].share[::2])
    torch.testing.assert_close(total, torch.ones_like(total))


# Exactness and mapped state


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic(RMS))
def test_fewer_queries_a_group_keep_the_function_but_not_the_moments_of_k_and_v(
    family: str,
) -> None:
    """A copy of a key/value head with half the queries gets their part of the gradient.

    The parts add up to the old gradient. Their sizes depend on the data, so each copy gets the
    mean. All other state maps exactly.
    """
    model = tiny(family).double()
    (step,) = build_steps(
        Model(oracle_growth.config_of(model)),
        [Width(num_key_value_heads=4, head_strategy="gqa")],
        seed=0,
    )
    found = oracle_growth.errors(model, [step])
    assert found.logits < 1e-10
    wrong = {name.split(".")[-2] for name, error in found.gradients.items() if error > 1e-9}
    assert wrong == {"k_proj", "v_proj"} | ({"k_norm"} if family == "olmo2" else set())
    grown, ids = oracle_growth.grown(model, [step]), oracle.tokens()
    with oracle.float64_casts():
        before = oracle_growth.logical_gradients(model, ids)
        after = oracle_growth.logical_gradients(grown, ids)
    for name in ("layers.0.attention.k", "layers.1.attention.v"):
        first, second = after[name].chunk(2)
        torch.testing.assert_close(first + second, before[name], rtol=1e-9, atol=1e-12)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic(SPLITTING))
def test_split_is_no_claim_of_exactness_and_only_moves_weights(family: str) -> None:
    model = tiny(family, head_dim=8).double()
    config = oracle_growth.config_of(model)
    spec = Width(head_strategy="split")
    (step,) = build_steps(Model(config), [spec], seed=0)
    assert not spec.is_exact
    state = oracle_growth.logical_state(model)
    for name, tensor_map in step.parameter_map.tensors.items():
        for quantity in (Quantity.WEIGHT, Quantity.GRADIENT):
            moved = tensor_map.apply(state[name], quantity=quantity)
            if not name.endswith(("q_norm", "k_norm")):
                assert torch.equal(moved.sort(dim=0).values, state[name].sort(dim=0).values) or (
                    torch.equal(moved.sort(dim=1).values, state[name].sort(dim=1).values)
                )
    assert step.target.config["head_dim"] == 4
    assert step.target.config.get("query_pre_attn_scalar") == config.get("query_pre_attn_scalar")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic(SPLITTING))
def test_split_with_a_wider_model_is_the_split_model(family: str) -> None:
    """Split is not exact, but does not affect an expansion applied with it."""
    model = tiny(family, head_dim=8).double()
    config, ids = oracle_growth.config_of(model), oracle.tokens()
    alone = oracle_growth.grown(
        model, build_steps(Model(config), [Width(head_strategy="split")], seed=0)
    )
    for init in ("fresh", "net2net", "zero_pad"):
        spec = Width(head_strategy="split", hidden_size=40, init=init)
        wider = oracle_growth.grown(model, build_steps(Model(config), [spec], seed=0))
        with oracle.float64_casts():
            before, split, both = (oracle.logits(m, ids) for m in (model, alone, wider))
        assert float((split - both).abs().max()) < 1e-10
        assert float((split - before).abs().max()) > 1e-2


def test_the_even_pairs_see_the_positions_that_they_saw() -> None:
    """With keys in even pairs only, the scores of a split head are those of the head times √2."""
    model = tiny("llama", head_dim=8, num_hidden_layers=1).double()
    config = oracle_growth.config_of(model)
    attention = model.model.layers[0].self_attn
    split = oracle_growth.grown(
        model, build_steps(Model(config), [Width(head_strategy="split")], seed=0)
    )
    x, positions = torch.randn(1, 7, 24, dtype=torch.float64), torch.arange(7)[None]
    odd = torch.arange(2 * 8) % 2 == 1
    attention.k_proj.weight.data[odd] = 0
    with torch.no_grad(), oracle.float64_casts():
        whole = _scores(attention, model.model.rotary_emb(x, positions), x)
        halves = _scores(split.model.layers[0].self_attn, split.model.rotary_emb(x, positions), x)
    # query heads 0, 1 of key/value head 0: their even halves are heads 0 and 1 of 8
    torch.testing.assert_close(halves[:, :2] / 2**0.5, whole[:, :2], rtol=1e-9, atol=1e-12)


def _scores(attention: torch.nn.Module, turned: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Return q·k/√head_dim of every pair of positions, rotated as Llama does; [B, head, T, T]."""
    cos, sin = (part[:, None] for part in turned)

    def rotated(projection: torch.nn.Linear) -> Tensor:
        y = projection(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat([-second, first], dim=-1) * sin

    key = rotated(attention.k_proj).repeat_interleave(attention.num_key_value_groups, dim=1)
    return rotated(attention.q_proj) @ key.transpose(-1, -2) / attention.head_dim**0.5


# Targets and refusals


def _config(**changes: object) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "head_dim": 8,
        **changes,
    }


@pytest.mark.parametrize(
    ("spec", "heads", "kv_heads", "head_dim"),
    [
        (Width(head_strategy="gqa"), 8, 2, 8),  # key/value heads stay
        (Width(head_strategy="gqa", hidden_size=36), 6, 2, 8),
        (Width(head_strategy="gqa", hidden_size=60, num_key_value_heads=4), 4, 4, 8),
        (Width(head_strategy="gqa", num_key_value_heads=4), 4, 4, 8),
        (Width(head_strategy="gqa", num_attention_heads=6), 6, 2, 8),
        (Width(head_strategy="split"), 8, 4, 4),
        (Width(head_strategy="split", hidden_size=40), 8, 4, 4),
        (Width(head_strategy="split", num_attention_heads=8), 8, 4, 4),
        (Width(init="aki"), 8, 4, 8),
    ],
)
def test_targets(spec: Width, heads: int, kv_heads: int, head_dim: int) -> None:
    config = _config()
    target = spec.target_config(Model(config))
    found = [target[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    assert found == [heads, kv_heads, head_dim]


def test_split_alone_leaves_all_other_sizes() -> None:
    config = _config()
    target = Width(head_strategy="split").target_config(Model(config))
    changed = {key for key in target if target[key] != config.get(key)}
    assert changed == {"num_attention_heads", "num_key_value_heads", "head_dim"}


@pytest.mark.parametrize(
    ("spec", "changes", "phrases"),
    [
        (
            Width(head_strategy="split"),
            {"head_dim": 6},
            ["head_strategy = split", "head_dim 6", "not a multiple of 4", "fresh, copy and gqa"],
        ),
        (
            Width(head_strategy="split"),
            {"head_dim": 5},
            ["head_dim 5 is not a multiple of 4"],
        ),
        (
            Width(head_strategy="split", num_attention_heads=12),
            {},
            ["num_attention_heads = 12", "must be 8"],
        ),
        (
            Width(head_strategy="split", num_key_value_heads=2),
            {},
            ["num_key_value_heads = 2", "must be 4"],
        ),
        (
            Width(head_strategy="gqa", num_attention_heads=7),
            {},
            ["num_attention_heads = 7", "nearest: 6 or 8"],
        ),
        (
            Width(head_strategy="gqa", num_attention_heads=8, num_key_value_heads=8),
            {"num_attention_heads": 8},
            None,
        ),
        (
            Width(head_strategy="gqa", num_key_value_heads=4, num_attention_heads=8),
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            None,
        ),
        (
            Width(head_strategy="gqa", num_key_value_heads=3, num_attention_heads=6),
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            ["leaves groups of 2 query heads, and the model has groups of 3", "at least 9"],
        ),
        (
            Width(head_strategy="fresh", num_key_value_heads=4),
            {},
            ["leaves groups of 1 query", "at least 8"],
        ),
        (
            Width(head_strategy="split", noise=0.1),
            {},
            ["noise = 0.1", "init=fresh makes none"],
        ),
    ],
)
def test_impossible_heads_are_refused_with_what_is_possible(
    spec: Width, changes: dict[str, object], phrases: list[str] | None
) -> None:
    config = _config(**changes)
    if phrases is None:
        assert spec.target_config(Model(config))
        return
    with pytest.raises(RequestError) as error:
        spec.target_config(Model(config))
    for phrase in phrases:
        assert phrase in str(error.value)


# Clones and new parameters


@pytest.mark.full
@pytest.mark.parametrize(("shares", "parts"), [("unequal", True), ("equal", False)])
def test_clones_of_query_heads_diverge_by_unequal_shares_only(shares: str, parts: bool) -> None:
    """4 query heads become 8 within their groups; after 200 steps of AdamW at 1e-3: 0.32 and 0."""
    model = tiny("llama", initializer_range=0.1, num_hidden_layers=1)
    spec = Width(num_attention_heads=8, head_strategy="gqa", shares=shares)
    grown = oracle_growth.grown(
        model, build_steps(Model(oracle_growth.config_of(model)), [spec], seed=0)
    )
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    for number in range(200):
        oracle.gradients(grown, oracle.tokens(batch=4, seed=number % 20))
        optimizer.step()
    queries = oracle_growth.logical_state(grown)["layers.0.attention.q"].view(2, 2, 2 * 6, 24)
    gap = float((queries[:, 1] - queries[:, 0]).norm() / queries[:, 0].norm())
    assert gap > 0.15 if parts else gap < 1e-6


NEW_PARAMETERS: dict[str, list[ExpansionSpec]] = {
    "fresh": [Width()],
    "net2net": [Width(init="net2net")],
    "zero_pad": [Width(init="zero_pad")],
    "aki": [Width(init="aki")],
    "fresh, copied heads": [Width(head_strategy="copy")],
    "fresh, gqa": [Width(head_strategy="gqa")],
    "net2net, fresh heads": [Width(init="net2net", head_strategy="fresh", hidden_size=60)],
    "split": [Width(head_strategy="split", hidden_size=48)],
    "depth then fresh": [LlamaPro(), Width()],
    "depth then net2net": [LlamaPro(), Width(init="net2net", hidden_size=60)],
}
LAYER_NORM_TOO = ("net2net", "aki")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic(DENSE))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", NEW_PARAMETERS)
def test_every_parameter_gets_a_gradient_within_two_steps(
    family: str, tied: bool, case: str
) -> None:
    specs = NEW_PARAMETERS[case]
    is_refused = family in LAYER_NORM and case not in LAYER_NORM_TOO
    if is_refused or (case == "split" and family not in SPLITTING):
        pytest.skip("it is refused")
    model = tiny(family, rms_norm_eps=1e-6, head_dim=8, tie_word_embeddings=tied, vocab_size=31,
                 max_position_embeddings=24)  # fmt: skip
    grown = oracle_growth.grown(
        model, build_steps(Model(oracle_growth.config_of(model)), specs, seed=0)
    )
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    touched = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in grown.named_parameters()}
    for step in range(3):  # after two steps the former zeros have values
        batch = oracle.tokens(31, batch=8, length=24, seed=step)
        for name, gradient in oracle.gradients(grown, batch).items():
            touched[name] |= gradient != 0
        optimizer.step()
    for mask in (mask for name, mask in touched.items() if name.endswith("wpe.weight")):
        mask[-1] = True  # the last token has no loss
    touched = oracle.disk_tensors(Model(oracle_growth.config_of(grown)), touched)
    dead = {name: int((~mask).sum()) for name, mask in touched.items() if not bool(mask.all())}
    # Without rotary embeddings, a constant added to all keys changes no attention weights
    assert not [name for name in dead if not name.endswith("c_attn.k.bias")]


def test_head_maps_are_those_of_the_strategy() -> None:
    old, new = _dimensions(4, 2), _dimensions(8, 4)
    for strategy, sources in (
        ("fresh", [0, 1, 2, 3, -1, -1, -1, -1]),
        ("copy", [0, 1, 2, 3, 0, 1, 2, 3]),
        ("gqa", [0, 1, 2, 3, 0, 1, 2, 3]),
    ):
        growth = HeadGrowth(old, new, strategy)
        maps = growth.maps(equal_shares=True)
        assert (maps["query"].source[::2].div(2, rounding_mode="floor")).tolist() == sources
        assert growth.within_head is None

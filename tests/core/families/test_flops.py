"""FLOPs from shapes against torch's counter, and attention against a sum over positions.

The counter measures eager attention, which computes all T × T scores regardless of the mask. So
matrices are compared in full and attention as a square. The masked share is compared with the
attention weights of the stock model.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle.families import OWN, SPARSE, generic, tiny
from tritter.core.families import (
    FAMILIES,
    Config,
    Flops,
    LogicalTensor,
    Model,
    forward_flops,
    training_flops,
)
from tritter.core.families.flops import _num_keys
from tritter.core.stock_routers import RouterControl
from tritter.methods.moe_routing.separate import SeparateExperts

LENGTH = 20
IDS = oracle.tokens(batch=1, length=LENGTH)


def eager(family: str, **changes: object) -> PreTrainedModel:
    return tiny(family, attn_implementation="eager", **changes)


def square(flops: Flops) -> float:
    """Return the count of eager attention, in which every token attends to every key."""
    return flops.matrices * LENGTH + sum(flops.attention.values()) * LENGTH**2


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def train_only(model: PreTrainedModel, is_trained: Callable[[LogicalTensor], bool]) -> None:
    """Set requires_grad for the parameters of trained tensors."""
    config: Config = model.config.to_dict()
    for stored in Model(config).layout("live"):
        trained = {is_trained(part.tensor) for part in stored.parts}
        assert len(trained) == 1, f"{stored.name} is trained as a whole or not at all"
        model.get_parameter(stored.name).requires_grad_(trained.pop())


def step(model: PreTrainedModel) -> None:
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", generic())
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_forward_pass_and_a_full_training_step(family: str, tied: bool) -> None:
    model = eager(family, tie_word_embeddings=tied)
    config = model.config.to_dict()
    with torch.no_grad():
        found = counted(lambda: model(input_ids=IDS))
    assert square(forward_flops(Model(config))) == found
    assert square(training_flops(Model(config))) == counted(lambda: step(model)) == 3 * found


CHOICES: dict[str, Callable[[LogicalTensor], bool]] = {
    "nothing": lambda t: False,
    "last layer": lambda t: t.name.startswith("layers.2."),
    "first layer": lambda t: t.name.startswith("layers.0."),
    "attention": lambda t: ".attention." in t.name,
    "all but attention": lambda t: ".attention." not in t.name,
    "query": lambda t: t.name.endswith("attention.q"),
    "key of the first layer": lambda t: t.name == "layers.0.attention.k",
    "value": lambda t: t.name.endswith("attention.v"),
    "output of attention": lambda t: t.name.endswith("attention.o"),
    "gates and up": lambda t: t.name.endswith((".gate", ".up")),
    "down": lambda t: t.name.endswith(".down"),
    "vectors": lambda t: len(t.axes) == 1,
    "norms before attention": lambda t: t.name.endswith("attention_norm"),
    "norms before the FFN": lambda t: t.name.endswith("ffn_norm"),
    "norms behind branches": lambda t: t.name.endswith("output_norm"),
    "norms of queries": lambda t: t.name.endswith("q_norm"),
    "biases": lambda t: t.name.endswith("bias"),
    "final norm": lambda t: t.name == "final_norm",
    "head": lambda t: t.name == "head",
    "embedding": lambda t: t.name == "embed",
    "routers": lambda t: t.name.endswith("router"),
    "shared experts": lambda t: ".shared_expert" in t.name,
    "first router": lambda t: t.name == "layers.0.router",
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic())
@pytest.mark.parametrize(
    ("choice", "tied"),
    [(choice, False) for choice in CHOICES]
    + [(choice, True) for choice in ("nothing", "embedding", "final norm", "last layer")],
)
def test_frozen_weights_have_no_gradient_and_nothing_below_the_trained_ones(
    family: str, choice: str, tied: bool
) -> None:
    model = eager(family, tie_word_embeddings=tied)
    is_trained, config = CHOICES[choice], model.config.to_dict()
    if family in ("phi3", "gpt2") and choice in ("query", "key of the first layer", "value"):
        pytest.skip("q, k and v are one tensor, which is trained as a whole or not at all")
    train_only(model, is_trained)
    trains_none = not any(parameter.requires_grad for parameter in model.parameters())
    ours = training_flops(Model(config), is_trained=is_trained)
    if trains_none:  # nothing to call backward on
        with torch.no_grad():
            assert square(ours) == counted(lambda: model(input_ids=IDS))
        return
    assert square(ours) == counted(lambda: step(model))
    full = square(training_flops(Model(config)))
    assert square(ours) < full or choice in ("embedding", "vectors", "first layer")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_parallel", [False, True])
def test_attention_beside_the_ffn_is_not_below_it(is_parallel: bool) -> None:
    """With the attention of the last layer trained, its FFN needs a gradient or none."""
    found = {}
    for name in ("layers.2.attention.o", "layers.2.attention_norm_bias", "layers.2.ffn_norm_bias"):
        model = eager("gpt_neox", use_parallel_residual=is_parallel)
        train_only(model, lambda tensor, name=name: tensor.name == name)  # type: ignore[misc]
        config = model.config.to_dict()
        found[name] = square(
            training_flops(Model(config), is_trained=lambda t, n=name: t.name == n)
        )  # type: ignore[misc]
        assert found[name] == counted(lambda model=model: step(model))  # type: ignore[misc]
    assert len(set(found.values())) == 3


def test_every_choice_above_trains_something_somewhere() -> None:
    tensors = [t for f in OWN for t in Model(tiny(f).config.to_dict(), FAMILIES[f]).tensors]
    empty = {name for name, choice in CHOICES.items() if not any(map(choice, tensors))}
    assert empty == {"nothing"}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("choice", ["everything", "routers", "last layer", "head"])
def test_a_loss_of_the_routers_does_not_pass_through_what_stands_above(
    family: str, choice: str
) -> None:
    model = eager(family)
    is_trained = CHOICES.get(choice, lambda tensor: True)
    config = model.config.to_dict()
    train_only(model, is_trained)
    routing = RouterControl.of(model)
    assert routing is not None

    def work() -> None:
        with routing.recording():
            model(input_ids=IDS, use_cache=False)
            loss = torch.stack([record.logits.square().mean() for record in routing.recorded()])
        if loss.requires_grad:
            loss.sum().backward()

    flops = square(training_flops(Model(config), is_trained=is_trained, loss_at="routers"))
    assert flops == counted(work)
    backward = flops - square(forward_flops(Model(config)))
    assert (backward == 0) == (choice == "head" or _is_dense_above(family, choice))


def _is_dense_above(family: str, choice: str) -> bool:
    kinds = Model(tiny(family).config.to_dict(), FAMILIES[family]).layer_kinds
    return choice == "last layer" and kinds[2] == "dense"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", SPARSE)
def test_experts_that_are_held_apart_pay_for_the_tokens_that_come_to_them(family: str) -> None:
    """With all tokens routed to the new experts, only these have weight gradients."""
    model = eager(family)
    config = model.config.to_dict()
    new = (2, 3)

    def is_trained(tensor: LogicalTensor) -> bool:
        return tensor.expert in new

    routing = RouterControl.of(model)
    assert routing is not None
    routing.set_offset((0, 1), -torch.inf)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    whole = training_flops(Model(config), is_trained=is_trained, routed_to=new)
    assert square(whole) == counted(lambda: step(model))
    with SeparateExperts(model, 2):
        assert square(whole) == counted(lambda: step(model))
    # With evenly distributed tokens the new experts get half
    spread = training_flops(Model(config), is_trained=is_trained)
    every = training_flops(Model(config), is_trained=lambda t: t.expert is not None)
    assert forward_flops(Model(config)).matrices < spread.matrices < every.matrices
    assert whole.matrices == every.matrices


def test_shares_of_experts_by_hand() -> None:
    """Layer 1 of 3 is dense; k = 2 of 4 experts of 3 · 24 · 12; one is shared."""
    config = tiny("qwen2_moe").config.to_dict()
    attention = 24 * 24 + 2 * 24 * 12 + 24 * 24
    sparse = attention + 4 * 24 + 2 * 3 * 24 * 12 + 3 * 24 * 20 + 24
    dense = attention + 3 * 24 * 40
    by_hand = 2 * (2 * sparse + dense + 24 * 97)
    assert forward_flops(Model(config)).matrices == by_hand


WINDOWED: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "smollm3": {},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 7},
}
FULL: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "smollm3": {"use_sliding_window": False},
    "granite": {},
    "olmo2": {},
    "phi3": {"sliding_window": None},
    "glm4": {},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64},
    "qwen2_moe": {},
    "qwen3_moe": {},
}


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize(
    ("family", "options", "has_window"),
    [(f, o, True) for f, o in WINDOWED.items()] + [(f, o, False) for f, o in FULL.items()],
)
def test_attention_is_the_sum_over_places_of_the_keys_that_the_stock_mask_leaves(
    family: str, options: dict[str, object], has_window: bool
) -> None:
    model, table = eager(family, **options), FAMILIES[family]
    config = model.config.to_dict()
    with torch.no_grad():
        weights: tuple[Tensor, ...] = model(input_ids=IDS, output_attentions=True).attentions
    heads, head_dim = 4, 6
    by_hand = 0
    for layer, kept in enumerate(weights):  # [1, heads, T, T]
        window = table.attention_window(config, layer)
        for position in range(LENGTH):
            keys = min(position + 1, window or LENGTH)
            assert int((kept[0, 0, position] > 0).sum()) == keys
            by_hand += 2 * 2 * heads * head_dim * keys
    ours = forward_flops(Model(config))
    assert ours.of(LENGTH) - ours.matrices * LENGTH == by_hand
    is_full = by_hand == 3 * 2 * 2 * heads * head_dim * LENGTH * (LENGTH + 1) // 2
    assert is_full != has_window


@pytest.mark.parametrize("length", [1, 2, 5, 17])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 17, 18])
def test_keys_are_those_of_a_loop(length: int, window: int | None) -> None:
    looped = sum(min(position + 1, window or length) for position in range(length))
    assert _num_keys(length, window) == looped


def test_passes_add_up_and_a_mean_token_is_a_part_of_its_sequence() -> None:
    config = tiny("gemma3_text").config.to_dict()
    forward, both = forward_flops(Model(config)), training_flops(Model(config))
    assert both.of(LENGTH) == 3 * forward.of(LENGTH)
    assert both.per_token(LENGTH) * LENGTH == pytest.approx(both.of(LENGTH), rel=1e-15)
    assert set(forward.attention) == {None, 4}

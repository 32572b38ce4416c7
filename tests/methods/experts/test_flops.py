"""FLOPs of experts compared with torch's counter, forward and backward."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import oracle
from tests.oracle.families import tiny
from tritter.checkpoints.expert_files import AdapterShape
from tritter.core.families import Flops, Model, forward_flops
from tritter.core.models import model_of
from tritter.methods.experts.adapters import is_of_adapter
from tritter.methods.experts.callback import _observation_flops as observation_flops
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import ROUTER, ExpertMixture, RouterKind
from tritter.methods.novelty import observe
from tritter.training.parameters import flops_of_sequence

LENGTH = 12
IDS = oracle.tokens(batch=1, length=LENGTH)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STACKED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head")
OF_GPT2 = ("c_attn", "c_proj", "c_fc", "wte", "lm_head")
OF_PYTHIA = ("query_key_value", "dense", "dense_h_to_4h", "embed_in", "lm_head")
WHOLE = (*LAYERS, "embed_tokens", "lm_head")


def square(flops: Flops) -> float:
    """Return a count for eager attention, in which every token attends to every key."""
    return flops.matrices * LENGTH + sum(flops.attention.values()) * LENGTH**2


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    # Former versions of transformers compute the angles as a matrix product, which is negligible
    modules = counter.get_flop_counts().items()
    angles = sum(sum(f.values()) for name, f in modules if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - angles


def mixture_of(
    family: str = "llama",
    *,
    router: RouterKind = "learned",
    top_k: int | None = None,
    targets: tuple[str, ...] = LAYERS,
    ranks: tuple[int, ...] = (3, 3, 3),
    **options: Any,
) -> ExpertMixture:
    model = tiny(family, attn_implementation="eager", **options.pop("model", {}))
    mixture = ExpertMixture(model, router=router, **options)
    for number, rank in enumerate(ranks):
        mixture.add(f"e{number}", AdapterShape(rank, 5.0, targets), seed=number)
    mixture.routing = Routing(top_k=top_k)
    torch.manual_seed(0)
    for own in mixture.routers():
        torch.nn.init.normal_(own.weight)
    return mixture


def step(mixture: ExpertMixture) -> None:
    mixture.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


@pytest.mark.parametrize("with_losses", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_an_observation_counts_what_it_reads(family: str, with_losses: bool) -> None:
    model = tiny(family, attn_implementation="eager")
    ours = square(observation_flops(model_of(model), with_losses=with_losses))
    found = counted(lambda: observe(model, IDS, with_losses=with_losses))
    assert ours == pytest.approx(found, rel=1e-12)


def check(mixture: ExpertMixture) -> None:
    """Compare forward pass and training step with the counter."""
    with torch.no_grad():
        found = counted(lambda: mixture.model(input_ids=IDS, use_cache=False))
    assert square(mixture.reading_flops()) == pytest.approx(found, rel=1e-12)
    ours = square(mixture.step_flops())
    assert ours == pytest.approx(counted(lambda: step(mixture)), rel=1e-12)
    base = square(forward_flops(Model(mixture.model.config.to_dict())))
    assert base < found < ours < 3 * found


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("family", "tied", "router", "targets"),
    [
        ("llama", False, "learned", LAYERS),
        ("gemma3_text", True, "evidence", LAYERS),
        ("llama", True, "evidence", WHOLE),
        ("gemma3_text", False, "both", WHOLE),
        ("gemma3_text", True, "evidence", ("embed_tokens",)),
        ("llama", True, "evidence", ("lm_head",)),
        ("phi3", False, "learned", STACKED[:4]),
        ("gpt_neox", False, "evidence", OF_PYTHIA),
        ("gpt2", True, "evidence", OF_GPT2),
        ("gpt2", False, "learned", OF_GPT2[:3]),
    ],
)
def test_experts_on_all_and_on_the_vocabulary(
    family: str, tied: bool, router: RouterKind, targets: tuple[str, ...]
) -> None:
    model = {"tie_word_embeddings": tied}
    mixture = mixture_of(family, router=router, targets=targets, model=model)
    for top_k in (None, 2):
        mixture.routing = Routing(top_k=top_k)
        check(mixture)


@cache
def trained_mixture(family: str) -> ExpertMixture:
    targets = STACKED if family == "phi3" else WHOLE
    return mixture_of(family, router="both", targets=targets)


CHOICES: dict[str, Callable[[str], bool]] = {
    "upper layers and their base": lambda name: "layers.2" in name or "layers.1" in name,
    "last layer's adapters": lambda name: "layers.2" in name and is_of_adapter(name),
    "down": lambda name: ".lora_A." in name or ".lora_embedding_A." in name,
    "up": lambda name: ".lora_B." in name or ".lora_embedding_B." in name,
    "adapters": is_of_adapter,
    "routers": lambda name: ROUTER in name,
    "last router": lambda name: ROUTER in name and "layers.2" in name,
    "output of attention": lambda name: "o_proj" in name,
    "keys": lambda name: "k_proj" in name,
    "down of the FFN": lambda name: "down_proj" in name,
    "head": lambda name: "lm_head" in name,
    "embedding's up": lambda name: "lora_embedding_B" in name,
    "final norm": lambda name: name == "model.norm.weight",
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("family", "choice"),
    [("llama", choice) for choice in CHOICES]
    + [("phi3", choice) for choice in ("last layer's adapters", "down", "up")]
    + [("gemma3_text", choice) for choice in ("last layer's adapters", "routers")],
)
def test_what_is_frozen_has_no_gradient_and_nothing_below_what_is_trained(
    family: str, choice: str
) -> None:
    mixture = trained_mixture(family)
    for name, parameter in mixture.model.named_parameters():
        parameter.requires_grad_(CHOICES[choice](name))
    for top_k in (None, 1):
        mixture.routing = Routing(top_k=top_k)
        check(mixture)


def test_one_expert_is_trained_and_the_others_are_frozen() -> None:
    """Each is computed separately; gradients of frozen factors are not counted."""
    mixture = mixture_of(top_k=2, ranks=(3, 3))  # both are chosen, as if dense
    document_mask = mixture_of(top_k=1, ranks=(3,))
    for each in (mixture, document_mask):
        for name, parameter in each.model.named_parameters():
            parameter.requires_grad_(".e0." in name)
    both, one = mixture.step_flops().matrices, document_mask.step_flops().matrices
    # A frozen expert has a forward pass and the gradients of the inputs of A and B,
    # except for A of the first embeddings, below which nothing is trained.
    sizes = {"q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24)}
    sizes |= {"gate": (40, 24), "up": (40, 24), "down": (24, 40)}
    frozen = 0
    for layer in range(3):
        frozen += 24  # a row of the router, forward
        frozen += 24 * (layer > 0)  # and the gradient of its input
        for name, (rows, columns) in sizes.items():
            is_read = layer > 0 or name in ("o", "gate", "up", "down")
            frozen += 3 * (rows + columns) * (1 + is_read)
    assert both - one == 2 * frozen


def test_a_choice_costs_its_share_of_each_expert() -> None:
    """Experts of ranks 2 and 6 each get half of the tokens."""
    dense, one = (mixture_of(top_k=k, ranks=(2, 6)) for k in (None, 1))
    base = forward_flops(Model(dense.model.config.to_dict())).matrices
    routers = 3 * 2 * 24 * 2
    whole = dense.reading_flops().matrices - base - routers
    assert one.reading_flops().matrices - base - routers == whole / 2
    by_hand = 2 * 8 * 3 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 40))
    assert whole == by_hand


@pytest.mark.full
def test_a_base_among_the_experts_costs_nothing() -> None:
    plain = mixture_of(router="evidence", targets=WHOLE)
    beside = mixture_of(router="evidence", targets=WHOLE, has_base=True)
    assert beside.step_flops() == plain.step_flops()
    check(beside)
    third = mixture_of(router="evidence", targets=WHOLE, has_base=True, top_k=1)
    base = forward_flops(Model(third.model.config.to_dict())).matrices
    own, all_of_them = (m.reading_flops().matrices - base for m in (third, plain))
    assert own == pytest.approx(all_of_them / 4)


def test_without_experts_it_is_the_count_of_the_model() -> None:
    mixture = mixture_of(router="evidence", has_base=True, ranks=())
    assert mixture.step_flops() == flops_of_sequence(mixture.model)
    assert mixture.step_flops() == forward_flops(Model(mixture.model.config.to_dict()))

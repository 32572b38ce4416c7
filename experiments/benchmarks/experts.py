"""What a mixture of LoRA experts costs a training step, beside PEFT's single LoRA of one's rank.

    python experiments/benchmarks/experts.py > experiments/benchmarks/experts.csv

A plain loop over a stock Llama of 11.9 M parameters and AdamW; the base is frozen in both. Steps of
the mixture and of PEFT alternate, so that whatever else the machine does falls on both.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tritter.methods.experts.adapters import AdapterShape
from tritter.methods.experts.gates import Routing, balance_loss, z_loss
from tritter.methods.experts.mixture import ExpertMixture, RouterKind

ROUNDS, EXPERTS, RANK = 12, 8, 8
BATCH, LENGTH = 8, 128
TARGETS = {
    "q and v": ("q_proj", "v_proj"),
    "all linear layers": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
}
MODES: dict[str, tuple[RouterKind, Routing]] = {
    "dense": ("learned", Routing()),
    "top-2": ("learned", Routing(top_k=2)),
    "top-2, capacity 1.25": ("learned", Routing(top_k=2, capacity_factor=1.25)),
    "top-1": ("learned", Routing(top_k=1)),
    "evidence, dense": ("evidence", Routing()),
    "evidence, top-2": ("evidence", Routing(top_k=2)),
    "evidence, top-1": ("evidence", Routing(top_k=1)),
}
FIELDS = ("layers", "routing", "ratio", "smallest", "largest")


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=1152, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def stepping(model: nn.Module, extra: Callable[[], torch.Tensor | float]) -> Callable[[], object]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 1024, (BATCH, LENGTH))

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + extra()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(targets: tuple[str, ...]) -> Callable[[], object]:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets))
    return stepping(get_peft_model(base(), config), lambda: 0.0)  # type: ignore[arg-type]


def mixture_step(
    targets: tuple[str, ...], router_kind: RouterKind, routing: Routing
) -> Callable[[], object]:
    mixture = ExpertMixture(base(), router=router_kind)
    for number in range(EXPERTS):
        mixture.add(f"e{number}", AdapterShape(RANK, 2 * RANK, targets), seed=number)
    with torch.no_grad():
        for router in mixture.routers():
            router.weight.normal_(std=0.05)  # so that choices differ
    if mixture.evidence is not None:
        mixture.evidence.counts.random_(0, 1000)
    mixture.routing = routing
    mixture.model.train()

    def losses() -> torch.Tensor:
        if router_kind == "evidence":
            return torch.zeros(())  # there is nothing to learn
        found = [0.01 * balance_loss(g) + 1e-3 * z_loss(g) for g in mixture.gates()]
        return torch.stack(found).mean()

    return stepping(mixture.model, losses)


def seconds(function: Callable[[], object]) -> float:
    since = time.process_time()
    function()
    return time.process_time() - since


def rows() -> Iterator[dict[str, object]]:
    for layers, targets in TARGETS.items():
        steps = {"peft": peft_step(targets)}
        steps |= {name: mixture_step(targets, *mode) for name, mode in MODES.items()}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                taken[name].append(seconds(step))
        for name in MODES:
            ratios = [a / b for a, b in zip(taken[name][2:], taken["peft"][2:], strict=True)]
            values = (statistics.median(ratios), min(ratios), max(ratios))
            yield dict(zip(FIELDS, (layers, name, *(f"{v:.2f}" for v in values)), strict=True))


def main() -> None:
    """Print a row for each mode: median of the ratios of neighbouring steps, their extremes."""
    torch.set_num_threads(1)
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    table.writerows(rows())


if __name__ == "__main__":
    main()

"""What a mixture of LoRA experts costs a training step, beside PEFT's single LoRA of one's rank.

    python experiments/benchmarks/experts.py --experts 8 > experiments/benchmarks/experts.csv
    python experiments/benchmarks/experts.py --model GEMMA --experts 6

A plain loop over a stock Llama of 11.9 M parameters, or over a checkpoint in bf16 autocast, and
AdamW; the base is frozen in both. Steps of the mixture and of PEFT alternate, so that whatever else
the machine does falls on both. `observed` adds the novelty detector's look at each batch.
"""

import argparse
import contextlib
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tritter.checkpoints.expert_files import AdapterShape
from tritter.core.models import load_model
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import ExpertMixture, RouterKind
from tritter.methods.novelty import observe

RANK = 8
ALL = "all linear layers"
TARGETS = {
    "q and v": ("q_proj", "v_proj"),
    ALL: (
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
OBSERVED = ", observed"
FIELDS = ("layers", "routing", "ratio", "smallest", "largest")


def base(options: Any) -> nn.Module:
    """Return the checkpoint that was asked for, or a small Llama with random weights."""
    torch.manual_seed(0)
    if options.model is not None:
        return load_model(options.model)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=1152, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def stepping(
    options: Any,
    model: nn.Module,
    extra: Callable[[], Tensor | float],
    before: Callable[[Tensor], object] | None = None,
) -> Callable[[], object]:
    """Return a training step of what is not frozen.

    Args:
        options: of the command.
        model: the model.
        extra: a further loss, after the forward pass.
        before: called with the ids [B, T] before the forward pass.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 1024, (options.batch_size, options.tokens))

    def step() -> None:
        with autocast(options):
            if before is not None:
                before(ids)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss = loss + extra()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def autocast(options: Any) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16, enabled=options.model is not None)


def peft_step(options: Any, targets: tuple[str, ...]) -> Callable[[], object]:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets))
    wrapped = get_peft_model(base(options), config)
    return stepping(options, wrapped, lambda: 0.0)


def mixture_step(options: Any, targets: tuple[str, ...], mode: str) -> Callable[[], object]:
    router_kind, routing = MODES[mode.removesuffix(OBSERVED)]
    mixture = ExpertMixture(base(options), router=router_kind)
    for number in range(options.experts):
        mixture.add(f"e{number}", AdapterShape(RANK, 2 * RANK, targets), seed=number)
    with torch.no_grad():
        for router in mixture.routers():
            router.weight.normal_(std=0.05)  # so that choices differ
    if mixture.evidence is not None:
        mixture.evidence.counts.random_(0, 1000)
    mixture.routing = routing
    mixture.model.train()

    def look(ids: Tensor) -> None:
        with mixture.off():
            observe(mixture.model, ids, with_losses=False)

    def losses() -> Tensor:
        if router_kind == "evidence":
            return torch.zeros(())  # there is nothing to learn
        found = [0.01 * g.balance_loss() + 1e-3 * g.z_loss() for g in mixture.gates()]
        return torch.stack(found).mean()

    return stepping(options, mixture.model, losses, look if mode.endswith(OBSERVED) else None)


def seconds(function: Callable[[], object]) -> float:
    since = time.process_time()
    function()
    return time.process_time() - since


def rows(options: Any) -> Iterator[dict[str, object]]:
    targets = TARGETS if options.model is None else {ALL: TARGETS[ALL]}
    modes = list(MODES)
    if options.model is not None:  # what `experts=dylora` trains with
        modes = [mode + OBSERVED for mode in ("evidence, dense", "evidence, top-2")]
    for layers, names in targets.items():
        steps = {"peft": peft_step(options, names)}
        steps |= {mode: mixture_step(options, names, mode) for mode in modes}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                taken[name].append(seconds(step))
        for name in modes:
            ratios = [a / b for a, b in zip(taken[name][2:], taken["peft"][2:], strict=True)]
            values = (statistics.median(ratios), min(ratios), max(ratios))
            yield dict(zip(FIELDS, (layers, name, *(f"{v:.2f}" for v in values)), strict=True))


def main() -> None:
    """Print a row for each mode: median of the ratios of neighbouring steps, their extremes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a checkpoint, in place of a small Llama")
    parser.add_argument("--experts", type=int, default=8, help="the base's own among them")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--rounds", type=int, default=12, help="the first two are not counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    table.writerows(rows(options))


if __name__ == "__main__":
    main()

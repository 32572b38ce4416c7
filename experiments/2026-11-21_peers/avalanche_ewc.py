"""EWC of Avalanche and of Tritter on one small Llama: importances, penalty, trained weights.

    python experiments/2026-11-21_peers/avalanche_ewc.py --output avalanche_ewc.csv

Avalanche's plugin is taken as it is, and driven by the same plain SGD loop as Tritter's method: a
first task, the importances of it, then a second task under the penalty. Avalanche squares the
gradient of a batch's mean and leaves the half out, so that λ of ours is twice its own where its
batches have one sequence. Needs `pip install avalanche-lib`.
"""

import argparse
import copy
import csv
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BATCH, LENGTH, STEPS, RATE = 8, 32, 30, 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One seed and one way of taking importances."""

    seed: int
    avalanche_batch: int
    importance_ratio: float  # Avalanche's sum over ours
    importance_difference: float  # largest, relative to the largest of ours
    squared_mean_difference: float  # the same beside squared gradients of batch means
    penalty_ratio: float  # at λ of ours = 2 λ of theirs, after the second task
    weight_difference: float  # between the two trained models, relative to how far they moved


class Logits(nn.Module):
    """A causal model as Avalanche wants one: tensors in, tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        return self.model(input_ids=rows, use_cache=False).logits[:, :-1].transpose(1, 2)


def compared(seed: int, *, avalanche_batch: int, ewc_lambda: float) -> Row:
    from avalanche.training.plugins import EWCPlugin
    from avalanche.training.utils import copy_params_dict

    from tests import oracle
    from tritter.methods.forgetting import EWC
    from tritter.methods.forgetting.quadratic import diagonal_fisher
    from tritter.training import Task

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = oracle.tiny_llama()
    draw = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    first, second = (
        torch.randint(0, vocab, (STEPS * BATCH, LENGTH), generator=draw) % size
        for size in (vocab, vocab // 2)
    )
    train(model, first, lambda: None)
    start = copy.deepcopy(model)

    plugin = EWCPlugin(ewc_lambda / 2)
    sequences = first[: 8 * BATCH]
    importances = plugin.compute_importances(
        Logits(model),
        cross_entropy,
        torch.optim.SGD(model.parameters(), lr=RATE),
        TensorDataset(sequences, sequences[:, 1:], torch.zeros(len(sequences)).long()),
        torch.device("cpu"),
        avalanche_batch,
    )
    model.zero_grad()
    theirs = {name.removeprefix("model."): data.data for name, data in importances.items()}
    ours = diagonal_fisher(model, sequences)
    means = squared_means(model, sequences, batch=avalanche_batch)

    their_model, our_model = copy.deepcopy(start), copy.deepcopy(start)
    plugin.update_importances(importances, 0)
    plugin.saved_params[0] = copy_params_dict(Logits(their_model))
    strategy = SimpleNamespace(
        clock=SimpleNamespace(train_exp_counter=1),
        model=Logits(their_model),
        device=torch.device("cpu"),
        loss=0.0,
    )

    def add_theirs() -> float:
        strategy.loss = torch.zeros(())
        plugin.before_backward(strategy)
        strategy.loss.backward()
        return float(strategy.loss.detach())

    method = EWC(ewc_lambda=ewc_lambda, at="carried", refresh_steps=None)
    method.begin_task(
        our_model,
        Task(
            seed=0,
            old_sequences={},
            carried={n: torch.ones_like(p).bool() for n, p in our_model.named_parameters()},
            state={"fisher": ours},
            state_before={"fisher": ours},
        ),
    )
    train(their_model, second, add_theirs)
    train(our_model, second, lambda: method.add_to_gradients(our_model))
    penalty = method.logged_loss(our_model)
    moved = largest_difference(state(our_model), state(start))
    return Row(
        seed=seed,
        avalanche_batch=avalanche_batch,
        importance_ratio=total(theirs) / total(ours),
        importance_difference=largest_difference(theirs, ours) / largest(ours),
        squared_mean_difference=largest_difference(theirs, means) / largest(means),
        penalty_ratio=add_theirs() / float(penalty or 0),
        weight_difference=largest_difference(state(our_model), state(their_model)) / moved,
    )


def train(model: nn.Module, rows: Tensor, add_gradients) -> None:  # type: ignore[no-untyped-def]
    """Take a step of SGD on each batch of the task's loss and what is added."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for batch in rows.split(BATCH):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        add_gradients()
        optimizer.step()


def squared_means(model: nn.Module, rows: Tensor, *, batch: int) -> dict[str, Tensor]:
    """Return the mean over batches of the squared gradient of a batch's mean loss."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for some in rows.split(batch):
        loss = model(input_ids=some, labels=some, use_cache=False).loss
        for (name, _), gradient in zip(
            model.named_parameters(),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        ):
            sums[name] += gradient.square()
    return {name: value / (len(rows) / batch) for name, value in sums.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def total(values: Mapping[str, Tensor]) -> float:
    return float(sum(value.sum() for value in values.values()))


def largest(values: Mapping[str, Tensor]) -> float:
    return max(float(value.abs().max()) for value in values.values())


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return largest({name: one[name] - other[name] for name in one})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ewc-lambda", type=float, default=100.0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [
        compared(seed, avalanche_batch=batch, ewc_lambda=given.ewc_lambda)
        for batch in given.batches
        for seed in given.seeds
    ]
    with given.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.3g}" for k, v in asdict(row).items()} for row in rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()

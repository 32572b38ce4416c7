"""PEFT's orthogonal subspace fine-tuning (OSF) on the default job, scored as every run is.

    python train.py expansion=width forgetting=none training.max_steps=200 seed=0 \\
        pipeline.keep_stages=true hydra.run.dir=RUN
    python experiments/2026-11-21_peers/osf.py --runs RUN … --ranks 0.5 0.9 --output osf.csv

Each run folder gives the base, what it was grown to, and the text. OSF starts from the same weights
and sees the same batches in the same order, at the same rate; the largest singular directions of
every linear layer are held, the rest is trained. Needs `pip install peft`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import csv
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True, slots=True)
class Row:
    """One training: changes per byte in per cent, with the gate's one-sided 95 % bounds."""

    seed: int
    start: str
    effective_rank: float
    rate: float
    trainable: int
    parameters: int
    old: float
    old_low: float
    old_high: float
    new: float
    new_low: float
    new_high: float


def trained(run: Path, *, is_grown: bool, rank: float, rate: float, steps: int) -> Row:
    """Train what a finished run started from under OSF, and score it as the run was scored."""
    import torch
    from peft import OSFConfig, get_peft_model

    from tritter.config.launch.composition import load_config
    from tritter.core.models import load_model
    from tritter.pipeline.ledger import Ledger
    from tritter.pipeline.run import Run
    from tritter.storage.reading import read_object
    from tritter.terminal import Console

    torch.set_num_threads(1)
    seed = read_object(run / "summary.json")["seed"]
    words = [f"seed={seed}", f"training.max_steps={steps}", f"training.learning_rate={rate}"]
    config = load_config([*words, "forgetting=none", "trainer.progress=off"])
    context = Run(config=config, folder=run, console=Console(quiet=True), ledger=Ledger(run))
    start = "attempt_1/expanded" if is_grown else "baseline"
    model = load_model(run / start)
    parameters = sum(p.numel() for p in model.parameters())
    wrapped = get_peft_model(
        model, OSFConfig(target_modules="all-linear", effective_rank=rank, task_type="CAUSAL_LM")
    )
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    train(wrapped, context, config.training.rate_schedule())
    before = context.read_scores("baseline")
    merged = wrapped.merge_and_unload()
    after = {domain: scored(context, merged, domain) for domain in before}
    old, new = (before[name].relative_forgetting(after[name]) for name in ("prose", "code"))
    numbers = [100 * each for e in (old, new) for each in (e.value, e.lower(0.95), e.upper(0.95))]
    return Row(
        seed,
        start,
        rank,
        rate,
        trainable,
        parameters,
        *(round(number, 2) for number in numbers),
    )


def train(model, context, schedule):  # type: ignore[no-untyped-def]
    """Train as `fit` does: its batches, optimizer, clipping and rates; OSF projects by hooks."""
    import torch

    optimizer = context.config.optimizer.build(
        model.named_parameters(), learning_rate=schedule.learning_rate
    )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    batches = context.data.batches(
        context.data.new_domains, purpose="training", max_steps=schedule.max_steps
    )
    for step, batch in zip(range(schedule.max_steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.factor(step)
        ids = batch["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(held, context.config.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()


def scored(context, model, domain):  # type: ignore[no-untyped-def]
    from tritter.evaluation.losses import document_losses

    return document_losses(
        model,
        context.data.corpus.domains[domain].validation,
        sequence_length=context.data.sequence_length,
        bounds=context.data.bounds,
        batch_size=context.config.evaluation.batch_size,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--ungrown", action="store_true", help="start from the base itself")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [
        trained(run, is_grown=not given.ungrown, rank=rank, rate=rate, steps=given.steps)
        for run in given.runs
        for rank in given.ranks
        for rate in given.rates
    ]
    is_new = not given.output.exists()
    with given.output.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()

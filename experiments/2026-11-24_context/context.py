"""Does scaling RoPE help to extend the context, at equal FLOPs? Writes `results.csv`.

`python experiments/2026-11-24_context/context.py` computes only runs that are missing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import ROOT, append, done, train  # noqa: E402
from tritter.config.launch.composition import load_config  # noqa: E402
from tritter.core.families import Flops, training_flops  # noqa: E402
from tritter.core.models import load_model  # noqa: E402
from tritter.pipeline import windows  # noqa: E402
from tritter.pipeline.ledger import Ledger  # noqa: E402
from tritter.pipeline.run import Run  # noqa: E402
from tritter.terminal import Console  # noqa: E402

# Arm → overrides of the run; `short` is the control, which keeps its context
ARMS = {
    "yarn": ["expansion=context"],
    "base": ["expansion=context", "expansion.context.method=base"],
    "unchanged": ["expansion=unchanged"],
    "short": ["expansion=none"],
}
COLUMNS: tuple[str, ...] = (
    "seed",
    "arm",
    "steps",
    "flops",
    "domain",
    "stage",
    "window",
    "position",
    "loss",
)
COLUMNS += ("documents", "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "context")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--data", default="data=stdlib")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm in ARMS:
            if (str(seed), arm) not in done(options.output):
                _run(options, seed=seed, arm=arm)


def _words(options: Any, *, seed: int, arm: str, steps: int) -> list[str]:
    length, target = options.length, 4 * options.length
    words = ["model=tiny", f"model.max_position_embeddings={length}", *options.data.split()]
    words += [f"data.sequence_length={length}", f"data.batch_size={2048 // length}"]
    words += [f"pretraining.max_steps={options.pretraining_steps}", "pretraining=default"]
    words += [f"training.max_steps={steps}", "forgetting=replay", "gate=off", f"seed={seed}"]
    words += [f"evaluation.max_tokens_per_document={target}", "evaluation.every_n_steps=0"]
    return [*words, "evaluation.sample_tokens=0", *ARMS[arm]]


def _run(options: Any, *, seed: int, arm: str) -> None:
    """Train one arm and append its rows."""
    steps, target = options.steps, 4 * options.length
    source = _config(options, seed)
    if arm == "short":  # attention costs less, so it gets more steps
        costs = [_flops(source).per_token(n) for n in (options.length, target)]
        steps = round(steps * costs[1] / costs[0])
    folder = options.work / f"run_{seed}_{arm}"
    words = _words(options, seed=seed, arm=arm, steps=steps)
    summary = train(folder, ["--config-dir", str(FOLDER / "conf"), *words], path=FOLDER)
    fixed = {
        "seed": seed,
        "arm": arm,
        "steps": steps,
        "flops": summary["flops"]["fit"],
        "model_hash": summary["lineage"]["model_hash"],
    }
    rows = [
        {**fixed, "domain": name, "stage": stage, "window": "short", "loss": score["loss"],
         "documents": score["n"]}
        for stage, scores in (("before", summary["baseline"]), ("trained", summary["final"]))
        for name, score in scores.items()
    ]  # fmt: skip
    record = summary.get("windows") or _long_windows(options, folder, seed=seed)
    stages = {"source_long": "before", "expanded": "expanded", "final": "trained"}
    stages |= {"source": "before", "own": "trained"}
    for domain, models in record["scores"].items():
        for name, score in models.items():
            stage, window = stages[name], "own" if name in ("source", "own") else "long"
            own = {**fixed, "domain": domain, "stage": stage, "window": window}
            rows.append({**own, "loss": score["loss"], "documents": score["n"]})
            losses = record["positions"][domain].get(name, {"end": [], "loss": []})
            for end, loss in zip(losses["end"], losses["loss"], strict=True):
                rows.append({**own, "position": end, "loss": loss, "documents": score["n"]})
    append(options.output, rows, columns=COLUMNS)


def _long_windows(options: Any, folder: Path, *, seed: int) -> dict[str, Any]:
    """Score the control in long windows, which its run does not have."""
    words = _words(options, seed=seed, arm="short", steps=1)
    context = Run(
        config=load_config(words), folder=folder, console=Console(), ledger=Ledger(folder)
    )
    longer = context.data.reading(4 * options.length)
    model, lengths = load_model(folder / "checkpoint"), {"final": 4, "own": 1}  # of the source
    found = {
        name: windows.LongScores.of(
            context, longer, model, source_length=options.length, length=factor * options.length
        )
        for name, factor in lengths.items()
    }
    domains = found["final"].scores
    return {
        "scores": {
            domain: {name: each.scores[domain].record() for name, each in found.items()}
            for domain in domains
        },
        "positions": {domain: {"final": found["final"].positions[domain]} for domain in domains},
    }


def _config(options: Any, seed: int) -> Any:

    return load_config(_words(options, seed=seed, arm="short", steps=1)).base_model()


def _flops(config: Any) -> Flops:
    return training_flops(config)


if __name__ == "__main__":
    main()

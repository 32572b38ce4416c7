"""Does a larger vocabulary help on code, at equal FLOPs? Writes `results.csv`, a row per run.

`python experiments/2026-11-24_vocabulary/vocabulary.py` computes only rows that are missing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import ROOT, append, done, loss_rows, train  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.data.built_in import Stdlib  # noqa: E402

SEQUENCE_LENGTH = 128
# Arm → overrides of the run; `none` is the control with the old vocabulary
ARMS = {
    "mean": ["expansion=vocab"],
    "overlap": ["expansion=vocab", "expansion.vocab.init=overlap"],
    "omp": ["expansion=vocab", "expansion.vocab.init=omp"],
    "random": ["expansion=vocab", "expansion.vocab.init=random"],
    "frozen old rows": ["expansion=vocab", "expansion.vocab.freeze_old_rows=true"],
    "none": ["expansion=none"],
}
COLUMNS = ("seed", "arm", "steps", "flops", "mass", "domain", "stage", "loss_per_byte")
COLUMNS += ("tokens_per_byte", "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "vocabulary")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--pretraining-steps", type=int, default=1200)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prose, rest = _prose(options.work)
    donor = options.work / "donor" / "baseline"
    if "omp" in options.arms:
        _base(options, donor.parent, ["stdlib:code", prose], seed=0, tokens=2 * options.tokens)
    for seed in options.seeds:
        base = options.work / f"base_{seed}"
        _base(options, base, [prose, rest], seed=seed, tokens=options.tokens)
        for arm in options.arms:
            if (str(seed), arm) not in done(options.output):
                _run(options, base / "baseline", prose, donor, seed=seed, arm=arm)


def _prose(work: Path) -> tuple[str, str]:
    """Write the prose of this Python to two files; the second is a twentieth."""
    texts = [document.text for document in Stdlib().texts["prose"]]
    files = {"prose.jsonl": texts[1:], "rest.jsonl": texts[::20]}
    for name, part in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (work / name).write_text(lines, encoding="utf-8")
    first, second = (str(work / name) for name in files)
    return first, second


def _base(options: Any, folder: Path, texts: list[str], *, seed: int, tokens: int) -> None:
    """Train a base and its tokenizer on the first of two texts, in `folder/baseline`."""
    old, new = texts
    words = f"data=text data.old=[{old}] data.new=[{new}] data.vocab_size={tokens} seed={seed}"
    steps = f"pretraining.max_steps={options.pretraining_steps} training.max_steps=1"
    choices = "expansion=none forgetting=none gate=off"
    train(folder, [*words.split(), *steps.split(), *choices.split()])


def _run(options: Any, base: Path, prose: str, donor: Path, *, seed: int, arm: str) -> None:
    """Train one arm and append its rows."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    larger = {**config, "vocab_size": config["vocab_size"] + options.tokens}
    costs = [training_flops(Model(each)).of(SEQUENCE_LENGTH) for each in (config, larger)]
    steps = round(options.steps * costs[1] / costs[0]) if arm == "none" else options.steps
    folder = options.work / f"run_{seed}_{arm.replace(' ', '_')}"
    overrides = list(ARMS[arm])
    if arm != "none":
        overrides.append(f"expansion.vocab.new_tokens={options.tokens}")
    if arm == "omp":
        overrides.append(f"expansion.vocab.tokenizer={donor}")
    words = f"model=hf model.path={base} data=text data.old=[{prose}] gate=off seed={seed}"
    lengths = f"training.learning_rate=3e-3 training.max_steps={steps}"
    new = "data.new={code: stdlib:code}"
    summary = train(folder, [*overrides, *words.split(), *lengths.split(), new])
    attempt = summary["attempts"][0]
    shift = (attempt["jump"] or {}).get("new_token_mass")
    rows = [
        {
            "seed": seed,
            "arm": arm,
            "steps": steps,
            "flops": attempt["flops"],
            "mass": shift,
            "domain": domain,
            "stage": stage,
            "loss_per_byte": score["loss_per_byte"],
            "tokens_per_byte": score["loss_per_byte"] / score["loss"],
            "model_hash": summary["lineage"]["model_hash"],
        }
        for domain, stage, score in loss_rows(summary)
    ]
    append(options.output, rows, columns=COLUMNS)


if __name__ == "__main__":
    main()

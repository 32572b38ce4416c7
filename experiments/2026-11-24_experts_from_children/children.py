"""Do experts from children beat other uses of the same FLOPs? Writes `results.csv`.

`python experiments/2026-11-24_experts_from_children/children.py --stories FILE --maths FILE`
computes only rows that are missing.
"""

import argparse
import gzip
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from experiments.jobs import ROOT, append, done, loss_rows, train  # noqa: E402
from tritter.core.expansions import Moe, target_model  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.data.built_in import Stdlib  # noqa: E402

SEQUENCE_LENGTH, DOMAIN_BYTES, STORY_BYTES = 128, 800_000, 1_500
DOMAINS = ("code", "stories", "maths")
ARMS = ("mixed", "random router", "mean", "dense", "upcycled", "lora")
COLUMNS = ("seed", "arm", "steps", "flops", "domain", "stage", "loss_per_byte", "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=Path, required=True, help="text, packed by gzip")
    parser.add_argument("--maths", type=Path, required=True, help="GSM8K's train.jsonl.gz")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "children")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--child-steps", type=int, default=240)
    parser.add_argument("--mixed-steps", type=int, default=150)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    texts = _texts(options)
    for seed in options.seeds:
        base = options.work / f"base_{seed}"
        new = ", ".join(f"{name}: {texts[name]}" for name in DOMAINS)
        words = [f"pretraining.max_steps={options.pretraining_steps}", "training.max_steps=1"]
        words += ["model=tiny", f"data.old=[{texts['prose']}]", f"data.new={{{new}}}"]
        _train(base, seed, [*words, "expansion=none", "forgetting=none"])
        for name in DOMAINS:
            _child(options, base, seed, name, texts)
        for arm in options.arms:
            if (str(seed), arm) not in done(options.output):
                _arm(options, base, seed, arm, texts, new)


def _texts(options: Any) -> dict[str, Path]:
    """Write about as many bytes of each domain to a file; return its path."""
    found = Stdlib().texts
    stories = gzip.decompress(options.stories.read_bytes()).decode("utf-8").split("\n")
    rows = gzip.decompress(options.maths.read_bytes()).decode("utf-8").splitlines()
    maths = (f"{row['question']}\n{row['answer']}" for row in map(json.loads, rows))
    texts = {
        "prose": (document.text for document in found["prose"]),
        "code": (document.text for document in found["code"]),
        "stories": _joined(stories),
        "maths": _joined(maths),
    }
    paths = {}
    for name, documents in texts.items():
        paths[name], size = options.work / f"{name}.jsonl", 0
        with paths[name].open("w", encoding="utf-8") as file:
            for text in documents:
                if size < DOMAIN_BYTES:
                    size += len(text.encode())
                    file.write(json.dumps({"text": text}) + "\n")
    return paths


def _joined(lines: Iterable[str]) -> Iterable[str]:
    """Yield documents of some lines each."""
    part = ""
    for line in lines:
        part += line + "\n"
        if len(part) > STORY_BYTES:
            yield part
            part = ""


def _child(options: Any, base: Path, seed: int, name: str, texts: dict[str, Path]) -> None:
    """Train a child on one domain, unless it exists."""
    folder = options.work / f"child_{seed}_{name}"
    words = [f"model.path={base / 'baseline'}", f"training.max_steps={options.child_steps}"]
    words += [f"data.new={{{name}: {texts[name]}}}", "expansion=none", "forgetting=none"]
    summary = _train(folder, seed, ["model=hf", *words])
    if (str(seed), name) not in done(options.output):
        _write(options, summary, seed, name, options.child_steps)


def _arm(options: Any, base: Path, seed: int, arm: str, texts: dict[str, Path], new: str) -> None:
    """Train one arm and append its rows."""
    folder, start = options.work / f"run_{seed}_{arm.replace(' ', '_')}", base / "baseline"
    children = [options.work / f"child_{seed}_{name}" / "checkpoint" for name in DOMAINS]
    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    mixed = target_model(Model(config), [Moe(num_experts=1 + len(children))]).config
    dense, sparse = (training_flops(Model(each)).of(SEQUENCE_LENGTH) for each in (config, mixed))
    healing = options.mixed_steps * sparse
    total = len(children) * options.child_steps * dense + healing
    steps, words = round(total / dense), ["expansion=none"]
    if arm in ("mixed", "random router"):
        listed = ",".join(map(str, [*children, start]))
        words = ["expansion=moe", f"expansion.moe.experts_from=[{listed}]"]
        words += ["expansion.moe.router=random"] * (arm == "random router")
        steps = options.mixed_steps
    elif arm == "mean":
        steps, start = (
            round(healing / dense),
            _mean([*children, start], folder.with_suffix(".mean")),
        )
    elif arm == "upcycled":
        steps = round(total / sparse)
        words = ["expansion=moe", f"expansion.moe.num_experts={1 + len(children)}"]
    words += [f"model.path={start}", f"data.old=[{texts['prose']}]"]
    if arm == "lora":
        parts = ", ".join(f"{{{name}: {texts[name]}}}" for name in DOMAINS)
        steps = round(total / dense / len(DOMAINS))
        words += [f"data.tasks=[{parts}]", "experts=dylora", "experts.boundaries=told"]
        words += ["forgetting=none"]
    else:
        words += [f"data.new={{{new}}}", "forgetting=replay"]
    summary = _train(folder, seed, ["model=hf", f"training.max_steps={steps}", *words])
    _write(options, summary, seed, arm, steps)


def _mean(folders: list[Path], target: Path) -> Path:
    """Write the mean of some models as a plain folder, with the files of the last."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in folders[-1].iterdir():
        if path.suffix == ".json" and path.name not in (
            "tritter.json",
            "model.safetensors.index.json",
        ):
            shutil.copy(path, target)
    states = [load_file(folder / "model.safetensors") for folder in folders]
    mean = {n: torch.stack([s[n] for s in states]).mean(dim=0) for n in states[0]}
    save_file(mean, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _write(options: Any, summary: dict[str, Any], seed: int, arm: str, steps: int) -> None:
    """Append the rows of a run: its losses before and after training."""
    rows = [
        {
            "seed": seed,
            "arm": arm,
            "steps": steps,
            "flops": summary["attempts"][0]["flops"],
            "domain": domain,
            "stage": stage,
            "loss_per_byte": score["loss_per_byte"],
            "model_hash": summary["lineage"]["model_hash"],
        }
        for domain, stage, score in loss_rows(summary)
    ]
    append(options.output, rows, columns=COLUMNS)


def _train(folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    words = ["evaluation.every_n_steps=0", "data=text", "training.learning_rate=2e-3"]
    return train(folder, [*words, "gate=off", f"seed={seed}", *overrides])


if __name__ == "__main__":
    main()

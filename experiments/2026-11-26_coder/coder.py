"""Tool calls and Spanish for Qwen2.5-Coder-0.5B-Instruct: can it still program?

    python experiments/2026-11-26_coder/coder.py --model QWEN --data DATA

Writes `results.csv`. Runs the programs that the model writes. Runs that are already in results.csv
are skipped, a killed one is resumed.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from experiments.jobs import ROOT, append, rows_of, train  # noqa: E402
from experiments.scores import CHANGE, change, copy_benchmarks  # noqa: E402
from tritter.evaluation.statistics import PairedScores  # noqa: E402

BENCHMARKS = ("humaneval", "mbpp")
# Arm → overrides
ARMS = {
    "LoRA experts": ["experts=dylora", "forgetting=none"],
    "fine-tuning, replay": ["forgetting=replay", "training.learning_rate=5e-5"],
}
COLUMNS = ("seed", "arm", "steps", "experts", *CHANGE, "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="benchmarks, instructions, text")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "coder")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=20, help="of each benchmark")
    parser.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    copy_benchmarks(options.data, options.work / "benchmarks", BENCHMARKS)
    for seed in options.seeds:
        for arm in options.arms:
            rows = [(row["seed"], row["arm"], row["steps"]) for row in rows_of(options.output)]
            if (str(seed), arm, str(options.steps)) not in rows:
                run_arm(options, arm, seed)


def words_of(options: Any, arm: str, seed: int) -> list[str]:
    """Return the overrides of a run."""
    data, named = options.data, ",".join(BENCHMARKS)
    spanish = data / "text/gutenberg/don_quijote_es.txt.gz"
    words = ["model=hf", f"model.path={options.model}", "data=text", "expansion=none"]
    words += [f"data.old={{code: {data / 'codealpaca/new_codealpaca_4k.jsonl.gz'}}}"]
    words += [f"data.new={{tool_call: 'skills:tool_call:1500:chat', spanish: {spanish}}}"]
    words += ["data.weights={tool_call: 1}"]  # else 3 % of the sequences are tool calls
    words += ["data.sequence_length=256", "data.batch_size=2", f"seed={seed}", "gate=off"]
    words += [f"training.max_steps={options.steps}", f"trainer.precision={options.precision}"]
    words += ["evaluation.every_n_steps=0", "evaluation.max_documents=16"]
    words += ["evaluation.task_questions=50", f"evaluation.tasks=[{named}]"]
    words += [f"evaluation.tasks_path={options.work / 'benchmarks'}"]
    words += [f"evaluation.task_limit={options.questions}", f"evaluation.allow_code=[{named}]"]
    return [*words, *ARMS[arm]]


def run_arm(options: Any, arm: str, seed: int) -> None:
    """Train one arm and append its rows."""
    name = arm.replace(", ", "_").replace(" ", "_")
    folder = options.work / f"run_{seed}_{name}_{options.steps}"
    summary = train(folder, words_of(options, arm, seed))
    first, last = (scores_of(folder, stage) for stage in ("baseline", "attempt_1-trained"))
    experts = (summary.get("experts") or {}).get("spawned", "")
    fixed = {"seed": seed, "arm": arm, "steps": options.steps, "experts": len(experts) or ""}
    fixed["model_hash"] = summary["lineage"]["model_hash"]
    rows = [{**fixed, **change(name, first[name], last[name])} for name in first]
    append(options.output, rows, columns=COLUMNS)
    for path in folder.rglob("*.safetensors"):  # gigabytes
        path.unlink()


def scores_of(folder: Path, stage: str) -> dict[str, PairedScores]:
    """Return the scores of a run by domain, skill and benchmark."""
    plain = json.loads((folder / f"scores/{stage}.json").read_text(encoding="utf-8"))
    return {name: PairedScores.from_dict(each) for name, each in plain.items()}


if __name__ == "__main__":
    main()

"""What expansions of SmolLM2-135M-Instruct and training on code cost it. Writes `results.csv`.

    python experiments/2026-11-26_real_expansions/real_expansions.py --model SMOLLM2 --data DATA

Arms have equal FLOPs. Runs that are already in results.csv are skipped, a killed one is resumed.
"""

import argparse
import csv
import gzip
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from experiments.jobs import ROOT, append, done, train  # noqa: E402
from experiments.scores import (  # noqa: E402
    CHANGE,
    TRAINER,
    benchmark_scores,
    change,
    copy_benchmarks,
)
from tritter.core.expansions import Dus, LlamaPro, Moe, Width, target_model  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.data.built_in import Stdlib  # noqa: E402
from tritter.evaluation.gate import Check  # noqa: E402
from tritter.evaluation.statistics import PairedScores  # noqa: E402
from tritter.storage.atomic import write_text_atomic  # noqa: E402

SEQUENCE_LENGTH, BATCH_SIZE = 256, 2
BENCHMARKS = ("hellaswag", "arc_easy", "piqa", "lambada")
CODE_BYTES = 2_000_000
# Expansion → its part of the FLOPs (None: as without it) and its overrides
EXPANSIONS: dict[str, tuple[Any, list[str]]] = {
    "none": (None, ["expansion=none"]),
    "dus": (Dus(target_layers=44), ["expansion=dus", "expansion.dus.target_layers=44"]),
    "dus, identity": (
        Dus(target_layers=44),
        ["expansion=dus", "expansion.dus.target_layers=44", "expansion.dus.identity_init=true"],
    ),
    "llama_pro": (LlamaPro(), ["expansion=llama_pro"]),
    "width": (Width(hidden_size=768), ["expansion=width", "expansion.width.hidden_size=768"]),
    "moe": (Moe(num_experts=4), ["expansion=moe", "expansion.moe.num_experts=4"]),
    "vocab": (
        None,
        [
            *("expansion=vocab", "expansion.vocab.new_tokens=2000"),
            *("data.chat_template=none", "data.loss_on=all"),  # conversations keep their tokens
        ],
    ),
}
METHODS = ("replay", "ewc", "distill")
COLUMNS = ("seed", "arm", "steps", "flops", "stage", *CHANGE, "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    # Distillation compares the same tokens, which a new vocabulary does not have
    arms = [f"{expansion} + {method}" for method in METHODS for expansion in EXPANSIONS]
    arms.remove("vocab + distill")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="benchmarks, WikiText and Dolly")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "real_expansions")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--steps", type=int, default=150, help="of an arm without expansion")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    parser.add_argument("--questions", type=int, default=1000, help="of each benchmark")
    parser.add_argument("--scoring", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    copy_benchmarks(options.data, options.work / "benchmarks", BENCHMARKS)
    write_texts(options)
    for seed in options.seeds:
        for arm in options.arms:
            if (str(seed), arm) not in done(options.output):
                run_arm(options, arm, seed)


def write_texts(options: Any) -> None:
    """Write the new domain and the two old ones to the work folder, one document per line."""
    wiki = gzip.decompress((options.data / "wikitext2" / "valid.txt.gz").read_bytes()).decode()
    articles = re.split(r"(?m)^(?= = [^=].*[^=] = $)", wiki)
    code, size = [], 0
    for document in Stdlib().texts["code"]:
        if size < CODE_BYTES:
            size += len(document.text.encode())
            code.append({"text": document.text})
    _write(options.work / "code.jsonl", code)
    _write(options.work / "wikitext.jsonl", ({"text": each} for each in articles if each.strip()))
    rows = (options.data / "instruct" / "dolly_hhrlhf_1k.jsonl").read_text(encoding="utf-8")
    _write(options.work / "dolly.jsonl", map(conversation, map(json.loads, rows.splitlines())))


def conversation(row: dict[str, str]) -> dict[str, str]:
    """Return a row of Dolly without Alpaca's template."""
    question = row["prompt"].partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]
    return {"prompt": question, "completion": row["response"]}


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def run_arm(options: Any, arm: str, seed: int) -> None:
    """Train one arm, score it, and append its rows."""
    expansion, method = arm.split(" + ")
    folder = options.work / f"run_{seed}_{re.sub('[^a-z]+', '_', arm)}"
    steps = steps_of(options, expansion)
    summary = train(folder, words_of(options, expansion, method, seed, steps))
    fixed = {"seed": seed, "arm": arm, "steps": steps, "flops": summary["attempts"][0]["flops"]}
    fixed["model_hash"] = summary["lineage"]["model_hash"]
    before = scores_of(options, options.model, "base")
    stages = {"trained": scores_of(options, folder / "checkpoint", folder.name)}
    if expansion != "none":
        grown, name = folder / "attempt_1" / "expanded", f"expanded_{seed}_{expansion}"
        # It answers as the source does, but for new tokens, of which the jump is not measured
        is_exact = summary["jump"]["relative_to_std"] < Check.EXACT_JUMP and expansion != "vocab"
        stages["expanded"] = {} if is_exact else scores_of(options, grown, name)
    for stage, after in stages.items():
        rows = [change(measure, before[measure], after[measure]) for measure in after]
        first = own_scores(folder, "baseline")
        last = own_scores(folder, f"attempt_1-{stage}")
        rows += [change(measure, first[measure], last[measure]) for measure in first]
        append(options.output, [{**fixed, "stage": stage, **row} for row in rows], columns=COLUMNS)
    append_curve(options.output.with_name("curves.csv"), folder, seed, arm)
    for path in folder.rglob("*.safetensors"):  # gigabytes
        path.unlink()


def words_of(options: Any, expansion: str, method: str, seed: int, steps: int) -> list[str]:
    """Return the overrides of a run."""
    texts = {name: options.work / f"{name}.jsonl" for name in ("code", "wikitext", "dolly")}
    words = [*TRAINER, "model=hf", f"model.path={options.model}", "data=text"]
    words += [f"data.new={{code: {texts['code']}}}"]
    words += [f"data.old={{wikitext: {texts['wikitext']}, dolly: {texts['dolly']}}}"]
    words += [f"data.sequence_length={SEQUENCE_LENGTH}", f"data.batch_size={BATCH_SIZE}"]
    words += [f"training.max_steps={steps}", f"seed={seed}", "gate=off"]
    words += [f"training.learning_rate={options.rate}", f"trainer.precision={options.precision}"]
    words += ["evaluation.max_documents=24", f"evaluation.every_n_steps={steps // 5}"]
    words.append("pipeline.keep_stages=true")  # the expanded model is scored
    return [*words, *EXPANSIONS[expansion][1], f"forgetting={method}"]


def steps_of(options: Any, expansion: str) -> int:
    """Return the steps with as many FLOPs as `--steps` steps of the source."""
    part = EXPANSIONS[expansion][0]
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    grown = target_model(Model(config), [part]).config if part else config
    source, own = (training_flops(Model(each)).of(SEQUENCE_LENGTH) for each in (config, grown))
    return round(options.steps * source / own)


def scores_of(options: Any, model: Path, name: str) -> dict[str, PairedScores]:
    """Return benchmark → score per question, computed once and kept in the work folder."""
    path = options.work / f"scores_{name}_{options.questions}_{options.scoring}.json"
    questions = dict.fromkeys(BENCHMARKS, options.questions)
    dtype = getattr(torch, options.scoring)
    return benchmark_scores(model, options.work / "benchmarks", questions, path, dtype=dtype)


def own_scores(folder: Path, stage: str) -> dict[str, PairedScores]:
    """Return the run's own scores of domains."""
    plain = json.loads((folder / f"scores/{stage}.json").read_text(encoding="utf-8"))
    return {name: PairedScores.from_dict(each) for name, each in plain.items()}


def append_curve(path: Path, folder: Path, seed: int, arm: str) -> None:
    """Append the losses of the domains during training [nats/token]."""
    rows = []
    for metrics in sorted(folder.rglob("metrics.csv")):
        with metrics.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name.startswith("eval/") and name.endswith("/loss") and value:
                        own = {"domain": name.split("/")[1], "loss": value}
                        rows.append({"seed": seed, "arm": arm, "step": row["step"], **own})
    if rows:
        append(path, rows)


if __name__ == "__main__":
    main()

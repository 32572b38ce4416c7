"""New skills for SmolLM2-135M-Instruct: which methods keep what it knew? Writes `results.csv`.

    python experiments/2026-11-25_foam_table/foam_table.py --model SMOLLM2 --data DATA

Arms have equal FLOPs. Runs that are already in results.csv are skipped, a killed one is resumed.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from experiments.jobs import ROOT, append, rows_of, train  # noqa: E402
from experiments.scores import (  # noqa: E402
    CHANGE,
    DEVICE,
    DEVICE_NAME,
    TRAINER,
    benchmark_scores,
    change,
    copy_benchmarks,
)
from tritter.config.launch.composition import load_config  # noqa: E402
from tritter.core.expansions import LlamaPro, Width, target_model  # noqa: E402
from tritter.core.families import Model, training_flops  # noqa: E402
from tritter.core.models import load_model, load_tokenizer  # noqa: E402
from tritter.data.packing import labels_of  # noqa: E402
from tritter.evaluation.statistics import PairedScores  # noqa: E402
from tritter.methods.whole import load_whole  # noqa: E402
from tritter.pipeline.ledger import Ledger  # noqa: E402
from tritter.pipeline.run import Run  # noqa: E402
from tritter.storage.atomic import write_text_atomic  # noqa: E402
from tritter.terminal import Console  # noqa: E402

SKILLS = {"tool_call": 10, "identity": 5, "reasoning": 5}  # and the number of published probes
SEQUENCE_LENGTH, BATCH_SIZE = 256, 2
# Measure → number of questions
QUESTIONS = {
    "arc_easy": 2376, "arc_easy, chat": 1000, "arc_challenge": 586, "arc_challenge, chat": 586,
    "hellaswag": 1000, "piqa": 1000, "lambada": 1000,
}  # fmt: skip
ORDINARY = 100  # questions that need no skill
REPLAY, FREE = ["forgetting=replay"], ["forgetting=none"]
NARROW = "expansion.width.intermediate_size=2304"  # 1.5 times that of the source
PEFT = "LoRA of PEFT"  # on the batches and at the rate and rank of `LoRA`
WEB = "distill, self_replay, web"  # and a quarter of each batch is web text
# Arm → overrides
ARMS = {
    "fine-tuning": FREE,
    "replay": REPLAY,
    "foam": ["growth=foam", *FREE],
    "foam_v3": ["growth=foam_v3", "growth.freeze_attention=true", *REPLAY],
    "frozen attention": ["growth=foam", "growth.freeze_attention=true", *REPLAY,
                         "growth.max_new_parameters=1"],
    "gradmax": ["growth=gradmax", *REPLAY],
    "new blocks": ["expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true", *FREE],
    "new blocks, replay": ["expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true",
                           *REPLAY],
    "width": ["expansion=width", "expansion.width.hidden_size=576", NARROW, *REPLAY],
    "LoRA": ["experts=single_lora", *FREE],
    PEFT: FREE,
    "LoRA experts": ["experts=dylora", *FREE],
    "distill, self_replay": ["forgetting=[distill,self_replay]"],
    "distill, self_replay, half": ["forgetting=[distill,self_replay]",
                                   "forgetting.self_replay.fraction=0.5"],
    WEB: ["forgetting=[distill,self_replay,replay]", "forgetting.replay.fraction=0.25",
          "forgetting.replay.weights={arc: 0, dolly: 0}"],
    "foam, distill, self_replay": ["growth=foam", "forgetting=[distill,self_replay]"],
    "new blocks, distill, self_replay": ["expansion=llama_pro",
                                         "expansion.llama_pro.new_blocks_only=true",
                                         "forgetting=[distill,self_replay]"],
    "distill, self_replay, new rows": ["forgetting=[distill,self_replay]",
                                       "forgetting.distill.rows=new"],
}  # fmt: skip
GROWN = {
    "new blocks": LlamaPro(),
    "new blocks, replay": LlamaPro(),
    "new blocks, distill, self_replay": LlamaPro(),
    "width": Width(hidden_size=576, intermediate_size=2304),
}
COLUMNS = ("seed", "arm", "rate", "steps", "device", "flops", "trainable", *CHANGE, "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    parser = parser_of(ARMS, FOLDER / "results.csv", description=__doc__)
    parser.add_argument("--limit", type=int, help="questions of each benchmark, for a trial")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options)
    for seed in options.seeds:
        for arm in options.arms:
            own = {"seed": str(seed), "arm": arm, "rate": str(options.rate)}
            own["steps"] = str(steps_of(options, arm))
            if not any(own.items() <= row.items() for row in rows_of(options.output)):
                run_arm(options, arm, seed)


def parser_of(
    arms: Iterable[str], output: Path, *, description: str | None
) -> argparse.ArgumentParser:
    """Return the options of an experiment with these arms."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="benchmarks and instructions")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "foam_table")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--steps", type=int, default=300, help="of an arm without growth")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--precision", default="bf16-mixed", help="of training")
    return parser


def prepare(options: Any) -> None:
    """Write the benchmarks' questions and the texts of the old domains to the work folder."""
    copy_benchmarks(options.data, options.work / "benchmarks", QUESTIONS)
    rows = (options.data / "instruct" / "dolly_hhrlhf_1k.jsonl").read_text(encoding="utf-8")
    lines = []
    for row in map(json.loads, rows.splitlines()):
        question = row["prompt"].partition("### Instruction:\n")[2]
        prompt = question.partition("\n\n### Response:")[0]
        lines.append(json.dumps({"prompt": prompt, "completion": row["response"]}) + "\n")
    write_text_atomic(options.work / "dolly.jsonl", "".join(lines))


def words_of(options: Any, arm: str, seed: int) -> list[str]:
    """Return the overrides of a run."""
    new = ", ".join(f"{name}: 'skills:{name}:1500:chat'" for name in SKILLS)
    memory = ", ".join(
        str(options.data / f"arc/arc_{kind}_train_instruct.jsonl") for kind in ("easy", "challenge")
    )
    words = [*TRAINER, "model=hf", f"model.path={options.model}", "data=text"]
    words += [f"data.new={{{new}}}"]
    web = f", web: {options.data / 'text/c4_demo_300.jsonl'}" if arm == WEB else ""
    words += [f"data.old={{arc: [{memory}], dolly: {options.work / 'dolly.jsonl'}{web}}}"]
    words += [f"data.sequence_length={SEQUENCE_LENGTH}", f"data.batch_size={BATCH_SIZE}"]
    words += [f"training.max_steps={steps_of(options, arm)}", f"seed={seed}", "gate=off"]
    words += [f"training.learning_rate={options.rate}", "evaluation.every_n_steps=0"]
    words += [f"trainer.precision={options.precision}", "evaluation.task_questions=100"]
    words += ["evaluation.max_documents=32"]
    if ARMS[arm][-1:] == REPLAY or REPLAY[0] in ARMS[arm]:
        words.append("forgetting.replay.weights={dolly: 0}")  # scored only
    if arm not in GROWN:
        words.append("expansion=none")
    return [*words, *ARMS[arm]]


def steps_of(options: Any, arm: str) -> int:
    """Return the steps with as many FLOPs as `--steps` steps of the source."""
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    grown = target_model(Model(config), [GROWN[arm]]).config if arm in GROWN else config
    source, own = (training_flops(Model(each)).of(SEQUENCE_LENGTH) for each in (config, grown))
    return round(options.steps * source / own)


def run_arm(options: Any, arm: str, seed: int) -> None:
    """Train one arm, score it, and append its rows."""
    name = f"{options.steps}_{options.rate:g}_{seed}_{arm.replace(', ', '_').replace(' ', '_')}"
    folder = options.work / f"run_{name}"
    words = words_of(options, arm, seed)
    if arm == PEFT:
        trained = with_peft(options, seed, folder)
    else:
        summary = train(folder, words)
        trained = {
            "flops": summary["attempts"][0]["flops"],
            "trainable": (summary.get("experts") or {}).get("parameters", {}).get("trainable", ""),
            "model_hash": summary["lineage"]["model_hash"],
        }
    before = scores_of(options, options.model, "base")
    after = scores_of(options, folder / "checkpoint", name)
    fixed = {"seed": seed, "arm": arm, "rate": options.rate, "steps": steps_of(options, arm)}
    fixed |= trained | {"device": DEVICE_NAME}
    rows = [{**fixed, **change(measure, before[measure], after[measure])} for measure in before]
    first, last = (_scores(folder, stage) for stage in ("baseline", "attempt_1-trained"))
    rows += [{**fixed, **change(measure, first[measure], last[measure])} for measure in first]
    append(options.output, rows, columns=COLUMNS)
    for path in folder.rglob("*.safetensors"):  # gigabytes
        path.unlink()


def with_peft(options: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Train LoRA of PEFT on the batches, at the rate and rank of `LoRA`; score the merged model.

    The loop has what `fit` has: AdamW, the schedule, clipping. PEFT's modules are those of `LoRA`.
    """
    config = load_config([*words_of(options, "LoRA", seed), "trainer.progress=off"])
    folder.mkdir(exist_ok=True)
    context = Run(config=config, folder=folder, console=Console(quiet=True), ledger=Ledger(folder))
    base = context.data.masked(load_model(options.model))
    lora = config.experts.options
    method = config.experts.kind(**config.experts.arguments)
    rate = method.peak_rate(config.training.learning_rate, context.data.model)
    context.score(base, "baseline")
    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    wrapped = get_peft_model(base, adapter).to(DEVICE)
    trainable = [each for each in wrapped.parameters() if each.requires_grad]
    schedule = replace(config.training.rate_schedule(), learning_rate=rate)
    optimizer = torch.optim.AdamW(trainable, lr=rate)
    batches = context.data.batches(
        context.data.new_domains, purpose="training", max_steps=schedule.max_steps
    )
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule.factor(step)
        ids = batch["input_ids"].to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled="bf16" in options.precision):
            loss = wrapped(input_ids=ids, labels=labels_of(base, ids)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
    merged = wrapped.merge_and_unload()
    context.score(merged, "attempt_1-trained")
    merged.save_pretrained(folder / "checkpoint")
    for path in options.model.glob("*token*"):
        shutil.copy(path, folder / "checkpoint" / path.name)
    return {"flops": "", "trainable": sum(map(torch.numel, trainable)), "model_hash": ""}


def scores_of(options: Any, model: Path, name: str) -> dict[str, PairedScores]:
    """Return benchmark → score per question, computed once and kept in the work folder."""
    path = options.work / f"scores_{name}.json"
    most = options.limit or sys.maxsize
    questions = {measure: min(each, most) for measure, each in QUESTIONS.items()}
    scores = benchmark_scores(model, options.work / "benchmarks", questions, path)
    return scores | {"ordinary": ordinary_answers(options, model, name)}


def ordinary_answers(options: Any, model: Path, name: str) -> PairedScores:
    """Return which ordinary questions, those of Dolly, are answered without a call of a tool.

    A loss of given answers does not show which answer a model prefers.
    """
    path = options.work / f"ordinary_{name}.json"
    if not path.is_file():
        whole = load_whole(model, dtype=torch.bfloat16).to(DEVICE)
        tokenizer = load_tokenizer(model)
        tokenizer.padding_side = "left"
        rows = (options.work / "dolly.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(row)["prompt"] for row in rows]
        shortest = sorted(dict.fromkeys(questions), key=len)[:ORDINARY]
        messages = [[{"role": "user", "content": each}] for each in shortest]
        read = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, padding=True, return_dict=True,
            return_tensors="pt",
        ).to(DEVICE)  # fmt: skip
        written = whole.generate(**read, max_new_tokens=12, do_sample=False)
        answers = tokenizer.batch_decode(written[:, read["input_ids"].shape[1] :])
        plain = [float("<tool_call>" not in answer) for answer in answers]
        right = torch.tensor(plain, dtype=torch.float64)
        scores = PairedScores.of_answers(shortest, right, 0.0)
        write_text_atomic(path, json.dumps(scores.to_dict()))
    return PairedScores.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _scores(folder: Path, stage: str) -> dict[str, PairedScores]:
    """Return the run's own scores of domains and skills, and of the first questions of a skill."""
    plain = json.loads((folder / f"scores/{stage}.json").read_text(encoding="utf-8"))
    scores = {name: PairedScores.from_dict(each) for name, each in plain.items()}
    for name, number in SKILLS.items():
        record = plain[f"{name}/accuracy"]
        first = {"identifiers": record["identifiers"][:number], "values": record["values"][:number]}
        weights = {key: value[:number] for key, value in record["weights"].items()}
        scores[f"{name}/probes"] = PairedScores.from_dict({**record, **first, "weights": weights})
    return scores


if __name__ == "__main__":
    main()

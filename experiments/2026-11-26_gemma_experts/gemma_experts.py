"""A stream of five domains for Gemma 3 270M: LoRA experts, one LoRA, PEFT, the whole model.

    python experiments/2026-11-26_gemma_experts/gemma_experts.py --model GEMMA --data DATA

Writes `results.csv`: a row per arm, seed, phase and domain. Runs that are already in it are
skipped, a killed one is resumed.
"""

import argparse
import gzip
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from experiments.jobs import ROOT, append, done, train  # noqa: E402
from experiments.scores import TRAINER  # noqa: E402
from tritter.config.launch.composition import load_config  # noqa: E402
from tritter.core.models import load_model  # noqa: E402
from tritter.data.chat import ids_of  # noqa: E402
from tritter.pipeline.ledger import Ledger  # noqa: E402
from tritter.pipeline.run import Run  # noqa: E402
from tritter.storage.atomic import write_text_atomic  # noqa: E402
from tritter.terminal import Console  # noqa: E402

STREAM = ("code", "mbpp", "sums", "code", "tool_call", "spanish", "mbpp")
DOMAINS = tuple(dict.fromkeys(STREAM))
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, EXPERTS = 8, 5
PEFT = "LoRA of PEFT"
FREE = ["forgetting=none"]
DYLORA = ["experts=dylora", f"experts.rank={RANK}", f"experts.alpha={2 * RANK}", *FREE]
# One adapter with as many parameters as the experts of all domains have together
SINGLE = ["experts=single_lora", f"experts.rank={EXPERTS * RANK}"]
SINGLE += [f"experts.alpha={2 * EXPERTS * RANK}", *FREE]
# Arm → overrides
ARMS = {
    "LoRA experts": DYLORA,
    "one LoRA": SINGLE,
    PEFT: SINGLE,
    "fine-tuning, replay": ["forgetting=replay"],
    "cosine 0.85": [*DYLORA, "experts.detector={name: cosine, threshold: 0.85}"],
    "cosine 0.75": [*DYLORA, "experts.detector={name: cosine, threshold: 0.75}"],
}
COLUMNS = ("seed", "arm", "rate", "phase", "trained", "domain", "loss_per_byte", "loss")
COLUMNS += ("experts", "trainable", "padding", "steps_per_second", "model_hash")


def main() -> None:
    """Run every arm for every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Gemma 3 270M")
    parser.add_argument("--data", type=Path, required=True, help="code, problems, texts")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "gemma_experts")
    parser.add_argument("--output", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=42, help="of each of the seven phases")
    parser.add_argument("--rate", type=float, default=1e-3, help="of adapters")
    parser.add_argument("--full-rate", type=float, default=5e-5, help="of the whole model")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--documents", type=int, default=32, help="scored ones of a domain")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_texts(options)
    for seed in options.seeds:
        for arm in options.arms:
            if (str(seed), arm) not in done(options.output):
                run_arm(options, arm, seed)


def write_texts(options: Any) -> None:
    """Write each domain to the work folder, one document per line."""
    texts = {
        "code": (
            "\n".join(filter(None, (row["instruction"], row["input"], row["output"])))
            for row in rows_of(options.data / "codealpaca" / "new_codealpaca_4k.jsonl.gz")
        ),
        "mbpp": (
            f"{row['text']}\n{row['code']}".replace("\r", "")
            for row in rows_of(options.data / "mbpp" / "mbpp_even.jsonl")
        ),
        "sums": (
            f"{row['question']}\n{row['answer']}"
            for row in rows_of(options.data / "gsm8k" / "train.jsonl.gz")
        ),
        "spanish": passages(
            text_of(options.data / "text/gutenberg/don_quijote_es.txt.gz"), "\r\n\r\n"
        ),
        "wikitext": re.split(
            r"(?m)^(?= = [^=].*[^=] = $)", text_of(options.data / "wikitext2" / "valid.txt.gz")
        ),
    }
    for name, documents in texts.items():
        lines = (json.dumps({"text": each}) + "\n" for each in documents if each.strip())
        write_text_atomic(options.work / f"{name}.jsonl", "".join(lines))


def text_of(path: Path) -> str:
    """Return the text of a file, which gzip may have packed."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines."""
    yield from map(json.loads, text_of(path).splitlines())


def passages(text: str, separator: str, size: int = 1_500) -> Iterator[str]:
    """Yield whole paragraphs of a text, about `size` characters at a time."""
    found: list[str] = []
    for paragraph in text.split(separator):
        found.append(paragraph)
        if sum(map(len, found)) >= size:
            yield separator.join(found)
            found = []


def words_of(options: Any, arm: str, seed: int) -> list[str]:
    """Return the overrides of a run."""
    sources = {name: str(options.work / f"{name}.jsonl") for name in (*DOMAINS, "wikitext")}
    sources["tool_call"] = "skills:tool_call:3000"
    tasks = ", ".join(f"{{{name}: '{sources[name]}'}}" for name in STREAM)
    rate = options.full_rate if arm.startswith("fine-tuning") else options.rate
    words = [*TRAINER, "model=hf", f"model.path={options.model}", "data=text", "expansion=none"]
    words += [f"data.old={{wikitext: {sources['wikitext']}}}", f"data.tasks=[{tasks}]"]
    words += [f"data.sequence_length={options.tokens}", f"data.batch_size={options.batch_size}"]
    words += [f"training.max_steps={options.steps}", f"training.learning_rate={rate}"]
    words += [f"seed={seed}", "gate=off", f"trainer.precision={options.precision}"]
    words += ["evaluation.every_n_steps=0", "evaluation.task_questions=0"]
    words += [f"evaluation.max_documents={options.documents}", *ARMS[arm]]
    if "experts=" in " ".join(ARMS[arm]):
        words += [f"experts.learning_rate={rate}", f"experts.targets=[{','.join(LAYERS)}]"]
    return [*words, f"data.packing={'stream' if arm == PEFT else 'documents'}"]


def run_arm(options: Any, arm: str, seed: int) -> None:
    """Train one arm on the stream and append its rows."""
    folder = options.work / f"run_{seed}_{re.sub('[^a-z0-9]+', '_', arm.lower())}"
    fixed = {"seed": seed, "arm": arm}
    fixed["rate"] = options.full_rate if arm.startswith("fine-tuning") else options.rate
    if arm == PEFT:
        append(options.output, list(with_peft(options, seed, folder, fixed)), columns=COLUMNS)
        return
    summary = train(folder, words_of(options, arm, seed))
    experts = summary.get("experts") or {}
    fixed["trainable"] = experts.get("parameters", {}).get("trainable", "")
    fixed["model_hash"] = summary["lineage"]["model_hash"]
    rows = list(scored(fixed, 0, "", summary["baseline"]))
    for phase, task in enumerate(summary["attempts"][0]["tasks"], start=1):
        created = [each for each in experts.get("spawned", ()) if each["task"] == phase - 1]
        own = {
            "experts": len(created) if experts else "",
            "padding": (task.get("packing") or {}).get("padding_fraction", ""),
            "steps_per_second": f"{task['steps'] / task['seconds']:.3f}",
        }
        rows += scored(fixed | own, phase, STREAM[phase - 1], task["final"])
    append(options.output, rows, columns=COLUMNS)
    for path in folder.rglob("*.safetensors"):  # gigabytes
        path.unlink()


def scored(
    fixed: dict[str, Any], phase: int, trained: str, scores: dict[str, Any]
) -> Iterable[dict[str, Any]]:
    """Yield the rows of a phase from the scores of a summary."""
    for domain, score in scores.items():
        losses = {"loss_per_byte": score["loss_per_byte"], "loss": score["loss"]}
        yield fixed | {"phase": phase, "trained": trained, "domain": domain} | losses


def with_peft(
    options: Any, seed: int, folder: Path, fixed: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Train one LoRA of PEFT with transformers' Trainer, one training run per phase."""
    config = load_config([*words_of(options, PEFT, seed), "trainer.progress=off"])
    folder.mkdir(exist_ok=True)
    context = Run(config=config, folder=folder, console=Console(quiet=True), ledger=Ledger(folder))
    model = load_model(options.model)
    yield from scored(fixed, 0, "", losses_of(context, model, "baseline"))
    adapter = LoraConfig(
        r=EXPERTS * RANK,
        lora_alpha=2 * EXPERTS * RANK,
        target_modules=list(LAYERS),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, adapter)
    trainable = sum(each.numel() for each in wrapped.parameters() if each.requires_grad)
    for phase, domain in enumerate(STREAM, start=1):
        (rows,) = context.data.training_sequences([domain]).values()
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16="bf16" in options.precision,
            use_cpu=not torch.cuda.is_available(),
            seed=seed + phase,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        dataset = [{"input_ids": row, "labels": row} for row in ids_of(rows).long()]
        since = time.perf_counter()
        Trainer(model=wrapped, args=arguments, train_dataset=dataset).train()
        seconds = time.perf_counter() - since
        own = {"trainable": trainable, "padding": 0.0}
        own["steps_per_second"] = f"{options.steps / seconds:.3f}"
        scores = losses_of(context, wrapped.base_model.model, f"phase_{phase}")
        yield from scored(fixed | own, phase, domain, scores)


def losses_of(context: Run, model: torch.nn.Module, name: str) -> dict[str, Any]:
    """Score a model on every domain, as a run of `train.py` does."""
    model.eval()
    return {domain: each.record() for domain, each in context.score(model, name).items()}


if __name__ == "__main__":
    main()

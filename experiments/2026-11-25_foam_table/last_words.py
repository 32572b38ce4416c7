"""Short runs: which replay keeps the last words of LAMBADA? Writes `last_words.csv`.

    python experiments/2026-11-25_foam_table/last_words.py --model SMOLLM2 --data DATA

The accuracy on 1,000 passages is uncertain by 1.7 points. The log-probability of the last word
shows smaller changes. Runs that are already in the file are skipped.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import foam_table  # the arms; it also makes the repository importable
import torch
from torch import Tensor

from experiments.jobs import append, rows_of, train
from experiments.scores import DEVICE, DEVICE_NAME
from tritter.core.models import load_model, load_tokenizer

FOLDER = Path(__file__).resolve().parent
PASSAGES, BATCH_SIZE = 1000, 16
HALF = "distill, self_replay, half"
# Arm → its arm in foam_table, and overrides
ARMS: dict[str, tuple[str, list[str]]] = {
    HALF: (HALF, []),
    foam_table.WEB: (foam_table.WEB, []),
    f"{HALF}, weight 8": (HALF, ["forgetting.distill.weight=8"]),
    f"{HALF}, top_p 0.9": (HALF, ["forgetting.self_replay.top_p=0.9"]),
}
COLUMNS = (
    "seed", "arm", "rate", "steps", "device", "measure", "before", "after", "change", "plus_minus",
)  # fmt: skip


def main() -> None:
    """Train each arm, and compare the last words with those of the initial model."""
    parser = foam_table.parser_of(ARMS, FOLDER / "last_words.csv", description=__doc__)
    parser.set_defaults(seeds=[2], steps=150, rate=2e-4)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    foam_table.prepare(options)
    before = scores_of(options.model, options.data)
    for seed in options.seeds:
        for arm in options.arms:
            fixed = {"seed": str(seed), "arm": arm, "rate": str(options.rate)}
            fixed["steps"] = str(options.steps)
            if not any(fixed.items() <= row.items() for row in rows_of(options.output)):
                rows = run_arm(options, arm, seed, before)
                append(options.output, [fixed | row for row in rows], columns=COLUMNS)


def run_arm(
    options: Any, arm: str, seed: int, before: dict[str, Tensor]
) -> list[dict[str, object]]:
    """Train one arm and return the change of each measure, with 1.96 standard errors."""
    base, extra = ARMS[arm]
    folder = options.work / f"last_words_{seed}_{list(ARMS).index(arm)}"
    few = ["evaluation.task_questions=20", "evaluation.max_documents=16"]
    train(folder, [*foam_table.words_of(options, base, seed), *few, *extra])
    after = scores_of(folder / "checkpoint", options.data)
    shutil.rmtree(folder)
    rows: list[dict[str, object]] = []
    for measure, first in before.items():
        change = after[measure] - first
        interval = 1.96 * float(change.std()) / len(change) ** 0.5
        values = {
            "before": first.mean(),
            "after": after[measure].mean(),
            "change": change.mean(),
            "plus_minus": interval,
        }
        rounded = {name: f"{float(value):.4f}" for name, value in values.items()}
        rows.append({"device": DEVICE_NAME, "measure": measure, **rounded})
    return rows


@torch.no_grad()
def scores_of(model: Path, data: Path) -> dict[str, Tensor]:
    """Return, for each passage, log p and accuracy of its last word and mean log p before it."""
    loaded, tokenizer = load_model(model).to(DEVICE).eval(), load_tokenizer(model)
    with gzip.open(data / "lambada" / "lambada_openai_test.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(PASSAGES), strict=False)]
    scores = {name: torch.zeros(len(texts)) for name in ("last word", "accuracy", "other words")}
    passages = []
    for number, text in enumerate(texts):
        start, _, word = text.rpartition(" ")
        start_ids, word_ids = tokenizer([start, f" {word}"], add_special_tokens=False).input_ids
        passages.append((number, start_ids, word_ids))
    passages.sort(key=lambda passage: -len(passage[1]))
    for first in range(0, len(passages), BATCH_SIZE):
        batch = passages[first : first + BATCH_SIZE]
        rows = [torch.tensor(start + word) for _, start, word in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE)  # [B, T]
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            logits = loaded(input_ids=ids).logits[
                :, :-1
            ]  # causal: padding at the end has no effect
        chosen = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].cpu()
        is_best = (logits.argmax(-1) == ids[:, 1:]).cpu()
        for row, (number, start, word) in enumerate(batch):
            split, end = len(start) - 1, len(start) + len(word) - 1
            scores["last word"][number] = chosen[row, split:end].sum()
            scores["accuracy"][number] = float(is_best[row, split:end].all())
            scores["other words"][number] = chosen[row, :split].mean()
    return scores


if __name__ == "__main__":
    main()

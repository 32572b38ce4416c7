"""Scores of benchmarks, question by question, and the change between two of them."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tritter.core.models import load_tokenizer
from tritter.evaluation.benchmarks.files import TasksFolder
from tritter.evaluation.benchmarks.formats import BENCHMARKS
from tritter.evaluation.benchmarks.harness import EvalOptions
from tritter.evaluation.statistics import PairedScores
from tritter.methods.whole import load_whole
from tritter.storage.atomic import write_text_atomic

CHAT = ", chat"  # ends the name of a measure that renders prompts with the chat template
CHANGE = ("measure", "questions", "before", "after", "change", "low", "high")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
# A run takes a minute on a GPU, where saving states would take as long
TRAINER = {"cuda": ["trainer=gpu", "trainer.save_every_n_steps=0"], "cpu": []}[DEVICE.type]
_AT_ONCE = {"cuda": 32, "cpu": 16}[DEVICE.type]  # requests


def copy_benchmarks(data: Path, target: Path, measures: Iterable[str]) -> None:
    """Copy the files of benchmarks to a folder, without those for training."""
    if target.is_dir():
        return
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in {each.removesuffix(CHAT) for each in measures}:
        for path in (data / name.partition("_")[0]).glob(f"{name}*"):
            if "train" not in path.name:
                shutil.copy(path, part / path.name)
    part.rename(target)


def benchmark_scores(
    model: Path,
    files: Path,
    questions: Mapping[str, int],
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, PairedScores]:
    """Return measure → score per question, computed once and kept in a file.

    Args:
        model: checkpoint to score.
        files: folder with the benchmarks' files.
        questions: measure → most questions; `arc_easy, chat` is ARC-Easy with the chat template.
        path: the file that keeps the scores.
        dtype: dtype of the weights. A CPU with bfloat16 instructions scores three times as fast in
            it, one without them six times as slowly.
    """
    if not path.is_file():
        whole = load_whole(model, dtype=dtype).to(DEVICE)
        tokenizer = load_tokenizer(model)
        names = dict.fromkeys(each.removesuffix(CHAT) for each in questions)
        found = {}
        for loaded in TasksFolder(files, key="--data").load([BENCHMARKS[name] for name in names]):
            for measure in (loaded.benchmark.name, loaded.benchmark.name + CHAT):
                if limit := questions.get(measure):
                    is_chat = measure.endswith(CHAT)
                    options = EvalOptions(limit=limit, is_chat=is_chat, batch_size=_AT_ONCE)
                    scores = options.score(whole, tokenizer, loaded).primary
                    found[measure] = scores.to_dict()
        write_text_atomic(path, json.dumps(found))
    plain = json.loads(path.read_text(encoding="utf-8"))
    return {measure: PairedScores.from_dict(each) for measure, each in plain.items()}


def change(measure: str, before: PairedScores, after: PairedScores) -> dict[str, Any]:
    """Return the columns `CHANGE`: points of an accuracy, or per cent of a loss, with interval."""
    if after.unit == "accuracy":
        drop = before.drop_in_points(after)
        value, low, high = -drop.value, -drop.upper(0.975), -drop.lower(0.975)
    else:
        rise = before.relative_forgetting(after)
        value, low, high = rise.value, rise.lower(0.975), rise.upper(0.975)
    means = (f"{before.mean():.4f}", f"{after.mean():.4f}")
    shown = (f"{100 * each:.2f}" for each in (value, low, high))
    return dict(zip(CHANGE, (measure, len(after), *means, *shown), strict=True))

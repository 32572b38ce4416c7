"""What the cases start from: small real checkpoints, runs and texts, made once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from tests import oracle
from tests.methods.experts.mixtures import mixture_of
from tests.oracle.families import tiny
from tritter.checkpoints import Lineage, write_checkpoint
from tritter.checkpoints.folder import copy_small_files
from tritter.checkpoints.state import write_state
from tritter.core.expansions import LlamaPro, Width
from tritter.core.families import Model
from tritter.core.models import load_model, read_model, save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.methods.experts.stored import ExpertFolder
from tritter.storage.writer import TensorStream
from tritter.transform import expand

ROOT = Path(__file__).parents[2]
SENTENCE = "the model grows a layer where data asks for one and keeps what it knew\n"
SMALL_RUN = (
    *("model.hidden_size=16", "model.intermediate_size=24", "model.num_hidden_layers=2"),
    *("model.num_attention_heads=2", "model.num_key_value_heads=1", "data=text"),
    *("data.vocab_size=280", "data.sequence_length=32", "data.batch_size=2"),
    *("pretraining.max_steps=2", "training.max_steps=2", "trainer.progress=off", "logger=csv"),
    *("evaluation.max_tokens_per_document=32", "evaluation.sample_tokens=2", "gate=off"),
)
_TEXTS = ("data.old=texts/old", "data.new=texts/new.jsonl")
_LONG = ("training.max_steps=60", "trainer.save_every_n_steps=1")
_NEURONS = (
    *("expansion=none", "growth=foam", "growth.trigger=schedule", "growth.growth_cooldown=2"),
    *("growth.check_every=1", "growth.warmup_steps=0", "growth.max_growth_per_step=1"),
)
_EXPERTS = (
    *("expansion=none", "forgetting=none", "experts=dylora", "experts.rank=2"),
    *("experts.min_samples=4", "experts.in_a_row=1", "experts.cooldown=0"),
    *("experts.detector={name: loss, threshold: 0.1}", "experts.max_experts=3"),
)
RUNS = {
    "finished": (*SMALL_RUN, *_TEXTS),
    "unfinished": (*SMALL_RUN, *_TEXTS, *_LONG),
    "neurons": (*SMALL_RUN, *_TEXTS, *_NEURONS, *_LONG),
    "spawning": (*SMALL_RUN, *_TEXTS, *_EXPERTS, *_LONG),
    "taught": (*SMALL_RUN, *_TEXTS, *_EXPERTS),
}
"""Run → its words; those that are long are killed while they train."""


def make_templates(folder: Path) -> None:
    """Write `base`, `grown`, `sparse`, `skilled`, `texts`, `cache` and what `RUNS` names."""
    folder.mkdir(parents=True)
    _make_texts(folder / "texts")
    tokenizer = train_tokenizer([Document("d", SENTENCE * 20)], vocab_size=300)
    for name, family in {"base": "llama", "sparse": "mixtral"}.items():
        oracle.saved(tiny(family, vocab_size=300), folder / name)
        save_tokenizer(tokenizer, folder / name, end_of_text=END_OF_TEXT)
    expand(folder / "base", folder / "first", [Width(hidden_size=28, intermediate_size=48)])
    _add_state(folder / "first", folder / "second")
    expand(folder / "second", folder / "grown", [LlamaPro(positions=[1])])
    shutil.rmtree(folder / "first")
    _add_experts(folder / "second", folder / "skilled")
    for name, words in RUNS.items():
        make = _kill_while_training if words[-2:] == _LONG else _run
        make(folder, name)


def _make_texts(folder: Path) -> None:
    (folder / "old").mkdir(parents=True)
    for number in range(60):
        (folder / f"old/{number}.txt").write_text(f"{number} " + SENTENCE * 3)
    lines = [f'{{"text": "{number} {SENTENCE.strip()[::-1]}"}}' for number in range(60)]
    (folder / "new.jsonl").write_text("\n".join(lines) + "\n")


def _add_state(source: Path, target: Path) -> None:
    """Write a checkpoint again with moments and a Fisher beside it."""
    config, lineage = read_model(source).config, Lineage.read(source)
    assert lineage is not None
    tensors = dict(Model(config).disk_tensors(load_model(source).state_dict()))

    def write_moments(folder: Path) -> None:
        values = {name: torch.full_like(value, 1e-3) for name, value in tensors.items()}
        kinds = {kind: TensorStream.of(values.items()) for kind in ("exp_avg", "exp_avg_sq")}
        write_state(folder, {**kinds, "fisher": TensorStream.of(values.items())}, step=3)

    write_checkpoint(
        target,
        config=config,
        tensors=TensorStream.of(tensors.items()),
        lineage=lambda: lineage,
        artifacts=[partial(copy_small_files, source), write_moments],
    )


def _add_experts(source: Path, target: Path) -> None:
    """Write a checkpoint again with LoRA experts beside it."""
    config, lineage, model = read_model(source).config, Lineage.read(source), load_model(source)
    assert lineage is not None
    tensors = dict(Model(config).disk_tensors(load_model(source).state_dict()))
    mixture = mixture_of(model, router="both", has_base=True)
    experts = ExpertFolder.of(mixture, usage={"text": {"e0": 0.5}}, extra={"a": [torch.ones(2)]})
    write_checkpoint(
        target,
        config=config,
        tensors=TensorStream.of(tensors.items()),
        lineage=lambda: lineage,
        artifacts=[partial(copy_small_files, source), experts.write],
    )


def _start(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    words = [*RUNS[name], f"cache_dir={folder / 'cache'}", f"hydra.run.dir={name}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


def _run(folder: Path, name: str) -> None:
    process = _start(folder, name)
    assert process.wait(timeout=120) == 0


def _kill_while_training(folder: Path, name: str) -> None:
    process = _start(folder, name)
    since = time.monotonic()
    while not (folder / name / "attempt_1/saved").exists() and time.monotonic() - since < 120:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

"""Runs on real checkpoints, compared with stock transformers."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.oracle import stock
from tests.real import real_checkpoint
from tritter.config.launch.composition import load_config
from tritter.pipeline import run_pipeline

DATA = Path(__file__).resolve().parents[3] / "shared/data"


def _lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _data(name: str) -> Path:
    if not (DATA / name).is_file():
        pytest.skip(f"it needs {DATA / name}")
    return DATA / name


def _stock_loss(folder: Path, texts: list[str]) -> tuple[float, float]:
    """Return nats per token and per byte of texts, each behind what its tokenizer puts in front."""
    model, tokenizer = stock(folder), AutoTokenizer.from_pretrained(folder)
    nats, num_tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id and ids.shape[1] <= 256  # one window
        num_tokens += ids.shape[1] - 1
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    return nats / num_tokens, nats / sum(len(text.encode()) for text in texts)


@pytest.mark.slow
def test_gemma_forgets_as_much_as_stock_transformers_say(tmp_path: Path) -> None:
    """A novel makes it worse on the web; scored behind an end of text, it seems to improve."""
    folder = real_checkpoint("gemma3")
    lines = _data("text/c4_demo_300.jsonl").read_text().splitlines()[:120]
    old = [json.loads(line)["text"][:700] for line in lines]
    novel = gzip.decompress(_data("text/gutenberg/moby_dick_en.txt.gz").read_bytes()).decode()
    new = [novel[first : first + 700] for first in range(30_000, 51_000, 700)]
    words = (
        "model=hf", f"model.path={folder}", "data=text", "expansion=none", "forgetting=none",
        f"data.old={_lines(tmp_path / 'web.jsonl', old)}",
        f"data.new={_lines(tmp_path / 'novel.jsonl', new)}",
        "data.sequence_length=256", "data.batch_size=2", "training.max_steps=6",
        "training.learning_rate=5e-5", "evaluation.every_n_steps=0", "evaluation.sample_tokens=0",
        "gate=off", "logger=csv", f"cache_dir={tmp_path}/cache",
    )  # fmt: skip
    outcome = run_pipeline(load_config(list(words)), run_folder=tmp_path / "run")
    summary = json.loads(outcome.summary_path.read_text())
    (check,) = (each for each in summary["gate"] if each["check"] == "retention")
    scores = json.loads((tmp_path / "run/scores/baseline.json").read_text())["old"]
    beginnings = {name.split(" ", 1)[1].strip() for name in scores["identifiers"]}
    held_out = [text for text in old if " ".join(text.split())[:40].strip() in beginnings]
    assert len(held_out) == len(scores["identifiers"]) >= 12
    before, before_per_byte = _stock_loss(folder, held_out)
    after, after_per_byte = _stock_loss(tmp_path / "run/checkpoint", held_out)
    assert summary["baseline"]["old"]["loss"] == pytest.approx(before, rel=1e-3)
    assert summary["final"]["old"]["loss"] == pytest.approx(after, rel=1e-3)
    assert check["value"] == pytest.approx(after_per_byte / before_per_byte - 1, abs=1e-3)
    assert check["value"] > 0.02 and check["interval"][0] > 0

"""`data.packing=documents` through a whole job, and in runs that continue from it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.checkpoints.state import KeptSequences
from tritter.cli.train import _recorded_settings
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import changes_between, fingerprint
from tritter.errors import RequestError
from tritter.pipeline import Outcome, run_pipeline
from tritter.training import read_metrics

APART = "data.packing=documents"


@pytest.fixture(scope="module")
def done(run_tiny: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing") / "run"
    run_tiny(folder, APART, "forgetting=[ewc,replay]", "forgetting.replay.keep=3", "seed=1")
    return folder


@pytest.mark.full
def test_a_job_says_how_full_its_sequences_are(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    (task,) = summary["tasks"]
    # 1 % of all rows, 0.8 % of new and 1.5 % of old documents; 24 rows of seed 0 are all full
    assert 0 < task["packing"]["padding_fraction"] < 0.1
    assert sum(task["packing"]["packed_sequence_length_histogram"].values()) >= 6 * 4
    rows = [row for row in read_metrics(done / "attempt_1") if "performance/flops" in row]
    shares = [float(row["performance/padding_fraction"] or 0) for row in rows]
    assert 0 < max(shares) < 0.1


@pytest.mark.full
def test_its_base_is_another_than_that_of_a_stream(done: Path) -> None:
    before = Lineage.read(done / "baseline")
    assert before is not None
    assert before.training_config["made_from"]["data"]["packing"] == "documents"
    assert before.training_config["data"] == {"sequence_length": 32, "packing": "documents"}
    stream, documents = (fingerprint(load_config([*TINY, word])) for word in (TINY[0], APART))
    assert list(changes_between(stream, documents)) == ["data.packing"]
    # A command that continues from the checkpoint uses the same packing
    assert _recorded_settings(done / "checkpoint", is_text=True)["data.packing"] == "documents"


@pytest.mark.full
def test_what_it_keeps_is_refused_as_a_stream(
    done: Path, run_tiny: Callable[..., Outcome], cache: Path, tmp_path: Path
) -> None:
    kept = KeptSequences.read(done / "checkpoint")
    assert kept.of_documents == {"old", "new"}
    text = tmp_path / "third.jsonl"
    lines = (json.dumps({"text": f"the third text has line {n} of many " * 9}) for n in range(40))
    text.write_text("\n".join(lines))
    dropped = ("model.", "data.old", "data.new", "forgetting")
    words = [word for word in TINY if not word.startswith(dropped)]
    words += [
        "model=hf", f"model.path={done}/checkpoint", "data.old={}", f"data.new={{third:{text}}}",
        "forgetting=replay", "forgetting.replay.keep=2", "expansion=none", f"cache_dir={cache}",
    ]  # fmt: skip
    with pytest.raises(RequestError, match=r"data\.packing = stream: .* must be documents"):
        load_config([*words, "data.packing=stream"])
    (tmp_path / "run").mkdir()
    run_pipeline(load_config(words), run_folder=tmp_path / "run")  # documents, as they are
    after = KeptSequences.read(tmp_path / "run/checkpoint")
    assert after.of_documents == {"old", "new", "third"}
    assert torch.equal(after.sequences["old"], kept.sequences["old"])


def test_a_wrong_word_is_told_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"stream, documents, or null\. Did you mean documents"):
        load_config([*TINY, "data.packing=document"])

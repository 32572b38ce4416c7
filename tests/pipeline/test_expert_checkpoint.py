"""A checkpoint with closed appended experts: outputs and rejections of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import oracle
from tests.core.stock_routers.models import tiny_moe
from tests.pipeline.test_own_checkpoint import FAST, texts
from tests.pipeline.tiny import is_within
from tritter.checkpoints.history import Link
from tritter.config.launch.composition import load_config
from tritter.core.expansions import MoeAdd
from tritter.core.models import save_tokenizer
from tritter.core.stock_routers import AddedExperts
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import RequestError
from tritter.pipeline import run_pipeline
from tritter.transform import expand


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and `closed`: a model with appended experts."""
    place = tmp_path_factory.mktemp("experts")
    (place / "old").mkdir()
    for number, text in enumerate(texts(0)):
        (place / f"old/{number}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(1))
    (place / "new.jsonl").write_text(lines)
    tokenizer = train_tokenizer([Document("d", " ".join(texts(0)))], vocab_size=290)
    oracle.saved(tiny_moe("mixtral", vocab_size=300, initializer_range=0.05), place / "base")
    save_tokenizer(tokenizer, place / "base", end_of_text=END_OF_TEXT)
    expand(place / "base", place / "closed", [MoeAdd(num_experts=2, init="random")])
    return place


def _run(folder: Path, place: Path, cache: Path, *words: str) -> dict[str, Any]:
    folder.mkdir()
    paths = [f"data.old={place}/old", f"data.new={place}/new.jsonl"]
    given = ["model=hf", f"model.path={place}/closed", "data=text", *paths]
    config = load_config([*FAST, f"cache_dir={cache}", *given, "forgetting=replay", *words])
    return json.loads(run_pipeline(config, run_folder=folder).summary_path.read_text())


@pytest.mark.full
def test_a_run_that_is_too_short_leaves_experts_half_open(
    place: Path, cache: Path, tmp_path: Path
) -> None:
    slowly = ["adaptation.anneal_steps=100000", "adaptation.freeze_base=false"]
    summary = _run(tmp_path / "run", place, cache, "expansion=llama_pro", "gate=off", *slowly)
    assert is_within(summary)["preservation"]
    closed = AddedExperts.read(tmp_path / "run/baseline")
    assert closed == AddedExperts(experts=(4, 5))
    left = AddedExperts.read(tmp_path / "run/checkpoint")
    assert left is not None and left.experts == closed.experts
    assert left.step > 0 and -20 <= left.offset < -19
    chain = Link.chain(tmp_path / "run/checkpoint")
    assert all(link.differences() == () for link in chain if link.can_be_checked)
    assert chain[-1].lineage is not None
    assert chain[-1].lineage.stock_loadable == "after adaptation"


def test_no_more_experts_before_anything_is_made(place: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="experts 4 to 5"):
        _run(tmp_path / "run", place, cache, "expansion=moe_add")
    assert not (tmp_path / "run" / "baseline").exists()

"""Every expansion with every method: composes, trains, resumes to the same weights, loads in stock.

The choices are the option files, so what is added there is tested here. The quick test meets each
choice once, the slow one every pair.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.pipeline.tiny import TINY
from tritter.checkpoint import read_lineage
from tritter.conf_folder import config_folder
from tritter.config.composition import load_config
from tritter.models import load_model
from tritter.pipeline import run_pipeline
from tritter.training import BaseModule

KILLED_AT = 5  # of 6 steps, the state saved at 4
NEEDS = {"moe_add": "[moe,moe_add]"}  # a model without experts has none to add to


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


EXPANSIONS = [NEEDS.get(name, name) for name in options_of("expansion")]
METHODS = options_of("forgetting")
ALL_PAIRS = list(product(EXPANSIONS, METHODS))


def pairs() -> Iterator[tuple[str, str]]:
    """Yield pairs in which each expansion and each method stands at least once."""
    for number in range(max(len(EXPANSIONS), len(METHODS))):
        yield EXPANSIONS[number % len(EXPANSIONS)], METHODS[number % len(METHODS)]


class Killed(Exception):
    pass


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def run(folder: Path, cache: Path, expansion: str, forgetting: str) -> str:
    """Run the job, or go on with it, and return the hash of what was trained."""
    folder.mkdir(exist_ok=True)
    words = [word for word in TINY if not word.startswith(("forgetting=", "model.num_hidden"))]
    words += ["model.num_hidden_layers=3", f"cache_dir={cache}"]
    config = load_config([*words, f"expansion={expansion}", f"forgetting={forgetting}"])
    run_pipeline(config, run_folder=folder)
    lineage = read_lineage(folder / "checkpoint")
    assert lineage is not None
    assert [record.method for record in lineage.expansion_history] == [
        name for name in expansion.strip("[]").split(",") if name != "none"
    ]
    return lineage.model_hash


def check(folder: Path, cache: Path, expansion: str, forgetting: str) -> None:
    whole = run(folder / "whole", cache, expansion, forgetting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModule, "training_step", _dies_at(BaseModule.training_step))
        with pytest.raises(Killed):
            run(folder / "parts", cache, expansion, forgetting)
    assert any((folder / "parts").rglob("saved/*")), "nothing was saved before the kill"
    assert run(folder / "parts", cache, expansion, forgetting) == whole

    summary = json.loads((folder / "whole/summary.json").read_text(encoding="utf-8"))
    verdicts = {gate["check"]: gate["verdict"] for gate in summary["gate"]}
    assert verdicts["gradient_flow"] == verdicts["memory"] == "passed"
    exact = expansion in ("width", "llama_pro")
    if expansion != "none":
        assert verdicts["preservation"] == ("passed" if exact else "reported")
    checkpoint = folder / "whole/checkpoint"
    lineage = read_lineage(checkpoint)
    stock, own = oracle.stock(checkpoint), load_model(checkpoint)
    ids = oracle.tokens(stock.config.vocab_size)
    same = torch.equal(oracle.logits(stock, ids), oracle.logits(own, ids))
    assert lineage is not None and same == (lineage.stock_loadable == "yes")


def _dies_at(training_step):  # type: ignore[no-untyped-def]
    def step(self, *arguments):  # type: ignore[no-untyped-def]
        if self.trainer.global_step == KILLED_AT:
            raise Killed
        return training_step(self, *arguments)

    return step


@pytest.mark.parametrize(("expansion", "forgetting"), list(pairs()))
def test_every_choice(tmp_path: Path, tiny_cache: Path, expansion: str, forgetting: str) -> None:
    check(tmp_path, tiny_cache, expansion, forgetting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expansion", "forgetting"), [pair for pair in ALL_PAIRS if pair not in set(pairs())]
)
def test_every_pair(tmp_path: Path, tiny_cache: Path, expansion: str, forgetting: str) -> None:
    check(tmp_path, tiny_cache, expansion, forgetting)

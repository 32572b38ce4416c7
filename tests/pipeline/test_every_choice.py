"""Every expansion, method and growth: trains, resumes to the same weights, loads in stock.

The choices are the option files, so what is added there is tested here. The quick test meets each
choice once, the slow one every pair.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests import oracle
from tests.pipeline.tiny import TINY, is_within
from tritter.checkpoints import Lineage
from tritter.conf_folder import config_folder
from tritter.config.launch.composition import load_config
from tritter.core.models import load_model
from tritter.pipeline import run_pipeline
from tritter.training import BaseModule

KILLED_AT = 5  # of 6 steps, the state saved at 4
NEEDS = {"moe_add": "[moe,moe_add]"}  # a model without experts has none to add to
TABLE = "expansion.layers.sources=[0,2,1,2]"  # of the option that needs one


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


EXPANSIONS = [NEEDS.get(name, name) for name in options_of("expansion")]
METHODS = options_of("forgetting")
GROWTHS = [name for name in options_of("growth") if name != "none"]
WITH_EXPERTS = ("moe", "[moe,moe_add]")  # where no neurons grow
# A teacher does not know the new tokens
REFUSED = {("vocab", "distill")}
ALL_PAIRS = [pair for pair in product(EXPANSIONS, METHODS) if pair not in REFUSED]


def pairs() -> Iterator[tuple[str, str]]:
    """Yield pairs that cover each expansion and each method at least once."""
    for number in range(max(len(EXPANSIONS), len(METHODS))):
        pair = (EXPANSIONS[number % len(EXPANSIONS)], METHODS[number % len(METHODS)])
        if pair not in REFUSED:
            yield pair


class Killed(Exception):
    pass


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def _other(method: str, expansion: str) -> str:
    """Return the method, or another if it is refused."""
    return "replay" if (expansion, method) in REFUSED else method


def growing() -> Iterator[ParameterSet]:
    """Yield triples with each growth option, cycling through dense expansions and methods.

    Only the first case of each growth option is quick; the pairs cover the others.
    """
    dense = [name for name in EXPANSIONS if name not in WITH_EXPERTS]
    for number in range(max(len(dense), len(METHODS), len(GROWTHS))):
        yield pytest.param(
            dense[number % len(dense)],
            _other(METHODS[-1 - number % len(METHODS)], dense[number % len(dense)]),
            GROWTHS[number % len(GROWTHS)],
            marks=(pytest.mark.slow,) * (number >= len(GROWTHS)),
        )


def run(folder: Path, cache: Path, expansion: str, forgetting: str, growth: str) -> str:
    """Run or resume the job, and return the hash of the trained model."""
    folder.mkdir(exist_ok=True)
    words = [word for word in TINY if not word.startswith(("forgetting=", "model.num_hidden"))]
    words += ["model.num_hidden_layers=3", f"cache_dir={cache}"]
    words += [TABLE] if expansion == "layers" else []
    words += [f"expansion={expansion}", f"forgetting={forgetting}", f"growth={growth}"]
    if growth != "none":  # several events in six steps
        words += ["growth.growth_cooldown=2", "growth.check_every=1", "growth.warmup_steps=0"]
        words += ["growth.trigger=within_layer", "growth.max_growth_per_step=3"]
    config = load_config(words)
    run_pipeline(config, run_folder=folder)
    lineage = Lineage.read(folder / "checkpoint")
    assert lineage is not None
    methods = [name for name in expansion.strip("[]").split(",") if name != "none"]
    methods += ["growth"] if growth != "none" else []
    assert [record.method for record in lineage.expansion_history] == methods
    return lineage.model_hash


def check(folder: Path, cache: Path, expansion: str, forgetting: str, growth: str = "none") -> None:
    whole = run(folder / "whole", cache, expansion, forgetting, growth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModule, "training_step", _dies_at(BaseModule.training_step))
        with pytest.raises(Killed):
            run(folder / "parts", cache, expansion, forgetting, growth)
    assert any((folder / "parts").rglob("saved/*")), "nothing was saved before the kill"
    assert run(folder / "parts", cache, expansion, forgetting, growth) == whole

    summary = json.loads((folder / "whole/summary.json").read_text(encoding="utf-8"))
    within = is_within(summary)
    assert within["gradient_flow"] and within["memory"]
    if growth != "none":
        assert summary["growth"]["events"] and summary["growth"]["born"]
        bounds = {"foam": 1e-4, "gradmax": 1e-4, "foam_v3": 0.1}
        change = summary["growth"]["function_change"]
        # foam_readme: 0.006 (dus, with any amount of written text) to 0.017 over three seeds
        assert change < bounds.get(growth, 0.05) and (change > 5e-3 or growth in bounds)
        assert bool(summary["growth"]["replaced"]) == (growth == "foam_v3")
    exact = expansion in ("width", "llama_pro", "vocab")
    if expansion != "none":
        assert within["preservation"] or not exact
    checkpoint = folder / "whole/checkpoint"
    lineage = Lineage.read(checkpoint)
    stock, own = oracle.stock(checkpoint), load_model(checkpoint)
    ids = oracle.tokens(stock.config.vocab_size)
    # Stock classes multiply padded FFNs, whose sums round differently
    same = oracle.relative_difference(stock, own, ids) < 1e-5
    assert lineage is not None and same == (lineage.stock_loadable == "yes")


def _dies_at(training_step):  # type: ignore[no-untyped-def]
    def step(self, *arguments):  # type: ignore[no-untyped-def]
        if self.trainer.global_step == KILLED_AT:
            raise Killed
        return training_step(self, *arguments)

    return step


@pytest.mark.full
@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("expansion", "forgetting"), list(pairs()))
def test_every_choice(tmp_path: Path, tiny_cache: Path, expansion: str, forgetting: str) -> None:
    check(tmp_path, tiny_cache, expansion, forgetting)


@pytest.mark.full
@pytest.mark.parametrize(("expansion", "forgetting", "growth"), list(growing()))
def test_every_growth(
    tmp_path: Path, tiny_cache: Path, expansion: str, forgetting: str, growth: str
) -> None:
    check(tmp_path, tiny_cache, expansion, forgetting, growth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expansion", "forgetting"), [pair for pair in ALL_PAIRS if pair not in set(pairs())]
)
def test_every_pair(tmp_path: Path, tiny_cache: Path, expansion: str, forgetting: str) -> None:
    check(tmp_path, tiny_cache, expansion, forgetting)

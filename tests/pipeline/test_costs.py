"""FLOPs of whole runs compared with torch's counter: every pass is counted exactly once.

The models compute attention and experts eagerly here and attention is counted as the square that
they compute; batches of one leave no padding. Then the two have to agree to the last FLOP.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import tritter.core.families.flops as counting
from tests.oracle import chat
from tests.pipeline.conftest import SMALL
from tests.pipeline.test_own_checkpoint import FAST, texts
from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.core import models
from tritter.core.families import Model, family_of, forward_flops, training_flops
from tritter.core.models import read_model
from tritter.evaluation import statistics
from tritter.evaluation.statistics import studentised_errors
from tritter.pipeline import costs, run_pipeline
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run
from tritter.terminal import Console

QUICK = (*FAST, "data=text", "forgetting=replay", "evaluation.batch_size=1", "gate='off'")
SMALL_MODEL = tuple(word for word in SMALL if word.startswith("model."))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return overrides with a few small data files."""
    place = tmp_path_factory.mktemp("texts")
    for name, seed in (("old", 0), ("new", 1)):
        (place / name).mkdir()
        for number, text in enumerate(texts(seed)):
            (place / f"{name}/{number}.txt").write_text(text)
    return f"data.old={place}/old", f"data.new={place}/new"


@pytest.fixture
def as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the counted passes with stock models, and count their FLOPs."""
    stock = models._configure_model

    def eager(model: PreTrainedModel) -> PreTrainedModel:
        model = stock(model)
        model.set_attn_implementation("eager")
        if family_of(model.config.to_dict()).has_experts:
            model.set_experts_implementation("eager")
        return model

    def uncounted(*sums: Tensor) -> Tensor:
        with _disable_current_modes():  # the gate's statistics are no pass of a model
            return studentised_errors(*sums)

    # Its batch estimates the run before any stage begins: it is part of no stage, and of no total
    monkeypatch.setattr(costs, "_time_line", lambda _: "")
    monkeypatch.setattr(models, "_configure_model", eager)
    monkeypatch.setattr(statistics, "studentised_errors", uncounted)
    monkeypatch.setattr(counting, "_num_keys", lambda length, window=None: length**2)


def run(folder: Path, *words: str) -> tuple[dict[str, Any], int]:
    """Return a run's summary, and the FLOPs that torch counted during it."""
    folder.mkdir()
    config = load_config([*words, f"cache_dir={folder}/cache"])
    with FlopCounterMode(display=False) as counter:
        outcome = run_pipeline(config, run_folder=folder)
    return json.loads(outcome.summary_path.read_text()), counter.get_total_flops()


@pytest.mark.full
@pytest.mark.usefixtures("as_computed")
@pytest.mark.parametrize(
    "words",
    [
        ("expansion=width", "forgetting=ewc", "forgetting.ewc.estimator='true'",
         "forgetting.ewc.num_sequences=8", "control=true"),
        pytest.param(("expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true",
                      "forgetting=[replay,distill]"), marks=pytest.mark.slow),
        ("expansion=moe", "expansion.moe.num_experts=4", "forgetting=[ewc,replay]",
         "forgetting.ewc.num_sequences=8", "moe_routing.bias_update_rate=0.001",
         "forgetting.replay.keep=3"),
        pytest.param(("expansion=none", "growth=foam", "growth.trigger={name:schedule,at:[1,3]}",
                      "growth.initialiser=split"), marks=pytest.mark.slow),
        ("expansion=none", "experts=dylora", "experts.boundaries=told", "experts.router=learned",
         "forgetting.replay.keep=3"),
        pytest.param(("expansion=none", "forgetting=none", "experts=single_lora", "control=true"),
                     marks=pytest.mark.slow),
    ],
    ids=["width", "new blocks", "experts", "neurons", "LoRA experts", "single LoRA"],
)  # fmt: skip
def test_every_pass_of_a_run_is_counted(
    tmp_path: Path, places: tuple[str, ...], words: tuple[str, ...]
) -> None:
    asked = (*QUICK, *SMALL_MODEL, *places, *words, "evaluation.sample_tokens=0")
    summary, counted = run(tmp_path / "run", *asked)
    assert summary["flops"]["total"] == counted


@pytest.mark.slow
@pytest.mark.usefixtures("as_computed")
def test_every_pass_of_appended_experts_is_counted(tmp_path: Path, places: tuple[str, ...]) -> None:
    """Choice, teacher, routers, held routing; with a base that is trained too.

    A base that is held apart has no gradient of its weights by right, and one in fact: the parts
    are put together for each pass.
    """
    words = (*QUICK, *places, "evaluation.sample_tokens=0")
    run(tmp_path / "sparse", *words, *SMALL_MODEL, "expansion=moe", "expansion.moe.num_experts=4")
    given = ("model=hf", f"model.path={tmp_path}/sparse/checkpoint", "expansion=moe_add")
    added = (
        "expansion.moe_add.num_experts=2", "expansion.moe_add.init=distill",
        f"expansion.moe_add.teacher={tmp_path}/sparse/checkpoint", "adaptation.distill_steps=3",
        "adaptation.router_max_steps=3", "adaptation.freeze_base=false", "moe_routing.hold_old=1.0",
    )  # fmt: skip
    summary, counted = run(tmp_path / "run", *words, *given, *added)
    assert {"distill", "adapt", "fit"} <= set(summary["flops"])
    assert summary["flops"]["total"] == counted
    best = ("expansion.moe_add.init=best", "adaptation.router_max_steps=2")
    kept = ("expansion.moe_add.num_experts=2", "adaptation.freeze_base=false")
    summary, counted = run(tmp_path / "best", *words, *given, *kept, *best)
    assert summary["flops"]["choose"] > 0
    assert summary["flops"]["total"] == counted


@pytest.mark.slow
@pytest.mark.usefixtures("as_computed")
def test_every_pass_of_experts_that_are_gone_on_with_is_counted(
    tmp_path: Path, places: tuple[str, ...]
) -> None:
    """The baseline is scored with its experts."""
    words = (*QUICK, *places, "evaluation.sample_tokens=0", "expansion=none")
    asked = ("experts=single_lora", "experts.rank=4")
    run(tmp_path / "first", *words, *SMALL_MODEL, *asked)
    given = ("model=hf", f"model.path={tmp_path}/first/checkpoint")
    summary, counted = run(tmp_path / "run", *words, *given, *asked)
    assert summary["flops"]["total"] == counted


@pytest.mark.full
def test_a_sample_reads_each_token_once(tmp_path: Path, places: tuple[str, ...]) -> None:
    """Stock models recompute the whole prefix for each token."""
    words = [*QUICK, *SMALL_MODEL, *places, "expansion=none"]
    long, _ = run(tmp_path / "long", *words, "evaluation.sample_tokens=5")
    none, _ = run(tmp_path / "none", *words, "evaluation.sample_tokens=0")
    reported = long["flops"]["evaluate"] - none["flops"]["evaluate"]
    forward = counting.forward_flops(read_model(tmp_path / "long/checkpoint"))
    # Two domains, two models; 1 + 24 + up to 4 of 5 tokens
    assert 4 * forward.of(25) <= reported <= 4 * forward.of(29)


@pytest.mark.full
def test_new_blocks_alone_cost_what_their_gradients_do(
    tmp_path: Path, places: tuple[str, ...]
) -> None:
    words = ("expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true")
    summary, _ = run(tmp_path / "run", *QUICK, *SMALL_MODEL, *places, *words)
    config = read_model(tmp_path / "run/attempt_1/trained").config
    new = ("layers.2.", "layers.4.")
    some = training_flops(Model(config), is_trained=lambda t: t.name.startswith(new))
    sequences = 4 * 8  # steps · batch
    assert summary["flops"]["fit"] == sequences * some.of(64)
    assert some.of(64) < 0.8 * training_flops(Model(config)).of(64)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("forgetting=ewc",), None),
        (("forgetting=[ewc,self_replay]", "data.old={}", "forgetting.self_replay.num_sequences=9",
          "model=hf"), 9),
    ],
)  # fmt: skip
def test_importance_is_timed_for_the_sequences_that_exist(
    tmp_path: Path, words: tuple[str, ...], count: int | None
) -> None:
    """Of 8 sequences that a model wrote, no 10,000 are read."""
    if "model=hf" in words:
        chat.checkpoint(tmp_path / "base")
        words = (*words, f"model.path={tmp_path / 'base'}")
    asked = ("forgetting.ewc.num_sequences=10000", f"cache_dir={tmp_path}/cache")
    config = load_config([*(word for word in TINY if "model." not in word), *words, *asked])
    context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
    count = count or context.data.num_sequences("old")
    source = context.data.model
    flops = count * training_flops(source).of(config.data.sequence_length)
    assert costs._flops(context, source)["importance"] == flops


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "timed", "counted"),
    [
        (
            ("expansion=dus", "pipeline.target_params=20k", "control=true"),
            ("training", "validation", "evaluate"),
            ("fit", "validation", "evaluate", "control"),
        ),
        (
            ("expansion=context", "model.max_position_embeddings=32", "evaluation.max_documents=5"),
            ("training", "expand"),
            ("fit", "expand"),
        ),
        (("expansion=[moe,moe_add]",), ("routers",), ("adapt",)),
        (("expansion=none", "experts=single_lora", "experts.rank=1"), ("training",), ("fit",)),
    ],
    ids=["rounds and control", "long windows", "routers", "frozen base"],
)
def test_what_is_timed_is_what_is_counted(
    tmp_path: Path, words: tuple[str, ...], timed: tuple[str, ...], counted: tuple[str, ...]
) -> None:
    """Only one round was timed, and neither the long windows nor the steps of routers."""
    words = (*words, "forgetting=none", "evaluation.sample_tokens=0", f"cache_dir={tmp_path}/c")
    config = load_config([*TINY, *words])
    context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
    found = costs._flops(context, source := context.data.model)
    (tmp_path / "run").mkdir()
    outcome = run_pipeline(config, run_folder=tmp_path / "run")
    flops = json.loads(outcome.summary_path.read_text())["flops"]
    expected = sum(flops[name] for name in counted)
    assert sum(found[name] for name in timed) == pytest.approx(expected, rel=0.16)
    if not config.control:  # the usage of experts and long documents are read too
        assert found["evaluate"] == pytest.approx(flops["evaluate"], rel=0.16)
    alone = costs._flops(replace(context, config=replace(config, control=False)), source)
    scores = found["baseline (unless cached)"] if config.control else 0
    assert found["evaluate"] == alone["evaluate"] + scores  # the control is scored once


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (("experts.boundaries=told",), 2.0),
        ((), 2.5),  # half of a pass for the detector
        (("experts.detector=loss",), 3.0),
        (("experts.boundaries=told", "control=true"), 2.0 + 3.0),
    ],
)
def test_a_frozen_base_is_timed_without_its_gradients(
    tmp_path: Path, words: tuple[str, ...], passes: float
) -> None:
    words = ("expansion=none", "forgetting=none", "experts=dylora", "experts.min_samples=4", *words)
    config = load_config([*TINY, *words, f"cache_dir={tmp_path}/c"])
    context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
    found = costs._flops(context, source := context.data.model)["training"]
    rows = config.training.max_steps * config.data.batch_size
    per_row = forward_flops(source).of(config.data.sequence_length)
    assert found == pytest.approx(rows * passes * per_row)


@pytest.mark.full
def test_importances_that_are_estimated_again_are_told_and_bounded(
    tmp_path: Path, places: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real model, each of six estimates took as long as all 109 steps, and nothing said so."""
    words = [*QUICK, *SMALL_MODEL, *places, "expansion=width", "forgetting=ewc"]
    words += ["training.max_steps=40", "evaluation.every_n_steps=0"]
    summary, _ = run(tmp_path / "run", *words)
    config = load_config([*words, f"cache_dir={tmp_path}/run/cache"])
    count = config.forgetting[0].options.num_sequences
    grown = training_flops(read_model(tmp_path / "run/attempt_1/trained"))
    steps, estimates = 40 * config.data.batch_size, 4 * count  # before step 1, after 10, 20, 40
    assert (estimates + count) <= steps < (estimates + count + 5)
    assert summary["flops"]["fit"] == pytest.approx((steps + estimates) * grown.of(64), rel=0.02)
    context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
    estimated = costs._flops(context, context.data.model)["training"]
    assert estimated == pytest.approx(summary["flops"]["fit"], rel=0.02)
    said = " ".join(capsys.readouterr().out.split())
    expected = (
        f"ewc estimates the importances again up to 4 times, each from at most {count} sequences"
    )
    assert expected in said


@pytest.mark.full
def test_training_is_timed_in_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 takes several times as long on a CPU without its instructions; scoring does not."""
    monkeypatch.setattr(
        costs, "_seconds", lambda *_: 0.008 if torch.is_autocast_enabled("cpu") else 0.002
    )
    monkeypatch.setattr(costs, "_LONG", 0.0)
    lines = []
    for precision in ("32-true", "bf16-mixed"):
        words = ("training.max_steps=1000", f"trainer.precision={precision}")
        config = load_config([*TINY, *words, f"cache_dir={tmp_path}/cache"])
        run = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
        lines.append(costs._time_line(run))
    times = [dict(re.findall(r"(training|evaluate) (\d+) s", line)) for line in lines]
    assert int(times[1]["training"]) == pytest.approx(4 * int(times[0]["training"]), rel=0.05)
    assert times[1]["evaluate"] == times[0]["evaluate"]

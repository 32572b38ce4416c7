"""The benchmarks run, and their README says how (memory and time: tests/test_streaming.py)."""

import csv
import gzip
import importlib
import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import (
    check,
    corpus_memory,
    every,
    expand_speed,
    experts,
    fisher,
    gpu,
    large,
    methods,
    novelty,
    precision,
    streamed_data,
    streaming,
)
from experiments.jobs import rows_of
from tests.methods.novelty.factories import centre_of, drawn
from tritter.core.families import Model
from tritter.data.corpus import Corpus
from tritter.data.documents import Documents
from tritter.methods.moe_routing.options import RoutingOptions

FOLDER = Path(streaming.__file__).parent
COMPUTE_SAVED = "2026-11-20_compute_saved"
WIDTH_MOMENTS = "2026-11-20_width_moments"
LIGO = "2026-11-20_ligo"
VOCABULARY = "2026-11-24_vocabulary"
CONTEXT = "2026-11-24_context"
CHILDREN = "2026-11-24_experts_from_children"
GROWTH_RATES = "2026-11-24_growth_rates"
DISTILL_ROWS = "2026-11-26_distill_rows"
BEGINNINGS = "2026-11-25_beginnings"
DEPTH_BY_CHOICE = "2026-11-24_depth_by_choice"
MORE_UPCYCLING = "2026-11-24_more_upcycling"
COMMANDS = re.findall(r"^python .*$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.full
def test_precision_runs_and_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--hidden-sizes 32 64 --runs 1 --steps 1 --batch-size 2 --sequence-length 8"
    output = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["precision.py", *sizes.split(), "--output", str(output)])
    precision.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["hidden_size"]) for row in rows] == [32, 64]
    assert rows[0].keys() == _columns("precision.csv")


@pytest.mark.full
def test_fisher_runs_and_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--hidden-sizes 32 --runs 1 --sequences 4 --batch-size 2"
    output = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["fisher.py", *sizes.split(), "--output", str(output)])
    fisher.main()
    with output.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["fisher_over_plain"]) > 0


@pytest.mark.full
def test_methods_runs_and_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "rows.csv"
    sizes = "--ways none ewc --hidden-size 32 --layers 1 --steps 1 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["methods.py", *sizes.split(), "--output", str(output)])
    methods.main()
    with output.open(encoding="utf-8", newline="") as file:
        none, ewc = csv.DictReader(file)
    assert [none["way"], ewc["way"]] == ["none", "ewc"] and float(none["extra_copies"]) == 0


@pytest.mark.full
def test_every_way_of_a_step_on_a_gpu_runs_on_the_cpu() -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape = {**sizes, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 1024}
    options = Namespace(
        accelerator="cpu",
        batch_size=2,
        models=["tritter_125m"],
        peak_flops=1e9,
        rounds=1,
        sequence_length=16,
        shape=shape,
        steps=20,
        ways=list(gpu.WAYS),
    )
    rows = {row["way"]: row for row in gpu.rows(options)}
    assert rows.keys() == gpu.WAYS.keys()
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["bare loop"]["mfu"] and not rows["PEFT LoRA"]["mfu"]
    assert rows["bare loop"]["tokens_per_second"] and not rows["deep copy"]["tokens_per_second"]


def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "rows.csv")])
    gpu.main()
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_step_of_experts_takes_its_losses_after_the_forward_pass() -> None:
    """Of a learned router, whose losses need gates, and of one that is observed first."""
    options = Namespace(model=None, experts=2, batch_size=1, tokens=8)
    for mode in ("top-2", f"evidence, dense{experts.OBSERVED}"):
        experts.mixture_step(options, experts.TARGETS["q and v"], mode)()


@pytest.mark.full
def test_novelty_runs_and_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On made-up observations: a base takes a minute
    (tests/methods/novelty/test_trained_base.py)."""
    generator = torch.Generator().manual_seed(0)
    prose = drawn(generator=generator, batch=1600)
    skills = {
        name: drawn(centre_of(axis, 6.0), generator=generator, loss=6, batch=640)
        for axis, name in enumerate(("adding", "sorting"))
    }
    monkeypatch.setattr(
        novelty, "seen_by_a_base", lambda **_: novelty.Seen(prose=prose, skills=skills)
    )
    output = tmp_path / "rows.csv"
    sizes = f"--steps 20 --orders 1 --output {output}"
    monkeypatch.setattr(sys, "argv", ["novelty.py", *sizes.split()])
    novelty.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == _columns("novelty.csv")
    assert {row["detector"] for row in rows} == {*novelty.DETECTORS, "single samples"}
    (stream,) = [r for r in rows if (r["detector"], r["stream"]) == ("loss", "skills")]
    assert (stream["found"], stream["recognised"], stream["largest_delay"]) == ("2", "2", "2")


@pytest.mark.full
def test_corpus_memory_measures_a_text(tmp_path: Path) -> None:
    corpus_memory.write_text(tmp_path / "text.txt", megabytes=1)
    row = corpus_memory.measure(tmp_path / "text.txt")
    assert row.megabytes == 1 and row.tokens > 100_000
    assert 0 <= row.read_mb <= row.corpus_mb <= row.packed_mb


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_streamed_data_measures_records(tmp_path: Path) -> None:
    streamed_data.write_records(tmp_path / "rows.jsonl", megabytes=2)
    row = streamed_data.measure(tmp_path / "rows.jsonl", seconds=0.2)
    assert row.megabytes == 2 and row.tokens > 10_000
    assert 0 < row.filled_mb <= row.peak_mb
    assert row.over_map > 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_expand_speed_measures_every_contender(tmp_path: Path) -> None:
    rows = list(
        expand_speed.benchmark(megabytes=40, place=tmp_path, cases=["moe"], rounds=1, mergekit=None)
    )
    whole = [expand_speed.WHOLE, expand_speed.UNCHECKED]
    assert [row.contender for row in rows] == ["cp", "tritter", *whole]
    assert rows[0].over_cp == 1
    assert all(row.seconds > 0 and row.anonymous_mb > (row.own_mb or 0) for row in rows[1:])
    for row in rows:
        assert (row.first_byte_seconds is None) == (row.contender not in whole)
        assert row.first_byte_seconds is None or 0 < row.first_byte_seconds < row.seconds
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_measures_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 512, "hidden_size": 384, "intermediate_size": 512}
    monkeypatch.setattr(large, "SHAPES", {k: {**v, **small} for k, v in large.SHAPES.items()})
    rows = list(large.benchmark(["3B dus 28 → 42"], place=tmp_path, rounds=2))
    assert len(rows) == 2
    for row in rows:
        assert row.seconds > 0 and row.checked_seconds > 0 and row.cp_seconds >= 0
        assert row.checked_anonymous_mb > 0 and row.resident_mb > row.anonymous_mb
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize(
    ("layer_sources", "expected"),
    [
        ([0, 1, 2], [[0, 3]]),
        ([0, 1, 2, 1, 2, 3], [[0, 3], [1, 4]]),
        ([0, 0, 1], [[0, 1], [0, 2]]),
    ],
)
def test_runs_of_neighbouring_layers(layer_sources: list[int], expected: list[list[int]]) -> None:
    assert expand_speed.spans(layer_sources) == expected


def _columns(name: str, *, folder: Path = FOLDER) -> set[str]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return set(next(csv.reader(file)))


def test_the_shipped_rows_have_the_columns_of_today() -> None:
    fields = set(streaming.Row.__dataclass_fields__) | {"growth_mb"}
    assert _columns("streaming.csv") == fields
    assert _columns("check.csv") == set(check.Row.__dataclass_fields__)
    assert _columns("corpus_memory.csv") == set(corpus_memory.Row.__dataclass_fields__)
    assert _columns("expand_speed.csv") == set(expand_speed.Row.__dataclass_fields__)
    assert _columns("fisher.csv") == set(fisher.Row.__dataclass_fields__)
    assert _columns("large.csv") == set(large.Row.__dataclass_fields__)
    assert _columns("novelty.csv") == set(novelty.Row.__dataclass_fields__)
    assert _columns("streamed_data.csv") == set(streamed_data.Row.__dataclass_fields__)
    assert _columns("precision.csv") == {"run", *precision.Row.__dataclass_fields__, "ratio"}


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_understood(command: str) -> None:
    _, script, *words = shlex.split(command)
    text = (FOLDER.parents[1] / script).read_text("utf-8")
    flags = [word for word in words if word.startswith("--")]
    assert flags or "argparse" not in text
    assert all(f'add_argument("{flag}"' in text for flag in flags)


def test_all_scripts_are_documented() -> None:
    assert {Path(shlex.split(command)[1]).name for command in COMMANDS} == {
        path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text("utf-8")
    }


def test_one_command_runs_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as the README has it, its table elsewhere, whatever becomes of the one before it."""
    table = tmp_path / "growth.csv"
    ran: list[list[str]] = []

    def stands_for(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        ran.append(words[1:])
        if "growth.py" in words[1]:
            options["stdout"].write("a,b\n")  # type: ignore[attr-defined]
        return subprocess.CompletedProcess(words, int("fisher.py" in words[1]))

    monkeypatch.setattr(subprocess, "run", stands_for)
    monkeypatch.setattr(sys, "argv", ["every.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^failed: fisher$"):
        every.main()
    documented = [shlex.split(command)[1] for command in COMMANDS]
    assert [words[0] for words in ran] == [d for d in documented if not d.endswith("every.py")]
    assert table.read_text() == "a,b\n"
    assert not [word for words in ran for word in words if word == ">" or "mergekit" in word]
    assert not [w for words in ran for w in words if w.endswith(".csv") and str(tmp_path) not in w]


def _small_corpus(seed: int, cache: Path) -> Corpus:
    texts = [f"text number {number} of a small corpus, for one step\n" * 30 for number in range(9)]
    documents = Documents.of(texts)
    return Corpus.build(
        {"prose": documents, "code": documents},
        origin="a test",
        vocab_size=300,
        validation_fraction=0.3,
        max_validation_tokens_per_document=512,
        seed=seed,
        cache_dir=cache,
    )


@pytest.mark.full
def test_width_moments_arms_run_and_copies_can_stay_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = importlib.import_module(f"experiments.{WIDTH_MOMENTS}.width_moments")
    monkeypatch.setattr(sys.modules["width_arms"], "corpus_of", _small_corpus)
    small = {"batch_size": 4, "sequence_length": 16, "validation_sequences": 4}
    sizes = experiment.Sizes(base_steps=3, cache=tmp_path, **small)

    def losses(growth: str, **options: str) -> list[float]:
        arm = experiment.Arm(
            part="test", growth=growth, learning_rate=1e-3, steps=2, seed=0, **options
        )
        (row, *_) = experiment.run(arm, sizes)
        assert set(row) == _columns("results.csv", folder=FOLDER.parent / WIDTH_MOMENTS)
        return [row["loss_0"], row["loss_last"]]

    ungrown = losses("ungrown")
    assert losses("net2net", factor="weight") == pytest.approx(ungrown, abs=2e-4)
    assert losses("net2net")[0] == pytest.approx(ungrown[0], abs=2e-4)
    assert losses("net2net")[1] < losses("net2net", factor="share")[1] - 1e-3
    assert abs(losses("random_padding", policy="zero", domain="code")[0] - ungrown[0]) > 1e-3


def test_the_table_of_beginnings_is_that_of_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"experiments.{BEGINNINGS}.summarise").main()
    readme = (FOLDER.parent / BEGINNINGS / "README.md").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line in readme for line in lines)


@pytest.mark.parametrize("name", [GROWTH_RATES, DISTILL_ROWS])
def test_the_tables_are_those_of_the_results(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["summarise.py"])
    importlib.import_module(f"experiments.{name}.summarise").main()
    readme = (FOLDER.parent / name / "README.md").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 8 and all(line in readme for line in lines)


@pytest.mark.full
def test_depth_by_choice_runs_every_arm_and_is_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = importlib.import_module(f"experiments.{DEPTH_BY_CHOICE}.depth_by_choice")
    summary = importlib.import_module(f"experiments.{DEPTH_BY_CHOICE}.summarise")
    monkeypatch.setattr(experiment, "corpus_of", lambda seed: _small_corpus(seed, tmp_path))
    sizes = {"BASE_STEPS": 3, "EVALUATED": (0, 2), "SCORED": 4, "VALIDATION": 4, "LONG_UPDATES": 9}
    for name, value in {**sizes, "CACHE": tmp_path}.items():
        monkeypatch.setattr(experiment, name, value)
    for _ in range(2):  # the second finds every arm
        experiment.main(["--seeds", "0", "--output", str(tmp_path)])
    shipped = FOLDER.parent / DEPTH_BY_CHOICE
    for name in ("importance.csv", "results.csv"):
        assert _columns(name, folder=tmp_path) == _columns(name, folder=shipped)
    rows = rows_of(tmp_path / "results.csv")
    assert len(rows) == 2 * len({(row["arm"], row["init"]) for row in rows}) == 52
    first = {(r["arm"], r["init"]): float(r["prose"]) for r in rows if r["steps"] == "0"}
    base = first["none", "none"]
    assert all((abs(first[arm] - base) < 1e-5) == (arm[1] in ("identity", "none")) for arm in first)
    flops = {round(float(row["flops"]) / 1e6) for row in rows if row["budget"] == "2"}
    assert max(flops) / min(flops) < 1.5  # equal up to a step: `none` takes 3 of smaller ones
    summary.main()
    readme = (shipped / "README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in capsys.readouterr().out.splitlines())


@pytest.mark.full
def test_importances_and_predicted_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = importlib.import_module(f"experiments.{DEPTH_BY_CHOICE}.depth_by_choice")
    model = experiment.new_model(Model({**experiment.CONFIG, "initializer_range": 0.1}), seed=0)
    rows = torch.randint(3, 1000, (4, 16), generator=torch.Generator().manual_seed(0))
    for branch in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        branch.weight.data.zero_()
    scores = experiment.importances(model, rows)
    assert scores["skip"][2] == 0 and abs(scores["influence"][2]) < 1e-6
    others = [n for n in range(experiment.LAYERS) if n != 2]
    assert all(scores["influence"][n] > 1e-3 and scores["fisher"][n] > 0 for n in others)
    for layer in (0, 5):  # a skipped layer is a dropped one
        kept = tuple(n for n in range(experiment.LAYERS) if n != layer)
        dropped = experiment.ModelExpander([experiment.Layers(sources=kept)]).expand(model)
        change = experiment.loss_of(dropped, rows) - experiment.loss_of(model, rows)
        assert scores["skip"][layer] == pytest.approx(change, abs=1e-5)
    # A network that returns the layer below gives a copy of it; the SVD loses nothing
    lower = lambda inputs, outputs, **_: lambda both: both[:, : both.shape[1] // 2]  # noqa: E731
    monkeypatch.setattr(experiment, "fitted", lower)
    copies = experiment.predicted_layers(model, (1, 4), is_long=False, seed=0)
    for name, of_layers in experiment.matrices(model).items():
        for copy, at in zip(copies, (1, 4), strict=True):
            assert torch.allclose(copy[name], of_layers[at], atol=1e-5)


@pytest.mark.full
def test_more_upcycling_runs_each_arm_and_is_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = importlib.import_module(f"experiments.{MORE_UPCYCLING}.more_upcycling")
    monkeypatch.setattr(experiment, "corpus_of", lambda seed: _small_corpus(seed, tmp_path))
    for name, value in {"BASE_STEPS": 3, "STEPS": 4, "CACHE": tmp_path, "POINTS": (0.5, 1)}.items():
        monkeypatch.setattr(experiment, name, value)
    rows = {arm: experiment.rows_of(arm, 0) for arm in experiment.ARMS}
    columns = _columns("results.csv", folder=FOLDER.parent / MORE_UPCYCLING)
    assert all(set(row) == columns for of_arm in rows.values() for row in of_arm)
    for arm in ("mixtral", "qwen2_moe", "glm4_moe"):
        assert rows[arm][0]["prose"] == pytest.approx(rows["dense"][0]["prose"], abs=1e-3)
    assert rows["not_renormalised"][0]["prose"] != rows["dense_qwen3"][0]["prose"]
    assert len({of_arm[-1]["code"] for of_arm in rows.values()}) == len(rows)
    importlib.import_module(f"experiments.{MORE_UPCYCLING}.summarise").main()
    readme = (FOLDER.parent / MORE_UPCYCLING / "README.md").read_text(encoding="utf-8")
    assert all(line in readme for line in capsys.readouterr().out.splitlines())


@pytest.mark.full
def test_compute_saved_runs_and_is_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"experiments.{COMPUTE_SAVED}"
    experiment = importlib.import_module(f"{folder}.compute_saved")
    summary = importlib.import_module(f"{folder}.summarise")
    monkeypatch.setattr(experiment, "RATES", (3e-3,))
    arms_module = sys.modules["compute_arms"]
    monkeypatch.setattr(arms_module, "SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(
        arms_module.Corpus,
        "of_stdlib",
        lambda *, seed, cache_dir, **_: _small_corpus(seed, cache_dir),
    )
    sizes = "--layers 1 --steps 10 --eval-every 5 --eval-sequences 4 --batch-size 2"
    places = ["--output", str(tmp_path), "--cache-dir", str(tmp_path)]
    for what, seed in (("tune", "3"), ("run", "0")):
        words = ["compute_saved.py", what, "--seeds", seed, *sizes.split(), *places]
        monkeypatch.setattr(sys, "argv", words)
        experiment.main()
    curves = summary.read_curves(tmp_path / "curves.csv")
    arms = {(curve.arm, curve.grown_at) for curve in curves}
    paths = experiment.growth_paths(experiment.Size())
    assert arms == {(name, at) for name in paths for at in (3, 6)} | {("small", 0), ("scratch", 0)}
    small = next(curve for curve in curves if curve.arm == "small")
    for curve in curves:
        if curve.grown_at:  # the small model's FLOPs are counted once, up to the growth
            before = small.flops[small.steps.index(curve.grown_at)]
            assert curve.flops[-1] == pytest.approx(before + curve.own_flops[-1], rel=1e-4)
    summary.main(tmp_path)
    for name in ("tuning.csv", "curves.csv", "results.csv", "wsd.csv"):
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            assert set(next(csv.reader(file))) == _columns(
                name, folder=FOLDER.parent / COMPUTE_SAVED
            )


@pytest.mark.full
def test_a_killed_run_of_compute_saved_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = importlib.import_module(f"experiments.{COMPUTE_SAVED}.compute_saved")
    arms = sys.modules["compute_arms"]
    monkeypatch.setattr(arms, "SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(
        arms.Corpus, "of_stdlib", lambda *, seed, cache_dir, **_: _small_corpus(seed, cache_dir)
    )
    size = arms.Size(layers=1, steps=10, eval_every=2, eval_sequences=4, batch_size=2)
    paths = {"stack": arms.growth_paths(size)["stack"]}
    rates = dict.fromkeys(("small", "scratch_depth", "stack"), 3e-3)

    def run(name: str, work: Path | None) -> list[dict[str, str]]:
        table = experiment.Table(tmp_path / name, experiment.Row, work=work)
        experiment.run(arms.Seed(0, size, cache_dir=tmp_path), table, rates, paths=paths)
        return [{**row, "seconds": ""} for row in rows_of(table.path)]

    whole, work = run("whole.csv", None), tmp_path / "work"
    work.mkdir()
    train = arms.Training.advance
    for steps in (4, 3, 3, 9):  # the third: a grown arm before its first step
        times = iter(range(steps))

        def killed(training: Any, *words: Any, _times: Any = times, **names: Any) -> None:
            if next(_times, None) is None:
                raise KeyboardInterrupt
            train(training, *words, **names)

        monkeypatch.setattr(arms.Training, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed.csv", work)
    monkeypatch.setattr(arms.Training, "advance", train)
    assert run("killed.csv", work) == whole


@pytest.mark.full
def test_routers_of_an_arm_are_balanced_in_it_and_in_its_branches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module(f"experiments.{COMPUTE_SAVED}.compute_saved")
    arms = sys.modules["compute_arms"]
    monkeypatch.setattr(arms, "SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(
        arms.Corpus, "of_stdlib", lambda *, seed, cache_dir, **_: _small_corpus(seed, cache_dir)
    )
    data = arms.Seed(0, arms.Size(layers=1, eval_sequences=4), cache_dir=tmp_path)
    small = data.new(data.config, rate=1e-3, name="small")
    assert small.routers is None
    specs = arms.growth_paths(data.size)["moe"].specs

    def router(*, auxiliary_loss: float, z_loss: float) -> torch.Tensor:
        chosen = RoutingOptions(auxiliary_loss=auxiliary_loss, z_loss=z_loss)
        monkeypatch.setattr(arms, "RoutingOptions", lambda: chosen)
        branch = small.grown(specs, rate=1e-3, seed=0).decayed(2, batch_size=2)
        assert len(branch.routers.records) == 1
        names = dict(branch.model.named_parameters())
        return names["model.layers.0.mlp.gate.weight"]

    plain = router(auxiliary_loss=0.0, z_loss=0.0)
    assert not torch.equal(router(auxiliary_loss=1.0, z_loss=0.0), plain)
    assert not torch.equal(router(auxiliary_loss=0.0, z_loss=1.0), plain)


@pytest.mark.full
def test_vocabulary_arms_run_at_equal_flops_and_are_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, summary = (
        importlib.import_module(f"experiments.{VOCABULARY}.{name}")
        for name in ("vocabulary", "summarise")
    )
    output = tmp_path / "results.csv"
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    sizes = "--seeds 0 --arms mean none --steps 6 --tokens 300 --pretraining-steps 2"
    words = ["vocabulary.py", *sizes.split(), "--work", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    experiment.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == _columns("results.csv", folder=FOLDER.parent / VOCABULARY)
    flops = {row["arm"]: float(row["flops"]) for row in rows}
    steps = {row["arm"]: int(row["steps"]) for row in rows}
    assert steps["none"] > steps["mean"] and flops["none"] == pytest.approx(flops["mean"], rel=0.1)
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    summary.main()
    assert "| none | - | +0.0 % |" in capsys.readouterr().out


@pytest.mark.full
def test_context_arms_run_at_equal_flops_and_are_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, summary = (
        importlib.import_module(f"experiments.{CONTEXT}.{name}")
        for name in ("context", "summarise")
    )
    output = tmp_path / "results.csv"
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    sizes = "--seeds 0 --steps 8 --pretraining-steps 2 --length 64"
    words = ["context.py", *sizes.split(), "--work", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    experiment.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == _columns("results.csv", folder=FOLDER.parent / CONTEXT)
    flops = {row["arm"]: float(row["flops"]) for row in rows}
    steps = {row["arm"]: int(row["steps"]) for row in rows}
    assert steps["short"] > steps["yarn"] and flops["short"] == pytest.approx(
        flops["yarn"], rel=0.1
    )
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    summary.main()
    assert "| short | " in capsys.readouterr().out and (tmp_path / "positions.png").is_file()


@pytest.mark.full
def test_children_and_controls_run_at_equal_flops_and_are_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, summary = (
        importlib.import_module(f"experiments.{CHILDREN}.{name}")
        for name in ("children", "summarise")
    )
    output, stories, maths = (tmp_path / name for name in ("results.csv", "stories", "maths"))
    text = "".join(f"Once upon a time there were {n} cars named Beep.\n" for n in range(4000))
    stories.write_bytes(gzip.compress(text.encode()))
    pairs = ({"question": f"Half of {n}?", "answer": f"{n}/2 = {n / 2}"} for n in range(3000))
    maths.write_bytes(gzip.compress("".join(f"{json.dumps(each)}\n" for each in pairs).encode()))
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    sizes = "--seeds 0 --pretraining-steps 2 --child-steps 3 --mixed-steps 3"
    files = f"--stories {stories} --maths {maths} --work {tmp_path} --output {output}"
    words = [*sizes.split(), *files.split(), "--arms", "mixed", "mean", "dense"]
    monkeypatch.setattr(experiment, "DOMAIN_BYTES", 60_000)
    monkeypatch.setattr(sys, "argv", ["children.py", *words])
    experiment.main()
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == _columns("results.csv", folder=FOLDER.parent / CHILDREN)
    flops = {row["arm"]: float(row["flops"]) for row in rows}
    children = sum(flops[name] for name in experiment.DOMAINS)
    assert flops["mixed"] + children == pytest.approx(flops["dense"], rel=0.1)
    assert flops["mean"] == pytest.approx(flops["mixed"], rel=0.2)
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    summary.main()
    assert "| mean |" in capsys.readouterr().out


def test_a_saving_is_read_off_between_the_points() -> None:
    summary = importlib.import_module(f"experiments.{COMPUTE_SAVED}.summarise")
    assert summary.crossing(2.5, [0.0, 10.0, 20.0], [4.0, 3.0, 2.0]) == 15.0
    assert summary.crossing(1.0, [0.0, 10.0], [4.0, 3.0]) is None
    assert summary.interpolated(15.0, [0.0, 10.0, 20.0], [4.0, 3.0, 2.0]) == 2.5
    assert summary.spread([0.3, 0.4, 0.5]) == "40 ± 10"


@pytest.mark.full
def test_ligo_starts_at_the_expansion_and_is_compared_at_equal_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = importlib.import_module(f"experiments.{LIGO}.ligo")
    summary = importlib.import_module(f"experiments.{LIGO}.summarise")
    harness = sys.modules["compute_arms"]
    monkeypatch.setattr(harness, "SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(
        harness.Corpus, "of_stdlib", lambda *, seed, cache_dir, **_: _small_corpus(seed, cache_dir)
    )
    monkeypatch.setattr(experiment, "OPERATOR_RATES", (1e-3, 3e-3, 9e-3))
    lengths = experiment.Lengths(
        base_steps=3,
        tuning_base_steps=3,
        operator_steps=2,
        steps=6,
        tuning_steps=1,
        evaluated=(0, 6),
    )
    places = ["--hidden-size", "32", "--output", str(tmp_path), "--cache-dir", str(tmp_path)]
    for what, seed in (("tune", "3"), ("run", "0")):
        monkeypatch.setattr(sys, "argv", ["ligo.py", what, "--seeds", seed, *places])
        experiment.main(lengths)
    for name in ("tuning.csv", "results.csv"):
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            assert set(next(csv.reader(file))) == _columns(name, folder=FOLDER.parent / LIGO)
    points = summary.read_points(tmp_path / "results.csv")
    first = {(p.target, p.arm): p.loss for p in points if p.equivalent_steps == 0}
    for target, arm in (("width", "fresh"), ("depth", "llama_pro"), ("both", "fresh_llama_pro")):
        assert first[target, "ligo_exact"] == pytest.approx(first[target, arm], abs=1e-5)
        assert first[target, "ligo_paper"] != pytest.approx(first[target, arm], abs=1e-5)
    trained = [p for p in points if p.arm.startswith("ligo") and p.step == 0]
    assert all(p.equivalent_steps > lengths.operator_steps for p in trained)
    assert all(p.loss != first[p.target, p.arm] for p in trained)
    (row,) = [row for row in summary.table(points) if row[:2] == ("width", "net2net")]
    assert row[3] == f"{first['width', 'net2net']:.3f} ± nan"


@pytest.mark.full
def test_a_step_on_the_operators_lowers_the_loss_of_the_grown_model() -> None:
    experiment = importlib.import_module(f"experiments.{LIGO}.ligo")
    config = sys.modules["compute_arms"].small_config(experiment.Size(), vocab_size=64)
    small = experiment.new_model(Model(config), seed=0)
    batch = torch.arange(64).view(2, 32)
    for growth in experiment.growths():
        if growth.init:
            operators = experiment.Operators(small, growth.specs, init=growth.init, seed=1)
            losses = experiment.train_operators(operators, [batch] * 8, rate=1e-2)
            assert losses[-1] < losses[0] - 1e-4
            folded = operators.folded()
            after = float(folded(input_ids=batch, labels=batch).loss.detach())
            assert after < losses[0]

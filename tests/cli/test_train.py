"""`tritter train`: the words of train.py, and a checkpoint that is trained on."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests.cli.conftest import Run, snapshot
from tests.config.conftest import planned
from tests.config.test_outside import write_examples
from tests.evaluation.published import PUBLISHED
from tests.evaluation.test_benchmark_files import written
from tests.oracle import stock
from tests.pipeline.conftest import SMALL
from tritter.checkpoints import Lineage
from tritter.checkpoints.run_text import RunText
from tritter.checkpoints.state import write_state
from tritter.cli import main
from tritter.cli import train as train_module
from tritter.cli.train import continuation
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.composition import load_config
from tritter.config.launch.help import help_text
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.core.expansions import Moe, Width
from tritter.data import datasets as data_sets
from tritter.data import sources
from tritter.data.options import DatasetsConfig, TextDataConfig
from tritter.errors import RequestError
from tritter.methods.forgetting.ewc import EWCOptions
from tritter.pipeline import find_rate
from tritter.stopping import Stopped
from tritter.storage.writer import TensorStream
from tritter.transform import expand

QUICK = "data.sequence_length=32 data.batch_size=4 logger=csv trainer.progress=off "
QUICK += "evaluation.sample_tokens=0 evaluation.max_tokens_per_document=48"
ROOT = Path(__file__).resolve().parents[2]
WORDS = "the model grows a layer where data asks for one and keeps what it knew"


def write_texts(folder: Path, start: str) -> None:
    folder.mkdir(parents=True)
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{start} {number} {WORDS} {number**5} {WORDS}\n" * 5)


@pytest.fixture
def texts(place: Path) -> Path:
    """The current folder, with a plain `base`, and texts at `old` and `data/pretraining`."""
    write_texts(place / "old", "of older days")
    write_texts(place / "data/pretraining", "once more")
    return place


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """What the pipeline is given, which does nothing else; texts may be too few to be split."""
    given: list[RunConfig] = []

    def pipeline(config: RunConfig, *, run_folder: Path) -> Any:
        given.append(config)

        class Outcome:
            status, metric, leaves = "kept", 0.5, ("summary.json",)

        (run_folder / "summary.json").write_text("{}")
        return Outcome()

    monkeypatch.setattr(train_module, "_pipeline", pipeline)
    monkeypatch.setattr(find_rate, "find_rate", lambda config, folder: given.append(config))
    monkeypatch.setattr(RunText, "side_problems", lambda text: ())
    return given


def data_of(config: RunConfig) -> TextDataConfig:
    assert isinstance(config.data, TextDataConfig)
    return config.data


def test_without_a_checkpoint_it_is_the_program_behind_train_py(run: Run) -> None:
    for flag in ("--help", "-h", "--checkpoint base --help"):
        said = run(f"train {flag}").out
        assert said.startswith("Usage: tritter train [DIR]") and said.endswith(f"{help_text()}\n")
    result = run("train expansion=dsu")
    assert result.code == 2
    assert "dsu" in result.err
    assert run("train --cfg job").code == 0


def test_help_names_every_option(run: Run) -> None:
    said = run("train --help").out
    for option in train_module._VALUED:
        assert f"{option} " in said.partition("Tritter grows")[0]  # before the groups
    assert (
        "Deeper: two overlapp" not in said and "Deeper: two overlapp" in run("train --help-all").out
    )
    assert set(train_module._OPTIONS.values()) <= set(train_module._VALUED)
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.full
def test_a_checkpoint_is_trained_with_a_method_from_outside(
    run: Run, texts: Path, configs: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples(texts / "site", conf=texts / "conf")
    monkeypatch.syspath_prepend(texts / "site")
    line = "train --checkpoint base --data data/pretraining --config-dir conf forgetting=damp"
    assert "Damp: every gradient" in run(f"{line} --help").out
    result = run(f"{line} forgetting.damp.share=0.25 data.sequence_length=32")
    assert result.code == 0, result.err
    (one,) = configs[0].forgetting
    assert (one.name, one.arguments) == ("damp", {"share": 0.25})
    assert run(f"{line} --config-dir nowhere").code == 2


def test_the_summary_is_one_json_object(
    run: Run, texts: Path, configs: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--json` of every command; a run that is finished already has it too."""
    line = "train base --data data/pretraining --old-data old data.sequence_length=32 --json"
    for _ in range(2):
        result = run(line)
        assert (result.code, result.json) == (0, {})
    assert "This run is finished" in result.err and len(configs) == 1
    program = run("train data=text data.old=old data.new=data/pretraining --json")
    assert program.json == {} and len(configs) == 2
    refused = run("train -m seed=0,1 --json")
    assert refused.code == 2 and "--json" in refused.err and not refused.out

    def rates(config: RunConfig, folder: Path) -> find_rate.FoundRates:
        print("a table")
        return find_rate.FoundRates.of([(1e-4, 3.0), (1e-3, 2.0)], configured=1e-3)

    monkeypatch.setattr(find_rate, "find_rate", rates)
    tested = run(f"{line} --find-lr")
    assert tested.json["losses"] == [3.0, 2.0] and "a table" in tested.err


def test_a_stopped_run_with_json_says_where_it_resumes(
    run: Run, texts: Path, configs: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: RunConfig, *, run_folder: Path) -> Any:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(train_module, "_pipeline", stop)
    line = "train base --data data/pretraining --old-data old data.sequence_length=32 --json"
    result = run(line)
    assert (result.code, result.out) == (143, "")
    assert "base-continued" in result.err and "Nothing was written" not in result.err


def test_what_the_options_mean(run: Run, texts: Path, configs: list[RunConfig]) -> None:
    result = run(
        "train --checkpoint base --mode continue --steps 7 --ewc_lambda 1000 --output there "
        "--data data/pretraining --old-data old --data old/0.txt data.sequence_length=32"
    )
    assert result.code == 0, result.err
    (config,) = configs
    assert config.model == CheckpointModelConfig(model_type="hf", path=str(texts / "base"))
    assert (config.expansion, config.training.max_steps) == ((), 7)
    assert [one.options for one in config.forgetting] == [
        EWCOptions(ewc_lambda=1000, num_sequences=56)
    ]
    assert data_of(config).new == {"new": [f"{texts}/data/pretraining", f"{texts}/old/0.txt"]}
    assert data_of(config).old == {"old": [f"{texts}/old"]}
    assert (texts / "there/run.json").exists()


def write_importances(folder: Path) -> None:
    values = {name: torch.ones_like(value) for name, value in stock("base").state_dict().items()}
    write_state(folder, {"fisher": TensorStream.of(values.items())}, step=3)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("has_importances", [False, True])
def test_ewc_without_old_data_reads_what_the_checkpoint_has_or_writes(
    run: Run, texts: Path, configs: list[RunConfig], has_importances: bool
) -> None:
    if has_importances:
        write_importances(texts / "base")
    words = "train base --data data/pretraining --ewc-lambda 9 data.sequence_length=32"
    result = run(words)
    assert result.code == 0, result.err
    (ewc, *writing) = configs[0].forgetting
    assert ewc.options == EWCOptions(ewc_lambda=9)
    assert [(one.name, one.options.fraction) for one in writing] == (
        [] if has_importances else [("self_replay", 0)]
    )


@pytest.mark.full
@pytest.mark.parametrize("has_importances", [False, True])
def test_ewc_without_old_data_runs(run: Run, texts: Path, has_importances: bool) -> None:
    if has_importances:
        write_importances(texts / "base")
    words = f"train base --data data/pretraining --ewc-lambda 9 --steps 2 {QUICK} gate=off"
    if not has_importances:
        words += " forgetting.self_replay.num_sequences=8 forgetting.self_replay.min_distinct=0"
    result = run(words)
    assert result.code == 0, result.err
    used = "uses the checkpoint's importances" if has_importances else "used data generated by"
    assert f"There is no old data: ewc {used}" in " ".join(result.out.split())


@pytest.mark.full
def test_a_data_set_needs_but_its_name(run: Run, texts: Path, configs: list[RunConfig]) -> None:
    (texts / "rows.csv").write_text("body,n\nword,1\n")
    (texts / "old.csv").write_text("body,n\nother,1\n")
    words = "train --checkpoint base data.sequence_length=32 --data"
    assert run(f"{words} hf:./rows.csv:train#body data.old=stdlib:prose").code == 0
    data = configs[0].data
    assert isinstance(data, DatasetsConfig)
    assert data.new == {"new": [f"hf:{texts}/rows.csv:train#body"]}
    assert (
        run(f"{words} rows.csv data=hf data.max_rows=3 --output b --old-data hf:./old.csv").code
        == 0
    )
    assert [*configs[1].text.domains.values()][1].paths == (f"hf:{texts}/rows.csv[:3]",)
    refused = run(f"{words} hf:me/stories/main:train#text data.old=stdlib:prose --output c")
    assert (
        refused.code == 2 and "--data: hf:me/stories/main:train#text is not cached" in refused.err
    )


def test_typed_keys_win(run: Run, texts: Path, configs: list[RunConfig]) -> None:
    result = run(
        "train --checkpoint=base --ewc-lambda=5 --data=old data.old=old data.new={x:data} "
        "expansion=width forgetting=[replay,ewc] training.max_steps=3 "
        "data.sequence_length=32 hydra.run.dir=elsewhere"
    )
    assert result.code == 0, result.err
    (config,) = configs
    assert [options.name for options in config.forgetting] == ["replay", "ewc"]
    assert config.forgetting[1].options == EWCOptions(ewc_lambda=5, num_sequences=24)
    assert [spec.name for spec in config.expansion] == ["width"]
    assert data_of(config).new == {"x": [f"{texts}/data"]}
    assert config.training.max_steps == 3
    assert (texts / "elsewhere/run.json").exists()


@pytest.mark.full
def test_a_continued_checkpoint_is_gone_on_with_by_resume_alone(
    run: Run, texts: Path, configs: list[RunConfig]
) -> None:
    words = "--data old forgetting=none data.sequence_length=32"
    assert run(f"train --checkpoint base {words}").code == 0
    (texts / "base-continued/summary.json").unlink()
    assert run("train resume=base-continued").code == 0
    assert configs[1] == replace(configs[0], resume="base-continued")
    refused = run("train --checkpoint base --data old resume=base-continued")
    assert refused.code == 2 and "tritter train resume=base-continued\n" in refused.err


def test_the_default_output_lies_beside_the_checkpoint(
    run: Run, texts: Path, configs: list[RunConfig]
) -> None:
    words = "--data old forgetting=none data.sequence_length=32"
    assert run(f"train --checkpoint ./base/ {words}").code == 0
    assert (texts / "base-continued/run.json").exists()
    again = run(f"train --checkpoint base {words}")
    assert (again.code, len(configs)) == (0, 1)
    assert "nothing to do" in again.out
    other = run(f"train --checkpoint base {words} --steps 3")
    assert other.code == 2
    assert "--output = " in other.err and "training.max_steps: 250 → 3" in other.err


@pytest.mark.full
def test_training_completes_the_record_of_an_expansion_before_it(run: Run, texts: Path) -> None:
    words = f"{QUICK} gate=off forgetting=none cache_dir=cache"
    assert run("expand base --method width --output grown").code == 0
    first = run(f"train grown --data data/pretraining --old-data old --steps 3 {words}")
    assert first.code == 0, first.err
    again = run(f"train grown-continued/checkpoint --data old --steps 2 data.old={{}} {words}")
    assert again.code == 0, again.err
    for name in ("grown-continued", "grown-continued-continued"):  # next to each other
        lineage = Lineage.read(texts / name / "checkpoint")
        assert lineage is not None
        (record,) = lineage.expansion_history
        assert record.continued_training_steps == 3
        assert record.performance_delta.keys() == {"old", "new"}


@pytest.mark.full
def test_places_with_spaces_and_signs(run: Run, texts: Path, configs: list[RunConfig]) -> None:
    odd = texts / "it's, {odd}: [a=b]"
    odd.mkdir()
    shutil.move(texts / "base", odd / "base")
    shutil.move(texts / "old", odd / "old")
    code = main([
        "train", "--checkpoint", str(odd / "base"), "--data", str(odd / "old/0.txt"),
        "--old-data", str(odd / "old"), "data.sequence_length=32",
    ])  # fmt: skip
    assert code == 0
    assert data_of(configs[0]).old == {"old": [str(odd / "old")]}
    assert (odd / "base-continued/run.json").exists()


REFUSALS = {
    "--checkpoint base": ("--data is missing",),
    "--steps 10": ("--steps requires a checkpoint to train, `tritter train DIR`",),
    "base": ("--data is missing",),
    "base --checkpoint base --data old": ("base together with --checkpoint: use the argument",),
    "base old --data old": ("base and old: tritter train takes one checkpoint",),
    "bsae --data old": ("--checkpoint = bsae", "Did you mean 'base'?"),
    "--model base": ("Did you mean: tritter train --checkpoint base",),
    "base --expansion dus --data old": ("Did you mean expansion=dus?",),
    "--checkpoint base --data old": ("--old-data = null", "it is required by replay"),
    "--checkpoint base --data old --ewc-lambda x": ("--ewc-lambda = x",),
    "--checkpoint base --data old forgetting=none --steps 0": ("--steps = 0", "at least 1"),
    "--checkpoint base --data old --mode grow": ("--mode = grow", "continue"),
    "--checkpoint base --data old --setps 3": ("--setps", "Did you mean '--steps'?"),
    "--checkpoint base --data old -m": ("-m",),
    "--checkpoint base --data": ("--data", "requires an argument"),
    "--checkpoint": ("--checkpoint", "requires an argument"),
    "--checkpoint bsae --data old": ("--checkpoint = bsae", "Did you mean 'base'?"),
    "--checkpoint old --data old": ("--checkpoint = ", "config.json"),
    "--checkpoint base --data odl": ("--data = ", "Did you mean 'old'?"),
    "--checkpoint base --data old --old-data base/model.safetensors": (
        "--old-data = ", "found .safetensors 1",
    ),
    "--checkpoint base --data old --old-data base data.sequence_length=32": (
        "--old-data = ", "found .json of one object",
    ),
    "--checkpoint base --data old forgetting=none data.sequence_length=128": (
        "data.sequence_length = 128", "max_position_embeddings = 64",
    ),
    "--checkpoint base --data old forgetting=none seed=1,2": ("seed = 1,2",),
}  # fmt: skip


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("words", REFUSALS)
def test_refused(run: Run, texts: Path, configs: list[RunConfig], words: str) -> None:
    before = snapshot(texts)
    result = run(f"train {words}")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for part in REFUSALS[words]:
        assert part in result.err
    assert (snapshot(texts), configs) == (before, [])


# What the checkpoint recorded


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, a small run on `texts`; its cache lies beside."""
    place = tmp_path_factory.mktemp("trained")
    write_texts(place / "texts/old", "of old")
    write_texts(place / "texts/new", "and now")
    from tritter.pipeline import run_pipeline

    words = [
        *SMALL, *QUICK.split(), "data=text", f"data.old={{past:{place}/texts/old}}",
        f"data.new={place}/texts/new", "data.vocab_size=280", "training.max_steps=3", "seed=5",
        "pretraining.max_steps=5", f"cache_dir={place}/cache", "gate='off'",
        "data.validation_fraction=0.3", "pipeline.keep_stages=true",
    ]  # fmt: skip
    (place / "run").mkdir()
    run_pipeline(load_config(words), run_folder=place / "run")
    return place


@pytest.fixture
def grown(trained: Path, texts: Path) -> Path:
    """The current folder, with `grown`, the result of a run."""
    shutil.copytree(trained / "run/checkpoint", texts / "grown")
    return texts


@pytest.mark.full
def test_the_specifications_example(run: Run, grown: Path, trained: Path) -> None:
    result = run(
        "train --checkpoint ./grown --mode continue --steps 3 --ewc-lambda 1000 "
        f"--data ./data/pretraining cache_dir={trained}/cache {QUICK} gate='off'"
    )
    assert result.code == 0, result.err
    assert "Old data and split from the checkpoint's lineage: past, new." in result.out
    summary = json.loads((grown / "grown-continued/summary.json").read_text())
    assert summary["domains"] == {"old": ["past", "new"], "new": ["new_2"]}
    assert "The domain new is renamed new_2" in result.out
    assert (summary["forgetting"], summary["seed"]) == (["ewc"], 5)
    before, after = (Lineage.read(grown / name) for name in ("grown", "grown-continued/checkpoint"))
    assert before is not None and after is not None
    assert after.parent_hash == before.model_hash
    assert after.expansion_history[0].method == "width"
    assert run("history grown-continued/checkpoint --verify").code == 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["checkpoint", "baseline", "attempt_1/expanded"])
def test_every_checkpoint_of_a_run_knows_its_old_text(
    run: Run, texts: Path, trained: Path, configs: list[RunConfig], name: str
) -> None:
    result = run(f"train --checkpoint {trained}/run/{name} --data data --output there {QUICK}")
    assert result.code == 0, result.err
    text = configs[0].text
    past = {name: text.domains[name].paths for name in text.old}
    assert past["past"] == (f"{trained}/texts/old",)
    # What was learned is old from then on
    assert text.old == (("past", "new") if name == "checkpoint" else ("past",))
    assert text.new == (("new_2",) if name == "checkpoint" else ("new",))
    # What was held out stays held out
    assert (text.split.seed, text.split.validation_fraction) == (5, 0.3)
    assert configs[0].seed == 5


def test_the_settings_are_those_of_the_recorded_training(trained: Path, texts: Path) -> None:
    checkpoint = str(trained / "run/checkpoint")
    words = continuation(checkpoint, data=["old"], settings={})
    assert "data.sequence_length=32" in words and "seed=5" in words
    typed = continuation(checkpoint, data=["old"], settings={}, arguments=["seed=5"])
    assert [w for w in typed if w.startswith("seed")] == ["seed=5"]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("seed=9", "seed = 9: the checkpoint's data was split with seed 5"),
        ("++seed=9", "would train on its validation data"),
        ("data.validation_fraction=0.2", "the checkpoint's lineage uses 0.3"),
        ("data.validation-fraction=0.31", "data.validation_fraction = 0.31"),
    ],
)
@pytest.mark.parametrize("old", ["", "--old-data old"])
def test_another_split_is_refused(
    run: Run, trained: Path, texts: Path, configs: list[RunConfig], word: str, reason: str, old: str
) -> None:
    before = snapshot(texts)
    result = run(f"train --checkpoint {trained}/run/checkpoint --data data {old} {word}")
    assert result.code == 2 and reason in result.err
    assert (snapshot(texts), configs) == (before, [])


def test_another_seed_orders_the_data_and_leaves_the_split(trained: Path, texts: Path) -> None:
    words = ["model=hf", f"model.path={trained}/run/checkpoint", "data=text", "data.new=old"]
    config = load_config([*words, "data.sequence_length=32", "seed=9"])
    assert (config.seed, config.text.split.seed) == (9, 5)
    assert any("lineage's seed 5; seed=9 only" in note for note in config.text.notes)
    with pytest.raises(RequestError, match=r"data\.validation_fraction = 0.4"):
        load_config([*words, "data.validation_fraction=0.4"])


def edit_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tritter.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def move_text(record: dict[str, Any]) -> None:
    record["domains"]["past"]["paths"] = ["/nowhere/at/all"]


def change_text(record: dict[str, Any]) -> None:
    record["domains"]["past"]["sha256"] = "0" * 64


def forget_place(record: dict[str, Any]) -> None:
    del record["domains"]["past"]["paths"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (move_text, "no such file or folder"),
        (change_text, "has changed since"),
        (forget_place, "its paths were not recorded"),
    ],
)
def test_recorded_text_that_is_not_what_it_was(
    run: Run, grown: Path, configs: list[RunConfig], change: Any, reason: str
) -> None:
    edit_record(grown / "grown", change)
    for words in ("", "forgetting=none"):  # whatever would become of the old text
        refused = run(f"train --checkpoint grown --data data/pretraining {words}")
        assert refused.code == 2
        for part in ("--old-data = null", "past can't be used", reason):
            assert part in refused.err
    nothing = "forgetting=none data.old={}"
    alone = run(f"train --checkpoint grown --data data/pretraining {nothing}")
    assert alone.code == 0, alone.err
    assert configs[-1].text.old == ()
    missing = "There is no text of past, new, which the checkpoint learned, so none is "
    assert f"{missing}replayed or scored." in configs[-1].text.notes
    named = run("train --checkpoint grown --data data/pretraining --old-data old --output there")
    assert named.code == 0
    assert data_of(configs[-1]).old == {"old": [f"{grown}/old"]}
    # Under its name other text stands for it from then on
    words = "data.old={past:old} --output again"
    again = run(f"train --checkpoint grown --data data/pretraining {words}")
    assert again.code == 0, again.err
    assert configs[-1].text.old == ("past",)
    assert (
        "There is no text of new, which the checkpoint learned, so none is replayed or scored."
        in configs[-1].text.notes
    )


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("path", ["/", "/**/*", "/*/*/*"])
def test_a_lineage_that_names_the_disk_is_not_followed_there(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """As its text and as its parent; the folders that commands list are counted."""
    expand(texts / "base", texts / "grown", [Width()])
    rule = {"seed": 0, "validation_fraction": 0.2}

    def name_the_disk(record: dict[str, Any]) -> None:
        past = {"paths": [path], "sha256": "0" * 64, "num_bytes": 10**12}
        parent = {"parent_path": path, "parent_hash": "1" * 64}
        record |= {"domains": {"past": past}, "split": rule, **parent}

    edit_record(texts / "grown", name_the_disk)
    (texts / "base").rename(texts / "gone")
    monkeypatch.setattr(sources, "_MAX_RECORDED", 300)
    listed: list[str] = []
    for name in ("scandir", "listdir"):
        original = getattr(os, name)
        spy = lambda path=".", list_=original: listed.append(os.fspath(path)) or list_(path)  # noqa: E731
        monkeypatch.setattr(os, name, spy)
    for words, code in {
        "history grown": 0,
        "history grown --verify": 3,  # the record was changed
        "inspect grown": 0,
        "evaluate --checkpoint grown": 2,
        "validate --source gone --result grown": 0,
        "train --checkpoint grown --data data/pretraining --output out data.sequence_length=32": 2,
    }.items():
        listed.clear()
        result = run(words)
        elsewhere = [each for each in listed if not each.startswith((str(texts), str(ROOT), "."))]
        assert result.code == code, (words, result)
        assert len(elsewhere) < 400, words
        reasons = (
            "limited to 300 files and folders",
            "leaves the folder",
        )  # / may hold links
        is_refused = any(reason in result.err for reason in reasons)
        assert is_refused == (code == 2), (words, result.err)


# What is documented

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED = [
    line.removeprefix("$ ")
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith(("$ python train.py ", "$ tritter train "))
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("command", [c for c in dict.fromkeys(DOCUMENTED) if " -m " in c])
def test_documented_sweeps_are_planned(command: str) -> None:
    """None is started: what launchers and sweepers do with jobs is tested beside them."""
    words = shlex.split(command)[2:]
    if "hydra/launcher=ray" in words and find_spec("ray") is None:
        with pytest.raises(RequestError, match=r"tritter\[ray\]"):
            planned(CommandLine.parse(words))
    else:
        plan = planned(CommandLine.parse(words))
        assert plan.jobs or "hydra/sweeper=optuna" in words, "Optuna thinks of its own"


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("command", [c for c in dict.fromkeys(DOCUMENTED) if " -m " not in c])
def test_documented_commands_are_accepted(
    run: Run,
    grown: Path,
    configs: list[RunConfig],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands with files that only a person has; `tests/test_readme.py` checks all others."""
    shutil.move(grown / "old", grown / "articles")
    rows = datasets.Dataset.from_dict({"text": ["a"], "body": ["b"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(grown / "saved")
    (grown / "rows.csv").write_text("text\na\n")
    monkeypatch.setattr(data_sets, "_of_hub", lambda source: source)  # no network
    for name in ("notes", "code", "maths"):
        (grown / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (grown / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (grown / "own.jinja").write_text("{{ messages }}")
    written(grown / "benchmarks/arc_easy_test.jsonl", PUBLISHED["arc_easy"])
    config = json.loads((grown / "base/config.json").read_text())
    (grown / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    if "model.path=sparse" in command:
        expand(grown / "base", grown / "sparse", [Moe(num_experts=4, noise=0)])
    with_moments = ROOT / "tests/fixtures/tiny_run/with_moments"
    shutil.copytree(with_moments, grown / "outputs/runs/first/checkpoint")
    words = shlex.split(command)
    assert words[:2] in (["python", "train.py"], ["tritter", "train"])
    assert main(["train", *words[2:]]) == 0
    assert len(configs) == 1


def test_the_specifications_example_is_documented() -> None:
    assert (
        "tritter train --checkpoint ./grown --mode continue --steps 100 --ewc-lambda 1000 "
        "--data ./data/pretraining"
    ) in DOCUMENTED


def test_evaluate_takes_the_losses_of_what_was_held_out(
    run: Run, grown: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITTER_CACHE", str(trained / "cache"))
    monkeypatch.setattr("tritter.pipeline.evaluate._MAX_TOKENS_PER_DOCUMENT", 48)  # as in QUICK
    result = run("evaluate --checkpoint grown --json --batch-size 32")
    assert result.code == 0, result.err
    final = json.loads((trained / "run/summary.json").read_text())["final"]
    losses = {
        name: {key: final[name][key] for key in held}
        for name, held in result.json["losses"].items()
    }
    assert result.json["losses"] == losses and list(losses) == ["past", "new"]
    assert result.json["sequence_length"] == 32 and result.json["benchmarks"] == {}
    (grown / "old_text").symlink_to(trained / "texts/old")
    lineage = json.loads((grown / "grown/tritter.json").read_text())
    text = json.dumps(lineage).replace(str(trained), str(trained / "elsewhere"))
    moved = {key: value for key, value in json.loads(text).items() if key != "record_digest"}
    (grown / "grown/tritter.json").write_text(json.dumps(moved))
    refused = run("evaluate --checkpoint grown")
    assert refused.code == 2 and "pass data with --data PATH" in refused.err
    assert "data.old" not in refused.err and "= null" not in refused.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("model=hf model.path=owner/other", "error: model.path = owner/other: "),
        (
            "--checkpoint owner/other --data data --old-data old",
            "error: --checkpoint = owner/other: ",
        ),
        ("owner/other --data data", "error: --checkpoint = owner/other: "),
        (
            "--find-lr --output deep/er/rates model=hf model.path=owner/other",
            "error: model.path = owner/other: ",
        ),
    ],
)
def test_an_error_of_the_hub_names_the_key_that_was_typed(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch, words: str, named: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = snapshot(texts)
    refused = run(f"train {words} {QUICK}")
    assert refused.code == 2 and snapshot(texts) == before and not Path("deep").exists()
    assert f"{named}no such folder, and HF_HUB_OFFLINE is set" in refused.err


def test_data_is_checked_before_the_hub_is_contacted(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    before = snapshot(texts)
    Path("bad.jsonl").write_text("{not json\n")
    for words in ("--data gone.jsonl", "--data bad.jsonl", "--data data --old-data gone.jsonl"):
        refused = run(f"train owner/other {words} {QUICK}")
        assert refused.code == 2 and words.rpartition(" ")[2] in refused.err
    Path("bad.jsonl").unlink()
    assert snapshot(texts) == before


def test_old_data_of_a_hub_checkpoint_is_missed_once_its_record_is_known(
    run: Run, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_of = lambda *_, **__: str(texts / "base")  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_of)
    before = snapshot(texts)
    refused = run(f"train owner/other --data data {QUICK}")
    assert refused.code == 2 and "--old-data = null: it is required by replay" in refused.err
    assert snapshot(texts) == before

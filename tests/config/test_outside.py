"""A third-party package: the examples of docs/how-to/write_a*.md, found in both ways."""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest

from tests.config.conftest import FakePipeline, Result
from tests.config.test_resume import printed_words
from tests.forked import run_program
from tests.oracle import saved, tiny_llama
from tests.pipeline.tiny import TINY
from tritter.cli import main as tritter
from tritter.conf_folder import config_folder
from tritter.config.folders import SearchPath
from tritter.config.launch.entry import completions
from tritter.config.overrides import unreplayed_overrides
from tritter.pipeline.pipeline import next_commands
from tritter.report.summary import Summary
from tritter.storage.reading import read_object

ROOT = config_folder().parent
TEXTS = [word for word in TINY if word.startswith(("data=", "data.old=", "data.new="))]
SMALL = [
    *(word for word in TINY if word not in TEXTS and not word.startswith("forgetting=")),
    *("pretraining.max_steps=2", "training.max_steps=2"),
]


def write_examples(folder: Path, *, conf: Path) -> None:
    """Write the files shown on the docs page."""
    pages = sorted((ROOT / "docs/how-to").glob("write_a*.md"))
    text = "".join(page.read_text() for page in pages)
    for name, body in re.findall(r"```\w+ file=(\S+)\n(.*?)```", text, re.DOTALL):
        inner = Path(name)
        place = conf / inner.relative_to("conf") if inner.parts[0] == "conf" else folder / inner
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(body)
    (folder / "mine/__init__.py").touch()


def install(folder: Path) -> None:
    """Write the metadata of an installed package with an entry point."""
    record = folder / "mine-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[tritter.config]\nmine = mine:conf\n")


@pytest.fixture(params=["--config-dir", "entry point"])
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """The folder of the package, and the arguments that add its options."""
    folder = tmp_path / "site"
    if request.param == "--config-dir":
        write_examples(folder, conf=tmp_path / "conf")
        return folder, ["--config-dir", str(tmp_path / "conf")]
    write_examples(folder, conf=folder / "mine/conf")
    install(folder)
    return folder, []


def train(outside: tuple[Path, list[str]], *words: str) -> "subprocess.CompletedProcess[str]":
    folder, found_by = outside
    place = folder.parent
    return run_program(
        ROOT / "train.py",
        [*found_by, *words],
        folder=place,
        path=folder,
        environment={"TRITTER_CACHE": str(place / "cache")},
    )


def import_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the classes there importable in this process, without others of the same name."""
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.quick_cases(1)
def test_it_stands_in_the_help(outside: tuple[Path, list[str]]) -> None:
    """The option files as seen by a new process, with few imports."""
    folder, found_by = outside

    def train(*words: str) -> str:
        paths = os.pathsep.join([str(folder), str(ROOT)])
        command = [sys.executable, str(ROOT / "train.py"), *found_by, *words, "--help-all"]
        environment = os.environ | {"PYTHONPATH": paths}
        return subprocess.run(
            command, cwd=folder.parent, capture_output=True, text=True, env=environment, check=True
        ).stdout

    message = train()
    assert re.search(r"    damp +Damp: every gradient", message)
    assert re.search(r"    one_more +The last layer once more", message)
    assert re.search(r"    letters +Made-up letters", message)
    assert re.search(r"    loss_log +Writes step and loss", message)
    message = train("forgetting=damp")
    assert "share: 0.5 # of each gradient that is taken away" in message
    assert "_target_" not in message


GROWTH = (
    *("growth=foam", "growth.trigger={name: narrowest, count: 2}"),
    "growth.initialiser={_target_: mine.growing.Silent}",
)


@pytest.mark.full
def test_a_model_grows_by_a_trigger_and_an_initialiser_from_outside(
    outside: tuple[Path, list[str]],
) -> None:
    run = outside[0].parent / "run"
    done = train(outside, *SMALL, *TEXTS, *GROWTH, "expansion=none", f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    growth = read_object(run / "summary.json")["growth"]
    assert [(event["step"], event["born"]) for event in growth["events"]] == [(1, 2)]
    assert growth["function_change"] < 1e-4
    assert growth["options"]["trigger"]["_target_"] == "mine.growing.Narrowest"
    assert growth["options"]["trigger"]["count"] == 2
    assert len(growth["options"]["initialiser"]["sha256"]) == 64
    wrong = (GROWTH[1].replace("count", "cuont"), GROWTH[2].replace("Silent", "Silnet"))
    refused = train(outside, GROWTH[0], *wrong)
    assert refused.returncode == 2
    assert "growth.trigger.cuont" in refused.stderr and "Did you mean Silent?" in refused.stderr


@pytest.mark.full
@pytest.mark.quick_cases(1)
def test_an_expansion_from_outside_is_a_method_of_the_command(
    outside: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By an entry point, in new processes: a process reads the entry points of its path once."""
    folder, found_by = outside
    base = saved(tiny_llama(), folder.parent / "base")
    monkeypatch.chdir(folder.parent)

    def expand(*words: str) -> "subprocess.CompletedProcess[str]":
        words = ("expand", *found_by, *words)
        if found_by:
            import_from(folder, monkeypatch)
            return subprocess.CompletedProcess(words, tritter(words), *capsys.readouterr())
        paths = os.pathsep.join([str(folder), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-m", "tritter", *words],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
            check=False,
        )

    assert re.search(r"--times +VALUE +one-more: ", expand("--help-all").stdout)
    refused = expand("--checkpoint", "nowhere", "--method", "one-more", "--times", "9")
    assert refused.returncode == 2
    assert "--times = 9: must be" in refused.stderr
    words = ("--checkpoint", str(base), "--method", "one-more", "--times", "2", "--no-measure")
    done = expand(*words, "--output", "grown")
    assert done.returncode == 0, done.stderr
    config = read_object(folder.parent / "grown/config.json")
    assert config["num_hidden_layers"] == tiny_llama().config.num_hidden_layers + 2


def test_an_expansion_with_a_list_among_its_options_is_refused(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples(folder := tmp_path / "site", conf=tmp_path / "conf")
    for path, old, new in (
        (
            folder / "mine/expansion.py",
            "times: Annotated[int, Field(ge=1, le=8)] = 1",
            "times: list[int]",
        ),
        (tmp_path / "conf/expansion/one_more.yaml", "times: 1", "times: [1]"),
    ):
        path.write_text(path.read_text().replace(old, new))
    import_from(folder, monkeypatch)
    result = run("--config-dir", str(tmp_path / "conf"), "expansion=one_more")
    assert result.code == 2 and "annotate a list as tuple" in result.err, result.err


@pytest.mark.full
def test_an_expansion_that_claims_too_much_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_examples(folder := tmp_path / "site", conf=tmp_path / "conf")
    path = folder / "mine/neurons.py"
    path.write_text(path.read_text().replace('fill if reads else Fill("zero")', "fill"))
    saved(tiny_llama(), tmp_path / "base")
    import_from(folder, monkeypatch)
    words = [
        "expand",
        "--config-dir",
        str(tmp_path / "conf"),
        "--checkpoint",
        str(tmp_path / "base"),
    ]
    code = tritter([*words, "--method", "more-neurons", "--output", str(tmp_path / "grown")])
    assert code == 3 and (tmp_path / "grown").is_dir()
    assert "the parameter map of more_neurons is wrong. The result" in capsys.readouterr().err


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["forgetting=dampp"], ["forgetting = dampp", "Did you mean damp?"]),
        (["forgetting=damp", "forgetting.damp.shre=1"], ["Did you mean forgetting.damp.share?"]),
        (["forgetting=damp", "forgetting.damp.share=1"], ["must be a number", "below 1"]),
        (["expansion=one-more", "expansion.one_more.times=9"], ["at most 8"]),
        (
            ["-m", "expansion=one_more,[width,one_more]", "expansion.one_more.times=x"],
            ["expansion.one_more.times = x"],
        ),
        (
            ["forgetting=damp", "forgetting.damp._target_=mine.forgetting.Damq"],
            ["forgetting.damp._target_ = mine.forgetting.Damq", "Did you mean Damp?"],
        ),
        (["forgetting=damp", "forgetting.damp._target_=os.system"], ["not a subclass of"]),
        (["forgetting=damp", "forgetting.damp._target_=nowhere.A"], ["there is no module nowhere"]),
        (["data=lettres"], ["Did you mean letters?"]),
        (["data=letters", "data.num_text=20"], ["Did you mean data.num_texts?"]),
        (["data=letters", "data.num_texts=9"], ["data.num_texts = 9", "at least 10"]),
        (
            ["data=letters", "data.old=x"],
            ["data.old is not a key of mine.sources.Letters. Did you mean: data=text data.old=x"],
        ),
        (
            ["data.num_texts=20"],
            ["data.num_texts requires data=letters. Did you mean: data=letters data.num_texts=20"],
        ),
        (["data=letters", "data._target_=mine.forgetting.Damp"], ["it is not a subclass of"]),
        (["callbacks=loss_logg"], ["Did you mean loss_log?"]),
        (
            ["callbacks=loss_log", "callbacks.loss_log.pth=x"],
            ["Did you mean callbacks.loss_log.path?"],
        ),
        (["callbacks=loss_log", "callbacks.loss_log.every_n_steps=0"], ["every_n_steps must be"]),
        (["callbacks.loss_log.path=x"], ["select it with callbacks=[loss_log]"]),
        (
            ["callbacks=loss_log", "callbacks.loss_log._target_=mine.callbacks.LossLug"],
            ["callbacks.loss_log._target_ = mine.callbacks.LossLug", "Did you mean LossLog?"],
        ),
    ],
)
def test_its_options_are_judged_like_ours(
    outside: tuple[Path, list[str]],
    words: list[str],
    parts: list[str],
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, found_by = outside
    import_from(folder, monkeypatch)
    result = run(*found_by, *words)
    assert result.code == 2, result
    for part in parts:
        assert part in result.err
    assert not (folder.parent / "outputs").exists()


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("new_domains = ('a/b',)", "its domain 'a/b' must be"),
        ("new_domains = ('a',)", "error: Own.old_domains = null: the base"),
        ("record_field: str", "its base class has a member record_field; rename the option"),
    ],
)
def test_an_own_source_is_judged(
    body: str,
    part: str,
    tmp_path: Path,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "from tritter.data.options import DataConfig\nfrom tritter.options import options\n"
    text += f"@options\nclass Own(DataConfig):\n    {body}\n"
    (tmp_path / "own_source.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_source", raising=False)
    result = run("data._target_=own_source.Own", "~data.source")
    assert result.code == 2 and part in result.err, result


@pytest.mark.full
def test_stages_from_outside_run_as_their_page_says(outside: tuple[Path, list[str]]) -> None:
    page, run = (ROOT / "docs/how-to/write_a_stage.md").read_text(), outside[0].parent / "run"
    (words,) = re.findall(r"^PYTHONPATH=. python train.py --config-dir conf (.*)$", page, re.M)
    done = train(outside, *words.split(), *SMALL, *TEXTS, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    results = read_object(run / "summary.json")["stages"]
    assert results["shrink"] == {"share": 0.8} and len(results["drift"]["largest"]) == 3
    stages = read_object(run / "run.json")["fingerprint"]["stages"]
    assert len(stages["shrink"]["sha256"]) == 64 and stages["drift"]["top"] == 3
    assert stages["order"] == ["shrink", "drift"] and "sha256" not in stages["drift"]


@pytest.mark.full
def test_a_run_with_it_goes_on_only_with_the_same_class(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples(folder := tmp_path / "site", conf=tmp_path / "conf")
    outside = folder, ["--config-dir", str(tmp_path / "conf")]
    place = folder.parent / "run"
    words = ("callbacks=loss_log", "callbacks.loss_log.every_n_steps=1", f"hydra.run.dir={place}")
    words = (*words, "data=letters", "expansion=one_more", "forgetting=[replay,damp]")
    done = train(outside, *words, *SMALL)
    assert done.returncode == 0, done.stderr
    lines = (folder.parent / "losses.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    summary = read_object(place / "summary.json")
    assert summary["forgetting"] == ["replay", "damp"]
    assert summary["parameters"]["final"] > summary["parameters"]["baseline"]
    held = read_object(place / "run.json")["fingerprint"]
    assert held["forgetting"]["damp"]["_target_"] == "mine.forgetting.Damp"
    assert len(held["expansion"]["one_more"]["sha256"]) == 64
    assert "_target_" not in held["forgetting"]["replay"]
    assert held["data"]["_target_"] == "mine.sources.Letters"
    assert (held["data"]["num_texts"], len(held["data"]["sha256"])) == (200, 64)
    learned = read_object(place / "checkpoint/tritter.json")["domains"]
    assert learned["recipes"]["origin"] == "mine.sources.Letters"
    assert learned["letters"]["num_documents"] == 200
    # Without the source, the location of its data is unknown
    import_from(folder, monkeypatch)
    message = run(*outside[1], "model=hf", f"model.path={place}/checkpoint").err
    assert "letters can't be used: its paths were not recorded" in message
    logs = held["callbacks"]["loss_log"]
    assert logs["_target_"] == "mine.callbacks.LossLog"
    assert (logs["every_n_steps"], len(logs["sha256"])) == (1, 64)
    # The run records its search path; a user who trusts it types the command
    typed = printed_words(run(f"resume={place}").err)
    assert typed[:5] == [f"--config-dir={tmp_path / 'conf'}", *words[:2], *words[3:5]]
    assert "This run is finished" in run(*typed).out
    with (folder / "mine/forgetting.py").open("a") as file:
        file.write("\n# another class by now\n")
    refused = run(*typed)
    assert refused.code == 2
    assert "forgetting.damp.sha256" in refused.err


def test_what_stands_twice_or_elsewhere_is_refused(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    write_examples(tmp_path / "site", conf=tmp_path / "conf")
    found_by = ("--config-dir", str(tmp_path / "conf"))
    mine = tmp_path / "conf/forgetting/damp.yaml"
    mine.with_name("other.yaml").write_text(mine.read_text())
    assert "forgetting=other" in run(*found_by, "seed=1").err
    mine.with_name("other.yaml").rename(mine.with_name("ewc.yaml"))
    refused = run(*found_by, "seed=1")
    assert refused.code == 2
    assert "already defines this option" in refused.err
    assert "no such folder" in run("-cd", "nowhere").err


def test_a_config_of_ones_own_composes(tmp_path: Path) -> None:
    write_examples(tmp_path / "site", conf=tmp_path / "conf")
    outside = tmp_path / "site", ["--config-dir", str(tmp_path / "conf")]
    message = train(outside, "--config-name", "my_run", "--cfg", "job").stdout
    assert "_target_: mine.forgetting.Damp" in message
    assert "max_steps: 20" in message


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the package's options, with importable classes."""
    write_examples(tmp_path / "site", conf=tmp_path / "conf")
    import_from(tmp_path / "site", monkeypatch)
    return tmp_path / "conf"


SPELLINGS = [
    "[conf]",
    "['{place}/conf']",
    "[file://conf]",
    "[file://{place}/conf]",
    "[pkg://mine.conf]",
]


@pytest.mark.full
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_hydras_own_spelling_finds_the_same_options(
    conf: Path, run: Callable[..., Result], pipeline: FakePipeline, spelling: str
) -> None:
    shutil.copytree(conf, conf.parent / "site/mine/conf")
    place = conf.parent / ("site/mine/conf" if "pkg" in spelling else "conf")
    word = "hydra.searchpath=" + spelling.format(place=conf.parent)
    words = ["forgetting=[replay,damp]", "expansion=one_more", "seed=1"]
    failed = run(*words, word, "hydra.run.dir=one")
    assert failed.code == 1 and run("-cd", str(place), *words, "hydra.run.dir=two").code == 1
    assert pipeline.configs[0] == pipeline.configs[1]
    assert printed_words(failed.err)[0] == f"--config-dir={place}"
    assert run(*printed_words(failed.err)).code == 1  # "Resume with:"
    refused = run("resume=one")  # what is recorded is not searched
    assert refused.code == 2 and printed_words(refused.err)[0] == f"--config-dir={place}"
    assert run("resume=one", word, *words).code == 1
    # Help, refusals, completion, sweeps and the other program see the same
    assert "share: 0.5 # of each" in run(word, "forgetting=damp", "--help").out
    assert "Did you mean damp?" in run(word, "forgetting=dampp").err
    assert completions([word, "forgetting=da"]) == ["forgetting=damp"]
    assert run("-m", word, "forgetting=damp,none", "hydra.sweep.dir=sweep").code == 0
    assert [len(config.forgetting) for config in pipeline.configs[-2:]] == [1, 0]
    assert run("-cn", "my_run", word, "--cfg", "job").code == 0
    assert "checkpoint = nowhere" in run_tritter(f"train --checkpoint nowhere {word} --data x")


def run_tritter(words: str) -> str:
    """Return the error output of a `tritter` command."""
    with redirect_stderr(io.StringIO()) as errors:
        tritter(words.split())
    return errors.getvalue()


def test_no_option_file_extends_the_search_path(conf: Path, run: Callable[..., Result]) -> None:
    text = (conf / "my_run.yaml").read_text()
    (conf / "my_run.yaml").write_text(f"{text}\nhydra:\n  searchpath: [file://{conf}/other]\n")
    refused = run("-cd", "conf", "-cn", "my_run")
    assert refused.code == 2 and "hydra.searchpath=[DIR] or --config-dir DIR" in refused.err


@pytest.mark.full
@pytest.mark.parametrize("found_by", [["-cd", "conf"], ["--config-dir=conf", "-cn=my_run"]])
def test_commands_that_are_printed_find_the_same_options(
    conf: Path, run: Callable[..., Result], pipeline: FakePipeline, found_by: list[str]
) -> None:
    words = ["forgetting=[replay,damp]", "expansion=one_more", "seed=1"]
    failed = run(*found_by, *words, "hydra.run.dir=one")
    again = run(*printed_words(failed.err))  # "Resume with:"
    assert (failed.code, again.code, len(pipeline.configs)) == (1, 1, 2), again.err
    assert replace(pipeline.configs[1], resume=None) == pipeline.configs[0]
    name = "my_run" if len(found_by[1:]) and "my_run" in found_by[1] else None
    with SearchPath.of([str(conf)], name).in_use():
        plain = {"status": "kept", "domains": {}, "baseline": {}, "attempts": []}
        summary = Summary.of(plain)
        folder = conf.parent / "one"
        lines = next_commands(
            pipeline.configs[0], summary, overrides=words, folder=folder, rate=1e-3
        )
    assert "control=true" in lines[0]
    pasted = run(*printed_words(lines[0].partition("   #")[0]), "hydra.run.dir=two")
    assert pasted.code == 1, pasted.err
    grown, control = pipeline.configs[0], pipeline.configs[2]
    assert control.control and control.training == grown.training
    assert [one.name for one in control.forgetting] == ["replay", "damp"]
    # Overrides that are not replayed must be typed; they find the same options
    target = "forgetting.damp._target_=mine.forgetting.Damp"
    assert run(*found_by, *words, target, "hydra.run.dir=three").code == 1
    refused = run("resume=three")
    assert refused.code == 2
    assert run(*printed_words(refused.err)).code == 1


@pytest.mark.full
def test_a_folder_that_was_moved_is_named_again(
    conf: Path, run: Callable[..., Result], pipeline: FakePipeline
) -> None:
    assert run("-cd", "conf", "forgetting=damp", "seed=1", "hydra.run.dir=one").code == 1
    conf.rename(conf.with_name("moved"))
    assert f"--config-dir={conf}" in run("resume=one").err
    refused = run("resume=one", "-cd", "moved")  # an option that Tritter does not ship
    words = printed_words(refused.err)
    assert words[:2] == [f"--config-dir={conf.with_name('moved')}", "forgetting=damp"]
    assert run(*words).code == 1
    assert len(pipeline.configs) == 2


TWO = """# Two at once
rate:
  _target_: lightning.pytorch.callbacks.LearningRateMonitor
log:
  _target_: mine.callbacks.LossLog
  path: losses.txt
"""


@pytest.mark.full
def test_one_file_may_hold_several_callbacks_or_loggers(
    conf: Path, run: Callable[..., Result], pipeline: FakePipeline
) -> None:
    (conf / "callbacks/both.yaml").write_text(TWO)
    (conf / "callbacks/again.yaml").write_text(TWO.replace("rate:", "other:"))
    (conf / "callbacks/flat.yaml").write_text("# Flat\n_target_: mine.callbacks.LossLog\n")
    (conf / "logger").mkdir()
    csv = "_target_: lightning.pytorch.loggers.CSVLogger\n  save_dir: csv"
    (conf / "logger/two.yaml").write_text(f"# Two\none:\n  {csv}/1\ntwo:\n  {csv}/2\n")
    words = ("callbacks=[lr_monitor,both]", "callbacks.log.every_n_steps=3", "logger=two")
    assert run("-cd", "conf", *words).code == 0
    (config,) = pipeline.configs
    assert [one.name for one in config.callbacks] == ["lr_monitor", "rate", "log"]
    assert config.callbacks[2].arguments == {"path": "losses.txt", "every_n_steps": 3}
    assert [one.name for one in config.logger] == ["one", "two"]
    for word, message in (
        ("callbacks=[both,again]", "both and again both define log; leave one out"),
        ("callbacks=both callbacks.both.path=x", "both defines rate, log; write the key below one"),
        ("callbacks=flat", "write it below a name, callbacks.NAME._target_"),
    ):
        refused = run("-cd", "conf", *word.split())
        assert refused.code == 2 and message in refused.err, refused.err


def test_a_name_from_outside_is_not_replayed(tmp_path: Path) -> None:
    write_examples(tmp_path / "site", conf=tmp_path / "conf")
    words = ["growth.trigger={name:narrowest,count:2}", "growth.initialiser=silent"]
    with SearchPath.of([str(tmp_path / "conf")], None).in_use():
        assert unreplayed_overrides([*words, "growth.trigger=plateau"]) == words


_FROM_PYTHON = """
import torch, tritter
from tests.oracle import relative_difference, saved, stock, tiny_llama, tokens
from tritter.core.families import family_of
from transformers import SeedOssConfig, SeedOssForCausalLM

model = tiny_llama()
for method in ("gpt2", "llama"):
    from tests.oracle.families import tiny
    old = tiny(method)
    grown = tritter.expand(old, "more-neurons", neurons=5)
    assert grown.num_parameters() > old.num_parameters()
    assert relative_difference(old, grown, tokens()) < 1e-5
assert tritter.expand(model, "one_more", times=2).config.num_hidden_layers == 5
folder = tritter.expand(saved(model, "base"), ["more_neurons", tritter.Width()], output="grown")
assert relative_difference(model, stock(folder), tokens()) < 1e-4
try:
    tritter.expand(model, "more_neurons", neurns=5)
except ValueError as error:
    assert "Did you mean neurons?" in str(error), error
from mine.neurons import MoreNeurons
assert tritter.expand(model, MoreNeurons(neurons=5)).config.intermediate_size == 45

grown = tritter.grow(tiny_llama(), "narrowest", initialiser="silent", growth_cooldown=1)
optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
grown(input_ids=tokens(), labels=tokens()).loss.backward()
optimizer.step()
before = grown(input_ids=tokens()).logits
assert grown.check_and_grow()["born"] == 1
assert torch.allclose(grown(input_ids=tokens()).logits, before, atol=1e-4)

sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
torch.manual_seed(0)
seed = SeedOssForCausalLM(
    SeedOssConfig(**sizes, vocab_size=97, num_key_value_heads=2, head_dim=6, pad_token_id=0)
).eval()
with torch.no_grad():
    for parameter in seed.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
for method in ("width", "llama_pro", "more_neurons"):
    assert relative_difference(seed, tritter.expand(seed, method), tokens()) < 1e-4
folder = tritter.expand(saved(seed, "seed"), "width", output="seed-width")
assert relative_difference(seed, stock(folder), tokens()) < 1e-4
assert relative_difference(seed, tritter.load(folder), tokens()) < 1e-4
"""


@pytest.mark.full
def test_an_installed_package_is_found_from_python(tmp_path: Path) -> None:
    """An expansion with its own map, a trigger, an initialiser and a family, by their names."""
    folder = tmp_path / "site"
    write_examples(folder, conf=folder / "mine/conf")
    install(folder)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", _FROM_PYTHON],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr

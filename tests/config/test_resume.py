"""resume=latest and resume=DIR: overrides of the run are replayed, harmful ones are not."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import FakePipeline, Result
from tritter.checkpoints.record import LedgerRecord
from tritter.conf_folder import config_folder
from tritter.config import components
from tritter.config.components import known_keys
from tritter.config.folders import body_of, shipped_options
from tritter.config.launch import plan
from tritter.config.overrides import unreplayed_overrides
from tritter.config.run_folder import RunRecord, fingerprint
from tritter.config.schema import TYPED_ONLY
from tritter.data import options
from tritter.options import leaves
from tritter.storage import atomic
from tritter.storage.records import signed_text
from tritter.training.options import _REFUSED, _trainer_parameters

Run = Callable[..., Result]
ROOT = config_folder().parent
JOB = ("seed=1", "expansion=dus", "expansion.dus.target_layers=4", "training.max-steps=7")


def printed_words(text: str) -> list[str]:
    """Return the arguments of the last printed command, without the program."""
    line = next(line for line in reversed(text.splitlines()) if "train.py " in line)
    return shlex.split(line[line.index("train.py ") + len("train.py ") :])


def edit(folder: Path, **changes: Any) -> None:
    """Change a run file like an attacker who recomputes its checksum."""
    plain = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(signed_text({**plain, **changes}))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("resume", ["latest", "outputs/runs/one", "'outputs/runs/one'"])
def test_alone_it_goes_on_with_what_was_typed(
    run: Run, pipeline: FakePipeline, tmp_path: Path, resume: str
) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    again = run(f"resume={resume}")
    assert again.code == 1 and len(pipeline.configs) == 2
    folder = tmp_path / "outputs/runs/one"
    assert pipeline.folders == [folder, folder]
    assert pipeline.configs[1].expansion == pipeline.configs[0].expansion
    assert pipeline.configs[1].training == pipeline.configs[0].training
    words = ("seed=1", "expansion=dus", "expansion.dus.target_layers=4", "training.max_steps=7")
    assert again.out.startswith(f"resume     {folder}: {' '.join(words)}\n")
    record = RunRecord.read(folder)
    assert record.overrides == words and record.program.endswith("train.py")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        ["seed=1", "expansion=dus"],
        ["expansion.dus.target_layers=4"],
        ["logger=csv", "cache_dir=elsewhere", "trainer.devices=1", "trainer.progress=off"],
        ["trainer.save_every_n_steps=3", "training.max_steps=7.0"],
    ],
)
def test_what_is_the_same_or_does_not_count_may_be_typed(run: Run, words: list[str]) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    assert run("resume=latest", *words).code == 1
    assert len(RunRecord.read(Path("outputs/runs/one")).overrides) == 4


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("seed=5", "seed: 1 → 5"),
        ("expansion=llama_pro", "expansion.methods: [dus] → [llama_pro]"),
        ("expansion.dus.target_layers=6", "expansion.dus.target_layers: 4 → 6"),
        ("training=quick", "training.max_steps: 7 → "),
        ("~forgetting", "forgetting.methods: "),
    ],
)
def test_what_differs_is_refused_with_a_command_that_works(
    run: Run, word: str, change: str
) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one", "training=default").code == 1
    Path("outputs/runs/one/ledger.json").touch()
    refused = run("resume=latest", word)
    assert refused.code == 2 and change in refused.err
    again = run(*printed_words(refused.err))
    assert again.code == 1 and "not finite 10 times" in again.err  # the message of the run itself


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("words", [("resume=one",), (*JOB[1:], "hydra.run.dir=one")], ids=str)
def test_a_corrected_key_resumes_until_a_stage_has_finished(
    run: Run, pipeline: FakePipeline, words: tuple[str, ...]
) -> None:
    failed = run(*JOB, "hydra.run.dir=one")
    assert failed.code == 1 and "keys may change, as no stage has finished" in failed.err
    trained = Path("one/pretraining/saved")
    trained.mkdir(parents=True)
    run("resume=one")
    assert trained.exists()
    assert run(*words, "seed=5").code == 0
    assert pipeline.configs[-1].seed == 5 and pipeline.folders[-1] == pipeline.folders[0]
    assert not trained.exists()  # else the new base would continue from weights of seed 1
    record = RunRecord.read(Path("one"))
    assert record.fingerprint["seed"] == 5 and "seed=5" in record.overrides
    assert run(*words, "seed=6").code == 2  # it is finished


def test_a_run_that_was_killed_while_it_wrote_its_first_record_starts_again(
    run: Run,
) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    folder = Path("one")
    folder.mkdir()
    (folder / f".run.json.{atomic._host()}-{dead.pid}.abcdefgh").write_text("half")
    assert run(*JOB[1:], "hydra.run.dir=one").code == 0
    assert list(folder.glob(".run*")) == []
    Path("two").mkdir()
    Path("two/run.json.notes").write_text("mine")
    refused = run(*JOB[1:], "hydra.run.dir=two")
    assert refused.code == 2 and "is not a Tritter run" in refused.err


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("status", ["running", "interrupted", "kept"])
def test_only_a_failed_run_takes_a_changed_key(run: Run, status: str) -> None:
    run(*JOB, "hydra.run.dir=one")
    path = Path("one/status.json")
    path.write_text(signed_text({**json.loads(path.read_text()), "status": status}))
    assert run("resume=one", "seed=5").code == 2


CODE = ("evaluation.allow_code=[humaneval]", "evaluation.tasks=[humaneval]")
EXTERNAL = ("evaluation.code_sandbox=external", "evaluation.code_sandbox_command='sh -c \"a b\"'")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        ["hydra.verbose=true"],
        ["cache_dir='else where'"],
        ["logger.wandb.mode=offline", "logger.wandb.project=mine"],
        ["+logger.own={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '$HOME a'}"],
        [
            "callbacks=model_checkpoint",
            "callbacks.model_checkpoint.every_n_train_steps=2",
            "callbacks.model_checkpoint.filename='{step}'",
        ],
        ["+callbacks.x._target_=lightning.pytorch.callbacks.LearningRateMonitor"],
        ["training.learning_rate=${pretraining.learning_rate}"],
        [*CODE, *EXTERNAL],
    ],
    ids=str,
)
def test_what_is_not_replayed_is_printed_whole_and_works_when_typed(
    run: Run, pipeline: FakePipeline, words: list[str]
) -> None:
    first = run(*JOB, *words, "hydra.run.dir=outputs/runs/one")
    assert first.code == 1, first.err
    assert run(*printed_words(first.err)).code == 1  # "Resume with:"
    refused = run("resume=latest")
    assert refused.code == 2 and refused.out == "" and len(pipeline.configs) == 2
    again = run(*printed_words(refused.err))
    assert again.code == 1 and len(pipeline.configs) == 3, again.err
    resumed = replace(pipeline.configs[2], resume=None)
    assert resumed == pipeline.configs[0] == replace(pipeline.configs[1], resume=None)
    more = run("resume=latest", "trainer.progress=off")
    assert more.code == 2 and "trainer.progress=off" in printed_words(more.err)
    typed = run("resume=latest", *words)
    assert typed.code == 1, typed.err


HOSTILE = [
    *CODE[:1],
    *EXTERNAL,
    "training._target_=os.system",
    "optimizer={_target_: os.system}",
    "optimizer.name=SGD",
    "optimizer.betas=[{_target_: os.system}]",
    "growth.trigger={_target_: os.system, command: id}",
    "experts.detector={name: {_target_: os.system}}",
    "data._target_=os.system",
    "data.new={a: {_target_: os.system}}",
    "data.new='${oc.env:HOME}'",
    "data.new.code='${oc.env:HOME}'",
    "data.new._target_=os.system",
    "data.streaming.code=a.txt",
    "data.new={'${oc.env:HOME}': x}",
    "callbacks.early_stopping={_target_: os.system}",
    "callbacks.early_stopping.monitor._target_=os.system",
    "callbacks.model_checkpoint.dirpath=/tmp",
    "callbacks.model_checkpoint.filename=../../../x",
    "callbacks@optimizer=early_stopping",
    "seed@gate=1",
    "expansion=/etc/passwd",
    "expansion=../expansion/dus",
    "expansion=[dus,{a: b}]",
    "expansion=damp",
    "gate.ladder=mine",
    "hydra/launcher=submitit_local",
    "hydra.run.dir=/tmp/x",
    "hydra.searchpath=[file:///tmp/conf]",
    "++hydra.job_logging.handlers.x.class=os.system",
    "logger.wandb.project=${oc.env:HOME}",
    "logger.wandb.mode=online",
    "+logger.wandb.entity=me",
    "logger.mlflow.tracking_uri=http://host",
    "logger.mlflow.save_dir=/tmp",
    "logger.tensorboard.name=../../..",
    "cache_dir=/tmp/cache",
    "forgetting.distill.teacher=owner/name",
    "expansion.moe_add.teacher=/tmp",
    "training.max-steps=7",
    "training.new_key=1",
    "seed=1,2",
    "seed=range(0,1000000000000)",
    "training=glob(*)",
    "--config-dir=/tmp/conf",
    "--config-name=mine",
    "-m",
    "",
]


@pytest.mark.full
def test_a_folder_from_elsewhere_names_no_code(run: Run, pipeline: FakePipeline) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    assert unreplayed_overrides(HOSTILE) == HOSTILE
    for word in HOSTILE[::3]:
        edit(Path("outputs/runs/one"), overrides=["seed=1", word])
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        refused = run("resume=outputs/runs/one")
        assert refused.code == 2 and refused.out == "" and len(pipeline.configs) == 1, word
        assert "was started with" in refused.err and word in printed_words(refused.err)
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


SPELLINGS = [
    *("{conf}", "outputs/runs/conf", "{run}/../conf", "/proc/self/cwd/outputs/runs/conf"),
    *("./outputs/runs/conf", "/proc/self/root{conf}", "//{conf}", "{conf}/."),
]


def test_a_folder_beside_the_run_names_no_code(
    run: Run, pipeline: FakePipeline, tmp_path: Path
) -> None:
    """A nested class in an option there would be called during validation."""
    folder, mark = Path("outputs/runs/one"), tmp_path / "executed"
    assert run(*JOB, f"hydra.run.dir={folder}").code == 1
    (tmp_path / "outputs/runs/conf/callbacks").mkdir(parents=True)
    (tmp_path / "outputs/runs/conf/callbacks/x.yaml").write_text(
        "# X\nx:\n  _target_: lightning.pytorch.callbacks.LearningRateMonitor\n"
        f"  logging_interval: {{_target_: os.system, command: 'touch {mark}'}}\n"
    )
    for spelling in SPELLINGS:
        named = spelling.format(conf=tmp_path / "outputs/runs/conf", run=tmp_path / folder)
        edit(folder, overrides=["seed=1", "callbacks=x"], config_folders=[named])
        refused = run(f"resume={folder}")
        assert refused.code == 2 and not mark.exists() and len(pipeline.configs) == 1, named
        words = printed_words(refused.err)
        assert words[:3] == [f"--config-dir={Path(named)}", "seed=1", "callbacks=x"]
    # Negative control: typed by somebody who trusts it, it is executed
    assert run(*words).code == 2 and mark.exists()


@pytest.mark.full
def test_no_recorded_folder_is_searched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    Path("outputs/runs/one", LedgerRecord.FILE_NAME).write_text("{}")  # a stage has finished
    searched, search = set[Path](), Path.rglob

    def noted(self: Path, pattern: str) -> Iterator[Path]:
        searched.add(self)
        return search(self, pattern) if self != Path("/") else iter(())

    monkeypatch.setattr(Path, "rglob", noted)
    for name in ("config", "mine", "../../x", "a b"):
        edit(Path("outputs/runs/one"), config_folders=["/"], config_name=name)
        for words in (["resume=outputs/runs/one"], ["seed=2", "hydra.run.dir=outputs/runs/one"]):
            refused = run(*words)
            assert refused.code == 2 and "--config-dir=/" in printed_words(refused.err)
        edit(Path("outputs/runs/one"), config_folders=[], config_name=name)
        refused = run("resume=outputs/runs/one")
        assert refused.code == (1 if name == "config" else 2)
        assert name == "config" or printed_words(refused.err)[0] == f"--config-name={name}"
    assert searched and Path("/") not in searched


ORDINARY = [
    "experiment=lora_experts experts.rank=4 experts.detector={name:cosine,threshold:0.8}",
    "experiment=small_deep_wide ~experiment training.warmup_ratio=0.1 pretraining.max_tokens=100k",
    "expansion=[llama_pro,width] expansion.llama_pro.positions=[1] expansion.width.hidden_size=72",
    "expansion=stack expansion.stack.partial=true expansion.stack.target_layers=5",
    "expansion=moe expansion.moe.num_experts=4 moe_routing.z_loss=0.01",
    "forgetting=[ewc,replay] forgetting.ewc.at=expanded forgetting.replay.weights={prose:2}",
    "forgetting=[freeze,distill] forgetting.freeze.layers=[0] forgetting.distill.rows=new",
    "~forgetting forgetting=none ~expansion",
    "growth=foam growth.trigger={name:schedule,at:[50,100]} expansion=none",
    "trainer=auto +trainer.accumulate_grad_batches=2 trainer.deterministic=true trainer=cpu",
    "control=true gate=strict gate.retention=0.1 gate.ladder=gentler gate.max_attempts=2",
    "gate.ladder=null gate=off pipeline.max_rounds=1 pipeline.target_params=300k",
    "callbacks=[early_stopping,ema] callbacks.early_stopping.monitor=eval/code/loss",
    "logger=[csv,wandb] logger.wandb.tags=[a,b] logger.wandb.group=null",
    "optimizer=sgd optimizer.momentum=0.8",
    "data=skills data.old={prose:stdlib:prose} data.tasks=[[sorting],[json_format]]",
    "evaluation.tasks=[piqa] evaluation.task_limit=3 evaluation.tasks_path=.",
    "model=small model.num_hidden_layers=2 +seed=1",
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("command", ORDINARY)
def test_an_ordinary_run_is_resumed_by_resume_alone(
    run: Run, pipeline: FakePipeline, command: str
) -> None:
    first = run(*command.split(), "seed=1", "hydra.run.dir=outputs/runs/one")
    assert first.code == 1, first.err
    again = run("resume=latest")
    assert again.code == 1, again.err
    before, after = map(fingerprint, pipeline.configs)
    assert before == after


@pytest.mark.full
@pytest.mark.parametrize("words", [["seed=1", "expansion=dus,stack"], ["experiment=ablation"]])
def test_a_job_of_a_sweep_is_resumed_by_itself(
    run: Run, pipeline: FakePipeline, words: list[str]
) -> None:
    run("-m", *words, "seed=1", "hydra.sweep.dir=sweep")
    count = len(pipeline.configs)
    again = run("resume=sweep/1")
    assert again.code == 1 and len(pipeline.configs) == count + 1, again.err
    assert pipeline.configs[-1].expansion == pipeline.configs[1].expansion


# Keys that name a program, a class, a place or an account, and what starts another run
NEVER_REPLAYED = {
    *("cache_dir", "resume", "optimizer.name", "logger.wandb.mode"),
    *("evaluation.allow_code", "evaluation.code_sandbox", "evaluation.code_sandbox_command"),
    "evaluation.prompts",
    *("expansion.moe_add.teacher", "expansion.vocab.tokenizer", "forgetting.distill.teacher"),
    *("expansion.moe.experts_from", "expansion.moe.attention_from"),
    *("callbacks.model_checkpoint.dirpath", "callbacks.model_checkpoint.filename"),
    *("logger.mlflow.save_dir", "logger.mlflow.tracking_uri", "logger.tensorboard.save_dir"),
    *("logger.tensorboard.name", "logger.tensorboard.version"),
}
# Words in names of keys that may hold a program, a place or an account, and those that do not
SUSPECT = re.compile(
    r"[._](path|dir|file|folder|command|code|uri|url|host|token|entity|teacher|from|name|server|"
    r"endpoint|registry|plugins?|config|script)$"
)
PLAIN = {
    *("model.path", "evaluation.tasks_path", "logger.mlflow.experiment_name"),
    *("expansion.moe_add.clone_from", "expansion.moe.experts_per_token"),
    "callbacks.model_checkpoint.auto_insert_metric_name",
}


@pytest.mark.full
def test_every_key_but_some_is_replayed() -> None:
    keys = {*known_keys(), *PLAIN, *NEVER_REPLAYED, "optimizer.betas"}
    keys |= {f"trainer.{name}" for name in _trainer_parameters() if name not in _REFUSED}
    for group in shipped_options().keys() - {"experiment", "ladder"}:
        for path in shipped_options()[group].values():
            keys |= {key for key, value in leaves(body_of(path), group).items() if value != {}}
    keys = {key for key in keys if not key.endswith("._target_")}
    assert TYPED_ONLY == NEVER_REPLAYED
    assert {key for key in keys - NEVER_REPLAYED if SUSPECT.search(key)} == PLAIN
    documented = (ROOT / "docs/how-to/resume.md").read_text(encoding="utf-8")
    assert [key for key in NEVER_REPLAYED if f"`{key}`" not in documented] == []
    domains = {f"data.{name}.code" for name in ("old", "new", "weights")}
    for key in keys | domains | {"training.new_key", "new_key", "data._target_", "trainer.plugins"}:
        values = ("null", "gentler") if key == "gate.ladder" else ("null", "1", "a", "[a,b]")
        words = [f"+{key}=null", f"++{key}=null", *(f"{key}={value}" for value in values)]
        is_replayed = key in (keys | domains) - NEVER_REPLAYED
        assert unreplayed_overrides(words) == ([] if is_replayed else words)
        referring = [f"{key}=${{seed}}", f"{key}={{_target_: os.system}}", f"{key}=1,2"]
        assert unreplayed_overrides(referring) == referring


def test_every_shipped_option_is_replayed_and_no_other() -> None:
    for group in shipped_options().keys() - {"ladder"}:
        names = [*shipped_options()[group]]
        words = [f"{group}={name}" for name in names] + [
            f"{group}=[{','.join(names)}]",
            f"~{group}",
        ]
        assert unreplayed_overrides(words) == []
        wrong = [
            f"{group}=null",
            f"{group}=mine",
            f"{group}=[{names[0]},mine]",
            f"{group}={{a: b}}",
        ]
        wrong += [f"{group}=../{group}/{names[0]}", f"~{group}={names[0]}", f"{group}@x={names[0]}"]
        assert unreplayed_overrides(wrong) == wrong


def test_sources_are_printed_before_they_are_opened(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    words = ["model=hf", f"model.path={tmp_path}/base", "data=text", "data.new=[secret]"]
    edit(Path("outputs/runs/one"), overrides=[*words, "evaluation.tasks_path=tasks"])
    seen: list[str] = []
    monkeypatch.setattr(plan, "say", lambda text, **_: seen.append(text))
    place, sources = components.checkpoint_location, options.read_sources
    monkeypatch.setattr(
        components, "checkpoint_location", lambda p: seen.append("model") or place(p)
    )
    monkeypatch.setattr(
        options, "read_sources", lambda *a, **o: seen.append("data") or sources(*a, **o)
    )
    assert run("resume=latest").code == 2  # there is no such folder
    assert seen[0].endswith(f"one: {' '.join(words)} evaluation.tasks_path=tasks")
    assert {"model", "data"} <= {*seen[1:]}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": None},
        {"overrides": "seed=1"},
        {"overrides": [1]},
        {"overrides": ["seed=\x1b[2J"]},
        {"overrides": ["no override"]},
        {"overrides": ["seed=1,2"]},
        {"overrides": ["resume=/etc"]},
        {"fingerprint": []},
        {"fingerprint": {}},
        {"status": "published"},
        {"left": {"/etc/passwd": "0"}, "status": "finished"},
        {"left": {"../../x": "0"}, "status": "finished"},
        {"left": ["checkpoint"]},
        {"program": ["rm"]},
        {"format_version": 3},
    ],
    ids=str,
)
def test_a_run_file_of_other_types_is_refused(run: Run, changes: dict[str, Any]) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    edit(Path("outputs/runs/one"), **changes)
    refused = run("resume=outputs/runs/one")
    assert refused.code == 2 and "Traceback" not in refused.err and "\x1b" not in refused.err
    assert refused.err.endswith("Nothing was written.\n")


def test_latest_skips_what_is_no_run_and_says_which_it_takes(run: Run, tmp_path: Path) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/old").code == 1
    for name, text in (("torn", "{"), ("older_format", '{"format_version": 1}')):
        assert run(*JOB, f"hydra.run.dir=outputs/runs/{name}").code == 1
        Path(f"outputs/runs/{name}/run.json").write_text(text)
    Path("outputs/runs/notes").mkdir()
    Path("outputs/runs/pipe").mkdir()
    os.mkfifo("outputs/runs/pipe/run.json")
    ended = run("resume=latest")
    assert ended.code == 1
    runs = tmp_path / "outputs/runs"
    assert f"resume     {runs / 'old'}: seed=1" in ended.out
    for name in ("torn", "older_format", "pipe"):
        assert f"resume     skipped {runs / name}: " in ended.out
    (runs / "old/run.json").unlink()
    refused = run("resume=latest")
    assert refused.code == 2 and str(runs / "torn/run.json") in refused.err


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "a=b", "[x]", "{y}", "$HOME", "-m", "1e5", "a,b", "ä"]
)
def test_the_command_that_is_printed_works_for_any_name(
    run: Run, pipeline: FakePipeline, tmp_path: Path, name: str
) -> None:
    quoted = "'" + name.replace("'", "\\'") + "'"
    first = run("seed=1", f"hydra.run.dir={quoted}")
    assert first.code == 1, first.err
    again = run(*printed_words(first.err))
    assert again.code == 1, again.err
    assert pipeline.folders == [tmp_path / name] * 2


def test_it_is_for_the_command_line_alone(run: Run) -> None:
    assert run("seed=1", "hydra.run.dir=one").code == 1
    both = run("resume=one", "hydra.run.dir=two")
    assert both.code == 2 and "hydra.run.dir" in both.err
    assert run("-m", "resume=one", "seed=1,2").code == 2
    assert run("resume=two").code == 2


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("place", [".hydra/config.yaml", "train.log", "attempt_1", "scores/x.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_run_folder_that_leads_elsewhere_is_refused(
    run: Run, tmp_path: Path, place: str, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("years of work")
    folder = tmp_path / "run"
    assert run("seed=1", f"hydra.run.dir={folder}").code == 1
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / ("thesis" if kind == "link" else "new"))
    result = run("seed=1", f"hydra.run.dir={folder}")
    assert result.code == 2
    assert path.name in result.err and "hydra.run.dir" in result.err
    assert [p.name for p in outside.iterdir()] == ["thesis"]
    assert (outside / "thesis").read_text() == "years of work"


def test_links_of_wandb_to_its_own_logs_are_its_own(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("seed=1", f"hydra.run.dir={folder}").code == 1
    (folder / "wandb/offline-run/logs").mkdir(parents=True)
    (folder / "wandb/offline-run/logs/debug-core.log").symlink_to(tmp_path / "cache.log")
    assert run("seed=1", f"hydra.run.dir={folder}").code == 1
    (folder / "wandb").rename(tmp_path / "elsewhere")
    (folder / "wandb").symlink_to(tmp_path / "elsewhere")
    assert run("seed=1", f"hydra.run.dir={folder}").code == 2

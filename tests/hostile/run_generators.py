"""Generators of damaged runs, sweeps, data and benchmarks."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.hostile import values
from tests.hostile.case import Case
from tests.hostile.generators import KEYS, damage_file
from tests.hostile.sandbox import EXECUTED, Sandbox, special
from tests.hostile.templates import RUNS, SMALL_RUN
from tritter.storage.records import signed_text


def runs(rng: random.Random, sandbox: Sandbox) -> Case:
    """Run folders in which something was changed, resumed: grown, neuron by neuron, of experts."""
    name = rng.choice(("finished", "unfinished", "unfinished", "neurons", "neurons", *_SKILLED))
    folder = sandbox.take(name, "run")
    story = _changed(rng, folder, sandbox)
    words = [*RUNS[name], f"cache_dir={sandbox.templates / 'cache'}", "hydra.run.dir=run"]
    words = [word.replace("texts/", f"{sandbox.templates / 'texts'}/") for word in words]
    words = [word.replace("every_n_steps=1", "every_n_steps=0") for word in words]  # it is quicker
    if rng.random() < 0.4:
        words[-1] = "resume=run"  # with all that is not replayed of what templates are made with
    return Case(f"{name}: {story}", "train.py", tuple(words), ("inside/run",))


def resumptions(rng: random.Random, sandbox: Sandbox) -> Case:
    """Run folders that come from elsewhere: their record names code, folders and servers."""
    name = rng.choice(("outputs/runs/one", "run"))
    folder = sandbox.take(rng.choice(("finished", "unfinished")), name)
    sandbox.take("texts")
    conf = sandbox.inside / rng.choice((f"{name}/conf", f"{name}-conf", "conf"))
    command = f"touch {sandbox.root / EXECUTED}"
    _write_evil_options(conf, command, has_shadow=rng.random() < 0.3)
    (sandbox.inside / "link").symlink_to(conf)
    near = os.path.relpath(conf, sandbox.inside)
    places = (str(conf), near, f"./{near}", f"{folder}/../{near}", f"/proc/self/cwd/{near}")
    places += (f"/proc/self/root{conf}", f"//{conf}", f"{conf}/.", "link", "/", "/etc", "..", "~")
    record = json.loads((folder / "run.json").read_text())
    sound = [word for word in record["overrides"] if not word.startswith("cache_dir")]
    words = rng.sample(sound, rng.choice((0, 2, len(sound))))
    for _ in range(rng.choice((0, 1, 1, 2))):
        words.insert(rng.randint(0, len(words)), _evil_word(rng, rng.choice(places), command))
    record["overrides"] = words
    record["config_folders"] = rng.choices(places, k=rng.choice((0, 0, 1, 1, 2)))
    if rng.random() < 0.2:
        record["config_name"] = rng.choice(("evil", "../conf/evil", str(conf / "evil"), ""))
    (folder / "run.json").write_text(signed_text(record))
    typed = [f"resume={name}"] if name == "run" or rng.random() < 0.6 else ["resume=latest"]
    typed += rng.choice(([], [], ["trainer.progress=off"], ["--cfg", "job"], ["callbacks=none"]))
    if rng.random() < 0.15:
        typed = [*sound, f"hydra.run.dir={name}"]
    story = f"{words} in {record['config_folders']}"
    unread = ("/", "/etc", str(sandbox.outside))  # a run's own folders are looked through
    unread += () if conf.is_relative_to(folder) else (str(conf),)
    return Case(story, "train.py --dry", tuple(typed), (f"inside/{name}",), unread)


def _evil_word(rng: random.Random, folder: str, command: str) -> str:
    """Return an override that executes, sends, scans or writes something, or tries what does."""
    call = f"{{_target_: os.system, command: '{command}'}}"
    nested = f"{{_target_: lightning.pytorch.callbacks.Timer, interval: {call}}}"
    body = rng.choice((call, nested, f"[{call}]", "${oc.env:HOME}", "'${oc.env:HOME}'"))
    group = rng.choice(_EVIL_GROUPS)
    return rng.choice(
        (
            *(f"evaluation.code_sandbox_command='{command}'", "evaluation.code_sandbox=external"),
            *("evaluation.allow_code=[humaneval]", f"{group}=evil", f"{group}=[evil]"),
            *(f"{group}={folder}/{group}/evil", f"+{group}@callbacks=evil", f"{group}={body}"),
            *(
                f"+callbacks.x={body}",
                f"++callbacks.early_stopping={body}",
                f"growth.trigger={body}",
            ),
            *(f"growth.trigger={body}", f"optimizer.betas={body}", f"logger.own={body}"),
            *(f"+hydra.callbacks.x={body}", "+hydra.callbacks.x._target_=os.system"),
            *(
                f"hydra.searchpath=['{folder}']",
                f"hydra.run.dir='{folder}'",
                "hydra/launcher=joblib",
            ),
            *(f"--config-dir={folder}", "--config-name=evil", "-m", "--experimental-rerun=x"),
            *(f"cache_dir={folder}/cache", f"callbacks.model_checkpoint.dirpath={folder}"),
            *("gate.ladder=evil", "logger.wandb.mode=online", "forgetting.distill.teacher=a/b"),
            *("logger.mlflow.tracking_uri=http://127.0.0.1:9", f"data._target_={folder}"),
            f"{rng.choice(('', '+', '++', '~'))}{rng.choice(KEYS)}={body}",
            f"training.{values.word(rng)[:50].encode('ascii', 'ignore').decode()}=1",
        )
    )


def _write_evil_options(conf: Path, command: str, *, has_shadow: bool) -> None:
    """Write options that call a command: evil in each group, and perhaps one of a shipped name."""
    call = f"{{_target_: os.system, command: '{command}'}}"
    kind = "lightning.pytorch.callbacks.LearningRateMonitor"
    body = f"evil:\n  _target_: {kind}\n  logging_interval: {call}\n"
    for group in _EVIL_GROUPS:
        (conf / group).mkdir(parents=True)
        (conf / group / "evil.yaml").write_text(f"# Evil\n{body}")
    if has_shadow:
        (conf / "expansion/dus.yaml").write_text(
            f"# Evil\ndus:\n  _target_: os.system\n  x: {call}\n"
        )
    (conf / "ladder").mkdir()
    (conf / "ladder/evil.yaml").write_text("# Evil\nfallbacks: [[forgetting=evil]]\n")
    (conf / "evil.yaml").write_text(
        "defaults:\n  - config\n  - override callbacks: evil\n  - _self_\n"
    )


def reports(rng: random.Random, sandbox: Sandbox) -> Case:
    """Runs side by side, of which one is damaged, strange, or no run at all."""
    names = ("finished", "unfinished", "neurons", *_SKILLED)
    first = sandbox.take(rng.choice(("finished", "finished", *_SKILLED)), "sweep/0")
    second = sandbox.take(rng.choice(names), "sweep/1")
    stories = [_changed(rng, rng.choice((first, second)), sandbox) for _ in range(2)]
    if rng.random() < 0.1:
        special(sandbox.inside / "sweep/2", rng.choice(("fifo", "zero", "loop", "link")))
    which = rng.choice((["sweep"], ["sweep"], ["sweep/0", "sweep/1"], ["sweep/0", "sweep"]))
    command = rng.choice(("report", "compare"))
    words = [
        command,
        *which,
        "--output",
        rng.choice(("page.html", "sweep/p.html", "sweep/0/report.html")),
    ]
    if command == "report" and rng.random() < 0.3:
        words += rng.choice((["--json"], ["--figures", "figures"], ["--overwrite"]))
    free = ("inside/page.html", "inside/sweep/p.html", "inside/sweep/0/report.html")
    free += ("inside/figures",)
    return Case("; ".join(stories), "tritter", tuple(words), free)


def outputs(rng: random.Random, sandbox: Sandbox) -> Case:
    """Reports at paths of other files: of what is read, links, special files, other kinds."""
    sandbox.take("base", "source")
    for number in range(2):
        sandbox.take("finished", f"sweep/{number}")
    sandbox.take("texts")
    (sandbox.inside / "thesis.txt").write_text("years of work")
    words = rng.choice(_REPORTS)
    ending = f".{words.rpartition(' ')[2]}"
    target, free = sandbox.inside / f"out{ending}", tuple[str, ...]()
    kind = rng.choice((0, 0, 0, 1, 2, 3, 4, 5))
    below = sorted(sandbox.inside.rglob("*"))
    if kind == 0:
        target = rng.choice([path for path in below if path.is_file()])
    elif kind == 1:
        target = rng.choice([path for path in below if path.is_dir()]) / f"new{ending}"
        free = (f"inside/{target.relative_to(sandbox.inside)}",)
    elif kind == 2:
        what = rng.choice(("fifo", "zero", "sparse", "folder", "loop"))
        special(target, what)
        free = (f"inside/{target.name}",) if what == "sparse" else ()  # a file like any other
    elif kind == 3:
        places = (sandbox.outside / "secret.txt", sandbox.inside / "thesis.txt", Path("no"))
        special(target, "link", target=rng.choice(places))
    elif kind == 4:
        target.write_text(rng.choice(("", "years", "{}")))
        free = (f"inside/{target.name}",)
    else:
        target = sandbox.inside / "thesis.txt"
    output = str(target.relative_to(sandbox.inside))
    case = [*words.split()[:-1], "--output", output]
    case += ["--overwrite"] if rng.random() < 0.8 else []
    return Case(f"output kind {kind}, {output}", "tritter", tuple(case), free)


def validations(rng: random.Random, sandbox: Sandbox) -> Case:
    """Two checkpoints side by side, of which one is damaged, and text that may be as well."""
    sides = {"source": sandbox.take("base", "source"), "result": sandbox.take("grown", "result")}
    sandbox.take("texts")
    story = _changed(rng, sides[rng.choice(("source", "result"))], sandbox)
    words = ["validate", "--source", "source", "--result", "result", "--limit", "30"]
    if rng.random() < 0.7:
        words += ["--data", rng.choice(("texts/old", "old=texts/old", "texts/new.jsonl", "no"))]
    if rng.random() < 0.3:
        words += [rng.choice(("--target-data", "--data")), values.word(rng)]
    return Case(story, "tritter", tuple(words))


def benchmarks(rng: random.Random, sandbox: Sandbox) -> Case:
    """Benchmark files that are damaged, of other kinds, special, or full of other things."""
    sandbox.take(rng.choice(("base", "skilled")), "source")
    folder = sandbox.inside / "tasks"
    folder.mkdir()
    name, row = rng.choice(_QUESTIONS)
    path = folder / (name + rng.choice((".jsonl",) * 4 + (".json", ".jsonl.gz", ".parquet", "")))
    rows = [json.loads(json.dumps(row)) for _ in range(6)]
    for _ in range(rng.choice((1, 1, 2))):
        rows = values.mutated_json(rng, rows)
    lines = [values.json_bytes(each) for each in (rows if isinstance(rows, list) else [rows])]
    path.write_bytes(values.json_bytes(rows) if path.suffix == ".json" else b"\n".join(lines))
    story = f"{path.name} changed"
    if rng.random() < 0.3:
        story = damage_file(rng, path, sandbox)
    elif rng.random() < 0.2:
        story = _bomb(rng, folder / f"{name}.parquet", row)
    words = ["evaluate", "--checkpoint", "source", "--tasks", name, "--tasks-path", "tasks"]
    words += ["--limit", "3", "--output", "out.json"]
    if rng.random() < 0.2:
        words += [rng.choice(("--tasks", "--limit", "--data", "--allow-code")), values.word(rng)]
    return Case(story, "tritter", tuple(words), ("inside/out.json",))


def datasets(rng: random.Random, sandbox: Sandbox) -> Case:
    """Dataset folders that name or link what is outside, or decode to far too much."""
    folder = sandbox.inside / "data"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(sandbox.templates / "texts/new.jsonl", folder / "train.jsonl")
    stories = [rng.choice(_ENTICED)(rng, folder, sandbox) for _ in range(rng.choice((1, 1, 2)))]
    sandbox.take("texts")
    source = rng.choice(("data=hf", "data=hf", "data=text"))
    words = [source if word == "data=text" else word for word in SMALL_RUN]
    words += ["data.new=data", "data.old=texts/old", "cache_dir=cache", "hydra.run.dir=run"]
    if rng.random() < 0.3:
        words = [
            "evaluate",
            "--checkpoint",
            "base",
            "--data",
            f"new={rng.choice(('hf:./data', 'data'))}",
            "--output",
            "out.json",
        ]
        sandbox.take("base")
        return Case("; ".join(stories), "tritter", tuple(words), ("inside/out.json",))
    return Case("; ".join(stories), "train.py", tuple(words), ("inside/run", "inside/cache"))


def _card(rng: random.Random, folder: Path, sandbox: Sandbox) -> str:
    outside = rng.choice(("../outside", str(sandbox.outside), f"file://{sandbox.outside}"))
    entry = rng.choice(
        (
            *(f"{outside}/{name}" for name in ("secret.txt", "*.txt", "thesis/*", "**")),
            *("http://127.0.0.1:9/a.txt", "hf://datasets/a/b/c.txt", f"zip://a::{outside}/a.zip"),
            values.word(rng),
        )
    )
    config: dict[str, Any] = {"config_name": "default", "data_files": entry}
    kind = rng.randrange(4)
    if kind == 0:
        config["data_files"] = [{"split": "train", "path": ["train.jsonl", entry]}]
    elif kind == 1:
        config = {"config_name": "default", "data_dir": entry}
    elif kind == 2:
        config = values.mutated_json(rng, config)
    card = values.json_bytes({"configs": [config]})
    if rng.random() < 0.3:
        (folder / ".huggingface.yaml").write_bytes(card)
    else:
        (folder / "README.md").write_bytes(b"---\n" + card + b"\n---\n")
    return f"data_files {entry[:80]!r}"


def _linked(rng: random.Random, folder: Path, sandbox: Sandbox) -> str:
    name, end = rng.choice((("a.txt", "secret.txt"), ("deep/a.txt", "secret.txt"), ("all", "")))
    special(folder / name, "link", target=sandbox.outside / end)
    return f"{name} links outside"


def _saved(rng: random.Random, folder: Path, sandbox: Sandbox) -> str:
    (folder / "dataset_dict.json").write_text(
        json.dumps({"splits": [rng.choice(("deep", "../../outside", str(sandbox.outside), "no"))]})
    )
    files = [{"filename": rng.choice(("a.arrow", "../../../outside/secret.txt", values.word(rng)))}]
    (folder / "deep/state.json").write_bytes(values.json_bytes({"_data_files": files}))
    (folder / "deep/dataset_info.json").write_text("{}")
    return "a saved data set that names files"


def _bombed(rng: random.Random, folder: Path, sandbox: Sandbox) -> str:
    return _bomb(rng, folder / "train.parquet", {"text": ""})


def _bomb(rng: random.Random, path: Path, row: dict[str, Any]) -> str:
    more = rng.choice(({}, {"other": [""]}, {"other": ""}))
    rows, size = rng.choice(((1000, 20 * 2**20), (10**6, 100), (300, 2**20)))
    known = {key: value for key, value in row.items() if not isinstance(value, dict)}
    path.write_bytes(values.parquet_bomb({**known, **more}, rows=rows, size=size))
    return f"{path.name} of {rows} rows with {size} letters"


def adapters(rng: random.Random, sandbox: Sandbox) -> Case:
    """Adapters of an export that were damaged, put back into a folder of experts."""
    folder = sandbox.take("skilled", "source")
    story = _changed(rng, rng.choice(sorted((folder / "experts").iterdir())), sandbox)
    if rng.random() < 0.7:
        (folder / "tritter.json").unlink()  # which would tell the change before it is read
    words = rng.choice(
        (
            ("generate", "--checkpoint", "source", "--prompt", "the", "--max-new-tokens", "2"),
            ("export", "--checkpoint", "source", "--output", "out", "--merge"),
            ("export", "--checkpoint", "source", "--output", "out", "--format", "peft"),
            ("inspect", "source"),
            ("expand", "--checkpoint", "source", "--method", "dus", "--output", "out"),
        )
    )
    return Case(story, "tritter", words, ("inside/out",))


def texts(rng: random.Random, sandbox: Sandbox) -> Case:
    """Data files: damaged, of other kinds, special, in every form that data.old and new take."""
    folder = sandbox.take("texts")
    name = rng.choice(_TEXT_NAMES)
    new = folder / name
    kind = rng.randrange(6)
    if kind == 0:
        content = (folder / "new.jsonl").read_bytes()
        new.write_bytes(values.mutated_bytes(rng, content))
    elif kind == 1:
        new.write_bytes(
            values.json_bytes([values.json_value(rng) for _ in range(rng.randint(0, 9))])
        )
    elif kind == 2:
        rows = [values.json_bytes(values.json_value(rng)) for _ in range(40)]
        new.write_bytes(b"\n".join(rows))
    elif kind == 3:
        special(new, rng.choice(("fifo", "zero", "sparse", "folder", "loop")))
    elif kind == 4:
        special(new, "link", target=rng.choice((sandbox.templates / "texts/old/1.txt", Path("no"))))
    else:
        shutil.copy(folder / "new.jsonl", new)
        text = values.json_bytes({"text": values.json_value(rng), "messages": []})
        new.write_bytes(new.read_bytes() + text + b"\n")
    value = rng.choice((f"texts/{name}", "texts", "texts/*", f"[texts/new.jsonl,texts/{name}]"))
    if "\x1b" in value:
        value = f"'{value}'"
    side, other = rng.choice((("old", "new"), ("new", "old")))
    words = [*SMALL_RUN, f"data.{side}={value}", f"data.{other}=stdlib:prose"]
    if rng.random() < 0.7:
        words[-1] = f"data.{other}=texts/" + ("new.jsonl" if other == "new" else "old")
    words += ["evaluation.sample_tokens=0", "cache_dir=cache", "hydra.run.dir=run"]
    return Case(f"{name!r}, kind {kind}", "train.py", tuple(words), ("inside/run", "inside/cache"))


def continued(rng: random.Random, sandbox: Sandbox) -> Case:
    """`tritter train --checkpoint` on folders whose record or files were changed."""
    folder = sandbox.take("finished", "run") / "checkpoint"
    path = folder / rng.choice(("tritter.json", "tritter.json", "config.json", "tokenizer.json"))
    plain = json.loads(path.read_text())
    if isinstance(plain.get("training_config"), dict) and rng.random() < 0.6:
        plain["training_config"] = values.mutated_json(rng, plain["training_config"])
    else:
        plain = values.mutated_json(rng, plain)
    path.write_bytes(values.json_bytes(plain))
    sandbox.take("texts")
    words = ["train", "--checkpoint", "run/checkpoint", "--data", "texts/new.jsonl", "--steps", "4"]
    words += ["trainer.progress=off", "logger=csv", "data.batch_size=2", "cache_dir=cache"]
    words += ["evaluation.sample_tokens=0", "gate=off"]
    free = ["inside/run-continued", "inside/cache"]
    if rng.random() < 0.3:
        words += [rng.choice(("--old-data", "--output", "--ewc-lambda")), values.word(rng)]
        if words[-2] == "--output":  # what the training finds wrong is told after it was made
            free.append(f"inside/{words[-1]}")
    return Case(f"{path.name} changed", "tritter", tuple(words), tuple(free))


def _changed(rng: random.Random, folder: Path, sandbox: Sandbox) -> str:
    """Change an entry of a JSON file, or damage any file, below a folder; return what was done."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix != ".json" or rng.random() < 0.4:
        return damage_file(rng, path, sandbox)
    try:
        plain = values.mutated_json(rng, json.loads(path.read_text()))
    except ValueError:  # damaged before
        return damage_file(rng, path, sandbox)
    path.write_bytes(values.json_bytes(plain))
    return f"{path.relative_to(sandbox.inside)} changed"


_EVIL_GROUPS = (
    *("callbacks", "data", "expansion", "experiment", "forgetting", "growth", "logger"),
    "metrics",
)
# Commands, each with its format
_REPORTS = (
    "evaluate --checkpoint source --data a=texts/new.jsonl json",
    "compare sweep json",
    "compare sweep csv",
    "compare sweep html",
    "report sweep html",
)
_ENTICED = (_card, _card, _card, _linked, _saved, _bombed)
_SKILLED = ("spawning", "spawning", "taught")
_CHOICE = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
_QUESTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("arc_easy", {**_CHOICE, "answerKey": "A"}),
    ("piqa", {"goal": "go", "sol1": "one", "sol2": "two", "label": 0}),
    (
        "hellaswag",
        {"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": 1},
    ),
    ("boolq", {"passage": "it is", "question": "is it", "answer": True}),
    ("gsm8k", {"question": "1 and 1?", "answer": "2 #### 2"}),
    ("lambada", {"text": "the model grows"}),
    ("mbpp", {"task_id": 11, "text": "add", "code": "x = 1", "test_list": ["assert True"]}),
)
_TEXT_NAMES = (
    *("a.txt", "a.md", "a.rst", "a.json", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.gz"),
    *("a.json.gz", "a.csv", "a", "a\x1b[31m.txt", "a" * 250 + ".txt", ".txt"),
)

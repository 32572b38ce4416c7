"""Generators of damaged runs, sweeps, texts and benchmarks; each sets up its sandbox."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.hostile import values
from tests.hostile.case import Case
from tests.hostile.generators import damage_file
from tests.hostile.sandbox import Sandbox, special
from tests.hostile.templates import RUNS, SMALL_RUN


def runs(rng: random.Random, sandbox: Sandbox) -> Case:
    """Run folders in which something was changed, resumed: grown, neuron by neuron, of experts."""
    name = rng.choice(("finished", "unfinished", "unfinished", "neurons", "neurons", *_SKILLED))
    folder = sandbox.take(name, "run")
    story = _changed(rng, folder, sandbox)
    words = [*RUNS[name], f"cache_dir={sandbox.templates / 'cache'}", "hydra.run.dir=run"]
    words = [word.replace("texts/", f"{sandbox.templates / 'texts'}/") for word in words]
    words = [word.replace("every_n_steps=1", "every_n_steps=0") for word in words]  # it is quicker
    if rng.random() < 0.4:
        words = ["resume=run"]
    return Case(f"{name}: {story}", "train.py", tuple(words), ("inside/run",))


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
    """Reports at paths of other files: of what is read, links, special files, damaged reports."""
    sandbox.take("base", "source")
    for number in range(2):
        sandbox.take("finished", f"sweep/{number}")
    sandbox.take("texts")
    (sandbox.inside / "thesis.html").write_text("<html><body>years of work</body></html>")
    words, earlier = rng.choice(_REPORTS)
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
        special(target, rng.choice(("fifo", "zero", "sparse", "folder", "loop")))
    elif kind == 3:
        places = (sandbox.outside / "secret.txt", sandbox.inside / "thesis.html", Path("no"))
        special(target, "link", target=rng.choice(places))
    elif kind == 4:
        target.write_text(earlier)
        free = (f"inside/{target.name}",)
    else:
        target.write_text(rng.choice(("", "years", earlier[: len(earlier) // 2])))
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
    words = ["evaluate", "--checkpoint", "source", "--tasks", name, "--tasks-path", "tasks"]
    words += ["--limit", "3", "--output", "out.json"]
    if rng.random() < 0.2:
        words += [rng.choice(("--tasks", "--limit", "--data", "--allow-code")), values.word(rng)]
    return Case(story, "tritter", tuple(words), ("inside/out.json",))


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
    if path.name == "tritter.json" and isinstance(plain, dict) and rng.random() < 0.6:
        plain["record_digest"] = None
    path.write_bytes(values.json_bytes(plain))
    sandbox.take("texts")
    words = ["train", "--checkpoint", "run/checkpoint", "--data", "texts/new.jsonl", "--steps", "4"]
    words += ["trainer.progress=off", "logger=csv", "data.batch_size=2", "cache_dir=cache"]
    words += ["evaluation.sample_tokens=0", "gate=off"]
    free = ["inside/run/checkpoint-continued", "inside/cache"]
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


# A command and its format → an earlier report of it
_REPORTS = (
    (
        "evaluate --checkpoint source --data a=texts/new.jsonl json",
        '{"tritter_report": {"kind": "evaluate"}}',
    ),
    ("compare sweep json", '{"tritter_report": {"kind": "compare"}}'),
    ("compare sweep csv", "run,subject,quantity,value,lower,upper\n"),
    ("compare sweep html", '<html><meta name="generator" content="tritter 0.1"></html>'),
    ("report sweep html", '<html><meta name="generator" content="tritter 0.1"></html>'),
)
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

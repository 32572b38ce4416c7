"""Guides and a notebook for real checkpoints, run from top to bottom."""

import ast
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib
import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.real import real_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs/how-to/grow_a_checkpoint.md"
TEACH = ROOT / "docs/how-to/teach_an_instruct_model.md"
NOTEBOOK = ROOT / "notebooks/teach_an_instruct_model.ipynb"
SHARED = ROOT.parent / "shared/data"
PROGRAMS = {
    "python train.py": [sys.executable, str(ROOT / "train.py")],
    "tritter": [sys.executable, "-m", "tritter"],
}


def printed_commands(page: Path) -> list[str]:
    """Return the commands of a page's blocks in their order."""
    starts = tuple(f"{prompt}{program} " for program in PROGRAMS for prompt in ("", "$ "))
    lines = page.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith(starts)]


def words_of(command: str) -> list[str]:
    program = next(name for name in PROGRAMS if command.startswith(f"{name} "))
    return [*PROGRAMS[program], *shlex.split(command.removeprefix(program), comments=True)]


def leave_data(folder: Path) -> None:
    """Write prose and conversations from this Python, in the forms that the guide asks for."""
    (folder / "articles").mkdir()
    short = [text for _, text in sorted(topics.items()) if 400 < len(text) < 3000]
    for number, text in enumerate(short[:40]):
        (folder / f"articles/{number}.txt").write_text(text)
    records = [
        {"prompt": f"Write `{node.name}`. {purpose}", "completion": source}
        for module in (textwrap, inspect, shutil, subprocess, shlex)
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.FunctionDef)
        and (purpose := ast.get_docstring(node))
        and 200 < len(source := ast.unparse(node)) < 1500
    ]
    (folder / "notes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in records[:60]))


def test_the_commands_of_the_guide_are_found() -> None:
    commands = printed_commands(GUIDE)
    assert commands[0] == "tritter inspect base" and commands[-1].startswith("tritter export ")
    assert sum(command.startswith("python train.py ") for command in commands) == 2


def run_commands(commands: list[str], folder: Path) -> None:
    """Run commands in a folder, and write what they print to output.txt."""
    environment = {**os.environ, "TRITTER_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    for command in commands:
        done = subprocess.run(
            words_of(command), cwd=folder, env=environment, capture_output=True, text=True
        )
        with (folder / "output.txt").open("a") as file:
            file.write(f"$ {command}\n{done.stdout}{done.stderr}\n")
        assert done.returncode == 0, (command, done.stdout, done.stderr)


@pytest.mark.slow
def test_the_guide_runs_as_printed(tmp_path: Path) -> None:
    shutil.copytree(real_checkpoint("smollm2"), tmp_path / "base")
    leave_data(tmp_path)
    run_commands(printed_commands(GUIDE), tmp_path)
    summary = json.loads((tmp_path / "outputs/runs/mine/summary.json").read_text())
    assert summary["jump"]["max_absolute"] == 0.0 and summary["control"]["final"]
    assert AutoConfig.from_pretrained(tmp_path / "mine-hf").num_hidden_layers == 36


@pytest.mark.slow
def test_the_first_example_of_the_readme_prints_its_output(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    example = page.partition("```text\n$ tritter expand ")[2].partition("\n```")[0]
    command, *printed = example.splitlines()
    name, _, options = command.partition(" ")
    assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    done = subprocess.run(
        [*PROGRAMS["tritter"], "expand", str(real_checkpoint("smollm2")), *shlex.split(options)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    shown = [line.rstrip() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and set(printed) <= set(shown), (done.stdout, done.stderr)
    assert AutoConfig.from_pretrained(tmp_path / "grown").num_hidden_layers == 45


def leave_chats(folder: Path) -> None:
    """Copy a checkpoint, conversations and a benchmark to where the guide has them."""
    files = [
        SHARED / name for name in ("instruct/dolly_hhrlhf_1k.jsonl", "arc/arc_easy_test.jsonl")
    ]
    if not all(path.is_file() for path in files):
        pytest.skip(f"it needs {' and '.join(map(str, files))}")
    shutil.copytree(real_checkpoint("smollm2"), folder / "base")
    (folder / "benchmarks").mkdir()
    shutil.copy(files[1], folder / "benchmarks")
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for row in map(json.loads, files[0].read_text(encoding="utf-8").splitlines()):
            question = row["prompt"].partition("### Instruction:\n")[2]
            prompt = question.partition("\n\n### Response:")[0]
            file.write(json.dumps({"prompt": prompt, "completion": row["response"]}) + "\n")


@pytest.mark.slow
def test_an_instruct_model_is_taught_as_printed(tmp_path: Path) -> None:
    """With fewer steps and questions: the printed run takes half an hour."""
    leave_chats(tmp_path)
    shorter = {"max_steps=200": "max_steps=6", "task_limit=500": "task_limit=40"}
    shorter["task_questions=100"] = "task_questions=8 evaluation.max_documents=32"
    commands = printed_commands(TEACH)
    for old, new in shorter.items():
        assert sum(old in command for command in commands) == 2
        commands = [command.replace(old, new) for command in commands]
    run_commands(commands, tmp_path)
    for run in ("plain", "careful"):
        summary = json.loads((tmp_path / f"outputs/runs/{run}/summary.json").read_text())
        checks = {(each["check"], each["subject"]) for each in summary["gate"]}
        assert {("retention", "old"), ("retention", "arc_easy/accuracy")} <= checks
        before, after = summary["baseline"], summary["attempts"][0]["final"]
        assert after["reasoning"]["loss"] < 0.5 * before["reasoning"]["loss"]
    assert "forgetting" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    taught = AutoTokenizer.from_pretrained(tmp_path / "taught")
    assert taught.chat_template == AutoTokenizer.from_pretrained(tmp_path / "base").chat_template


@pytest.mark.slow
def test_the_notebook_teaches_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_chats(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    matplotlib.use("agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 15
    namespace = dict[str, object]()
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("STEPS = 200", "STEPS = 6")
            shorter = '"evaluation.task_questions=8", "evaluation.max_documents=32"'
            exec(source.replace('"evaluation.task_questions=100"', shorter), namespace)
    assert set(namespace["changes"]) == {"plain", "careful"}  # type: ignore[call-overload]
    assert "Calculate 14 - 8." in capsys.readouterr().out

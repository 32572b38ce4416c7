"""The guide to growing a checkpoint, run from top to bottom as printed, on a real checkpoint."""

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

import pytest
from transformers import AutoConfig

from tests.real import real_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs/how-to/grow_a_checkpoint.md"
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


@pytest.mark.slow
def test_the_guide_runs_as_printed(tmp_path: Path) -> None:
    shutil.copytree(real_checkpoint("smollm2"), tmp_path / "base")
    leave_data(tmp_path)
    environment = {**os.environ, "TRITTER_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    for command in printed_commands(GUIDE):
        done = subprocess.run(
            words_of(command), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        (tmp_path / "output.txt").open("a").write(f"$ {command}\n{done.stdout}{done.stderr}\n")
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    summary = json.loads((tmp_path / "outputs/runs/mine/summary.json").read_text())
    assert summary["jump"]["max_absolute"] == 0.0 and summary["control"]["final"]
    assert AutoConfig.from_pretrained(tmp_path / "mine-hf").num_hidden_layers == 36

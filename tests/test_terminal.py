"""No output contains control characters, regardless of its source."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run, place, run, sources  # noqa: F401
from tritter import terminal
from tritter.checkpoints import Lineage
from tritter.checkpoints.card import Card
from tritter.checkpoints.folder import write_lineage
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.storage.records import validate_record
from tritter.terminal import Console, harmless, say

ROOT = Path(__file__).parents[1]
CLEAR, TITLE, BIDI, C1 = "\x1b[2J", "\x1b]0;owned\x07", "\u202etxt.exe", "\x9b31m"
HOSTILE = f"a{CLEAR}b{TITLE}c{BIDI}d{C1}\x08\r\x7f\ud800"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


def test_what_steers_becomes_visible() -> None:
    assert harmless("plain ä 日本\n\tx") == "plain ä 日本\n\tx"
    shown = harmless(HOSTILE)
    assert r"\x1b[2J" in shown and r"\u202e" in shown and r"\x9b" in shown and r"\ud800" in shown
    assert not STEERING.search(shown)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_lines_tables_and_progress(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr("sys.stderr", stream)
    say(HOSTILE, is_error=True)
    console = Console(file=stream, width=200, markup=False)
    console.print(HOSTILE, "日本")
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    console.print(table)
    with Progress(TextColumn("{task.description}"), console=console) as bar:
        bar.update(bar.add_task(HOSTILE, total=1), completed=1)
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert r"\x1b[2J" in text
    assert not STEERING.search(text)


COMMANDS = [
    "inspect {}",
    "history {}",
    "generate --checkpoint {} --prompt a",
    "expand --checkpoint {} --method width",
    "expand --checkpoint base --method {}",
    "expand --checkpoint base --method width --head-strategy {}",
    "export --checkpoint {} --output out",
    "plan --source {} --target 10B --gpu-hours 1",
    "train --checkpoint {}",
    "train seed={}",
    "{}",
]


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("command", COMMANDS)
def test_arguments(run: Run, place: Path, command: str) -> None:  # noqa: F811
    result = run("", *(word.format("x" + CLEAR + BIDI) for word in command.split()))
    assert result.code == 2
    assert not STEERING.search(result.err + result.out)


def test_names_of_tensors_and_folders(run: Run, place: Path) -> None:  # noqa: F811
    tensors = load_file(place / "base" / "model.safetensors")
    tensors[f"model{CLEAR}.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, place / "base" / "model.safetensors")
    hostile = (place / "base").rename(place / f"b{CLEAR}{BIDI}")
    for command in ("inspect", "history"):
        result = run(command, str(hostile))
        assert not STEERING.search(result.err + result.out)
    result = run("expand --method width --checkpoint", str(hostile))
    assert result.code == 2 and "\\x1b" in result.err
    assert not STEERING.search(result.err + result.out)


def _grown(run: Run) -> Path:  # noqa: F811
    assert run("expand --checkpoint base --method width --output grown --no-measure").code == 0
    return Path("grown")


def test_fields_of_a_lineage_and_the_card_made_of_them(run: Run, place: Path) -> None:  # noqa: F811
    folder = _grown(run)
    lineage = Lineage.read(folder)
    assert lineage is not None
    config = read_model(folder).config
    plain = json.loads(json.dumps(asdict(lineage)))
    name = f"m{CLEAR}|</td><script>x</script>\n# Title\n[a](http://b)"
    plain["expansion_history"][0].update(method=name, expansion_type=name, timestamp=name)
    plain["benchmark_scores"] = {name: 1.0}
    hostile = validate_record(plain, type(lineage), what="here")
    write_lineage(folder, hostile, config)
    for words in (["inspect"], ["history"], ["history", "--verify"]):
        result = run("", *words, str(folder))
        assert result.out and not STEERING.search(result.err + result.out)
    hashes = {"origin_hash": "a", "model_hash": "b"}
    dtype = {"dtype": "float32"}
    for card in (
        Card({}).for_checkpoint(hostile, config),
        Card({}).for_export(Model({**config, **dtype}), origin=name, lineage=hostile, **hashes),
    ):
        assert not STEERING.search(card)
        assert "<script>" not in card and "\n# Title" not in card and "[a](" not in card


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        ("-m", "tritter", "history", "base"),
        ("-m", "tritter", "history", "base", "--json"),
        (str(ROOT / "train.py"), "--help"),
    ],
)
def test_a_reader_that_leaves_ends_the_program_quietly(place: Path, words: tuple[str, ...]) -> None:  # noqa: F811
    """As with `| head -1`, but the reader is closed before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_no_line_in_a_pipe_ends_with_blanks(run: Run, place: Path) -> None:  # noqa: F811
    run("expand base --method dus --output deep")
    for words in ("inspect deep", "history deep", "expand base --method width --dry-run"):
        lines = run(words).out.splitlines()
        assert len(lines) > 3 and not [line for line in lines if line != line.rstrip()], words


def test_blanks_go_from_the_ends_of_lines_alone() -> None:
    stream = io.StringIO()
    table = Table("a", "b", box=None)
    table.add_row("x  y", "1 ")
    table.add_row("", "")
    Console(file=stream, width=40).print(table, " z  ", end="\n\n")
    assert stream.getvalue() == " a     b\n x  y  1\n\n z\n\n"


def test_what_takes_long_says_so_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_FIRST_LINE_SECONDS", 0.05)
    text = io.StringIO()
    with Console(file=text).progress_bars("auto") as new_bar:
        show = new_bar("scoring old")
        time.sleep(0.1)  # nothing is reported yet
        assert show is not None
        show(1, 4)
        time.sleep(0.2)
        with terminal.waiting(new_bar, "loading"):
            time.sleep(0.7)
    assert "scoring old: 0 s" in text.getvalue() and "scoring old: 1/4, about" in text.getvalue()
    assert "loading: " in text.getvalue()
    silent = io.StringIO()
    with Console(file=silent).progress_bars("off") as new_bar:
        assert new_bar("scoring old") is None
        with terminal.waiting(new_bar, "loading"):
            pass
    assert silent.getvalue() == ""

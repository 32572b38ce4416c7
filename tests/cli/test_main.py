"""The words of the command line: help, spelling, usage errors, and the way on to train.py."""

import dataclasses
import importlib
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import tritter
from tests.cli.conftest import Run
from tritter.cli import main
from tritter.cli.methods import ExpansionMethods
from tritter.cli.options import with_dashes
from tritter.core.expansions import EXPANSIONS
from tritter.core.expansions.heads import Strategy
from tritter.core.expansions.width import Init, Shares

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("expand", "evaluate", "history", "inspect", "generate", "train", "validate")


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("words", ["--help", "expand --help", "train --help", "expand --hepl"])
def test_help_and_usage_errors_take_less_than_a_second_and_no_torch(words: str) -> None:
    program = (
        "import sys; from tritter.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules); sys.exit(code)"
    )
    before = _cpu_seconds()
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=False
    )
    assert _cpu_seconds() - before < 1
    assert done.returncode == (2 if "hepl" in words else 0), done.stderr


@pytest.mark.parametrize("words", ["--version", "train --version", "train seed=3 --version"])
def test_the_version(run: Run, words: str) -> None:
    result = run(words)
    assert (result.code, result.out) == (0, f"tritter {tritter.__version__}\n")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("program", [["-m", "tritter"], [str(ROOT / "train.py")]])
def test_programs_that_python_starts(program: list[str]) -> None:
    said = subprocess.run(
        [sys.executable, *program, "--version"], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout) == (0, f"tritter {tritter.__version__}\n"), said.stderr


def test_help_lists_the_commands(run: Run) -> None:
    for words in ("--help", "-h", ""):
        result = run(words)
        assert result.code == 0
        for command in COMMANDS:
            assert re.search(rf"^\W*{command} ", result.out, re.MULTILINE)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_each_page_of_help_fits_100_lines_of_100_columns(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", None)
    folded, whole = (run(f"{command} {flag}".strip()) for flag in ("--help", "--help-all"))
    assert folded.code == whole.code == 0
    lines = folded.out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    if command in ("expand", "train"):
        assert len(whole.out.splitlines()) > len(lines)
    else:
        assert whole.out == folded.out


def test_help_describes_the_options_of_the_methods_that_are_typed(run: Run) -> None:
    every = ["--target-layers", "--drop-layers", "--identity-init"]
    folded, chosen = (run(f"expand{words} --help").out for words in ("", " --method dus"))
    for option in every:
        assert re.search(rf"dus:.* {option}|dus: {option}", folded)
        assert not re.search(rf"│ {option} ", folded) and re.search(rf"│ {option} ", chosen)
    assert "llama-pro: " in chosen and not re.search(r"^\W*dus: --", chosen, re.MULTILINE)


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("expnd", "Did you mean 'expand'?"),
        ("expand --checkpoint base --method dus --hiden-size 3", "Did you mean --hidden-size?"),
        ("expand --checkpoint base --method dus --num_hads 3", "Did you mean --num-heads?"),
        ("expand --method dus", "Missing --checkpoint: type `tritter expand SRC` with a folder"),
        ("expand base --checkpoint base --method dus", "base together with --checkpoint: use"),
        ("generate base --checkpoint base --prompt x", "base together with --checkpoint: use"),
        ("evaluate base --checkpoint base", "base together with --checkpoint: use"),
        ("export base --checkpoint base --output x", "base together with --checkpoint: use"),
        ("plan base --source base", "base together with --source: use arguments"),
        ("validate base --result base", "base together with --result: use arguments"),
        ("validate base base --source base", "base base together with --source: use"),
        ("validate base", "Missing --result: type `tritter validate SOURCE RESULT`"),
        ("expand --model base --method dus", "Did you mean: --checkpoint base"),
        ("generate --model=base --prompt x", "Did you mean: --checkpoint base"),
        ("expand base --expansion dus", "Did you mean: --method dus"),
        ("expand base expand=width", "(expand=width). Did you mean: --method width"),
        ("expand base expansion=[width,dus]", "Did you mean: --method width,dus"),
        ("expand base --method dus expansion.dus.target_layers=5", "mean: --target-layers 5"),
        ("generate base prompt=hello", "Did you mean: --prompt hello"),
        ("inspect base json=true", "Did you mean: --json\n"),
        ("inspect base no=option", "extra argument(s) (no=option)\n"),
        ("expand --checkpoint base --method dus --target-params 7X", "such as 7B, 350M"),
        ("expand --checkpoint base --method dus --max-shard-size 0", "such as 5GB, 500MB"),
        ("history", "Missing argument 'DIR'"),
        ("inspect a b", "unexpected extra argument(s) (b)\n"),
        ("expand base base-2 --method dus", "(base-2). Did you mean: --output base-2?"),
        ("expand base --method width dus", "(dus)\n"),
        ("expand base out --output=x --method dus", "(out)\n"),
        ("evaluate a b --data x.txt", "(b)\n"),
        ("generate --checkpoint base --prompt x --temperature -1", "'--temperature'"),
    ],
)
def test_usage_errors_exit_2_in_one_message(run: Run, words: str, said: str) -> None:
    result = run(words)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert said in result.err
    assert "--help` lists the options." in result.err


def test_expand_without_a_method_says_both_ways_to_name_one(run: Run) -> None:
    result = run("expand --checkpoint base")
    assert (result.code, result.out) == (2, "")
    assert "--method is missing" in result.err and "--recipe grow.yaml" in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dus --target-layers four", "--target-layers = four: must be a whole number at least"),
        ("dus --target-layers 0", "--target-layers = 0: must be a whole number at least 2"),
        ("width --noise much", "--noise = much: must be a number at least 0"),
        ("llama-pro --positions 1,x", "--positions = [1,x]: must be a list of whole numbers"),
        ("llama-pro --positions 1,", "--positions = "),
        ("llama-pro --positions -1", "--positions = [-1]"),
        ("moe --sparse-layers 1.5", "--sparse-layers = [1.5]"),
    ],
)
def test_a_method_judges_its_values_before_a_model_is_opened(
    run: Run, words: str, said: str
) -> None:
    result = run(f"expand --checkpoint nowhere --method {words}")
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_the_options_offered_are_those_that_the_methods_have() -> None:
    taken = {
        (m, field)
        for takers in ExpansionMethods.current().options.values()
        for m, field in takers.items()
    }
    fields = {
        (method, field.name)
        for method, spec in EXPANSIONS.items()
        for field in dataclasses.fields(spec)
    }
    # How a checkpoint is trained later is no matter of its expansion; Tritter sets the merges
    of_training = {("llama_pro", "new_blocks_only"), ("vocab", "freeze_old_rows")}
    assert fields - taken == of_training | {("vocab", "merges"), ("moe", "expert_hashes")}
    assert taken <= fields


def test_help_names_every_method_and_choice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run("expand --help-all").out
    for method in EXPANSIONS:
        assert with_dashes(method) in text
    for word in (*get_args(Init), *get_args(Shares), *get_args(Strategy)):
        assert word in text
    for option in ExpansionMethods.current().options:
        assert f"--{with_dashes(option)} " in text


def test_the_console_script_points_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["tritter"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


@pytest.mark.full
def test_a_terminal_that_knows_ascii_alone_is_enough(place: Path) -> None:
    program = "import sys; from tritter.cli import main; sys.exit(main(sys.argv[1:]))"
    for words in (
        *("expand --help", "plan --help"),
        *("expand --checkpoint base --method width", "inspect base-width"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words.split()],
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        assert b"\\u" not in done.stdout

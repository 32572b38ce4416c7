"""Flags: each of Hydra's works or is refused by name, and none is passed over."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from tests.config.conftest import FakePipeline, Result
from tritter.config.launch.command_line import read_command_line
from tritter.config.launch.flags import FLAGS, REFUSED
from tritter.config.launch.hydra_help import hydra_help
from tritter.config.launch.hydra_settings import ALLOWED

Run = Callable[..., Result]
WORKING = {name for flag in FLAGS for name in flag.names}


def test_every_flag_of_hydra_works_or_is_refused_by_name() -> None:
    hydras = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert hydras == WORKING | {name for names in REFUSED for name in names}


@pytest.mark.parametrize("name", [name for names in REFUSED for name in names])
@pytest.mark.parametrize("value", [[], ["x"], ["seed=1"]])
def test_what_is_refused_says_why(run: Run, name: str, value: list[str]) -> None:
    refused = run(name, *value)
    assert refused.code == 2 and refused.written == []
    assert refused.err.startswith(f"error: {name} is none of Tritter's flags: ")
    assert next(why for names, why in REFUSED.items() if name in names) in refused.err


def test_hydra_help_lists_exactly_what_works(run: Run, pipeline: FakePipeline) -> None:
    result = run("--hydra-help")
    assert (result.code, result.written, pipeline.configs) == (0, [], [])
    said = result.out
    assert said == f"{hydra_help()}\n"
    working, _, refused = said.partition("Flags of Hydra's that are refused")
    named = set(re.findall(r"(?<![\w-])--[a-z-]+", working))
    assert named == {name for name in WORKING if name.startswith("--")}
    assert all(name in refused for names in REFUSED for name in names)
    assert all(f"hydra.{name} " in refused for name in ALLOWED)
    assert "hydra/launcher" in refused and "basic" in refused
    assert max(map(len, said.splitlines())) <= 96


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-m seed=0,0", "jobs 0 and 1 are equal (seed=0): list a value once."),
        ("-m seed=0,1 gate=off,off", "jobs 2 and 3 are equal (seed=1 gate=off)"),
        ("--package model", "--package goes with --cfg job"),
        ("--resolve seed=1", "--resolve goes with --cfg job"),
        ("--cfg job --info", "--cfg and --info: each asks for something else"),
        ("--hydra-help -c job", "--hydra-help and --cfg: each"),
        ("-m -sc install=bash", "--multirun and --shell-completion: each"),
        ("-m --cfg job", "-m with --cfg: show one job at a time"),
        ("--info nothing", "invalid choice: 'nothing'"),
        ("--cfg job -p modl", "--cfg job --package modl: package 'modl' not found in config."),
        (
            "--checkpoint base",
            "Did you mean: tritter train --checkpoint base, or model=hf model.path=base",
        ),
        ("--confg job", "unrecognized arguments: --confg (see --help). Did you mean --cfg?"),
        ("--multi-run", "Did you mean --multirun?"),
        ("--config-name nowhere", "--config-name = nowhere: no folder of options holds"),
        ("--config-name confg", "there are config. Did you mean config?"),
        ("--config-dir", "expected one argument"),
        ("--config-dir nowhere", "there is no such folder"),
        (f"--config-dir {__file__}", "it is no folder"),
        ("-sc", "allowed is one of install=bash, uninstall=bash, query=bash"),
        ("-sc install=fish", "`tritter --install-completion` is for bash, zsh, fish"),
        ("-sc instal=bash", "Did you mean install=bash?"),
        ("-sc install=bash seed=3", "allowed is one of install=bash"),
    ],
)
def test_what_would_be_passed_over_is_refused(run: Run, words: str, said: str) -> None:
    refused = run(*words.split())
    assert refused.code == 2 and refused.written == []
    assert said in refused.err and refused.err.startswith("error: ")


def test_what_hydra_shows(run: Run, pipeline: FakePipeline) -> None:
    assert "defaults" not in run("--info", "searchpath", "seed=1").out
    assert "Defaults List" in run("-i", "seed=1").out  # a setting is no word of --info
    resolved = run("--cfg", "all", "--resolve", "-p", "hydra.sweep").out
    assert "# @package hydra.sweep" in resolved and "${" not in resolved
    assert pipeline.configs == []


def test_help_and_version_win() -> None:
    assert read_command_line(["--help", "--cfg", "job"]).is_help
    command = read_command_line(["--version", "--help"])
    assert command.is_help and not command.is_version


@pytest.mark.full
def test_help_answers_without_what_is_slow() -> None:
    program = (
        "import sys; from tritter.config.launch.entry import main; "
        "main(None, arguments=sys.argv[1:]); "
        "slow = {'torch', 'transformers', 'lightning', 'hydra', 'pydantic'}; "
        "print(sorted(slow & {*sys.modules}))"
    )
    for words in ([], ["forgetting=ewc"], ["expansion=width"], ["callbacks=[ema,lr_monitor]"]):
        said = subprocess.run(
            [sys.executable, "-c", program, *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout
        assert said.splitlines()[-1] == "[]", words

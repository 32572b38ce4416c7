"""Flags of Hydra: each works or is rejected by name; none is ignored."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from tests.config.conftest import FakePipeline, Result
from tritter.config.launch.command_line import CommandLine

Run = Callable[..., Result]
# One run is what happens without a flag; our own options are always there; a pickle may run code
REFUSED = {"--run", "-r", "--config-path", "-cp", "--experimental-rerun"}


@pytest.mark.parametrize("name", ["--run", "-r", "--config-path", "--experimental-rerun"])
def test_flags_of_hydra_that_are_none_here(run: Run, name: str) -> None:
    refused = run(name, "seed=1")
    assert refused.code == 2 and refused.written == []
    assert f"unrecognized arguments: {name}" in refused.err


def test_every_other_flag_of_hydra_works() -> None:
    actions = [a for a in get_args_parser()._actions if not REFUSED & {*a.option_strings}]
    for action in actions:
        for name in action.option_strings:
            value = next(iter(action.choices or ["x"])) if action.nargs != 0 else None
            words = ["--cfg=job"] * (action.dest in ("package", "resolve"))
            CommandLine.parse([*words, name, *([value] if value else [])])


def test_hydra_prints_its_help(run: Run, pipeline: FakePipeline) -> None:
    result = run("--hydra-help")
    assert (result.code, result.written, pipeline.configs) == (0, [], [])
    assert "--multirun" in result.out and "hydra/launcher: basic" in result.out


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--package model", "--package and --resolve require --cfg job"),
        ("--resolve seed=1", "--package and --resolve require --cfg job"),
        ("--cfg job --info", "--cfg and --info: these flags exclude each other"),
        ("--hydra-help -c job", "--cfg and --hydra-help: these flags exclude"),
        ("-m -sc install=bash", "--shell-completion and --multirun: these flags exclude"),
        ("-m --cfg job", "--cfg and --multirun: these flags exclude"),
        ("--info nothing", "invalid choice: 'nothing'"),
        ("--cfg job -p modl", "--cfg job: package 'modl' not found in config."),
        (
            "--checkpoint base",
            "Did you mean: tritter train --checkpoint base, or model=hf model.path=base",
        ),
        ("--confg job", "unrecognized arguments: --confg (see --help). Did you mean --cfg?"),
        ("--multi-run", "Did you mean --multirun?"),
        ("--config-name nowhere", "--config-name = nowhere: no config folder has"),
        ("--config-name confg", "available: config. Did you mean config?"),
        ("--config-dir", "expected one argument"),
        ("--config-dir nowhere", "there is no such folder"),
        (f"--config-dir {__file__}", "it is not a folder"),
        ("-sc", "Expecting one subcommand from"),
        ("-sc install=nothing", "No completion plugin for 'nothing' found"),
    ],
)
def test_what_would_be_passed_over_is_refused(run: Run, words: str, message: str) -> None:
    refused = run(*words.split())
    assert refused.code == 2 and refused.written == []
    assert message in refused.err and refused.err.startswith("error: ")


def test_what_hydra_shows(run: Run, pipeline: FakePipeline) -> None:
    assert "defaults" not in run("--info", "searchpath", "seed=1").out
    assert "Defaults List" in run("-i", "seed=1").out  # a setting is no word of --info
    resolved = run("--cfg", "all", "--resolve", "-p", "hydra.sweep").out
    assert "# @package hydra.sweep" in resolved and "${" not in resolved
    assert pipeline.configs == []


def test_help_and_version_win() -> None:
    assert CommandLine.parse(["--help", "--cfg", "job"]).is_help
    command = CommandLine.parse(["--version", "--help"])
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
        message = subprocess.run(
            [sys.executable, "-c", program, *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout
        assert message.splitlines()[-1] == "[]", words

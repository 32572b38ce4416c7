"""Shell completion: its suggestions, and their insertion by a real bash."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.conftest import Result
from tests.config.test_outside import ROOT, write_examples
from tritter.config.folders import option_files
from tritter.config.launch.entry import completions

Run = Callable[..., Result]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="it is for bash")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["expansion=du"], ["expansion=dus"]),
        (["expansion=dus", "expansion.dus.tar"], ["expansion.dus.target_layers="]),
        (["-m", "expansion.dus.tar"], []),
        (["seed="], ["seed=0"]),
        (["hydra/launcher=b"], ["hydra/launcher=basic"]),
        (["-cd", "nowhere", "exp"], []),
        (["-cn", "nowhere", "exp"], []),
        (["--nothing", "exp"], []),
    ],
    ids=str,
)
def test_what_may_follow(words: list[str], found: list[str]) -> None:
    assert completions(words) == found


def test_all_options_of_a_group() -> None:
    assert completions(["forgetting="]) == [f"forgetting={n}" for n in option_files()["forgetting"]]
    assert {"expansion=", "experiment=", "experts="} <= {*completions(["exp"])}


def test_options_of_ones_own(tmp_path: Path) -> None:
    write_examples(tmp_path / "site", conf=tmp_path / "conf")
    outside = ["--config-dir", str(tmp_path / "conf")]
    assert completions([*outside, "forgetting=da"]) == ["forgetting=damp"]
    assert completions([*outside, "-cn", "my_run", "forgetting.damp.s"]) == [
        "forgetting.damp.share="
    ]


def test_the_shell_asks_hydra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "python train.py forgetting=ew")
    assert run("-sc", "query=bash").out == "forgetting=ewc\n"
    # By these words Hydra's script knows a program that it may ask
    assert "@hydra.main" in run("-sc", "install=bash").out
    assert "@hydra.main" in (ROOT / "train.py").read_text()


class Bash:
    """An interactive bash in its own terminal."""

    def __init__(self, folder: Path) -> None:
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.chdir(folder)
            os.environ |= {"PS1": "", "TERM": "dumb", "COLUMNS": "200", "HOME": str(folder)}
            os.environ["PYTHONPATH"] = str(ROOT)
            os.environ["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self._seen = ""

    def type(self, text: str, *, until: str) -> str:
        """Type `text`, and return the terminal output up to `until`."""
        self._seen = ""
        os.write(self._terminal, text.encode())
        end = time.monotonic() + 60
        while until not in self._seen and time.monotonic() < end:
            if select.select([self._terminal], [], [], 0.2)[0]:
                self._seen += os.read(self._terminal, 65536).decode()
        return self._seen

    def complete(self, line: str, *, until: str) -> str:
        """Type a line and TAB; return the completed line, and clear it."""
        seen = self.type(f"{line}\t", until=until)
        self.type("\x15echo CLEA''R\n", until="CLEAR\r\n")
        return seen

    def close(self) -> None:
        os.close(self._terminal)
        os.waitpid(self._process, 0)


@pytest.mark.full
@needs_bash
def test_bash_completes_tritter(tmp_path: Path) -> None:
    (tmp_path / "tritter").write_text(f'#!/bin/sh\nexec {sys.executable} -m tritter "$@"\n')
    (tmp_path / "tritter").chmod(0o755)
    env = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        ["bash", "-c", "./tritter --install-completion; true"], cwd=tmp_path, env=env, check=True
    )
    bash = Bash(tmp_path)
    try:
        bash.type("bind 'set bell-style none'; echo READ''Y\n", until="READY\r\n")
        bash.type("source ~/.bashrc; echo READ''Y\n", until="READY\r\n")
        for begun, whole in (
            ("gener", "generate"),
            ("expand --method dus,st", "dus,stack"),
            ("train expansion=du", "expansion=dus"),
            ("train --checkpoint base forgetting=ew", "forgetting=ewc"),
            ("train --check", "--checkpoint"),
        ):
            assert whole in bash.complete(f"tritter {begun}", until=whole), begun
    finally:
        bash.close()

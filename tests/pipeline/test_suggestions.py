"""Commands suggested at the end of a run: they suit the verdict and are valid."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.tiny import FIXTURES
from tritter.config.launch.composition import load_config
from tritter.config.overrides import program_command
from tritter.pipeline.pipeline import next_commands
from tritter.report.summary import Summary

FOLDER = Path("outputs/runs/a b")


def summary_of(
    status: str,
    *checks: dict[str, Any],
    attempts: int = 1,
    held_out: int = 0,
    old: tuple[str, ...] = ("prose",),
) -> Summary:
    domains = {"old": list(old), "new": []}
    plain = {"status": status, "gate": checks, "domains": domains, "baseline": {}}
    plain |= {"data": {"prose": {"validation": held_out}}}
    return Summary.of(plain | {"attempts": [{"final": {}}] * attempts})


def check(name: str, verdict: str, **more: Any) -> dict[str, Any]:
    return {"check": name, "subject": "prose", "verdict": verdict, **more}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return the suggestions for a verdict, after checking that each command is valid."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PATH", "/nowhere")

    def suggested(
        status: str,
        *checks: dict[str, Any],
        words: tuple[str, ...] = (),
        rate: float = 3e-3,
        held_out: int = 0,
        old: tuple[str, ...] = ("prose",),
    ) -> list[str]:
        config = load_config(words)
        summary = summary_of(status, *checks, held_out=held_out, old=old)
        lines = next_commands(config, summary, overrides=words, folder=FOLDER, rate=rate)
        for line in lines:
            program, _, rest = line.partition("train.py ")
            if rest:
                assert "python" in program
                load_config(shlex.split(rest, comments=True))
        return lines

    return suggested


def test_kept(commands: Callable[..., list[str]]) -> None:
    lines = commands("kept", words=("expansion=[width,llama_pro]", "+seed=3", "resume=latest"))
    assert "'expansion=[width,llama_pro]' +seed=3 control=true" in lines[0]
    assert "seed=4" in lines[1] and "seed=3" not in lines[1]
    assert "expansion=dus" in lines[2] and "llama_pro" not in lines[2]
    assert "-m tritter generate --checkpoint 'outputs/runs/a b/checkpoint'" in lines[-3]
    assert not any("resume" in line for line in lines)
    assert commands("ungated") == commands("kept")


def test_what_the_run_does_not_allow_is_not_suggested(commands: Callable[..., list[str]]) -> None:
    lines = commands("kept", words=("experiment=lora_experts",))  # sets keys of dylora alone
    assert "seed=1" in lines[0] and not any("single_lora" in line for line in lines)
    new_only = ("forgetting=freeze", "forgetting.freeze.new_only=true", "expansion=llama_pro")
    lines = commands("kept", words=new_only)
    assert "seed=1" in lines[0]
    assert not any("control=true" in line or "expansion=dus" in line for line in lines)


def test_without_old_data_none_is_replayed(commands: Callable[..., list[str]]) -> None:
    words = ("model=hf", f"model.path={FIXTURES}/finished/checkpoint", "forgetting=none")
    words += ("data=text", "data.old={}", f"data.new={FIXTURES}/text/old")
    failed = check("retention", "failed", subject="arc_easy/accuracy")
    first, second, *_ = commands("rolled_back", failed, words=words, old=())
    assert "forgetting=self_replay" in first and first.endswith("# mix in replay data")
    assert "'forgetting=[distill,self_replay]'" in second


@pytest.mark.full
def test_tritter_is_called_as_a_shell_finds_it(
    commands: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(Path(sys.executable).parent)
    for path, start in ((own, "tritter history"), ("/nowhere", f"{sys.executable} -m tritter")):
        monkeypatch.setenv("PATH", path)
        assert commands("kept")[-2].startswith(start)


@pytest.mark.full
def test_offline_runs_are_uploaded_by_a_command(
    commands: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = "wandb sync 'outputs/runs/a b/wandb'/offline-run-*   # upload to W&B"
    for path, start in (
        (str(Path(sys.executable).parent), ""),
        ("/nowhere", f"{sys.executable} -m "),
    ):
        monkeypatch.setenv("PATH", path)
        assert commands("kept")[-1] == f"{start}{upload}"
    for words in ("logger=csv", "logger.wandb.mode=online"):
        assert not any("wandb sync" in line for line in commands("kept", words=(words,)))


@pytest.mark.full
def test_rolled_back(commands: Callable[..., list[str]]) -> None:
    failed = check("retention", "failed")
    lines = commands("rolled_back", failed, words=("training.max_steps=50",))
    assert all("training.max_steps=50" in line for line in lines[:3])
    assert "forgetting.replay.fraction=0.5" in lines[0]
    assert "'forgetting=[distill,replay]'" in lines[1]
    assert "training.learning_rate=0.0015" in lines[2]
    assert not any("generate" in line for line in lines)
    long = check("long_windows", "failed")
    assert commands("rolled_back", long, words=("training.max_steps=50",)) == lines
    assert "forgetting=replay" in commands("rolled_back", failed, words=("forgetting=none",))[0]
    own = commands("rolled_back", failed, words=("forgetting=self_replay",))
    assert "forgetting.self_replay.fraction=0.5" in own[0]
    both = ("forgetting=[self_replay,replay]", "forgetting.replay.fraction=0.1")
    assert "forgetting.replay.fraction=0.2" in commands("rolled_back", failed, words=both)[0]
    only_text = ("forgetting=[ewc,self_replay]", "forgetting.self_replay.fraction=0")
    first = commands("rolled_back", failed, words=only_text)[0]
    assert "'forgetting=[ewc,self_replay,replay]'" in first
    by_tokens = commands("rolled_back", check("new_capability", "failed"),
                         words=("training.max_tokens=80k",))  # fmt: skip
    assert "training.max_tokens=160000" in by_tokens[0]
    broken = commands("rolled_back", check("training", "failed"))
    assert "training.learning_rate=0.0015" in broken[0]
    slow = commands("rolled_back", check("new_capability", "failed"))
    assert "training.max_steps=500" in slow[0]


def test_the_rate_of_experts_is_their_own(commands: Callable[..., list[str]]) -> None:
    words = ("experts=dylora", "expansion=none", "forgetting=none")  # by default it is null
    lines = commands("rolled_back", check("training", "failed"), words=words, rate=5e-3)
    assert "experts=dylora" in lines[0] and "experts.learning_rate=0.0025" in lines[0]


def test_undecided(commands: Callable[..., list[str]]) -> None:
    few = check("retention", "undecided", n=50, documents_needed=100)
    assert "data.validation_fraction=0.48" in commands("undecided", few)[0]  # 100, less 2 σ
    one = check("retention", "undecided", n=29, documents_needed=30)
    assert "data.validation_fraction=0.29" in commands("undecided", one)[0]
    line = commands("undecided", one, held_out=40)[0]
    assert "evaluation.max_documents=30 " in line and line.endswith("of prose are needed")
    line = commands(
        "undecided", check("retention", "undecided", n=4, documents_needed=30), held_out=11
    )[0]
    assert "evaluation.max_documents=11 " in line and line.endswith("needed; there are 11")
    many = check("retention", "undecided", n=50, documents_needed=5000)
    assert not any("fraction" in line for line in commands("undecided", many))
    assert (
        "training.max_steps=500" in commands("undecided", check("new_capability", "undecided"))[0]
    )


def test_questions_are_not_validation_documents(commands: Callable[..., list[str]]) -> None:
    few = check("retention", "undecided", n=100, documents_needed=150, subject="prose/accuracy")
    assert not any("fraction" in line for line in commands("undecided", few))


def test_what_was_not_kept_is_found(tmp_path: Path) -> None:
    (tmp_path / "attempt_2" / "trained").mkdir(parents=True)
    (tmp_path / "attempt_2" / "trained" / "model.safetensors").touch()
    two, one = (summary_of("rolled_back", attempts=number) for number in (2, 1))
    reported = next_commands(load_config(()), two, overrides=(), folder=tmp_path, rate=1e-3)
    assert (
        f"inspect {tmp_path}/attempt_2/trained   # the trained model, which was not kept"
        in reported[-3]
    )
    gone = next_commands(load_config(()), one, overrides=(), folder=tmp_path, rate=1e-3)
    assert not any("trained" in line for line in gone)


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ("elsewhere/train.py", "elsewhere/train.py"),
        ("notebook.py", "-m tritter train"),  # `tritter` is not on the path
        ("site-packages/tritter/__main__.py", "-m tritter train"),
        ("/bin/tritter", "tritter train"),
    ],
)
def test_the_program_is_one_that_works_in_this_folder(
    called: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()  # a script of the user
    assert " ".join(program_command()).removeprefix(sys.executable).strip() == said

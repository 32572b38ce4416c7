"""`tritter history`: the chain as table, tree and JSON, and exit code 3 when it does not hold."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tritter.checkpoints import Lineage, write_lineage
from tritter.cli import main
from tritter.core.models import read_model


@pytest.fixture(scope="module")
def expanded(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("expanded")
    shutil.copytree(sources / "llama", place / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in (
            "base --output wide --method width",
            "wide --output deep --method llama-pro,dus",
        ):
            assert main(f"expand --checkpoint {words}".split()) == 0
    return place


@pytest.fixture
def chain(expanded: Path, place: Path) -> Path:
    """base → wide → deep, in the current folder."""
    return Path(shutil.copytree(expanded, place, dirs_exist_ok=True))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_table_and_tree(run: Run, chain: Path) -> None:
    result = run("history deep")
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    lineage = Lineage.read(chain / "deep")
    assert lineage is not None
    day = lineage.expansion_history[-1].timestamp[:10]
    assert lines[0] == "checkpoint made by size steps after hash when"
    assert any(line.startswith("base plain folder 28.4 k - ") for line in lines)
    assert any(
        line.startswith("deep llama-pro, dus") and f"0 {lineage.model_hash[:12]} {day}" in line
        for line in lines
    )
    assert lines[-3:] == ["base (plain folder)", "└── wide (width)", "└── deep (llama-pro, dus)"]


def test_an_intact_chain(run: Run, chain: Path) -> None:
    result = run("history deep --verify")
    assert result.code == 0
    assert "3 checkpoints: 3 intact, 0 changed, 0 not checked" in result.out
    content = run("history deep --verify --json").json
    assert content["verified"] and content["intact"]
    assert [link["state"] for link in content["chain"]] == ["intact"] * 3
    assert [link["methods"] for link in content["chain"]] == [[], ["width"], ["llama_pro", "dus"]]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["base", "wide", "deep"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_every_changed_byte_is_named_with_exit_code_3(
    run: Run, chain: Path, name: str, file: str
) -> None:
    _flip(chain / name / file)
    result = run("history deep --verify")
    assert result.code == 3
    named = [line for line in result.out.splitlines() if line.startswith(f"{name}/{file}")]
    assert len(named) == 1
    assert named[0].endswith(": changed")
    assert (".weight: " in named[0]) == (file == "model.safetensors")
    assert "2 intact, 1 changed" in result.out
    content = run("history deep --verify --json")
    assert content.code == 3
    (link,) = [link for link in content.json["chain"] if link["changes"]]
    assert link["changes"][0]["file"] == file
    assert run("history deep").code == 0  # nothing was asked to be checked


def test_a_parent_that_is_gone_is_not_checked(run: Run, chain: Path) -> None:
    shutil.rmtree(chain / "base")
    result = run("history deep --verify")
    assert result.code == 0
    assert "missing" in result.out
    assert "3 checkpoints: 2 intact, 0 changed, 1 not checked" in result.out


def test_a_plain_folder_has_nothing_to_check(run: Run, place: Path) -> None:
    result = run("history base --verify")
    assert result.code == 0
    assert "\n1 checkpoint: 0 intact, 0 changed, 1 not checked" in result.out


def test_long_names_in_the_tree_stay_whole(run: Run, place: Path) -> None:
    deep = place / ("n" * 60) / ("m" * 60)
    deep.mkdir(parents=True)
    (place / "base").rename(deep / "base")
    assert run(f"expand --checkpoint {deep / 'base'} --method width --output wide").code == 0
    said = run("history wide").out
    assert f"{'n' * 60}/{'m' * 60}/base  (plain folder)\n" in said
    assert "└── wide  (width)" in said


def test_names_in_the_table_are_not_broken(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "qwen3-instruct-grown-for-legal-texts"
    assert run(f"expand base --method width,llama-pro --output {name}").code == 0
    for columns in ("40", "60", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        table = run(f"history {name}").out.partition("\n\n")[0]
        assert {name, "llama-pro", "plain"} <= {*table.split()}, columns


def test_the_newest_checkpoint_tells_the_steps_after(run: Run, chain: Path) -> None:
    shutil.copytree(chain / "deep", chain / "trained")
    lineage = Lineage.read(chain / "deep")
    assert lineage is not None
    width, *others = lineage.expansion_history
    records = (width, *(replace(record, continued_training_steps=40) for record in others))
    trained = replace(
        lineage,
        model_hash="f" * 64,
        parent_hash=lineage.model_hash,
        parent_path="../deep",
        expansion_history=records,
        step=40,
    )
    write_lineage(chain / "trained", trained, read_model(chain / "deep").config)
    content = run("history trained --json").json
    assert [link["made_by"] for link in content["chain"]] == [
        "plain folder",
        "width",
        "llama-pro, dus",
        "training to step 40",
    ]
    steps = [link["continued_training_steps"] for link in content["chain"]]
    assert steps == [None, 0, 40, None]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_checkpoint(run: Run, place: Path, name: str) -> None:
    result = run(f"history {name}")
    assert result.code == 2
    assert "Traceback" not in result.err


def test_an_unreadable_record(run: Run, chain: Path) -> None:
    (chain / "deep" / "tritter.json").write_text("{")
    assert run("history deep").code == 2
    checked = run("history deep --verify")
    assert checked.code == 3
    assert "deep/tritter.json" in checked.out


def test_a_deleted_record_of_a_parent(run: Run, chain: Path) -> None:
    (chain / "wide" / "tritter.json").unlink()
    checked = run("history deep --verify")
    assert checked.code == 3
    assert "wide/tritter.json: missing\n2 checkpoints: 1 intact, 1 changed" in checked.out

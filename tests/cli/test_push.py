"""`tritter push` against a hub on this machine: what is uploaded, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from tests import oracle
from tests.cli.conftest import VOCABULARY, Run
from tests.cli.fake_hub import FakeHub, Repository, serving
from tests.cli.test_cards import METADATA
from tests.cli.test_experts import mixture, write_with_experts
from tritter.checkpoints import Lineage
from tritter.methods.experts.mixture import ExpertMixture

__all__ = ["mixture"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    made = FakeHub()
    with serving(made):
        monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield made


def downloaded(fake: FakeHub, name: str, folder: Path) -> Path:
    for file, content in fake.repositories[name].files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def test_a_grown_checkpoint_is_pushed_private_and_loads_again(
    run: Run, place: Path, fake: FakeHub
) -> None:
    (place / "base/README.md").write_text(METADATA)
    (place / "base/LICENSE").write_text("text")
    assert run("expand base --method llama-pro --output grown --max-shard-size 40KB").code == 0
    (place / "grown/notes.txt").write_text("my own")
    result = run("push grown owner/grown")
    assert result.code == 0, result.err
    assert f"pushed (private)  {fake.endpoint}/owner/grown/commit/" in result.out
    assert "left out  notes.txt" in result.out
    pushed = fake.repositories["owner/grown"]
    assert pushed.private and pushed.commits == ["Upload grown with Tritter"]
    expected = {path.name for path in (place / "grown").iterdir()} - {"notes.txt"}
    assert pushed.files.keys() - {".gitattributes"} == expected
    copy = downloaded(fake, "owner/grown", place / "copy")
    tokens = oracle.tokens(VOCABULARY)
    before, after = (oracle.logits(oracle.stock(place / n), tokens) for n in ("grown", "copy"))
    assert before.equal(after)
    assert ", 0 changed" in run("history copy --verify").out
    assert ModelCard.load(copy / "README.md").data.license == "other"


def test_training_state_and_kept_texts_stay_here(
    run: Run, place: Path, fake: FakeHub, mixture: ExpertMixture
) -> None:
    write_with_experts(place / "base", place / "mixed", mixture)
    lineage = json.loads((place / "mixed/tritter.json").read_text())
    for name in ("state/exp_avg/model.safetensors", "state/replay.safetensors"):
        (place / "mixed" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "mixed" / name).write_bytes(b"private")
    result = run("push mixed owner/mixed --json")
    assert result.code == 0, result.err
    assert result.json["left_out"] == [
        "state/exp_avg/model.safetensors",
        "state/replay.safetensors",
    ]
    copy = downloaded(fake, "owner/mixed", place / "copy")
    assert not any(path.read_bytes() == b"private" for path in copy.rglob("*") if path.is_file())
    found = Lineage.read(copy)
    assert found is not None and found.model_hash == lineage["model_hash"]
    assert run("generate --checkpoint copy --prompt the --max-new-tokens 3").code == 0


def test_a_snapshot_of_the_hub_is_pushed_whole(
    run: Run, place: Path, fake: FakeHub, hub: Path
) -> None:
    folder = hub / "models--owner--name/snapshots/0123abcd"
    (place / "link").symlink_to(folder)
    for name in ("link", str(folder)):
        result = run(f"push {name} owner/copy --overwrite")
        assert result.code == 0, result.err
        files = fake.repositories["owner/copy"].files
        assert files.keys() - {".gitattributes"} == {path.name for path in folder.iterdir()}
        assert files["model.safetensors"] == (place / "base/model.safetensors").read_bytes()


def test_a_link_out_of_the_folder_is_refused(run: Run, place: Path, fake: FakeHub) -> None:
    (place / "secret").write_text("mine")
    (place / "base/LICENSE").symlink_to(place / "secret")
    result = run("push base owner/name")
    assert result.code != 0 and "LICENSE" in result.err and "secret" in result.err
    assert not fake.requests


def test_no_other_file_hides_the_weights(run: Run, place: Path, fake: FakeHub) -> None:
    assert run("expand base --method llama-pro --output grown").code == 0
    for name in ("model", "config", "tokenizer", "state"):
        (place / "grown" / name).write_text("mine")
    (place / "grown/LICENSE").write_text("chosen later")
    result = run("push grown owner/grown --dry-run --json")
    assert result.code == 0, result.err
    assert result.json["left_out"] == ["config", "model", "state", "tokenizer"]
    assert {"model.safetensors", "config.json", "LICENSE"} <= result.json["files"].keys()


def test_a_dry_run_contacts_nobody(run: Run, place: Path, fake: FakeHub) -> None:
    result = run("push base owner/name --dry-run --public")
    assert result.code == 0 and not fake.requests
    assert "model.safetensors" in result.out and "owner/name would be public" in result.out
    assert "the card has no licence" in result.out
    for name in ("tokenizer.json", "config.json"):
        assert name in result.out
    assert run("push base owner/name --dry-run --json").json["commit"] is None


def test_files_of_a_repository_are_replaced_only_when_asked(
    run: Run, place: Path, fake: FakeHub
) -> None:
    old = {".gitattributes": b"", "model-00002-of-00002.safetensors": b"old", "config.json": b"{}"}
    fake.repositories["owner/name"] = Repository(True, dict(old))
    result = run("push base owner/name")
    assert result.code == 2 and "it has 2 files; --overwrite replaces them" in result.err
    assert fake.repositories["owner/name"].files == old
    assert run("push base owner/name --overwrite").code == 0
    files = fake.repositories["owner/name"].files
    assert "model-00002-of-00002.safetensors" not in files and ".gitattributes" in files
    assert files["config.json"] == (place / "base/config.json").read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("push base name", "OWNER/NAME = name: must be OWNER/NAME"),
        ("push base a/b/c", "OWNER/NAME = a/b/c: must be"),
        ("push base a--b/c", "OWNER/NAME = a--b/c: must be"),
        ("push base ../x", "OWNER/NAME = ../x: must be"),
        ("push base a/b.git", "OWNER/NAME = a/b.git: must be"),
        (f"push base a/{'b' * 100}", "at most 96 characters"),
        ("push nowhere owner/name", "DIR = nowhere: no such folder"),
        ("push base owner/open", "it is public on the hub: change that there, or push with --pub"),
        ("push base owner/closed --public", "it is private on the hub: change that there"),
        ("push empty owner/name", "no config.json"),
    ],
)
def test_what_cannot_be_pushed_is_refused(
    run: Run, place: Path, fake: FakeHub, line: str, message: str
) -> None:
    fake.repositories |= {"owner/open": Repository(False), "owner/closed": Repository(True)}
    (place / "empty").mkdir()
    result = run(line)
    assert result.code == 2 and message in result.err
    assert not any("POST" in request for request in fake.requests)


def test_a_changed_checkpoint_is_not_pushed(run: Run, place: Path, fake: FakeHub) -> None:
    assert run("expand base --method llama-pro --output grown").code == 0
    weights = place / "grown/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run("push grown owner/name")
    assert result.code != 0 and "was changed since its lineage was written" in result.err
    assert not fake.requests


def test_who_you_are_must_be_known(
    run: Run, place: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = run("push base owner/name")
    assert result.code == 2 and "the hub does not know you: run `hf auth login`" in result.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place / "none"))
    result = run("push base owner/name")
    assert result.code == 2 and "the hub does not know you" in result.err


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("/repos/create", 403, "your token may not write there"),
        ("/repos/create", 409, "it exists and you may not read it"),
        ("/commit/", 412, "someone else changed it at the same time. The repository has its old"),
        ("/commit/", 403, "your token may not write there. The repository has its old content"),
        ("/blob/", 400, "owner/name: the upload failed"),
    ],
)
def test_a_failure_of_the_hub_is_one_sentence(
    run: Run, place: Path, fake: FakeHub, part: str, status: int, message: str
) -> None:
    fake.fails[part] = status
    result = run("push base owner/name")
    assert result.code == (2 if "create" in part else 1) and message in result.err
    assert "Traceback" not in result.err


def test_metadata_that_the_hub_refuses_is_quoted(run: Run, place: Path, fake: FakeHub) -> None:
    (place / "base/README.md").write_text("---\nlicense: mine\n---\n")
    fake.card_errors.append({"message": '"license" must be one of apache-2.0, mit'})
    result = run("push base owner/name")
    assert result.code == 1 and '"license" must be one of apache-2.0, mit' in result.err


def test_without_the_network_it_is_refused(
    run: Run, place: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run("push base owner/name")
    assert result.code == 2 and "the hub cannot be reached" in result.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    result = run("push base owner/name")
    assert result.code == 2 and "the hub cannot be reached (" in result.err


@pytest.mark.parametrize("content", [None, [], "<html>", 3, {"siblings": 3}, {"siblings": [None]}])
@pytest.mark.parametrize("place_of_answer", ["first", "commit"])
def test_an_odd_answer_of_a_hub_is_one_error(
    run: Run, place: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch,
    content: object, place_of_answer: str,
) -> None:  # fmt: skip
    answer = fake.answer

    def odd(method: str, path: str, body: bytes, token: str | None) -> tuple[int, object]:
        is_odd = place_of_answer == "first" or "/commit/" in path
        return (200, content) if is_odd else answer(method, path, body, token)

    monkeypatch.setattr(fake, "answer", odd)
    result = run("push base owner/odd")
    assert result.code in (1, 2), result.out
    assert "error: " in result.err and "Traceback" not in result.err

"""The command run in this process, on tiny stock models with a tokenizer."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests import oracle
from tests.oracle.qwen3 import tiny_qwen3
from tritter.cli import main
from tritter.core.models import save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer

VOCABULARY = 300


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs a command line, given as one text, and shows what came of it."""

    def run_command(line: str, *more: str) -> Result:
        capsys.readouterr()
        code = main([*line.split(), *more])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run_command


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama` and `qwen3`, plain Hugging Face folders."""
    place = tmp_path_factory.mktemp("sources")
    text = "the model grows a layer where data asks for one and keeps what it knew\n"
    tokenizer = train_tokenizer([Document("d", text * 20)], vocab_size=VOCABULARY)
    for name, model in {"llama": oracle.tiny_llama, "qwen3": tiny_qwen3}.items():
        oracle.saved(model(vocab_size=VOCABULARY), place / name)
        save_tokenizer(tokenizer, place / name, end_of_text=END_OF_TEXT)
    return place


@pytest.fixture
def place(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty but for `base`, a tiny Llama."""
    shutil.copytree(sources / "llama", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub's cache, with `base` in it as owner/name, laid out as a download is."""
    repository = place / "cache/models--owner--name"
    snapshot = repository / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted((place / "base").iterdir())):
        shutil.copy(path, repository / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
    return place / "cache"

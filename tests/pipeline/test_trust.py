"""Files in a run folder are compared with their checksums before use."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from tests.pipeline.plug import WORK
from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.config.launch.entry import main
from tritter.pipeline import Outcome, run_pipeline
from tritter.pipeline.trained import TrainedWriter
from tritter.storage import hashing, reading, records

FLIPS_PER_FILE = 3
# Never read again: the run's own log, and files that a resume rewrites
UNREAD = ("README.md",)


@dataclass(frozen=True, slots=True)
class Ended:
    """Result of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


class Killed(BaseException):
    """Simulates a kill: no code catches it."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], cache: Path) -> Run:
    """Run the tiny job through the program, in a folder."""

    def run_words(folder: Path) -> Ended:
        code = run_program(folder, cache)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run_words


def run_program(folder: Path, cache: Path) -> int:
    words = [*TINY, f"cache_dir={cache}", f"hydra.run.dir={folder}"]
    return main(run_pipeline, arguments=words)


@pytest.fixture(scope="module")
def left(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs to copy: `finished`; killed before its result was written, and before its scores.

    The first was killed after its last saved state.
    """
    place = tmp_path_factory.mktemp("left")

    def kill(*arguments: object, **options: object) -> None:
        raise Killed

    for name, (owner, stage) in (
        ("unfinished", (TrainedWriter, "__call__")),
        ("trained", WORK["evaluate"]),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, stage, kill)
            run_program(place / name, cache)
    assert (place / "unfinished/attempt_1/saved").is_dir()
    assert run_program(place / "finished", cache) == 0
    return place


@pytest.fixture
def unfinished(left: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left / "unfinished", tmp_path / "unfinished")


@pytest.fixture
def trained(left: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left / "trained", tmp_path / "trained")


@pytest.fixture
def finished(left: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left / "finished", tmp_path / "run")


def result(folder: Path) -> tuple[str, object, object]:
    """Return the results that must not differ: weights, scores, verdict."""
    lineage = Lineage.read(folder / "checkpoint")
    assert lineage is not None
    summary = json.loads((folder / "summary.json").read_text())
    return lineage.model_hash, summary["final"], summary["gate"]


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_each(run: Run, unfinished: Path, place: Path, names: list[str], seed: int) -> list[str]:
    """Flip one bit in each file, resume, and return the files named in an error."""
    whole = place / "whole"
    shutil.copytree(unfinished, whole)
    assert run(whole).code == 0
    expected, refused, draw = result(whole), [], random.Random(seed)
    for name in names:
        folder = place / "flipped"
        shutil.copytree(unfinished, folder)
        flip_a_bit(folder / name, draw)
        ended = run(folder)
        if ended.code == 0:
            assert result(folder) == expected, name
        else:
            assert ended.code in (1, 2) and str(folder / name) in ended.err, (name, ended)
            assert "Traceback" not in ended.err and not (folder / "checkpoint").exists()
            refused.append(name)
        shutil.rmtree(folder)
    return refused


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


USED = [
    "baseline/model.safetensors",
    "baseline/config.json",
    "baseline/tokenizer.json",
    "baseline/tritter.json",
    "importance/state/fisher/model.safetensors",
    "attempt_1/expanded/model.safetensors",
    "attempt_1/saved/tensors.safetensors",
    "attempt_1/saved/checkpoint.json",
    "scores/baseline.json",
    "ledger.json",
    "run.json",
]


@pytest.mark.full
def test_a_flipped_bit_in_what_is_used_is_refused_by_name(
    run: Run, unfinished: Path, tmp_path: Path
) -> None:
    assert set(USED) <= set(files_of(unfinished))
    assert flip_each(run, unfinished, tmp_path, USED, seed=0) == USED


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FLIPS_PER_FILE))
def test_a_flipped_bit_in_any_file_is_refused_or_changes_nothing(
    run: Run, unfinished: Path, tmp_path: Path, seed: int
) -> None:
    names = files_of(unfinished)
    refused = flip_each(run, unfinished, tmp_path, names, seed)
    print(f"{len(names)} files, refused {len(refused)}: {refused}")
    assert set(USED) <= set(refused)


@pytest.mark.full
def test_a_flipped_bit_in_a_trained_model_is_not_published(run: Run, trained: Path) -> None:
    path = trained / "attempt_1/trained/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ended = run(trained)
    assert ended.code == 1 and not (trained / "checkpoint").exists()
    assert f"{path}, tensor " in ended.err and "changed" in ended.err
    assert f"Delete {path.parent} to recreate them" in ended.err
    shutil.rmtree(path.parent)
    again = run(trained)
    assert again.code == 0
    assert f"{path.parent} is missing: repeating attempt_1.fit" in again.out


@pytest.mark.full
@pytest.mark.parametrize("name", ["config.json", "tritter.json"])
def test_an_edited_record_is_told(run: Run, trained: Path, name: str) -> None:
    edits = {
        "config.json": ('"attention_bias": false', '"attention_bias": true'),
        "tritter.json": ('"step": 6', '"step": 7'),
    }
    for folder in ("baseline", "attempt_1/trained"):
        path = trained / folder / name
        before = path.read_text()
        path.write_text(before.replace(*edits[name]))
        assert path.read_text() != before
        ended = run(trained)
        assert ended.code == 1 and str(path) in ended.err
        path.write_text(before)
    assert run(trained).code == 0


@pytest.mark.full
def test_another_checkpoint_with_a_record_of_its_own_is_told(run: Run, trained: Path) -> None:
    shutil.rmtree(trained / "attempt_1/trained")
    shutil.copytree(trained / "baseline", trained / "attempt_1/trained")
    ended = run(trained)
    assert ended.code == 1 and "is not the checkpoint" in ended.err


@pytest.mark.full
def test_what_is_made_again_leaves_what_follows_as_it_is(run: Run, finished: Path) -> None:
    before = result(finished)
    (finished / "scores/baseline.json").unlink()
    ended = run(finished)
    assert ended.code == 0 and result(finished) == before
    assert "repeating baseline" in ended.out and "fit        already finished" in ended.out
    shutil.rmtree(finished / "checkpoint")
    ended = run(finished)
    assert ended.code == 0 and result(finished) == before
    assert "repeating publish" in ended.out
    assert f"{finished}/attempt_1/trained was removed: repeating attempt_1.fit" in ended.out
    assert "gate       already finished" in ended.out
    assert "nothing to do" in run(finished).out


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["checkpoint/model.safetensors", "summary.json", "scores/attempt_1-trained.json"]
)
def test_a_finished_run_is_believed_when_what_it_names_is_whole(
    run: Run, finished: Path, name: str
) -> None:
    before, path = result(finished), finished / name
    flip_a_bit(path, random.Random(0))
    ended = run(finished)
    assert ended.code == 1 and str(path) in ended.err
    place = path.parent if name.startswith("checkpoint") else path
    assert f"Delete {place} and recreate it with: " in ended.err
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert run(finished).code == 0
    assert result(finished) == before
    assert "nothing to do" in run(finished).out


@pytest.mark.full
def test_a_run_of_a_development_version_is_refused_as_such(run: Run, unfinished: Path) -> None:
    plain = json.loads((unfinished / "run.json").read_text())
    del plain["format"]
    (unfinished / "run.json").write_text(json.dumps(plain))
    before = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")}
    ended = run(unfinished)
    assert ended.code == 2 and "development version" in ended.err
    assert {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")} == before


@pytest.mark.full
def test_a_damaged_log_is_told_before_the_training_goes_on(run: Run, unfinished: Path) -> None:
    log = unfinished / "attempt_1/metrics.csv"
    log.write_text(log.read_text() + "x,y\n")
    ended = run(unfinished)
    assert ended.code == 1 and str(log) in ended.err
    assert not (unfinished / "attempt_1/trained").exists()
    log.unlink()
    assert run(unfinished).code == 0


@pytest.mark.full
def test_a_log_may_go_and_a_damaged_one_is_told(run: Run, trained: Path) -> None:
    log = trained / "attempt_1/metrics.csv"
    before = log.read_text()
    log.write_text(before + "x,y\n")
    ended = run(trained)
    assert ended.code == 1 and str(log) in ended.err
    log.unlink()
    assert run(trained).code == 0


def test_each_folder_is_read_once(
    run_tiny: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and lineage are parsed once; weights are not hashed again."""
    reads, hashed = Counter[str](), list[str]()
    read, digest = reading.read_text, hashing.tensor_digest

    def counted(path: Path, **options: object) -> str:
        if path.name in ("config.json", "tritter.json") and path.is_relative_to(tmp_path):
            reads[str(path.relative_to(tmp_path))] += 1
        return read(path, **options)  # type: ignore[arg-type]

    def noted(name: str, tensor: Tensor) -> str:
        hashed.append(name)
        return digest(name, tensor)

    monkeypatch.setattr(reading, "read_text", counted)
    monkeypatch.setattr(records, "read_text", counted)
    monkeypatch.setattr(hashing, "tensor_digest", noted)
    run_tiny(tmp_path)
    assert set(reads.values()) == {1} and not hashed
    places = {str(Path(name).parent) for name in reads}
    assert places == {"baseline", "attempt_1/expanded", "attempt_1/trained"}

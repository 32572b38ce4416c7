"""Documents held out by an ancestor are never trained on, and trained ones never validate.

The oracle reads what runs really feed: the tokens of both sides of every domain, decoded.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import SMALL
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.core.expansions import Width
from tritter.data.documents import text_key
from tritter.errors import RequestError
from tritter.evaluation.gate import GateResult
from tritter.pipeline import run_pipeline
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run
from tritter.terminal import Console
from tritter.transform import expand

QUICK = [
    *(word for word in SMALL if not word.startswith("model.")), "pretraining.max_steps=2",
    "training.max_steps=2", "data.sequence_length=32", "data.vocab_size=280", "gate='off'",
    "evaluation.max_tokens_per_document=99999", "evaluation.sample_tokens=0",
]  # fmt: skip
TINY = ["model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1"]
WORDS = "the model grows a layer where data asks for one and keeps what it knew"


def texts(start: str, count: int = 40) -> list[str]:
    return [f"{start} {number} {WORDS} {number**7}" for number in range(count)]


def write_files(folder: Path, found: Sequence[str], *, start: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(found):
        (folder / f"{start}{number}.txt").write_text(text + "\n")
    return folder


def write_records(path: Path, found: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


@dataclass
class Fed:
    """The training and validation documents of a run, by domain, as keys."""

    train: dict[str, set[str]]
    validation: dict[str, set[str]]

    @property
    def learned(self) -> set[str]:
        return set().union(*self.train.values())

    @property
    def held_out(self) -> set[str]:
        return set().union(*self.validation.values())


def context_of(folder: Path, *words: str) -> Run:
    config = load_config([*QUICK, f"cache_dir={folder}/cache", *words])
    return Run(config, folder, Console(file=StringIO()), Ledger(folder / "none"))


def fed(context: Run) -> Fed:
    corpus = context.data.corpus

    def decoded(side: str) -> Iterator[tuple[str, set[str]]]:
        for name, domain in corpus.domains.items():
            documents = getattr(domain, side)
            tokens = (documents.document(index).tolist() for index in range(len(documents)))
            yield name, {text_key(corpus.tokenizer.decode(each)) for each in tokens}

    return Fed(dict(decoded("train")), dict(decoded("validation")))


def run(folder: Path, name: str, *words: str) -> tuple[Path, Fed, dict[str, Any]]:
    """Train, and return the checkpoint, the training data and the summary."""
    context = context_of(folder, *words)
    (folder / name).mkdir()
    outcome = run_pipeline(context.config, run_folder=folder / name)
    summary = json.loads(outcome.summary_path.read_text())
    return folder / name / "checkpoint", fed(context), summary


def continued(checkpoint: Path, *words: str) -> list[str]:
    return ["model=hf", f"model.path={checkpoint}", "expansion=none", "data=text", *words]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Fed]:
    """A folder with `old/`, `new/` and a run on them; its checkpoint, and its training data."""
    place = tmp_path_factory.mktemp("base")
    write_files(place / "old", texts("of old"))
    write_files(place / "new", texts("and now"))
    paths = [f"data.old={{past:{place}/old}}", f"data.new={{notes:{place}/new}}"]
    checkpoint, first, _ = run(place, "run", *TINY, "data=text", "expansion=none", *paths, "seed=3")
    assert first.train.keys() == {"past", "notes"}
    assert not first.learned & first.held_out
    return place, checkpoint, first


def renamed(place: Path) -> list[str]:
    write_files(place / "renamed", texts("and now"), start="z")
    return [f"data.new={place}/renamed"]


def with_neighbours(place: Path) -> list[str]:
    write_files(place / "more", [*texts("a neighbour"), *texts("and now")])
    return [f"data.new={place}/more"]


def in_other_files(place: Path) -> list[str]:
    """Every second document moved from the old domain to the new one, and the reverse."""
    mixed = [*texts("and now")[::2], *texts("of old")[1::2]]
    write_files(place / "moved", [f"\r\n {text} \n" for text in mixed])
    return [f"data.new={place}/moved"]


def as_records(place: Path) -> list[str]:
    path = write_records(place / "notes.jsonl", [*texts("of old"), *texts("and now")])
    return [f"data.new={path}"]


def old_typed(place: Path) -> list[str]:
    write_files(place / "typed", [*texts("of old")[5:], *texts("more of old")])
    return [f"data.new={renamed(place)[0].removeprefix('data.new=')}", f"data.old={place}/typed"]


def in_both(place: Path) -> list[str]:
    write_files(place / "first", [*texts("shared"), *texts("of old")])
    write_files(place / "second", [*texts("shared"), *texts("and now"), *texts("third")])
    return [f"data.old={place}/first", f"data.new={place}/second"]


WAYS: list[Callable[[Path], list[str]]] = [
    renamed, with_neighbours, in_other_files, as_records, old_typed, in_both,
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_way_a_checkpoint_is_trained_on(
    base: tuple[Path, Path, Fed], tmp_path: Path, way: Any, seed: int
) -> None:
    _, checkpoint, first = base
    context = context_of(tmp_path, *continued(checkpoint, *way(tmp_path)), f"seed={seed}")
    second = fed(context)
    assert first.learned & (second.learned | second.held_out), "the ways meet known text"
    assert not second.held_out & first.learned
    assert not second.learned & first.held_out
    assert not second.learned & second.held_out


@pytest.mark.full
def test_all_that_was_learned_is_old_in_every_generation(
    base: tuple[Path, Path, Fed], tmp_path: Path
) -> None:
    place, checkpoint, first = base
    write_files(tmp_path / "third", [*texts("third"), *texts("of old")[:9]])
    second_checkpoint, second, summary = run(
        tmp_path, "second", *continued(checkpoint, f"data.new={tmp_path}/third"), "seed=8"
    )
    assert summary["domains"] == {"old": ["past", "notes"], "new": ["new"]}
    assert {c["subject"] for c in summary["gate"] if c["check"] == "retention"} == {
        "past", "notes",
    }  # fmt: skip
    assert summary["data"]["new"]["documents"] == 49
    kept = summary["data"]["new"]
    assert kept["train"] + kept["validation"] == 49
    assert kept["held_out_before"] == len(set(map(text_key, texts("of old")[:9])) & first.held_out)
    grown = expand(second_checkpoint, tmp_path / "grown", [Width(hidden_size=32)])
    lineage = Lineage.read(grown.folder)
    assert lineage is not None and lineage.split is not None
    assert list(lineage.domains) == ["past", "notes", "new"]
    assert lineage.split.seed == 3
    assert lineage.domains["past"].paths == (f"{place}/old",)
    # The third generation: another `new`, and text of all that came before
    write_files(tmp_path / "fourth", [*texts("fourth"), *texts("third"), *texts("and now")])
    third = context_of(tmp_path, *continued(grown.folder, f"data.new={tmp_path}/fourth"))
    assert (third.data.old_domains, third.data.new_domains) == (
        ("past", "notes", "new"),
        ("new_2",),
    )
    assert any("is renamed new_2" in note for note in third.data.text.notes)
    now = fed(third)
    learned, held_out = first.learned | second.learned, first.held_out | second.held_out
    assert not now.held_out & learned and not now.learned & held_out


@pytest.mark.full
def test_text_that_was_learned_is_trained_again_under_its_name(
    base: tuple[Path, Path, Fed], tmp_path: Path
) -> None:
    place, checkpoint, first = base
    shutil.copytree(place / "new", tmp_path / "elsewhere")
    again = context_of(tmp_path, *continued(checkpoint, f"data.new={tmp_path}/elsewhere"))
    assert (again.data.old_domains, again.data.new_domains) == (("past",), ("notes",))
    assert fed(again).train["notes"] == first.train["notes"]
    both = [f"data.new={tmp_path}/elsewhere", f"data.old=[{place}/new]", "forgetting=none"]
    message = context_of(tmp_path, *continued(checkpoint, *both))
    assert (message.data.old_domains, message.data.new_domains) == ((), ("notes",))
    assert "notes is trained on again, so it is not old." in message.data.text.notes


@pytest.mark.full
def test_a_run_that_is_rolled_back_has_learned_nothing(
    base: tuple[Path, Path, Fed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint, _ = base
    write_files(tmp_path / "third", texts("third"))
    rolled_back = GateResult("rolled_back", ())
    monkeypatch.setattr(GateResult, "of", lambda checks: rolled_back)
    words = continued(checkpoint, f"data.new={tmp_path}/third")
    kept, _, summary = run(tmp_path, "back", *words, "gate=default")
    assert summary["status"] == "rolled_back"
    before, after = Lineage.read(checkpoint), Lineage.read(kept)
    assert before is not None and after is not None
    assert (after.domains, after.split) == (before.domains, before.split)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda place: (place / "old/3.txt").write_text("other words"), "past can't be used"),
        (lambda place: shutil.rmtree(place / "new"), "notes can't be used"),
    ],
)
def test_learned_text_that_is_not_at_hand(
    base: tuple[Path, Path, Fed], tmp_path: Path, damage: Any, reason: str
) -> None:
    """It is rejected unless old data is set, which then uses the lineage's split."""
    place, _, first = base
    shutil.copytree(place / "run", tmp_path / "run")
    for name in ("old", "new"):
        shutil.copytree(place / name, tmp_path / name)
    record = tmp_path / "run/checkpoint/tritter.json"
    record.write_text(record.read_text().replace(str(place), str(tmp_path)))
    damage(tmp_path)
    write_files(tmp_path / "third", texts("third"))
    words = continued(tmp_path / "run/checkpoint", f"data.new={tmp_path}/third")
    with pytest.raises(RequestError, match=reason):
        context_of(tmp_path, *words)
    write_files(tmp_path / "typed", [*texts("of old"), *texts("and now")])
    typed = context_of(tmp_path, *words, f"data.old={tmp_path}/typed")
    assert typed.data.old_domains == ("old",)
    missing = "There is no text of past, notes, which the checkpoint learned, so none is "
    assert f"{missing}replayed or scored." in typed.data.text.notes
    now = fed(typed)
    assert not now.held_out & first.learned and not now.learned & first.held_out

"""The chain behind a checkpoint: found by hash wherever it lies, and every change in it named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tritter.checkpoints import Lineage, write_lineage
from tritter.checkpoints.history import Difference, Link
from tritter.core.expansions import Context, Dus, LlamaPro, Width
from tritter.core.models import read_model
from tritter.errors import RequestError, TritterError
from tritter.transform import expand

GAIN = "model.norm.weight"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base → wide → deep."""
    place = tmp_path_factory.mktemp("grown")
    oracle.saved(oracle.tiny_llama(), place / "base")
    expand(place / "base", place / "wide", [Width(), LlamaPro()])
    expand(place / "wide", place / "deep", [Dus()])
    return place


@pytest.fixture
def place(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "place"))


def _names(links: tuple[Link, ...]) -> list[str | None]:
    return [link.folder.name if link.folder else None for link in links]


def _change_tensor(folder: Path, name: str = GAIN) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_lineage(folder: Path, **changes: object) -> None:
    path = folder / "tritter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The chain


def test_the_chain_from_its_start(place: Path) -> None:
    links = Link.chain(place / "deep")
    assert _names(links) == ["base", "wide", "deep"]
    methods = [[record.method for record in link.expansion_records] for link in links]
    assert methods == [[], ["width", "llama_pro"], ["dus"]]
    assert [link.num_parameters for link in links] == [
        sum(p.numel() for p in oracle.stock(place / name).parameters())
        for name in ("base", "wide", "deep")
    ]
    wide = Lineage.read(place / "wide")
    assert wide is not None
    assert [link.model_hash for link in links[:2]] == [wide.parent_hash, wide.model_hash]


def test_a_parent_that_moved_is_found_beside_the_child(place: Path) -> None:
    (place / "wide").rename(place / "renamed")
    assert _names(Link.chain(place / "deep")) == ["base", "renamed", "deep"]
    (place / "base").rename(place / "root")
    assert _names(Link.chain(place / "deep")) == ["root", "renamed", "deep"]
    (place / "elsewhere").mkdir()
    (place / "deep").rename(place / "elsewhere" / "deep")
    assert _names(Link.chain(place / "elsewhere" / "deep")) == [None, "deep"]


def test_a_child_in_a_linked_folder_finds_its_parent(place: Path, tmp_path: Path) -> None:
    (tmp_path / "else/where").mkdir(parents=True)
    (place / "out").symlink_to(tmp_path / "else/where")
    expand(place / "base", place / "out/wide", [Width()])
    assert _names(Link.chain(place / "out/wide")) == ["base", "wide"]


def test_a_child_with_the_same_tensors_is_no_parent(place: Path) -> None:
    shutil.rmtree(place / "wide")
    expand(place / "base", place / "long", [Context(target_length=512)])
    expand(place / "long", place / "longer", [Context(target_length=1024)])
    expand(place / "base", place / "deeper", [LlamaPro()])
    assert _names(Link.chain(place / "deeper")) == ["base", "deeper"]
    shutil.rmtree(place / "base")
    links = Link.chain(place / "long")
    assert _names(links) == ["long"]
    assert [record.method for record in links[0].expansion_records] == ["context"]


def test_a_child_in_its_parents_place_finds_the_parent(place: Path) -> None:
    (place / "base").rename(place / "before")
    (place / "wide").rename(place / "base")
    links = Link.chain(place / "base")
    assert _names(links) == ["before", "base"]
    assert [record.method for record in links[1].expansion_records] == ["width", "llama_pro"]


def test_a_parent_that_is_not_there_is_known_by_its_hash(place: Path) -> None:
    shutil.rmtree(place / "wide")
    links = Link.chain(place / "deep")
    assert _names(links) == [None, "deep"]
    assert not links[0].can_be_checked
    deep = Lineage.read(place / "deep")
    assert deep is not None and links[0].model_hash == deep.parent_hash
    # How many expansions were the parent's is not known; one is its own
    assert [record.method for record in links[1].expansion_records] == ["dus"]


def test_another_model_in_the_parents_place_is_not_the_parent(place: Path) -> None:
    expand(place / "base", place / "wide", [Width(init="net2net")], overwrite=True)
    assert _names(Link.chain(place / "deep")) == [None, "deep"]
    expand(place / "base", place / "wide", [Width(), LlamaPro()], overwrite=True)  # as before
    assert _names(Link.chain(place / "deep")) == ["base", "wide", "deep"]


def test_training_makes_a_link_without_expansions(place: Path) -> None:
    shutil.copytree(place / "wide", place / "trained")
    wide = Lineage.read(place / "wide")
    assert wide is not None
    trained = replace(
        wide, model_hash="7" * 64, parent_hash=wide.model_hash, parent_path="../wide", step=9
    )
    write_lineage(place / "trained", trained, read_model(place / "wide").config)
    assert [len(link.expansion_records) for link in Link.chain(place / "trained")] == [0, 2, 0]


def test_a_chain_that_bites_its_tail_ends(place: Path) -> None:
    wide = Lineage.read(place / "wide")
    assert wide is not None
    _edit_lineage(place / "wide", parent_hash=wide.model_hash, parent_path=".")
    assert _names(Link.chain(place / "deep")) == ["wide", "deep"]


def test_a_plain_folder_is_a_chain_of_one(place: Path) -> None:
    (link,) = Link.chain(place / "base")
    assert link.lineage is None and not link.can_be_checked


@pytest.mark.parametrize("name", ["nowhere", ".", "base/config.json"])
def test_what_is_no_checkpoint_is_refused(place: Path, name: str) -> None:
    with pytest.raises(RequestError):
        Link.chain(place / name)


# The check


def _changes(place: Path) -> dict[str, list[Difference]]:
    links = Link.chain(place / "deep")
    assert all(link.can_be_checked and link.folder for link in links)
    found = {link.folder.name: list(link.differences()) for link in links if link.folder}
    return {name: changes for name, changes in found.items() if changes}


def test_an_untouched_chain_is_intact(place: Path) -> None:
    assert _changes(place) == {}


def test_sharding_does_not_matter(place: Path) -> None:
    expand(place / "base", place / "wide", [Width(), LlamaPro()], overwrite=True)
    expand(place / "wide", place / "deep", [Dus()], overwrite=True, max_shard_bytes=50_000)
    assert len(list((place / "deep").glob("*.safetensors"))) > 2
    assert _changes(place) == {}


@pytest.mark.parametrize("name", ["base", "wide", "deep"])
def test_a_changed_tensor_is_named(place: Path, name: str) -> None:
    _change_tensor(place / name)
    assert _changes(place) == {name: [Difference("model.safetensors", GAIN, "changed")]}


@pytest.mark.parametrize("name", ["base", "wide", "deep"])
def test_a_changed_byte_in_the_data_is_named(place: Path, name: str) -> None:
    path = place / name / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (change,) = _changes(place)[name]
    assert change.file == "model.safetensors" and change.tensor and change.detail == "changed"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["base", "wide", "deep"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_changed_or_missing_file_is_named(place: Path, name: str, file: str) -> None:
    path = place / name / file
    path.write_bytes(path.read_bytes() + b" ")
    assert _changes(place) == {name: [Difference(file, None, "changed")]}
    path.unlink()
    if (name, file) != ("base", "config.json"):  # without it there is no checkpoint to find
        assert _changes(place) == {name: [Difference(file, None, "missing")]}


def test_changes_of_tensors_in_number_and_kind(place: Path) -> None:
    path = place / "deep" / "model.safetensors"
    tensors = load_file(path)
    tensors["stray"] = torch.ones(1)
    del tensors[GAIN]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()
    save_file(tensors, path, metadata={"format": "pt"})
    assert {(change.tensor, change.detail) for change in _changes(place)["deep"]} == {
        ("stray", "added"),
        (GAIN, "missing"),
        ("lm_head.weight", "changed"),
    }


def test_a_truncated_file_is_named(place: Path) -> None:
    path = place / "wide" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (change,) = _changes(place)["wide"]
    assert "wide/model.safetensors cannot be read" in change.detail


@pytest.mark.parametrize("name", ["wide", "deep"])
def test_a_changed_record_is_named(place: Path, name: str) -> None:
    _edit_lineage(place / name, model_hash="0" * 64)
    ((found, changes),) = _changes(place).items()
    assert (found, {change.file for change in changes}) == (name, {"tritter.json"})


def test_an_edited_expansion_of_a_parent_is_named(place: Path) -> None:
    """It is no longer a prefix of the child's, and still lies where the child says."""
    path = place / "wide" / "tritter.json"
    path.write_text(path.read_text().replace('"method": "width"', '"method": "stack"'))
    ((found, (change,)),) = _changes(place).items()
    assert (found, change.file, change.detail) == ("wide", "tritter.json", "changed")


@pytest.mark.parametrize("old, new", [('"step": 0', '"step": 7'), ('"step": 0', '"step":  0')])
def test_any_byte_of_a_record_counts(place: Path, old: str, new: str) -> None:
    path = place / "deep" / "tritter.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    ((found, (change,)),) = _changes(place).items()
    assert (found, change.file, change.detail) == ("deep", "tritter.json", "changed")


def test_a_byte_of_the_header_that_moves_no_tensor_counts(place: Path) -> None:
    path = place / "wide" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"xx"', 1))
    ((found, (change,)),) = _changes(place).items()
    assert (found, change.file, change.tensor) == ("wide", "model.safetensors", None)


@pytest.mark.parametrize(
    "change",
    [
        {"benchmark_scores": [1]},
        {"file_digests": "x"},
        {"tensor_digests": None},
        {"parent_path": 3},
        {"expansion_history": {}},
        {"step": "many"},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_refused(place: Path, change: dict[str, object]) -> None:
    path = place / "deep" / "tritter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TritterError, match=next(iter(change))):
        Lineage.read(place / "deep")


@pytest.mark.parametrize("name", ["wide", "deep"])
def test_an_unreadable_record_is_named(place: Path, name: str) -> None:
    (place / name / "tritter.json").write_text("{")
    links = Link.chain(place / "deep")
    assert links[0].folder == place / name
    changes = links[0].differences()
    assert [change.file for change in changes] == ["tritter.json"]


def test_a_parent_whose_record_was_deleted_is_named_and_held_against_its_hash(place: Path) -> None:
    """The child has no digests of it, so it was no plain folder."""
    (place / "wide/tritter.json").unlink()
    wide = Link.chain(place / "deep")[0]
    assert wide.differences() == (Difference("tritter.json", None, "missing"),)
    _change_tensor(place / "wide")
    _, change = wide.differences()
    assert change.tensor is None and str(wide.model_hash) in change.detail

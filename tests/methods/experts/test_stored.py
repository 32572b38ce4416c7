"""Experts in a folder: equal logits after reading, stock classes, damaged folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.methods.experts.mixtures import TARGETS, mixture_of
from tests.methods.novelty.factories import library
from tests.oracle import logits, saved, stock, tiny_llama, tokens
from tritter.checkpoints import Source
from tritter.checkpoints.expert_files import AdapterShape, ExpertFiles, ExpertsHead
from tritter.core.families import Model
from tritter.core.models import load_model
from tritter.errors import RequestError, TritterError
from tritter.methods.experts.gates import Routing
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder, StoredAdapter, adopt, load_with_experts
from tritter.methods.novelty import NoveltyDetector
from tritter.methods.whole import load_whole
from tritter.storage.hashing import file_digest
from tritter.storage.records import signed_text

KINDS = ("learned", "shared", "evidence", "both")


def base_in(folder: Path) -> Path:
    return saved(tiny_llama().double(), folder)


def made(place: Path, kind: str = "both") -> ExpertMixture:
    """Return a mixture on the base in this folder."""
    model = load_model(place, dtype=torch.float64)
    if kind in ("learned", "shared"):
        return mixture_of(model, is_shared=kind == "shared")
    return mixture_of(model, router=kind, has_base=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = base_in(tmp_path_factory.mktemp("written") / "whole")
    ExpertFolder.of(made(place)).write(place)
    return place


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A checkpoint with the base and experts, gated by both routers."""
    return Path(shutil.copytree(written, tmp_path / "whole"))


def difference(one: Any, other: Any) -> float:
    return float((logits(one, tokens()) - logits(other, tokens())).abs().max())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_is_the_same_after_reading(tmp_path: Path, kind: str, top_k: int | None) -> None:
    place = base_in(tmp_path / "whole")
    mixture = made(place, kind)
    mixture.routing = Routing(top_k=top_k, temperature=0.7, capacity_factor=1.25)
    held = ExpertFolder.of(mixture)
    before = logits(mixture.model, tokens())
    for router in mixture.routers():  # the snapshot is unchanged
        router.weight.data.zero_()
    held.write(place)
    whole = load_whole(place, dtype=torch.float64)
    assert torch.equal(logits(whole, tokens()), before)
    assert not whole.training
    again = ExpertFolder.read(place)
    assert again is not None
    applied = again.apply(load_model(place, dtype=torch.float64))
    assert (applied.names, applied.routing) == (mixture.names, mixture.routing)
    assert torch.equal(logits(applied.model, tokens()), before)
    assert difference(load_model(place, dtype=torch.float64), whole) > 0.1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["learned", "both"])
def test_stock_classes_read_the_base_and_every_expert(tmp_path: Path, kind: str) -> None:
    place = base_in(tmp_path / "whole")
    mixture = made(place, kind)
    ExpertFolder.of(mixture).write(place)
    with mixture.off():
        assert difference(stock(place, torch.float64), mixture.model) == 0
    for name in mixture.adapters:
        theirs = PeftModel.from_pretrained(
            stock(place, torch.float64), place / "experts" / name, autocast_adapter_dtype=False
        )
        with mixture.only(name):
            assert difference(theirs, mixture.model) < 1e-12
        assert difference(theirs, stock(place, torch.float64)) > 0.1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_mixture_is_saved_again_and_again(tmp_path: Path, kind: str) -> None:
    mixture, place = made(base_in(tmp_path / "base"), kind), tmp_path / "whole"
    for removed in ("e1", "e2"):
        mixture.model.save_pretrained(place, state_dict=mixture.base_state_dict())
        ExpertFolder.of(mixture).write(place)
        assert difference(load_whole(place, dtype=torch.float64), mixture.model) == 0
        with mixture.off():
            assert difference(stock(place, torch.float64), mixture.model) == 0
        assert {each.name for each in (place / "experts").iterdir()} == set(mixture.adapters)
        mixture.remove(removed)


def test_the_last_adapter_that_is_removed_goes_too(tmp_path: Path) -> None:
    mixture = made(base_in(tmp_path / "base"), "both")
    place = tmp_path / "whole"
    mixture.model.save_pretrained(place, state_dict=mixture.base_state_dict())
    for _ in range(2):
        ExpertFolder.of(mixture).write(place)
        assert {each.name for each in (place / "experts").iterdir()} == set(mixture.adapters)
        assert difference(load_whole(place, dtype=torch.float64), mixture.model) == 0
        for name in mixture.adapters:
            mixture.remove(name)


def test_a_folder_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    place = base_in(tmp_path / "whole")
    (place / "experts").mkdir()
    (place / "experts/notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="experts already exists"):
        ExpertFolder.of(made(place)).write(place)
    assert (place / "experts/notes.txt").read_text() == "mine"


def test_what_a_training_leaves_comes_back_as_it_was(tmp_path: Path) -> None:
    detector = NoveltyDetector(library(torch.Generator().manual_seed(0)))
    extra = {
        "maturity": {"e0": {"steps": 12, "is_mature": True}},
        "novelty": detector.state_dict(),
        "none": None,
        "pair": (1, [2.5, "text"]),
    }
    usage = {"prose": {"base": 0.9, "e0": 0.1}, "code": {"base": 0.3, "e1": 0.7}}
    place = base_in(tmp_path / "whole")
    ExpertFolder.of(made(place), usage=usage, extra=extra).write(place)
    again = ExpertFolder.read(place)
    assert again is not None and again.head.usage == usage
    assert (again.extra["maturity"], again.extra["none"]) == (extra["maturity"], None)
    assert again.extra["pair"] == (1, [2.5, "text"])
    other = NoveltyDetector()
    other.load_state_dict(again.extra["novelty"])
    one, two = (json.dumps(each.state_dict(), default=str) for each in (detector, other))
    assert one == two
    files = ExpertFiles.read(place)
    assert files is not None
    assert files.mean_gates() == pytest.approx({"base": 0.6, "e0": 0.05, "e1": 0.35, "e2": 0})
    with pytest.raises(TypeError, match=r"extra\.model is a .*Llama"):
        ExpertFolder.of(mixture_of(), extra={"model": tiny_llama()})


def test_no_experts_are_no_experts(tmp_path: Path) -> None:
    place = base_in(tmp_path / "plain")
    (place / "experts").mkdir()  # of another user
    assert ExpertFolder.read(place) is None and ExpertFiles.read(place) is None
    assert difference(load_whole(place, dtype=torch.float64), stock(place, torch.float64)) == 0


def test_experts_go_along_as_they_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for artifact in Source(folder, Model({}), None).artifacts():
        artifact(tmp_path / "copy")
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.parent != folder]
    assert len(names) == 8
    assert all((tmp_path / "copy" / n).read_bytes() == (folder / n).read_bytes() for n in names)
    assert {path.stat().st_mode & 0o777 for path in map(folder.joinpath, names)} == {0o644}
    files = ExpertFiles.read(folder)
    assert files is not None
    assert [(name, each.rank, each.alpha) for name, each in files.configs.items()] == [
        ("e0", 2, 4.0),
        ("e1", 4, 9.0),
        ("e2", 3, 8.0),
    ]
    first, last = files.configs["e0"], files.configs["e2"]
    assert (set(first.targets), last.targets) == (set(TARGETS), ("q_proj",))
    # A 2 · in + B out · 2, of q 24 → 24, v 24 → 12, down 40 → 24, in 3 layers
    assert files.num_parameters["e0"] == 3 * 2 * (48 + 36 + 64)


def test_experts_of_another_model_are_refused(folder: Path) -> None:
    held = ExpertFolder.read(folder)
    assert held is not None
    for changes, message in [
        ({"vocab_size": 98}, "count 97 tokens"),
        ({"num_hidden_layers": 2}, r"layers\.2.* only in the folder"),
        ({"intermediate_size": 41}, "down_proj has shape"),
    ]:
        with pytest.raises(TritterError, match=message):
            held.apply(tiny_llama(**changes))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", ["a/b", "..", "a.b", "", "-a", "x" * 65])
def test_a_name_that_is_no_folder_is_not_written(name: str) -> None:
    mixture = mixture_of()
    mixture.names[0] = name
    with pytest.raises(TritterError, match="name"):
        ExpertFolder.of(mixture)


def test_what_is_not_finite_is_not_taken() -> None:
    mixture = mixture_of()
    next(mixture.routers()).bias.data[0] = torch.nan
    with pytest.raises(TritterError, match="router has values that are not finite"):
        ExpertFolder.of(mixture)


# Folders from other sources


def _error_of(folder: Path) -> str:
    with pytest.raises(TritterError) as caught:
        ExpertFolder.read(folder)
    return str(caught.value)


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change the record and update its checksum."""
    path = folder / ExpertsHead.PATH
    path.write_text(signed_text(json.loads(path.read_text()) | changes))


HEADS: list[tuple[dict[str, Any], str]] = [
    ({"format_version": 2}, "format_version 2; this Tritter reads 1"),
    ({"names": ["base", "../../e0"]}, "names = '../../e0'"),
    ({"names": ["base", "/etc"]}, "names = '/etc'"),
    ({"names": ["base", "e0", "e0"]}, "twice"),
    ({"names": ["e0", "e1", "base"]}, "the first must be base"),
    ({"names": ["base", 3]}, "names.1 = 3"),
    ({"names": "base"}, "names = 'base'"),
    ({"names": [f"e{n}" for n in range(300)]}, "1 to 256 names"),
    ({"names": ["base", "e0", "e1", "e3"]}, "e3/adapter_config.json"),
    ({"names": ["base", "e0"]}, "match 2 experts"),
    ({"has_base": 1}, "has_base = 1"),
    ({"router": "mine"}, "router = 'mine'"),
    ({"router": "learned"}, "evidence = an object"),
    ({"top_k": 0}, "top_k = 0"),
    ({"top_k": 1.5}, "top_k = 1.5"),
    ({"temperature": float("nan")}, "temperature = nan"),
    ({"temperature": 0}, "temperature = 0"),
    ({"capacity_factor": "1"}, "capacity_factor = '1'"),
    ({"base_bits": 5}, "base_bits = 5"),
    ({"base_bits": True}, "base_bits = True"),
    ({"evidence": None}, "evidence = null"),
    ({"evidence": {"window": 1}}, "evidence.scale is missing"),
    ({"usage": {"prose": {"e0": float("inf")}}}, "usage.prose.e0 = inf"),
    ({"usage": []}, "usage = []"),
    ({"extra": {"tensor": "gone"}}, "extra (KeyError('gone'))"),
    ({"extra": {"pairs": [[[1], 2]]}}, "extra (TypeError"),
    ({"extra": 3}, "extra (ValueError"),
    ({"tensors_sha256": "0" * 64}, "changed since it was written"),
    ({"more": 1}, "more is unknown"),
]


@pytest.mark.parametrize(("changes", "message"), HEADS, ids=str)
def test_what_the_record_may_not_say(folder: Path, changes: dict[str, Any], message: str) -> None:
    _rewrite(folder, **changes)
    assert message in _error_of(folder)


def test_a_record_that_was_changed_by_accident(folder: Path) -> None:
    text = (folder / ExpertsHead.PATH).read_text()
    (folder / ExpertsHead.PATH).write_text(text.replace('"is_shared": false', '"is_shared": true'))
    assert "its checksum does not match" in _error_of(folder)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        held = load_file(folder / ExpertsHead.TENSORS)
        change(held)
        save_file(held, folder / ExpertsHead.TENSORS)
        _rewrite(folder, tensors_sha256=file_digest(folder / ExpertsHead.TENSORS))

    return changed


def _set(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return _tensors(lambda held: held.update({name: value}))


def _gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return change


ADAPTER = f"experts/e0/{AdapterShape.FILES[1]}"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "router not finite": (_set("router.0.weight", torch.full((4, 24), torch.inf)), "not finite"),
    "router of integers": (_set("router.0.weight", torch.ones(4, 24).int()), "not finite"),
    "router too short": (
        _set("router.1.bias", torch.zeros(2)),
        "[4, 24] and [2], which don't match 4 experts",
    ),
    "router gone": (_tensors(lambda held: held.pop("router.0.weight")), "router.0.weight"),
    "counts below 0": (_set("evidence.counts", torch.full((4, 97), -1)), "negative or empty"),
    "counts of floats": (_set("evidence.counts", torch.zeros(4, 97)), "torch.float32"),
    "no counts": (_tensors(lambda held: held.pop("evidence.counts")), "token counts are mis"),
    "no tensors": (
        lambda folder: (folder / ExpertsHead.TENSORS).write_bytes(b"nothing"),
        "was changed",
    ),
    "tensors gone": (_gone(ExpertsHead.TENSORS), "no such file"),
    "adapter gone": (_gone(ADAPTER), "no such file"),
    "adapter config gone": (_gone(f"experts/e1/{AdapterShape.FILES[0]}"), "no such file"),
    "adapter damaged": (lambda folder: (folder / ADAPTER).write_bytes(b""), "cannot be read"),
    "adapter linked": (_linked(ADAPTER), "leaves the folder"),
    "expert linked": (_linked("experts/e0"), "leaves the folder"),
    "experts linked": (_linked("experts"), "leaves the folder"),
    "tensors linked": (_linked(ExpertsHead.TENSORS), "leaves the folder"),
    "record linked": (_linked(ExpertsHead.PATH), "leaves the folder"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_refused(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    assert message in _error_of(folder)


def test_an_expert_may_not_be_called_as_a_module_calls_its_own(folder: Path) -> None:
    (folder / "experts" / "e0").rename(folder / "experts" / "items")
    _rewrite(folder, names=["base", "items", "e1", "e2"])
    with pytest.raises(RequestError, match="torch reserves"):
        load_with_experts(folder)


def test_experts_that_can_t_stand_on_one_model(folder: Path) -> None:
    narrow = ExpertMixture(tiny_llama(hidden_size=12, head_dim=3))
    narrow.add("e1", AdapterShape(2, 4, ("q_proj",)), seed=0)
    StoredAdapter.of(narrow.model, "e1").write(folder / "experts" / "e1", base="x", overwrite=True)
    with pytest.raises(TritterError, match=r"does not fit the model: .* has shape"):
        load_with_experts(folder)


def test_routers_of_different_sizes_are_refused(folder: Path) -> None:
    _set("router.1.weight", torch.zeros(4, 5))(folder)
    with pytest.raises(TritterError, match="routers have input sizes"):
        load_with_experts(folder)


def test_an_adapter_from_anywhere_becomes_an_expert(folder: Path, tmp_path: Path) -> None:
    mixture = mixture_of(tiny_llama().double())
    before = list(mixture.names)
    adopt(mixture, "theirs", folder / "experts" / "e1")
    assert mixture.names == [*before, "theirs"]
    theirs = PeftModel.from_pretrained(
        tiny_llama().double(), folder / "experts" / "e1", autocast_adapter_dtype=False
    )
    with mixture.only("theirs"):
        assert difference(theirs, mixture.model) < 1e-12
    assert all(not router.weight[-1].any() for router in mixture.routers())
    assert all(len(router.weight) == len(router.bias) == 4 for router in mixture.routers())
    for name, message in [
        ("theirs", "already has"),
        ("a.b", "names = 'a.b'"),
        ("keys", "torch reserves"),
    ]:
        with pytest.raises(RequestError, match=message):
            adopt(mixture, name, folder / "experts" / "e0")
    wide = ExpertMixture(tiny_llama(intermediate_size=41))
    with pytest.raises(TritterError, match="down_proj has shape"):
        adopt(wide, "theirs", folder / "experts" / "e0")
    assert wide.names == []
    assert difference(wide.model, tiny_llama(intermediate_size=41)) == 0

"""Safetensors folders out and in: stock transformers reads them; damage is refused by name."""

import json
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import oracle
from tritter.errors import TritterError
from tritter.storage.atomic import atomic_folder
from tritter.storage.hashing import DigestQueue, merkle_hash, tensor_digest
from tritter.storage.tensors import INDEX_NAME, SINGLE_NAME, TensorFolder, TensorHeader
from tritter.storage.writer import TensorStream

TENSORS = {f"layer.{index}": torch.full((10, 10), float(index)) for index in range(5)}


def _written(folder: Path, *, max_shard_bytes: int) -> dict[str, str]:
    folder.mkdir()
    return TensorStream.of(TENSORS.items()).write(folder, max_shard_bytes=max_shard_bytes)


@pytest.mark.parametrize(
    ("max_shard_bytes", "shards"), [(10**9, 1), (2000, 1), (1999, 2), (800, 3), (400, 5), (1, 5)]
)
def test_round_trip_at_every_shard_size(tmp_path: Path, max_shard_bytes: int, shards: int) -> None:
    digests = _written(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    assert names == ([SINGLE_NAME] if shards == 1 else [*expected, INDEX_NAME])
    folder = TensorFolder.open(tmp_path / "out")
    assert set(folder.files) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(folder[name], tensor)
        assert folder.shape(name) == (10, 10)
        assert digests[name] == tensor_digest(name, tensor)


def test_the_hash_does_not_depend_on_sharding_or_order(tmp_path: Path) -> None:
    whole = _written(tmp_path / "whole", max_shard_bytes=10**9)
    sharded = _written(tmp_path / "sharded", max_shard_bytes=500)
    (tmp_path / "reversed").mkdir()
    turned = TensorStream.of(reversed(TENSORS.items())).write(
        tmp_path / "reversed", max_shard_bytes=900
    )
    assert merkle_hash(whole) == merkle_hash(sharded) == merkle_hash(turned)


def test_stock_transformers_reads_the_shards_and_we_read_its_own(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    theirs = TensorFolder.open(tmp_path / "theirs")
    assert len(set(theirs.files.values())) > 2
    ours = tmp_path / "ours"
    ours.mkdir()
    TensorStream.of((n, theirs.get(n)) for n in theirs.files).write(ours, max_shard_bytes=15_000)
    index = json.loads((ours / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    (ours / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    loaded = oracle.stock(ours).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_at_most_two_tensors_are_held(tmp_path: Path) -> None:
    """While one is made, one may still be hashed; what came before is gone, shard or not."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for index in range(6):
            tensor = torch.full((100, 100), float(index))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"layer.{index}", tensor
            del tensor

    entries = tuple(TensorHeader.of(f"layer.{i}", torch.float32, (100, 100)) for i in range(6))
    TensorStream(entries, tensors()).write(tmp_path)
    assert most <= 3


def test_mixed_types_are_read_by_safetensors(tmp_path: Path) -> None:
    held = {
        "odd": torch.ones(3, dtype=torch.bfloat16),
        "wide": torch.randn(5, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    TensorStream.of(held.items()).write(tmp_path)
    loaded = load_file(tmp_path / SINGLE_NAME)
    assert set(loaded) == set(held)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in held.items())


def test_what_comes_must_have_been_announced(tmp_path: Path) -> None:
    entries = (TensorHeader.of("a", torch.float32, (2,)),)
    with pytest.raises(AssertionError, match="announced"):
        TensorStream(entries, [("a", torch.zeros(3))]).write(tmp_path)


def test_strided_and_bfloat16_tensors_are_written(tmp_path: Path) -> None:
    strided, halved = torch.randn(3, 5).T, torch.randn(4).bfloat16()
    TensorStream.of([("strided", strided), ("halved", halved)]).write(tmp_path)
    folder = TensorFolder.open(tmp_path)
    assert torch.equal(folder["strided"], strided)
    assert torch.equal(folder["halved"], halved)


def _truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _corrupt_header(folder: Path) -> None:
    path = folder / "model-00002-of-00005.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def _empty(folder: Path) -> None:
    (folder / "model-00002-of-00005.safetensors").write_bytes(b"")


def _lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00005.safetensors").unlink()


def _promise(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][name] = file
    (folder / INDEX_NAME).write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "model-00002-of-00005.safetensors cannot be read"),
    "corrupt header": (_corrupt_header, "model-00002-of-00005.safetensors cannot be read"),
    "empty": (_empty, "model-00002-of-00005.safetensors cannot be read"),
    "lost": (_lose_shard, "model-00002-of-00005.safetensors cannot be read"),
    "outside": (
        lambda folder: _promise(folder, "layer.1", "../stolen.safetensors"),
        "points outside its folder: '../stolen.safetensors'",
    ),
    "absolute": (
        lambda folder: _promise(folder, "layer.1", "/etc/passwd"),
        "points outside its folder: '/etc/passwd'",
    ),
    "the folder above": (lambda folder: _promise(folder, "layer.1", ".."), "cannot be read"),
    "promised tensor": (
        lambda folder: _promise(folder, "layer.9", "model-00001-of-00005.safetensors"),
        "lacks the tensor 'layer.9'",
    ),
    "no JSON": (lambda folder: (folder / INDEX_NAME).write_text("{"), "not a safetensors index"),
    "not UTF-8": (
        lambda folder: (folder / INDEX_NAME).write_bytes(b"\xff\xfe"),
        "not a safetensors index",
    ),
    "no map": (lambda folder: (folder / INDEX_NAME).write_text("{}"), "not a safetensors index"),
    "a list": (lambda folder: (folder / INDEX_NAME).write_text("[]"), "not a safetensors index"),
    "map is a list": (
        lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": ["a"]}'),
        "not a safetensors index",
    ),
    "nested without end": (
        lambda folder: (folder / INDEX_NAME).write_text("[" * 200_000),
        "not a safetensors index",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_refused_and_named(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    _written(tmp_path / "out", max_shard_bytes=400)
    save_file({"layer.1": torch.ones(1)}, tmp_path / "stolen.safetensors")
    TensorFolder.open(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(TritterError) as error:
        TensorFolder.open(tmp_path / "out")
    assert message in str(error.value)


def test_damage_after_opening_is_refused_when_read(tmp_path: Path) -> None:
    _written(tmp_path / "out", max_shard_bytes=400)
    folder = TensorFolder.open(tmp_path / "out")
    _truncate(tmp_path / "out")
    assert torch.equal(folder["layer.0"], TENSORS["layer.0"])
    with pytest.raises(TritterError, match=r"model-00002-of-00005\.safetensors cannot be read"):
        folder["layer.1"]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 700])
def test_bytes_as_they_lie_have_the_digests_of_their_tensors(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    others = {"half": torch.arange(7).to(torch.bfloat16), "none": torch.empty(0, 3)}
    (tmp_path / "out").mkdir()
    stream = TensorStream.of({**TENSORS, **others}.items())
    digests = stream.write(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    queue = DigestQueue()
    for raw in TensorFolder.open(tmp_path / "out").raw():
        queue.begin([raw])
    while len(found := queue.results()) < len(digests):
        pass
    assert found == digests


def test_pickles_are_never_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TritterError, match=r"pytorch_model.bin: Tritter never reads pickles"):
        TensorFolder.open(tmp_path)


def test_gguf_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(TritterError, match=r"Q4_K_M\.gguf: Tritter never reads pickles or GGUF"):
        TensorFolder.open(tmp_path)


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TritterError, match=r"contains no model\.safetensors and no model"):
            TensorFolder.open(folder)


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Let the kernel refuse longer files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_the_write_is_told(tmp_path: Path) -> None:
    with (
        file_size_limit(500),
        pytest.raises(TritterError, match="could not be written"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        TensorStream.of(TENSORS.items()).write(folder)
    assert list(tmp_path.iterdir()) == []

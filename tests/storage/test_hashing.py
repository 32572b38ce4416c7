"""Content hashes see every bit and nothing else."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.errors import TritterError
from tritter.storage.hashing import (
    DigestQueue,
    bounded_digest,
    bytes_of,
    file_digest,
    merkle_hash,
    tensor_digest,
)
from tritter.storage.tensors import TensorHeader


def test_tensor_digest_by_another_path() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    content = b"w\0torch.float32\0(1, 2)\0" + tensor.numpy().tobytes()
    assert tensor_digest("w", tensor) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_one_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[2, 3] ^= 1
    assert tensor_digest("w", tensor) != tensor_digest("w", flipped)


def test_name_shape_and_dtype_count() -> None:
    tensor = torch.zeros(2, 6)
    others = [
        tensor_digest("v", tensor),
        tensor_digest("w", tensor.reshape(3, 4)),
        tensor_digest("w", tensor.reshape(12)),
        tensor_digest("w", tensor.int()),
        tensor_digest("w", -tensor),  # −0 is another bit pattern
    ]
    assert len({tensor_digest("w", tensor), *others}) == 6


def test_memory_layout_does_not_count() -> None:
    tensor = torch.randn(4, 6)
    strided = tensor.T.contiguous().T
    assert not strided.is_contiguous()
    assert tensor_digest("w", strided) == tensor_digest("w", tensor)
    assert tensor_digest("w", tensor.requires_grad_()) == tensor_digest("w", tensor.detach())
    assert tensor_digest("s", torch.tensor(1.0)) == tensor_digest("s", torch.tensor(1.0).clone())


@given(
    digests=st.dictionaries(st.text(min_size=1, max_size=5), st.text("0123456789abcdef")),
    data=st.data(),
)
def test_merkle_hash_does_not_depend_on_order(digests: dict[str, str], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(digests.items()))))
    assert merkle_hash(shuffled) == merkle_hash(digests)


def test_merkle_hash_by_hand_and_its_sensitivity() -> None:
    assert merkle_hash({"b": "22", "a": "11"}) == hashlib.sha256(b"a 11\nb 22").hexdigest()
    hashes = [
        merkle_hash({"a": "11", "b": "22"}),
        merkle_hash({"a": "22", "b": "11"}),
        merkle_hash({"a": "11"}),
        merkle_hash({"a": "11", "c": "22"}),
        merkle_hash({}),
    ]
    assert len(set(hashes)) == len(hashes)


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors", "vocab.json"])
def test_a_file_that_was_blown_up_is_refused_and_not_hashed(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(TritterError, match=name):
        bounded_digest(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x02" + bytes(7) + b"{}")
    assert bounded_digest(tmp_path / name) == file_digest(tmp_path / name)


HELD = {f"t{number}": torch.full((3, 5), float(number)).bfloat16() for number in range(6)}
RAW = [(TensorHeader(name, "bfloat16", (3, 5)), bytes_of(held)) for name, held in HELD.items()]
DIGESTS = {name: tensor_digest(name, tensor) for name, tensor in HELD.items()}


def test_a_queue_that_has_begun_goes_on_until_others_ask() -> None:
    queue, is_requested, read = DigestQueue(), Event(), list[str]()

    def tensors() -> Iterator[tuple[TensorHeader, memoryview]]:
        for header, content in RAW:
            read.append(header.name)
            if header.name == "t2":
                assert is_requested.wait(60)
            yield header, content

    queue.begin(tensors())
    queue.add("t4", HELD["t4"])
    is_requested.set()
    assert queue.digest("t4") == DIGESTS["t4"]
    # The first may have been at work already, the third never comes behind another's
    assert read in (["t0"], ["t0", "t1"], ["t0", "t1", "t2"])
    for name, tensor in HELD.items():
        queue.add(name, tensor)
    assert queue.results() == DIGESTS


def test_what_was_hashed_ahead_is_not_hashed_again() -> None:
    queue = DigestQueue()
    queue.begin(RAW)
    while len(queue.results()) < len(HELD):
        pass
    others = {name: tensor + 1 for name, tensor in HELD.items()}
    for name, tensor in others.items():
        queue.add(name, tensor)
    assert queue.results() == DIGESTS


def test_a_closed_queue_stops_within_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritter.storage.hashing._PIECE_BYTES", 1)
    queue = DigestQueue()

    def tensors() -> Iterator[tuple[TensorHeader, memoryview]]:
        queue.close()
        yield from RAW

    queue.begin(tensors())
    queue.add("last", HELD["t0"])  # which comes behind
    assert queue.results() == {"last": tensor_digest("last", HELD["t0"])}


def test_damage_is_found_by_those_who_read() -> None:
    queue = DigestQueue()

    def tensors() -> Iterator[tuple[TensorHeader, memoryview]]:
        yield RAW[0]
        raise TritterError

    queue.begin(tensors())
    for name, tensor in HELD.items():
        queue.add(name, tensor)
    assert queue.results() == DIGESTS

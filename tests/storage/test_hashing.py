"""Content hashes see every bit and nothing else."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.errors import TritterError
from tritter.storage.hashing import bounded_digest, file_digest, merkle_hash, tensor_digest


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

"""Bytes on disk: lazy tensors, shards in and out, atomic folders, hashes. Knows no models."""

from tritter.storage.atomic import atomic_folder, write_text_atomic
from tritter.storage.hashing import file_digest, merkle_hash, tensor_digest
from tritter.storage.tensors import TensorFolder, write_tensors

__all__ = [
    "TensorFolder",
    "atomic_folder",
    "file_digest",
    "merkle_hash",
    "tensor_digest",
    "write_tensors",
    "write_text_atomic",
]

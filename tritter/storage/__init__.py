"""Bytes on disk: lazy tensors, shards in and out, atomic folders, hashes. Knows no models."""

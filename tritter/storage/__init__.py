"""Storage: lazy tensor reading, sharded writing, atomic folders and hashes, for any model."""

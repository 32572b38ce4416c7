"""Corpora, their tokens, and the packed batches that remember where they stand."""

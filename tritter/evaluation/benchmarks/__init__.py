"""Benchmarks in their published formats, scored through lm-evaluation-harness."""

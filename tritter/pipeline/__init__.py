"""The stages of a run and their ledger: baseline, expand, fit, evaluate, gate, publish."""

from tritter.pipeline.pipeline import Outcome, run_pipeline

__all__ = ["Outcome", "run_pipeline"]

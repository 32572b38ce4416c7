"""The stages of a run and their ledger: baseline, expand, fit, evaluate, gate, publish."""

from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.pipeline import Outcome, run_pipeline
from tritter.pipeline.run import Run
from tritter.pipeline.stage import Stage

__all__ = ["Branch", "Outcome", "Run", "Stage", "StageResult", "run_pipeline"]

"""`tritter train`: without a checkpoint, the program behind train.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.errors import RequestError

if TYPE_CHECKING:
    from tritter.config import RunConfig
    from tritter.config.jobs import Outcome


def run_train(words: Sequence[str]) -> int:
    """Hand the words on and return the exit code.

    Raises:
        RequestError: a checkpoint is to be trained on, which is not built yet.
    """
    if any(word.partition("=")[0] == "--checkpoint" for word in words):
        raise RequestError(
            "tritter train --checkpoint: continued training of a checkpoint is not built yet. "
            "Without --checkpoint, train pretrains a base, grows it and trains it on (--help)."
        )
    from tritter.config.entry import main

    return main(_pipeline, arguments=words)


def _pipeline(config: "RunConfig", *, run_folder: Path) -> "Outcome":
    """Run the stages; imported here so that help and refusals don't wait for Lightning."""
    from tritter.pipeline import run_pipeline

    return run_pipeline(config, run_folder=run_folder)

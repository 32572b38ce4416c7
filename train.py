"""Grow a language model, train it on new data, and keep it or roll it back.

This file replaces `@hydra.main` by `main`, which has its own error messages and exit codes.
Hydra's shell completion recognizes this file by the text `@hydra.main`.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.config.launch.entry import main
from tritter.loading import loading

if TYPE_CHECKING:
    from tritter.config.launch.jobs import Outcome
    from tritter.config.schema import RunConfig


def pipeline(config: "RunConfig", *, run_folder: Path) -> "Outcome":
    """Run the pipeline; imported lazily so that help and errors do not wait for Lightning."""
    with loading("lightning"):
        from tritter.pipeline import run_pipeline

    return run_pipeline(config, run_folder=run_folder)


if __name__ == "__main__":
    sys.exit(main(pipeline))

"""Grow a language model on real text, check it, and keep it or roll it back.

What `@hydra.main` does, `main` does with refusals and exit codes of its own; by that word Hydra's
shell completion knows that it may ask this file.
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
    """Run the stages; imported here so that help and refusals don't wait for Lightning."""
    with loading("lightning"):
        from tritter.pipeline import run_pipeline

    return run_pipeline(config, run_folder=run_folder)


if __name__ == "__main__":
    sys.exit(main(pipeline))

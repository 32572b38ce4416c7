"""train.py with stub runs, for testing launchers without a model.

The seed of a run selects its outcome. `begun.txt` next to the sweep lists started runs and folders.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tritter.config.launch.entry import main
from tritter.config.schema import RunConfig
from tritter.errors import TritterError

FAILS, WAITS, IS_KILLED = 1, 7, 9


@dataclass(frozen=True)
class Outcome:
    status: str
    metric: float
    leaves: tuple[str, ...] = ("summary.json",)


def pipeline(config: RunConfig, *, run_folder: Path) -> Outcome:
    threads = os.environ.get("OMP_NUM_THREADS")
    line = f"{run_folder.name} {config.seed} {os.getpid()} {threads} {config.wandb.group}\n"
    with Path("begun.txt").open("a") as file:
        file.write(line)
    print("a line of the run")
    if config.seed == FAILS:
        raise TritterError("the loss was not finite 10 times in a row")
    if config.seed == IS_KILLED:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    while config.seed == WAITS and not Path("go").exists():
        time.sleep(0.05)
    metric = 2.0 + config.training.learning_rate
    (run_folder / "summary.json").write_text(f'{{"metric": {metric}}}')
    return Outcome("kept", metric)


if __name__ == "__main__":
    sys.exit(main(pipeline))

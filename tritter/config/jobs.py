"""One job as Hydra starts it: folder, pipeline, and what became of it in `status.json`."""

import json
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tritter.config.composition import plain_config
from tritter.config.run_folder import RunState, check_run_folder, write_json, write_run_file
from tritter.config.schema import RunConfig
from tritter.config.validation import validate
from tritter.errors import RequestError, TritterError
from tritter.terminal import say

FORMAT_VERSION = 1
STATUS_FILE = "status.json"

EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_NOT_KEPT = 0, 1, 2, 3


class Outcome(Protocol):
    """What the pipeline returns of a run that finished."""

    @property
    def status(self) -> str:
        """One of kept, rolled_back, undecided."""
        ...

    @property
    def metric(self) -> float:
        """The number that a sweeper minimises."""
        ...

    @property
    def summary_path(self) -> Path: ...


class Pipeline(Protocol):
    """The stages of a run, as `tritter.pipeline.run_pipeline`."""

    def __call__(self, config: RunConfig, *, run_folder: Path) -> Outcome: ...


def run_job(cfg: DictConfig, pipeline: Pipeline) -> float:
    """Run one composed job in the folder that Hydra made for it and return the sweeper's metric.

    A failure goes to the job's `status.json`. In a sweep the other jobs go on, and the failed
    one counts as NaN; in a single run an error that is not ours is raised again.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    words = [str(word).removeprefix("++") for word in hydra.overrides.task]
    is_sweep = hydra.mode == RunMode.MULTIRUN
    if is_sweep:
        say(f"\njob {hydra.job.num}: {' '.join(words)}")
    try:
        config = validate(plain_config(cfg))
        if check_run_folder(folder, config) is RunState.FINISHED:
            metric = read_status(folder).get("metric")
            return math.nan if metric is None else float(metric)
        write_run_file(folder, config, status="running")
        _write_status(folder, words, status="running", exit_code=EXIT_FAILED)
        outcome = pipeline(config, run_folder=folder)
        write_run_file(folder, config, status="finished")
    except TritterError as error:
        code = EXIT_REQUEST if isinstance(error, RequestError) else EXIT_FAILED
        _write_status(folder, words, status="failed", exit_code=code, error=str(error))
        if is_sweep:
            say(f"job {hydra.job.num} failed: {error}")
        return math.nan
    except Exception as error:
        # The job's border: whatever a library raised, the other jobs of a sweep go on.
        text = f"{type(error).__name__}: {error}"
        _write_status(folder, words, status="failed", exit_code=EXIT_FAILED, error=text)
        if not is_sweep:
            raise
        traceback.print_exc()
        return math.nan
    is_refused = config.gate.strict and outcome.status != "kept"
    _write_status(
        folder,
        words,
        status=outcome.status,
        exit_code=EXIT_NOT_KEPT if is_refused else EXIT_DONE,
        metric=outcome.metric,
        summary=str(outcome.summary_path),
    )
    return outcome.metric


def read_status(folder: Path) -> dict[str, Any]:
    """Return what `status.json` says of a job; of one that never came to write it, that."""
    try:
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "not run", "exit_code": EXIT_FAILED, "error": "it left no status.json"}
    return dict(status)


def _write_status(
    folder: Path,
    words: Sequence[str],
    *,
    status: str,
    exit_code: int,
    metric: float | None = None,
    summary: str | None = None,
    error: str | None = None,
) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "status": status,
        "exit_code": exit_code,
        "overrides": list(words),
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "summary": summary,
        "error": error,
    }
    write_json(folder / STATUS_FILE, content)

"""Where a run's metrics go besides metrics.csv: opened for a training, closed whatever happens."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger

from tritter.config.fingerprint import fingerprint
from tritter.pipeline.context import RunContext
from tritter.pipeline.metrics import run_name, wandb_logger
from tritter.storage.atomic import write_text_atomic
from tritter.targets import TARGET, NamedTarget, built, imported


def counted_on(logger: Logger, first_step: int) -> Logger:
    """Return a logger whose steps go on from those of the trainings before."""
    return CountedOn(logger, first_step) if first_step else logger


class CountedOn(Logger):
    """A logger for a training that others came before.

    Args:
        logger: takes what is logged.
        first_step: is added to every step.
    """

    def __init__(self, logger: Logger, first_step: int) -> None:
        self._logger = logger
        self._first_step = first_step

    @property
    def name(self) -> str | None:
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    @property
    def root_dir(self) -> str | None:
        return self._logger.root_dir

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    @property
    def group_separator(self) -> str:
        return self._logger.group_separator

    @property
    def experiment(self) -> Any:
        """What the logger writes to."""
        return self._logger.experiment  # type: ignore[attr-defined]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._logger.log_metrics(metrics, None if step is None else self._first_step + step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._logger.log_hyperparams(params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self._logger.log_graph(model, input_array)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        self._logger.after_save_checkpoint(checkpoint_callback)

    def save(self) -> None:
        self._logger.save()

    def finalize(self, status: str) -> None:
        self._logger.finalize(status)


@contextmanager
def open_loggers(
    context: RunContext, part: str | None = None, *, first_step: int = 0
) -> Iterator[list[Logger]]:
    """Yield W&B if it is chosen, which stays open, and then the other loggers in their order.

    The first training of a part logs the configuration; W&B has it from its start.

    Args:
        part: control, pretraining or a further attempt, each beside the run in the same group;
            None: the run itself.
        first_step: from where steps are counted: those of the trainings of the part before.
    """
    loggers: list[Logger] = []
    with ExitStack() as opened:
        if (wandb := wandb_logger(context, part)) is not None:
            loggers.append(wandb)
        for named in context.config.logger.others:
            loggers.append(logger := _built(named, context, part))
            opened.push(partial(_close, logger))
            if not first_step:
                logger.log_hyperparams(fingerprint(context.config))
        yield [counted_on(logger, first_step) for logger in loggers]


def _close(logger: Logger, error: type[BaseException] | None, *_: object) -> None:
    logger.finalize("success" if error is None else "failed")


def _built(named: NamedTarget, context: RunContext, part: str | None) -> Logger:
    """Build a logger that writes below the run folder, unless it is told another place.

    One that names its runs is told the part's name; of others each part has a folder.
    """
    body = dict(named.body)
    takes = inspect.signature(imported(body[TARGET])).parameters
    has_names = "run_name" in takes
    if "save_dir" in takes:
        folder = context.folder / str(body.get("save_dir") or named.name)
        body["save_dir"] = str(folder if part is None or has_names else folder / part)
    if has_names:
        body["run_name"] = body.get("run_name") or run_name(context, part)
    if issubclass(imported(body[TARGET]), MLFlowLogger) and body.get("run_id") is None:
        kept = f"{named.name}_id" if part is None else f"{named.name}_id.{part}"
        return _same_run(body, context.folder / kept)
    logger = built(body)
    assert isinstance(logger, Logger)
    return logger


def _same_run(body: Mapping[str, Any], kept: Path) -> MLFlowLogger:
    """Open the run in MLflow whose id is kept, or a new one where MLflow does not have it."""
    from mlflow.exceptions import MlflowException

    known = kept.read_text(encoding="utf-8") if kept.exists() else None
    logger: MLFlowLogger = built({**body, "run_id": known})
    try:
        logger.experiment.update_run(logger.run_id, status="RUNNING")
    except MlflowException as error:
        if known is None or error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger = built(body)  # it was deleted there, or another server is named now
    write_text_atomic(kept, str(logger.run_id))
    return logger

"""`logger`: where metrics go besides metrics.csv, several at once."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from inspect import signature
from tempfile import TemporaryDirectory
from typing import Any

from tritter.config.named import built_for_trial
from tritter.config.reading import Reader
from tritter.config.schema import LoggerConfig, WandbConfig
from tritter.errors import Problem
from tritter.targets import NamedTarget

_EXTRAS = ("tensorboard", "mlflow")  # of Tritter, by the package that a logger needs
_MLFLOW = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # its newer versions refuse to write files else
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run tells nobody of itself
}


def read_loggers(
    reader: Reader, bodies: Mapping[str, Any], classes: Mapping[str, Any]
) -> LoggerConfig:
    """Return the loggers of a run; what is wrong is reported to the reader."""
    wandb: WandbConfig | None = None
    if isinstance(body := bodies.get("wandb"), Mapping):
        wandb = reader.read(WandbConfig, body, prefix="logger.wandb")
    elif body is not None:
        reader.report("logger.wandb", body, reason="it is called logger.wandb.mode now")
    others = {name: body for name, body in bodies.items() if name != "wandb"}
    for name, body in others.items():
        if (kind := classes.get(f"logger.{name}")) is not None:
            reader.problems += map(_with_extra, _problems(f"logger.{name}", kind, body))
    return LoggerConfig(
        wandb=None if wandb is None or wandb.mode == "off" else wandb,
        others=tuple(NamedTarget(name=name, body=body) for name, body in others.items()),
    )


def _problems(key: str, kind: type, body: Mapping[str, Any]) -> list[Problem]:
    """Build a logger for trial, in a folder that is gone afterwards: some write at once."""
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)
    with TemporaryDirectory() as folder:
        given = {"save_dir": folder} if "save_dir" in signature(kind).parameters else {}
        return built_for_trial(key, kind, {**body, **given})[1]


def _with_extra(problem: Problem) -> Problem:
    """Say how a package is installed that a logger needs, in place of what Lightning says."""
    said = problem.reason.casefold()
    is_of_arguments = "no such argument" in said or "needs it" in said
    for package in () if is_of_arguments else _EXTRAS:
        if package in said and find_spec(package) is None:
            reason = f"it needs {package}, which is not installed: pip install 'tritter[{package}]'"
            return Problem(problem.key, reason=reason)
    return problem

"""`logger`: where metrics go besides metrics.csv, several at once."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from tritter.config.described import judged, named_targets, shape_problem
from tritter.config.reading import Reader
from tritter.config.renamed import new_name
from tritter.config.schema import LoggerConfig, WandbConfig
from tritter.errors import Problem
from tritter.targets import NamedTarget

LOGGER = "lightning.pytorch.loggers.Logger"
_EXTRAS = {  # of Tritter, by the package that a logger needs
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
}
_MLFLOW = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # its newer versions refuse to write files else
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run tells nobody of itself
}


def read_loggers(reader: Reader, raw: object) -> LoggerConfig:
    """Return the loggers of a run; what is wrong is reported to the reader."""
    if not isinstance(raw, Mapping):
        reason = "choose options of it, as in logger=[csv,tensorboard]"
        reader.report("logger", raw, reason=reason)
        return LoggerConfig(wandb=None, others=())
    wandb = _read_wandb(reader, raw["wandb"]) if raw.get("wandb") is not None else None
    for name in raw.get("csv") or ():
        reader.report(f"logger.csv.{name}", raw["csv"][name], reason="metrics.csv has no keys")
    others = {n: body for n, body in raw.items() if n not in ("wandb", "csv")}
    named = named_targets(others)
    for each in named:
        if (now := new_name(f"logger.{each.name}")) is not None:
            reader.report(f"logger.{each.name}", each.body, reason=f"it is called {now} now")
        elif (shapeless := shape_problem("logger", each)) is not None:
            reader.add([shapeless])
        else:
            reader.add([_with_extra(p) for p in _problems(each)])
    return LoggerConfig(wandb=wandb, others=tuple(named))


def _read_wandb(reader: Reader, raw: Any) -> WandbConfig | None:
    if not isinstance(raw, Mapping):
        reason = "it is called logger.wandb.mode now"
        reader.report("logger.wandb", raw, reason=reason)
        return None
    record: WandbConfig | None = reader.read(WandbConfig, raw, prefix="logger.wandb")
    return None if record is None or record.mode == "off" else record


def _problems(named: NamedTarget) -> list[Problem]:
    """Build a logger for trial, in a folder that is gone afterwards: some write at once."""
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)
    with TemporaryDirectory() as folder:
        return judged("logger", named, base=LOGGER, given={"save_dir": folder})[1]


def _with_extra(problem: Problem) -> Problem:
    """Say how a package is installed that a logger needs, in place of what Lightning says."""
    said = problem.reason.casefold()
    for package, extra in _EXTRAS.items():
        is_said = package in said and "no such argument" not in said and "needs it" not in said
        if is_said and find_spec(package) is None:
            reason = f"it needs {package}, which is not installed: pip install 'tritter[{extra}]'"
            return Problem(problem.key, reason=reason)
    return problem

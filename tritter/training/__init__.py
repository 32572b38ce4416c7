"""Training: LightningModules, the protocol of forgetting methods, one fit per stage.

What takes Lightning is imported when it is first asked for: a refusal of a method's options, which
only needs the protocol, doesn't wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tritter.training.forgetting_method import (
    ForgettingMethod,
    Needs,
    NoOptions,
    Preparation,
    Prepared,
    Task,
    Values,
)
from tritter.training.metrics import metrics_files, read_metrics
from tritter.training.optimizer import OptimizerSettings, Schedule
from tritter.training.options import TrainerSettings

if TYPE_CHECKING:
    from tritter.training.fitting import discard_saved, fit
    from tritter.training.module import BaseModule, SideLoss
    from tritter.training.result import FitResult, WriteResult

_WITH_LIGHTNING = {
    "BaseModule": "module",
    "FitResult": "result",
    "SideLoss": "module",
    "WriteResult": "result",
    "discard_saved": "fitting",
    "fit": "fitting",
}
__all__ = [
    "BaseModule",
    "FitResult",
    "ForgettingMethod",
    "Needs",
    "NoOptions",
    "OptimizerSettings",
    "Preparation",
    "Prepared",
    "Schedule",
    "SideLoss",
    "Task",
    "TrainerSettings",
    "Values",
    "WriteResult",
    "discard_saved",
    "fit",
    "metrics_files",
    "read_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_LIGHTNING:
        raise AttributeError(f"module 'tritter.training' has no attribute {name!r}")
    return getattr(import_module(f"tritter.training.{_WITH_LIGHTNING[name]}"), name)

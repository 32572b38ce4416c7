"""Training: LightningModules, the protocol of continual-learning methods, one fit per stage.

Names that need Lightning are imported on first use, so that checking the options of a method stays
fast.
"""

from typing import TYPE_CHECKING

from tritter.loading import lazy_names
from tritter.training.forgetting_method import ForgettingMethod, Needs, Preparation, Prepared, Task
from tritter.training.method import Method, Setting, SideLoss, Trainee, Values
from tritter.training.metrics import metrics_files, read_metrics
from tritter.training.optimizer import OptimizerSettings, Schedule
from tritter.training.options import TrainerSettings

if TYPE_CHECKING:
    from tritter.training.fitting import discard_saved, fit
    from tritter.training.module import BaseModule
    from tritter.training.result import FitResult, WriteResult

__getattr__ = lazy_names(
    "tritter.training",
    {
        "BaseModule": "tritter.training.module",
        "FitResult": "tritter.training.result",
        "WriteResult": "tritter.training.result",
        "discard_saved": "tritter.training.fitting",
        "fit": "tritter.training.fitting",
    },
)
__all__ = [
    "BaseModule",
    "FitResult",
    "ForgettingMethod",
    "Method",
    "Needs",
    "OptimizerSettings",
    "Preparation",
    "Prepared",
    "Schedule",
    "Setting",
    "SideLoss",
    "Task",
    "Trainee",
    "TrainerSettings",
    "Values",
    "WriteResult",
    "discard_saved",
    "fit",
    "metrics_files",
    "read_metrics",
]

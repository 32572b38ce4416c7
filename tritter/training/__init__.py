"""Training: LightningModules, the protocol of forgetting methods, one fit per stage."""

from tritter.training.fitting import FitResult, TrainerSettings, discard_saved, fit
from tritter.training.forgetting_method import ForgettingMethod, Task
from tritter.training.metrics import metrics_files, read_metrics
from tritter.training.module import BaseModule, ExpandedModule
from tritter.training.optimiser import OptimiserSettings
from tritter.training.routing import OldRouting, RoutingObjective, RoutingSettings
from tritter.training.schedule import Schedule

__all__ = [
    "BaseModule",
    "ExpandedModule",
    "FitResult",
    "ForgettingMethod",
    "OldRouting",
    "OptimiserSettings",
    "RoutingObjective",
    "RoutingSettings",
    "Schedule",
    "Task",
    "TrainerSettings",
    "discard_saved",
    "fit",
    "metrics_files",
    "read_metrics",
]

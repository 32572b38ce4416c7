"""What a model loses on the text of evaluations before it is expanded: where curves come from."""

import math
from dataclasses import replace

from torch import nn

from tritter.data.datamodule import EvaluationText, TextModule
from tritter.training.checkpoint_io import random_state, restore_random_state
from tritter.training.module import BaseModule
from tritter.training.optimizer import OptimizerSettings
from tritter.training.schedule import Schedule
from tritter.training.trainer import (
    TrainerSettings,
    build_trainer,
    quiet_lightning,
    torch_settings_kept,
)


def losses_before(
    model: nn.Module, text: EvaluationText, settings: TrainerSettings
) -> dict[str, float]:
    """Return `eval/<domain>/loss` of a model as its training would log it, in nats per token.

    By the same loop in the same precision, in one process. One that is not finite is left out.
    No random generator moves; the model comes back on the CPU, in that precision.
    """
    devices = settings.devices[:1] if isinstance(settings.devices, list) else 1
    arguments = {name: value for name, value in settings.arguments.items() if name != "profiler"}
    alone = replace(settings, strategy="auto", devices=devices, arguments=arguments)
    never = Schedule.constant(0.0, max_steps=1)
    module = BaseModule(model, schedule=never, optimizer=OptimizerSettings())
    random = random_state()
    with quiet_lightning(), torch_settings_kept():
        trainer = build_trainer(alone, [], never.max_steps, loggers=[])
        trainer.validate(module, datamodule=TextModule((), text), verbose=False)
    restore_random_state(random)
    model.to("cpu")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = (f"eval/{domain}/loss" for domain in text.domains)
    return {name: logged[name] for name in names if math.isfinite(logged.get(name, math.nan))}

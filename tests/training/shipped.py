"""The settings of `trainer=cpu`, for trainings that no config asks for."""

from typing import Any

import yaml

from tritter.conf_folder import config_folder
from tritter.training import TrainerSettings


def trainer_settings(**changes: Any) -> TrainerSettings:
    """Return what `conf/trainer/cpu.yaml` says, without bars, and with some changes."""
    stated = yaml.safe_load((config_folder() / "trainer/cpu.yaml").read_text(encoding="utf-8"))
    return TrainerSettings(**{**stated, "progress": "off", **changes})

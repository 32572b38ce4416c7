"""The settings of `trainer=cpu`, for training runs without a config."""

from typing import Any

import yaml

from tritter.conf_folder import config_folder
from tritter.training import TrainerSettings


def trainer_settings(**changes: Any) -> TrainerSettings:
    """Return the settings of `conf/trainer/cpu.yaml` with changes and without progress bars."""
    stated = yaml.safe_load((config_folder() / "trainer/cpu.yaml").read_text(encoding="utf-8"))
    return TrainerSettings(**{**stated, "progress": "off", **changes})

"""Hydra, started on a request that was checked."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from tritter.conf_folder import config_folder
from tritter.config.folders import front
from tritter.config.launch.composition import VERSION_BASE, no_running_hydra

_RAISING = "HYDRA_FULL_ERROR"  # without it Hydra prints what is raised, and exits


def start_hydra(
    arguments: Sequence[str], run: Callable[[DictConfig], float | None], *, is_raising: bool = False
) -> None:
    """Let Hydra act on these words, with a function that runs a composed job."""

    def train(cfg: DictConfig) -> float | None:
        return run(cfg)

    decorate = hydra.main(
        config_path=str(config_folder()), config_name=front().config_name, version_base=VERSION_BASE
    )
    with no_running_hydra(), _process_arguments(arguments), _raising(is_raising=is_raising):
        decorate(train)()


@contextmanager
def _process_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Show Hydra, which reads them from the process, these arguments."""
    before = sys.argv
    sys.argv = [before[0] if before else "train.py", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _raising(*, is_raising: bool) -> Iterator[None]:
    before = os.environ.get(_RAISING)
    if is_raising:
        os.environ[_RAISING] = "1"
    try:
        yield
    finally:
        if is_raising and before is None:
            del os.environ[_RAISING]
        elif before is not None:
            os.environ[_RAISING] = before

"""What holds for every test: stored compositions, suites, one seed, a log as before."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from tests import IMPORT_TORCH_SECONDS
from tests.compositions import keep_compositions
from tests.suites import Suites

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("tritter", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("tritter")
transformers_logging.disable_progress_bar()
keep_compositions()
os.fsync = lambda fd: None  # it waits for the disk; a killed process loses nothing without it


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Suites(config, import_torch_seconds=IMPORT_TORCH_SECONDS))


def pytest_collection_finish() -> None:
    """Modules and tests live as long as the process: no collection of garbage looks at them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)  # a composition alone makes many small objects


@pytest.fixture(scope="session", autouse=True)
def started_by_the_script() -> Iterator[None]:
    """Commands that a run prints are those of train.py, not of pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *sys.argv[1:]])
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let no test depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logged_as_before() -> Iterator[None]:
    """Take away the handlers that a run in this process gave to the log: their streams are gone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    if root.level != level:  # setting it empties the caches of all loggers
        root.setLevel(level)

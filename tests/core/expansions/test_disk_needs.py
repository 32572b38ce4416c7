"""The estimated memory of an expansion, compared with its measured peak."""

import ctypes
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.streaming import write_source
from tritter.checkpoints import Source
from tritter.checkpoints.state import write_state
from tritter.core.expansions import Dus, ExpansionSpec, Moe, Width
from tritter.core.models import read_model
from tritter.storage.tensors import TensorFolder
from tritter.storage.writer import TensorStream
from tritter.transform import DiskNeeds, expand, plan_expansion

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
HIDDEN = 768
LARGEST = HIDDEN * (HIDDEN * 11 // 4)  # entries of a matrix
WIDER = Width(hidden_size=HIDDEN * 3 // 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama of three layers."""
    folder = tmp_path_factory.mktemp("room") / "source"
    write_source(folder, megabytes=35, hidden_size=HIDDEN, is_repeated=True)
    return folder


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_memory(work: Callable[[], object]) -> int:
    """Return the peak memory of a call above the memory before it, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    before = highest = anonymous_bytes()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not is_over.is_set():
            highest = max(highest, anonymous_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        is_over.set()
        watcher.join()
    return highest - before


def estimate_and_peak(
    source: Path, result: Path, specs: Sequence[ExpansionSpec]
) -> tuple[int, int]:
    plan = plan_expansion(source, specs)
    estimated = DiskNeeds.of(Source.open(source, read_model(source)), plan).in_flight
    return estimated, peak_memory(lambda: expand(source, result, plan))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("specs", "is_whole"),
    [
        ([Dus()], False),
        ([Width(intermediate_size=HIDDEN * 4, init="net2net")], False),
        ([WIDER], False),
        ([WIDER, Moe(num_experts=2)], True),
    ],
    ids=["dus", "ffn", "width", "width,moe"],
)
def test_what_is_told_is_of_the_size_of_what_is_taken(
    source: Path, tmp_path: Path, specs: list[ExpansionSpec], is_whole: bool
) -> None:
    estimated, found = estimate_and_peak(source, tmp_path / "result", specs)
    assert found <= estimated < 12 * found + 32 * 2**20, (found, estimated)
    # The input of a second map is whole, in float32; the rest is computed in rows
    assert (found > 12 * LARGEST) == is_whole, found


def test_state_is_made_whole(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    moments = torch.ones(TensorFolder.open(source).shape(name))
    write_state(tmp_path / "source", {"exp_avg": TensorStream.of([(name, moments)])}, step=1)
    estimated, found = estimate_and_peak(tmp_path / "source", tmp_path / "result", [WIDER])
    assert 4 * LARGEST < found <= estimated < 12 * found, (found, estimated)

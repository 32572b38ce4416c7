"""A process that is killed while it expands leaves the old folder, the new one, or none.

Two ways of killing: at every file-system call that the expansion makes, one after the other, and
at random moments from outside. After each the destination is checked byte by byte against its
own record, and a second run succeeds and cleans up.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import oracle
from tritter.checkpoints import Lineage
from tritter.checkpoints.folder import file_digests
from tritter.core.expansions import LlamaPro, Width
from tritter.errors import RequestError
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.storage.tensors import TensorFolder
from tritter.transform import expand

FORK = multiprocessing.get_context("fork")
SPECS = (Width(), LlamaPro())
OLD_SEED, NEW_SEED = 1, 2
SHARD_BYTES = 60_000


@dataclass(frozen=True, slots=True)
class Scene:
    """A source, a place for the result, and what each seed makes of the source."""

    source: Path
    place: Path
    hashes: dict[int, str]

    @property
    def destination(self) -> Path:
        return self.place / "grown"

    def expand(self, *, seed: int = NEW_SEED, is_overwriting: bool) -> None:
        expand(
            self.source,
            self.destination,
            SPECS,
            seed=seed,
            max_shard_bytes=SHARD_BYTES,
            overwrite=is_overwriting,
        )

    def reset(self, *, with_old: bool) -> None:
        """Empty the place; put a complete older result there when asked."""
        for path in sorted(self.place.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        if with_old:
            self.expand(seed=OLD_SEED, is_overwriting=False)

    def state(self) -> int | None:
        """Return the seed of the result that stands there whole, or None when none does."""
        if not self.destination.exists():
            return None
        found = complete_hash(self.destination)
        return next(seed for seed, known in self.hashes.items() if known == found)


def complete_hash(folder: Path) -> str:
    """Return the model hash of a folder whose every byte agrees with its record."""
    lineage = Lineage.read(folder)
    assert lineage is not None
    tensors = TensorFolder.open(folder)
    digests = {name: tensor_digest(name, each) for name, each in tensors.items()}
    assert digests == dict(lineage.tensor_digests)
    assert file_digests(folder) == dict(lineage.file_digests)
    assert merkle_hash(digests) == lineage.model_hash
    return lineage.model_hash


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("kill")
    source = oracle.saved(oracle.tiny_llama(hidden_size=32, head_dim=8), folder / "source")
    place = folder / "place"
    hashes = {}
    for seed in (OLD_SEED, NEW_SEED):
        result = expand(source, folder / f"seed{seed}", SPECS, seed=seed)
        hashes[seed] = result.lineage.model_hash
    place.mkdir()
    return Scene(source, place, hashes)


def run_child(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Run `work` in a child and return its exit code; negative when a signal ended it."""
    child = FORK.Process(target=work)
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def die_at(call: int, place: Path) -> None:
    """Kill this process just before its `call`-th audited file-system call below `place`."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        touches = (event == "open" or event.startswith(("os.", "shutil."))) and any(
            isinstance(argument, str | os.PathLike) and str(place) in str(argument)
            for argument in arguments
        )
        if not touches and event != "ctypes.dlsym":
            return
        if seen == call:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(hook)


def kill_at(scene: Scene, call: int, *, is_overwriting: bool) -> bool:
    """Expand in a child that dies before its `call`-th call; return whether it died."""
    scene.reset(with_old=is_overwriting)

    def work() -> None:
        die_at(call, scene.place)
        scene.expand(is_overwriting=is_overwriting)

    return run_child(work) == -signal.SIGKILL


def assert_rerun(scene: Scene) -> None:
    """A second run succeeds whatever the first left, and leaves nothing but its result."""
    scene.expand(is_overwriting=True)
    assert scene.state() == NEW_SEED
    assert [path.name for path in scene.place.iterdir()] == ["grown"]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("is_overwriting", [False, True], ids=["new", "overwriting"])
@pytest.mark.parametrize("call", [5, 20, 35])
def test_killed_on_the_way_leaves_what_stood_there(
    scene: Scene, call: int, is_overwriting: bool
) -> None:
    assert kill_at(scene, call, is_overwriting=is_overwriting)
    assert scene.state() == (OLD_SEED if is_overwriting else None)
    assert_rerun(scene)


@pytest.mark.slow
def test_killed_at_any_call_leaves_nothing_or_the_new(scene: Scene) -> None:
    found: list[int | None] = []
    while kill_at(scene, len(found), is_overwriting=False):
        found.append(scene.state())
        assert_rerun(scene)
    turn = found.index(NEW_SEED)
    assert turn > 20
    assert found == [None] * turn + [NEW_SEED] * (len(found) - turn)


@pytest.mark.slow
@pytest.mark.parametrize("is_overwriting", [False, True], ids=["new", "overwriting"])
def test_killed_at_a_random_moment_leaves_the_old_or_the_new(
    scene: Scene, is_overwriting: bool
) -> None:
    """SIGKILL from outside, 20 times, anywhere between the start and a little after the end."""

    def work() -> None:
        scene.expand(is_overwriting=is_overwriting)

    scene.reset(with_old=is_overwriting)
    started = time.perf_counter()
    assert run_child(work) == 0
    seconds = time.perf_counter() - started
    generator, kills = random.Random(0), 0
    while kills < 20:
        scene.reset(with_old=is_overwriting)
        code = run_child(work, kill_after=generator.uniform(0, seconds))
        kills += code == -signal.SIGKILL
        assert scene.state() in (OLD_SEED if is_overwriting else None, NEW_SEED, None)
        assert_rerun(scene)


@pytest.mark.slow
def test_killed_at_any_call_the_old_one_is_never_lost(scene: Scene) -> None:
    """It lies aside for a moment.

    The next run puts it back before it does anything, so one that fails does not lose it either.
    """
    call, put_back = 0, 0
    while kill_at(scene, call, is_overwriting=True):
        is_aside = scene.state() is None
        with pytest.raises(RequestError, match="already exists"):
            scene.expand(is_overwriting=False)
        assert scene.state() == OLD_SEED or not is_aside
        put_back += is_aside
        call += 1
    assert call > 20
    assert put_back > 0


def test_what_appears_meanwhile_is_not_overwritten(scene: Scene) -> None:
    """Two runs into one new place: the second to finish leaves the first one's result."""
    scene.reset(with_old=False)

    def other_finishes_first(done: int, total: int) -> None:
        if done == total:
            scene.expand(seed=OLD_SEED, is_overwriting=False)

    with pytest.raises(RequestError, match="exists now"):
        expand(scene.source, scene.destination, SPECS, seed=NEW_SEED, progress=other_finishes_first)
    assert scene.state() == OLD_SEED
    assert [path.name for path in scene.place.iterdir()] == ["grown"]

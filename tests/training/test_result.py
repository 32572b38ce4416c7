"""Results are written where they were trained, and failures come back as what they are."""

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import nn

from tests.training.test_ddp import ONE, TWO, Written, train, weights
from tritter.errors import RequestError, TritterError
from tritter.training import FitResult, TrainerSettings
from tritter.training.fitting import start_method

pytestmark = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)
SETTINGS = {"one": ONE, "two": TWO}


@dataclass(frozen=True)
class Refused:
    """A disk, or a request, that does not let the result be written."""

    error: Exception

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        assert result.steps > 0 and result.update_norms
        raise self.error


@pytest.mark.full
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_full_disk_is_told_and_the_training_goes_on(
    tmp_path: Path, settings: TrainerSettings
) -> None:
    whole, _ = train(tmp_path / "whole", settings)
    full = Refused(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"))
    with pytest.raises(TritterError, match=r"could not be written: .*No space left.*safetensors"):
        train(tmp_path / "parts", settings, write_result=full)
    assert (tmp_path / "parts" / "saved").exists()
    parts, _ = train(tmp_path / "parts", settings)
    assert weights(parts) == weights(whole)


@pytest.mark.full
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("error", [RequestError("data.new = x: gone"), TritterError("a\nb: c")])
def test_an_error_of_ours_keeps_its_kind_and_its_text(
    tmp_path: Path, settings: TrainerSettings, error: TritterError
) -> None:
    with pytest.raises(TritterError) as raised:
        train(tmp_path, settings, write_result=Refused(error))
    assert type(raised.value) is type(error) and str(raised.value) == str(error)


class Fails(Callback):
    """Fail in the middle of the training, on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            raise RequestError(f"optimizer.x = 3: rank {self.rank} refuses.")


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_in_the_middle_is_told(tmp_path: Path, rank: int) -> None:
    with pytest.raises(RequestError, match=rf"^optimizer\.x = 3: rank {rank} refuses\.$"):
        train(tmp_path, TWO, Fails(rank))


class Grows(Callback):
    """Give the model, in the processes that train it, a parameter more and one that is larger."""

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        pl_module.model.register_parameter("added", nn.Parameter(torch.full((3,), 7.0)))
        norm = pl_module.model.model.norm
        norm.weight = nn.Parameter(torch.cat([norm.weight.detach(), torch.ones(2)]))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_parameter_that_is_new_arrives(tmp_path: Path, settings: TrainerSettings) -> None:
    written = Written(tmp_path / "written")
    model, result = train(tmp_path / "run", settings, Grows(), write_result=written)
    state = written.read()["model"]
    assert state["added"].tolist() == [7.0] * 3 and result.update_norms
    width = model.config.hidden_size  # type: ignore[union-attr]
    assert state["model.norm.weight"].shape == (width + 2,)


@dataclass(frozen=True)
class Slow:
    path: Path

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        time.sleep(0.5)
        self.path.touch()


class SeenBy(Callback):
    """Note on every rank whether the result exists after the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def teardown(self, trainer, pl_module, stage) -> None:  # type: ignore[no-untyped-def]
        seen = self.path.exists()
        self.path.with_name(f"seen by {trainer.global_rank}").write_text(str(seen))


@pytest.mark.full
def test_no_rank_goes_on_before_the_result_is_written(tmp_path: Path) -> None:
    path = tmp_path / "result"
    train(tmp_path / "run", TWO, SeenBy(path), write_result=Slow(path))
    assert [(tmp_path / f"seen by {rank}").read_text() for rank in (0, 1)] == ["True"] * 2


@pytest.mark.full
def test_nothing_of_the_weights_comes_back(tmp_path: Path) -> None:
    one, _ = train(tmp_path / "one", ONE, write_result=Slow(tmp_path / "a"))
    two, result = train(tmp_path / "two", TWO, write_result=Slow(tmp_path / "b"))
    assert weights(two) != weights(one) and result.steps > 0

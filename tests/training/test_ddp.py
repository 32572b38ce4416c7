"""Two processes: the weights of one, the same bits in both, and as if never killed."""

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies.launchers import multiprocessing as multiprocessing_launcher
from torch import Tensor, distributed, nn

from tests import oracle
from tests.training.killed import KillAt
from tests.training.test_fit import SETTINGS, task
from tests.training.test_resume import with_something_new
from tests.training.written import Written
from tritter.checkpoints.state import State
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.datamodule import ValidationSubset
from tritter.errors import Problem, RequestError, TritterError
from tritter.methods.forgetting import EWC, L2SP, SI, Distill, Freeze, Replay
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.targets import Component
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    OptimizerSettings,
    Schedule,
    TrainerSettings,
    WriteResult,
    fit,
    fitting,
    read_metrics,
)
from tritter.training.callbacks import StepProgress
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.fitting import _for_main_process, start_method

STEPS = 20  # of 4 sequences out of 40: an epoch of the data ends at step 10
TWO = replace(SETTINGS, devices=2, strategy="ddp", save_every_n_steps=5)
ONE = replace(SETTINGS, save_every_n_steps=5)
METHODS: dict[str, Callable[[], Sequence[ForgettingMethod]]] = {
    "l2sp and replay": lambda: (L2SP(l2sp_lambda=0.1), Replay(fraction=0.3)),
    "ewc": lambda: (EWC(ewc_lambda=1e3),),
    "ewc of drawn labels": lambda: (EWC(ewc_lambda=1e3, estimator="true", refresh_steps=2),),
    "l2sp and freeze": lambda: (
        L2SP(l2sp_lambda=0.1),
        Freeze(new_only=True, until=12, thaw="top_down"),
    ),
    "distill": lambda: (Distill(weight=1.0), Replay(fraction=0.3)),
    "si and replay": lambda: (SI(si_lambda=1.0), Replay(fraction=0.3)),
}

pytestmark = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)


class Broken(BaseModule):
    """The loss that rank 1 logs is infinite at some steps; its gradients are as they should be."""

    bad_steps = range(0)

    def log(self, name: str, value: Any, **options: Any) -> None:
        if self.bad_steps:  # each rank judges its own loss, as it would without the sum over ranks
            options["sync_dist"] = False
            if name == "train/loss" and self.global_step in self.bad_steps:
                value = value + (float("inf") if distributed.get_rank() == 1 else 0.0)
        super().log(name, value, **options)


class Ranks(Callback):
    """Gather what every rank holds after each step, and leave it in a file."""

    def __init__(self, path: Path, *, spoil_rank_1_at: int | None = None) -> None:
        self.path = path
        self.spoil_at = spoil_rank_1_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_rank == 1 and trainer.global_step == self.spoil_at:
            with torch.no_grad():
                next(pl_module.parameters()).flatten()[0] += 1e-7
        moments = trainer.optimizers[0].state.values()
        held = {
            "weights": [*pl_module.parameters()],
            "moments": [value for state in moments for value in state.values()],
            "random": [torch.get_rng_state()],
            "rows": [batch["input_ids"]],
        }
        mine = {name: digest(tensors) for name, tensors in held.items()}
        mine["num_moments"] = len(held["moments"])
        everyone: list[Any] = [None] * trainer.world_size
        distributed.all_gather_object(everyone, mine)
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(everyone) + "\n")

    def read(self) -> list[list[dict[str, Any]]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def digest(tensors: Sequence[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def train(
    folder: Path,
    settings: TrainerSettings,
    *watching: Callback,
    methods: str = "l2sp and replay",
    dropout: float = 0.0,
    module_type: type[BaseModule] = BaseModule,
    loggers: Sequence[Any] = (),
    write_result: WriteResult | None = None,
    evaluation: ValidationSubset | None = None,
    theirs: Sequence[Component] = (),
) -> tuple[nn.Module, FitResult]:
    """Train; the model that is returned is read from what the processes wrote."""
    torch.manual_seed(7)
    model = oracle.tiny_llama(initializer_range=0.05, attention_dropout=dropout)
    fisher = diagonal_fisher(model, oracle.tokens(batch=4))
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    # A resumed process begins with another random state, which must not matter
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = module_type(
        model,
        schedule=Schedule(learning_rate=1e-3, max_steps=STEPS),
        optimizer=OptimizerSettings(),
        methods=METHODS[methods](),
    )
    told = with_something_new(task(model))
    told = replace(
        told, state={"fisher": fisher, "si_importance": fisher}, teacher=oracle.tiny_llama()
    )
    for method in module.methods:
        method.freeze(model, told, max_steps=STEPS)
    whole = fitting._build_trainer

    def watched(settings, callbacks, max_steps, *, loggers):  # type: ignore[no-untyped-def]
        return whole(settings, [*watching, *callbacks], max_steps, loggers=loggers)

    written = Written(folder.with_name(f"{folder.name}-written"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_build_trainer", watched)
        result = fit(
            module,
            BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=STEPS),
            settings=settings,
            folder=folder,
            label="test",
            console=Console(quiet=True),
            task=told,
            loggers=loggers,
            write_result=write_result or written,
            evaluation=evaluation,
            user_callbacks=theirs,
        )
    if write_result is None:
        written.read_into(model)
    return model, result


def weights(model: nn.Module) -> str:
    return digest([*model.parameters()])


@pytest.mark.full
@pytest.mark.parametrize("methods", METHODS)
def test_two_processes_give_the_weights_of_one(tmp_path: Path, methods: str) -> None:
    rows = Rows()
    one, expected = train(tmp_path / "one", ONE, methods=methods)
    two, result = train(tmp_path / "two", TWO, methods=methods, loggers=[rows])
    for name, parameter in one.named_parameters():
        difference = (two.get_parameter(name) - parameter).abs().max().item()
        assert difference < 1e-5, name
    same = {"seconds": 0.0, "update_norms": {}}
    assert replace(result, **same) == replace(expected, **same)
    assert result.update_norms == pytest.approx(expected.update_norms, rel=1e-4)
    logged, before = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [row["step"] for row in logged] == [row["step"] for row in before]
    for name in ("train/loss", f"forgetting/{methods.split()[0]}/loss"):
        values = [[float(row[name]) for row in r if row.get(name)] for r in (logged, before)]
        assert values[0] == pytest.approx(values[1], rel=1e-5) and len(values[0]) == STEPS // 2
    assert [step for step, _ in rows.rows] == [int(row["step"]) for row in logged]
    left = {path.name for path in (tmp_path / "two").iterdir()}
    assert left - {"left"} == {"metrics.csv", "saved"}
    if "left" in left:
        together, alone = (State.read(tmp_path / name / "left") for name in ("two", "one"))
        assert together is not None and alone is not None
        for kind, tensors in alone.kinds.items():
            other = together.kinds[kind]
            for name in tensors.headers:
                torch.testing.assert_close(other[name], tensors[name], rtol=1e-3, atol=1e-6)


@pytest.mark.full
def test_ranks_agree_bit_for_bit_on_different_rows(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "ranks")
    model, _ = train(tmp_path / "run", TWO, ranks, dropout=0.2)
    steps = ranks.read()
    assert len(steps) == STEPS
    for first, second in steps:
        assert first["weights"] == second["weights"] and first["moments"] == second["moments"]
        assert first["rows"] != second["rows"] and first["random"] != second["random"]
        assert first["num_moments"] == 3 * len([*model.parameters()])
    assert len({first["weights"] for first, _ in steps}) == STEPS
    assert steps[-1][0]["weights"] == weights(model)


@pytest.mark.full
def test_the_comparison_would_find_ranks_that_drift(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "ranks", spoil_rank_1_at=3)
    train(tmp_path / "run", TWO, ranks)
    agree = [first["weights"] == second["weights"] for first, second in ranks.read()]
    assert agree[:2] == [True, True] and not any(agree[2:])


@pytest.mark.full
@pytest.mark.parametrize("kills", [(7,), (10, 12)], ids=str)
def test_bitwise_as_if_never_killed(tmp_path: Path, kills: tuple[int, ...]) -> None:
    whole, expected = train(tmp_path / "whole", TWO, dropout=0.2)
    for step in kills:
        with pytest.raises(Exception, match="Killed: killed"):
            train(tmp_path / "parts", TWO, KillAt(step), dropout=0.2)
    parts, result = train(tmp_path / "parts", TWO, dropout=0.2)
    assert weights(parts) == weights(whole)
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    losses = [[(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / name)]
              for name in ("parts", "whole")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.full
def test_the_random_state_of_each_rank_counts(tmp_path: Path) -> None:
    """The negative control: with the other rank's state a resumed run ends elsewhere."""
    whole, _ = train(tmp_path / "whole", TWO, dropout=0.2)
    with pytest.raises(Exception, match="killed"):
        train(tmp_path / "parts", TWO, KillAt(7), dropout=0.2)
    saved, io = tmp_path / "parts" / "saved", SafetensorsCheckpointIO()
    content = io.load_checkpoint(saved)
    content["callbacks"]["RandomState"]["ranks"].reverse()
    io.save_checkpoint(content, saved)
    parts, _ = train(tmp_path / "parts", TWO, dropout=0.2)
    assert weights(parts) != weights(whole)


@pytest.mark.full
def test_a_killed_process_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", TWO)
    with pytest.raises(TritterError, match=r"training process 1 .*SIGKILL"):
        train(tmp_path / "parts", TWO, KillAt(7, signal_to_rank=1))
    parts, _ = train(tmp_path / "parts", TWO)
    assert weights(parts) == weights(whole)


class NoteProcess(Callback):
    """Leave a file named by the process, and then take a long time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        (self.folder / str(os.getpid())).touch()
        time.sleep(0.5)


def test_processes_end_with_the_one_that_started_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A torch that is built for GPUs takes this test's own fork for one that lost a GPU.
    monkeypatch.setattr(multiprocessing_launcher, "_check_bad_cuda_fork", lambda: None)
    notes = tmp_path / "notes"
    notes.mkdir()

    def main() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a shell runs in the background
        torch.set_num_threads(1)
        train(tmp_path / "run", TWO, NoteProcess(notes))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    assert _within(20, lambda: len(list(notes.iterdir())) == 2)
    process.kill()
    process.join()
    workers = [int(path.name) for path in notes.iterdir()]
    assert _within(3, lambda: not any(_is_running(worker) for worker in workers))


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    since = time.monotonic()
    while not is_so() and time.monotonic() - since < seconds:
        time.sleep(0.05)
    return is_so()


def _is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # its parent may not have checked yet


@pytest.mark.full
def test_another_number_of_processes_is_refused_in_our_words(tmp_path: Path) -> None:
    train(tmp_path, TWO)
    with pytest.raises(TritterError, match=r"^trainer\.devices = 1: .* has 2 processes"):
        train(tmp_path, ONE)
    with pytest.raises(TritterError, match=r"^trainer\.devices = 4: .* trainer\.devices=2\.$"):
        train(tmp_path, replace(TWO, devices=4))


@pytest.mark.full
@pytest.mark.parametrize("bad", [range(3, 5), range(2, STEPS)], ids=["two", "all from 2"])
def test_a_step_that_one_rank_refuses_no_rank_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: range
) -> None:
    monkeypatch.setattr(Broken, "bad_steps", bad)
    ranks = Ranks(tmp_path / "ranks")
    settings = replace(TWO, max_non_finite_steps=4)
    _, result = train(tmp_path / "run", settings, ranks, module_type=Broken)
    steps = ranks.read()
    assert all(first["weights"] == second["weights"] for first, second in steps)
    taken = [a[0]["weights"] != b[0]["weights"] for a, b in pairwise(steps)]
    if len(bad) == 2:
        assert result.refused_steps == 2 and result.stopped_because is None
        assert [i for i, moved in enumerate(taken, start=1) if not moved] == [3, 4]
    else:
        assert result.refused_steps == 5 and result.steps == 7
        assert "5 steps in a row" in str(result.stopped_because)


def test_what_is_not_picklable_is_made_anew() -> None:
    progress = StepProgress(label="x", max_steps=3, mode="on", console=Console(quiet=True))
    back = pickle.loads(pickle.dumps(progress))
    assert back._console.quiet and back._use_bar


@pytest.mark.parametrize(
    ("accelerator", "platform", "has_gpu", "expected"),
    [
        ("cpu", "linux", False, "fork"),
        ("cpu", "linux", True, "spawn"),
        ("cpu", "darwin", False, "spawn"),
        ("gpu", "linux", True, "spawn"),
    ],
)
def test_fork_where_it_is_safe(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, platform: str, has_gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert start_method(accelerator) == expected


@pytest.mark.slow
def test_spawned_processes_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked, expected = train(tmp_path / "fork", TWO, dropout=0.2)
    monkeypatch.setattr("tritter.training.fitting.start_method", lambda accelerator: "spawn")
    spawned, result = train(tmp_path / "spawn", TWO, dropout=0.2)
    assert weights(spawned) == weights(forked)
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)


def test_a_refusal_keeps_what_it_speaks_of_on_its_way_out_of_a_process() -> None:
    refusal = RequestError(Problem("data.batch_size", 3, reason="must be even"))
    sent = pickle.loads(pickle.dumps(_for_main_process(refusal)))
    assert isinstance(sent, RequestError) and str(sent) == str(refusal)
    assert [problem.key for problem in sent.problems] == ["data.batch_size"]
    told = str(_for_main_process(OSError("full")))
    assert told == "the training run failed with a system error: full."

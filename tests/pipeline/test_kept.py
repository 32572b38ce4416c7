"""Sequences stored with a model replace data that the next run does not have."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.pipeline.tiny import TINY
from tritter.checkpoints.state import KeptSequences
from tritter.cli import main
from tritter.config.launch.composition import load_config
from tritter.core.models import load_model
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.replay import ReplayBuffer
from tritter.errors import RequestError, TritterError
from tritter.evaluation.losses import sequence_losses
from tritter.methods.forgetting import Replay
from tritter.pipeline import Outcome, run_pipeline
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run
from tritter.pipeline.stages.importance import _kept_text, task
from tritter.terminal import Console
from tritter.training import Task


@pytest.fixture(scope="module")
def left(run_tiny: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that stores five sequences of each domain."""
    folder = tmp_path_factory.mktemp("left") / "run"
    run_tiny(folder, "forgetting=replay", "forgetting.replay.keep=5", "expansion=none")
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return data that no earlier run used."""
    path = tmp_path_factory.mktemp("text") / "third.jsonl"
    lines = (json.dumps({"text": f"the third text has line {n} of many " * 9}) for n in range(40))
    path.write_text("\n".join(lines))
    return path


def without_text(left: Path, other: Path, *more: str) -> list[str]:
    plain = [word for word in TINY if not word.startswith(("model.", "data.old", "data.new"))]
    given = [
        "model=hf",
        f"model.path={left}/checkpoint",
        "data.old={}",
        f"data.new={{third:{other}}}",
    ]
    return [*plain, *given, "forgetting=replay", "forgetting.replay.weighting=loss", *more]


def context_of(left: Path, *more: str) -> Run:
    words = [*TINY, "forgetting=replay", "forgetting.replay.keep=5", "expansion=none", *more]
    return Run(
        config=load_config(words), folder=left, console=Console(quiet=True), ledger=Ledger(left)
    )


def test_what_is_left_is_training_text_with_its_losses(left: Path) -> None:
    kept = KeptSequences.read(left / "checkpoint")
    assert {name: tuple(each.shape) for name, each in kept.sequences.items()} == {
        "old": (5, 32), "new": (5, 32),
    }  # fmt: skip
    lengths = json.loads((left / "summary.json").read_text())["data"]
    assert set(kept.num_seen) == set(lengths)
    model = load_model(left / "checkpoint")
    for name, rows in kept.sequences.items():
        torch.testing.assert_close(kept.losses[name], sequence_losses(model, rows))
        alone = model(input_ids=rows[:1].long(), labels=rows[:1].long()).loss
        torch.testing.assert_close(kept.losses[name][0], alone.detach())
    # The library reads it as the buffer that it is
    buffer = ReplayBuffer.load(left / "checkpoint/state" / KeptSequences.FILE_NAME, seed=0)
    assert len(buffer) == 10 and buffer.sample(4).shape == (4, 32)


@pytest.mark.full
def test_the_next_training_replays_it_where_text_is_gone(
    left: Path, other: Path, run_tiny: Callable[..., Outcome], cache: Path, tmp_path: Path
) -> None:
    words = without_text(left, other, "forgetting.replay.keep=3", "expansion=width")
    config = load_config([*words, f"cache_dir={cache}"])
    run_pipeline(config, run_folder=tmp_path)
    notes = " ".join(json.loads((tmp_path / "summary.json").read_text())["notes"])
    assert "The checkpoint contains sequences of old, new" in notes
    assert "There is no text of" not in notes
    before, after = (
        KeptSequences.read(left / "checkpoint"),
        KeptSequences.read(tmp_path / "checkpoint"),
    )
    assert set(after.sequences) == {"old", "new", "third"}
    assert len(after.sequences["third"]) == 3
    for name in ("old", "new"):
        assert torch.equal(after.sequences[name], before.sequences[name])
        assert torch.equal(after.losses[name], before.losses[name])
    context = Run(
        config=config, folder=tmp_path, console=Console(quiet=True), ledger=Ledger(tmp_path)
    )
    reported = task(context, Branch("attempt_1", ()), follow=dict)
    assert set(reported.old_sequences) == {"old", "new"} == set(reported.old_losses)
    rows = {tuple(row.tolist()) for each in reported.old_sequences.values() for row in each}
    new = context.data.batches(("third",), purpose="training", max_steps=6)
    for batch in islice(Replay(fraction=0.5, weighting="loss").mix(new, reported), 6):
        old = batch["input_ids"][batch["is_replay"]]
        assert len(old) == 2 and {tuple(row.tolist()) for row in old} <= rows


def test_a_text_at_hand_stands_for_itself(left: Path) -> None:
    assert not _kept_text(context_of(left), Branch("attempt_1", ())).sequences


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("method", ["ewc", "online_ewc"])
def test_methods_that_need_old_text_take_it(left: Path, other: Path, method: str) -> None:
    words = [word for word in without_text(left, other) if "forgetting" not in word]
    assert load_config([*words, f"forgetting={method}"]).forgetting[0].name == method
    at_hand = [word for word in words if "data." not in word]
    with pytest.raises(RequestError, match="required by"):
        load_config([*at_hand, "data.old={}", f"data.new={{a:{other}}}", f"forgetting={method}",
                     f"model.path={left}/baseline"])  # fmt: skip


def test_kept_domains_may_be_weighed(left: Path, other: Path) -> None:
    words = without_text(left, other)
    config = load_config([*words, "forgetting.replay.weights={old:3}"])
    assert config.forgetting[0].options.weights == {"old": 3}
    with pytest.raises(RequestError, match="its old domains: new, old"):
        load_config([*words, "forgetting.replay.weights={olf:3}"])


def test_other_lengths_are_refused_where_they_would_be_taken(
    left: Path, other: Path, cache: Path
) -> None:
    words = [word for word in without_text(left, other) if "forgetting" not in word]
    plain = [*words, "data.sequence_length=16", "forgetting=none", f"cache_dir={cache}"]
    context = replace(context_of(left), config=load_config(plain))
    assert not _kept_text(context, Branch("attempt_1", ())).sequences
    with pytest.raises(RequestError, match=r"data\.sequence_length = 16: the sequences of old"):
        load_config(without_text(left, other, "data.sequence_length=16"))


@pytest.mark.full
def test_it_goes_along_with_an_expansion_and_not_with_an_export(left: Path, tmp_path: Path) -> None:
    grown, plain = tmp_path / "grown", tmp_path / "plain"
    words = ["--checkpoint", str(left / "checkpoint"), "--output"]
    assert main(["expand", *words, str(grown), "--method", "llama-pro"]) == 0
    assert set(KeptSequences.read(grown).sequences) == {"old", "new"}
    assert main(["export", *words, str(plain), "--format", "hf"]) == 0
    assert not KeptSequences.read(plain).sequences and not (plain / "state").exists()


def test_damage_is_told(left: Path, tmp_path: Path) -> None:
    place = tmp_path / "state" / KeptSequences.FILE_NAME
    place.parent.mkdir()
    place.write_bytes(b"no tensors")
    with pytest.raises(TritterError, match="can't be read"):
        KeptSequences.read(tmp_path)
    place.write_bytes((left / "checkpoint/state" / KeptSequences.FILE_NAME).read_bytes()[:-40])
    with pytest.raises(TritterError, match="can't be read"):
        KeptSequences.read(tmp_path)


@pytest.mark.full
def test_sequences_are_drawn_in_proportion_to_their_losses() -> None:
    rows = torch.arange(3)[:, None].expand(3, 4)
    given = Task(
        seed=0, old_sequences={"kept": rows, "whole": rows + 10},
        old_losses={"kept": torch.tensor([0.0, 1.0, 3.0])},
    )  # fmt: skip
    new = BatchStream(SequenceStream(rows + 20, seed=0), batch_size=8, num_batches=2000)
    counts = torch.zeros(30)
    for batch in islice(Replay(fraction=0.5, weighting="loss").mix(new, given), 2000):
        counts += torch.bincount(batch["input_ids"][:, 0], minlength=30)
    kept = counts[:3] / counts[:3].sum()
    torch.testing.assert_close(kept, torch.tensor([0.0, 0.25, 0.75]), atol=0.03, rtol=0)
    assert counts[:3].sum() == counts[10:13].sum()
    even = islice(Replay(fraction=0.5).mix(new, given), 60)
    counts = sum(torch.bincount(batch["input_ids"][:, 0], minlength=30) for batch in even)  # type: ignore[assignment]
    assert counts[:3].max() - counts[:3].min() <= 1

"""Domains of different sizes in one task."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run, _share_notes
from tritter.pipeline.stages.fit import _announce
from tritter.pipeline.verdict import Candidate
from tritter.report.table import count_text
from tritter.terminal import Console


def test_a_small_domain_is_named_and_a_weight_gives_it_its_share(tmp_path: Path) -> None:
    for name, count in {"large": 200, "small": 5}.items():
        texts = (f"{name} {number}, " * 20 for number in range(count))
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    new = f"data.new={{large:{tmp_path}/large.jsonl,small:{tmp_path}/small.jsonl}}"
    words = [*TINY, new, f"cache_dir={tmp_path / 'cache'}", "data.packing=documents"]

    def notes_and_counts(*more: str) -> tuple[list[str], Counter[str]]:
        config = load_config([*words, *more])
        ledger = Ledger(tmp_path)
        context = Run(config=config, folder=tmp_path, console=Console(quiet=True), ledger=ledger)
        notes = list(_share_notes(config, context.data.num_sequences, context.data.streams))
        batches = context.data.batches(["large", "small"], purpose="training", max_steps=30)
        small = {str(row.tolist()) for row in context.data.training_sequences(["small"])["small"]}
        rows = [str(row.tolist()) for batch in islice(batches, 30) for row in batch["input_ids"]]
        return notes, Counter("small" if row in small else "large" for row in rows)

    notes, plain = notes_and_counts()
    (note,) = notes
    assert note.startswith("small: ") and "of the 24 that its task reads" in note
    assert note.endswith("; data.weights={small:1} gives all domains equal shares.")
    assert plain["small"] < 0.1 * plain.total()
    notes, weighted = notes_and_counts("data.weights={small:1}")
    assert notes == [] and weighted["small"] == weighted["large"] == 60


def test_a_weight_in_one_task_leaves_the_notes_on_the_others(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name)
    pairs = ("{a: @/a.txt, b: @/b.txt}", "{c: @/c.txt, d: @/d.txt}")
    tasks = f"data.tasks=[{', '.join(pairs)}]".replace("@", str(tmp_path))
    words = [*(word for word in TINY if not word.startswith("data.new")), tasks]
    config = load_config([*words, "data.weights={a:1}"])
    sizes = {"a": 1, "b": 99, "c": 1, "d": 99}
    (note,) = _share_notes(config, sizes.__getitem__, ())
    assert note.startswith("c: 1.0% of the new training sequences, at most about 0 of the 24")
    assert list(_share_notes(config, sizes.__getitem__, ("d",))) == []


def test_the_line_on_a_training_says_how_often_it_reads_the_new_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in TINY if not word.startswith("forgetting=")]
    words += ["forgetting=[replay,self_replay]", "trainer.accumulate_grad_batches=2"]
    config = load_config([*words, f"cache_dir={tmp_path / 'cache'}"])
    context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
    _announce(context, Candidate.planned(context)[0].branches[0], 30, 0.1)
    ((name, rows),) = context.data.training_sequences(config.text.new).items()
    read = 30 * 2 * config.data.batch_size * (1 - 0.4 - 0.25)
    said = f"30 steps on {name}, {count_text(read / len(rows))} epochs; learning rate 0.1"
    assert said in capsys.readouterr().out
    context.data.batch_size = 1  # as for the long windows of expansion=context
    _announce(context, Candidate.planned(context)[0].branches[0], 30, 0.1)
    read /= config.data.batch_size
    assert f"{name}, {count_text(read / len(rows))} epochs;" in capsys.readouterr().out
    _announce(context, Candidate.planned(context)[0].branches[0], 30_000, 0.1)
    assert f"{name}, {count_text(1000 * read / len(rows))} epochs;" in capsys.readouterr().out
    assert "e+" not in count_text(1000 * read / len(rows))


def test_experts_that_rehearse_read_each_sequence_at_most_so_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many new rows give way to exemplars depends on what the experts recognise."""
    words = [word for word in TINY if not word.startswith(("forgetting=", "expansion"))]
    words += ["forgetting=none", "expansion=none", "experts=dylora"]
    words += ["experts.min_samples=8", "data.packing=documents"]
    for rehearsal in (0.25, 0):
        own = [*words, f"experts.rehearsal={rehearsal}", f"cache_dir={tmp_path / 'cache'}"]
        config = load_config(own)
        context = Run(config=config, folder=tmp_path, console=Console(), ledger=Ledger(tmp_path))
        _announce(context, Candidate.planned(context)[0].branches[0], 30, 0.1)
        assert (", at most " in capsys.readouterr().out) == bool(rehearsal)

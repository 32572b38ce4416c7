"""What stands beside a model goes into another folder as it is, whatever there is of it."""

from pathlib import Path

import torch

from tritter.checkpoints import Source
from tritter.checkpoints.state import State, write_state
from tritter.core.families import Model
from tritter.core.stock_routers import AddedExperts
from tritter.storage.writer import TensorStream


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_piece_writes_itself_as_it_was_read(tmp_path: Path) -> None:
    source, target, bare = (tmp_path / name for name in ("source", "target", "bare"))
    for folder in (source, target, bare):
        folder.mkdir()
    (source / "tokenizer.json").write_text("{}")
    kinds = {"fisher": TensorStream.of([("lm_head.weight", torch.arange(6.0).view(2, 3))])}
    write_state(source, kinds, step=3)
    AddedExperts(experts=(4, 5)).at(1, anneal_steps=4).write(source)
    held = contents(source)
    assert len(held) == 4
    for artifact in Source(source, Model({}), None).artifacts():
        artifact(target)
    assert contents(target) == held
    for artifact in Source(bare, Model({}), None).artifacts():
        artifact(target / "..")
    assert State.read(tmp_path) is None  # what is not there is not made up

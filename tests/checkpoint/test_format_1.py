"""What was written before the format changed: it loads ever after (tests/fixtures/format_1)."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tritter.checkpoint import read_lineage
from tritter.checkpoint.history import read_chain, verify
from tritter.checkpoint.state import LazyTensors, read_state
from tritter.expand import expand
from tritter.expansion import Width
from tritter.models import load_model, named_tensors, read_config

FORMAT_1 = Path(__file__).parents[1] / "fixtures/format_1"


@pytest.mark.parametrize(
    "name", ["finished/checkpoint", "finished/baseline", "unfinished/baseline", "with_moments"]
)
def test_a_checkpoint_of_format_1_loads_and_its_chain_is_intact(name: str) -> None:
    folder = FORMAT_1 / name
    held = dict(named_tensors(load_model(folder), read_config(folder)))
    written = load_file(folder / "model.safetensors")
    assert held.keys() == written.keys() and read_lineage(folder) is not None
    assert all(held[key].equal(written[key]) for key in written)
    chain = read_chain(folder)
    assert len(chain) == (3 if name == "finished/checkpoint" else 1)
    assert [verify(link) for link in chain] == [()] * len(chain)


def test_state_of_format_1_loads_and_follows_an_expansion(tmp_path: Path) -> None:
    state = read_state(FORMAT_1 / "with_moments")
    assert state is not None and state.step == 6
    assert sorted(state.kinds) == ["exp_avg", "exp_avg_sq", "fisher"]
    grown = expand(FORMAT_1 / "with_moments", tmp_path / "grown", [Width(hidden_size=32)])
    carried = read_state(grown.folder)
    assert carried is not None and carried.step == 6 and carried.kinds.keys() == state.kinds.keys()
    for kind, tensors in state.kinds.items():
        before, after = dict(LazyTensors(tensors)), dict(LazyTensors(carried.kinds[kind]))
        assert before and set(after) <= set(before), kind


def test_a_checkpoint_of_format_1_is_the_start_of_new_ones(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1 / "finished", tmp_path / "run")
    grown = expand(tmp_path / "run/checkpoint", tmp_path / "grown", [Width(hidden_size=64)])
    assert [link.made_by != () for link in read_chain(grown.folder)] == [False, True, False, True]

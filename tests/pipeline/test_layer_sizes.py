"""A run from a checkpoint whose FFNs differ in width trains and keeps the live widths."""

import json
from pathlib import Path

import pytest

from tests import oracle
from tests.oracle.sizes import uneven, written
from tests.pipeline.tiny import FIXTURES, TINY
from tritter.checkpoints import Lineage
from tritter.checkpoints.folder import copy_small_files
from tritter.checkpoints.history import Link
from tritter.config.launch.composition import load_config
from tritter.core.models import load_model, read_model
from tritter.pipeline import run_pipeline

SIZES = (9, 32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("expansion", "sizes"),
    [pytest.param("none", SIZES, marks=pytest.mark.slow), ("llama_pro", (9, 32, 32))],
)
def test_a_run_trains_the_live_widths(
    tmp_path: Path, expansion: str, sizes: tuple[int, ...]
) -> None:
    base = FIXTURES / "finished/baseline"
    options = {key: read_model(base).config[key] for key in ("vocab_size", "hidden_size")}
    folder = written(uneven("llama", SIZES, **options), tmp_path / "base")
    copy_small_files(base, folder)
    words = [
        f"expansion={expansion}",
        "model=hf",
        f"model.path={folder}",
        f"cache_dir={tmp_path}/cache",
    ]
    kept = [word for word in TINY if not word.startswith(("model.", "data.vocab_size"))]
    (tmp_path / "run").mkdir()
    outcome = run_pipeline(load_config([*kept, *words]), run_folder=tmp_path / "run")
    summary = json.loads(outcome.summary_path.read_text())
    checkpoint = tmp_path / "run/checkpoint"
    lineage, before, after = Lineage.read(checkpoint), load_model(folder), load_model(checkpoint)
    assert lineage is not None and lineage.ffn_sizes == sizes
    for name, model in (("baseline", before), ("final", after)):
        assert summary["parameters"][name] == sum(p.numel() for p in model.parameters())
    stock = oracle.stock(checkpoint)
    assert summary["parameters_on_disk"]["final"] == stock.num_parameters()
    up = "model.layers.0.mlp.up_proj.weight"
    assert before.get_parameter(up).shape == after.get_parameter(up).shape == (9, 16)
    assert not before.get_parameter(up).equal(after.get_parameter(up))
    ids = oracle.tokens(int(str(options["vocab_size"])))
    assert oracle.relative_difference(after.eval(), stock, ids) < 1e-4
    chain = Link.chain(checkpoint)
    assert all(link.differences() == () for link in chain if link.can_be_checked)

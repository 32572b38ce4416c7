"""Growth in whole runs: summary, files on disk, and continued growth."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.pipeline.tiny import TINY, is_within
from tritter.checkpoints import Lineage
from tritter.checkpoints.history import Link
from tritter.cli import main
from tritter.config.launch.composition import load_config
from tritter.core.families import Model, ffn_sizes
from tritter.core.models import load_model, read_model
from tritter.pipeline import run_pipeline

OFTEN = (
    *("expansion=none", "growth=foam", "growth.trigger=schedule", "growth.growth_cooldown=2"),
    *("growth.check_every=1", "growth.warmup_steps=0", "growth.max_growth_per_step=3"),
)


def run(folder: Path, *words: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    config = load_config([*TINY, *words, f"cache_dir={folder.parent / 'cache'}"])
    summary: dict[str, Any] = json.loads(
        run_pipeline(config, run_folder=folder).summary_path.read_text()
    )
    return summary


def rows(folder: Path) -> list[Mapping[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_run_tells_and_leaves(tmp_path: Path) -> None:
    words = (*OFTEN, "control=true", "trainer.log_every_n_steps=1")
    summary = run(tmp_path / "run", *words)
    growth = summary["growth"]
    assert [(e["step"], e["layer"]) for e in growth["events"]] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert growth["neurons"] == {"before": [32, 32], "after": [38, 38]} and growth["born"] == 12
    assert growth["parameters"] == {
        "before": summary["parameters"]["baseline"],
        "after": summary["parameters"]["final"],
    }
    assert growth["parameters"]["after"] - growth["parameters"]["before"] == 12 * 3 * 16
    assert summary["attempts"][0]["parameters"] == growth["parameters"]["after"]
    assert summary["control"]["parameters"] == growth["parameters"]["before"]
    assert growth["checks"] == 6 and growth["map"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert growth["young"] == 0 and growth["function_change"] < 1e-4
    assert growth["update_norms"]["young"] > 0 and growth["options"]["growth_cooldown"] == 2
    last = [row for row in rows(tmp_path / "run") if row["growth/born"]][-1]
    assert float(last["growth/born"]) == 12 and float(last["growth/neurons"]) == 76
    assert float(last["growth/layers/1/neurons"]) == 38 and float(last["growth/flops"]) > 0
    control = read_model(tmp_path / "run/control/trained").config
    assert control["intermediate_size"] == 32  # it stands for the base that does not grow
    fit = summary["flops"]
    assert fit["fit"] > 0 and (tmp_path / "run/plots/growth.png").is_file()


@pytest.mark.full
def test_flops_are_those_of_the_shapes_that_each_step_had(tmp_path: Path) -> None:
    """Includes forward passes before and after each event, to check function preservation."""
    from tritter.core.families import forward_flops, training_flops

    summary = run(tmp_path / "run", *OFTEN, "forgetting=none", "evaluation.every_n_steps=0")
    config = read_model(tmp_path / "run/baseline").config
    shapes = [{**config, "intermediate_size": width} for width in (32, 35, 38)]
    expected = sum(2 * 4 * training_flops(Model(shape)).of(32) for shape in shapes)
    looks = [*shapes[:2], *shapes[1:]]
    expected += sum(2 * forward_flops(Model(shape)).of(32) for shape in looks)
    assert summary["flops"]["fit"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.full
def test_a_grown_model_is_exported_and_grows_on(tmp_path: Path, capsys: Any) -> None:
    words = ("growth.trigger=within_layer", "growth.gradient_percentile=94", "forgetting=none")
    summary = run(tmp_path / "first", *OFTEN, *words, "growth.max_new_parameters=150")
    assert "growth=within_layer+" in capsys.readouterr().out.partition("seed=")[0]
    checkpoint = tmp_path / "first/checkpoint"
    sizes = ffn_sizes(read_model(checkpoint).config)
    assert len(set(sizes)) == 2 and list(sizes) == summary["growth"]["neurons"]["after"]
    assert summary["parameters_on_disk"]["final"] > summary["parameters"]["final"]
    live, stock = load_model(checkpoint), oracle.stock(checkpoint)
    ids = oracle.tokens(stock.config.vocab_size)
    assert oracle.relative_difference(live.eval(), stock, ids) < 1e-5
    exported = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(exported),
                 "--format", "hf", "--dtype", "float32"]) == 0  # fmt: skip
    assert oracle.relative_difference(oracle.stock(exported), stock, ids) < 1e-5

    again = ("model=hf", f"model.path={checkpoint}", *OFTEN, "forgetting=none")
    dropped = ("model.", "data.vocab_size", "data.sequence_length")
    on = [word for word in TINY if not word.startswith(dropped)]
    (tmp_path / "second").mkdir()
    config = load_config([*on, *again, f"cache_dir={tmp_path / 'cache'}"])
    outcome = run_pipeline(config, run_folder=tmp_path / "second")
    more = json.loads(outcome.summary_path.read_text())["growth"]
    assert more["neurons"]["before"] == list(sizes)
    assert more["neurons"]["after"] == [size + 6 for size in sizes]
    lineage = Lineage.read(tmp_path / "second/checkpoint")
    assert lineage is not None
    first, second = lineage.expansion_history
    assert (first.expansion_type, second.method) == ("growth", "growth")
    assert ffn_sizes(second.source_config) == sizes and second.step0_error is not None
    assert second.claims_exact and second.continued_training_steps == 6
    chain = list(Link.chain(tmp_path / "second/checkpoint"))
    assert all(link.differences() == () for link in chain if link.can_be_checked)
    assert main(["history", str(tmp_path / "second/checkpoint"), "--verify"]) == 0
    assert "growth" in capsys.readouterr().out


@pytest.mark.full
def test_tasks_in_a_row_count_on(tmp_path: Path) -> None:
    (new,) = (word.partition("=")[2] for word in TINY if word.startswith("data.new"))
    other = tmp_path / "other.jsonl"
    other.write_bytes(Path(new).read_bytes().replace(b" the ", b" that "))
    tasks = (f"data.tasks=[{{a: {new}}},{{b: {other}}}]", "data.new=null")
    summary = run(tmp_path / "run", *OFTEN, *tasks, "forgetting=[ewc,replay]")
    growth = summary["growth"]
    steps = [event["step"] for event in growth["events"] if event["layer"] == 0]
    assert steps == [2, 4, 8, 10] and growth["neurons"]["after"] == [44, 44]
    flops = [event["flops"] for event in growth["events"]]
    assert flops == sorted(flops) and growth["map"]["steps"] == list(range(1, 13))
    lineage = Lineage.read(tmp_path / "run/checkpoint")
    assert lineage is not None and len(lineage.expansion_history) == 2


@pytest.mark.full
def test_only_the_ffns_are_trained(tmp_path: Path) -> None:
    run(tmp_path / "run", *OFTEN, "growth.freeze_attention=true", "forgetting=none")
    before, after = (load_model(tmp_path / "run" / n) for n in ("baseline", "checkpoint"))
    moved = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        if "mlp" not in name:
            assert torch.equal(parameter, moved[name]), name
        else:
            assert not torch.equal(parameter, moved[name][tuple(map(slice, parameter.shape))])


@pytest.mark.full
@pytest.mark.parametrize("method", ["ewc", "si", "l2sp"])
def test_old_neurons_are_held_and_new_ones_are_free(tmp_path: Path, method: str) -> None:
    """A large λ preserves old weights through an event and leaves new ones trainable."""
    moved = {}
    for name, strength in (("free", 0.0), ("held", 1e8 if method == "ewc" else 1e4)):
        words = (f"forgetting.{method}.{method}_lambda={strength}", f"forgetting={method}")
        run(
            tmp_path / name,
            *OFTEN,
            *words,
            *(["forgetting.ewc.at=carried"] if method == "ewc" else []),
        )
        before, after = (load_model(tmp_path / name / n) for n in ("baseline", "checkpoint"))
        up = "model.layers.0.mlp.up_proj.weight"
        old, now = (model.get_parameter(up).detach() for model in (before, after))
        assert now.shape[0] == 38 and now[32:35].abs().sum() > 0  # gradmax begins with zeros
        moved[name] = float((now[:32] - old).abs().sum())
    assert moved["held"] < 0.9 * moved["free"]


@pytest.mark.full
def test_layers_that_thaw_grow_from_then_on(tmp_path: Path) -> None:
    words = ("forgetting=freeze", "forgetting.freeze.layers=0", "forgetting.freeze.until=3")
    summary = run(tmp_path / "run", *OFTEN, *words)
    events = [(event["step"], event["layer"]) for event in summary["growth"]["events"]]
    assert events == [(2, 1), (4, 0), (4, 1)]


@pytest.mark.full
def test_a_thaw_does_not_train_what_growth_leaves_out(tmp_path: Path) -> None:
    words = ("forgetting=freeze", "forgetting.freeze.layers=0", "forgetting.freeze.until=3")
    run(tmp_path / "run", *OFTEN, *words, "growth.freeze_attention=true")
    before, after = (load_model(tmp_path / "run" / n) for n in ("baseline", "checkpoint"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before.get_parameter(name), after.get_parameter(name))


@pytest.mark.full
def test_gradients_of_what_grew_late_are_seen(tmp_path: Path) -> None:
    """Independent of the logging interval."""
    words = ("training.max_steps=28", "growth.trigger={name:schedule,at:[21]}")
    summary = run(tmp_path / "run", "expansion=none", "growth=foam", *words, "forgetting=none")
    assert is_within(summary)["gradient_flow"] and summary["growth"]["born"] == 20

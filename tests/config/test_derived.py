"""Keys that are null: windows and batches by the model, samples and validations by the budget."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_rates import DATA, checkpoint
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import fingerprint


def windows(words: list[str]) -> tuple[int, int]:
    data = load_config(words).data
    return data.sequence_length, data.batch_size


def with_positions(place: Path, positions: int) -> Path:
    path = place / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": positions}
    path.write_text(json.dumps(config))
    return place


def test_a_base_of_the_run_reads_small_windows() -> None:
    assert windows([]) == windows(["data.sequence_length=128", "data.batch_size=16"]) == (128, 16)
    typed = load_config(["data.sequence_length=128", "data.batch_size=16"])
    assert fingerprint(load_config([])) == fingerprint(typed)
    assert windows(["data.sequence_length=256"]) == (256, 16)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("record", "positions", "found"),
    [
        (None, 8192, (1024, 2)),
        (None, 512, (512, 4)),
        ({"data": {"sequence_length": 64}}, 512, (64, 16)),  # as it was trained
        ({"data": {"sequence_length": 2048}}, 512, (512, 4)),
        ({"data": {"sequence_length": "64"}}, 8192, (1024, 2)),
    ],
)
def test_a_checkpoint_reads_windows_of_its_own(
    tmp_path: Path, record: dict[str, Any] | None, positions: int, found: tuple[int, int]
) -> None:
    place = with_positions(checkpoint(tmp_path / "base", record), positions)
    words = [*DATA, f"model.path={place}", "data.new={x: stdlib:code}", "forgetting=none"]
    assert windows(words) == found
    length, size = found
    typed = [*words, f"data.sequence_length={length}", f"data.batch_size={size}"]
    assert fingerprint(load_config(words)) == fingerprint(load_config(typed))  # `resume` compares
    assert windows([*words, "data.sequence_length=32"]) == (32, 16)
    assert windows([*words, "data.batch_size=5"]) == (length, 5)
    steps = load_config([*words, "training.max_tokens=8192"]).training.max_steps
    assert steps == 8192 // (length * size)


def test_each_process_has_a_sequence() -> None:
    words = [*DATA, "model.path=owner/name", "forgetting=none", "trainer=ddp", "trainer.devices=4"]
    words += ["trainer.accelerator=cpu"]
    assert windows(words) == (1024, 4)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ([], (256, 512)),
        (["training.max_steps=3"], (24, 12)),
        (["training.max_steps=3", "data.batch_size=2"], (8, 8)),
        (["training.max_steps=3", "trainer.accumulate_grad_batches=2"], (48, 24)),
        (["training.max_steps=20", "data.batch_size=4"], (20, 20)),
        (["training.max_steps=3", "forgetting.ewc.at=carried"], (48, 12)),
        (["training.max_steps=15", "forgetting.ewc.at=expanded",
          "forgetting.ewc.refresh_steps=null"], (240, 60)),
        (["training.max_steps=15", "forgetting.ewc.refresh_steps=1e1"], (80, 60)),
        (["training.max_steps=3", "forgetting.ewc.num_sequences=200",
          "forgetting.self_replay.num_sequences=300"], (200, 300)),
        (["training.max_steps=3", "data.batch_size=2", "data.sequence_length=512"], (4, 4)),
        (["training.max_steps=3", "data.batch_size=2", "data.sequence_length=4096",
          "model.max_position_embeddings=4096"], (3, 2)),
        (["training.max_steps=100", "forgetting.self_replay.fraction=0"], (256, 160)),
        (["training.max_steps=3", "data.batch_size=2", "data.sequence_length=1024",
          "model.max_position_embeddings=1024", "forgetting.self_replay.fraction=0"], (3, 6)),
    ],
)  # fmt: skip
def test_methods_read_as_much_as_training_uses(words: list[str], numbers: tuple[int, int]) -> None:
    config = load_config(["forgetting=[ewc,self_replay]", *words])
    assert tuple(one.options.num_sequences for one in config.forgetting) == numbers


@pytest.mark.parametrize(
    "words",
    [
        ["training.max_steps=3"],
        ["training.max_steps=60", "data.batch_size=4"],
        ["training.max_steps=60", "data.batch_size=1", "data.sequence_length=512"],
        [],
    ],
)
def test_validation_costs_a_tenth_of_training(words: list[str]) -> None:
    config = load_config(words)
    data, steps = config.data, config.training.max_steps
    period, count = config.evaluation.every_n_steps, len(config.text.domains)
    read = (1 + -(-steps // period)) * count * config.validation_tokens(num_domains=count)
    # A forward pass costs a third of a training step
    assert read / 3 <= 0.1 * steps * data.batch_size * data.sequence_length
    assert period == config.validation_period >= steps // 10
    typed = load_config([*words, "evaluation.every_n_steps=1"])
    assert typed.evaluation.every_n_steps == 1


def test_scores_are_in_proportion_to_the_training_of_a_checkpoint(tmp_path: Path) -> None:
    sizes = {"old": [100] * 500, "new": [10] * 50}
    everything = {"old": 500, "new": 50}
    assert load_config(["training.max_steps=1"]).scored_counts(sizes) == everything
    place = checkpoint(tmp_path / "base", None)
    words = [*DATA, f"model.path={place}", "data.new={x: stdlib:code}", "forgetting=none"]
    words += ["data.sequence_length=64", "data.batch_size=2"]

    def counts(*more: str) -> dict[str, int]:
        return load_config([*words, *more]).scored_counts(sizes)

    assert counts("training.max_steps=4") == {"old": 64, "new": 50}
    # Both domains together as many tokens as training
    assert counts("training.max_steps=200") == {"old": 200 * 64 * 2 // 2 // 100, "new": 50}
    assert counts("training.max_steps=1000") == everything
    assert counts("training.max_steps=4", "evaluation.max_documents=300")["old"] == 300
    assert counts("training.max_steps=1000", "evaluation.max_documents=3") == dict.fromkeys(
        sizes, 3
    )

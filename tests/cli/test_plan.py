"""`tritter plan`: what it prints, that its commands carry it out, and what it refuses."""

import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Run, snapshot
from tests.oracle import saved
from tests.oracle.families import tiny
from tritter.cli import main
from tritter.core.families import Model
from tritter.core.families.presets import PRESETS
from tritter.core.models import load_model
from tritter.planning.plan import ScalingLaw, plan_growth


def test_a_preset_is_named_and_every_step_shown(run: Run, place: Path) -> None:
    before = snapshot(place)
    result = run("plan --source 3B --target 10B --gpu-hours 20000 --strategy balanced")
    assert result.code == 0
    assert "tritter_3b: 28 layers of 3072" in result.out
    assert result.out.count("tritter expand --checkpoint") == 3
    assert "20,000 GPU-hours reach the target" in result.out
    assert "predictions of a published scaling law" in " ".join(result.out.split())
    assert snapshot(place) == before


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("due,advice", [(5, "continue training"), (20, "keep steps small")])
def test_the_control_and_what_was_measured_stand_below(run: Run, due: int, advice: str) -> None:
    out = run(f"plan --source 3B --target 3.6B --gpu-hours 500 --tokens-per-parameter {due}").out
    said = " ".join(out.split())
    assert f"advice {advice}" in said
    start = "pays off at any budget" if due == 20 else "pays off from"
    assert "alone continued training of the source" in said and start in said
    assert "if the training of the source is counted" in said


def test_a_source_that_is_not_repaid_is_said_in_words(run: Run) -> None:
    out = run("plan --source 3B --target 3.6B --gpu-hours 500 --source-tokens 3T").out
    said = " ".join(out.split())
    assert "saves 99% of them, which does not repay the training of the source" in said


@pytest.mark.full
def test_json_says_the_same(run: Run, place: Path) -> None:
    content = run("plan --source 3B --target 10B --gpu-hours 8000 --json").json
    assert content["source"]["name"] == "tritter_3b"
    assert content["strategy"] in content["alternatives"]
    assert content["needed_gpu_hours"] == content["steps"][-1]["total_gpu_hours"]
    assert not content["reaches_target"]
    assert content["ungrown_loss"] > content["predicted_loss"]
    assert content["pays_from_gpu_hours"] == 0
    assert 3.1e9 < content["reached_parameters"] < 10e9
    assert content["reached_instead"]["parameters"] == content["reached_parameters"]
    for step in content["steps"]:
        memory = step["memory_bytes"]
        assert memory["parameters"] == 4 * step["parameters"]  # bf16-mixed keeps float32
        assert memory["total_estimate"] == sum(memory.values()) - memory["total_estimate"]
    assert content["assumptions"]["mfu"] == 0.4


@pytest.mark.full
@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("strategy", ["depth-first", "width_first", "balanced", "auto"])
def test_the_printed_commands_carry_the_plan_out(run: Run, place: Path, strategy: str) -> None:
    line = f"plan --source base --target 120k --gpu-hours 1 --strategy {strategy} --json"
    content = run(line).json
    assert len(content["steps"]) >= 3
    folder = Path("base")
    for step in content["steps"]:
        words = shlex.split(step["command"])
        assert words[:4] == ["tritter", "expand", "--checkpoint", str(folder)]
        assert main([*words[1:], "--no-measure"]) == 0
        folder = Path(words[-1])
        parameters = load_model(folder).parameters()
        assert sum(parameter.numel() for parameter in parameters) == step["parameters"]
    assert content["steps"][-1]["parameters"] == pytest.approx(120_000, rel=0.1)


def test_a_folder_with_blanks_is_quoted(run: Run, place: Path) -> None:
    (place / "base").rename(place / "my base")
    result = run("plan --target 60k --gpu-hours 1 --json --source", "my base")
    words = shlex.split(result.json["steps"][0]["command"])
    assert words[3] == "my base" and main([*words[1:], "--no-measure"]) == 0


def test_presets_by_name_at_both_ends(run: Run, place: Path) -> None:
    content = run("plan --source tritter-7b --target tritter_10b --gpu-hours 1e6 --json").json
    assert content["target_parameters"] == 10_731_524_096
    assert content["source"]["parameters"] == 7_241_732_096


@pytest.mark.full
def test_memory_follows_the_options(run: Run, place: Path) -> None:
    line = "plan --source 1B --target 1.5B --gpu-hours 100 --json "
    plain = run(line).json["source"]["memory_bytes"]
    recipe = run(
        line + "--precision bf16-true --optimizer adamw8bit --freeze-attention --batch-size 1 "
        "--sequence-length 512 --gradient-checkpointing"
    ).json["source"]["memory_bytes"]
    assert recipe["parameters"] * 2 == plain["parameters"]
    assert all(recipe[part] < plain[part] for part in plain)


@pytest.mark.full
def test_a_faster_device_takes_fewer_hours(run: Run, place: Path) -> None:
    line = "plan --source 3B --target 7B --gpu-hours 100 --strategy balanced --json "
    slow = run(line).json["needed_gpu_hours"]
    fast = run(line + "--device-flops 624T --mfu 0.8").json["needed_gpu_hours"]
    assert fast == pytest.approx(slow / 4)
    fewer = run(line + "--tokens-per-parameter 5").json["needed_gpu_hours"]
    assert fewer == pytest.approx(slow / 4)


@pytest.mark.full
def test_a_size_beyond_the_laws_range_is_said_to_be(run: Run, place: Path) -> None:
    small = run("plan --source base --target 60k --gpu-hours 1").out
    large = run("plan --source 3B --target 7B --gpu-hours 1").out
    assert "smaller than any" in " ".join(small.split())
    assert "smaller than any" not in " ".join(large.split())


def test_the_guide(run: Run, place: Path) -> None:
    text = run("plan --guide").out
    assert "46.7 B" in text and "13.8B" in text
    rows = run("plan --guide --json").json["rows"]
    assert [row["target_parameters"] for row in rows][2] == 10_731_524_096


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("--source 7B --target 3B --gpu-hours 1", ["--target = 3,000,000,000", "must be larger"]),
        ("--source tritter_8b --target 10B --gpu-hours 1", ["--source = tritter_8b", *PRESETS]),
        ("--source tritter_7c --target 10B --gpu-hours 1", ["Did you mean tritter_7b?"]),
        ("--source bas --target 60k --gpu-hours 1", ["--source = bas", "Did you mean base?"]),
        ("--source nowhere/at/all --target 60k --gpu-hours 1", ["--source = nowhere/at/all"]),
        ("--source 3B --target huge --gpu-hours 1", ["--target = huge"]),
        ("--source 3B --target 10B --gpu-hours 0", ["--gpu-hours = 0"]),
        ("--source 3B --target 10B --gpu-hours -1", ["--gpu-hours = -1"]),
        ("--source 3B --target 10B --gpu-hours nan", ["--gpu-hours = nan"]),
        ("--source 3B --target 10B --gpu-hours 1 --mfu 0", ["--mfu = 0"]),
        ("--source 3B --target 10B --gpu-hours 1 --mfu 1.5", ["--mfu = 1.5"]),
        ("--source 3B --target 10B --gpu-hours 1 --device-flops fast", ["312T"]),
        (
            "--source 3B --target 10B --gpu-hours 1 --strategy balance",
            ["--strategy = balance", "Did you mean balanced?"],
        ),
        (
            "--source 3B --target 10B --gpu-hours 1 --optimizer adam8bit",
            ["--optimizer = adam8bit", "Did you mean adamw8bit?"],
        ),
        ("--source 3B --target 10B --gpu-hours 1 --precision bf16", ["--precision = bf16"]),
        (
            "--source 3B --target 10B --gpu-hours 1 --batch-size 0",
            ["--batch-size", "greater than or equal to 1"],
        ),
        ("--source 3B --gpu-hours 1", ["--target", "--guide"]),
        (
            "--source 125M --target 350M --gpu-hours 1 --tokens-per-parameter 1e50",
            ["--tokens-per-parameter = 1e+50", "at most 1e+06"],
        ),
        ("", ["--source and --target and --gpu-hours"]),
        ("--source 1k --target 10B --gpu-hours 1", ["--source = 1,000", "checkpoint folder"]),
        ("--source base --target 29500 --gpu-hours 1", ["--target = 29,500", "within 10 %"]),
    ],
)
def test_what_is_refused_is_refused_by_name(
    run: Run, place: Path, words: str, messages: list[str]
) -> None:
    before = snapshot(place)
    result = run(f"plan {words}")
    assert result.code == 2, result.out
    assert not result.out
    said = " ".join(result.err.split())
    assert not [message for message in messages if message not in said], said
    assert snapshot(place) == before


def test_what_the_commands_need_is_told(run: Run, place: Path) -> None:
    preset = run("plan --source 3B --target 10B --gpu-hours 20000 --json").json["notes"]
    assert "tritter_3b is a shape, not a checkpoint" in preset[0]
    assert "Train each result before the next step" in preset[1]
    only, upcycling = run("plan --source base --target 40k --gpu-hours 1 --json").json["notes"]
    assert "not fitted to models this small" in upcycling
    words = "plan --source 1B --target 3B --gpu-hours 500 --source-tokens 74B --json"
    assert "after 74 B of dense training is predicted to pay" in run(words).json["notes"][-1]
    assert only.startswith("Train the result: tritter train --checkpoint base-")
    shown = run("plan --source 3B --target 4B --gpu-hours 1e4").out
    assert "tritter_3b is a shape" in shown
    deeper = run("plan --source 20B --target 25B --gpu-hours 1e4").out
    assert "tritter_10b-with-90-layers is a shape" in deeper
    assert "--checkpoint tritter_10b-with-90-layers --method" in deeper


def test_a_model_with_learned_positions_reads_no_more(run: Run, place: Path) -> None:
    saved(tiny("gpt2"), place / "gpt2")
    words = "plan --source gpt2 --target 40k --gpu-hours 1"
    assert "1 x 64 tokens per micro-batch" in run(words).out
    assert "1 x 32 tokens per micro-batch" in run(f"{words} --sequence-length 32").out
    result = run(f"{words} --sequence-length 65")
    assert result.code == 2
    assert "--sequence-length = 65" in result.err and "n_positions = 64" in result.err
    saved(tiny("llama", max_position_embeddings=48), place / "rotary")  # training refuses more, too
    words = words.replace("gpt2", "rotary")
    assert "1 x 48 tokens per micro-batch" in run(words).out
    result = run(f"{words} --sequence-length 49")
    assert result.code == 2 and "max_position_embeddings = 48" in result.err


def test_tokens_of_the_source_count_in_all_predictions(run: Run) -> None:
    """A source of 135 M after 2 T tokens is at 2.60 by the law; growing does not make it worse."""
    words = "plan --source 135M --target 250M --gpu-hours 20 --json"
    trained = run(f"{words} --source-tokens 2T").json
    limit = ScalingLaw().loss(trained["source"]["parameters"], 2e12)
    assert trained["predicted_loss"] < limit < 2.7
    assert run(words).json["predicted_loss"] > 2.9  # 20 tokens per parameter
    assert "to the same predicted loss" in " ".join(
        run(f"{words} --source-tokens 2T".replace(" --json", "")).out.split()
    )


def test_proposed_sizes_are_as_round_as_those_of_the_source() -> None:
    """SmolLM2: 816 was proposed, with a note that quantisers need multiples of 32 or 64."""
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
    config = {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    plan = plan_growth(Model(config | sizes | heads), 250_000_000, gpu_hours=20)
    widths = {step.target.sizes.hidden_size for step in plan.steps}
    assert len(widths) > 0 and all(width % 64 == 0 for width in widths)

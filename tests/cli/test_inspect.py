"""`tritter inspect`: numbers by hand, and the map of the last expansion as it was recorded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.oracle import saved, tiny_llama


def _rows(run: Run, folder: str) -> dict[tuple[str, str], dict[str, object]]:
    rows = run(f"inspect {folder} --json").json["last_map"]["rows"]
    return {(row.pop("kind"), row.pop("layers")): row for row in rows}


def test_a_plain_folder(run: Run, place: Path) -> None:
    content = run("inspect base --json").json
    assert content["family"] == "llama"
    assert content["shapes"] == {
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 300,
    }
    assert content["parameters"]["parts"] == {
        "embedding": 300 * 24,
        "attention": 3 * (2 * 24 * 24 + 2 * 12 * 24),
        "FFN": 3 * 3 * 40 * 24,
        "norms": 7 * 24,
        "output head": 300 * 24,
    }
    assert content["parameters"]["total"] == sum(content["parameters"]["parts"].values())
    assert content["dtypes"] == {"float32": 30}
    assert not content["is_tied"]
    assert content["lineage"] is None and content["last_map"] is None
    text = run("inspect base").out
    assert "none: a plain Hugging Face folder" in text
    assert "untied" in text


def test_what_can_grow_and_the_axes(run: Run, place: Path) -> None:
    assert run("inspect base --family --json").json["growth"] == {
        "depth": "any number of new layers",
        "FFN": "any larger size",
        "heads": "whole groups of heads",
        "hidden size": "any larger size",
        "experts": "no: this llama model has no experts; apply moe first",
        "neurons": "of single layers, during training (growth=gradmax)",
    }
    text = run("inspect base --family").out
    assert "model.layers.0.mlp.up_proj.weight" in text and "model.layers.1" not in text
    assert "ffn 40 x reads ffn_input 24" in text
    assert "residual 24 x reads ffn 40; zero in new layers" in " ".join(text.split())


def test_dtypes_are_those_on_disk(run: Run, place: Path) -> None:
    path = place / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert run("inspect base --json").json["dtypes"] == {"bfloat16": 23, "float32": 7}
    assert "bfloat16 (23 tensors), float32 (7 tensors)" in run("inspect base").out


def test_the_map_of_fresh_width(run: Run, place: Path) -> None:
    """24 → 96 keeps one block of four: c = 1/2 for every gain, gradients by 1/c."""
    words = "--method width --hidden-size 96 --intermediate-size 40 --num-heads 4 --num-kv-heads 2"
    assert run(f"expand --checkpoint base {words}").code == 0
    rows = _rows(run, "base-width")
    gain = {"source_shape": [24], "target_shape": [96], "weight": "0.5", "gradient": "2"}
    gain |= {"fill": "mean", "state": "carry"}
    assert rows["attention_norm", "0-2"] == rows["final_norm", ""] == gain
    assert rows["ffn.gate", "0-2"]["fill"] == "random 0.1"  # 1/√96
    assert rows["ffn.down", "0-2"]["fill"] == "zero"
    assert rows["ffn.down", "0-2"]["target_shape"] == [96, 40]


@pytest.mark.full
def test_the_map_of_net2net(run: Run, place: Path) -> None:
    """FFN and heads doubled in shares .9/.1; the residual stream stays."""
    words = "--hidden-size 24 --intermediate-size 80 --num-heads 8 --num-kv-heads 4"
    done = run(f"expand --checkpoint base --method width --width-init net2net {words} --noise 0.01")
    assert done.code == 0, done.err
    rows = _rows(run, "base-width")
    factors = {name: (row["weight"], row["gradient"]) for (name, _), row in rows.items()}
    assert factors["ffn.down"] == factors["attention.o"] == ("0.1, 0.9", "1")
    assert factors["ffn.up"] == factors["ffn.gate"] == factors["attention.q"] == ("1", "0.1, 0.9")
    assert factors["embed"] == factors["ffn_norm"] == ("1", "1")
    assert rows["ffn.up", "0-2"]["fill"] == "noise 0.01 on copies"


@pytest.mark.full
def test_the_map_of_new_blocks(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width,llama-pro").code == 0
    rows = _rows(run, "base-width-llama-pro")
    old, new = rows["ffn.down", "0-1, 3"], rows["ffn.down", "2, 4"]
    assert (old["weight"], old["state"]) == ("1", "carry")
    assert (new["weight"], new["state"]) == ("0", "fresh")
    text = run("inspect base-width-llama-pro").out
    assert "0 1 1 2 2" in text
    assert "width, llama-pro" in text
    assert "as recorded" in text


def test_long_lists_of_layers_leave_room_for_the_names(run: Run, tmp_path: Path) -> None:
    source = saved(tiny_llama(num_hidden_layers=18), tmp_path / "deep")
    grown = tmp_path / "grown"
    assert run(f"expand {source} --method llama-pro --output {grown}").code == 0
    text = run(f"inspect {grown}").out
    lines = [line for line in text.splitlines() if line.startswith("ffn_norm")]
    assert len(lines) == 2
    assert all(line.endswith(("carry", "fresh")) for line in lines)


def test_qwen3_heads_have_norms(run: Run, sources: Path, tmp_path: Path) -> None:
    assert run(f"expand --checkpoint {sources / 'qwen3'} --output {tmp_path / 'w'} --method width")
    rows = _rows(run, str(tmp_path / "w"))
    assert rows["attention.q_norm", "0-2"]["weight"] == "1"
    assert rows["attention.q", "0-2"]["weight"] == "0.7071"  # √(d/D): q/k norms share eps


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "differs from the recorded"),
        ({"options": {"init": "net2net"}}, "differs from the recorded"),
        ({"method": "mow"}, "this version of Tritter has no method 'mow'"),
        ({"options": {"bogus": 1}}, "cannot be rebuilt"),
        ({"options": {"init": "bogus"}}, "differs from the recorded"),
        ({"options": {"experts_from": 5}}, "the FFNs of other models"),
        ({"options": {"experts_from": [1, {}]}}, "the FFNs of other models"),
    ],
)
def test_a_record_that_does_not_give_the_map_is_seen(
    run: Run, place: Path, changes: dict[str, object], said: str
) -> None:
    assert run("expand --checkpoint base --method width").code == 0
    path = place / "base-width" / "tritter.json"
    content = json.loads(path.read_text())
    content["expansion_history"][-1] |= changes
    path.write_text(json.dumps(content))
    result = run("inspect base-width")
    assert result.code == 0
    assert said in result.out


def test_scores_and_training(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width").code == 0
    path = place / "base-width" / "tritter.json"
    content = json.loads(path.read_text()) | {"benchmark_scores": {"prose": 3.75}, "step": 40}
    content["expansion_history"][-1] |= {
        "step0_error": 3e-6,
        "continued_training_steps": 40,
        "performance_delta": {"prose": 0.0181},
    }
    path.write_text(json.dumps(content))
    text = " ".join(run("inspect base-width").out.split())
    for words in (
        "loss prose 3.7500 nats per token",
        "step-0 error 3.0e-06",
        "steps after 40",
        "loss per byte prose +1.81 %",
        "trained 40 steps",
    ):
        assert words in text


def test_right_answers_are_no_loss(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width").code == 0
    path = place / "base-width" / "tritter.json"
    scores = {"sorting": 3.75, "sorting/accuracy": 0.042}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"benchmark_scores": scores}))
    text = " ".join(run("inspect base-width").out.split())
    assert "loss sorting 3.7500 nats per token accuracy sorting 4.2%" in text


def test_grown_neurons_have_no_map_that_could_be_missed(run: Run, place: Path) -> None:
    assert run("expand --checkpoint base --method width").code == 0
    path = place / "base-width" / "tritter.json"
    content = json.loads(path.read_text())
    content["expansion_history"][-1] |= {"method": "growth", "expansion_type": "growth"}
    path.write_text(json.dumps(content))
    text = run("inspect base-width").out
    assert "none: neurons were added during training" in " ".join(text.split())
    assert "cannot be rebuilt" not in text


def test_what_is_no_checkpoint(run: Run, place: Path) -> None:
    (place / "base" / "model.safetensors").unlink()
    shutil.copytree(place / "base", place / "b")
    for name in ("nowhere", "b"):
        result = run(f"inspect {name}")
        assert (result.code, result.out) == (2, "")
        assert name in result.err


def test_what_lies_beside_the_weights_is_told(run: Run, place: Path) -> None:
    beside = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert run("inspect base --json").json["beside"] == beside
    text = run("inspect base").out
    assert "other files  tokenizer.json" in text and "no tokenizer" not in text
    (place / "base" / "NOTICE").write_text("Copyright")
    assert run("inspect base --json").json["beside"] == [*beside, "NOTICE"]
    (place / "base" / "NOTICE").unlink()
    (place / "base" / "tokenizer.json").unlink()
    assert "no tokenizer.json, which training needs" in run("inspect base").out
    for name in beside[1:]:
        (place / "base" / name).unlink()
    assert "other files  no tokenizer, no state" in run("inspect base").out


def test_the_folder_of_a_run_is_answered_with_its_checkpoint(run: Run, place: Path) -> None:
    (place / "run").mkdir()
    (place / "base").rename(place / "run" / "checkpoint")
    for words in ("inspect run", "history run", "validate --source run --result run"):
        result = run(words)
        assert result.code == 2 and "no config.json; the checkpoint is in" in result.err, words
        assert "run/checkpoint" in result.err


def test_a_hub_id_is_inspected_from_the_cache(run: Run, hub: Path) -> None:
    told, expected = run("inspect owner/name --json").json, run("inspect base --json").json
    assert told.pop("folder") == str(hub / "models--owner--name/snapshots/0123abcd")
    assert told == {key: value for key, value in expected.items() if key != "folder"}
    assert "plain folder" in run("history owner/name").out


def test_a_folder_wins_over_a_hub_id(run: Run, hub: Path, place: Path) -> None:
    run("expand base --method dus --output owner/name")
    assert run("inspect owner/name --json").json["shapes"]["num_hidden_layers"] == 4
    shutil.rmtree(place / "owner")
    assert run("inspect owner/name --json").json["shapes"]["num_hidden_layers"] == 3


def test_neither_a_folder_nor_on_the_hub(run: Run, hub: Path) -> None:
    for words, reason in {
        "inspect owner/other": "checkpoint = owner/other: no such folder, and HF_HUB_OFFLINE is",
        "history owner/other": "checkpoint = owner/other: no such folder, and HF_HUB_OFFLINE is",
        "inspect nowhere": "checkpoint = nowhere: no such folder, and not a hub id (owner/name).",
    }.items():
        refused = run(words)
        assert (refused.code, refused.out) == (2, "")
        assert reason in refused.err and len(refused.err.splitlines()) == 2


def test_the_hub_client_prints_no_retries(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    log.warning("before")

    def download(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise errors.LocalEntryNotFoundError("Got: ConnectError: refused\nCheck your connection.")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    refused = run("inspect owner/name")
    log.warning("after")
    assert refused.code == 2 and "Retrying" not in caplog.text
    assert "before" in caplog.text and "after" in caplog.text
    assert refused.err.splitlines()[0].endswith(
        "the hub cannot be reached (ConnectError: refused)."
    )


def test_context_and_rope_base_are_shown(run: Run, place: Path) -> None:
    lines = run("inspect base").out.splitlines()
    assert ["context", "64"] in [line.split() for line in lines]
    path = place / "base/config.json"
    kinds = {name: {"rope_type": "default", "rope_theta": base} for name, base in RATES.items()}
    kinds["full_attention"] |= {"rope_type": "yarn", "factor": 4.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": kinds}))
    found = run("inspect base --json").json["positions"]
    bases, scaling = "1000000, 10000", "yarn, factor 4.0"
    assert found == {"context": "64", "RoPE base": bases, "RoPE scaling": scaling}
    damaged = {"rope_theta": {"a": 1}, "rope_parameters": [1]}
    path.write_text(json.dumps(json.loads(path.read_text()) | damaged))
    assert "Traceback" not in run("inspect base").err


RATES = {"full_attention": 1e6, "sliding_attention": 1e4}  # as in Gemma 3

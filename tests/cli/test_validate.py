"""`tritter validate`: five answers about a pair, against losses and gradients taken another way."""

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from tests import oracle
from tests.cli.conftest import VOCABULARY, Run, snapshot
from tests.pipeline.tiny import FIXTURES
from tritter.checkpoints.folder import LINEAGE_NAME
from tritter.core.models import read_model
from tritter.data.options import read_sources
from tritter.pipeline import validate as validation

TESTS = [
    "forward_equivalence", "gradient_flow", "memory_scaling", "benchmark_retention",
    "new_capability",
]  # fmt: skip


@pytest.fixture
def text(place: Path) -> Path:
    folder = place / "text"
    folder.mkdir()
    words = "the model grows a layer where data asks for one and keeps what it knew"
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{number} {words[number:]} {words}")
    return folder


def changed(folder: Path, change: Any) -> None:
    """Change the tensors of a folder, and let its lineage go, which would refuse it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / LINEAGE_NAME).unlink(missing_ok=True)


def checks_of(result: Any) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in result.json["checks"]}


def test_an_exact_pair_passes_and_nothing_is_written(
    run: Run, place: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("expand --checkpoint base --output wide --method width").code == 0
    before = snapshot(place)
    result = run("validate --source base --result wide --data text --limit 30 --json")
    assert result.code == 0 and result.json["passed"]
    assert "text: 30 of 40 documents are scored." in caplog.text
    assert [check["check"] for check in result.json["checks"]] == TESTS
    checks = checks_of(result)
    verdicts = [checks[name]["verdict"] for name in TESTS]
    assert verdicts == ["passed"] * 4 + ["not_asked"]
    assert "pass --target-data" in checks["new_capability"]["detail"]
    assert checks["benchmark_retention"]["subject"] == "text"
    assert snapshot(place) == before


def test_what_is_not_exact_is_measured_and_not_asked(run: Run, place: Path, text: Path) -> None:
    """The mean square by stock classes; the losses of a model that says nothing new."""
    words = "--method dus --target-layers 4 --drop-layers 1"
    assert run(f"expand --checkpoint base --output deep {words}").code == 0
    checks = checks_of(run("validate --source base --result deep --data kept=text --json"))
    equivalence = checks["forward_equivalence"]
    assert (
        equivalence["verdict"] == "not_asked"
        and "dus is not function-preserving" in equivalence["detail"]
    )
    assert equivalence["value"] > 1e-6
    assert checks["gradient_flow"]["verdict"] == checks["memory_scaling"]["verdict"] == "passed"
    assert checks["benchmark_retention"]["subject"] == "kept"
    # Random weights know nothing that they could lose: the change is measured, with its bounds
    assert checks["benchmark_retention"]["interval"][0] <= checks["benchmark_retention"]["value"]


@pytest.mark.full
def test_numbers_by_another_path(run: Run, place: Path, text: Path) -> None:
    """One text, whose loss stock classes give: a result whose head is turned down."""
    assert run("expand --checkpoint base --output wide --method width").code == 0
    changed(place / "wide", lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    result = run("validate --source base --result wide --data a=text --target-data b=text --json")
    checks = checks_of(result)
    assert result.code == 3
    assert checks["forward_equivalence"]["verdict"] == "failed"  # its shapes allow it
    losses = []
    for name in ("base", "wide"):
        model, total = oracle.stock(place / name), 0.0
        tokenizer = AutoTokenizer.from_pretrained(place / name)
        for path in sorted(text.glob("*.txt")):
            ids = [tokenizer.eos_token_id, *tokenizer(path.read_text()).input_ids]
            tokens = torch.tensor([ids])
            said = oracle.logits(model, tokens)[0, :-1].double().log_softmax(-1)
            total -= float(said.gather(1, tokens[0, 1:, None]).sum())
        losses.append(total)
    assert checks["new_capability"]["n"] == 40
    harm = pytest.approx(losses[1] / losses[0] - 1, rel=1e-4)
    assert checks["benchmark_retention"]["value"] == harm == checks["new_capability"]["value"]


def test_a_dead_part_fails_by_name(run: Run, place: Path) -> None:
    assert (
        run("expand --checkpoint base --output wide --method width --intermediate-size 60").code
        == 0
    )

    def kill(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"][50:] = 0

    changed(place / "wide", kill)
    result = run("validate --source base --result wide --json")
    flow = checks_of(result)["gradient_flow"]
    assert result.code == 3 and flow["verdict"] == "failed"
    assert "layers.1.mlp.gate_proj.weight (10 new of 60 along dimension 0)" in flow["detail"]
    table = run("validate --source base --result wide")
    assert table.code == 3 and "failed" in table.out and "not asked" in table.out


def test_folders_without_tokenizers_and_with_other_vocabularies(
    run: Run, place: Path, text: Path
) -> None:
    oracle.saved(oracle.tiny_llama(vocab_size=310, hidden_size=48, head_dim=12), place / "other")
    checks = checks_of(run("validate --source base --result other --data text --json"))
    assert checks["forward_equivalence"]["verdict"] == "not_asked"
    assert "310" in checks["forward_equivalence"]["detail"]
    assert checks["benchmark_retention"]["verdict"] == "not_asked"
    assert checks["gradient_flow"]["verdict"] == "passed"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "base" / name).unlink(missing_ok=True)
    result = run("validate --source base --result base --json")
    assert result.code == 0
    checks = checks_of(result)
    assert checks["forward_equivalence"]["value"] == 0
    assert "no new parameters" in checks["gradient_flow"]["detail"]


@pytest.mark.full
def test_unrelated_checkpoints_are_named_with_both_numbers(run: Run, place: Path) -> None:
    """Of two plain folders nothing is known; two results of one base and swapped ones are."""
    oracle.saved(oracle.tiny_llama(vocab_size=VOCABULARY, initializer_range=0.1), place / "other")
    assert run("expand base --method width --output wide").code == 0
    assert run("expand base --method dus --output deep").code == 0
    assert run("expand other --method width --output far").code == 0
    numbers = re.compile(r"; mean squared .*, allowed 1e-06; largest .*, allowed 0.0001")
    for words, said in {
        "base other": "the result has no lineage that links it to the source",
        "other wide": "unrelated checkpoints: the result starts from another model",
        "far wide": "unrelated checkpoints: they start from different models",
        "wide deep": "unrelated checkpoints: neither is derived from the other",
        "deep base": "the result has no lineage that links it to the source",
    }.items():
        detail = checks_of(run(f"validate {words} --json"))["forward_equivalence"]["detail"]
        assert detail.startswith(said) and numbers.search(detail), words
    related = checks_of(run("validate base deep --json"))["forward_equivalence"]
    assert related["detail"].startswith("dus is not function-preserving; mean squared difference")
    assert checks_of(run("validate base wide --json"))["forward_equivalence"]["verdict"] == "passed"
    assert run("validate --source base --result wide").out == run("validate base wide").out


def test_a_trained_checkpoint_is_asked_about_the_text_that_it_records(
    run: Run, tmp_path: Path
) -> None:
    """The held-out part of what a run kept and learned."""
    folder = FIXTURES / "finished"
    result = run(f"validate --source {folder / 'baseline'} --result {folder / 'checkpoint'} --json")
    checks = checks_of(result)
    assert checks["forward_equivalence"]["verdict"] in ("not_asked", "passed")
    for name in ("benchmark_retention", "new_capability"):
        assert checks[name]["verdict"] in ("not_asked", "undecided", "passed", "failed")
        assert json.dumps(checks[name])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--source nothing --result base", "nothing"),
        ("--source base --result text", "--result"),
        ("--source base --result base --data nowhere.txt", "--data"),
        ("--source base --result base --data text --limit 3", "limit"),
        ("--source base", "Missing --result"),
    ],
)
def test_what_can_not_be_asked_is_refused(
    run: Run, place: Path, text: Path, words: str, told: str
) -> None:
    result = run(f"validate {words}")
    assert result.code == 2 and told in result.err and not result.out


@pytest.mark.full
def test_a_result_in_sixteen_bits_is_not_held_to_what_rounding_undoes(
    run: Run, place: Path
) -> None:
    """As `expand` does; copied layers are held to it in any type, and a broken model fails."""
    assert run("expand --checkpoint base --output half --method width --dtype bfloat16").code == 0
    result = run("validate --source base --result half --json")
    equivalence = checks_of(result)["forward_equivalence"]
    assert result.code == 0 and equivalence["verdict"] == "undecided"
    assert "this includes rounding to bfloat16" in equivalence["detail"]
    assert "root mean square" in equivalence["detail"] and "KL" in equivalence["detail"]
    jump = equivalence["jump"]
    assert 0 < jump["rms_to_std"] < jump["bfloat16_rms_to_std"]
    assert jump["divergence"] < jump["bfloat16_divergence"]

    assert run("expand --checkpoint half --output deep --method llama-pro").code == 0
    copied = run("validate --source half --result deep --json")
    assert checks_of(copied)["forward_equivalence"]["verdict"] == "passed"

    changed(place / "half", lambda tensors: tensors["lm_head.weight"].mul_(-1))
    broken = run("validate --source base --result half --json")
    assert broken.code == 3
    assert checks_of(broken)["forward_equivalence"]["verdict"] == "failed"


@pytest.mark.full
def test_one_model_is_in_memory_at_a_time(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[nn.Module]] = []
    load = validation.load_model

    def watched(folder: Path) -> nn.Module:
        gc.collect()
        assert [each for each in loaded if each() is not None] == []
        model = load(folder)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(validation, "load_model", watched)
    assert run("expand --checkpoint base --output wide --method width").code == 0
    assert run("validate --source base --result wide").code == 0 and len(loaded) == 2


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("share", "option"), [(0.5, "--source"), (1.5, "--result")])
def test_what_has_no_room_is_refused_before_it_is_loaded(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, share: float, option: str
) -> None:
    """The result takes its parameters and gradients, beyond one and a half times the source's."""
    assert run("expand --checkpoint base --output wide --method width").code == 0
    one = 4 * read_model(place / "base").num_parameters
    monkeypatch.setattr(validation, "machine_memory", lambda: int(share * one))
    monkeypatch.setattr(validation, "load_model", None)
    result = run("validate --source base --result wide")
    assert result.code == 2 and f"{option} = " in result.err and "GB in float32" in result.err


def test_a_word_that_no_file_can_be_called_is_told_in_short(run: Run, place: Path) -> None:
    result = run("validate --source base --result base --target-data", "y" * 100_000)
    assert result.code == 2 and "a name has at most 255 bytes" in result.err
    assert len(result.err) < 1_000


def test_each_part_has_a_progress_bar(run: Run, place: Path, text: Path) -> None:
    assert run("expand --checkpoint base --output wide --method width").code == 0
    sides = [validation.Side.of(place / name) for name in ("base", "wide")]
    kept = read_sources("--data", {"kept": [str(text)]}, default_name="text", problems=[])
    labels: list[str] = []
    validation.validate(*sides, kept=kept, target=None, limit=30, new_bar=labels.append)
    loading = ["loading the source", "scoring kept", "loading the result", "scoring kept"]
    assert labels == [*loading, "gradients of new parameters"]

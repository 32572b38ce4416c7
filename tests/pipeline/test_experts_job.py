"""LoRA experts in whole runs: killed and resumed, on disk, over several tasks, continued."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.pipeline.test_every_choice import Killed, _dies_at, load_config
from tests.pipeline.tiny import FIXTURES, TINY, is_within
from tritter.checkpoints import Lineage
from tritter.errors import RequestError
from tritter.methods.experts.mixture import mixture_on
from tritter.methods.experts.module import ExpertModule
from tritter.methods.whole import load_whole
from tritter.pipeline import run_pipeline

PLAIN = [w for w in TINY if not w.startswith("forgetting=")] + ["expansion=none", "forgetting=none"]
DYLORA = (
    "experts=dylora", "experts.rank=2", "experts.min_samples=4", "experts.in_a_row=1",
    "experts.detector={name: loss, threshold: 0.1}", "experts.cooldown=0",
    "experts.max_experts=3", "experts.confidence=0.5",
)  # fmt: skip


WRITTEN = ("forgetting=self_replay", "forgetting.self_replay.num_sequences=8")


def run(folder: Path, cache: Path, words: Sequence[str]) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    run_pipeline(load_config([*words, f"cache_dir={cache}"]), run_folder=folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def killed(folder: Path, cache: Path, words: Sequence[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertModule, "training_step", _dies_at(ExpertModule.training_step))
        with pytest.raises(Killed):
            run(folder, cache, words)
    assert any(folder.rglob("saved/*")), "nothing was saved before the kill"


def files(folder: Path) -> dict[str, bytes]:
    parts = ("experts/*/*.safetensors", "state/experts.safetensors", "model.safetensors")
    found = {p.relative_to(folder).as_posix(): p for part in parts for p in folder.glob(part)}
    return {name: path.read_bytes() for name, path in sorted(found.items())}


@pytest.mark.full
@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "experts",
    [
        DYLORA,
        ("experts=single_lora", "experts.rank=4"),
        (*DYLORA, "experts.router=both", "experts.boundaries=told", "data.packing=documents"),
        (*DYLORA, "experts.inner_prior=-2", *WRITTEN),
    ],
    ids=["dylora", "single_lora", "told", "written"],
)
def test_killed_and_resumed_it_leaves_the_same(tmp_path: Path, experts: Sequence[str]) -> None:
    plain = [word for word in PLAIN if word != "forgetting=none" or WRITTEN[0] not in experts]
    words = [*plain, *experts]
    summary = run(tmp_path / "whole", tmp_path / "cache", words)
    killed(tmp_path / "parts", tmp_path / "cache", words)
    run(tmp_path / "parts", tmp_path / "cache", words)
    one, two = (tmp_path / name / "checkpoint" for name in ("whole", "parts"))
    assert files(one) == files(two) and len(files(one)) >= 3
    base = tmp_path / "whole/baseline"
    assert files(base)["model.safetensors"] == files(one)["model.safetensors"], "unchanged"
    ids = torch.arange(24).reshape(2, 12) + 40
    stock = AutoModelForCausalLM.from_pretrained(one).eval()
    model = load_whole(one)
    mixture = mixture_on(model)
    assert mixture is not None
    with torch.no_grad(), mixture.off():
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    name = mixture.adapters[-1]
    adapted = PeftModel.from_pretrained(stock, one / "experts" / name).eval()
    with torch.no_grad(), mixture.only(name):
        expected = adapted(input_ids=ids).logits
        difference = model(input_ids=ids).logits - expected
    assert difference.abs().max() < 1e-5 * expected.abs().max()
    record = summary["experts"]
    assert record["number"] == len(mixture.adapters)
    assert record["kind"] == experts[0].partition("=")[2]
    lineage = Lineage.read(one)
    assert lineage is not None
    spawned = [event["expert"] for event in record.get("spawned", [])]
    assert [each.method for each in lineage.expansion_history] == ["dylora"] * bool(spawned)
    if experts[0] == "experts=dylora":
        assert spawned and set(record["usage"]["new"]) == set(record["names"])


@pytest.mark.full
def test_tasks_and_a_checkpoint_that_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = FIXTURES / "text/old", FIXTURES / "text/new.jsonl"
    kept = [word for word in PLAIN if not word.startswith(("data.new=", "data.old="))]
    tasks = [
        f"data.old={{old: {old}}}",
        f"data.tasks=[{{new: {new}}},{{old: {old}}},{{new: {new}}}]",
    ]
    summary = run(tmp_path / "run", tmp_path / "cache", [*kept, *tasks, *DYLORA])
    message = capsys.readouterr().out
    assert "experts=dylora  seed=" in message
    assert "learning rate 0.005; forgetting mitigation: frozen base" in message
    events = summary["experts"]["events"]
    assert summary["experts"]["spawned"][0]["task"] == 0
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    steps = summary["experts"]["usage_over_time"]["steps"]
    assert steps == sorted(steps) and steps[-1] <= 18
    assert len(summary["experts"]["phases"]) == 3

    checkpoint = tmp_path / "run/checkpoint"
    on = [w for w in kept if not w.startswith(("model.", "data.vocab_size", "pretraining."))]
    on += ["model=hf", f"model.path={checkpoint}", f"data.new={{again: {new}}}"]
    with pytest.raises(RequestError, match="it contains experts"):
        run(tmp_path / "whole_model", tmp_path / "cache", on)
    with pytest.raises(RequestError, match=r"experts\.router = learned.*use the router evidence"):
        words = [*DYLORA, "experts.router=learned"]
        run(tmp_path / "router", tmp_path / "cache", [*on, *words])
    on = [word for word in on if word != "forgetting=none"]
    own = [*DYLORA, *WRITTEN, "experts.inner_prior=-2", "experts.capacity_factor=2"]
    again = run(tmp_path / "again", tmp_path / "cache", [*on, *own])
    assert any("the model generated 8 sequences" in note for note in again["notes"])
    output = capsys.readouterr().out
    assert output.count("(in the checkpoint: ") == 2
    assert "experts.capacity_factor = 2.0 (in the checkpoint: null)" in output
    assert "experts.inner_prior = -2.0 (in the checkpoint: null)" in output
    mixture = mixture_on(load_whole(tmp_path / "again/checkpoint"))
    assert mixture is not None and mixture.evidence is not None
    assert (mixture.evidence.prior, mixture.evidence.inner_prior) == (0.1, -2.0)
    assert again["experts"]["names"][: summary["experts"]["number"]] == summary["experts"]["names"]
    assert summary["experts"]["domains"]["expert_1"] == "new"
    assert again["experts"]["domains"].items() >= summary["experts"]["domains"].items()


def continued(run_folder: Path, *words: str) -> list[str]:
    """Return the words of a run that continues the checkpoint of another one."""
    of_base = ("model.", "data.new=", "data.vocab_size", "pretraining.")
    plain = [word for word in PLAIN if not word.startswith(of_base)]
    checkpoint, new = run_folder / "checkpoint", FIXTURES / "text/new.jsonl"
    return [
        *plain, "model=hf", f"model.path={checkpoint}", f"data.new={{again: {new}}}", *DYLORA,
        *words,
    ]  # fmt: skip


@pytest.mark.full
def test_padded_exemplars_are_not_read_as_a_stream(tmp_path: Path) -> None:
    """The model would learn padding, and ids with marks are outside of its vocabulary."""
    first, cache = tmp_path / "first", tmp_path / "cache"
    run(first, cache, [*PLAIN, *DYLORA, "data.packing=documents"])
    with pytest.raises(RequestError, match=r"data\.packing = stream: the exemplars .* padded"):
        run(tmp_path / "stream", cache, continued(first))
    run(tmp_path / "documents", cache, continued(first, "data.packing=documents"))
    run(tmp_path / "without", cache, continued(first, "experts.rehearsal=0"))


@pytest.mark.full
def test_undecided_batches_of_an_earlier_run_are_dropped(tmp_path: Path) -> None:
    """Their data is another, and their sequences may have another length."""
    first, cache = tmp_path / "first", tmp_path / "cache"
    twice = "experts.in_a_row=2"
    summary = run(first, cache, [*PLAIN, *DYLORA, twice, "training.max_steps=1"])
    assert summary["experts"]["batches"]["unsure"] == 1
    words = ("data.sequence_length=16", "experts.rehearsal=0", twice)
    again = run(tmp_path / "again", cache, continued(first, *words))
    assert again["experts"]["spawned"][0]["step"] == 2, "two batches of its own"


@pytest.mark.full
def test_replayed_rows_are_no_novelty(tmp_path: Path) -> None:
    words = [word for word in PLAIN if word != "forgetting=none"]
    summary = run(tmp_path / "run", tmp_path / "cache", [*words, "forgetting=replay", *DYLORA])
    assert summary["experts"]["number"] >= 1


@pytest.mark.full
def test_what_an_expansion_added_is_part_of_the_frozen_base(tmp_path: Path) -> None:
    words = [word for word in PLAIN if word != "expansion=none"]
    words += ["expansion=width", "pipeline.keep_stages=true", *DYLORA]
    summary = run(tmp_path / "run", tmp_path / "cache", words)
    assert is_within(summary).get("gradient_flow", True)
    folder = tmp_path / "run"
    expanded, kept = (folder / name for name in ("attempt_1/expanded", "checkpoint"))
    assert files(expanded)["model.safetensors"] == files(kept)["model.safetensors"]


@pytest.mark.full
def test_experts_on_a_mixture_of_experts_report_both(tmp_path: Path) -> None:
    words = [word for word in PLAIN if word != "expansion=none"]
    words += ["expansion=moe", "expansion.moe.num_experts=2", "experts=single_lora"]
    summary = run(tmp_path / "run", tmp_path / "cache", words)
    assert set(summary["experts"]["usage"]) == set(summary["moe"]["usage"]) == {"old", "new"}

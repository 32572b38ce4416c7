"""Experts from children through whole jobs: trained from one parent, mixed, healed, resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline.plug import WORK
from tests.pipeline.tiny import FIXTURES, TINY
from tritter.checkpoints import Lineage, Source
from tritter.cli import main
from tritter.config.launch.composition import load_config
from tritter.core.families import Model, forward_flops
from tritter.core.models import load_model, read_model
from tritter.core.stock_routers import RouterControl
from tritter.errors import RequestError
from tritter.pipeline import Outcome, run_pipeline
from tritter.transform.children import _child_sequences, _OpenChild

OLD, NEW = FIXTURES / "text/old", FIXTURES / "text/new.jsonl"
MODEL = [word for word in TINY if not word.startswith(("model.", "data.", "forgetting"))]


def job(folder: Path, cache: Path, start: Path, *words: str) -> dict[str, Any]:
    """Continue training of a checkpoint on the tiny data."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ("data.sequence_length=32", "data.batch_size=4", f"cache_dir={cache}")
    overrides = [*MODEL, *sizes, "model=hf", f"model.path={start}", *words]
    run_pipeline(load_config(overrides), run_folder=folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.fixture(scope="module")
def place(
    run_tiny: Callable[..., Outcome], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a base, and the children `letters` and `digits` of it."""
    place = tmp_path_factory.mktemp("children")
    digits = (" ".join(str(7**n + k)[:6] for k in range(30)) for n in range(60))
    lines = [json.dumps({"text": text}) for text in digits]
    (place / "digits.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run_tiny(place / "base_run", "expansion=none", "forgetting=none")
    base = place / "base_run" / "baseline"
    for name, path in {"letters": NEW, "digits": place / "digits.jsonl"}.items():
        words = ("expansion=none", "forgetting=none", "data.old={}", f"data.new={{{name}: {path}}}")
        job(place / name, cache, base, *words)
    return place


def mixed(place: Path, folder: Path, cache: Path, *words: str) -> dict[str, Any]:
    listed = ",".join(str(place / name / "checkpoint") for name in ("letters", "digits"))
    base = place / "base_run" / "baseline"
    new = f"data.new={{letters: {NEW}, digits: {place / 'digits.jsonl'}}}"
    chosen = ("expansion=moe", "forgetting=replay", f"data.old={OLD}", new)
    from_children = f"expansion.moe.experts_from=[{listed}]"
    return job(folder, cache, base, *chosen, from_children, *words)


@pytest.mark.full
def test_children_become_one_model(place: Path, cache: Path, tmp_path: Path) -> None:
    """The gate covers the domains of the children and the old data; the lineage has all."""
    summary = mixed(place, tmp_path / "run", cache, "pipeline.keep_stages=true")
    assert set(summary["final"]) == {"old", "letters", "digits"}
    expanded = tmp_path / "run/attempt_1/expanded"
    lineage = Lineage.of(tmp_path / "run/checkpoint")
    hashes = [Lineage.of(place / n / "checkpoint").model_hash for n in ("letters", "digits")]
    assert list(lineage.expansion_history[-1].options["expert_hashes"]) == hashes
    notes = " ".join(summary["attempts"][0]["notes"])
    assert "router rows from training documents" in notes and "letters" in notes
    state = load_file(expanded / "model.safetensors")
    own = load_file(place / "digits/checkpoint/model.safetensors")
    expert = state["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    assert torch.equal(expert, own["model.layers.1.mlp.down_proj.weight"])
    _check_routing(place, expanded)
    assert main(["history", str(tmp_path / "run/checkpoint"), "--verify"]) == 0


def _check_routing(place: Path, expanded: Path) -> None:
    """Tokens of a child's data mostly go to its expert."""
    model = load_model(expanded)
    routing = RouterControl.of(model)
    assert routing is not None
    shares = []
    for name in ("letters", "digits"):
        folder = place / name / "checkpoint"
        lineage, source = Lineage.of(folder), Source.open(folder, read_model(folder))
        domains = {name: lineage.domains[name]}
        child = _OpenChild(name, source, lineage.model_hash, domains)
        tokens = _child_sequences(child, length=32, vocab_size=280)
        with torch.no_grad(), routing.recording():
            model(tokens)
            last = routing.recorded()[-1]
        shares.append(float((last.logits.argmax(dim=1) == len(shares)).float().mean()))
    assert min(shares) > 0.6 and sum(shares) > 1.5


class Killed(Exception):
    pass


@pytest.mark.full
@pytest.mark.parametrize("stage", ["expand", "fit", "evaluate"])
def test_a_kill_between_stages_is_resumed(
    place: Path, cache: Path, tmp_path: Path, stage: str
) -> None:
    whole = mixed(place, tmp_path / "whole", cache)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*WORK[stage], die)
        with pytest.raises(Killed):
            mixed(place, tmp_path / "parts", cache)
    parts = mixed(place, tmp_path / "parts", cache)
    assert parts["lineage"]["model_hash"] == whole["lineage"]["model_hash"]
    assert parts["final"] == whole["final"]


@pytest.mark.full
def test_weights_released_during_training_are_made_again(
    place: Path, cache: Path, tmp_path: Path
) -> None:
    """A kill in training after the expanded weights were removed: the same rows are computed."""
    from tritter.training import module

    whole = mixed(place, tmp_path / "whole", cache)
    step, calls = module.BaseModule.training_step, list[int]()

    def die_later(self: Any, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise Killed
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.BaseModule, "training_step", die_later)
        with pytest.raises(Killed):
            mixed(place, tmp_path / "parts", cache)
    parts = mixed(place, tmp_path / "parts", cache)
    assert parts["lineage"]["model_hash"] == whole["lineage"]["model_hash"]


@pytest.mark.full
def test_documents_held_out_by_a_child_give_no_router_rows(place: Path) -> None:
    """Every fifth document is held out; a child's sequences have training documents alone."""

    folder = place / "digits/checkpoint"
    lineage, source = Lineage.of(folder), Source.open(folder, read_model(folder))
    child = _OpenChild("digits", source, lineage.model_hash, lineage.domains)
    tokens = _child_sequences(child, length=32, vocab_size=280)
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens.flatten().tolist())
    assert lineage.split is not None
    lines = [json.loads(line)["text"] for line in (place / "digits.jsonl").read_text().split("\n")]
    from tritter.data.documents import text_key

    held_out = [one for one in lines if lineage.split.side(text_key(one)) != "train"]
    kept = [one for one in lines if one not in held_out]
    assert len(held_out) > 3 and not any(one[:20] in text for one in held_out)
    assert sum(one[:20] in text for one in kept) > 5


@pytest.mark.full
def test_random_rows_cost_less(place: Path, cache: Path, tmp_path: Path) -> None:
    """The FLOPs of router rows from data: the base reads the sequences of each child."""
    random = mixed(place, tmp_path / "random", cache, "expansion.moe.router=random")
    assert "router: random rows" in " ".join(random["attempts"][0]["notes"])
    with_data = mixed(place, tmp_path / "data", cache)
    base = read_model(place / "base_run" / "baseline").config
    length, flops = min(256, Model(base).position_limit or 256), 0.0
    for name in ("letters", "digits"):
        folder = place / name / "checkpoint"
        lineage, source = Lineage.of(folder), Source.open(folder, read_model(folder))
        child = _OpenChild(name, source, lineage.model_hash, {name: lineage.domains[name]})
        tokens = _child_sequences(child, length=length, vocab_size=280)
        flops += len(tokens) * forward_flops(Model(base)).of(tokens.shape[1])
    more = with_data["flops"]["expand"] - random["flops"]["expand"]
    assert more == pytest.approx(flops, rel=1e-9) and flops > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model=tiny"], "set model=hf model.path=CHECKPOINT"),
        (
            ["model=hf", "model.path={base}", "forgetting=l2sp"],
            "use replay, self_replay or distill",
        ),
        (["model=hf", "model.path={base}", "forgetting=si"], "use replay, self_replay or distill"),
    ],
)
def test_what_a_run_refuses(place: Path, words: list[str], reason: str) -> None:
    base = place / "base_run" / "baseline"
    listed = ",".join(str(place / name / "checkpoint") for name in ("letters", "digits"))
    overrides = [word.format(base=base) for word in words]
    with pytest.raises(RequestError, match=reason):
        load_config(["expansion=moe", f"expansion.moe.experts_from=[{listed}]", *overrides])

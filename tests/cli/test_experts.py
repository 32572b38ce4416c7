"""Commands that meet LoRA experts in a checkpoint: they run them, show them, or say why not."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Run, snapshot
from tests.cli.test_evaluate import TEXT
from tests.cli.test_generate import _greedy
from tests.evaluation.test_benchmark_files import written
from tests.methods.experts.mixtures import mixture_of
from tests.oracle import logits, stock, tokens
from tritter.checkpoints import (
    ExpansionRecord,
    Lineage,
    write_checkpoint,
    write_lineage,
)
from tritter.checkpoints.folder import copy_small_files
from tritter.core.expansions import Dus
from tritter.core.families import Model
from tritter.core.models import load_model, read_model
from tritter.errors import RequestError
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder
from tritter.methods.growth.growable import GrowableCausalLM
from tritter.storage.writer import TensorStream
from tritter.transform import plan_expansion

USAGE = {"prose": {"base": 0.7, "e0": 0.1, "e1": 0.2, "e2": 0}, "code": {"e1": 0.9, "e2": 0.1}}


def write_with_experts(
    source: Path, target: Path, mixture: ExpertMixture | None, *, parent: str | None = None
) -> Lineage:
    """Write a checkpoint that is the model of `source`, with experts beside it."""
    config = read_model(source).config
    lineage = Lineage(model_hash="", base_model_hash="", tensor_digests={}, file_digests={})
    if parent is not None:
        lineage = replace(lineage, parent_hash=parent, parent_path=f"../{source.name}", step=7)
    experts = None if mixture is None else ExpertFolder.of(mixture, usage=USAGE).write
    return write_checkpoint(
        target,
        config=config,
        tensors=TensorStream.of(Model(config).disk_tensors(load_model(source).state_dict())),
        lineage=lambda: lineage,
        artifacts=[partial(copy_small_files, source), experts],
    )


@pytest.fixture
def mixture(place: Path) -> ExpertMixture:
    """A mixture on `base`, which `whole` holds beside it and `root` is without."""
    made = mixture_of(load_model(place / "base"), router="both", has_base=True)
    root = write_with_experts(place / "base", place / "root", None)
    write_with_experts(place / "root", place / "whole", made, parent=root.model_hash)
    return made


@contextmanager
def as_stock(monkeypatch: pytest.MonkeyPatch, mixture: ExpertMixture) -> Iterator[None]:
    """Let the oracles of other commands' tests take the mixture for the stock model."""
    with monkeypatch.context() as patch:
        for module in ("tests.cli.test_generate", "tests.cli.test_evaluate"):
            patch.setattr(f"{module}.stock", lambda folder: mixture.model)
        yield


def test_generate_runs_the_mixture(
    run: Run, place: Path, mixture: ExpertMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--max-new-tokens 12 --json --prompt"
    result = run(f"generate --checkpoint whole {words}", "the model grows")
    assert result.code == 0, result.err
    with as_stock(monkeypatch, mixture):
        assert result.json["text"] == _greedy(place / "whole", "the model grows", 12)
    base = run(f"generate --checkpoint root {words}", "the model grows")
    assert base.json["text"] == _greedy(place / "root", "the model grows", 12)
    assert base.json["text"] != result.json["text"]
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (place / "whole/chat_template.jinja").write_text(template)
    chat = run(f"generate --checkpoint whole --chat {words}", "the model grows")
    assert chat.json["text"].strip() == result.json["text"].strip()


def test_evaluate_scores_the_mixture(
    run: Run, place: Path, mixture: ExpertMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "notes.txt").write_text(TEXT)
    tokenizer = AutoTokenizer.from_pretrained(place / "whole")
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]])
    result = run("evaluate --checkpoint whole --data notes=notes.txt --json")
    assert result.code == 0, result.err
    chances = logits(mixture.model, ids)[0, :-1].double().log_softmax(-1)
    expected = -float(chances.gather(1, ids[0, 1:, None]).mean())
    assert result.json["losses"]["notes"]["loss"] == pytest.approx(expected, rel=1e-5)
    plain = run("evaluate --checkpoint root --data notes=notes.txt --json").json
    assert abs(plain["losses"]["notes"]["loss"] - expected) > 0.01


@pytest.mark.full
def test_benchmarks_ask_the_mixture(run: Run, place: Path) -> None:
    """One expert alone is a plain model, which scores alike, and not as the base does."""
    pytest.importorskip("lm_eval")
    words = TEXT.split()
    rows = [
        {"question": word, "choices": {"text": words[:4], "label": [*"ABCD"]}, "answerKey": "B"}
        for word in words
    ]
    written(place / "files/arc_easy_test.jsonl", rows)
    shutil.copytree(place / "base", place / "whole")
    made = mixture_of(load_model(place / "base"), ranks=(9,))
    ExpertFolder.of(made).write(place / "whole")
    assert run("export --checkpoint whole --output plain --merge --dtype float32").code == 0
    asked = "--tasks arc_easy --tasks-path files --json"
    found = {
        name: run(f"evaluate --checkpoint {name} {asked}").json["benchmarks"]["arc_easy"]
        for name in ("whole", "plain", "base")
    }
    assert found["whole"] == found["plain"] != found["base"]


def test_inspect_lists_them(run: Run, mixture: ExpertMixture) -> None:
    found = run("inspect whole --json").json["experts"]
    assert (found["names"], found["router"]) == (["base", "e0", "e1", "e2"], "both")
    assert found["adapters"]["e1"]["rank"] == 4 and found["usage"]["code"] == {"e1": 0.9, "e2": 0.1}
    assert found["mean_gates"]["e1"] == pytest.approx(0.55)
    text = " ".join(run("inspect whole").out.split())
    assert "e1 4 9 1.78 k down_proj q_proj v_proj" in text
    assert "prose: base 0.70, e0 0.10, e1 0.20, e2 0.00" in text
    assert run("inspect root --json").json["experts"] is None


def test_an_expansion_by_experts_has_no_map(run: Run, place: Path, mixture: ExpertMixture) -> None:
    config, lineage = read_model(place / "whole").config, Lineage.of(place / "whole")
    record = ExpansionRecord(
        timestamp="2026-11-21T18:00:00+00:00",
        expansion_type="experts",
        method="dylora",
        options={"spawned": ["e0"]},
        seed=0,
        source_config=config,
        target_config=config,
        layer_sources=(0, 1, 2),
        map_digest="0" * 64,
        claims_exact=True,
        step0_error=0.0,
    )
    write_lineage(place / "whole", replace(lineage, expansion_history=(record,)), config)
    assert run("inspect whole --json").json["last_map"] == {
        "digest": None,
        "problem": None,
        "rows": [],
    }
    assert "none: the base is unchanged" in run("inspect whole").out
    shown = " ".join(run("history whole --verify").out.split())
    assert "whole (dylora, LoRA experts e0, e1, e2)" in shown and "2 intact" in shown


def test_history_shows_and_checks_them(run: Run, place: Path, mixture: ExpertMixture) -> None:
    result = run("history whole --verify")
    assert result.code == 0, result.err
    assert "2 checkpoints: 2 intact, 0 changed, 0 not checked" in result.out
    assert "whole (training to step 7, LoRA experts e0, e1, e2)" in " ".join(result.out.split())
    table, _, tree = result.out.partition("\n\n")
    assert "3 LoRA experts" in " ".join(table.split()) and "e0, e1, e2" not in table
    assert "(training to step 7, LoRA experts e0, e1, e2)\n" in tree, "no line is cut off"
    links = run("history whole --json").json["chain"]
    assert [link["experts"] for link in links] == [[], ["e0", "e1", "e2"]]
    assert links[0]["model_hash"] == links[1]["model_hash"] == links[1]["parent_hash"]
    path = place / "whole/experts/e1/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = run("history whole --verify")
    assert result.code == 3
    assert "whole/experts/e1/adapter_model.safetensors: changed" in " ".join(result.out.split())
    for words in ("inspect whole", "generate --checkpoint whole --prompt the"):
        assert run(words).code == (2 if words.startswith("inspect") else 0)


def test_a_chain_of_one_hash_ends(run: Run, place: Path, mixture: ExpertMixture) -> None:
    """Whatever lies beside: parents that are gone, and siblings with the same base."""
    lineage = json.loads((place / "whole/tritter.json").read_text())
    write_with_experts(place / "whole", place / "later", mixture, parent=lineage["model_hash"])
    chain = run("history later --json").json["chain"]
    assert [Path(each["folder"]).name for each in chain] == ["root", "whole", "later"]
    shutil.rmtree(place / "root")
    shutil.rmtree(place / "whole")
    chain = run("history later --json").json["chain"]
    assert [each["folder"] for each in chain] == [None, "later"]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "words",
    [
        "expand --checkpoint whole --method dus --output out",
        "expand --checkpoint whole --method dus --output out --dry-run",
        "validate --source root --result whole",
        "train --checkpoint whole --data notes.txt --output out forgetting=none "
        "data.sequence_length=32",
    ],
)
def test_what_would_leave_them_behind_is_refused(
    run: Run, place: Path, mixture: ExpertMixture, words: str
) -> None:
    (place / "notes.txt").write_text(TEXT * 40)
    before = snapshot(place)
    result = run(words)
    assert result.code == 2
    assert "contains experts (base, e0, e1, e2)" in result.err and "--merge" in result.err
    assert snapshot(place) == before


def test_a_library_that_grows_refuses_them(place: Path, mixture: ExpertMixture) -> None:
    with pytest.raises(RequestError, match="contains experts"):
        GrowableCausalLM(place / "whole")
    with pytest.raises(RequestError, match="contains experts"):
        plan_expansion(place / "whole", [Dus()])


def test_the_card_says_how_all_of_it_is_loaded(place: Path, mixture: ExpertMixture) -> None:
    card = (place / "whole/README.md").read_text()
    assert "`e0`, `e1`, `e2`" in card and "tritter generate" in card
    assert "experts/" not in (place / "root/README.md").read_text()
    assert "adapters" not in (place / "root/README.md").read_text()
    blocks = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("PATH_OF_THIS_FOLDER", str(place / "whole")), scope)
    with mixture.only("e0"):
        expected = logits(mixture.model, tokens(300))
    one = scope["one"]
    assert isinstance(one, torch.nn.Module)
    assert (logits(one, tokens(300)) - expected).abs().max() < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(place / "whole")
    assert torch.equal(logits(loaded, tokens(300)), logits(stock(place / "root"), tokens(300)))


def test_damaged_experts_are_a_wrong_request(run: Run, place: Path, mixture: ExpertMixture) -> None:
    (place / "whole/state/experts.safetensors").unlink()
    for words in (
        "inspect whole",
        "generate --checkpoint whole --prompt the",
        "evaluate --checkpoint whole --data n=whole/README.md",
        "expand --checkpoint whole --method dus",
        "export --checkpoint whole --output out --merge",
    ):
        result = run(words)
        assert (result.code, "experts.safetensors" in result.err) == (2, True), words
    (place / "whole/state/experts.json").unlink()
    for _ in range(2):
        result = run("generate --checkpoint whole --prompt the")
        assert result.code == 2 and "experts.json is missing" in result.err
        shutil.rmtree(place / "whole/experts", ignore_errors=True)  # only the lineage names them


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("left", ["adapters", "tensors", "one tensor file"])
def test_experts_without_their_head_are_no_plain_model(
    run: Run, place: Path, mixture: ExpertMixture, left: str
) -> None:
    """Without `tritter.json`, too, which would name the missing file."""
    for name in ("tritter.json", "state/experts.json"):
        (place / "whole" / name).unlink()
    if left == "tensors":
        shutil.rmtree(place / "whole/experts")
    else:
        (place / "whole/state/experts.safetensors").unlink()
    if left == "one tensor file":
        for path in [*place.glob("whole/experts/*/*.json"), *place.glob("whole/experts/e[12]/*")]:
            path.unlink(missing_ok=True)
    (place / "notes.txt").write_text(TEXT * 40)
    before = snapshot(place)
    for words in (
        "inspect whole",
        "generate --checkpoint whole --prompt the",
        "evaluate --checkpoint whole --data n=notes.txt",
        "expand --checkpoint whole --method dus --output out",
        "export --checkpoint whole --output out",
        "export --checkpoint whole --output out --merge",
        "export --checkpoint whole --output out --format peft",
        "validate --source root --result whole",
        "train --checkpoint whole --data notes.txt --output out data.sequence_length=32 "
        "forgetting=none",
        "train --checkpoint whole --data notes.txt --output out data.sequence_length=32 "
        "forgetting=none experts=dylora",
    ):
        result = run(words)
        assert result.code == 2, (words, result)
        assert "state/experts.json is missing" in result.err, (words, result.err)
    with pytest.raises(RequestError, match="is missing"):
        GrowableCausalLM(place / "whole")
    assert snapshot(place) == before


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"something_new": 3},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"r": 10**9},
        {"r": True},
        {"lora_alpha": 0},
        {"lora_alpha": True},
        {"target_modules": None},
        {"target_modules": {"q_proj": 1}},
    ],
    ids=str,
)
def test_an_adapter_that_generate_refuses_inspect_refuses(
    run: Run, place: Path, mixture: ExpertMixture, change: dict[str, object]
) -> None:
    path = place / "whole/experts/e1/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (place / "whole/tritter.json").unlink()  # which would tell the change before it is read
    said = {run(words).err for words in ("inspect whole", "generate --checkpoint whole --prompt a")}
    assert len(said) == 1 and f"adapter_config.json: {next(iter(change))} = " in said.pop()

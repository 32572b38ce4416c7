"""`tritter export` of LoRA experts: stock PEFT and stock transformers compute what was merged."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import VOCABULARY, Run, snapshot
from tests.cli.test_evaluate import TEXT
from tests.cli.test_experts import USAGE, mixture, write_with_experts
from tests.methods.experts.mixtures import TARGETS, mixture_of
from tests.oracle import chat, logits, saved, stock, tiny_llama, tokens
from tritter.checkpoints import Lineage, write_lineage
from tritter.checkpoints.record import LearnedDomain
from tritter.core.models import load_model, read_model
from tritter.methods.experts.adapters import Factors
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder

__all__ = ["mixture"]
TOKENS = tokens(VOCABULARY)
GATES = {name: sum(each.get(name, 0) for each in USAGE.values()) / 2 for name in ("e0", "e1", "e2")}


def merged_by_hand(base: Any, mixture: ExpertMixture, gates: Mapping[str, float]) -> Any:
    """Add every expert's product, times its gate, to the weights of an untied stock model."""
    for layer_name, layer in mixture.lora:
        weight = base.get_parameter(f"{layer_name}.weight")
        for name, gate in gates.items():
            own = Factors.of(layer, name)
            if own is not None:
                delta = gate * own.scaling * own.up.detach() @ own.down.detach()
                weight.data += delta.T if weight.shape != delta.shape else delta
    return base


def changed(before: Tensor, after: Tensor) -> tuple[float, float]:
    difference = (after - before).double() / before.double().std()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def random_tokens(length: int = 64) -> Tensor:
    return torch.randint(VOCABULARY, (8, length), generator=torch.Generator().manual_seed(0))


def test_every_expert_is_a_stock_adapter(run: Run, place: Path, mixture: ExpertMixture) -> None:
    before = snapshot(place / "whole")
    result = run("export --checkpoint whole --output out --format peft")
    assert result.code == 0, result.err
    assert "e1 4 9 1.78 k" in " ".join(result.out.split())
    assert sorted(path.name for path in (place / "out").iterdir()) == ["e0", "e1", "e2"]
    for name in mixture.adapters:
        theirs = PeftModel.from_pretrained(stock(place / "root"), place / "out" / name)
        with mixture.only(name):
            difference = (logits(theirs, TOKENS) - logits(mixture.model, TOKENS)).abs().max()
        assert difference < 1e-4
        config = PeftConfig.from_pretrained(place / "out" / name)
        assert config.base_model_name_or_path == str(place / "whole")
    assert snapshot(place / "whole") == before


def test_a_merge_is_measured_one_sequence_at_a_time(mixture: ExpertMixture) -> None:
    """Logits of all sequences take tens of gigabytes with a large vocabulary."""
    rows: list[int] = []
    adapter, before = ExpertFolder.of(mixture).adapters["e0"], logits(mixture.model, TOKENS)
    handle = mixture.model.register_forward_pre_hook(
        lambda _, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    change = adapter.logit_change(mixture, random_tokens())
    mixture.mean_gates([random_tokens()])
    handle.remove()
    assert rows == [1] * 24 and change.num_tokens == 8 * 64
    assert torch.equal(logits(mixture.model, TOKENS), before)  # the mixture is the same


def test_what_the_base_is_called_on_the_hub(run: Run, place: Path, mixture: ExpertMixture) -> None:
    told = {"stage": "given", "path": "owner/name"}
    root = replace(Lineage.of(place / "root"), training_config=told)
    write_lineage(place / "root", root, read_model(place / "root").config)
    words = "export --checkpoint whole --output out --format peft"
    found = run(f"{words} --dtype float16 --json").json
    assert found["base"] == "owner/name"
    assert {each["dtype"] for each in found["adapters"]} == {"float16"}
    config = json.loads((place / "out/e0/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    other = replace(root, model_hash="0" * 64)
    write_lineage(place / "root", other, read_model(place / "root").config)
    assert run(f"{words} --json --overwrite").json["base"] == str(place / "whole")


@pytest.mark.full
def test_a_mixture_becomes_one_adapter(run: Run, place: Path, mixture: ExpertMixture) -> None:
    words = "export --checkpoint whole --output out --format peft --merge"
    result = run(f"{words} --json")
    assert result.code == 0, result.err
    told = result.json["merged"]
    assert told["gates"] == pytest.approx({"base": 0.35, **GATES})
    assert (told["rank"], told["lost_share"]) == (9, 0)  # 2 + 4 + 3 on q_proj
    expected = merged_by_hand(stock(place / "root"), mixture, GATES)
    one = PeftModel.from_pretrained(stock(place / "root"), place / "out")
    assert (logits(one, TOKENS) - logits(expected, TOKENS)).abs().max() < 1e-4
    ids = random_tokens()
    largest, mean = changed(logits(mixture.model, ids), logits(expected, ids))
    assert told["logit_change"]["largest"] == pytest.approx(largest, rel=1e-3)
    assert told["logit_change"]["mean"] == pytest.approx(mean, rel=1e-3)
    assert told["logit_change"]["num_tokens"] == 8 * 64 and largest > 0.1
    narrow = run(f"{words} --rank 2 --overwrite")
    assert narrow.code == 0, narrow.err
    shown = " ".join(narrow.out.split())
    assert "lossy: logit shift up to" in shown and "% of a layer's update" in shown
    assert json.loads((place / "out/adapter_config.json").read_text())["r"] == 2


def test_a_mixture_becomes_a_plain_model(run: Run, place: Path, mixture: ExpertMixture) -> None:
    scored = replace(Lineage.of(place / "whole"), benchmark_scores={"prose": 1.5})
    write_lineage(place / "whole", scored, read_model(place / "whole").config)
    result = run("export --checkpoint whole --output out --merge --dtype float32 --json")
    assert result.code == 0, result.err
    expected = merged_by_hand(stock(place / "root"), mixture, GATES)
    assert (logits(stock(place / "out"), TOKENS) - logits(expected, TOKENS)).abs().max() < 1e-4
    assert result.json["merged"]["gates_from"] == "recorded means on prose, code"
    names = {path.name for path in (place / "out").iterdir()}
    assert not {"experts", "state", "tritter.json"} & names
    card = (place / "out/README.md").read_text()
    assert "LoRA experts are merged into these weights with gates base 0.35, e0 0.05" in card
    assert "1.5000" not in card  # the loss of the mixture
    assert "lossy" in run("export --checkpoint whole --output two --merge").out
    assert run("expand --checkpoint out --method dus --dry-run").code == 0


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_vocabulary_with_adapters_comes_untied(run: Run, place: Path, is_tied: bool) -> None:
    model = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=is_tied)
    saved(model, place / "it")
    targets = [(*TARGETS, "embed_tokens", "lm_head")] * 2
    live = mixture_of(load_model(place / "it"), ranks=(2, 3), targets=targets, router="evidence")
    write_with_experts(place / "it", place / "whole", live)
    result = run("export --checkpoint whole --output out --merge --dtype float32 --json")
    assert result.code == 0, result.err
    by_hand = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=False)
    by_hand.load_state_dict(model.state_dict())
    expected = merged_by_hand(by_hand, live, {name: GATES[name] for name in live.names})
    assert (logits(stock(place / "out"), TOKENS) - logits(expected, TOKENS)).abs().max() < 1e-4
    one = run("export --checkpoint whole --output one --format peft --merge --json").json
    assert one["merged"]["logit_change"] == result.json["merged"]["logit_change"]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("targets", [("embed_tokens", "lm_head"), ("embed_tokens",), ("lm_head",)])
@pytest.mark.parametrize("is_tied", [True, False])
def test_stock_peft_merges_an_adapter_of_a_tied_vocabulary_rightly(
    run: Run, place: Path, is_tied: bool, targets: tuple[str, ...]
) -> None:
    """The base is in bfloat16; the head is not rounded to it."""
    model = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=is_tied)
    base = load_model(saved(model.bfloat16(), place / "it"))
    live = mixture_of(base, ranks=(2,), targets=[(*TARGETS, *targets)], router="evidence")
    write_with_experts(place / "it", place / "whole", live)
    result = run("export --checkpoint whole --output out --format peft")
    assert result.code == 0 and ("tied head" in result.out) == is_tied, result.err
    (name,) = live.adapters
    if is_tied and "lm_head" in targets:
        stored = load_file(place / "out" / name / "adapter_model.safetensors")
        (head,) = (each for key, each in stored.items() if key.endswith("lm_head.weight"))
        assert head.dtype == torch.float32
    theirs = PeftModel.from_pretrained(stock(place / "it"), place / "out" / name)
    with live.only(name):
        expected = logits(live.model, TOKENS)
    assert (logits(theirs, TOKENS) - expected).abs().max() < 1e-4
    assert (logits(theirs.merge_and_unload(), TOKENS) - expected).abs().max() < 1e-4


def test_the_change_is_measured_on_what_was_learned(
    run: Run, place: Path, mixture: ExpertMixture
) -> None:
    (place / "notes.txt").write_text(TEXT * 40)
    learned = {
        "notes": LearnedDomain(paths=(str(place / "notes.txt"),)),
        "gone": LearnedDomain(paths=("/nowhere/at/all.txt",)),
    }
    whole = replace(Lineage.of(place / "whole"), domains=learned)
    write_lineage(place / "whole", whole, read_model(place / "whole").config)
    result = run("export --checkpoint whole --output out --merge --json")
    assert result.code == 0, result.err
    merged = result.json["merged"]
    assert merged["measured_on"] == "notes" and merged["logit_change"]["largest"] > 0.1
    assert merged["gates_from"] == "means on notes"
    ids = AutoTokenizer.from_pretrained(place / "whole")(TEXT * 40)["input_ids"][:64]
    logits(mixture.model, torch.tensor([ids]))  # the beginning of the one document
    by_hand = torch.stack([each.weights.mean((0, 1)) for each in mixture.gates()]).mean(0)
    assert [*merged["gates"].values()] == pytest.approx(by_hand.tolist(), rel=1e-5)


def test_conversations_are_measured_as_they_were_trained(run: Run, place: Path) -> None:
    live = mixture_of(load_model(chat.checkpoint(place / "chat")), router="both")
    write_with_experts(place / "chat", place / "chatty", live)
    answer = {"role": "assistant", "content": f"{chat.SENTENCE} " * 40}
    turns = [{"role": "user", "content": "the class"}, answer]
    (place / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    refused = {"messages": [turns[0], {**answer, "tool_calls": [call]}]}  # not in the template
    (place / "calls.jsonl").write_text(json.dumps(refused))
    paths = {name: str(place / f"{name}.jsonl") for name in ("chats", "calls")}
    learned = {name: LearnedDomain(paths=(path,)) for name, path in paths.items()}
    lineage = replace(Lineage.of(place / "chatty"), domains=learned)
    write_lineage(place / "chatty", lineage, read_model(place / "chatty").config)
    result = run("export --checkpoint chatty --output out --merge --json")
    assert result.code == 0, result.err
    merged = result.json["merged"]
    assert merged["measured_on"] == "chats"
    ids = chat.tokenizer().apply_chat_template(turns)["input_ids"][:128]
    logits(live.model, torch.tensor([ids]))
    by_hand = torch.stack([each.weights.mean((0, 1)) for each in live.gates()]).mean(0)
    assert [*merged["gates"].values()] == pytest.approx(by_hand.tolist(), rel=1e-5)


def test_one_expert_alone_is_merged_exactly(run: Run, place: Path) -> None:
    live = mixture_of(load_model(place / "base"), ranks=(3,))
    ExpertFolder.of(live).write(place / "base")  # without usage: gates are equal, of one it is 1
    result = run("export --checkpoint base --output out --merge --dtype float32 --json")
    assert result.code == 0, result.err
    assert result.json["merged"]["gates"] == {"e0": 1}
    assert result.json["merged"]["logit_change"]["largest"] < 1e-4
    difference = logits(stock(place / "out"), TOKENS) - logits(live.model, TOKENS)
    assert difference.abs().max() < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("is_tied", [True, False])
def test_experts_of_a_model_type_without_a_table_are_merged(
    run: Run, place: Path, is_tied: bool
) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
    config = AutoConfig.for_model("stablelm", tie_word_embeddings=is_tied, **sizes)
    saved(AutoModelForCausalLM.from_config(config), place / "it")
    targets = [(*TARGETS, "embed_tokens", "lm_head")]
    live = mixture_of(load_model(place / "it"), ranks=(2,), targets=targets, router="evidence")
    ExpertFolder.of(live).write(place / "it")
    result = run("export --checkpoint it --output out --merge --dtype float32")
    assert result.code == 0, result.err
    assert (logits(stock(place / "out"), TOKENS) - logits(live.model, TOKENS)).abs().max() < 1e-4


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--checkpoint whole", "--format peft writes each as an adapter, --merge merges"),
        ("--checkpoint root --merge", "--merge: root has no LoRA experts"),
        ("--checkpoint root --format peft", "--format = peft: root has no LoRA experts"),
        ("--checkpoint whole --format pefd", "Did you mean peft?"),
        ("--checkpoint whole --merge --rank 3", "allowed with --format peft --merge"),
        ("--checkpoint whole --format peft --rank 3", "allowed with --format peft --merge"),
        ("--checkpoint whole --format peft --prefix a.", "--prefix: allowed with --format hf"),
        ("--checkpoint root/model.safetensors --merge", "--merge: --checkpoint"),
        ("--checkpoint whole --format peft --merge --rank 0", "--rank"),
        ("--checkpoint gone --format peft", "no such folder"),
    ],
)
def test_refusals(run: Run, place: Path, mixture: ExpertMixture, words: str, said: str) -> None:
    before = snapshot(place)
    result = run(f"export --output out {words}")
    assert (result.code, said in result.err) == (2, True), result.err
    assert snapshot(place) == before and not (place / "out").exists()


def test_a_plan_asks_to_merge_experts(run: Run, place: Path, mixture: ExpertMixture) -> None:
    """The commands of a plan expand, which checkpoints with experts do not allow."""
    words = "--target 1M --gpu-hours 1"
    refused = run(f"plan whole {words}")
    assert refused.code == 2 and "--source" in refused.err and "--merge" in refused.err
    assert run("export --checkpoint whole --output merged --format hf --merge").code == 0
    assert run(f"plan merged {words}").code == 0


def test_only_adapters_are_replaced(run: Run, place: Path, mixture: ExpertMixture) -> None:
    words = "export --checkpoint whole --output out --format peft"
    assert run(words).code == 0
    assert run(words).code == 2
    assert run(f"{words} --overwrite --merge").code == 0
    assert run(f"{words} --overwrite").code == 0
    (place / "out/e0/thesis.txt").write_text("mine")
    for more in ("--overwrite", "--overwrite --merge"):
        result = run(f"{words} {more}")
        assert result.code == 2 and "thesis.txt" in result.err
    for output in ("whole", "whole/experts", "."):
        result = run(f"export --checkpoint whole --output {output} --format peft --overwrite")
        assert result.code == 2, output
    assert (place / "out/e0/thesis.txt").read_text() == "mine"


def test_a_changed_adapter_is_not_exported(run: Run, place: Path, mixture: ExpertMixture) -> None:
    path = place / "whole/experts/e1/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for words in ("--format peft", "--merge"):
        result = run(f"export --checkpoint whole --output out {words}")
        assert result.code == 2 and "was changed since its lineage was written" in result.err

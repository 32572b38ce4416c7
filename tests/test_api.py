"""The seven functions that people import, against stock transformers and the commands."""

import ast
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard

import tritter
from tests import oracle
from tests.config.conftest import FakePipeline
from tests.forked import run_program
from tests.oracle.families import generic, tiny
from tests.pipeline.tiny import FIXTURES, TINY
from tritter import EWC, L2SP, GrowableCausalLM, LlamaPro, Moe, MoeAdd, Plateau, Width, api
from tritter.checkpoints import Lineage
from tritter.checkpoints.run_text import RunText
from tritter.cli import main as command
from tritter.config.launch.entry import main as train_py
from tritter.core.models import save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import END_OF_TEXT, train_tokenizer
from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped
from tritter.storage.reading import read_object
from tritter.transform import Expanded, PlannedExpansion

ROOT = Path(__file__).parents[1]
WORDS = [f"def name_{n}(): return {n} + {n % 7}\nname_{n}()" * 3 for n in range(40)]


def checkpoint(folder: Path, **changes: Any) -> Path:
    """Leave a stock model with a tokenizer."""
    oracle.saved(oracle.tiny_llama(vocab_size=280, **changes), folder)
    tokenizer = train_tokenizer([Document("d", text) for text in WORDS], vocab_size=280)
    save_tokenizer(tokenizer, folder, end_of_text=END_OF_TEXT)
    return folder


# The package


def program(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_the_functions_are_there_before_torch_is() -> None:
    names = "tritter.expand, tritter.load, tritter.run, tritter.grow, tritter.add_experts, "
    names += "tritter.gate, tritter.protect"
    program(
        f"import sys, tritter; assert all(map(callable, [{names}])); import tritter.api; "
        "assert not {'torch', 'transformers', 'hydra', 'pandas'} & {*sys.modules}"
    )


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse((ROOT / "tritter/__init__.pyi").read_text(encoding="utf-8"))
    stated = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stated == tritter._EXPORTS
    assert (ROOT / "tritter/py.typed").is_file()


# expand


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", generic(("llama", "qwen2", "gemma3_text", "phi3")))
@pytest.mark.parametrize(
    ("method", "options", "typed"),
    [
        ("width", {"hidden_size": 48}, [Width(hidden_size=48)]),
        ("llama-pro", {"target_layers": 5}, [LlamaPro(target_layers=5)]),
        ("dus", {"target_layers": 4}, None),
    ],
)
def test_a_live_model_is_the_one_that_the_folder_holds(
    family: str, method: str, options: dict[str, Any], typed: Any, tmp_path: Path
) -> None:
    model = tiny(family)
    source = oracle.saved(model, tmp_path / "base")
    live = tritter.expand(model, method, seed=3, **options).state_dict()
    written = tritter.expand(source, method, output=tmp_path / "grown", seed=3, **options)
    assert written == tmp_path / "grown"
    wanted = oracle.stock(written).state_dict()
    assert live.keys() == wanted.keys()
    assert all(torch.equal(live[name], wanted[name]) for name in wanted)
    loaded = tritter.expand(str(source), typed or [method], seed=3).state_dict() if typed else live
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_a_live_model_is_written_with_its_lineage_and_tokenizer(tmp_path: Path) -> None:
    model = tritter.load(checkpoint(tmp_path / "base"))
    grown = tritter.expand(model, [Width(hidden_size=48), "llama_pro"], output=tmp_path / "grown")
    wanted = tritter.expand(model, [Width(hidden_size=48), LlamaPro()])
    assert oracle.relative_difference(oracle.stock(grown), wanted, oracle.tokens()) == 0
    lineage = Lineage.read(grown)
    assert lineage is not None and lineage.parent_hash == lineage.base_model_hash
    assert [record.method for record in lineage.expansion_history] == ["width", "llama_pro"]
    assert (grown / "tokenizer.json").is_file()
    assert command(["history", str(grown), "--verify"]) == 0
    from_folder = tritter.expand(tmp_path / "base", "stack", output=tmp_path / "other")
    other = Lineage.read(from_folder)
    assert other is not None and other.base_model_hash == lineage.base_model_hash
    with pytest.raises(RequestError, match="exists"):
        tritter.expand(model, "width", output=grown)
    assert tritter.expand(model, "width", output=grown, overwrite=True) == grown
    with pytest.raises(RequestError, match="overwrite") as told:
        tritter.expand(model, "width", overwrite=True)
    assert told.value.problems[0].key == "overwrite"


def test_a_false_claim_of_exactness_is_an_error_and_what_it_wrote_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle.saved(oracle.tiny_llama(), tmp_path / "base")
    monkeypatch.setattr(PlannedExpansion, "is_exact", True)
    with pytest.raises(TritterError, match="the result differs from the source at layer"):
        tritter.expand(tmp_path / "base", "dus", output=tmp_path / "deep")
    error = Lineage.read(tmp_path / "deep").expansion_history[-1].step0_error
    assert error is not None and error > 0.01


def test_the_former_call_writes_folder_to_folder(tmp_path: Path) -> None:
    source = oracle.saved(oracle.tiny_llama(), tmp_path / "base")
    done = tritter.expand(source, tmp_path / "grown", [Width(hidden_size=48)], seed=1)
    assert isinstance(done, Expanded) and done.folder == tmp_path / "grown"
    wanted = tritter.expand(source, "width", hidden_size=48, seed=1)
    assert oracle.relative_difference(oracle.stock(done.folder), wanted, oracle.tokens()) == 0


def test_experts_are_appended_to_a_live_model(tmp_path: Path) -> None:
    model = tritter.expand(oracle.tiny_llama(), Moe(num_experts=4, noise=0.0))
    more = tritter.expand(model, MoeAdd(num_experts=2))
    assert oracle.relative_difference(model, more, oracle.tokens()) < 1e-5
    folder = tritter.expand(model, "moe_add", num_experts=2, output=tmp_path / "more")
    again = tritter.load(folder)
    assert oracle.relative_difference(more, again, oracle.tokens()) < 1e-6


# load


def test_loaded_models_compute_what_they_did(tmp_path: Path) -> None:
    """FFNs that are padded on disk, and LoRA experts with their router."""
    model, ids = oracle.tiny_llama(), oracle.tokens()
    grown = tritter.grow(model, "schedule", growth_cooldown=1, initialiser="random")
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    grown(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    grown._loop.grow({1: 3})  # one layer alone
    grown.save_pretrained(tmp_path / "grown")
    loaded = tritter.load(tmp_path / "grown")
    widths = [layer.mlp.up_proj.out_features for layer in loaded.model.layers]
    assert widths == [40, 43, 40] and not loaded.training
    assert oracle.relative_difference(grown, loaded, ids) < 1e-6

    from tritter.methods.experts.stored import ExpertFolder

    base = oracle.saved(oracle.tiny_llama(), tmp_path / "skilled")
    skilled = tritter.add_experts(base, rank=2, num_experts=2, top_k=1)
    with torch.no_grad():
        for parameter in skilled.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    ExpertFolder.of(skilled.expert_mixture).write(base)
    assert oracle.relative_difference(oracle.stock(base), skilled, ids) > 1e-3
    assert oracle.relative_difference(tritter.load(base), skilled, ids) < 1e-6


def test_a_loaded_model_has_the_checkpoints_dtype(tmp_path: Path) -> None:
    oracle.saved(oracle.tiny_llama().to(torch.bfloat16), tmp_path / "base")
    assert tritter.load(tmp_path / "base").dtype is torch.bfloat16
    assert tritter.load(tmp_path / "base", dtype=torch.float32).dtype is torch.float32
    assert tritter.expand(tmp_path / "base", "stack").dtype is torch.bfloat16


# grow, add_experts


@pytest.mark.parametrize("trigger", ["plateau", Plateau(threshold=0.9)])
def test_a_loop_grows_a_model(trigger: Any) -> None:
    ids, model = oracle.tokens(), oracle.tiny_llama()
    grown = tritter.grow(
        model, trigger, growth_cooldown=2, plateau_steps=2, max_growth_per_step=4, warmup_steps=1
    )
    assert isinstance(grown, GrowableCausalLM) and grown.model is model
    optimizer, born = torch.optim.AdamW(grown.parameters(), lr=1e-6), 0
    for _ in range(4):
        loss = grown(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        grown.update_loss(loss)
        born += grown.check_and_grow()["born"]
        optimizer.zero_grad()
    assert born and max(grown.neurons) == 40 + born


def test_experts_change_nothing_until_they_are_trained() -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens()
    before = oracle.logits(model, ids)
    assert tritter.add_experts(model, rank=4, num_experts=3, targets=["q_proj", "v_proj"]) is model
    assert torch.equal(oracle.logits(model, ids), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "expert_router" in name for name in trained)
    # 3 experts of rank 4 on q (24 → 24) and v (24 → 12), a router of 24 + 1 each, in 3 layers
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 3 * 3 * (4 * (24 + 24) + 4 * (24 + 12) + 24 + 1)
    tritter.add_experts(model, rank=2, num_experts=1)
    assert model.expert_mixture.names == [f"expert_{n}" for n in range(4)]
    assert torch.equal(oracle.logits(model, ids), before)
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), GrowableCausalLM])
def test_experts_are_added_to_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = oracle.tiny_llama()
    names = set(model.state_dict())
    assert tritter.add_experts(wrap(model), rank=2) is model
    assert set(model.expert_mixture.base_state_dict()) <= names


def test_reentrant_checkpointing_of_a_learned_router_is_refused() -> None:
    model, ids = tritter.add_experts(oracle.tiny_llama(), rank=2).train(), oracle.tokens()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RequestError, match="set use_reentrant=False"):
        model(input_ids=ids, labels=ids)


def test_more_experts_leave_the_routing_as_it_is() -> None:
    model = tritter.add_experts(oracle.tiny_llama(), rank=2, top_k=1, temperature=0.5)
    mixture = tritter.add_experts(model, rank=2, num_experts=1).expert_mixture
    assert (mixture.routing.top_k, mixture.routing.temperature) == (1, 0.5)
    tritter.add_experts(model, rank=2, num_experts=1, top_k=2)
    assert (mixture.routing.top_k, mixture.routing.temperature) == (2, 0.5)


def test_end_tokens_of_a_generation_config_stay(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    model.generation_config.eos_token_id = [2, 7]
    oracle.saved(model, tmp_path / "base")
    for source in (model, tmp_path / "base"):
        assert tritter.expand(source, "stack").generation_config.eos_token_id == [2, 7]
    live = tritter.load(tmp_path / "base")
    live.name_or_path = live.config.name_or_path = ""  # of a folder that is gone
    live.generation_config.temperature = 0.6  # without do_sample: only a warning on loading
    tritter.expand(live, "stack", output=tmp_path / "grown")
    assert oracle.stock(tmp_path / "grown").generation_config.eos_token_id == [2, 7]


# protect


def fisher_by_hand(model: nn.Module, sequences: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean squared gradient of each sequence's mean loss, one by one."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids in sequences:
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square()
    model.zero_grad()
    return {name: value / len(sequences) for name, value in total.items()}


def moved(model: nn.Module) -> dict[str, Tensor]:
    """Move all weights at random and return by how much."""
    generator = torch.Generator().manual_seed(5)
    steps = {
        n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += steps[name]
    return steps


@pytest.mark.parametrize("method", ["ewc", EWC(ewc_lambda=7.0)], ids=["name", "typed"])
def test_ewc_is_the_quadratic_form_of_the_fisher(method: Any) -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens(batch=5)
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=2)
    options = {"ewc_lambda": 7.0} if isinstance(method, str) else {}
    penalty = tritter.protect(model, method, loader, **options)
    assert penalty().item() == 0
    fisher = fisher_by_hand(model, list(ids))
    steps = moved(model)
    wanted = 3.5 * sum(float((fisher[n].double() * s.square()).sum()) for n, s in steps.items())
    loss = penalty()
    assert loss.ndim == 0 and loss.item() == pytest.approx(wanted, rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 7.0 * fisher[name] * steps[name], rtol=1e-3,
                                   atol=1e-5)  # fmt: skip


def test_padding_and_sequences_of_all_lengths_count_as_themselves() -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, 9:] = 0, 0
    sequences = [ids[0], ids[1, 6:], ids[2, :9]]
    padded = [{"input_ids": ids, "attention_mask": mask}]
    penalty = tritter.protect(model, "ewc", padded)
    wanted = fisher_by_hand(model, sequences)
    for name, value in wanted.items():
        torch.testing.assert_close(penalty.importance[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["gradient checkpointing", "torch.compile", "compile()", "Accelerator"]
)
def test_the_importance_is_that_of_the_model_inside(case: str) -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens(batch=3)
    wanted, wrapped = fisher_by_hand(model, list(ids)), model
    if case == "gradient checkpointing":
        model.train().gradient_checkpointing_enable()
    elif case == "compile()":
        model.compile(backend="eager")
    elif case == "Accelerator":
        AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
        wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        wrapped = torch.compile(model, backend="eager")
    for found in (
        tritter.protect(wrapped, "ewc", ids).importance,
        tritter.ElasticWeightConsolidation(wrapped, [{"input_ids": ids}]).fisher,
    ):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
    assert model.training == (case == "gradient checkpointing")
    assert ("forward" in vars(model)) == (case == "Accelerator")
    grown = tritter.expand(wrapped, "llama_pro", target_layers=5)
    assert grown.config.num_hidden_layers == 5


def test_a_state_of_another_penalty_is_refused() -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens()
    penalty = tritter.protect(model, "ewc", ids)
    with pytest.raises(RequestError, match=r"^state: .* not the state of a penalty of si for"):
        tritter.protect(model, "si", ids).load_state_dict(penalty.state_dict())
    deeper = tritter.expand(model, "llama_pro")
    with pytest.raises(RequestError, match=r"^state: .* of a penalty of ewc for this model"):
        tritter.protect(deeper, "ewc", ids).load_state_dict(penalty.state_dict())


def test_l2sp_and_si_and_their_state() -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RequestError, match=r"with adapters \(LoRA experts\).*use l2sp or replay"):
        tritter.protect(tritter.add_experts(oracle.tiny_llama(), rank=2), "ewc", [oracle.tokens()])
    l2sp = tritter.protect(model, L2SP(l2sp_lambda=0.5))
    si = tritter.protect(model, "si", ids, si_lambda=2.0)
    fisher = fisher_by_hand(model, list(ids))
    steps = moved(model)
    wanted = 0.25 * sum(float(s.double().square().sum()) for s in steps.values())
    assert l2sp().item() == pytest.approx(wanted, rel=1e-5)
    # Ω of old data is half the Hessian's diagonal: (T − 1) / 2 times the Fisher of a sequence
    half = 0.5 * (ids.shape[1] - 1)
    wanted = 2.0 * sum(float((half * fisher[n] * s.square()).sum()) for n, s in steps.items())
    assert si().item() == pytest.approx(wanted, rel=1e-3)
    other = oracle.tiny_llama()
    again = tritter.protect(other, L2SP(l2sp_lambda=0.5))
    again.load_state_dict(l2sp.state_dict())
    assert again().item() == 0 and all(torch.equal(again.anchor[n], start[n]) for n in start)


def test_documents_are_packed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    model = tritter.load(folder)
    penalty = tritter.protect(model, "ewc", WORDS, tokenizer=folder, num_sequences=4)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = tritter.protect(model, "ewc", WORDS, tokenizer=tokenizer, num_sequences=4)
    assert all(torch.equal(again.importance[n], v) for n, v in penalty.importance.items())
    assert any(bool(value.any()) for value in penalty.importance.values())


def test_a_penalty_of_a_model_that_grew_says_so() -> None:
    model = oracle.tiny_llama()
    penalty = tritter.protect(model, "l2sp")
    model.lm_head = nn.Linear(24, 98, bias=False)
    with pytest.raises(RequestError, match="call protect again"):
        penalty()


# gate


def test_the_gate_says_what_validate_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint(tmp_path / "before")
    after = shutil.copytree(before, tmp_path / "after")
    model = oracle.stock(before)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    model.save_pretrained(after)
    (tmp_path / "old.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in WORDS))
    words = ["--source", str(before), "--result", str(after)]
    words += ["--data", f"old={tmp_path / 'old.jsonl'}", "--json"]
    command(["validate", *words])
    answers = json.loads(capsys.readouterr().out)["checks"]
    (wanted,) = [each for each in answers if each["check"] == "benchmark_retention"]
    result = tritter.gate(before, after, {"old": WORDS})
    (check,) = result.checks
    assert check.verdict == wanted["verdict"] != "undecided"
    assert check.value == pytest.approx(wanted["value"], rel=1e-5) and check.n == wanted["n"] == 40
    assert [check.lower, check.upper] == pytest.approx(wanted["interval"], rel=1e-4)
    assert result.status == {"passed": "kept", "failed": "rolled_back"}[check.verdict]
    live = tritter.gate(tritter.load(before), model, {"old": WORDS}, tokenizer=before)
    assert live.checks[0].value == pytest.approx(check.value, rel=1e-4)
    loose = tritter.gate(before, after, {"old": WORDS}, retention=10.0, confidence=0.9)
    assert loose.status == "kept" and loose.checks[0].bound == 10.0
    turned = tritter.gate(after, before, {}, new_documents={"new": WORDS})
    assert turned.checks[0].name == "new_capability"
    assert (turned.status == "kept") is (turned.checks[0].value < 0)


def test_few_documents_leave_the_gate_undecided(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    result = tritter.gate(base, base, {"old": WORDS[:29]})
    assert (result.status, result.checks[0].verdict) == ("undecided", "undecided")
    assert result.checks[0].documents_needed == 30
    assert tritter.gate(base, base, {"old": WORDS[:30]}).status == "kept"


# Refusals


def _model() -> Any:
    return oracle.tiny_llama()


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda m: tritter.expand(m, "widht"), ["method = widht", "Did you mean width?"]),
        (
            lambda m: tritter.expand(m, "width", hidden_szie=48, init="fres"),
            ["2 things", "hidden_szie = 48", "mean hidden_size?", "init = fres", "mean fresh?"],
        ),
        (lambda m: tritter.expand(m, "width", hidden_size=7), ["hidden_size = 7: it is smaller"]),
        (lambda m: tritter.expand(m, [Width()], hidden_size=9), ["pass typed options"]),
        (lambda m: tritter.expand({}, "width"), ["pass a folder, a hub id or a Hugging Face"]),
        (lambda m: tritter.load("nowhere"), ["path = nowhere: no such folder"]),
        (lambda m: tritter.load(m), ["path = LlamaForCausalLM( (model)", "a path is required"]),
        (lambda m: tritter.grow("nowhere"), ["model = nowhere: no such folder"]),
        (lambda m: tritter.grow(None), ["model = None: a path is required"]),
        (lambda m: tritter.grow(m, seed="a"), ["seed = a: must be a whole number"]),
        (lambda m: tritter.expand(m, "width", seed=-1), ["seed = -1: must be a whole number"]),
        (lambda m: tritter.expand(m, Width), ["method = <class", "expansions are Dus()"]),
        (lambda m: tritter.protect(Path("x"), "l2sp"), ["model = x: pass a live model"]),
        (lambda m: tritter.gate(m, m, ["text"]), ["documents = ['text']: must be a mapping"]),
        (
            lambda m: tritter.gate(m, m, {"a": ["x"]}, sequence_length=0, batch_size=2.5),
            ["2 things", "sequence_length = 0: must be", "batch_size = 2.5: must be a whole"],
        ),
        (lambda m: tritter.load("x", dtpye=1), ["dtpye = 1", "Did you mean dtype?"]),
        (lambda m: tritter.grow(m, "plateu"), ["trigger = plateu", "Did you mean plateau?"]),
        (lambda m: tritter.grow(m, plateau_step=3), ["Did you mean plateau_steps?"]),
        (lambda m: tritter.add_experts(m, rnak=3), ["rnak = 3", "Did you mean rank?"]),
        (lambda m: tritter.add_experts(m, targets=["q_prj"]), ["q_prj", "Did you mean q_proj?"]),
        (lambda m: tritter.protect(m, "ewcc"), ["method = ewcc", "Did you mean ewc?"]),
        (lambda m: tritter.protect(m, "ewc", ewc_lamda=3), ["Did you mean ewc_lambda?"]),
        (lambda m: tritter.protect(m, "ewc", refresh_steps=3), ["protect takes ewc_lambda"]),
        (
            lambda m: tritter.protect(m, EWC(at="expanded", ewc_lambda=-1.0), []),
            ["2 things", "at = expanded: only a run", "ewc_lambda = -1.0"],
        ),
        (lambda m: tritter.protect(m, "ewc"), ["old_data: ewc needs data", "l2sp"]),
        (lambda m: tritter.protect(m, "ewc", [{"ids": 1}]), ["old_data = {'ids': 1}: allowed"]),
        (lambda m: tritter.protect(m, "l2sp", sequence_length=8.5), ["sequence_length = 8.5"]),
        (lambda m: tritter.protect(m, "ewc", ["a"]), ["tokenizer: documents need one"]),
        (lambda m: tritter.protect(m, "ewc", [1.0]), ["old_data = 1.0: allowed are documents"]),
        (lambda m: tritter.protect(m, "replay"), ["batches", "DataLoader", "tritter.run("]),
        (lambda m: tritter.protect(m, "distill"), ["logits of each batch", "choose l2sp or ewc"]),
        (lambda m: tritter.protect(m, "freeze"), ["requires_grad"]),
        (lambda m: tritter.gate(m, m, {}), ["documents: name a domain"]),
        (
            lambda m: tritter.gate(m, m, {"a": "text"}, retention=-1),
            ["2 things", "documents['a'] = 'text'", "retention = -1"],
        ),
        (
            lambda m: tritter.gate(m, m, {"a": ["x"]}, confidence=0.9999),
            ["number from 0.5 to 0.999"],
        ),
        (lambda m: tritter.gate(m, m, {"a": ["text"]}), ["tokenizer: live models need one"]),
        (lambda m: tritter.gate(m, m, {"a": ["x"]}, retnetion=1), ["Did you mean retention?"]),
        (lambda m: tritter.run(["model=tiny"]), ["overrides = ['model=tiny']: must be texts"]),
        (lambda m: tritter.run(data="x.txt"), ["data = 'x.txt': must be a dict"]),
        (lambda m: tritter.run(data={"odl": "x"}), ["data['odl']", "Did you mean old?"]),
        (lambda m: tritter.run("data.old=x", data={"old": "x"}), ["data.old", "remove one"]),
        (lambda m: tritter.run("-m", "expansion=dus,width"), ["a sweep is several runs"]),
        (lambda m: tritter.run("hydra.mode=MULTIRUN"), ["a sweep is several runs"]),
        (lambda m: tritter.run("--help"), ["python train.py for help"]),
    ],
    ids=lambda value: "-".join(value[0].split()) if isinstance(value, list) else None,
)
def test_bad_requests_name_what_was_meant(
    call: Callable[[Any], Any],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _model()
    with pytest.raises(ValueError) as refused:
        call(model)
    for part in parts:
        assert part in str(refused.value)
    assert not any(tmp_path.iterdir())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_peft_model_is_named(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(_model(), LoraConfig(target_modules=["q_proj"], r=2))
    for call in (
        lambda: tritter.expand(adapted, "width"),
        lambda: tritter.expand(adapted, "width", output=tmp_path / "grown"),
        lambda: tritter.grow(adapted),
        lambda: tritter.add_experts(adapted),
        lambda: tritter.protect(adapted, "l2sp"),
        lambda: tritter.gate(adapted, adapted, {"a": ["text"]}, tokenizer=tmp_path),
    ):
        with pytest.raises(RequestError, match=r"PeftModel.*merge_and_unload"):
            call()
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    with pytest.raises(RequestError, match="it is a PEFT adapter"):
        tritter.load(folder)


def test_a_model_wrapped_for_ddp_is_named() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(_model())
        old = torch.ones(2, 8, dtype=torch.int64)
        for call in (
            lambda: tritter.expand(wrapped, "width"),
            lambda: tritter.grow(wrapped),
            lambda: tritter.add_experts(wrapped),
            lambda: tritter.protect(wrapped, "ewc", old),
            lambda: tritter.ElasticWeightConsolidation(wrapped, [{"input_ids": old}]),
        ):
            with pytest.raises(RequestError, match=r"DistributedDataParallel.*pass its attribute"):
                call()
        assert tritter.protect(wrapped.module, "ewc", old).importance
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shard", [fully_shard, partial(FSDP, device_id=torch.device("cpu"))])
def test_a_sharded_model_is_refused(shard: Callable[[nn.Module], nn.Module]) -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, old = _model(), torch.ones(2, 8, dtype=torch.int64)
        penalties = (
            tritter.protect(model, "ewc", old),
            tritter.ElasticWeightConsolidation(model, [{"input_ids": old}]).penalty,
        )
        sharded = shard(model)
        for call in (
            lambda: tritter.expand(sharded, "llama_pro"),
            lambda: tritter.grow(sharded),
            lambda: tritter.add_experts(sharded),
            lambda: tritter.protect(sharded, "l2sp"),
            lambda: tritter.gate(sharded, sharded, {"a": ["text"]}, tokenizer="."),
            *penalties,
        ):
            with pytest.raises(RequestError, match="are sharded"):
                call()
    finally:
        torch.distributed.destroy_process_group()


# run


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    """A pipeline that only takes notes, in an empty folder."""
    pipeline = FakePipeline()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RunText, "side_problems", lambda text: ())
    monkeypatch.setattr(api, "_pipeline", pipeline)
    return pipeline


def surroundings() -> tuple[Any, ...]:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    root = logging.getLogger()
    return (
        Path.cwd(),
        list(sys.argv),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        list(root.handlers),
        root.level,
        GlobalHydra.instance().is_initialized(),
        HydraConfig.instance().cfg,
        {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
    )


def test_a_run_leaves_the_process_as_it_was(fake: FakePipeline, tmp_path: Path) -> None:
    before = surroundings()
    first = tritter.run("expansion=dus", "seed=8", output=tmp_path / "a folder, of mine")
    assert first.folder == tmp_path / "a folder, of mine" and first.status == "kept"
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "new.txt").write_text("new")
    sources = {"old": {"mine": [tmp_path / "old.txt"]}, "new": ["new.txt"]}
    second = tritter.run("expansion=none", data=sources)
    assert second.folder.parent == tmp_path / "outputs/runs"
    assert [config.seed for config in fake.configs] == [8, 0]
    assert next(iter(fake.configs[1].text.domains)) == "mine"
    assert surroundings() == before
    again = tritter.run(f"resume={second.folder}")
    assert again == second and len(fake.configs) == 2  # it was finished


def test_a_bad_request_reads_as_on_the_command_line(
    fake: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("expansoin=dus", "training.max_stepz=3", "seed=x")
    assert train_py(fake, arguments=words) == 2
    said = capsys.readouterr().err.removeprefix("error: ").removesuffix("\nNothing was written.\n")
    with pytest.raises(RequestError) as refused:
        tritter.run(*words)
    assert str(refused.value) == said and said.startswith("3 things")
    assert not any(tmp_path.iterdir())


def test_a_run_that_fails_or_stops_raises(
    fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = surroundings()
    with pytest.raises(TritterError, match=r"not finite 10 times in a row\nRun folder: "):
        tritter.run("seed=1", output="failed")
    with pytest.raises(KeyError, match="a bug"):
        tritter.run("seed=2", output="bug")

    def stopped(config: Any, *, run_folder: Path) -> Any:
        raise Stopped(signal.SIGINT, location="at step 3")

    monkeypatch.setattr(api, "_pipeline", stopped)
    with pytest.raises(KeyboardInterrupt) as ended:
        tritter.run(output="stopped")
    folder = tmp_path / "stopped"
    assert str(ended.value) == f"stopped at step 3; continue with tritter.run('resume={folder}')"
    assert surroundings() == before
    monkeypatch.setattr(api, "_pipeline", fake)
    assert tritter.run(f"resume={folder}").folder == folder
    assert tritter.run(output="stopped").status == "kept"


@pytest.mark.full
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    before, found = surroundings(), {}
    for name in ("whole", "stopped"):
        marker = tmp_path / f"{name}.marker"
        callback = f"{{_target_:tests.pipeline.interrupting.InterruptOnce,marker:'{marker}'}}"
        words = [*TINY, f"callbacks.stop={callback}"]
        if name == "whole":
            marker.touch()
        else:
            with pytest.raises(KeyboardInterrupt, match=r"continue with tritter\.run\('resume="):
                tritter.run(*words, output=tmp_path / name)
            assert read_object(tmp_path / name / "status.json")["status"] == "interrupted"
            assert surroundings() == before
        result = tritter.run(*words, output=tmp_path / name)
        found[name] = result.model().state_dict()
    assert all(torch.equal(found["stopped"][key], value) for key, value in found["whole"].items())


@pytest.mark.full
def test_a_run_is_that_of_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, twice in one process, with what it leaves read back."""
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    done = run_program(
        ROOT / "train.py", [*TINY, f"hydra.run.dir={tmp_path / 'program'}"], folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    words = [word for word in TINY if not word.startswith(("data=", "data.old=", "data.new="))]
    data = {"old": FIXTURES / "text/old", "new": [FIXTURES / "text/new.jsonl"]}
    wanted = oracle.stock(tmp_path / "program/checkpoint").state_dict()
    for name in ("one", "two"):
        monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / name / "cache"))
        result = tritter.run(*words, data=data, output=tmp_path / name / "run")
        found = oracle.stock(result.folder / "checkpoint").state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    summary = json.loads((tmp_path / "program/summary.json").read_text())
    assert result.status == summary["status"] == result.summary.status == "ungated"
    assert result.summary.final.keys() == summary["final"].keys()
    ids = torch.arange(20)[None]
    model = oracle.stock(tmp_path / "program/checkpoint")
    assert torch.equal(oracle.logits(result.model(), ids), oracle.logits(model, ids))
    metrics = result.metrics
    lines = (result.folder / "metrics.csv").read_text().splitlines()
    assert [",".join(metrics.columns), len(metrics)] == [lines[0], len(lines) - 1]
    assert metrics["train/loss"].notna().any() and metrics["step"].max() == 6

"""Adapters on embeddings and head: matches PEFT, in models, surgery and folders."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests import oracle
from tests.oracle.families import tiny
from tests.training.test_surgery import train
from tritter.checkpoints.expert_files import AdapterShape
from tritter.errors import RequestError, TritterError
from tritter.methods.experts.adapters import Factors, LoraLayers, layer_number
from tritter.methods.experts.gates import Gates, Routing
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import _TENSORS_NAME, StoredAdapter
from tritter.training import surgery
from tritter.training.parameters import Journal, disk_values

TARGETS = ("q_proj", "embed_tokens", "lm_head")
MODELS = [(family, tied) for family in ("llama", "gemma3_text") for tied in (False, True)]


def drawn(model: nn.Module) -> None:
    """Give adapters random nonzero values."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def adapted(family: str = "llama", *, tied: bool, targets: tuple[str, ...] = TARGETS) -> Any:
    """Return a stock model with our adapter `own`."""
    model = tiny(family, tie_word_embeddings=tied)
    LoraLayers(model).add("own", AdapterShape(3, 5.0, targets), seed=0)
    return model


def activated(model: nn.Module, name: str) -> nn.Module:
    """Return a copy with an adapter that PEFT's forward pass computes."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name])
    return model


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_put_on_and_taken_off(family: str, tied: bool) -> None:
    stock = tiny(family, tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(family, tied=tied)
    ids = oracle.tokens()
    for each in (model, activated(model, "own")):
        assert torch.equal(oracle.logits(each, ids), oracle.logits(stock, ids))
    own = LoraLayers(model).parameters("own")
    assert len(own) == 2 * (3 + 2)
    assert all(parameter.requires_grad for parameter in own.values())
    found = {name: Factors.of(layer, "own") for name, layer in LoraLayers(model)}
    assert next(iter(found)) == "model.embed_tokens" and list(found)[-1] == "lm_head"
    for name in ("model.embed_tokens", "lm_head"):
        each = found[name]
        assert each is not None
        shapes = (tuple(each.down.shape), tuple(each.up.shape))
        assert shapes == (((3, 97), (24, 3)) if "embed" in name else ((3, 24), (97, 3)))
    base = (model.model.embed_tokens.base_layer.weight, model.lm_head.base_layer.weight)
    assert (base[0] is base[1]) == tied
    assert surgery._ties(model) == (
        {frozenset({"model.embed_tokens.base_layer.weight", "lm_head.base_layer.weight"})}
        if tied
        else set()
    )
    written = dict(disk_values(model, dict(model.named_parameters())))
    plain = dict(disk_values(stock, dict(stock.named_parameters())))
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[name], value) for name, value in plain.items())
    model.requires_grad_(False)
    LoraLayers(model).add("other", AdapterShape(2, 2.0, ("embed_tokens",)), seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(LoraLayers(model).parameters("other")) and len(trained) == 2
    LoraLayers(model).remove("own")
    assert LoraLayers(model).parameters("own") == {}
    assert [name for name, layer in LoraLayers(model) if Factors.of(layer, "other")] == [
        "model.embed_tokens"
    ]
    LoraLayers(model).remove("other")
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["a.b", "", "a/b", "keys", "train", "lös"])
def test_names_that_no_adapter_can_have(name: str) -> None:
    model = oracle.tiny_llama()
    before = list(model.state_dict())
    with pytest.raises(RequestError, match="is not a valid adapter name"):
        LoraLayers(model).add(name, AdapterShape(2, 2.0, TARGETS), seed=0)
    assert list(model.state_dict()) == before


def test_what_a_target_may_be_is_said() -> None:
    said = r"experts\.targets = lm_haed: .*embed_tokens, .*lm_head.*Did you mean 'lm_head'"
    model = adapted(tied=True)
    for each in (oracle.tiny_llama(), model):
        with pytest.raises(RequestError, match=said):
            LoraLayers(each).add("other", AdapterShape(2, 2.0, ("lm_haed",)), seed=0)
    with pytest.raises(RequestError, match=r"experts\.targets = base_layer"):
        LoraLayers(model).add("other", AdapterShape(2, 2.0, ("base_layer",)), seed=0)


@pytest.mark.parametrize("model_type", ["mpt", "mamba2", "rwkv"])
def test_all_layers_that_peft_takes_get_adapters(model_type: str) -> None:
    """MPT calls its layers blocks; PEFT refuses `out_proj` of Mamba; RWKV rescales weights."""
    sizes: dict[str, Any] = {
        "mpt": {"d_model": 16, "n_heads": 2, "max_seq_len": 32},
        "mamba2": {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 2},
        "rwkv": {"hidden_size": 16, "rescale_every": 1},
    }
    config = AutoConfig.for_model(model_type, vocab_size=31, **sizes[model_type])
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = oracle.tokens(31)
    before = oracle.logits(model, ids)
    targets = tuple(sorted(LoraLayers(model).adaptable()))
    mixture = ExpertMixture(model, router="evidence")
    for seed, name in enumerate(("e0", "e1")):
        mixture.add(name, AdapterShape(2, 4.0, targets), seed=seed)
    assert torch.equal(oracle.logits(model, ids), before)
    assert {layer_number(name) for name, _ in LoraLayers(model)} == {None, 0, 1}
    assert mixture.evidence is not None
    with torch.no_grad():
        for name in ("e0", "e1"):
            for parameter in mixture.lora.parameters(name).values():
                parameter.normal_(std=0.1)
        mixture.evidence.counts.random_(0, 9)  # so that the gates depend on earlier tokens
        in_training = model.train()(input_ids=ids).logits
        torch.testing.assert_close(oracle.logits(model.eval(), ids), in_training, atol=1e-3, rtol=0)
        if model_type != "rwkv":  # its state is no cache
            texts = [
                model.generate(ids, max_new_tokens=6, use_cache=each) for each in (True, False)
            ]
            assert torch.equal(*texts)


@pytest.mark.parametrize(("family", "target"), [("llama", "lm_head"), ("gpt2", "wte")])
def test_a_learned_router_gates_no_vocabulary(family: str, target: str) -> None:
    mixture = ExpertMixture(tiny(family))
    with pytest.raises(RequestError, match=f"targets = {target}: a learned router needs hidden"):
        mixture.add("e0", AdapterShape(2, 4.0, (target,)), seed=0)
    assert not mixture.names


@pytest.mark.parametrize("routing", [Routing(), Routing(top_k=2), Routing(top_k=1)])
@pytest.mark.parametrize("standing", [(0, 1, 2), (1,), (0, 2)])
def test_a_lookup_is_the_product_with_a_one_hot_vector(
    routing: Routing, standing: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts = {
        n: Factors(random(2 + n, 11), random(5, 2 + n), 0.5 + n, torch.tensor(3.5))
        for n in standing
    }
    ids = torch.randint(0, 11, (2, 7), generator=generator)
    gates = routing.gates(random(2, 7, 3))
    leaves = [leaf.requires_grad_() for each in experts.values() for leaf in (each.down, each.up)]
    target = random(2, 7, 5)
    found = []
    for inputs in (ids, nn.functional.one_hot(ids, 11).double()):
        out = gates.output(inputs, experts)
        found.append((out, torch.autograd.grad((out * target).sum(), leaves)))
    (one, gradients), (other, expected) = found
    assert one.shape == (2, 7, 5)
    assert (one - other).abs().max() < 1e-12 < one.abs().max()
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).abs().max() < 1e-12 < gradient.abs().max()


def test_embeddings_merged_are_the_sum_of_what_they_add() -> None:
    torch.manual_seed(0)
    parts = [
        Factors(torch.randn(2, 9).double(), torch.randn(4, 2).double(), 0.5, torch.tensor(2.0))
        for _ in range(2)
    ]
    one = Factors.merged(parts, [0.3, 0.7], rank=4, alpha=8.0)
    assert one.lost_share(parts, [0.3, 0.7]) < 1e-12
    ids = torch.arange(9)[None]
    ones = torch.ones(1, 9, 1)
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64).expand(1, 9, 2)
    summed = Gates(shares, None, shares, shares).output(ids, dict(enumerate(parts)))
    assert (
        (Gates(ones, None, ones, ones).output(ids, {0: one}) - summed).abs().max()
        < 1e-12
        < summed.abs().max()
    )


class Life(Callback):
    """An expert is added after step 2, widened after 4, and another removed after 6."""

    def __init__(self, mixture: ExpertMixture) -> None:
        self.mixture = mixture
        self.steps: list[int] = []
        self.journal: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        mixture, step = self.mixture, trainer.global_step
        if step not in (2, 4, 6):
            return
        self.steps.append(step)
        model = mixture.model
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        if step == 2:
            before = self.only("first")
            mixture.open("new", AdapterShape(3, 6.0, TARGETS), seed=7)
            surgery.apply(trainer, pl_module, mixture.spawn_change("new"), reason="spawn")
            after = self.only("first")
        elif step == 4:
            self.drawn_like_peft(model)
            before = oracle.logits(model, oracle.tokens())
            change = mixture.widen_change("new", 5, seed=3)
            surgery.apply(trainer, pl_module, change, reason="rank")
            LoraLayers(model).set_rank("new", 5)
            assert LoraLayers(model).shape("new") == AdapterShape(5, 10.0, tuple(sorted(TARGETS)))
            self.grown(model)
            after = oracle.logits(model, oracle.tokens())
        else:
            before = self.only("new")
            surgery.apply(trainer, pl_module, mixture.evict_change("first"), reason="evict")
            mixture.close("first")
            after = self.only("new")
            assert not any(".first" in name for name in model.state_dict())
        assert torch.allclose(before, after, atol=1e-5)
        self.journal = list(pl_module.journal)
        assert len(frozen) > 9
        assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())

    def only(self, name: str) -> torch.Tensor:
        with self.mixture.only(name):
            return oracle.logits(self.mixture.model, oracle.tokens())

    def drawn_like_peft(self, model: nn.Module) -> None:
        """Give the embedding's adapter a nonzero output, in addition to that of a training step."""
        with torch.no_grad():
            LoraLayers(model).parameters("new")["model.embed_tokens.lora_embedding_A.new"].normal_(
                std=0.1
            )

    def grown(self, model: nn.Module) -> None:
        """Half of a new adapter is zero and the other half random, so it can learn at once."""
        own = LoraLayers(model).parameters("new")
        assert (own["model.embed_tokens.lora_embedding_A.new"][3:] == 0).all()
        columns = own["model.embed_tokens.lora_embedding_B.new"][:, 3:]
        assert columns.shape == (24, 2) and 0.6 < float(columns.std()) < 1.5
        assert (own["lm_head.lora_A.new.weight"][3:] != 0).all()
        assert (own["lm_head.lora_B.new.weight"][:, 3:] == 0).all()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("tied", [False, True])
def test_experts_on_the_vocabulary_come_grow_and_go(tmp_path: Path, tied: bool) -> None:
    mixture = ExpertMixture(oracle.tiny_llama(tie_word_embeddings=tied), router="both")
    mixture.add("first", AdapterShape(2, 4.0, TARGETS), seed=0)
    drawn(mixture.model)
    life = Life(mixture)
    train(tmp_path, life, model=mixture.model)
    assert life.steps == [2, 4, 6] and mixture.names == ["new"]
    base = (
        mixture.model.model.embed_tokens.base_layer.weight,  # type: ignore[union-attr]
        mixture.model.lm_head.base_layer.weight,  # type: ignore[union-attr]
    )
    assert (base[0] is base[1]) == tied
    again = ExpertMixture(oracle.tiny_llama(tie_word_embeddings=tied), router="both")
    again.add("first", AdapterShape(2, 4.0, TARGETS), seed=0)
    again.add("new", AdapterShape(3, 6.0, TARGETS), seed=0)
    Journal(life.journal).replay(again.model)  # as in a resumed run
    again.close("first")
    LoraLayers(again.model).set_rank("new", 5)
    again.model.load_state_dict(mixture.model.state_dict())
    ids = oracle.tokens()
    assert torch.equal(oracle.logits(again.model, ids), oracle.logits(mixture.model, ids))
    mixture.lora.remove("new")
    assert not any("lora_" in name for name in mixture.model.state_dict())


def theirs(folder: Path, family: str, *, tied: bool) -> Any:
    """Return a model with an adapter that was created, trained and saved by stock PEFT."""
    model = tiny(family, tie_word_embeddings=tied)
    options = LoraConfig(r=3, lora_alpha=5, target_modules=list(TARGETS))
    stock = get_peft_model(model, options)
    drawn(stock)
    stock.save_pretrained(folder)
    return stock.eval()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_stock_peft_loads_our_folder_and_we_load_theirs(
    tmp_path: Path, family: str, tied: bool
) -> None:
    ids, base = oracle.tokens(), tiny(family, tie_word_embeddings=tied)
    model = adapted(family, tied=tied)
    drawn(model)
    StoredAdapter.of(model, "own").write(tmp_path / "ours", base="somebody/base")
    names = set(load_file(tmp_path / "ours" / _TENSORS_NAME))
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in names and len(names) == 10
    expected = oracle.logits(activated(model, "own"), ids)
    stock = PeftModel.from_pretrained(tiny(family, tie_word_embeddings=tied), tmp_path / "ours")
    assert (oracle.logits(stock, ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - oracle.logits(base, ids)).abs().max() > 0.1

    expected = oracle.logits(theirs(tmp_path / "theirs", family, tied=tied), ids)
    stored = StoredAdapter.read(tmp_path / "theirs")
    assert stored.shape == AdapterShape(3, 5.0, tuple(sorted(TARGETS)))
    embeddings = {name for name, each in stored.factors.items() if each.is_embedding}
    assert embeddings == {"model.embed_tokens"}
    assert stored.base.keys() == {"model.embed_tokens", "lm_head"}
    LoraLayers(model).add("theirs", stored.shape, seed=0)
    stored.load_into(model, "theirs")
    own = oracle.logits(activated(model, "theirs"), ids)
    assert (own - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_folder_of_another_base_is_refused(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs", "llama", tied=False)
    path = tmp_path / "theirs" / _TENSORS_NAME
    held = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    held[key][3, 4] += 0.01
    save_file(held, path)
    model = tiny("llama")
    stored = StoredAdapter.read(tmp_path / "theirs")
    LoraLayers(model).add("theirs", stored.shape, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TritterError, match="other base weights of lm_head"):
        stored.load_into(model, "theirs")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    held[key] = load_file(path)[key][:90]
    save_file(held, path)
    with pytest.raises(TritterError, match="other base weights of lm_head"):
        StoredAdapter.read(tmp_path / "theirs").load_into(model, "theirs")


def test_damaged_factors_of_a_vocabulary(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs", "llama", tied=False)
    path = tmp_path / "theirs" / _TENSORS_NAME
    own = load_file(path)
    table, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    down, up = f"{table}.lora_embedding_A", f"{table}.lora_embedding_B"
    for change, said in [
        ({down: own[down].T.contiguous()}, "config has r = 3"),
        ({up: own[up] * float("inf")}, "not finite"),
        ({up: own[up].int()}, "has dtype I32"),
        ({f"{table}.weight": own[up].clone()}, "not a LoRA factor"),
        ({f"{table}.lora_A.weight": own[down].clone()}, "both a linear layer"),
        ({"base_model.model.elsewhere.base_layer.weight": own[up].clone()}, "elsewhere lacks"),
    ]:
        save_file(own | change, path)
        with pytest.raises(TritterError, match=said):
            StoredAdapter.read(path.parent)
    save_file({key: value for key, value in own.items() if key != down}, path)
    with pytest.raises(TritterError, match="embed_tokens lacks its A"):
        StoredAdapter.read(path.parent)
    looked_up = {
        f"{head}.lora_embedding_{part}": own.pop(f"{head}.lora_{part}.weight") for part in "AB"
    }
    save_file(own | looked_up, path)
    stored = StoredAdapter.read(path.parent)
    model = tiny("llama")
    LoraLayers(model).add("theirs", stored.shape, seed=0)
    with pytest.raises(TritterError, match="lm_head is an embedding only in the folder"):
        stored.load_into(model, "theirs")
    assert json.loads((path.parent / "adapter_config.json").read_text())["r"] == 3


def evident(family: str, *, tied: bool) -> ExpertMixture:
    """Return the base and two experts, gated by evidence, with adapters on the vocabulary."""
    mixture = ExpertMixture(
        tiny(family, tie_word_embeddings=tied),
        router="evidence",
        has_base=True,
        evidence={"end_of_text_id": 0, "window": 6},
    )
    for number, targets in enumerate([TARGETS, ("embed_tokens", "v_proj")]):
        mixture.add(f"e{number}", AdapterShape(3, 5.0, targets), seed=number)
    drawn(mixture.model)
    assert mixture.evidence is not None
    for number in range(3):
        mixture.evidence.count(number, torch.multinomial(torch.rand(97) ** 4, 5000, True))
    return mixture


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_an_expert_alone_is_the_adapter_that_stock_peft_loads(
    tmp_path: Path, family: str, tied: bool
) -> None:
    mixture, ids = evident(family, tied=tied), oracle.tokens()
    base = tiny(family, tie_word_embeddings=tied)
    for name in mixture.adapters:
        StoredAdapter.of(mixture.model, name).write(tmp_path / name, base="somebody/base")
    mixture.model.double()
    plain = copy.deepcopy(base).double()
    with oracle.float64_casts():
        for name in mixture.adapters:
            with mixture.only(name):
                own = oracle.logits(mixture.model, ids)
            stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).double()
            assert (oracle.logits(stock, ids) - own).abs().max() < 1e-10
            assert (oracle.logits(plain, ids) - own).abs().max() > 0.1
        with mixture.only("base"):
            assert torch.equal(oracle.logits(mixture.model, ids), oracle.logits(plain, ids))


@pytest.mark.parametrize("top_k", [None, 1])
def test_no_later_token_is_known_to_the_vocabulary(top_k: int | None) -> None:
    mixture, ids = evident("gemma3_text", tied=True), oracle.tokens(length=12)
    mixture.routing = Routing(top_k=top_k)
    mixture.model.double()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 97
    change = (oracle.logits(mixture.model, ids) - oracle.logits(mixture.model, other)).abs()
    assert change[:, :7].max() < 1e-12
    assert change[:, 7:].max() > 0.1


def test_written_with_a_cache_it_is_what_is_read_again() -> None:
    mixture, ids = evident("llama", tied=True), oracle.tokens(batch=2, length=9)
    cached, plain = (
        mixture.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=is_on)
        for is_on in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_head_of_the_last_tokens_has_their_gates(top_k: int | None) -> None:
    mixture, ids = evident("gemma3_text", tied=True), oracle.tokens(batch=3, length=9)
    mixture.routing = Routing(top_k=top_k)
    with torch.no_grad():
        whole = mixture.model(input_ids=ids).logits
        last = mixture.model(input_ids=ids, logits_to_keep=2).logits
        with mixture.only("e0"):
            only = mixture.model(input_ids=ids).logits
            end = mixture.model(input_ids=ids, logits_to_keep=1).logits
    assert (whole[:, -2:] - last).abs().max() < 1e-5 * last.abs().max()
    assert (only[:, -1:] - end).abs().max() < 1e-5 * end.abs().max()

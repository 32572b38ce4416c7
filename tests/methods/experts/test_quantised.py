"""A base in 8 or 4 bits: compared with PEFT's QLoRA, training, folders."""

import pickle
from math import prod
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.methods.experts import test_training
from tests.methods.experts.mixtures import mixture_of
from tests.methods.experts.test_training import assert_same_end, kinds, needs_fork, train
from tests.oracle import logits, saved, tiny_llama, tokens
from tests.pipeline.test_experts_job import PLAIN, files, run
from tests.training.killed import KillAt, Killed
from tritter.checkpoints.expert_files import AdapterShape, ExpertFiles
from tritter.config.launch.composition import load_config
from tritter.core.models import convert, live_shape, load_model, model_of
from tritter.errors import RequestError
from tritter.methods.experts import quantised
from tritter.methods.experts.adapters import LoraLayers
from tritter.methods.experts.mixture import ExpertMixture
from tritter.methods.experts.stored import ExpertFolder, load_with_experts
from tritter.methods.whole import load_whole
from tritter.planning.run_memory import RunMemory

BITS = pytest.mark.parametrize("bits", [8, 4])
STREAM = "aaaaaabbbb"


def base_in(folder: Path) -> Path:
    """Write a base whose layers are wide enough to have several blocks of scales."""
    return saved(tiny_llama(hidden_size=48, intermediate_size=80, initializer_range=0.1), folder)


def dequantised(layer: nn.Module) -> Tensor:
    """Return the weight of a layer, decoded from bitsandbytes' stored values."""
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return layer.weight.data.float() * layer.state.SCB[:, None] / 127
    state = layer.weight.quant_state
    found: Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    return found


@BITS
def test_a_later_expert_has_the_dtype_of_the_first(tmp_path: Path, bits: int) -> None:
    """PEFT would give it float32, and all experts of a layer are one product."""
    model = load_with_experts(base_in(tmp_path / "base"), base_bits=bits)  # type: ignore[arg-type]
    mixture, shape = ExpertMixture(model, router="evidence"), AdapterShape(2, 4.0, ("q_proj",))
    mixture.add("one", shape, seed=1)
    convert(model, torch.bfloat16)
    mixture.add("two", shape, seed=2)
    assert logits(model, tokens()).isfinite().all()


@BITS
@pytest.mark.parametrize("sizes", [(24, 40), (64, 64), (128, 12)])
def test_a_layer_computes_with_what_it_holds(bits: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    plain = nn.Linear(*sizes)
    model.model.layers[0].extra = plain
    quantised.quantise(model, bits)
    held = model.model.layers[0].extra.train()
    inputs = torch.randn(2, 5, sizes[0], requires_grad=True)
    weight = dequantised(held)
    (own,) = torch.autograd.grad(held(inputs).square().sum(), inputs)
    wanted = linear(inputs, weight, plain.bias)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), inputs)
    assert (held(inputs) - wanted).abs().max() < 1e-5
    assert (own - theirs).abs().max() < 1e-4
    step = plain.weight.abs().max() * (1 / 127 if bits == 8 else 0.16)
    assert 0 < (weight - plain.weight).abs().max() < step
    assert (held.eval()(inputs) - wanted).abs().max() < 0.05, "inputs are rounded too in 8 bits"
    kept = held.weight.data.clone()
    held.to(torch.device("cpu"), torch.float32)
    assert torch.equal(held.weight.data, kept)
    assert not held.state_dict() and not held.load_state_dict({}).unexpected_keys


@BITS
def test_the_estimate_of_memory_counts_what_layers_hold(bits: int) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 600}
    model = tiny_llama(num_hidden_layers=2, **sizes)
    before = sum(each.nbytes for each in model.parameters())
    words = [*PLAIN, "experts=single_lora", "trainer.precision=32-true"]
    plain, asked = (
        [each.states for each in RunMemory(load_config([*words, *more]), model_of(model)).needs()]
        for more in ((), (f"experts.base_bits={bits}",))
    )
    assert plain[0] == asked[0], "the base is trained before"
    quantised.quantise(model, bits)
    held = sum(each.data.nbytes for each in model.parameters())
    if bits == 4:  # scales of 64 weights in one byte, and theirs of 256 in four
        states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
        held += sum(each.absmax.nbytes + each.state2.absmax.nbytes for each in states)
    assert plain[1] - asked[1] == pytest.approx(before - held, rel=1e-3)


@BITS
def test_another_process_gets_all_of_a_layer(bits: int) -> None:
    model = tiny_llama().eval()
    quantised.quantise(model, bits)
    theirs = pickle.loads(ForkingPickler.dumps(model))
    assert torch.equal(logits(theirs, tokens()), logits(model, tokens()))
    assert LoraLayers(theirs).base_bits == bits
    assert model_of(theirs).config == model_of(model).config
    layer = theirs.model.layers[0].mlp.up_proj
    theirs.to("meta")
    scales = layer.state.SCB if bits == 8 else layer.weight.quant_state.absmax
    assert scales.device == layer.weight.device == torch.device("meta")


@BITS
def test_what_is_quantised_and_what_is_not(tmp_path: Path, bits: int) -> None:
    folder = base_in(tmp_path / "base")
    model, plain = load_with_experts(folder, base_bits=bits), load_model(folder)
    held = {n for n, m in model.named_modules() if type(m).__module__ == quantised.__name__}
    wanted = {
        f"model.layers.{number}.{name}"
        for number, layer in LoraLayers(plain).decoder_layers().items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert held == wanted and len(held) == 7 * 3
    assert LoraLayers(model).base_bits == bits and LoraLayers(plain).base_bits is None
    assert model_of(model).config == model_of(plain).config
    parameters, own = dict(plain.named_parameters()), dict(model.named_parameters())
    assert parameters.keys() == own.keys()
    for name, value in own.items():
        same = name.rpartition(".")[0] not in held
        assert torch.equal(value, parameters[name]) if same else value.dtype != torch.float32


@BITS
def test_an_expert_alone_is_what_pefts_qlora_computes(tmp_path: Path, bits: int) -> None:
    """Stock transformers quantises the folder, stock PEFT puts the adapter on it."""
    folder = base_in(tmp_path / "base")
    live = load_with_experts(folder, base_bits=bits)
    mixture = mixture_of(live, router="evidence", has_base=True)
    ExpertFolder.of(mixture).write(folder)
    files = ExpertFiles.read(folder)
    assert files is not None and files.head.base_bits == bits
    for name, layer in mixture.lora:
        assert type(layer).__module__ == "peft.tuners.lora.bnb", name
    dynamic_options: dict[int, dict[str, Any]] = {
        8: {"load_in_8bit": True},
        4: {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        },
    }
    again, ids = load_whole(folder), tokens()
    for name in ("e0", "e1"):
        stock = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**dynamic_options[bits]),
            dtype=torch.float32,
            device_map={"": "cpu"},
        )
        for layer in stock.modules():  # no repacking in evaluation mode
            layer.support_avx512bf16_for_cpu = False
        theirs = logits(PeftModel.from_pretrained(stock, folder / "experts" / name).eval(), ids)
        for own in (mixture, again.expert_mixture):
            with own.only(name):
                assert (logits(own.model.eval(), ids) - theirs).abs().max() < 1e-4
        full = logits(PeftModel.from_pretrained(load_model(folder), folder / "experts" / name), ids)
        assert (full - theirs).abs().max() > 1e-3, "rounding shows"


def put_on(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Make `train` start from a quantised base."""
    built = test_training.oracle.tiny_llama

    def held(**changes: Any) -> nn.Module:
        model: nn.Module = built(**changes)
        quantised.quantise(model, bits)
        return model

    monkeypatch.setattr(test_training.oracle, "tiny_llama", held)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model's quantised layers, by name without adapters."""
    return {
        name.replace(".base_layer", ""): dequantised(module).clone()
        for name, module in model.named_modules()
        if type(module).__module__ == quantised.__name__
    }


@pytest.mark.full
@BITS
def test_killed_and_resumed_it_is_the_same_and_the_base_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    put_on(monkeypatch, bits)
    start = weights_of(test_training.oracle.tiny_llama())
    options = test_training.dynamic_options(
        max_experts=2, when_full="evict", stall_gain=9.0, stall_steps=2
    )
    module, result = train(tmp_path / "whole", options, stream=STREAM)
    assert {"spawned", "widened", "evicted"} <= {kind for kind, _ in kinds(result)}
    with pytest.raises(Killed):
        train(tmp_path / "parts", options, KillAt(8), stream=STREAM)
    resumed, _ = train(tmp_path / "parts", options, stream=STREAM)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    ids = tokens()
    assert torch.equal(logits(module.model.eval(), ids), logits(resumed.model.eval(), ids))
    state = test_training.saved(tmp_path / "whole")["state_dict"]
    assert all(".lora_" in name for name in state if "proj" in name), "the start has the base"
    assert any(".lora_" in name for name in state)
    assert len(start) == 21
    for name, weight in weights_of(module.model).items():
        assert torch.equal(start[name], weight), name


@pytest.mark.full
@needs_fork
def test_two_processes_train_on_a_quantised_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on(monkeypatch, 4)
    start = weights_of(test_training.oracle.tiny_llama())
    module, result = train(tmp_path, stream="aaaaaa", settings=test_training.TWO)
    assert ("spawned", "expert_1") in kinds(result)
    state = test_training.saved(tmp_path)["state_dict"]
    ups = [value for name, value in state.items() if ".lora_B.expert_1" in name]
    assert any(bool(value.any()) for value in ups), "it has learned"
    for name, weight in weights_of(module.model).items():
        assert torch.equal(start[name], weight), name


def test_what_is_counted_is_as_it_was() -> None:
    counted = []
    for bits in (None, 8, 4):
        model = tiny_llama()
        if bits is not None:
            quantised.quantise(model, bits)
        mixture = ExpertMixture(model)
        mixture.add("one", AdapterShape(2, 4.0, ("q_proj",)), seed=0)
        parameters = sum(prod(live_shape(p)) for p in model.parameters())
        counted.append((parameters, mixture.step_flops(), model_of(model).config))
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.full
def test_a_run_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    words = [*PLAIN, "experts=single_lora", "experts.rank=2", "experts.base_bits=4"]
    summary = run(tmp_path / "run", tmp_path / "cache", words)
    baseline, kept = (tmp_path / "run" / name for name in ("baseline", "checkpoint"))
    assert files(baseline)["model.safetensors"] == files(kept)["model.safetensors"]
    assert summary["experts"]["options"]["base_bits"] == 4
    plain = sum(p.numel() for p in load_model(kept).parameters())
    assert summary["experts"]["parameters"]["base"] == plain
    model = load_whole(kept)
    assert LoraLayers(model).base_bits == 4 and not weights_of(load_model(kept))
    on = [w for w in PLAIN if not w.startswith(("model.", "data.vocab_size", "pretraining."))]
    on += ["model=hf", f"model.path={kept}", "experts=single_lora"]
    with pytest.raises(RequestError, match=r"base_bits = 8.*4-bit. Did you mean 4\?"):
        run(tmp_path / "on", tmp_path / "cache", [*on, "experts.base_bits=8"])

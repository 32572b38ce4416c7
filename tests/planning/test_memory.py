"""Memory requirements compared with real training: bytes of tensors and saved activations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.oracle import tiny_llama, tokens
from tritter.core.families import Model
from tritter.errors import RequestError
from tritter.planning.memory import TrainingSetup, _saved_bytes, training_memory

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def peak_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_parameters_gradients_and_adamw_to_the_byte(
    precision: str, is_tied: bool, is_frozen: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=is_tied).to(DTYPES[precision])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (is_frozen and "self_attn" in name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    setup = TrainingSetup(precision=precision, is_attention_frozen=is_frozen)
    memory = training_memory(Model(model.config.to_dict()), setup)
    assert memory.parameters_bytes == peak_bytes(list(model.parameters()))
    assert memory.gradients_bytes == peak_bytes([p.grad for p in trained if p.grad is not None])
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert memory.optimizer_bytes == peak_bytes(states)
    total = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
    assert memory.states_bytes == total
    assert memory.total_bytes == total + memory.activations_bytes


def test_experts_are_counted_as_they_lie_in_memory() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=4,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = training_memory(Model(model.config.to_dict()), TrainingSetup(precision="32-true"))
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert memory.optimizer_bytes == peak_bytes(states)
    assert memory.parameters_bytes == peak_bytes(list(model.parameters()))


def test_eight_bit_states_by_hand() -> None:
    """Blocks of 256 with a float32 scale each; tensors below 4096 elements use float32."""
    config = tiny_llama(vocab_size=300, hidden_size=24, intermediate_size=200).config.to_dict()
    memory = training_memory(Model(config), TrainingSetup(optimizer="adamw8bit"))
    embedding = 300 * 24  # twice: the head is not tied
    ffn = 200 * 24
    attention = 2 * 24 * 24 + 2 * 12 * 24
    large = 2 * (2 * (embedding + 4 * 29)) + 3 * 3 * (2 * (ffn + 4 * 19))
    small = 3 * 8 * (attention + 2 * 24) + 8 * 24
    assert memory.optimizer_bytes == large + small


GEMMA = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=500, tie_word_embeddings=False,
        )
    ),
    "large vocabulary": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=4000, tie_word_embeddings=True,
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, vocab_size=300,
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA)),
    "gemma2 without caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, moe_intermediate_size=64, num_experts_per_tok=2, num_experts=4,
            shared_expert_intermediate_size=256, vocab_size=300,
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, moe_intermediate_size=48, num_experts_per_tok=4,
            num_experts=8, vocab_size=300,
        )
    ),
    "pythia": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            vocab_size=300,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=64, n_layer=3, n_head=4, vocab_size=300, n_positions=128, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_what_autograd_keeps(name: str, precision: str) -> None:
    """All tensors saved by a real forward pass, each storage once, without parameters."""
    model = MODELS[name]().to(DTYPES.get(precision, torch.float32))
    ids = tokens(model.config.vocab_size, batch=2, length=128)
    setup = TrainingSetup(precision=precision, batch_size=2, sequence_length=128)
    kept = kept_bytes(model, ids, is_autocast=precision.endswith("mixed"))
    assert _saved_bytes(Model(model.config.to_dict()), setup) == pytest.approx(kept, rel=0.1)


def kept_bytes(model: nn.Module, ids: Tensor, *, is_autocast: bool) -> int:
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(kept.values())


def test_checkpointing_and_less_text_take_less() -> None:
    config = tiny_llama().config.to_dict()
    plain = training_memory(Model(config), TrainingSetup())
    for cheaper in (
        TrainingSetup(is_checkpointed=True),
        TrainingSetup(sequence_length=1024),
        TrainingSetup(precision="bf16-true"),
        TrainingSetup(is_attention_frozen=True),
    ):
        assert training_memory(Model(config), cheaper).total_bytes < plain.total_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, r"precision = bf16: must be one of 32-true.*Did you mean"),
        ({"optimizer": "adam8bit"}, r"optimizer = adam8bit.*Did you mean adamw8bit\?"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"sequence_length": -1}, "sequence_length = -1"),
    ],
)
def test_a_setup_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TrainingSetup(**options)

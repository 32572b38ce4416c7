"""Independent oracles: stock transformers models, in float64 where an identity is tested."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a small stock Llama with random weights, random norm gains included."""
    options = {
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "head_dim": 6,
        **changes,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.3 * noise if "bias" in name else 1 + 0.3 * noise)
    return model.eval()


def saved(model: nn.Module, folder: Path) -> Path:
    """Save with stock transformers."""
    model.save_pretrained(folder)
    return folder


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Load with stock transformers, nothing of ours between."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def tokens(vocab_size: int = 97, *, batch: int = 3, length: int = 17, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)


@contextmanager
def float64_casts() -> Iterator[None]:
    """Lift the float32 that stock Llama casts to (norm, rotary) to float64."""
    norm, rotary = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaRotaryEmbedding.forward

    def norm_forward(self: Any, hidden: Tensor) -> Tensor:
        mean_square = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(mean_square + self.variance_epsilon)

    def rotary_forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.inv_freq.double()
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling

    modeling_llama.LlamaRMSNorm.forward = norm_forward
    modeling_llama.LlamaRotaryEmbedding.forward = rotary_forward
    try:
        yield
    finally:
        modeling_llama.LlamaRMSNorm.forward = norm
        modeling_llama.LlamaRotaryEmbedding.forward = rotary


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def relative_difference(before: nn.Module, after: nn.Module, input_ids: Tensor) -> float:
    """Return max |Δ logits| / std(logits)."""
    old, new = logits(before, input_ids), logits(after, input_ids)
    return float((old - new).abs().max() / old.std())


def gradients(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean next-token loss by parameter name."""
    model.zero_grad()
    output = model(input_ids=input_ids).logits
    loss = nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

"""Independent oracles: stock transformers models, in float64 where an identity is tested."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3

from tritter.core.families import Model, unpack_all


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
    return with_random_vectors(LlamaForCausalLM(LlamaConfig(**options)))


def with_random_vectors(model: Any) -> Any:
    """Return a model whose norms' gains lie around 1, and biases around 0."""
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


def stock(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """Load with stock transformers, nothing of ours between."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def tokens(vocab_size: int = 97, *, batch: int = 3, length: int = 17, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)


class _WideCasts(TorchFunctionMode):
    """Let no cast to float32 narrow a float64 tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:  # of frequencies too, which some versions multiply by positions
            return args[0].double()
        if args and isinstance(args[0], Tensor) and args[0].dtype in (torch.float64, torch.int64):
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **kwargs)


@contextmanager
def float64_casts() -> Iterator[None]:
    """Lift the float32 that stock classes cast to to float64: norms, rotary, router, softmax.

    Of Gemma's embedding scale, which it rounds to float32 once and for all, the exact value is
    taken.
    """
    embeddings: Any = [
        each
        for module in (modeling_gemma2, modeling_gemma3)
        for name, each in vars(module).items()
        if name.endswith("TextScaledWordEmbedding")  # Gemma 2 of transformers 5.0 has none
    ]
    kept = [embedding.forward for embedding in embeddings]

    def scaled(self: Any, input_ids: Tensor) -> Tensor:
        return nn.Embedding.forward(self, input_ids) * self.scalar_embed_scale

    for embedding in embeddings:
        embedding.forward = scaled
    try:
        with _WideCasts():
            yield
    finally:
        for embedding, forward in zip(embeddings, kept, strict=True):
            embedding.forward = forward


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


def disk_tensors(model: Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return name on disk → tensor, for values (of a state, a mask) by name in memory."""
    values = unpack_all(model.layout("live"), tensors)
    return {t.disk_name: values[t.name] for t in model.tensors if t.name in values}

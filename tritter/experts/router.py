"""The router of a decoder layer: a linear map of the hidden state that enters the layer."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class ExpertRouter(nn.Module):
    """Logits of n experts for each token.

    The hidden state is brought to a root mean square of 1, so that logits mean the same in all
    layers. It depends on the tokens up to its own, so that routing is causal.

    Args:
        hidden_size: H.
        num_experts: n.

    Attributes:
        weight: [n, H]; `bias`: [n]. Zeros at first: all experts count alike.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, T, n] for hidden states [B, T, H], in float32 at least."""
        hidden = unit_rms(hidden)
        return linear(hidden, self.weight.to(hidden.dtype), self.bias.to(hidden.dtype))


def unit_rms(hidden: Tensor) -> Tensor:
    """Return hidden states [..., H], in float32 at least, at a root mean square of 1."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)

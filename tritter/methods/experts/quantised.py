"""A frozen base with linear layers quantised to 8 or 4 bits by bitsandbytes, as in QLoRA.

Dettmers et al. 2023, arXiv:2305.14314: NF4 with double quantisation. 8 bits are LLM.int8(),
arXiv:2208.07339, with separate outliers. Linear layers of decoder layers are quantised once, on the
CPU, when the model is loaded, so that the values are the same on every device. A resumed run loads
the base again, so no saved state contains quantised weights.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from tritter.errors import RequestError
from tritter.methods.experts.adapters import LoraLayers

_OUTLIER = 6.0  # larger inputs are computed in float16, as in transformers

# Suppress a warning per layer and forward pass that inputs are rounded, which is intended
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class _Stateless:
    """Mixin that excludes a layer from the state: the base is loaded from its checkpoint."""

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class _EightBit(_Stateless, Linear8bitLt):
    """A frozen linear layer, int8 with one scale per row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(
            plain.in_features,
            plain.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=_OUTLIER,
            device="meta",
        )
        weight = plain.weight.detach().cpu()
        weights = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        self.weight, self.bias = weights, plain.bias
        self.init_8bit_state()
        self.to(plain.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_EightBit":
        # The tensors used in forward are not parameters, so move them, too
        super()._apply(fn, recurse)
        self.state.CB = self.weight.data
        self.state.SCB = self.state.SCB.to(self.weight.device)
        return self


class _FourBit(_Stateless, Linear4bit):
    """A frozen linear layer, NF4 with quantised scales; computes in bf16 on a GPU."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        weight = plain.weight.detach().cpu()
        self.weight = Params4bit(weight, quant_type="nf4", module=self).to("cpu")
        self.bias = plain.bias
        self.compute_type_is_set = True
        self.support_avx512bf16_for_cpu = (
            False  # in evaluation mode it would repack the weights in bf16
        )
        self.to(plain.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FourBit":
        # Unpickling in another process restores a plain torch parameter without scales
        super()._apply(fn, recurse)
        self.quant_state.to(self.weight.device)
        fix_4bit_weight_quant_state_from_module(self)
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.compute_dtype = torch.bfloat16 if x.is_cuda else torch.float32
        output: Tensor = super().forward(x)
        return output


def quantise(model: nn.Module, bits: int) -> None:
    """Quantise the linear layers of a model's decoder layers to 8 or 4 bits.

    Call it on a model just loaded. Fused experts, norms, embeddings and the head are unchanged.
    """
    kinds: dict[int, Any] = {8: _EightBit, 4: _FourBit}
    found = [
        (layer, name, module)
        for layer in LoraLayers(model).decoder_layers().values()
        for name, module in layer.named_modules()
        if type(module) is nn.Linear
    ]
    if not found:
        raise RequestError(
            f"experts.base_bits = {bits}: {type(model).__name__} has no linear layer that "
            "bitsandbytes can quantise; remove the option."
        )
    for layer, name, module in found:
        layer.set_submodule(name, kinds[bits](module).train(module.training))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT reads this flag

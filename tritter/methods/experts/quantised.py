"""A frozen base whose linear layers are held by bitsandbytes in 8 or 4 bits, as QLoRA has it.

Dettmers et al. 2023, arXiv:2305.14314: NF4 with double quantisation; 8 bits are LLM.int8(),
arXiv:2208.07339, with its outliers apart. Quantised is what stands in decoder layers, on the CPU
and once, when the model is loaded: wherever it goes then, the values are the same. Whoever resumes
a training loads the start again, so that no saved state holds a quantised weight.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from tritter.errors import RequestError
from tritter.methods.experts.adapters import decoder_layers

_OUTLIER = 6.0  # from which an input is computed in float16, as transformers has it

# Of each layer in each forward pass, that inputs are rounded: which is what was asked for
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class _Held:
    """A layer of the start, which has it: no state does; mixed into what bitsandbytes saves."""

    def _save_to_state_dict(self, *_: Any) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class EightBit(_Held, Linear8bitLt):
    """A frozen linear layer, one scale for each row of int8."""

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
        held = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        self.weight, self.bias = held, plain.bias
        self.init_8bit_state()
        self.to(plain.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EightBit":
        # What it computes with lies beside the parameter, and would stay where it was
        super()._apply(fn, recurse)
        self.state.CB = self.weight.data
        self.state.SCB = self.state.SCB.to(self.weight.device)
        return self


class FourBit(_Held, Linear4bit):
    """A frozen linear layer of NF4, whose scales are quantised too; computes in bf16 on a GPU."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        weight = plain.weight.detach().cpu()
        self.weight = Params4bit(weight, quant_type="nf4", module=self).to("cpu")
        self.bias = plain.bias
        self.compute_type_is_set = True
        self.support_avx512bf16_for_cpu = False  # in eval it would repack the weights, in bf16
        self.to(plain.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourBit":
        # Another process gets a weight of torch's own class, which would leave the scales behind
        super()._apply(fn, recurse)
        self.quant_state.to(self.weight.device)
        fix_4bit_weight_quant_state_from_module(self)
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.compute_dtype = torch.bfloat16 if x.is_cuda else torch.float32
        output: Tensor = super().forward(x)
        return output


def quantise(model: nn.Module, bits: int) -> None:
    """Hold the linear layers of a model's decoder layers in 8 or 4 bits; nothing else changes.

    Meant for a model just loaded. Experts that share a tensor, norms, embeddings and the head stay.

    Raises:
        RequestError: there is none, as in GPT-2, whose matrices lie transposed.
    """
    kinds: dict[int, Any] = {8: EightBit, 4: FourBit}
    found = [
        (layer, name, module)
        for layer in decoder_layers(model).values()
        for name, module in layer.named_modules()
        if type(module) is nn.Linear
    ]
    if not found:
        raise RequestError(
            f"experts.base_bits = {bits}: {type(model).__name__} has no linear layer that "
            "bitsandbytes holds; leave it out."
        )
    for layer, name, module in found:
        layer.set_submodule(name, kinds[bits](module).train(module.training))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # which PEFT asks for

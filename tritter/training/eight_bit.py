"""The moments of bitsandbytes' Adam: dequantise them, and quantise them again.

bitsandbytes stores moments as 8-bit codes with one scale per block of the flattened tensor, which
axis maps cannot transform. Small parameters have float32 moments. Only this module knows the
internals of bitsandbytes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tritter.core.parameter_map.carry import MOMENTS
from tritter.errors import TritterError
from tritter.storage.tensors import is_finite

_BLOCK = 256  # values per scale, in all of its blockwise optimizers
_SUFFIXES = dict(zip(MOMENTS, "12", strict=True))  # of state, absmax (scales), qmap (code → value)

State = Mapping[str, Any]


def is_of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Return True for any Adam of bitsandbytes, also paged, but not for AdEMAMix or LAMB."""
    has_its_hooks = hasattr(optimizer, "init_state") and hasattr(optimizer, "update_step")
    return has_its_hooks and getattr(optimizer, "optimizer_name", None) == "adam"


def read(state: State, device: torch.device) -> dict[str, Tensor]:
    """Return the moments and the step count of one parameter in the format of torch's Adam.

    Args:
        state: Optimizer state of the parameter.
        device: Device of the parameter; paged state can be on another one.
    """
    moments = {kind: _values(state, suffix, device) for kind, suffix in _SUFFIXES.items()}
    return moments | {"step": torch.tensor(float(state["step"]))}


def write(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    moments: Mapping[str, Tensor],
    *,
    before: State | None = None,
) -> None:
    """Set the moments of a parameter in the optimizer's groups.

    The optimizer creates the state, so its own rule chooses between 8 bits and float32. It never
    frees GPU pages, including those of a replaced parameter.

    Args:
        optimizer: An Adam of bitsandbytes.
        parameter: Parameter in one of its groups.
        moments: Moments and step count in the format of torch's Adam.
        before: State of the parameter that this one replaces. Blocks with unchanged values keep
            their exact codes and scales. Quantising again would shrink the largest value of a
            block by 0.7 % if it is negative, because there is no code for −1.

    Raises:
        TritterError: A moment to quantise is not finite.
    """
    from bitsandbytes.functional import quantize_blockwise

    (slot,) = (
        (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, candidate in enumerate(group["params"])
        if candidate is parameter
    )
    optimizer.state.pop(parameter, None)
    optimizer.init_state(slot[0], parameter, *slot[1:])  # type: ignore[attr-defined]
    state = optimizer.state[parameter]
    state["step"] = int(moments["step"])
    for kind, suffix in _SUFFIXES.items():
        values = moments[kind].to(parameter.device, torch.float32).contiguous()
        if not _is_coded(state, suffix):
            state[f"state{suffix}"].copy_(values)
            continue
        if not is_finite(values):  # there are no codes for inf and NaN
            raise TritterError(f"{kind} is not finite; 8-bit optimizers cannot store such values.")
        code = state[f"qmap{suffix}"]
        codes, rest = quantize_blockwise(values, code=code, blocksize=_BLOCK)
        # On the CPU, bitsandbytes quantises zero to the smallest positive number
        codes.masked_fill_(values == 0, int(code.abs().argmin()))
        scales = rest.absmax
        if before is not None and _is_coded(before, suffix):
            _keep_blocks(codes.view(-1), scales, values.view(-1), before, suffix)
        state[f"state{suffix}"].copy_(codes)
        state[f"absmax{suffix}"].copy_(scales)


def _is_coded(state: State, suffix: str) -> bool:
    return state[f"state{suffix}"].dtype == torch.uint8


def _values(state: State, suffix: str, device: torch.device) -> Tensor:
    """Return one moment in float32."""
    stored = state[f"state{suffix}"].to(device)
    if not _is_coded(state, suffix):
        return stored
    from bitsandbytes.functional import dequantize_blockwise

    scales, code = state[f"absmax{suffix}"], state[f"qmap{suffix}"]
    if scales.numel() != -(stored.numel() // -_BLOCK):
        raise TritterError(
            f"this version of bitsandbytes has {scales.numel()} scales for {stored.numel()} "
            f"values; Tritter supports blocks of {_BLOCK} values."
        )
    return dequantize_blockwise(
        stored, absmax=scales.to(device), code=code.to(device), blocksize=_BLOCK
    )


def _keep_blocks(codes: Tensor, scales: Tensor, values: Tensor, before: State, suffix: str) -> None:
    """Copy the old codes and scales of all blocks [256] with unchanged values.

    A last block that was partial and has grown counts as changed.
    """
    old_codes = before[f"state{suffix}"].to(codes.device).view(-1)
    old_values = _values(before, suffix, codes.device).view(-1)
    length = min(len(values), len(old_values))
    if len(values) != len(old_values):
        length -= length % _BLOCK
    is_same = values[:length] == old_values[:length]
    is_kept = pad(is_same, (0, -length % _BLOCK), value=True).view(-1, _BLOCK).all(dim=1)
    kept = is_kept.repeat_interleave(_BLOCK)[:length]
    codes[:length][kept] = old_codes[:length][kept]
    old_scales = before[f"absmax{suffix}"].to(scales.device)
    scales[: len(is_kept)][is_kept] = old_scales[: len(is_kept)][is_kept]

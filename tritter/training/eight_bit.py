"""Adam of bitsandbytes: its moments read as plain numbers, and written down as it holds them.

It keeps them in codes of 8 bits, one scale to a block of the flattened tensor, which no map of axes
could follow; those of small parameters in float32. All that we know of its insides stands here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tritter.core.parameter_map.carry import MOMENTS
from tritter.errors import TritterError
from tritter.storage.tensors import is_finite

_BLOCK = 256  # numbers to a scale, in all its blockwise optimizers
_SUFFIXES = dict(zip(MOMENTS, "12", strict=True))  # of state, absmax (scales), qmap (code → value)

State = Mapping[str, Any]


def is_of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this is an Adam of bitsandbytes, paged or not; AdEMAMix and LAMB are not."""
    has_its_hooks = hasattr(optimizer, "init_state") and hasattr(optimizer, "update_step")
    return has_its_hooks and getattr(optimizer, "optimizer_name", None) == "adam"


def read(state: State, device: torch.device) -> dict[str, Tensor]:
    """Return the moments and the step count of one parameter, as torch's Adam would hold them.

    Args:
        state: what the optimizer holds for it.
        device: where the parameter is; paged state is elsewhere.

    Raises:
        TritterError: blocks have another size than they had in all versions we know.
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
    """Let the optimizer hold moments for a parameter that is in its groups.

    The optimizer itself makes the state, so that its own rule decides between 8 bits and float32.
    Pages on a GPU it never gives back, those of the parameter before included.

    Args:
        before: what it held of the parameter that this one stems from. Blocks that still stand for
            the same numbers keep their codes and scales to the bit: a second rounding would take
            0.7 % from the largest number of a block if that is negative, as there is no code for
            −1.

    Raises:
        TritterError: a moment that is to be coded is not finite.
    """
    from bitsandbytes.functional import quantize_blockwise

    (place,) = (
        (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, held in enumerate(group["params"])
        if held is parameter
    )
    optimizer.state.pop(parameter, None)
    optimizer.init_state(place[0], parameter, *place[1:])  # type: ignore[attr-defined]
    state = optimizer.state[parameter]
    state["step"] = int(moments["step"])
    for kind, suffix in _SUFFIXES.items():
        values = moments[kind].to(parameter.device, torch.float32).contiguous()
        if not _is_coded(state, suffix):
            state[f"state{suffix}"].copy_(values)
            continue
        if not is_finite(values):  # there are codes for numbers only
            raise TritterError(f"{kind} holds values that are not finite; 8 bits can't hold them.")
        code = state[f"qmap{suffix}"]
        codes, rest = quantize_blockwise(values, code=code, blocksize=_BLOCK)
        # On the CPU it takes a zero for the smallest number above zero
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
    held = state[f"state{suffix}"].to(device)
    if not _is_coded(state, suffix):
        return held
    from bitsandbytes.functional import dequantize_blockwise

    scales, code = state[f"absmax{suffix}"], state[f"qmap{suffix}"]
    if scales.numel() != -(held.numel() // -_BLOCK):
        raise TritterError(
            f"bitsandbytes holds {scales.numel()} scales of {held.numel()} numbers; blocks of "
            f"{_BLOCK} are known."
        )
    return dequantize_blockwise(
        held, absmax=scales.to(device), code=code.to(device), blocksize=_BLOCK
    )


def _keep_blocks(codes: Tensor, scales: Tensor, values: Tensor, before: State, suffix: str) -> None:
    """Take the codes and scales from before where a block's numbers [256] are what they were.

    A block that was not full, and is longer now, is another.
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

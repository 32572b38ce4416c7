"""A model of which each of several processes holds a part (FSDP2).

Each decoder layer is gathered before it computes and let go behind it, so that a process holds its
part of all layers and the whole of one.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tritter.models import backbone_of, set_parameter

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Put a part of every parameter on each process of a mesh, decoder layer by decoder layer.

    What stands in no layer, embeddings that may be tied among it, is gathered together.
    """
    lists = (each for each in backbone_of(model).children() if isinstance(each, nn.ModuleList))
    for layer in next(lists):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Say whether parts of a model lie on other processes."""
    return isinstance(model, FSDPModule)


def let_go(model: nn.Module) -> None:
    """Let a process hold its part alone after passes that no backward pass followed."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gather(model: nn.Module, *, is_kept: bool) -> None:
    """Let a model that is no longer trained hold whole weights, on the CPU; all processes ask.

    Args:
        is_kept: whether this process is one that wants them.
    """
    names = [name for name, _ in model.named_parameters()]
    whole: Mapping[str, Any] = get_model_state_dict(model, options=WHOLE)
    if not is_kept:
        return
    for name in names:
        set_parameter(model, name, whole[name])
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():  # `to` asks for the parts that were there
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.cpu())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose parts lie on several processes, all of which ask; others as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

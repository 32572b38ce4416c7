"""Run a stock model while its weights stay on disk.

The forward pass of the stock class runs unchanged. Each module loads its weights in float32 just
before it runs and drops them afterwards. Large matrices are multiplied in blocks of rows,
embeddings are read for the current tokens only, and experts one by one. So a model of any size
needs the memory of its activations and of one expert or block.

Shapes: B sequences, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.core.families import Config, StoredTensor, family_of, layout, match, on_disk
from tritter.core.models import backbone_of, layers_of, meta_model, read_config
from tritter.storage.tensors import TensorFolder, TensorReader

BLOCK_BYTES = 32 * 2**20  # of a matrix in float32: fits in the CPU cache
KEPT_POSITIONS = 8  # the last positions of a sequence, which attend to all earlier ones


class StreamedModel:
    """The model of a folder, run once over some tokens.

    Args:
        folder: a checkpoint that was checked.
        input_ids: int64 [B, T].
        on_read: called with the number of bytes just read from the files.

    Raises:
        TritterError: transformers cannot build it, or its files are damaged.
    """

    def __init__(
        self, folder: Path, input_ids: Tensor, *, on_read: Callable[[int], None] | None = None
    ) -> None:
        config = on_disk(read_config(folder))  # of the stock model, padding included
        self._weights = _Weights(folder, config)
        self._input_ids = input_ids
        self._on_read = on_read or (lambda _: None)
        self._model = meta_model(folder)
        self._head: nn.Module = self._model.get_output_embeddings()  # type: ignore[operator]
        self._rows = slice(0, 1)  # of the head
        self._scratch: dict[str, Tensor] = {}
        self._outputs: Any = None
        self.states: list[Tensor] = []
        self.num_bytes = 0
        self._hook_weights()
        self._hook_layers()

    @property
    def vocab_size(self) -> int:
        """V: rows of the head."""
        return int(self._head_weight.shape[0])

    @property
    def rows_per_block(self) -> int:
        """Number of rows of the head per block."""
        return _rows_per_block(self._head_weight)

    def logits(self, rows: slice) -> Tensor:
        """Return the logits [B, T, rows] of a part of the vocabulary, equal to the stock class.

        The first call runs the layers and stores in `states` the hidden states before the first
        layer and after each layer, [B, the last `KEPT_POSITIONS`, H].
        """
        self._rows = rows
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            return self._model(input_ids=self._input_ids, use_cache=False).logits

    @property
    def _head_weight(self) -> Tensor:
        return self._head.weight  # type: ignore[return-value]

    def _hook_weights(self) -> None:
        """Make each module load its weights when it is called; `num_bytes` counts their size."""
        names = {
            id(parameter): name
            for name, parameter in self._model.named_parameters()
            if name in self._weights.live
        }  # a tied head has the embedding's name
        for name, buffer in self._model.named_buffers():
            if buffer.is_meta:  # it is in the files, like a parameter
                path, _, key = name.rpartition(".")
                owner = self._model.get_submodule(path)
                owner._buffers[key] = self._weights.whole(name).to(buffer.dtype)
        whole: list[nn.Module] = []
        if not family_of(self._weights.config).has_table:
            # Without a table, modules may read the parameters of others: load layer by layer
            whole = list(layers_of(self._model))
            for layer in whole:
                self._load_together(layer, names)
        inner = {module for layer in whole for module in layer.modules()}
        for module in self._model.modules():
            if module in inner:
                continue
            unloaded = {key: each for key, each in module._parameters.items() if each is not None}
            owned = {key: names[id(each)] for key, each in unloaded.items()}
            if type(module) is nn.Embedding:
                module.padding_idx = None  # invalid among the loaded rows
                module.register_forward_pre_hook(partial(self._load_rows, owned["weight"]))
                continue
            self.num_bytes += sum(map(self._weights.bytes_of, owned.values()))
            if type(module) is nn.Linear:
                module.forward = partial(self._linear, module, owned)  # type: ignore[method-assign]
            elif owned:
                module.register_forward_pre_hook(partial(self._load, owned))
                module.register_forward_hook(partial(self._unload, owned, unloaded))

    def _load_together(self, layer: nn.Module, names: Mapping[int, str]) -> None:
        """Make a layer load all its weights when it is called."""
        for module in layer.modules():
            unloaded = {key: each for key, each in module._parameters.items() if each is not None}
            owned = {key: names[id(each)] for key, each in unloaded.items()}
            if not owned:
                continue
            self.num_bytes += sum(map(self._weights.bytes_of, owned.values()))
            layer.register_forward_pre_hook(partial(self._load_module, owned, module))
            layer.register_forward_hook(partial(self._unload, owned, unloaded, module))

    def _load_module(self, names: Mapping[str, str], module: nn.Module, *_: object) -> None:
        for attribute, name in names.items():
            value = self._weights.whole(name).to(torch.float32, copy=True)
            module._parameters[attribute] = nn.Parameter(value, requires_grad=False)

    def _hook_layers(self) -> None:
        """Record the last hidden states of each layer, and run the layers only once."""
        backbone = backbone_of(self._model)
        layers = layers_of(self._model)
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, inputs: self._keep(inputs[0]))
        layers[-1].register_forward_hook(
            lambda _, inputs, output: self._keep(output[0] if isinstance(output, tuple) else output)
        )
        run = backbone.forward

        def once(*arguments: Any, **keywords: Any) -> Any:
            if self._outputs is None:
                self._outputs = run(*arguments, **keywords)
            return self._outputs

        backbone.forward = once

    def _keep(self, hidden_BTH: Tensor) -> None:
        self.states.append(hidden_BTH[:, -KEPT_POSITIONS:].clone())

    def _linear(self, module: nn.Linear, names: Mapping[str, str], hidden: Tensor) -> Tensor:
        weight = self._weights.whole(names["weight"])
        bias = self._weights.whole(names["bias"]).float() if "bias" in names else None
        rows = self._rows if module is self._head else slice(0, len(weight))
        outputs = []
        for block in blocks(rows, _rows_per_block(weight)):
            wide = self._widened("weight", weight[block])
            outputs.append(F.linear(hidden, wide, None if bias is None else bias[block]))
        columns = weight.shape[1] + (bias is not None)
        self._on_read((rows.stop - rows.start) * columns * weight.itemsize)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _load_rows(self, name: str, module: nn.Embedding, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Load the embedding rows of the current tokens; return the tokens as indices of them."""
        used, indices = inputs[0].unique(return_inverse=True)
        rows = self._weights.whole(name)[used].float()
        module.weight = nn.Parameter(rows, requires_grad=False)
        return (indices,)

    def _load(self, names: Mapping[str, str], module: nn.Module, inputs: object) -> None:
        for attribute, name in names.items():
            if self._weights.has_experts(name):
                del module._parameters[attribute]
                setattr(module, attribute, _Experts(partial(self._expert, attribute, name)))
            else:
                wide = self._widened(attribute, self._weights.whole(name))
                module._parameters[attribute] = nn.Parameter(wide, requires_grad=False)

    def _unload(
        self,
        names: Mapping[str, str],
        unloaded: Mapping[str, nn.Parameter],
        module: nn.Module,
        *_: object,
    ) -> None:
        for attribute in unloaded.keys() - module._parameters.keys():
            delattr(module, attribute)
        module._parameters.update(unloaded)
        self._on_read(sum(map(self._weights.bytes_of, names.values())))

    def _expert(self, attribute: str, name: str, expert: int) -> Tensor:
        return self._widened(attribute, self._weights.expert(name, expert))

    def _widened(self, key: str, tensor: Tensor) -> Tensor:
        """Return a tensor in float32, in a buffer that the next tensor of the same key reuses."""
        if tensor.dtype == torch.float32:
            return tensor
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = self._scratch[key] = torch.empty(tensor.numel())
        return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)


class _Experts:
    """Stand-in for the stacked tensor of a layer's experts; reads one expert at a time."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read = read

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._read(int(expert))


class _Weights:
    """A folder's tensors by their names in memory, in their stored dtype; memory-mapped."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.config = config
        self._files = TensorFolder.open(folder)
        self._reader = TensorReader(self._files)
        self._stored = {
            part.tensor.name: (stored, part)
            for stored in match(config, self._files.files)
            for part in stored.parts
        }
        self.live = {stored.name: stored for stored in layout(config, "live")}
        self._unchanged = {
            name for name, live in self.live.items() if self._on_disk(live).parts == live.parts
        }  # with the same layout on disk as in memory

    def bytes_of(self, name: str) -> int:
        live = self.live[name]
        itemsize = self._files.torch_dtype(self._on_disk(live).name).itemsize
        return itemsize * torch.Size(live.shape).numel()

    def has_experts(self, name: str) -> bool:
        return self.live[name].is_of_experts

    def whole(self, name: str) -> Tensor:
        live = self.live[name]
        if name in self._unchanged:
            return self._reader.get(self._on_disk(live).name)
        return live.pack(self._read)

    def expert(self, name: str, expert: int) -> Tensor:
        """Return the matrix of one expert from a tensor that stacks experts."""
        live = self.live[name]
        if name in self._unchanged:
            return self._reader.get(self._on_disk(live).name, index=(expert,))
        parts = [part for part in live.parts if part.index[0] == expert]
        values = [self._read(part.tensor.name) for part in parts]
        matrix = values[0].new_empty(live.shape[1:])
        for part, value in zip(parts, values, strict=True):
            matrix[part.index[1:]] = value
        return matrix

    def _on_disk(self, live: StoredTensor) -> StoredTensor:
        """Return the tensor on disk that contains the first part of one in memory."""
        return self._stored[live.parts[0].tensor.name][0]

    def _read(self, name: str) -> Tensor:
        stored, part = self._stored[name]
        return part.transposed(self._reader.get(stored.name, index=part.index))


def blocks(rows: slice, step: int) -> Iterator[slice]:
    """Yield consecutive slices of up to `step` rows."""
    for begin in range(rows.start, rows.stop, step):
        yield slice(begin, min(begin + step, rows.stop))


def _rows_per_block(weight: Tensor) -> int:
    return max(1, BLOCK_BYTES // (4 * weight.shape[1]))

"""Run a stock model while its weights stay on disk.

The forward pass of the stock class runs unchanged. A weight is loaded (in float32) when any module
reads it, and dropped after the module that owns it, or the layer, has run. Large matrices are
multiplied in blocks of rows, embeddings are read for the current tokens only, and experts one by
one. So a model of any size needs the memory of its activations and of one expert or block.

Shapes: B sequences, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.core.families import Model
from tritter.core.models import backbone_of, layers_of, read_model, unloaded_model
from tritter.storage.tensors import TensorFolder

_BLOCK_BYTES = 32 * 2**20  # of a matrix in float32: fits in the CPU cache
_KEPT_POSITIONS = 8  # the last positions of a sequence, which attend to all earlier ones


class StreamedModel:
    """The model of a folder, run once over some tokens.

    Args:
        folder: a checkpoint that was checked.
        input_ids: int64 [B, T].
        on_read: called with the number of bytes just read from the files.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        folder: Path,
        input_ids: Tensor,
        *,
        on_read: Callable[[int], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        description = read_model(folder).on_disk  # padding included
        self._weights = _Weights(folder, description)
        self._input_ids = input_ids
        self._on_read = on_read or (lambda _: None)
        self._dtype = dtype
        self._model = unloaded_model(folder, description, self._weights.buffer, dtype=dtype)
        self._head: nn.Module = self._model.get_output_embeddings()  # type: ignore[operator]
        self._head_shape: torch.Size = self._head.weight.shape
        self._rows = slice(0, 1)  # of the head
        self._loaded: dict[str, tuple[Tensor, int]] = {}  # with the version when it was loaded
        self._counted: set[str] = set()  # tensors whose bytes were reported
        self._scratch: dict[str, Tensor] = {}
        self._outputs: Any = None
        self.states: list[Tensor] = []
        self.num_bytes = 0
        self._hook_weights()
        self._hook_layers()

    @property
    def vocab_size(self) -> int:
        """V: rows of the head."""
        return int(self._head_shape[0])

    @property
    def rows_per_block(self) -> int:
        """Number of rows of the head per block."""
        return _rows_per_block(self._head_shape)

    def logits(self, rows: slice) -> Tensor:
        """Return the logits [B, T, rows] of a part of the vocabulary, equal to the stock class.

        The first call runs the layers and stores in `states` the hidden states before the first
        layer and after each layer, [B, the last `_KEPT_POSITIONS`, H].
        """
        self._rows = rows
        # Not in inference mode, which hides whether a module changes its weights
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            logits: Tensor = self._model(input_ids=self._input_ids, use_cache=False).logits
        self._drop()
        is_whole = logits.shape[-1] != rows.stop - rows.start  # the head is no plain matrix
        return logits[..., rows] if is_whole else logits

    def _hook_weights(self) -> None:
        """Load weights when modules read them; `num_bytes` counts the size of all."""
        named = self._model.state_dict(keep_vars=True)
        names = {id(value): name for name, value in named.items() if name in self._weights.live}
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        for module in self._model.modules():
            own = module._parameters.items()
            owned = {key: names[id(each)] for key, each in own if each is not None}
            if not owned:
                continue
            read = partial(self._parameter, owned)
            module._parameters = _Parameters(module._parameters, read)
            if type(module) is nn.Embedding:
                module.forward = partial(self._embed, owned["weight"])  # type: ignore[method-assign]
                continue
            self.num_bytes += sum(map(self._weights.bytes_of, owned.values()))
            if module is embedding and isinstance(module, nn.Embedding):  # that scales, as Gemma's
                module.padding_idx = None  # invalid among the loaded rows
                module.register_forward_pre_hook(partial(self._load_rows, owned["weight"]))
            if type(module) is nn.Linear:
                module.forward = partial(self._linear, module, owned)  # type: ignore[method-assign]
            else:
                module.register_forward_hook(
                    partial(lambda names, *_: self._drop(names), owned.values())
                )

    def _parameter(self, names: Mapping[str, str], attribute: str) -> Any:
        """Return a parameter that a module reads, or a stand-in for stacked experts."""
        name = names[attribute]
        self._count(name)
        if self._weights.has_experts(name):
            return _Experts(partial(self._expert, attribute, name))
        if name not in self._loaded:
            value = self._weights.whole(name).to(self._dtype, copy=True)
            self._loaded[name] = value, value._version
        return self._loaded[name][0]

    def _stored(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype, or the value in memory if a module has it."""
        return self._loaded[name][0] if name in self._loaded else self._weights.whole(name)

    def _drop(self, names: Iterable[str] | None = None) -> None:
        """Drop loaded tensors, except those that modules have changed; None drops all."""
        for name in [*(self._loaded if names is None else names)]:
            value, version = self._loaded.get(name, (None, 0))
            if value is not None and value._version == version:
                del self._loaded[name]

    def _count(self, name: str) -> None:
        """Report the bytes of a tensor that is read for the first time."""
        if name not in self._counted:
            self._counted.add(name)
            self._on_read(self._weights.bytes_of(name))

    def _hook_layers(self) -> None:
        """Record the last hidden states of each layer, and run the layers only once."""
        backbone = backbone_of(self._model)
        layers = layers_of(self._model)
        for layer in layers:
            layer.register_forward_pre_hook(
                lambda _, inputs, options: self._keep([*inputs, *options.values()]),
                with_kwargs=True,
            )
            layer.register_forward_hook(lambda *_: self._drop())
        layers[-1].register_forward_hook(lambda _, inputs, outputs: self._keep(outputs))
        run = backbone.forward

        def once(*arguments: Any, **keywords: Any) -> Any:
            if self._outputs is None:
                self._outputs = run(*arguments, **keywords)
            return self._outputs

        backbone.forward = once

    def _keep(self, values: Any) -> None:
        """Keep the last positions of the hidden states [B, T, H], the first of several outputs."""
        hidden_BTH: Tensor = values if isinstance(values, Tensor) else values[0]
        self.states.append(hidden_BTH[:, -_KEPT_POSITIONS:].clone())

    def _linear(self, module: nn.Linear, names: Mapping[str, str], hidden: Tensor) -> Tensor:
        weight = self._stored(names["weight"])
        bias = self._stored(names["bias"]).to(self._dtype) if "bias" in names else None
        is_head = module is self._head
        rows = self._rows if is_head else slice(0, len(weight))
        outputs = []
        for block in blocks(rows, _rows_per_block(weight.shape)):
            wide = self._widened("weight", weight[block])
            outputs.append(F.linear(hidden, wide, None if bias is None else bias[block]))
        if is_head:
            columns = weight.shape[1] + (bias is not None)
            self._on_read((rows.stop - rows.start) * columns * weight.itemsize)
        else:
            for name in names.values():
                self._count(name)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _embed(self, name: str, input_ids: Tensor) -> Tensor:
        """Return the embeddings of the current tokens, whose rows alone are read."""
        used, indices = input_ids.unique(return_inverse=True)
        return F.embedding(indices, self._stored(name)[used].to(self._dtype))

    def _load_rows(self, name: str, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Load only the rows of the current tokens; return the tokens as their indices."""
        used, indices = inputs[0].unique(return_inverse=True)
        rows = self._stored(name)[used].to(self._dtype)
        self._loaded[name] = rows, rows._version
        return (indices,)

    def _expert(self, attribute: str, name: str, expert: int) -> Tensor:
        return self._widened(attribute, self._weights.expert(name, expert))

    def _widened(self, key: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype, in a buffer that the next tensor of the same key reuses."""
        if tensor.dtype == self._dtype:
            return tensor
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = self._scratch[key] = torch.empty(tensor.numel(), dtype=self._dtype)
        return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)


@contextmanager
def computed_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute a model in memory in another dtype: a weight is cast while its module runs."""
    changed, hooks = list[tuple[nn.Module, dict[str, nn.Parameter | None]]](), []
    for module in model.modules():
        if (parameters := module._parameters) and not isinstance(parameters, _Parameters):
            read = cache(partial(lambda values, key: values[key].to(dtype), parameters))
            changed.append((module, parameters))
            module._parameters = _Parameters(parameters, read)
            hooks.append(
                module.register_forward_hook(
                    partial(lambda read, *_: read.cache_clear(), read), always_call=True
                )
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, parameters in changed:
            module._parameters = parameters


class _Parameters(dict[str, nn.Parameter | None]):
    """Parameters of a module, which are loaded when they are read by name.

    Loops over the parameters, which look for their dtype or device, get stand-ins.
    """

    def __init__(
        self, stand_ins: Mapping[str, nn.Parameter | None], read: Callable[[str], Any]
    ) -> None:
        super().__init__(stand_ins)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        return None if super().__getitem__(key) is None else self._read(key)


class _Experts:
    """Stand-in for the stacked tensor of a layer's experts; reads one expert at a time."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read = read

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._read(int(expert))


class _Weights:
    """A folder's tensors by their names in memory, in their stored dtype; memory-mapped."""

    def __init__(self, folder: Path, model: Model) -> None:
        self._has_table = model.family.has_table
        self._files = TensorFolder.open(folder)
        self._reader = self._files.reader()
        self._stored = {
            part.tensor.name: (stored, part)
            for stored in model.match(self._files.files)
            for part in stored.parts
        }
        self.live = {stored.name: stored for stored in model.layout("live")}
        self._on_disk = {  # name in memory → tensor on disk that contains its first part
            name: self._stored[live.parts[0].tensor.name][0] for name, live in self.live.items()
        }
        self._unchanged = {
            name for name, live in self.live.items() if self._on_disk[name].parts == live.parts
        }  # with the same layout on disk as in memory

    def bytes_of(self, name: str) -> int:
        itemsize = self._files.headers[self._on_disk[name].name].torch_dtype.itemsize
        return itemsize * torch.Size(self.live[name].shape).numel()

    def has_experts(self, name: str) -> bool:
        """Return True if a tensor stacks experts, and its class is known to index them."""
        return self._has_table and self.live[name].is_of_experts

    def whole(self, name: str) -> Tensor:
        if name in self._unchanged:
            return self._reader.get(self._on_disk[name].name)
        return self.live[name].pack(self._read)

    def buffer(self, name: str) -> Tensor | None:
        """Return a tensor, or None if the files lack it."""
        return self.whole(name).clone() if name in self.live else None

    def expert(self, name: str, expert: int) -> Tensor:
        """Return the matrix of one expert from a tensor that stacks experts."""
        live = self.live[name]
        if name in self._unchanged:
            return self._reader.get(self._on_disk[name].name, index=(expert,))
        parts = [part for part in live.parts if part.index[0] == expert]
        values = [self._read(part.tensor.name) for part in parts]
        matrix = values[0].new_empty(live.shape[1:])
        for part, value in zip(parts, values, strict=True):
            matrix[part.index[1:]] = value
        return matrix

    def _read(self, name: str) -> Tensor:
        stored, part = self._stored[name]
        return part.transposed(self._reader.get(stored.name, index=part.index))


def blocks(rows: slice, step: int) -> Iterator[slice]:
    """Yield consecutive slices of up to `step` rows."""
    for begin in range(rows.start, rows.stop, step):
        yield slice(begin, min(begin + step, rows.stop))


def _rows_per_block(shape: torch.Size) -> int:
    return max(1, _BLOCK_BYTES // (4 * shape[1]))

"""Growable modules for your own training loop: a linear layer, an FFN, a causal language model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer

from tritter.checkpoints import ExpansionRecord, Lineage, Source
from tritter.checkpoints.folder import copy_small_files
from tritter.checkpoints.location import check_output, require_plain
from tritter.core.models import load_model, model_of, read_model, refuse_wrapped
from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.methods.growth.blocks import FfnBlock, freeze_all_but_ffns
from tritter.methods.growth.grower import Grower
from tritter.methods.growth.initialisers import GradMax, Initialiser, NewNeurons
from tritter.methods.growth.plain_loop import PlainLoop
from tritter.methods.growth.triggers import (
    INITIALISERS,
    TRIGGERS,
    GrowthOptions,
    Percentile,
    Timing,
    Trigger,
)
from tritter.options import read_options, read_part
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.targets import plain, values_of
from tritter.transform.folder import child_lineage
from tritter.transform.live import write_model

_Counts = dict[str, int]
# Other triggers need to know the number of steps
_TRIGGERS = {name: kind for name, kind in TRIGGERS.items() if not kind.needs_end}
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
}
_QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


class _Growable:
    """Base of modules that grow when your training loop calls them.

    Call `check_and_grow` between an optimizer step and the next forward pass, before or after
    `zero_grad`. In the middle of gradient accumulation, the gradients would be lost.
    """

    _loop: PlainLoop
    _is_enabled = True  # if False, no call has an effect

    def attach(self, optimizer: Optimizer | None) -> None:
        """Set the optimizer that trains this module; every growth maps its moments.

        An optimizer of torch is detected at its first step without this call.

        Args:
            optimizer: None: nothing keeps the parameters beyond a growth event, because you rebuild
                the optimizer from `parameters()` after each.

        Raises:
            RequestError: the optimizer trains none of the parameters that grow.
        """
        self._loop.attach(optimizer)

    def update_loss(self, loss: float | Tensor) -> None:
        """Record the loss of a step; triggers that detect a plateau need it."""
        self._loop.note_loss(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def check_and_grow(self, *, optimizer: Optimizer | None = None) -> _Counts:
        """Grow if the trigger fires.

        Args:
            optimizer: as for `attach`, if that was not called.

        Returns:
            Numbers of neurons: `born` (added), `replaced` (dead neurons that were reinitialised)
            and `died` (dead neurons that remain).

        Raises:
            RequestError: growth is due, and the optimizer is not known.
        """
        if not self._is_enabled:
            return _num_changed({})
        if optimizer is not None:
            self.attach(optimizer)
        decided = self._loop.decide()
        if not decided:
            return _num_changed({})
        self._check_growth_is_safe()
        return _num_changed(self._loop.grow(decided))

    @property
    def growth_events(self) -> list[dict[str, Any]]:
        """One record per event and layer: step, layer, born, replaced, died, neurons, pressure."""
        return [dict(event) for event in self._loop.grower.events]

    def get_extra_state(self) -> Tensor:
        """Return the state of growth for `state_dict`, as the bytes of a file.

        safetensors, and so Accelerate's `save_state`, stores only tensors.
        """
        file = BytesIO()
        torch.save(self._loop.state_dict(), file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Restore the shapes of grown parameters before their weights are loaded."""
        if isinstance(state, Tensor):  # earlier versions stored the dictionary itself
            file = BytesIO(state.cpu().numpy().tobytes())
            state = cast(
                "Mapping[str, Any]", torch.load(file, map_location="cpu", weights_only=True)
            )
        self._loop.load_state_dict(state)

    def _check_growth_is_safe(self) -> None:
        """Raise if other modules rely on the current shapes."""


class _GrowableLayer(_Growable):
    """A growable module with a single layer of neurons."""

    def check_growth(self) -> tuple[bool, list[int]]:
        """Return True and the source neurons of new ones if growth is due, else False and []."""
        decided = self._loop.decide()
        return (True, self._loop.sources(0, decided[0])) if decided else (False, [])

    def perform_growth(self, source_indices: Sequence[int]) -> dict[str, Any]:
        """Add one neuron per source index.

        Args:
            source_indices: neurons that new ones are copied from, if the initialiser copies. Dead
                neurons that are reinitialised are skipped.

        Returns:
            As `check_and_grow`, and `indices`: positions of the new neurons.

        Raises:
            RequestError: an index is out of range; a weight is frozen; no training step was
                observed; the optimizer is not known.
        """
        sources = [int(index) for index in source_indices]
        (block,), module = self._loop.grower.blocks, self._loop.module
        width = block.width(module)
        if not sources:
            return {**_num_changed({}), "indices": []}
        if wrong := [index for index in sources if not 0 <= index < width]:
            reason = f"indices must be between 0 and {width - 1}"
            raise RequestError(Problem("source_indices", wrong, reason=reason))
        if not block.is_trained(module):
            raise RequestError(
                "growth: a growing weight is frozen; all weights of neurons must be trainable."
            )
        self._check_growth_is_safe()
        growths = {}
        if self._loop.grower.pressure.neurons:
            growths = self._loop.grow({0: len(sources)}, sources={block.layer: sources})
        if not growths:
            raise RequestError(
                "growth: no training step was observed since the layer has its current size; take "
                "a training step first."
            )
        indices = growths[block.layer].indices(width)
        return {**_num_changed(growths), "indices": indices.tolist()}


def _num_changed(growths: Mapping[int, NewNeurons]) -> _Counts:
    """Return the numbers of neurons that were born, replaced, and died."""
    return {
        "born": sum(each.born for each in growths.values()),
        "replaced": sum(len(each.recycled) for each in growths.values()),
        "died": sum(each.died for each in growths.values()),
    }


def _build_grower(keywords: Mapping[str, Any]) -> Grower:
    """Return the grower for keyword arguments: a seed, and fields of `GrowthOptions`."""
    usual = {"trigger": Percentile.name, "initialiser": GradMax.name}
    values = {**usual, "check_every": 1, "warmup_steps": 0, **keywords}
    seed, known = values.pop("seed", 0), {each.name for each in fields(GrowthOptions)}
    known -= {"max_extra_flops", "freeze_attention"}  # unknown end; an argument elsewhere
    problems = [
        Problem(key, value, reason="unknown keyword", nearest=nearest(key, known))
        for key, value in values.items()
        if key not in known
    ]
    if type(seed) is not int or not 0 <= seed < 2**64:
        problems.append(Problem("seed", seed, reason="must be a whole number from 0 to 2^64 - 1"))
    raise_problems(problems)
    if (kind := TRIGGERS.get(str(values["trigger"]))) is not None and kind.needs_end:
        reason = "this trigger needs the number of steps, unknown in your own loop; use one of "
        reason += f"{', '.join(_TRIGGERS)}, or a Trigger"
        raise RequestError(Problem("trigger", kind.name, reason=reason))
    trigger = read_part("trigger", values["trigger"], _TRIGGERS, base=Trigger)
    initialiser = read_part("initialiser", values["initialiser"], INITIALISERS, base=Initialiser)
    options = read_options(GrowthOptions, values | usual, prefix="", problems=problems)
    raise_problems(problems)
    assert options is not None, "problems were raised above"
    # The caller decides when to check; the loop enforces the minimum interval
    timing = replace(Timing.of(options, max_steps=None), check_every=1)
    used = {"growth_cooldown": timing.cooldown, "maturation_age": timing.maturation_age}
    options = replace(options, trigger=trigger, initialiser=initialiser, **used)  # type: ignore[arg-type]
    return Grower(options, timing=timing, seed=seed)


class GrowableLinear(_GrowableLayer, nn.Linear):
    """`nn.Linear` that gets more outputs during training, while its consumer gets more inputs.

    With a consumer both layers are widened in one event, and their composition is preserved.
    Without one the layer returns the indices of its new outputs, and you must widen the modules
    that read it. The state has the format of `nn.Linear`; loading a wider state widens the layer.

    Args:
        consumer: a linear layer that reads all outputs and nothing else, directly or through an
            elementwise function.
        growth: a seed, and fields of `tritter.methods.growth.triggers.GrowthOptions`.

    Raises:
        RequestError: a keyword or value is invalid, or the consumer can't be widened.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        consumer: nn.Linear | None = None,
        **growth: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._has_warned = False
        self._read: Tensor | None = None
        self._reader = () if consumer is None else (consumer,)  # not registered as a submodule
        modules: dict[str, nn.Module] = {"layer": self}
        if consumer is not None:
            if hasattr(consumer, "base_layer"):
                raise RequestError(
                    f"consumer = {type(consumer).__name__}: a layer inside LoRA adapters can't be "
                    "widened; merge the adapters first."
                )
            if not isinstance(consumer, nn.Linear):
                raise RequestError(
                    f"consumer = {type(consumer).__name__}: must be an nn.Linear whose columns "
                    "read the outputs; other modules can't be widened."
                )
            if consumer.in_features != out_features:
                raise RequestError(
                    f"consumer has in_features = {consumer.in_features}, and the layer has "
                    f"out_features = {out_features}; they must be equal."
                )
            consumer.register_forward_hook(self._record_consumer)
            modules["consumer"] = consumer
        block = FfnBlock(
            layer=0,
            gate="layer.weight",
            up=None,
            down=None if consumer is None else "consumer.weight",
        )
        self._loop = PlainLoop(nn.ModuleDict(modules), _build_grower(growth), blocks=[block])

    # The state has the format of nn.Linear
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @property
    def consumer(self) -> nn.Linear | None:
        """The layer that reads the outputs, if any."""
        return self._reader[0] if self._reader else None

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if self._reader:
            self._read = input.detach() if torch.is_grad_enabled() else None
        else:
            self._loop.tokens.record_activations(0, input, output, computed=output)
        return output

    def _record_consumer(
        self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor
    ) -> None:
        if self._read is not None:
            self._loop.tokens.record_activations(0, self._read, output, computed=arguments[0])
        self._read = None

    def _check_growth_is_safe(self) -> None:
        """Refuse growth that would break the shapes of a surrounding module."""
        for parent in _PARENTS.get(self, ()):
            if not any(child is self for child in parent.children()):
                continue  # was replaced by another module
            if hasattr(parent, "lora_A"):
                raise RequestError(
                    "growth: neurons can't grow below the LoRA adapters around this layer; merge "
                    "the adapters first."
                )
            if hasattr(getattr(parent, "config", None), "to_dict"):
                raise RequestError(
                    f"growth: this layer is part of a Hugging Face model ({type(parent).__name__}"
                    "), whose other tensors and config must change with it; wrap the whole model "
                    "with GrowableCausalLM(model)."
                )
        if not self._reader and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "growth: this GrowableLinear has no consumer: it gets more outputs, and you must "
                "widen the modules that read them; pass consumer= to have that done.",
                stacklevel=4,
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.ndim == 2:
            width, size = weight.shape
            if size == self.in_features and width > self.out_features:
                self._loop.widen(width)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)


_PARENTS: WeakKeyDictionary[GrowableLinear, "WeakSet[nn.Module]"] = WeakKeyDictionary()


def _note_parent(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(submodule, GrowableLinear):
        _PARENTS.setdefault(submodule, WeakSet()).add(module)


register_module_module_registration_hook(_note_parent)


class GrowableFFN(_GrowableLayer, nn.Module):
    """y = down(σ(gate(x)) · up(x)), or down(σ(up(x))), with neurons that grow during training.

    Args:
        hidden_size: size of x and y.
        intermediate_size: initial number of neurons.
        activation: σ, a name or an elementwise function.
        gated: whether neurons have a gate.
        bias: whether the projections have biases.
        growth: a seed, and fields of `tritter.methods.growth.triggers.GrowthOptions`.

    Raises:
        RequestError: a keyword or value is invalid.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
        **growth: Any,
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            reason = f"must be one of {', '.join(_ACTIVATIONS)}, or a function"
            near = nearest(activation, _ACTIVATIONS)
            raise RequestError(Problem("activation", activation, reason=reason, nearest=near))
        self.act_fn = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        block = FfnBlock(
            layer=0,
            gate="gate_proj.weight" if gated else "up_proj.weight",
            up="up_proj.weight" if gated else None,
            down="down_proj.weight",
        )
        self._loop = PlainLoop(self, _build_grower(growth), blocks=[block])

    @property
    def intermediate_size(self) -> int:
        """The current number of neurons."""
        return self.up_proj.out_features

    def forward(self, x: Tensor) -> Tensor:
        computed = self.up_proj(x)
        if self.gate_proj is None:
            computed = self.act_fn(computed)
        else:
            computed = self.act_fn(self.gate_proj(x)) * computed
        output: Tensor = self.down_proj(computed)
        self._loop.tokens.record_activations(0, x, output, computed=computed)
        return output

    def extra_repr(self) -> str:
        return f"intermediate_size={self.intermediate_size}"


class GrowableCausalLM(_Growable, nn.Module):
    """A stock model whose FFNs grow during training.

    Other attributes are those of the model: `generate`, `config`, `device`.

    Args:
        path_or_model: a folder, a hub id, or a Hugging Face model that is grown in place. Code in
            the folder is never run.
        enable_growth: whether `check_and_grow` may change the model.
        freeze_attention: train only the FFNs.
        dtype: data type that the weights of a folder are loaded in.
        growth: a seed, and fields of `tritter.methods.growth.triggers.GrowthOptions`.

    Raises:
        RequestError: the folder or hub id does not exist; the model has experts, LoRA experts or
            adapters, or an unknown family; a keyword or value is invalid.
    """

    model: nn.Module

    def __init__(
        self,
        path_or_model: str | PathLike[str] | nn.Module = _QWEN,
        *,
        enable_growth: bool = True,
        freeze_attention: bool = False,
        dtype: torch.dtype = torch.float32,
        **growth: Any,
    ) -> None:
        super().__init__()
        grower = _build_grower(growth)
        self._folder: Path | None = None
        if isinstance(path_or_model, nn.Module):
            if hasattr(path_or_model, "_orig_mod"):
                reason = "pass the model without torch.compile, and compile the result"
                raise RequestError(Problem("model", "a compiled model", reason=reason))
            if isinstance(path_or_model, GrowableCausalLM):
                raise RequestError("the model grows already.")
            refuse_wrapped(path_or_model)
            self.model = path_or_model
        else:
            self._folder = locate(path_or_model, key="model")
            require_plain(self._folder, doing="growth", key="model")
            Source.open(self._folder, read_model(self._folder)).intact()  # not after training
            self.model = load_model(self._folder, dtype=dtype).train()
        for name, module in self.model.named_modules():
            if isinstance(module, GrowableLinear):
                raise RequestError(
                    f"growth: {name} is a GrowableLinear inside a model; use a plain nn.Linear "
                    "there, because GrowableCausalLM grows the whole model."
                )
        self._is_enabled = enable_growth
        self._loop = PlainLoop(self.model, grower, is_watched=enable_growth)
        self._start = model_of(self.model)
        if freeze_attention:
            freeze_all_but_ffns(self.model)
        for block in grower.blocks if enable_growth else ():
            self._loop.attach_hooks(block)

    @property
    def neurons(self) -> list[int]:
        """The number of neurons in each layer."""
        return [block.width(self.model) for block in self._loop.grower.blocks]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return the output of the stock model."""
        return self.model(*arguments, **named)

    def save_pretrained(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder that stock transformers loads and `GrowableCausalLM` continues from.

        FFNs narrower than the widest are padded with zeros, which does not change the output;
        tritter.json records their sizes. The tokenizer is copied from the model's original folder.

        Raises:
            RequestError: the folder exists and `overwrite` is off, or it is not a checkpoint; the
                model's original folder was changed since its lineage was written.
        """
        target, origin = named_path(folder, key="folder"), self._folder
        sources = () if origin is None else (origin,)
        check_output(target, sources=sources, overwrite=overwrite)
        known, grower, journal = model_of(self.model), self._loop.grower, self._loop.journal
        records: tuple[ExpansionRecord, ...] = ()
        if journal:
            record = grower.lineage_record(
                self._start,
                known,
                options=plain(values_of(grower.options)),
                seed=grower.seed,
                digest=journal.digest(grower.reason),
                is_exact=grower.is_exact,
            )
            records = (record,)
        write_model(
            self.model,
            target,
            lineage=lambda: _lineage(origin, target, records),
            artifacts=[partial(copy_small_files, source) for source in sources],
            overwrite=overwrite,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_loop"):  # not set yet
                raise
            return getattr(self.model, name)


GrowableQwen = GrowableCausalLM  # earlier name of the class


def _lineage(origin: Path | None, target: Path, records: tuple[ExpansionRecord, ...]) -> Lineage:
    """Return the lineage of a grown model; a model without an original folder is its own base."""
    if origin is None:
        return Lineage(
            model_hash="",
            base_model_hash="",
            tensor_digests={},
            file_digests={},
            expansion_history=records,
        )
    return child_lineage(Source.open(origin, read_model(origin)), target, records)

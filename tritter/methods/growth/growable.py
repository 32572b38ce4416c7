"""What growable modules have in common: the calls of a training loop."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypedDict, Unpack
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer

from tritter.checkpoints import ExpansionRecord, Lineage, Source
from tritter.checkpoints.expert_files import refuse_experts
from tritter.checkpoints.folder import TokenizerFiles
from tritter.checkpoints.location import check_output
from tritter.core.models import config_of, load_model, read_config
from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.methods.growth.blocks import FfnBlock, freeze_all_but_ffns
from tritter.methods.growth.grower import Grower, Growth, growth_record, map_digest
from tritter.methods.growth.initialisers import GradMax, Initialiser
from tritter.methods.growth.plain_loop import PlainLoop
from tritter.methods.growth.triggers import (
    COOLDOWN,
    INITIALISERS,
    MATURATION_AGE,
    TRIGGERS,
    GrowthOptions,
    Percentile,
    Timing,
    Trigger,
)
from tritter.options import read_options, read_part
from tritter.storage.hashing import merkle_hash
from tritter.storage.hub import locate
from tritter.storage.reading import named_path
from tritter.targets import plain, values_of
from tritter.transform.folder import known_digests
from tritter.transform.live import write_model

Counts = dict[str, int]


class Growable:
    """A module that is asked to grow from a training loop.

    Between an optimizer's step and the next forward pass, before or after `zero_grad`; of an
    accumulation that is not finished the gradients would be lost.
    """

    _loop: PlainLoop
    _grows = True  # else nothing happens

    def attach(self, optimizer: Optimizer | None) -> None:
        """Say which optimizer trains this: its moments follow every growth.

        One of torch's is found at its first step, without this. None: nothing holds the parameters
        beyond an event, and what does is made anew of `parameters()`.

        Raises:
            RequestError: it is no optimizer of what grows here.
        """
        self._loop.attach(optimizer)

    def update_loss(self, loss: float | Tensor) -> None:
        """Take the loss of a step: triggers that wait for a plateau need it."""
        self._loop.note_loss(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def check_and_grow(self, *, optimizer: Optimizer | None = None) -> Counts:
        """Look whether growth is called for, and let it happen.

        Args:
            optimizer: as for `attach`, where that was not called.

        Returns:
            `born`, `replaced` and `died`: neurons that were added, that took the place of dead
            ones, and dead ones that stay.

        Raises:
            RequestError: it would grow, and it is not known what trains it.
        """
        if not self._grows:
            return counted(None)
        if optimizer is not None:
            self.attach(optimizer)
        decided = self._loop.decide()
        if not decided:
            return counted(None)
        self._check_growth_is_safe()
        return counted(self._loop.grow(decided))

    @property
    def growth_events(self) -> list[dict[str, Any]]:
        """What grew, event by event: step, layer, born, replaced, died, neurons, pressure."""
        return [dict(event) for event in self._loop.grower.events]

    def get_extra_state(self) -> dict[str, Any]:
        """Return the growth so far, which goes along in `state_dict`."""
        return self._loop.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the shapes of what grew before its weights are loaded."""
        self._loop.load_state_dict(state)

    def _check_growth_is_safe(self) -> None:
        """Raise where others rely on the shapes that there are."""


class GrowableLayer(Growable):
    """A growable module with one row of neurons."""

    def check_growth(self) -> tuple[bool, list[int]]:
        """Say whether growth is called for, and from which neurons new ones should stem."""
        decided = self._loop.decide()
        return (True, self._loop.sources(0, decided[0])) if decided else (False, [])

    def perform_growth(self, source_indices: Sequence[int]) -> dict[str, Any]:
        """Let as many neurons be born as indices are named.

        Args:
            source_indices: neurons that new ones stem from, where the initialiser copies; those
                that are dead and used again are passed over.

        Returns:
            As `check_and_grow`, and `indices`: where the new neurons stand.

        Raises:
            RequestError: there is no such neuron; it is frozen; nothing was seen of it; it is not
                known what trains it.
        """
        sources = [int(index) for index in source_indices]
        (place,), module = self._loop.grower.places, self._loop.module
        width = place.width(module)
        if not sources:
            return {**counted(None), "indices": []}
        if wrong := [index for index in sources if not 0 <= index < width]:
            reason = f"allowed are neurons from 0 to {width - 1}"
            raise RequestError(Problem("source_indices", wrong, reason=reason))
        if not place.is_trained(module):
            raise RequestError("growth: a weight that would grow is frozen; new neurons need all.")
        self._check_growth_is_safe()
        growth = None
        if self._loop.grower.pressure.neurons:
            growth = self._loop.grow({0: len(sources)}, sources={place.layer: sources})
        if growth is None:
            raise RequestError(
                "growth: nothing was seen of the neurons since they are as many as they are; take "
                "a step of training before."
            )
        places = growth.layers[place.layer].places(width)
        return {**counted(growth), "indices": places.tolist()}


def counted(growth: Growth | None) -> Counts:
    """Return how many neurons were born, replaced, and died."""
    layers = () if growth is None else growth.layers.values()
    return {
        "born": sum(each.born for each in layers),
        "replaced": sum(len(each.recycled) for each in layers),
        "died": sum(each.died for each in layers),
    }


class GrowthKeywords(TypedDict, total=False):
    """The keywords of all growable modules; what is left out is as the README has it.

    Args:
        gradient_percentile: of the pressures at earlier checks, above which a layer grows: 90.
        max_growth_per_step: neurons of a layer in one event: 10.
        growth_cooldown: steps from the beginning and between events: 200.
        maturation_age: steps until a neuron is mature: 500.
        maturation_factor: on the updates of young neurons: 2.
        enable_replacement: dead neurons are used again before others are added: False.
        dead_quantile: of all Wanda scores, below which a mature neuron is dead: 0.01.
        trigger: percentile | plateau | schedule | within_layer, or a `Trigger`.
        initialiser: gradmax | split | random | source_noise, or an `Initialiser`.
        check_every: calls sooner than so many steps after a check do nothing: 1, each is one.
        warmup_steps: before the first check: 0.
        pressure_decay: of the moving average of each neuron's gradient norm: 0.9.
        history_checks: earlier checks that pressures are compared with: 100.
        plateau_threshold: growth waits until the loss changes by less than this part: None.
        plateau_steps: that the change is taken over: 100.
        max_new_parameters: that growth adds in all: None.
        seed: of what new neurons are drawn from: 0.
    """

    gradient_percentile: float
    max_growth_per_step: int
    growth_cooldown: int
    maturation_age: int
    maturation_factor: float
    enable_replacement: bool
    dead_quantile: float
    trigger: str | Trigger
    initialiser: str | Initialiser
    check_every: int
    warmup_steps: int
    pressure_decay: float
    history_checks: int
    plateau_threshold: float | None
    plateau_steps: int
    max_new_parameters: int | None
    seed: int


_USUAL: Mapping[str, Any] = {
    "gradient_percentile": 90.0,
    "max_growth_per_step": 10,
    "growth_cooldown": COOLDOWN,
    "maturation_age": MATURATION_AGE,
    "maturation_factor": 2.0,
    "enable_replacement": False,
    "dead_quantile": 0.01,
    "trigger": "percentile",
    "initialiser": "gradmax",
    "check_every": 1,
    "warmup_steps": 0,
    "pressure_decay": 0.9,
    "history_checks": 100,
    "plateau_threshold": None,
    "plateau_steps": 100,
    "max_new_parameters": None,
}
# Of a training whose end is known, or asked elsewhere
_ELSEWHERE: Mapping[str, Any] = {"max_extra_flops": None, "freeze_attention": False}


def made_grower(asked: GrowthKeywords) -> Grower:
    """Return the engine of what was asked.

    Raises:
        RequestError: names every keyword that is wrong, and the nearest there is.
    """
    given: dict[str, Any] = dict(asked)
    seed = given.pop("seed", 0)
    problems = [
        Problem(key, value, reason="there is no such keyword", nearest=nearest(key, _USUAL))
        for key, value in given.items()
        if key not in _USUAL
    ]
    raise_problems(problems)
    values = {**_USUAL, **given}
    if (kind := TRIGGERS.get(str(values["trigger"]))) is not None and kind.needs_end:
        reason = "it acts until an end that a loop of one's own doesn't say; must be one of "
        reason += f"{', '.join(_TRIGGERS)}, or a Trigger"
        raise RequestError(Problem("trigger", kind.name, reason=reason))
    trigger = read_part("trigger", values["trigger"], _TRIGGERS, base=Trigger)
    initialiser = read_part("initialiser", values["initialiser"], INITIALISERS, base=Initialiser)
    values |= {"trigger": Percentile.name, "initialiser": GradMax.name, **_ELSEWHERE}
    options = read_options(GrowthOptions, values, prefix="", problems=problems)
    raise_problems(problems)
    assert options is not None, "there would be a problem"
    timing = Timing(
        # Whoever calls says when; how long to wait at least, the loop sees to
        check_every=1,
        cooldown=values["growth_cooldown"],
        warmup=values["warmup_steps"],
        maturation_age=values["maturation_age"],
        max_steps=None,
    )
    return Grower(
        replace(options, trigger=trigger, initialiser=initialiser), timing=timing, seed=seed
    )


# Others have to know where a training ends
_TRIGGERS = {name: kind for name, kind in TRIGGERS.items() if not kind.needs_end}


class GrowableLinear(GrowableLayer, nn.Linear):
    """`nn.Linear` that gets more outputs while it is trained, and whoever reads them more inputs.

    With a consumer both are widened in one event, and what the two compute together is kept. With
    none the layer returns the indices of its new outputs and is wider than before, which the rest
    of the model has to follow. Saved as any `nn.Linear`; a wider one's state makes it as wide.

    Args:
        consumer: a linear layer that reads all outputs and nothing else, directly or through a
            function of each element.
        growth: see `tritter.methods.growth.growable.GrowthKeywords`.

    Raises:
        RequestError: a keyword or a value that there is not, or a consumer that can't follow.
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
        **growth: Unpack[GrowthKeywords],
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._has_warned = False
        self._read: Tensor | None = None
        self._reader = () if consumer is None else (consumer,)  # no module of this one
        modules: dict[str, nn.Module] = {"layer": self}
        if consumer is not None:
            if hasattr(consumer, "base_layer"):
                raise RequestError(
                    f"consumer = {type(consumer).__name__}: LoRA adapters stand around it, and "
                    "can't follow; merge them before."
                )
            if not isinstance(consumer, nn.Linear):
                raise RequestError(
                    f"consumer = {type(consumer).__name__}: an nn.Linear is needed, whose columns "
                    "read the outputs; experts and others can't follow."
                )
            if consumer.in_features != out_features:
                raise RequestError(
                    f"consumer reads {consumer.in_features} features, and the layer has "
                    f"out_features = {out_features}; it has to read all of them, and nothing else."
                )
            consumer.register_forward_hook(self._see_consumer)
            modules["consumer"] = consumer
        place = FfnBlock(
            layer=0,
            gate="layer.weight",
            up=None,
            down=None if consumer is None else "consumer.weight",
        )
        self._loop = PlainLoop(
            nn.ModuleDict(modules),
            made_grower(growth),
            places=[place],
        )

    # Saved as any nn.Linear
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @property
    def consumer(self) -> nn.Linear | None:
        """The layer that reads the outputs."""
        return self._reader[0] if self._reader else None

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if self._reader:
            self._read = input.detach() if torch.is_grad_enabled() else None
        else:
            self._loop.tokens.see(0, input, output, computed=output)
        return output

    def _see_consumer(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if self._read is not None:
            self._loop.tokens.see(0, self._read, output, computed=arguments[0])
        self._read = None

    def _check_growth_is_safe(self) -> None:
        """Refuse growth that leaves others behind.

        Raises:
            RequestError: this is a part of an adapter, or of a model with a config.
        """
        for parent in _PARENTS.get(self, ()):
            if not any(child is self for child in parent.children()):
                continue  # another stands in its place by now
            if hasattr(parent, "lora_A"):
                raise RequestError(
                    "growth: LoRA adapters stand around this layer, and neurons can't grow below "
                    "them; merge them before."
                )
            if hasattr(getattr(parent, "config", None), "to_dict"):
                raise RequestError(
                    f"growth: this layer is a part of a Hugging Face model ({type(parent).__name__}"
                    "), whose other tensors and config have to follow; let the whole model grow "
                    "with GrowableCausalLM(model)."
                )
        if not self._reader and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "growth: this GrowableLinear has no consumer: it gets more outputs, and whatever "
                "reads them has to be widened by you; name it with consumer= to have that done.",
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


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
}


class GrowableFFN(GrowableLayer, nn.Module):
    """y = down(σ(gate(x)) · up(x)), or down(σ(up(x))), whose neurons grow while it is trained.

    Args:
        hidden_size: of x and of y.
        intermediate_size: neurons that it begins with.
        activation: σ, by name or as a function of each element.
        gated: whether neurons have a gate.
        bias: of all projections.
        growth: see `tritter.methods.growth.growable.GrowthKeywords`.

    Raises:
        RequestError: a keyword or a value that there is not.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
        **growth: Unpack[GrowthKeywords],
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            reason = f"must be one of {', '.join(ACTIVATIONS)}, or a function"
            near = nearest(activation, ACTIVATIONS)
            raise RequestError(Problem("activation", activation, reason=reason, nearest=near))
        self.act_fn = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        place = FfnBlock(
            layer=0,
            gate="gate_proj.weight" if gated else "up_proj.weight",
            up="up_proj.weight" if gated else None,
            down="down_proj.weight",
        )
        self._loop = PlainLoop(self, made_grower(growth), places=[place])

    @property
    def intermediate_size(self) -> int:
        """How many neurons there are."""
        return self.up_proj.out_features

    def forward(self, x: Tensor) -> Tensor:
        computed = self.up_proj(x)
        if self.gate_proj is None:
            computed = self.act_fn(computed)
        else:
            computed = self.act_fn(self.gate_proj(x)) * computed
        output: Tensor = self.down_proj(computed)
        self._loop.tokens.see(0, x, output, computed=computed)
        return output

    def extra_repr(self) -> str:
        return f"intermediate_size={self.intermediate_size}"


QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


class GrowableCausalLM(Growable, nn.Module):
    """A stock model, called as it is, whose layers get neurons while it is trained.

    What is not found here is the model's own: `generate`, `config`, `device`.

    Args:
        path_or_model: a folder, a hub id, or a Hugging Face model that is grown in place. No code
            of a folder is run.
        enable_growth: `check_and_grow` may change the model.
        freeze_attention: train the FFNs alone.
        dtype: that a folder's weights are loaded in.
        growth: see `tritter.methods.growth.growable.GrowthKeywords`.

    Raises:
        RequestError: no such folder, and the hub does not give it; a model of experts, with LoRA
            experts beside it, below adapters, or of a family that is not known; a keyword or a
            value that there is not.
    """

    model: nn.Module

    def __init__(
        self,
        path_or_model: str | PathLike[str] | nn.Module = QWEN,
        *,
        enable_growth: bool = True,
        freeze_attention: bool = False,
        dtype: torch.dtype = torch.float32,
        **growth: Unpack[GrowthKeywords],
    ) -> None:
        super().__init__()
        grower = made_grower(growth)
        self._folder: Path | None = None
        if isinstance(path_or_model, nn.Module):
            self.model = path_or_model
        else:
            self._folder = locate(fspath(path_or_model), key="path_or_model")
            refuse_experts(self._folder, doing="growth", key="path_or_model")
            self.model = load_model(self._folder, dtype=dtype).train()
        for name, module in self.model.named_modules():
            if isinstance(module, GrowableLinear):
                raise RequestError(
                    f"growth: {name} is a GrowableLinear, whose neurons other tensors of the model "
                    "have to follow; leave a plain nn.Linear there, and the whole model grows."
                )
        self._grows = enable_growth
        self._loop = PlainLoop(self.model, grower, is_watched=enable_growth)
        self._start = config_of(self.model)
        if freeze_attention:
            freeze_all_but_ffns(self.model)
        for place in grower.places if enable_growth else ():
            self._loop.hook_into(self.model.get_submodule(place.module), place.layer)

    @property
    def neurons(self) -> list[int]:
        """How many each layer has."""
        return [place.width(self.model) for place in self._loop.grower.places]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Return what the stock model does."""
        return self.model(*arguments, **named)

    def save_pretrained(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder that stock transformers loads, and that `GrowableCausalLM` goes on from.

        FFNs that are narrower than the widest are padded with zeros, which changes nothing;
        tritter.json says how wide they are. A tokenizer comes along from where the model does.

        Raises:
            RequestError: something stands there and `overwrite` is off, or it is no checkpoint; the
                folder that the model comes from was changed since its lineage was written.
        """
        target, origin = named_path(folder, key="folder"), self._folder
        sources = () if origin is None else (origin,)
        check_output(target, sources=sources, overwrite=overwrite)
        known, grower, journal = config_of(self.model), self._loop.grower, self._loop.journal
        records: tuple[ExpansionRecord, ...] = ()
        if journal:
            record = growth_record(
                self._start,
                known,
                options=plain(values_of(grower.asked)),
                seed=grower.seed,
                digest=map_digest(journal),
                is_exact=grower.is_exact,
            )
            records = (record,)
        write_model(
            self.model,
            target,
            lineage=lambda: _lineage(origin, target, records),
            artifacts=[None if origin is None else TokenizerFiles(origin)],
            sources=sources,
            overwrite=overwrite,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_loop"):  # it is not there yet
                raise
            return getattr(self.model, name)


GrowableQwen = GrowableCausalLM  # the README's name


def _lineage(origin: Path | None, target: Path, records: tuple[ExpansionRecord, ...]) -> Lineage:
    """Return the lineage of a model that grew; one that came from nowhere is its own base."""
    if origin is None:
        return Lineage(
            model_hash="",
            base_model_hash="",
            tensor_digests={},
            file_digests={},
            expansion_history=records,
        )
    source = Source.open(origin, read_config(origin))
    parent, digests = source.lineage, source.read_digests()
    parent_hash = merkle_hash(digests)
    return Lineage(
        model_hash="",
        parent_hash=parent_hash,
        parent_path=os.path.relpath(origin, target),
        parent_tensor_digests=None if parent else digests,
        parent_file_digests=None if parent else known_digests(origin),
        base_model_hash=parent.base_model_hash if parent else parent_hash,
        tensor_digests={},
        file_digests={},
        expansion_history=(*(parent.expansion_history if parent else ()), *records),
        training_config=parent.training_config if parent else {},
        split=parent.split if parent else None,
        domains=parent.domains if parent else {},
    )

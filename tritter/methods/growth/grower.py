"""Growth of one model: what is seen of it, when it grows, and what becomes of it.

The callback of a run and the models of a plain loop stand on the same engine; it changes nothing
itself, but says what `tritter.training.surgery` is to do.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.checkpoints import ExpansionRecord
from tritter.core.families import Config, Port, family_of, with_ffn_sizes
from tritter.core.models import config_of
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.core.parameter_map.tensor_map import NO_SOURCE
from tritter.methods.growth.blocks import FFN, ActivationProbe, FfnBlock, ffn_blocks
from tritter.methods.growth.initialisers import Layer, NewNeurons
from tritter.methods.growth.triggers import GrowthOptions, Timing, View, affordable, is_plateau
from tritter.seeds import derived_seed
from tritter.training.parameters import Entry
from tritter.transform import Change
from tritter.transform.change import declared

GROWTH = "growth"  # type and method in the lineage, reason in a training's journal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerGrowth:
    """What becomes of one FFN.

    Args:
        neurons: k new ones.
        recycled: int64 [r], r ≤ k: the places of dead neurons that the first of them take; the
            others are appended.
        died: dead neurons that stay what they are.
    """

    neurons: NewNeurons
    recycled: Tensor
    died: int = 0

    @property
    def born(self) -> int:
        """How many are appended."""
        return self.neurons.gate.shape[0] - len(self.recycled)

    def places(self, width: int) -> Tensor:
        """Return where the new neurons stand, int64 [k], in an FFN that was `width` wide."""
        return torch.cat([self.recycled, torch.arange(width, width + self.born)])


def growth_change(model: nn.Module, growths: Mapping[int, LayerGrowth]) -> Change:
    """Return the change of a live model whose layers get new neurons."""
    config = config_of(model)
    family = family_of(config)
    logical = family.logical_tensors(config)
    widths = [family.dimensions(config, layer=n).intermediate_size
              for n in range(family.dimensions(config).num_hidden_layers)]  # fmt: skip
    maps = dict(ParameterMap.identity([t.name for t in logical], num_layers=len(widths)).tensors)
    for layer, growth in growths.items():
        unit_map = neuron_map(growth, widths[layer])
        for tensor in logical:
            spaces = [axis.space.kind for axis in tensor.axes]
            if tensor.layer != layer or FFN not in spaces:
                continue
            axes = tuple(
                unit_map.factor(axis.port) if axis.space.kind == FFN else None
                for axis in tensor.axes
            )
            part = tensor.kind.removeprefix("ffn.") if len(axes) == 2 else None
            fill = _given(growth, part)
            maps[tensor.name] = TensorMap(source=tensor.name, axes=axes, fill=fill)
        widths[layer] += growth.born
    parameter_map = ParameterMap(maps, tuple(range(len(widths))))
    target = with_ffn_sizes(config, widths, key=family.sizes["intermediate_size"])
    return Change.of(parameter_map, config, target)


def module_change(
    model: nn.Module, places: Mapping[int, FfnBlock], growths: Mapping[int, LayerGrowth]
) -> Change:
    """Return the same change of a module that no family knows.

    Args:
        places: layer → where its neurons lie.
    """
    before, after, maps = [], [], {}
    for layer, growth in growths.items():
        place = places[layer]
        unit_map = neuron_map(growth, place.width(model))
        parts = {place.gate: "gate", place.up: "up", place.down: "down"}
        for name, dim in place.axes(model):
            shape = list(model.get_parameter(name).shape)
            before.append(declared(name, tuple(shape)))
            shape[dim] += growth.born
            after.append(declared(name, tuple(shape)))
            axes: list[AxisFactor | None] = [None] * len(shape)
            axes[dim] = unit_map.factor(Port.WRITE if dim == 0 else Port.READ)
            fill = _given(growth, parts.get(name))
            source = before[-1].parts[0].tensor.name
            maps[source] = TensorMap(source=source, axes=tuple(axes), fill=fill)
    return Change(config={}, before=tuple(before), after=tuple(after), tensors=maps)


@dataclass(frozen=True, slots=True, eq=False)
class NeuronMap:
    """The map of an FFN's neurons, in which recycled ones have lost what they were.

    Args:
        source: int64 [N], as in AxisMap; `share` likewise, float64 [N].
    """

    source: Tensor
    share: Tensor

    def factor(self, port: Port) -> AxisFactor:
        """Return the factor of an axis of neurons."""
        kept = (self.source != NO_SOURCE).double()
        if port is Port.READ:
            return AxisFactor(self.source, self.share, kept)
        # Of WRITE_NONLINEAR p = 1, so that gradients have the share as well
        return AxisFactor(self.source, kept, self.share)


def neuron_map(growth: LayerGrowth, width: int) -> NeuronMap:
    """Return the map of the neurons of an FFN that was `width` wide.

    Without recycled ones it is an AxisMap: what copies share adds up to what their source wrote.
    """
    source = torch.cat([torch.arange(width), torch.full((growth.born,), NO_SOURCE)])
    share = torch.ones(len(source), dtype=torch.float64)
    source[growth.recycled] = NO_SOURCE
    places = growth.places(width)
    share[places] = 0.0
    if growth.neurons.source is not None:
        source[places] = growth.neurons.source
        for place, copied in zip(places.tolist(), growth.neurons.source.tolist(), strict=True):
            taken = growth.neurons.share * float(share[copied])
            share[place] = taken
            share[copied] -= taken
    if not len(growth.recycled):
        AxisMap.copied(width, source, share)  # raises where the function would not be kept
    return NeuronMap(source, share)


def _given(growth: LayerGrowth, part: str | None) -> Fill:
    """Return what stands in new neurons; biases, which are no part, begin at zero."""
    if growth.neurons.source is not None or part is None:
        return Fill()
    if part == "up" and growth.neurons.up is None:
        part = "gate"  # where there is no gate, up is all that neurons read by
    values: Tensor = getattr(growth.neurons, part)
    return Fill(kind="given", values=values.contiguous())


MAX_LOSSES = 20_000  # of the last steps
MAX_ROWS = 1_000  # of the growth map
_UNTRAINED = -1.0  # in the place of a pressure
TRAINING_FLOPS = 6  # of a parameter and a token


@dataclass(slots=True)
class Counts:
    """What growth has done so far."""

    born: int = 0
    replaced: int = 0
    died: int = 0
    checks: int = 0
    new_parameters: int = 0
    extra_flops: float = 0.0
    last_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Growth:
    """What a model is to become at an event.

    Args:
        change: for `tritter.training.surgery`.
        layers: layer → what becomes of its FFN.
    """

    change: Change
    layers: Mapping[int, LayerGrowth]


@dataclass(slots=True)
class GrowthMap:
    """What the growth map is drawn of: a row for each check, thinned where there are many."""

    steps: list[int] = field(default_factory=list)
    neurons: list[list[int]] = field(default_factory=list)
    pressure: list[list[float]] = field(default_factory=list)

    def add(self, step: int, neurons: list[int], pressure: list[float]) -> None:
        """Take down a check."""
        if len(self.steps) == MAX_ROWS:
            for rows in (self.steps, self.neurons, self.pressure):
                del rows[1::2]
        self.steps.append(step)
        self.neurons.append(neurons)
        self.pressure.append([round(each, 6) for each in pressure])


class Grower:
    """Watches a model and says how it grows.

    Args:
        asked: the keys of `growth`.
        timing: of this training.
        seed: of what new neurons are drawn from.
        tokens_per_step: of all processes; 0: not known, and FLOPs are not counted.
    """

    def __init__(
        self,
        asked: GrowthOptions,
        *,
        timing: Timing,
        seed: int,
        tokens_per_step: int = 0,
    ) -> None:
        self.asked, self.timing = asked, timing
        self.trigger, self.initialiser = asked.trigger, asked.initialiser
        self.pressure = Pressure(asked.pressure_decay)
        self.maturity = Maturity(age=timing.maturation_age, factor=asked.maturation_factor)
        self.counts, self.map = Counts(), GrowthMap()
        self.events: list[dict[str, Any]] = []
        self.start: list[int] = []
        self.places: tuple[FfnBlock, ...] = ()
        self._new: dict[int, Tensor] = {}
        self._is_whole_model = True
        self.seed = seed
        self._tokens_per_step = tokens_per_step
        self._history: list[list[float]] = []
        has_losses = asked.trigger.needs_losses or asked.plateau_threshold is not None
        self._losses: deque[float] = deque(
            maxlen=max(asked.plateau_steps, MAX_LOSSES) if has_losses else 0
        )

    def begin(
        self,
        model: nn.Module,
        *,
        places: Sequence[FfnBlock] | None = None,
        restored: Mapping[str, Any] | None = None,
        new: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Begin to watch a model, or go on.

        Args:
            places: of a module that no family knows; None: the FFNs of a whole model.
            restored: what `state_dict` returned.
            new: layer → int64 [k], neurons that an expansion has just made: until they can have
                matured they are not dead, however little they write yet.

        Raises:
            RequestError: the model is none that can grow.
        """
        self._is_whole_model = places is None
        self.places = ffn_blocks(model) if places is None else tuple(places)
        self._new = dict(new or {})
        if restored is None:
            widths = {place.layer: place.width(model) for place in self.places}
            self.maturity.begin(widths)
            self.start = list(widths.values())
            return
        self.pressure.load_state_dict(restored["pressure"])
        self.maturity.load_state_dict(restored["maturity"])
        self._history = [list(each) for each in restored["history"]]
        self._losses.extend(restored["losses"])
        self.events = [dict(each) for each in restored["events"]]
        self.counts, self.map = Counts(**restored["counts"]), GrowthMap(**restored["map"])
        self.start = list(restored["start"])

    @property
    def is_exact(self) -> bool:
        """Every event claims to keep the function."""
        return self.initialiser.is_exact and not self.asked.enable_replacement

    @property
    def keeps_losses(self) -> bool:
        return self._losses.maxlen != 0

    def note_loss(self, loss: float) -> None:
        """Keep the loss of a step, nats per token, the same in all processes.

        In place of one that is not finite the last one stands, as its step is refused.
        """
        if isfinite(loss) or self._losses:
            self._losses.append(loss if isfinite(loss) else self._losses[-1])

    def may_grow_after(self, step: int) -> bool:
        """Say whether the model may grow after so many steps, so that it has to be looked at."""
        is_last = step == self.timing.max_steps  # what is born then would never be trained
        is_cool = step - self.counts.last_step >= self.timing.cooldown or not self.trigger.waits()
        return self.trigger.is_due(step, self.timing) and is_cool and not is_last

    def is_check(self, step: int) -> bool:
        """Say whether the trigger is asked after so many steps."""
        return self.trigger.is_due(step, self.timing) and bool(self.pressure.neurons)

    def decide(self, model: nn.Module, step: int) -> dict[int, int]:
        """Return layer → how many neurons it gets after so many steps; a check, if one is due."""
        if not self.is_check(step):
            return {}
        # The trigger is shown the layers that are trained, as if they were all
        pressures = self.pressure.of_layers(self.places).tolist()
        trained = [n for n, place in enumerate(self.places) if place.is_trained(model)]
        places = [self.places[n] for n in trained]
        parameters = [self._neuron_parameters(model, place) for place in places]
        flops_left = self._flops_left(step)
        rows = [[row[n] for n in trained] for row in self._history]
        known = [row for row in rows if _UNTRAINED not in row]
        view = View(
            step=step,
            pressures=torch.tensor([pressures[n] for n in trained], dtype=torch.float64),
            neuron_pressures=[self.pressure.neurons[place.layer] for place in places],
            history=torch.tensor(known, dtype=torch.float64).reshape(-1, len(places)),
            losses=list(self._losses),
            neuron_parameters=parameters,
            neuron_flops=[each * flops_left for each in parameters],
            new_parameters=self.counts.new_parameters,
            extra_flops=self.counts.extra_flops,
            num_events=len({event["step"] for event in self.events}),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            options=self.asked,
            timing=self.timing,
        )
        decided = dict(self.trigger.decide(view)) if trained and self.may_grow_after(step) else {}
        threshold = self.asked.plateau_threshold
        if threshold is not None and decided and not is_plateau(view, threshold):
            decided = {}
        self.counts.checks += 1
        now = [each if n in trained else _UNTRAINED for n, each in enumerate(pressures)]
        self._history = [*self._history, now][-self.asked.history_checks :]
        self.map.add(step, [place.width(model) for place in self.places], pressures)
        # What the budgets leave of it, layers of high pressure first
        counts = dict[int, int]()
        new_parameters, extra_flops = view.new_parameters, view.extra_flops
        for n in sorted(decided, key=lambda n: -float(view.pressures[n])):
            most = affordable(view, n, new_parameters=new_parameters, extra_flops=extra_flops)
            count = min(decided[n], self.asked.max_growth_per_step)
            count = count if most is None else min(count, most)
            if count > 0:
                counts[trained[n]] = count
                new_parameters += count * view.neuron_parameters[n]
                extra_flops += count * view.neuron_flops[n]
        return dict(sorted(counts.items()))

    def growth(
        self,
        model: nn.Module,
        decided: Mapping[int, int],
        probes: Mapping[int, ActivationProbe],
        *,
        step: int,
        sources: Mapping[int, Sequence[int]] | None = None,
    ) -> Growth | None:
        """Return what the model is to become; None where nothing finite was seen of the layers.

        Args:
            decided: number of an FFN → neurons.
            looks: layer → tokens of the step, of all processes.
            sources: layer → neurons that new ones may stem from; absent: those of the highest
                pressure.
        """
        if not all(look.is_finite for look in probes.values()):
            return None  # the step was refused
        places = {self.places[n].layer: self.places[n] for n in decided}
        counts = {self.places[n].layer: count for n, count in decided.items()}
        dead: dict[int, Tensor] = {}
        if self.asked.enable_replacement:
            scores = {
                place.layer: wanda_scores(model, place, probes[place.layer])
                for place in self.places
                if place.layer in probes
            }
            young = {layer: self.maturity.young(layer, step) for layer in scores}
            if step < self.timing.maturation_age:  # nor are those of an expansion old enough
                for layer in young.keys() & self._new.keys():
                    young[layer] = torch.cat([young[layer], self._new[layer]]).unique()
            dead = dead_neurons(scores, young, quantile=self.asked.dead_quantile)
        layers = {}
        for layer, place in places.items():
            if layer not in probes:
                continue
            found = dead.get(layer, torch.empty(0, dtype=torch.int64))
            recycled = found[: min(counts[layer], place.width(model) - 1)]
            gate, up, down = place.weights(model)
            asked = (sources or {}).get(layer, ())
            neurons = self.initialiser.neurons(
                Layer(
                    gate=gate,
                    up=up,
                    down=down,
                    gate_bias=place.bias(model, place.gate),
                    activation=place.activation(model),
                    look=probes[layer],
                    sources=self._sources(layer, recycled, count=counts[layer], asked=asked),
                    seed=derived_seed(self.seed, "growth", layer, step),
                )
            )
            died = len(found) - len(recycled)
            layers[layer] = LayerGrowth(neurons=neurons, recycled=recycled, died=died)
        if not layers:
            return None
        is_whole = self._is_whole_model
        change = growth_change(model, layers) if is_whole else module_change(model, places, layers)
        return Growth(change=change, layers=layers)

    def grown(self, model: nn.Module, growth: Growth, *, step: int, **said: Any) -> None:
        """Take down an event, when the model has changed.

        Args:
            said: what else its records say.
        """
        of_layer = {place.layer: n for n, place in enumerate(self.places)}
        for layer, each in growth.layers.items():
            place = self.places[of_layer[layer]]
            width = place.width(model)
            slots = each.places(width - each.born)
            pressure = self.map.pressure[-1][of_layer[layer]] if self.map.pressure else 0.0
            self.pressure.grow(layer, slots, width)
            self.maturity.grow(layer, slots, width, step=step)
            record = {
                "step": step,
                "layer": layer,
                "born": each.born,
                "replaced": len(each.recycled),
                "died": each.died,
                "neurons": width,
                "pressure": pressure,
            }
            self.events.append(record | said)
            self.counts.born += each.born
            self.counts.replaced += len(each.recycled)
            self.counts.died += each.died
            added = each.born * self._neuron_parameters(model, place)
            self.counts.new_parameters += added
            self.counts.extra_flops += added * self._flops_left(step)
        self.counts.last_step = step

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in plain containers and tensors."""
        return {
            "pressure": self.pressure.state_dict(),
            "maturity": self.maturity.state_dict(),
            "history": [list(each) for each in self._history],
            "losses": list(self._losses),
            "events": [dict(each) for each in self.events],
            "counts": asdict(self.counts),
            "map": asdict(self.map),
            "start": list(self.start),
        }

    def _flops_left(self, step: int) -> float:
        """Return the training FLOPs of one parameter from here on."""
        steps = 0 if self.timing.max_steps is None else max(0, self.timing.max_steps - step)
        return float(TRAINING_FLOPS * self._tokens_per_step * steps)

    def _neuron_parameters(self, model: nn.Module, place: FfnBlock) -> int:
        """Return of how many parameters one neuron is made."""
        names = (name for name, _ in place.axes(model))
        return sum(model.get_parameter(name).numel() for name in names) // place.width(model)

    def _sources(self, layer: int, recycled: Tensor, *, count: int, asked: Sequence[int]) -> Tensor:
        """Return which neurons new ones may stem from, int64 [k]; those asked for come first."""
        pressures = self.pressure.neurons[layer].clone()
        pressures[list(asked)] = torch.inf
        pressures[recycled.to(pressures.device)] = -1.0  # what is taken away is no source
        sources = pressures.topk(min(count, len(pressures) - len(recycled))).indices
        if len(sources) < count:
            sources = sources.repeat(-(-count // len(sources)))[:count]
        return sources.cpu()


class Pressure:
    """Moving averages of the gradient norms of every neuron, and of the whole gradient.

    ema ← decay · ema + (1 − decay) · |∇w|, of a neuron over its rows of gate and up. A step whose
    gradient is not finite is left out, as it is refused.

    Args:
        decay: of both averages.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.neurons: dict[int, Tensor] = {}  # layer → float32 [F]
        self._whole = torch.zeros(())

    @torch.no_grad()
    def observe(
        self, model: nn.Module, places: Sequence[FfnBlock], *, whole: Tensor | None = None
    ) -> None:
        """Take the gradients that the parameters hold.

        Args:
            whole: norm of the whole gradient, where `model` is a part of what is trained.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = (nn.utils.get_total_norm(gradients) if whole is None else whole).float()
        is_finite = torch.isfinite(norm)
        self._whole = self._next(self._whole.to(norm), norm, is_finite)
        for place in places:
            parts = [model.get_parameter(name) for name in place.rows]
            rows = [
                torch.linalg.vector_norm(
                    place.turned(part.grad),
                    dim=1,
                    dtype=torch.promote_types(part.dtype, torch.float32),
                ).float()
                for part in parts
                if part.grad is not None
            ]
            norms = parts[0].new_zeros(place.width(model), dtype=torch.float32)
            if rows:
                norms = torch.stack(rows).square().sum(dim=0).sqrt()
            before = self.neurons.get(place.layer, torch.zeros_like(norms)).to(norms)
            self.neurons[place.layer] = self._next(before, norms, is_finite)

    def of_layers(self, places: Sequence[FfnBlock]) -> Tensor:
        """Return each layer's mean in proportion to the whole gradient's norm, float64 [L].

        What is common to all, a falling loss or a hard batch, is no sign of one layer.
        """
        means = torch.stack([self.neurons[place.layer].mean() for place in places])
        return (means / self._whole.clamp_min(1e-30)).double().cpu()

    def grow(self, layer: int, places: Tensor, width: int) -> None:
        """Let new neurons begin with the mean of their layer."""
        old = self.neurons[layer]
        new = old.new_full((width,), float(old.mean()))
        new[: len(old)] = old
        new[places.to(new.device)] = old.mean()
        self.neurons[layer] = new

    def state_dict(self) -> dict[str, Any]:
        return {"neurons": dict(self.neurons), "whole": self._whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.neurons = {int(layer): value for layer, value in state["neurons"].items()}
        self._whole = state["whole"]

    def _next(self, before: Tensor, now: Tensor, is_finite: Tensor) -> Tensor:
        return torch.where(is_finite, torch.lerp(now, before, self._decay), before)


def wanda_scores(model: nn.Module, place: FfnBlock, look: ActivationProbe) -> Tensor:
    """Return |w|·‖x‖ of every neuron, float32 [F]: Sun et al. 2023, arXiv 2306.11695.

    x is what a neuron computes of the tokens, as a root mean square; w its column of down, 1 where
    nobody knows it.
    """
    gate, up, down = place.weights(model)
    computed = look.computed
    if computed is None:
        summed = F.linear(look.inputs, gate, place.bias(model, place.gate))  # [T, F]
        computed = place.activation(model)(summed)
        if up is not None and place.up is not None:
            computed = computed * F.linear(look.inputs, up, place.bias(model, place.up))
    strength = computed.square().mean(dim=0).sqrt()
    return strength if down is None else strength * torch.linalg.vector_norm(down, dim=0)


def dead_neurons(
    scores: Mapping[int, Tensor], young: Mapping[int, Tensor], *, quantile: float
) -> dict[int, Tensor]:
    """Return layer → int64 [d], its dead neurons, those of the lowest score first.

    Args:
        scores: layer → float32 [F].
        young: layer → int64 [k], neurons that can't be dead.
        quantile: of the scores of all layers together, each in proportion to its layer's median,
            below which a mature neuron is dead.
    """
    relative = {n: each / each.median().clamp_min(1e-30) for n, each in scores.items()}
    row = torch.cat(list(relative.values()))
    # Evenly thinned: torch takes no quantile of more than 2**24 values
    threshold = torch.quantile(row[:: -(-len(row) // 2**20)], quantile)
    found = {}
    for layer, each in relative.items():
        is_dead = each < threshold
        is_dead |= each == 0
        is_dead[young[layer].to(each.device)] = False
        places = is_dead.nonzero().squeeze(1)
        found[layer] = places[each[places].argsort(stable=True)].cpu()
    return found


# How old neurons are, and larger updates for the young ones.
#
# The update is scaled, not the gradient: Adam does not see how large a gradient is.

OLD = -(2**31)  # when neurons were born that stood there before


class Maturity:
    """When each neuron was born.

    Args:
        age: steps after which a neuron is mature.
        factor: on the updates of young ones.
    """

    def __init__(self, *, age: int, factor: float) -> None:
        self._age = age
        self._factor = factor
        self._latest = OLD  # step of the last birth
        self._born: dict[int, Tensor] = {}  # layer → int64 [F], the steps taken then
        self._before: dict[tuple[str, int], Tensor] = {}
        self._young: dict[int, Tensor] = {}
        self._measured: tuple[FfnBlock, ...] = ()
        self._whole: dict[str, Tensor] = {}
        self.update_norms: dict[str, float] = {}  # of the last step that was measured
        self._sums: dict[str, list[float]] = {}  # of all of them: sum, number

    def begin(self, widths: Mapping[int, int]) -> None:
        """Take the neurons of a model that begins for mature."""
        self._born = {n: torch.full((w,), OLD, dtype=torch.int64) for n, w in widths.items()}

    def grow(self, layer: int, places: Tensor, width: int, *, step: int) -> None:
        """Let neurons be born."""
        old = self._born[layer]
        self._born[layer] = torch.cat([old, old.new_full((width - len(old),), step)])
        self._born[layer][places] = step
        self._latest = max(self._latest, step)

    def young(self, layer: int, step: int) -> Tensor:
        """Return which neurons of a layer are not mature after so many steps, int64 [k]."""
        return (step - self._born[layer] < self._age).nonzero().squeeze(1)

    def ages(self, step: int) -> list[int]:
        """Return the ages of all young neurons, in steps."""
        born = (self._born[layer][self.young(layer, step)] for layer in self._born)
        return [step - each for layer in born for each in layer.tolist()]

    @torch.no_grad()
    def before_update(
        self, model: nn.Module, places: Sequence[FfnBlock], step: int, *, is_measured: bool = False
    ) -> None:
        """Keep what young neurons are, right before the optimizer's step.

        Args:
            step: steps taken.
            is_measured: find `update_norms`, of the layers that have young neurons.
        """
        self._before, self._young, self._measured = {}, {}, ()
        if step - self._latest >= self._age:
            return
        for place in places:
            if len(young := self.young(place.layer, step)):
                self._young[place.layer] = young
                for name, dim in place.parts:
                    parameter = model.get_parameter(name)
                    index = young.to(parameter.device)
                    self._before[name, dim] = parameter.detach().index_select(dim, index)
        self._measured = tuple(p for p in places if is_measured and p.layer in self._young)
        self._whole = {
            name: model.get_parameter(name).detach().clone()
            for place in self._measured
            for name in place.rows
        }

    @torch.no_grad()
    def after_update(self, model: nn.Module, places: Sequence[FfnBlock]) -> None:
        """Let young neurons go further the way that the optimizer took them."""
        by_name = {name: p.layer for p in places for name, _ in p.parts}
        for (name, dim), before in self._before.items():
            parameter = model.get_parameter(name)
            index = self._young[by_name[name]].to(parameter.device)
            moved = parameter.detach().index_select(dim, index)
            scaled = torch.lerp(before.float(), moved.float(), self._factor).to(parameter.dtype)
            parameter.detach().index_copy_(dim, index, scaled)
        self._before = {}
        if self._measured:
            # The mean norm of a neuron's update, of young and of mature ones
            sums = {"young": [0.0, 0], "old": [0.0, 0]}
            for place in self._measured:
                moves = [
                    torch.linalg.vector_norm(
                        place.turned(model.get_parameter(name).detach() - self._whole[name]), dim=1
                    )
                    for name in place.rows
                ]
                norms = torch.stack(moves).square().sum(dim=0).sqrt()
                is_young = torch.zeros_like(norms, dtype=torch.bool)
                is_young[self._young[place.layer].to(norms.device)] = True
                for name, chosen in (("young", norms[is_young]), ("old", norms[~is_young])):
                    sums[name][0] += float(chosen.sum())
                    sums[name][1] += len(chosen)
            self._whole = {}
            self.update_norms = {n: total / count for n, (total, count) in sums.items() if count}
            for name, norm in self.update_norms.items():
                total, number = self._sums.get(name, [0.0, 0.0])
                self._sums[name] = [total + norm, number + 1]

    def mean_update_norm(self, name: str) -> float | None:
        """Return the mean of `update_norms` over a training; None where nothing was measured."""
        total, number = self._sums.get(name, [0.0, 0.0])
        return total / number if number else None

    def state_dict(self) -> dict[str, Any]:
        sums = {name: list(each) for name, each in self._sums.items()}
        return {"born": dict(self._born), "update_norms": dict(self.update_norms), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._born = {int(layer): value for layer, value in state["born"].items()}
        self._latest = max(int(born.max()) for born in self._born.values())
        self.update_norms = dict(state["update_norms"])
        self._sums = {name: list(each) for name, each in state["sums"].items()}


def map_digest(journal: Iterable[Entry]) -> str:
    """Return the SHA-256 over the maps of all events of growth in a journal."""
    maps = (entry["map_digest"] for entry in journal if entry["reason"] == GROWTH)
    return sha256("".join(maps).encode()).hexdigest()


def growth_record(
    before: Config,
    after: Config,
    *,
    options: Mapping[str, Any],
    seed: int,
    digest: str,
    is_exact: bool,
    function_change: float | None = None,
) -> ExpansionRecord:
    """Return the record of what grew in one training.

    Args:
        before: config when it began; `after` when it ended.
        digest: of its maps.
        is_exact: every event claims to keep the function.
        function_change: the largest that was measured.
    """
    return ExpansionRecord(
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        expansion_type=GROWTH,
        method=GROWTH,
        options=options,
        seed=seed,
        source_config=before,
        target_config=after,
        layer_sources=tuple(range(family_of(after).dimensions(after).num_hidden_layers)),
        map_digest=digest,
        claims_exact=is_exact,
        step0_error=function_change,
    )

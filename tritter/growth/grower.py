"""Growth of one model: what is seen of it, when it grows, and what becomes of it.

The callback of a run and the models of a plain loop stand on the same engine; it changes nothing
itself, but says what `tritter.training.surgery` is to do.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tritter.expand import Change
from tritter.growth.change import LayerGrowth, growth_change, module_change
from tritter.growth.initialisers import Initialiser, Layer
from tritter.growth.look import Look
from tritter.growth.maturity import Maturity
from tritter.growth.options import GrowthOptions, Timing
from tritter.growth.places import FfnPlace, ffn_places
from tritter.growth.pressure import Pressure
from tritter.growth.replacement import dead_neurons, wanda_scores
from tritter.growth.triggers import Trigger, View, affordable, is_plateau
from tritter.seeds import derived_seed

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
        died: layer → dead neurons that stay what they are.
    """

    change: Change
    layers: Mapping[int, LayerGrowth]
    died: Mapping[int, int]


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
        trigger: Trigger,
        initialiser: Initialiser,
        *,
        timing: Timing,
        seed: int,
        tokens_per_step: int = 0,
    ) -> None:
        self.asked, self.timing = asked, timing
        self.trigger, self.initialiser = trigger, initialiser
        self.pressure = Pressure(asked.pressure_decay)
        self.maturity = Maturity(age=timing.maturation_age, factor=asked.maturation_factor)
        self.counts, self.map = Counts(), GrowthMap()
        self.events: list[dict[str, Any]] = []
        self.start: list[int] = []
        self.places: tuple[FfnPlace, ...] = ()
        self._new: dict[int, Tensor] = {}
        self._is_whole_model = True
        self.seed = seed
        self._tokens_per_step = tokens_per_step
        self._history: list[list[float]] = []
        has_losses = trigger.needs_losses or asked.plateau_threshold is not None
        self._losses: deque[float] = deque(
            maxlen=max(asked.plateau_steps, MAX_LOSSES) if has_losses else 0
        )

    def begin(
        self,
        model: nn.Module,
        *,
        places: Sequence[FfnPlace] | None = None,
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
        self.places = ffn_places(model) if places is None else tuple(places)
        self._new = dict(new or {})
        if restored is None:
            widths = {place.layer: place.width(model) for place in self.places}
            self.maturity.begin(widths)
            self.start = list(widths.values())
        else:
            self._load(restored)

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
        is_cool = self._is_cool(step) or not self.trigger.waits(self.asked)
        return self._is_due(step) and is_cool and not is_last

    def is_check(self, step: int) -> bool:
        """Say whether the trigger is asked after so many steps."""
        return self._is_due(step) and bool(self.pressure.neurons)

    def decide(self, model: nn.Module, step: int) -> dict[int, int]:
        """Return layer → how many neurons it gets after so many steps; a check, if one is due."""
        if not self.is_check(step):
            return {}
        pressures = self.pressure.of_layers(self.places).tolist()
        trained = [n for n, place in enumerate(self.places) if place.is_trained(model)]
        view = self._view(model, step, trained, [pressures[n] for n in trained])
        decided = dict(self.trigger.decide(view)) if trained and self.may_grow_after(step) else {}
        if self.asked.plateau_threshold is not None and decided:
            decided = decided if is_plateau(view, self.asked.plateau_threshold) else {}
        self.counts.checks += 1
        known = [each if n in trained else _UNTRAINED for n, each in enumerate(pressures)]
        self._history = [*self._history, known][-self.asked.history_checks :]
        self.map.add(step, [place.width(model) for place in self.places], pressures)
        return {trained[n]: count for n, count in self._affordable(view, decided).items()}

    def growth(
        self,
        model: nn.Module,
        decided: Mapping[int, int],
        looks: Mapping[int, Look],
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
        if not all(look.is_finite for look in looks.values()):
            return None  # the step was refused
        places = {self.places[n].layer: self.places[n] for n in decided}
        counts = {self.places[n].layer: count for n, count in decided.items()}
        dead: dict[int, Tensor] = {}
        if self.asked.enable_replacement:
            scores = {
                place.layer: wanda_scores(model, place, looks[place.layer])
                for place in self.places
                if place.layer in looks
            }
            young = {layer: self._too_young(layer, step) for layer in scores}
            dead = dead_neurons(scores, young, quantile=self.asked.dead_quantile)
        layers, died = {}, {}
        for layer, place in places.items():
            if layer not in looks:
                continue
            found = dead.get(layer, torch.empty(0, dtype=torch.int64))
            recycled = found[: min(counts[layer], place.width(model) - 1)]
            died[layer] = len(found) - len(recycled)
            own = self._sources(
                layer, recycled, count=counts[layer], asked=(sources or {}).get(layer, ())
            )
            neurons = self.initialiser.neurons(
                self._layer(model, place, looks[layer], own, step=step)
            )
            layers[layer] = LayerGrowth(neurons=neurons, recycled=recycled)
        if not layers:
            return None
        is_whole = self._is_whole_model
        change = growth_change(model, layers) if is_whole else module_change(model, places, layers)
        return Growth(change=change, layers=layers, died=died)

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
                "died": growth.died[layer],
                "neurons": width,
                "pressure": pressure,
            }
            self.events.append(record | said)
            self.counts.born += each.born
            self.counts.replaced += len(each.recycled)
            self.counts.died += growth.died[layer]
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
            "counts": {name: getattr(self.counts, name) for name in Counts.__slots__},
            "map": {name: list(getattr(self.map, name)) for name in GrowthMap.__slots__},
            "start": list(self.start),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.pressure.load_state_dict(state["pressure"])
        self.maturity.load_state_dict(state["maturity"])
        self._history = [list(each) for each in state["history"]]
        self._losses.extend(state["losses"])
        self.events = [dict(each) for each in state["events"]]
        self.counts, self.map = Counts(**state["counts"]), GrowthMap(**state["map"])
        self.start = list(state["start"])

    def _too_young(self, layer: int, step: int) -> Tensor:
        """Return the neurons of a layer that can't be dead yet, int64 [k]."""
        young = self.maturity.young(layer, step)
        if step >= self.timing.maturation_age or layer not in self._new:
            return young
        return torch.cat([young, self._new[layer]]).unique()

    def _is_due(self, step: int) -> bool:
        return self.trigger.is_due(step, self.timing, self.asked)

    def _is_cool(self, step: int) -> bool:
        return step - self.counts.last_step >= self.timing.cooldown

    def _view(
        self, model: nn.Module, step: int, trained: Sequence[int], pressures: Sequence[float]
    ) -> View:
        """Return what the trigger is shown: of the layers that are trained, as if they were all."""
        places = [self.places[n] for n in trained]
        parameters = [self._neuron_parameters(model, place) for place in places]
        flops = self._flops_left(step)
        rows = [[row[n] for n in trained] for row in self._history]
        known = [row for row in rows if _UNTRAINED not in row]
        return View(
            step=step,
            pressures=torch.tensor(pressures, dtype=torch.float64),
            neuron_pressures=[self.pressure.neurons[place.layer] for place in places],
            history=torch.tensor(known, dtype=torch.float64).reshape(-1, len(places)),
            losses=list(self._losses),
            neuron_parameters=parameters,
            neuron_flops=[each * flops for each in parameters],
            new_parameters=self.counts.new_parameters,
            extra_flops=self.counts.extra_flops,
            num_events=len({event["step"] for event in self.events}),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            options=self.asked,
            timing=self.timing,
        )

    def _affordable(self, view: View, decided: Mapping[int, int]) -> dict[int, int]:
        """Return what the budgets leave of a decision, layers of high pressure first."""
        left = dict[int, int]()
        parameters, flops = view.new_parameters, view.extra_flops
        for layer in sorted(decided, key=lambda n: -float(view.pressures[n])):
            most = affordable(view, layer, new_parameters=parameters, extra_flops=flops)
            count = min(decided[layer], self.asked.max_growth_per_step)
            count = count if most is None else min(count, most)
            if count > 0:
                left[layer] = count
                parameters += count * view.neuron_parameters[layer]
                flops += count * view.neuron_flops[layer]
        return dict(sorted(left.items()))

    def _flops_left(self, step: int) -> float:
        """Return the training FLOPs of one parameter from here on."""
        steps = 0 if self.timing.max_steps is None else max(0, self.timing.max_steps - step)
        return float(TRAINING_FLOPS * self._tokens_per_step * steps)

    def _neuron_parameters(self, model: nn.Module, place: FfnPlace) -> int:
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

    def _layer(
        self, model: nn.Module, place: FfnPlace, look: Look, sources: Tensor, *, step: int
    ) -> Layer:
        gate, up, down = place.weights(model)
        return Layer(
            gate=gate,
            up=up,
            down=down,
            gate_bias=place.bias(model, place.gate),
            activation=place.activation(model),
            look=look,
            sources=sources,
            seed=derived_seed(self.seed, "growth", place.layer, step),
        )

"""Growth of one model: its statistics, its decisions, and the changes that follow.

The callback of a run and the growable modules share this engine. It does not change the model
itself, but returns the change for `tritter.training.surgery`.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.checkpoints import ExpansionRecord
from tritter.core.families import Model, Port
from tritter.core.models import model_of
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.core.parameter_map.axis_map import NO_SOURCE
from tritter.errors import TritterError, brief
from tritter.methods.growth.blocks import ActivationProbe, FfnBlock
from tritter.methods.growth.initialisers import Layer, NewNeurons
from tritter.methods.growth.triggers import GrowthOptions, Timing, View
from tritter.seeds import derived_seed
from tritter.transform import Change
from tritter.transform.change import declared

_FFN = "ffn"  # kind of the growing space
_MAX_LOSSES = 20_000  # of the most recent steps
_MAX_ROWS = 1_000  # rows of the growth map
_UNTRAINED = -1.0  # marks a layer without a pressure
_TRAINING_FLOPS = 6  # per parameter and token
_OLD = -(2**31)  # birth step of neurons that the model started with


def _growth_change(model: nn.Module, growths: Mapping[int, NewNeurons]) -> Change:
    """Return the change of a live model whose FFNs get new neurons."""
    source = model_of(model).widened
    family, logical, layers = source.family, source.tensors, source.sizes.num_hidden_layers
    widths = [*(source.ffn_sizes or [source.sizes.intermediate_size] * layers)]
    maps = dict(ParameterMap.identity([t.name for t in logical], num_layers=len(widths)).tensors)
    for layer, neurons in growths.items():
        factors = _neuron_factors(neurons, widths[layer])
        for tensor in logical:
            spaces = [axis.space.kind for axis in tensor.axes]
            if tensor.layer != layer or _FFN not in spaces:
                continue
            axes = tuple(
                factors[axis.port] if axis.space.kind == _FFN else None for axis in tensor.axes
            )
            part = family.ffn_part(tensor)
            fill = _initial_values(neurons, part)
            if fill.values is not None and family.neuron_axis(tensor) != (part == "down"):
                fill = replace(fill, values=fill.values.T.contiguous())  # inputs first
            maps[tensor.name] = TensorMap(source=tensor.name, axes=axes, fill=fill)
        widths[layer] += neurons.born
    parameter_map = ParameterMap(maps, tuple(range(len(widths))))
    return Change.of(parameter_map, source, source.with_ffn_sizes(widths))


def _module_change(
    model: nn.Module, blocks: Mapping[int, FfnBlock], growths: Mapping[int, NewNeurons]
) -> Change:
    """Return the change of a module that is not a model of a known family."""
    before, after, maps = [], [], {}
    for layer, neurons in growths.items():
        block = blocks[layer]
        factors = _neuron_factors(neurons, block.width(model))
        parts = {block.gate: "gate", block.up: "up", block.down: "down"}
        for name, dim in block.axes(model):
            shape = list(model.get_parameter(name).shape)
            before.append(declared(name, tuple(shape)))
            shape[dim] += neurons.born
            after.append(declared(name, tuple(shape)))
            axes: list[AxisFactor | None] = [None] * len(shape)
            axes[dim] = factors[Port.WRITE if dim == 0 else Port.READ]
            fill = _initial_values(neurons, parts.get(name, ""))
            source = before[-1].parts[0].tensor.name
            maps[source] = TensorMap(source=source, axes=tuple(axes), fill=fill)
    return Change(model=None, before=tuple(before), after=tuple(after), tensors=maps)


def _neuron_factors(neurons: NewNeurons, width: int) -> dict[Port, AxisFactor]:
    """Return the factors of axes of neurons, in an FFN that had `width` neurons, by their port.

    Recycled neurons have no source. Without them it is a valid AxisMap: the shares of copies and
    source sum to one.
    """
    indices = neurons.indices(width)
    source, share = torch.arange(width + neurons.born), torch.ones(width + neurons.born).double()
    source[indices], share[indices] = NO_SOURCE, 0.0
    if neurons.source is not None:
        source[indices] = neurons.source
        for index, copied in zip(indices.tolist(), neurons.source.tolist(), strict=True):
            copied_share = neurons.share * float(share[copied])
            share[index] = copied_share
            share[copied] -= copied_share
    if not neurons.recycled:
        AxisMap.copied(width, source, share)  # raises if the function would change
    kept = (source != NO_SOURCE).double()
    # WRITE_NONLINEAR has p = 1, so gradients are scaled by the share, too
    written = AxisFactor(source, kept, share)
    return dict.fromkeys(Port, written) | {Port.READ: AxisFactor(source, share, kept)}


def _initial_values(neurons: NewNeurons, part: str) -> Fill:
    """Return the initial values of one part of new neurons; biases, without a part, are zero."""
    if neurons.source is not None or not part:
        return Fill()
    if part == "up" and neurons.up is None:
        part = "gate"  # without a gate, `gate` stores the weights of up
    values: Tensor = getattr(neurons, part)
    return Fill(kind="given", values=values.contiguous())


@dataclass(slots=True)
class _GrowthMap:
    """Data of the growth map: one row per check, thinned to `_MAX_ROWS`."""

    steps: list[int] = field(default_factory=list)
    neurons: list[list[int]] = field(default_factory=list)
    pressure: list[list[float]] = field(default_factory=list)

    def add(self, step: int, neurons: list[int], pressure: list[float]) -> None:
        """Add the row of a check."""
        if len(self.steps) == _MAX_ROWS:
            for rows in (self.steps, self.neurons, self.pressure):
                del rows[1::2]
        self.steps.append(step)
        self.neurons.append(neurons)
        self.pressure.append([round(each, 6) for each in pressure])


class Grower:
    """Observes a model and decides when, where and how it grows.

    Args:
        options: the options of `growth`.
        timing: schedule of this training run.
        seed: seed of the random numbers for new neurons.
        tokens_per_step: tokens of all processes; 0 if unknown, so that FLOPs are not counted.
    """

    reason = "growth"  # in a run's journal and reports; type and method in the lineage

    def __init__(
        self, options: GrowthOptions, *, timing: Timing, seed: int, tokens_per_step: int = 0
    ) -> None:
        self.options, self.timing = options, timing
        self.trigger, self.initialiser = options.trigger, options.initialiser
        self.pressure = _Pressure(options.pressure_decay)
        self.maturity = _Maturity(age=timing.maturation_age, factor=options.maturation_factor)
        self.map = _GrowthMap()
        self.events: list[dict[str, Any]] = []
        self.num_checks, self.new_parameters, self.extra_flops = 0, 0, 0.0
        self.start: list[int] = []
        self.blocks: tuple[FfnBlock, ...] = ()
        self._new: dict[int, Tensor] = {}
        self._is_whole_model = True
        self.seed = seed
        self._tokens_per_step = tokens_per_step
        self._history: list[list[float]] = []
        has_losses = options.trigger.needs_losses or options.plateau_threshold is not None
        self._losses: deque[float] = deque(
            maxlen=max(options.plateau_steps, _MAX_LOSSES) if has_losses else 0
        )

    def begin(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[FfnBlock] | None = None,
        restored: Mapping[str, Any] | None = None,
        new: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Start to observe a model, or resume.

        Args:
            blocks: the FFNs of a module that is not a model; None: those of a whole model.
            restored: the result of `state_dict`.
            new: layer → int64 [k], neurons that an expansion has just added. They do not count as
                dead before they could have matured.
        """
        self._is_whole_model = blocks is None
        self.blocks = FfnBlock.all_of(model) if blocks is None else tuple(blocks)
        self._new = dict(new or {})
        if restored is None:
            widths = {block.layer: block.width(model) for block in self.blocks}
            self.maturity.begin(widths)
            self.start = list(widths.values())
            return
        self.pressure.load_state_dict(restored["pressure"])
        self.maturity.load_state_dict(restored["maturity"])
        self._history = [list(each) for each in restored["history"]]
        self._losses.clear()
        self._losses.extend(restored["losses"])
        self.events = [dict(each) for each in restored["events"]]
        self.map, counts = _GrowthMap(**restored["map"]), restored["counts"]
        self.num_checks, self.new_parameters = counts["checks"], counts["new_parameters"]
        self.extra_flops = counts["extra_flops"]
        self.start = list(restored["start"])

    def total(self, kind: str) -> int:
        """Return the number of neurons that were `born`, `replaced` or `died` so far."""
        return sum(event[kind] for event in self.events)

    @property
    def last_step(self) -> int:
        """The step of the last event; 0 before the first."""
        return self.events[-1]["step"] if self.events else 0

    @property
    def is_exact(self) -> bool:
        """True if every event claims to preserve the function."""
        return self.initialiser.is_exact and not self.options.enable_replacement

    @property
    def needs_losses(self) -> bool:
        return self._losses.maxlen != 0

    def note_loss(self, loss: float) -> None:
        """Record the loss of a step in nats per token, the same in all processes.

        A loss that is not finite is replaced by the previous one, because its step is skipped.
        """
        if isfinite(loss) or self._losses:
            self._losses.append(loss if isfinite(loss) else self._losses[-1])

    def may_grow_after(self, step: int) -> bool:
        """Return True if the model may grow after step `step`, so that activations are needed."""
        is_last = step == self.timing.max_steps  # new neurons would never be trained
        is_cool = step - self.last_step >= self.timing.cooldown or not self.trigger.has_cooldown()
        return self.trigger.is_due(step, self.timing) and is_cool and not is_last

    def is_check(self, step: int) -> bool:
        """Return True if the trigger is evaluated after step `step`."""
        return self.trigger.is_due(step, self.timing) and bool(self.pressure.neurons)

    def decide(self, model: nn.Module, step: int) -> dict[int, int]:
        """Return {layer: number of new neurons} after step `step`; a check, if one is due."""
        if not self.is_check(step):
            return {}
        # The trigger sees only the trained layers
        pressures = self.pressure.of_layers(self.blocks).tolist()
        trained = [n for n, block in enumerate(self.blocks) if block.is_trained(model)]
        blocks = [self.blocks[n] for n in trained]
        parameters = [self._neuron_parameters(model, block) for block in blocks]
        flops_left = self._flops_left(step)
        rows = [[row[n] for n in trained] for row in self._history]
        known = [row for row in rows if _UNTRAINED not in row]
        view = View(
            step=step,
            pressures=torch.tensor([pressures[n] for n in trained], dtype=torch.float64),
            neuron_pressures=[self.pressure.neurons[block.layer] for block in blocks],
            history=torch.tensor(known, dtype=torch.float64).reshape(len(known), len(blocks)),
            losses=list(self._losses),
            neuron_parameters=parameters,
            neuron_flops=[each * flops_left for each in parameters],
            new_parameters=self.new_parameters,
            extra_flops=self.extra_flops,
            num_events=len({event["step"] for event in self.events}),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            options=self.options,
            timing=self.timing,
        )
        decided = dict(self.trigger.decide(view)) if trained and self.may_grow_after(step) else {}
        if any(n not in range(len(view.pressures)) or count < 0 for n, count in decided.items()):
            reason = f"layers 0 to {len(view.pressures) - 1} and their numbers of new neurons"
            kind = type(self.trigger).__name__
            raise TritterError(f"{kind} must return {reason}, not {brief(decided)}.")
        threshold = self.options.plateau_threshold
        if threshold is not None and decided and not view.is_plateau(threshold):
            decided = {}
        self.num_checks += 1
        now = [each if n in trained else _UNTRAINED for n, each in enumerate(pressures)]
        self._history = [*self._history, now][-self.options.history_checks :]
        self.map.add(step, [block.width(model) for block in self.blocks], pressures)
        # Apply the budgets, layers of high pressure first
        counts = dict[int, int]()
        new_parameters, extra_flops = view.new_parameters, view.extra_flops
        for n in sorted(decided, key=lambda n: -float(view.pressures[n])):
            most = view.affordable(n, new_parameters=new_parameters, extra_flops=extra_flops)
            count = min(decided[n], self.options.max_growth_per_step)
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
    ) -> dict[int, NewNeurons]:
        """Return layer → its new neurons; empty if no finite activations were recorded.

        Args:
            decided: index of an FFN → number of new neurons.
            probes: layer → activations of the step, of all processes.
            sources: layer → preferred source neurons; by default those with the highest pressure.
        """
        if not all(probe.is_finite for probe in probes.values()):
            return {}  # the step was skipped
        dead: dict[int, Tensor] = {}
        if self.options.enable_replacement:
            scores = {
                block.layer: _wanda_scores(model, block, probes[block.layer])
                for block in self.blocks
                if block.layer in probes
            }
            young = {layer: self.maturity.young(layer, step) for layer in scores}
            if step < self.timing.maturation_age:  # neurons of an expansion are not mature either
                for layer in young.keys() & self._new.keys():
                    young[layer] = torch.cat([young[layer], self._new[layer]]).unique()
            dead = _dead_neurons(scores, young, quantile=self.options.dead_quantile)
        growths = {}
        for n, count in decided.items():
            block = self.blocks[n]
            if (layer := block.layer) not in probes:
                continue
            found = dead.get(layer, torch.empty(0, dtype=torch.int64))
            recycled = found[: min(count, block.width(model) - 1)]
            gate, up, down = block.weights(model)
            preferred = (sources or {}).get(layer, ())
            neurons = self.initialiser.neurons(
                Layer(
                    gate=gate,
                    up=up,
                    down=down,
                    gate_bias=block.bias(model, block.gate),
                    activation=block.activation(model),
                    probe=probes[layer],
                    sources=self._sources(layer, recycled, count=count, preferred=preferred),
                    seed=derived_seed(self.seed, "growth", layer, step),
                )
            )
            growths[layer] = replace(
                neurons, recycled=tuple(recycled.tolist()), died=len(found) - len(recycled)
            )
        return growths

    def change(self, model: nn.Module, growths: Mapping[int, NewNeurons]) -> Change:
        """Return the change that adds new neurons, for `tritter.training.surgery`."""
        if self._is_whole_model:
            return _growth_change(model, growths)
        return _module_change(model, {block.layer: block for block in self.blocks}, growths)

    def record_event(
        self, model: nn.Module, growths: Mapping[int, NewNeurons], *, step: int, **extra: Any
    ) -> None:
        """Record an event after the model has changed.

        Args:
            extra: further fields of its records.
        """
        of_layer = {block.layer: n for n, block in enumerate(self.blocks)}
        for layer, each in growths.items():
            block = self.blocks[of_layer[layer]]
            width = block.width(model)
            indices = each.indices(width - each.born)
            pressure = self.map.pressure[-1][of_layer[layer]] if self.map.pressure else 0.0
            self.pressure.grow(layer, indices, width)
            self.maturity.grow(layer, indices, width, step=step)
            record = {
                "step": step,
                "layer": layer,
                "born": each.born,
                "replaced": len(each.recycled),
                "died": each.died,
                "neurons": width,
                "pressure": pressure,
            }
            self.events.append(record | extra)
            added = each.born * self._neuron_parameters(model, block)
            self.new_parameters += added
            self.extra_flops += added * self._flops_left(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, in plain containers and tensors."""
        return {
            "pressure": self.pressure.state_dict(),
            "maturity": self.maturity.state_dict(),
            "history": [list(each) for each in self._history],
            "losses": list(self._losses),
            "events": [dict(each) for each in self.events],
            "counts": {
                **{kind: self.total(kind) for kind in ("born", "replaced", "died")},
                "checks": self.num_checks,
                "new_parameters": self.new_parameters,
                "extra_flops": self.extra_flops,
                "last_step": self.last_step,
            },
            "map": asdict(self.map),
            "start": list(self.start),
        }

    @classmethod
    def lineage_record(
        cls,
        before: Model,
        after: Model,
        *,
        options: Mapping[str, Any],
        seed: int,
        digest: str,
        is_exact: bool,
        function_change: float | None = None,
    ) -> ExpansionRecord:
        """Return the lineage record of the growth in one training run.

        Args:
            before: the model at the start of the run.
            after: the model at its end.
            digest: checksum of all maps.
            is_exact: True if every event claims to preserve the function.
            function_change: the largest measured change.
        """
        return ExpansionRecord(
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            expansion_type=cls.reason,
            method=cls.reason,
            options=options,
            seed=seed,
            source_config=before.config,
            target_config=after.config,
            layer_sources=tuple(range(after.sizes.num_hidden_layers)),
            map_digest=digest,
            claims_exact=is_exact,
            step0_error=function_change,
        )

    def _flops_left(self, step: int) -> float:
        """Return the FLOPs of training one parameter until the end of the run."""
        steps = 0 if self.timing.max_steps is None else max(0, self.timing.max_steps - step)
        return float(_TRAINING_FLOPS * self._tokens_per_step * steps)

    def _neuron_parameters(self, model: nn.Module, block: FfnBlock) -> int:
        """Return the number of parameters of one neuron."""
        names = (name for name, _ in block.axes(model))
        return sum(model.get_parameter(name).numel() for name in names) // block.width(model)

    def _sources(
        self, layer: int, recycled: Tensor, *, count: int, preferred: Sequence[int]
    ) -> Tensor:
        """Return the source neurons of new ones, int64 [k]; preferred ones come first."""
        pressures = self.pressure.neurons[layer].clone()
        pressures[list(preferred)] = torch.inf
        pressures[recycled.to(pressures.device)] = -1.0  # recycled neurons are no sources
        sources = pressures.topk(min(count, len(pressures) - len(recycled))).indices
        if len(sources) < count:
            sources = sources.repeat(-(-count // len(sources)))[:count]
        return sources.cpu()


class _Pressure:
    """Moving averages of the gradient norm of every neuron, and of the whole gradient.

    ema ← decay · ema + (1 − decay) · |∇w|, for a neuron over its rows of gate and up. Steps with a
    non-finite gradient are ignored, because they are skipped.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.neurons: dict[int, Tensor] = {}  # layer → float32 [F]
        self._whole = torch.zeros(())

    @torch.no_grad()
    def observe(
        self, model: nn.Module, blocks: Sequence[FfnBlock], *, whole: Tensor | None = None
    ) -> None:
        """Update the averages with the gradients of the parameters.

        Args:
            whole: norm of the whole gradient, if `model` is only part of what is trained.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = (nn.utils.get_total_norm(gradients) if whole is None else whole).float()
        is_finite = torch.isfinite(norm)
        self._whole = self._next(self._whole.to(norm), norm, is_finite)
        for block in blocks:
            parts = [model.get_parameter(name) for name in block.rows]
            rows = [
                torch.linalg.vector_norm(
                    block.outputs_first(part.grad),
                    dim=1,
                    dtype=torch.promote_types(part.dtype, torch.float32),
                ).float()
                for part in parts
                if part.grad is not None
            ]
            norms = parts[0].new_zeros(block.width(model), dtype=torch.float32)
            if rows:
                norms = torch.stack(rows).square().sum(dim=0).sqrt()
            before = self.neurons.get(block.layer, torch.zeros_like(norms)).to(norms)
            self.neurons[block.layer] = self._next(before, norms, is_finite)

    def of_layers(self, blocks: Sequence[FfnBlock]) -> Tensor:
        """Return each layer's mean relative to the norm of the whole gradient, float64 [L].

        The ratio cancels effects common to all layers, such as a falling loss or a hard batch.
        """
        means = torch.stack([self.neurons[block.layer].mean() for block in blocks])
        return (means / self._whole.clamp_min(1e-30)).double().cpu()

    def grow(self, layer: int, indices: Tensor, width: int) -> None:
        """Initialise new neurons with the mean of their layer."""
        old = self.neurons[layer]
        new = old.new_full((width,), float(old.mean()))
        new[: len(old)] = old
        new[indices.to(new.device)] = old.mean()
        self.neurons[layer] = new

    def state_dict(self) -> dict[str, Any]:
        return {"neurons": dict(self.neurons), "whole": self._whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.neurons = {int(layer): value for layer, value in state["neurons"].items()}
        self._whole = state["whole"]

    def _next(self, before: Tensor, now: Tensor, is_finite: Tensor) -> Tensor:
        return torch.where(is_finite, torch.lerp(now, before, self._decay), before)


def _wanda_scores(model: nn.Module, block: FfnBlock, probe: ActivationProbe) -> Tensor:
    """Return |w|·‖x‖ of every neuron, float32 [F]: Sun et al. 2023, arXiv 2306.11695.

    x is the activation of a neuron over the tokens, as a root mean square. w is its column of down,
    or 1 if that is unknown.
    """
    gate, up, down = block.weights(model)
    computed = probe.computed
    if computed is None:
        summed = F.linear(probe.inputs, gate, block.bias(model, block.gate))  # [T, F]
        computed = block.activation(model)(summed)
        if up is not None and block.up is not None:
            computed = computed * F.linear(probe.inputs, up, block.bias(model, block.up))
    strength = computed.square().mean(dim=0).sqrt()
    return strength if down is None else strength * torch.linalg.vector_norm(down, dim=0)


def _dead_neurons(
    scores: Mapping[int, Tensor], young: Mapping[int, Tensor], *, quantile: float
) -> dict[int, Tensor]:
    """Return {layer: int64 [d]}, the dead neurons of each layer, lowest score first.

    Args:
        scores: layer → float32 [F].
        young: layer → int64 [k], neurons that are exempt.
        quantile: a mature neuron is dead if its score, relative to the median of its layer, is
            below this quantile of all layers' relative scores.
    """
    relative = {n: each / each.median().clamp_min(1e-30) for n, each in scores.items()}
    row = torch.cat(list(relative.values()))
    # Subsampled evenly: torch.quantile is limited to 2**24 values
    threshold = torch.quantile(row[:: -(-len(row) // 2**20)], quantile)
    found = {}
    for layer, each in relative.items():
        is_dead = each < threshold
        is_dead |= each == 0
        is_dead[young[layer].to(each.device)] = False
        candidates = is_dead.nonzero().squeeze(1)
        found[layer] = candidates[each[candidates].argsort(stable=True)].cpu()
    return found


# The age of neurons, and larger updates for young ones.
#
# The update is scaled, not the gradient: Adam is invariant to the scale of the gradient.


class _Maturity:
    """Birth steps of all neurons, and scaled updates of young ones."""

    def __init__(self, *, age: int, factor: float) -> None:
        self._age = age
        self._factor = factor
        self._latest = _OLD  # step of the last birth
        self._born: dict[int, Tensor] = {}  # layer → int64 [F], birth step
        self._before: dict[tuple[str, int], Tensor] = {}
        self._young: dict[int, Tensor] = {}
        self._measured: tuple[FfnBlock, ...] = ()
        self._whole: dict[str, Tensor] = {}
        self.update_norms: dict[str, float] = {}  # of the last measured step
        self._sums: dict[str, list[float]] = {}  # sum and number of all measurements

    def begin(self, widths: Mapping[int, int]) -> None:
        """Mark all neurons of a model as mature."""
        self._born = {n: torch.full((w,), _OLD, dtype=torch.int64) for n, w in widths.items()}

    def grow(self, layer: int, indices: Tensor, width: int, *, step: int) -> None:
        """Add newborn neurons."""
        old = self._born[layer]
        self._born[layer] = torch.cat([old, old.new_full((width - len(old),), step)])
        self._born[layer][indices] = step
        self._latest = max(self._latest, step)

    def young(self, layer: int, step: int) -> Tensor:
        """Return the indices of a layer's neurons that are not yet mature, int64 [k]."""
        return (step - self._born[layer] < self._age).nonzero().squeeze(1)

    def ages(self, step: int) -> list[int]:
        """Return the ages of all young neurons, in steps."""
        born = (self._born[layer][self.young(layer, step)] for layer in self._born)
        return [step - each for layer in born for each in layer.tolist()]

    @torch.no_grad()
    def before_update(
        self, model: nn.Module, blocks: Sequence[FfnBlock], step: int, *, is_measured: bool = False
    ) -> None:
        """Store the weights of young neurons right before the optimizer step.

        Args:
            step: number of steps taken.
            is_measured: compute `update_norms` for the layers with young neurons.
        """
        self._before, self._young, self._measured = {}, {}, ()
        if step - self._latest >= self._age:
            return
        for block in blocks:
            if len(young := self.young(block.layer, step)):
                self._young[block.layer] = young
                for name, dim in block.parts:
                    parameter = model.get_parameter(name)
                    index = young.to(parameter.device)
                    self._before[name, dim] = parameter.detach().index_select(dim, index)
        self._measured = tuple(p for p in blocks if is_measured and p.layer in self._young)
        self._whole = {
            name: model.get_parameter(name).detach().clone()
            for block in self._measured
            for name in block.rows
        }

    @torch.no_grad()
    def after_update(self, model: nn.Module, blocks: Sequence[FfnBlock]) -> None:
        """Scale the updates that the optimizer applied to young neurons."""
        by_name = {name: p.layer for p in blocks for name, _ in p.parts}
        for (name, dim), before in self._before.items():
            parameter = model.get_parameter(name)
            index = self._young[by_name[name]].to(parameter.device)
            moved = parameter.detach().index_select(dim, index)
            dtype = torch.promote_types(moved.dtype, torch.float32)
            scaled = torch.lerp(before.to(dtype), moved.to(dtype), self._factor).to(moved.dtype)
            parameter.detach().index_copy_(dim, index, scaled)
        self._before = {}
        if self._measured:
            # The mean update norm of young and of mature neurons
            sums = {"young": [0.0, 0], "old": [0.0, 0]}
            for block in self._measured:
                moves = [
                    torch.linalg.vector_norm(
                        block.outputs_first(model.get_parameter(name).detach() - self._whole[name]),
                        dim=1,
                    )
                    for name in block.rows
                ]
                norms = torch.stack(moves).square().sum(dim=0).sqrt()
                is_young = torch.zeros_like(norms, dtype=torch.bool)
                is_young[self._young[block.layer].to(norms.device)] = True
                for name, chosen in (("young", norms[is_young]), ("old", norms[~is_young])):
                    sums[name][0] += float(chosen.sum())
                    sums[name][1] += len(chosen)
            self._whole = {}
            self.update_norms = {n: total / count for n, (total, count) in sums.items() if count}
            for name, norm in self.update_norms.items():
                total, number = self._sums.get(name, [0.0, 0.0])
                self._sums[name] = [total + norm, number + 1]

    def mean_update_norm(self, name: str) -> float | None:
        """Return the mean of `update_norms` over a run; None if nothing was measured."""
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

"""Growth in your own training loop: what it observes, and when the module may change.

The optimizer is detected at its first step by hooks that torch calls for every optimizer. It must
be known: an optimizer that keeps the old parameters would silently train them after growth.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tritter.core.models import refuse_wrapped
from tritter.data.batches import num_ranks
from tritter.errors import RequestError
from tritter.methods.growth.blocks import ActivationProbe, FfnBlock, FfnObserver, sample_rows
from tritter.methods.growth.grower import Grower
from tritter.methods.growth.initialisers import NewNeurons
from tritter.training.parameters import Journal, reshape
from tritter.training.surgery import apply_plain

_FORMAT_VERSION = 1
_MAX_TOKENS = 256  # per layer, of the last batch


class PlainLoop:
    """The growth of one module in your own training loop.

    Args:
        module: the module whose parameter names the blocks use.
        blocks: the FFNs of a module that is not a model; None: those of a whole model.
        is_watched: observe the optimizers that train the module.
    """

    def __init__(
        self,
        module: nn.Module,
        grower: Grower,
        *,
        blocks: Sequence[FfnBlock] | None = None,
        is_watched: bool = True,
    ) -> None:
        grower.begin(module, blocks=blocks)
        self.module, self.grower, self.tokens = module, grower, _LastTokens()
        self.journal = Journal()
        self._blocks, self._is_watched = blocks, is_watched
        self._check_every = grower.options.check_every or 1  # minimum steps between checks
        self._num_steps, self._num_losses = 0, 0
        self._checked, self._decided = -1, dict[int, int]()
        self._is_attached = self._is_rebuilt = self._is_superseded = self._has_warned = False
        self._optimizers: WeakSet[Optimizer]
        self._unrelated: WeakKeyDictionary[Optimizer, int]  # number of parameters when last checked
        self._replaced: dict[int, ref[nn.Parameter]]
        self._start_watching()

    @property
    def steps(self) -> int:
        """Optimizer steps taken, or recorded losses if no optimizer is known."""
        return self._num_steps or self._num_losses

    def attach(self, optimizer: Optimizer | None) -> None:
        """Set the optimizer that trains the module.

        Args:
            optimizer: None: nothing keeps the parameters beyond a growth event.

        Raises:
            RequestError: the optimizer trains none of the parameters that grow.
        """
        if hasattr(optimizer, "step_was_skipped"):  # of Accelerate; the optimizer inside it steps
            optimizer = getattr(optimizer, "optimizer", optimizer)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise RequestError(
                f"optimizer = {type(optimizer).__name__}: must be a torch.optim.Optimizer; for "
                "a wrapper, pass the optimizer inside it."
            )
        if optimizer is not None and not self._holds(optimizer):
            raise RequestError(
                f"{type(optimizer).__name__} contains none of the parameters that grow; create it "
                "from the module's parameters() before calling attach."
            )
        self._is_attached, self._is_rebuilt = True, optimizer is None
        self._optimizers = WeakSet(() if optimizer is None else (optimizer,))

    def attach_hooks(self, block: FfnBlock) -> None:
        """Record the activations of an FFN, replacing any earlier loop that did."""
        for name, _ in block.parts:
            module = self.module.get_submodule(name.removesuffix(".weight"))
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    observer = getattr(hook, "__self__", None)
                    other = getattr(getattr(observer, "record", None), "__self__", None)
                    if isinstance(other, PlainLoop):
                        other._is_superseded = True
                        _WATCHING.discard(other)
                        del hooks[key]
        FfnObserver(self.record_activations, block.layer).attach(self.module, block)

    def note_loss(self, loss: float) -> None:
        """Record the loss of a step."""
        self._num_losses += 1
        if self.grower.needs_losses:
            self.grower.note_loss(loss)
        if not self._optimizers and self._is_watched:  # no optimizer hook observes the gradients
            self.grower.pressure.observe(self.module, self.grower.blocks)

    def decide(self) -> dict[int, int]:
        """Return {block index: number of new neurons}; a check, if one is due.

        Raises:
            RequestError: another loop has replaced this one, or there are several processes.
        """
        self._refuse_processes()
        if self._is_superseded:
            raise RequestError("growth: a newer GrowableCausalLM wraps this model; use that one.")
        step = self.steps
        if step == self._checked:
            return dict(self._decided)
        if self._checked >= 0 and step - self._checked < self._check_every:
            return {}
        if not self.grower.pressure.neurons:
            is_late = self._num_losses >= self.grower.timing.cooldown
            if is_late and self._is_watched and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    "growth: no gradient of a growing parameter was observed: no torch optimizer "
                    "with these parameters has taken a step; call attach(optimizer).",
                    stacklevel=3,
                )
            return {}
        self._checked, self._decided = step, self.grower.decide(self.module, step)
        return dict(self._decided)

    def sources(self, number: int, count: int) -> list[int]:
        """Return the neurons of the highest pressure, repeated if there are fewer than `count`."""
        pressures = self.grower.pressure.neurons[self.grower.blocks[number].layer]
        highest = pressures.topk(min(count, len(pressures))).indices.tolist()
        return (highest * -(-count // len(highest)))[:count]

    def grow(
        self, decided: Mapping[int, int], *, sources: Mapping[int, Sequence[int]] | None = None
    ) -> dict[int, NewNeurons]:
        """Grow blocks; return layer → its new neurons.

        Nothing grows if no batch was observed at the blocks' current sizes.

        Args:
            decided: block index → number of new neurons.
            sources: layer → source neurons.

        Raises:
            RequestError: the optimizer is not known, or there are several.
        """
        grower, step = self.grower, self.steps
        self._refuse_processes()
        refuse_wrapped(self.module)
        tracked = [each for each in self._optimizers if self._holds(each) and not self._is_rebuilt]
        if len(tracked) > 1:
            names = ", ".join(sorted(type(each).__name__ for each in tracked))
            raise RequestError(
                f"growth: {len(tracked)} optimizers train what grows ({names}); use a single one."
            )
        if not tracked and not self._is_attached:
            raise RequestError(
                "growth: no optimizer of the growing parameters is known, and an existing one "
                "would keep the old parameters: call attach(optimizer), or attach(None) and "
                "create yours again from parameters() after each event."
            )
        probes = self.tokens.probes(self.module, grower.blocks)
        growths = grower.growth(self.module, decided, probes, step=step, sources=sources)
        if not growths:
            return {}
        change = grower.change(self.module, growths)
        old = {name: self.module.get_parameter(name) for name in self._shapes()}
        apply_plain(self.module, change, optimizer=tracked[0] if tracked else None)
        # Remember replaced parameters while other objects refer to them
        self._replaced = {n: r for n, r in self._replaced.items() if r() is not None}
        for name, parameter in old.items():
            if self.module.get_parameter(name) is not parameter:
                self._replaced[id(parameter)] = ref(parameter)
        self._unrelated.clear()
        for each in [o for o in self._optimizers if self._is_rebuilt or not self._holds(o)]:
            self._optimizers.discard(each)
        if change.model is not None:
            self.journal.record(change, step=step, reason=grower.reason)
        grower.record_event(self.module, growths, step=step)
        self.tokens.clear()
        self._decided = {}
        return growths

    def _refuse_processes(self) -> None:
        if num_ranks() > 1:
            raise RequestError(
                "growth: with several processes in your own loop, each would grow differently, "
                "and DDP would keep the old parameters; train with python train.py "
                "growth=foam trainer=ddp."
            )

    # Compiled, the step count would be a guard, so that every step would be compiled again
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record_activations(self, layer: int, inputs: Tensor, output: Tensor) -> None:
        """Record activations of an FFN if growth may follow."""
        if self.grower.may_grow_after(self.steps + 1):
            self.tokens.record_activations(layer, inputs, output)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that another loop needs to resume, in plain containers and tensors."""
        return {
            "format_version": _FORMAT_VERSION,
            "journal": [dict(entry) for entry in self.journal],
            "shapes": {name: list(shape) for name, shape in self._shapes().items()},
            "growth": self.grower.state_dict(),
            "steps": [self._num_steps, self._num_losses, self._checked],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume another loop, and give the module's parameters the shapes that they had there.

        Raises:
            RequestError: shapes would change while an optimizer refers to the parameters.
        """
        if state["format_version"] > _FORMAT_VERSION:
            raise RequestError(
                f"this state of a growable module has format {state['format_version']}; this "
                f"version of Tritter reads formats up to {_FORMAT_VERSION}."
            )
        journal = Journal.of(state["journal"])
        self.reshape({name: tuple(each) for name, each in state["shapes"].items()}, journal)
        self.journal = journal
        self.grower.begin(self.module, blocks=self._blocks, restored=state["growth"])
        self._num_steps, self._num_losses, self._checked = state["steps"]

    def reshape(
        self, shapes: Mapping[str, tuple[int, ...]], journal: Journal | None = None
    ) -> None:
        """Resize parameters before values are loaded into them; overlapping values are kept.

        They stay the same objects, to which an optimizer without any step yet may refer. The state
        of an optimizer that has taken steps must be loaded after this.
        """
        present = self._shapes()
        if all(present[name] == shape for name, shape in shapes.items()):
            return
        if any(map(self._holds, self._optimizers)):
            raise RequestError(
                "this state belongs to a grown module, and an optimizer refers to the current "
                "parameters: load it into a new module before creating the optimizer."
            )
        old = {name: self.module.get_parameter(name) for name in present}
        if journal:
            journal.replay(self.module)
        else:
            values = {}
            for name, shape in shapes.items():  # overlapping old values, else zeros
                parameter = self.module.get_parameter(name).detach()
                common = tuple(
                    slice(min(sizes)) for sizes in zip(parameter.shape, shape, strict=True)
                )
                values[name] = parameter.new_zeros(shape)
                values[name][common] = parameter[common]
            reshape(self.module, {}, values)
        for name, parameter in old.items():
            path, _, key = name.rpartition(".")
            value, parameter.grad = self.module.get_parameter(name).data, None
            # By another dtype, torch forgets the shape of gradients of an earlier forward pass
            other = torch.float32 if value.dtype == torch.float64 else torch.float64
            parameter.data = value.new_empty(0, dtype=other)
            parameter.data = value
            setattr(self.module.get_submodule(path), key, parameter)
        self.grower.begin(self.module, blocks=self._blocks)
        self.tokens.clear()

    def widen(self, width: int) -> None:
        """Resize the only block to `width` neurons, as `reshape` does."""
        (block,), shapes = self.grower.blocks, {n: list(s) for n, s in self._shapes().items()}
        for name, dim in block.axes(self.module):
            shapes[name][dim] = width
        self.reshape({name: tuple(shape) for name, shape in shapes.items()})

    def before_step(self, whole: Callable[[], Tensor | None]) -> None:
        """Observe the gradients of the step that a tracked optimizer is about to take."""
        norm = None if self._blocks is None else whole()
        self.grower.pressure.observe(self.module, self.grower.blocks, whole=norm)
        self.grower.maturity.before_update(self.module, self.grower.blocks, self.steps)

    def after_step(self, optimizer: Optimizer) -> None:
        """Scale the updates of young neurons."""
        if self.is_tracked(optimizer):
            self.grower.maturity.after_update(self.module, self.grower.blocks)
            self._num_steps += 1

    def __getstate__(self) -> dict[str, Any]:
        """Drop the state that belongs to one process and run; a copy detects its own optimizer."""
        own = {"_optimizers", "_unrelated", "_replaced", "tokens"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "tokens": _LastTokens()}
        self._is_attached = self._is_rebuilt = False
        self._start_watching()

    def _start_watching(self) -> None:
        self._optimizers = WeakSet()
        self._unrelated = WeakKeyDictionary()
        self._replaced = {}
        if self._is_watched:
            _watch_optimizers()
            _WATCHING.add(self)

    def is_tracked(self, optimizer: Optimizer) -> bool:
        """Return True if an optimizer trains the growing parameters; the result is cached."""
        if optimizer in self._optimizers:
            return True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._unrelated.get(optimizer) == len(parameters):
            return False
        if any((replaced := self._replaced.get(id(p))) and replaced() is p for p in parameters):
            raise RequestError(
                f"growth: {type(optimizer).__name__} trains parameters that growth has replaced "
                "and no module uses any more; create it again from parameters(), or call "
                "attach(optimizer) before growth."
            )
        if not self._holds(optimizer):
            self._unrelated[optimizer] = len(parameters)
            return False
        self._optimizers.add(optimizer)
        return True

    def _holds(self, optimizer: Optimizer) -> bool:
        own = {id(self.module.get_parameter(name)) for name in self._shapes()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(self.module.get_parameter(name).shape)
            for block in self.grower.blocks
            for name, _ in block.axes(self.module)
        }


_WATCHING: WeakSet[PlainLoop] = WeakSet()


@cache
def _watch_optimizers() -> None:
    """Register global optimizer hooks once, when the first growable module is created."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(
    optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Observe the gradients of this step; with a closure, after it has computed them."""
    loops = [loop for loop in list(_WATCHING) if loop.is_tracked(optimizer)]
    if not loops:
        return None
    if isinstance(optimizer, LBFGS):
        raise _repeats_closure(optimizer)

    @cache
    def whole() -> Tensor | None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        present = [each for each in gradients if each is not None]
        return nn.utils.get_total_norm(present) if present else None

    closure = named.get("closure", next(iter(arguments[1:]), None))
    if closure is None:
        for loop in loops:
            loop.before_step(whole)
        return None
    has_run = False

    def observed() -> Any:
        nonlocal has_run
        if has_run:
            raise _repeats_closure(optimizer)
        has_run, loss = True, closure()
        for loop in loops:
            loop.before_step(whole)
        return loss

    if "closure" in named:
        return arguments, {**named, "closure": observed}
    return (arguments[0], observed, *arguments[2:]), named


def _repeats_closure(optimizer: Optimizer) -> RequestError:
    return RequestError(
        f"growth: {type(optimizer).__name__} evaluates its closure several times per step; growth "
        "requires one gradient per step. Use an optimizer such as AdamW or SGD."
    )


def _after_step(optimizer: Optimizer, *_: object) -> None:
    for loop in list(_WATCHING):
        loop.after_step(optimizer)


class _LastTokens:
    """Activations of the last training batch, for each block of neurons."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def record_activations(
        self, layer: int, inputs: Tensor, output: Tensor, *, computed: Tensor | None = None
    ) -> None:
        """Record some tokens, if a backward pass follows.

        Args:
            inputs: [..., H], inputs of the neurons.
            output: [..., O], output of the FFN.
            computed: [..., F], activations of the neurons.
        """
        if torch.is_grad_enabled() and output.requires_grad:
            own = None if computed is None else sample_rows(computed, _MAX_TOKENS)
            output.register_hook(partial(self._keep, layer, sample_rows(inputs, _MAX_TOKENS), own))

    def probes(self, model: nn.Module, blocks: Iterable[FfnBlock]) -> dict[int, ActivationProbe]:
        """Return layer → its probe, unless shapes of the layer have changed since."""
        found = {}
        for block in blocks:
            if block.layer not in self._last:
                continue
            inputs, computed, gradients = self._last[block.layer]
            width, size = block.outputs_first(model.get_parameter(block.gate)).shape
            written = width
            if block.down is not None:
                written = len(block.outputs_first(model.get_parameter(block.down)))
            if (inputs.shape[1], gradients.shape[1]) == (size, written):
                own = None if computed is None else computed.float()
                found[block.layer] = ActivationProbe(inputs.float(), gradients.float(), own)
        return found

    def clear(self) -> None:
        """Discard all recorded activations."""
        self._last.clear()

    def _keep(self, layer: int, inputs: Tensor, computed: Tensor | None, gradient: Tensor) -> None:
        self._last[layer] = (inputs, computed, sample_rows(gradient, _MAX_TOKENS))

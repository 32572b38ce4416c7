"""Growth in a training loop of one's own: what is seen of it, and when its model may change.

The optimizer that trains what grows is found at its first step, by the hooks that torch calls for
every optimizer: it has to be known, as one that holds the old parameters would train them on, and
nobody would notice.
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

from tritter.data.batches import this_rank
from tritter.errors import RequestError
from tritter.methods.growth.blocks import ActivationProbe, FfnBlock, some_rows
from tritter.methods.growth.grower import GROWTH, Grower, Growth
from tritter.training.parameters import Entry, entry_of, replay, reshape
from tritter.training.surgery import apply_plain

FORMAT_VERSION = 1


class PlainLoop:
    """The growth of one module in a loop of one's own.

    Args:
        module: by whose parameter names the neurons lie.
        places: of a module that no family knows; None: the FFNs of a whole model.
        is_watched: what optimizers do to the module is seen.
    """

    def __init__(
        self,
        module: nn.Module,
        grower: Grower,
        *,
        places: Sequence[FfnBlock] | None = None,
        is_watched: bool = True,
    ) -> None:
        grower.begin(module, places=places)
        self.module, self.grower, self.tokens = module, grower, LastTokens()
        self.journal: list[Entry] = []
        self._places, self._is_watched = places, is_watched
        self._check_every = grower.asked.check_every or 1  # steps between two checks, at least
        self._num_steps, self._num_losses = 0, 0
        self._checked, self._decided = -1, dict[int, int]()
        self._is_told, self._is_over, self._has_warned = False, False, False
        self._optimizers: WeakSet[Optimizer]
        self._strangers: WeakKeyDictionary[Optimizer, int]  # how many parameters they had
        self._gone: dict[int, ref[nn.Parameter]]
        self._begin_to_watch()

    @property
    def steps(self) -> int:
        """Optimizer steps taken; where no optimizer is known, losses that were told."""
        return self._num_steps or self._num_losses

    def attach(self, optimizer: Optimizer | None) -> None:
        """Say what trains the module; None: nothing that outlives an event.

        Raises:
            RequestError: it is no optimizer of what grows here.
        """
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise RequestError(
                f"optimizer = {type(optimizer).__name__}: a torch.optim.Optimizer is needed; of "
                "a wrapper the one that it wraps."
            )
        if optimizer is not None and not self._holds(optimizer):
            raise RequestError(
                f"{type(optimizer).__name__} holds none of the parameters that grow; make it of "
                "the module's parameters() and attach it then."
            )
        self._is_told = True
        self._optimizers = WeakSet(() if optimizer is None else (optimizer,))

    def hook_into(self, module: nn.Module, layer: int) -> None:
        """Look at the FFN of a layer from now on, in the place of a loop that did so before."""
        for key, hook in list(module._forward_hooks.items()):
            other = getattr(getattr(hook, "func", None), "__self__", None)
            if isinstance(other, PlainLoop):
                other._is_over = True
                _WATCHING.discard(other)
                del module._forward_hooks[key]
        module.register_forward_hook(partial(self.see, layer))

    def note_loss(self, loss: float) -> None:
        """Take the loss of a step."""
        self._num_losses += 1
        if self.grower.keeps_losses:
            self.grower.note_loss(loss)
        if not self._optimizers and self._is_watched:  # nobody else will look at the gradients
            self.grower.pressure.observe(self.module, self.grower.places)

    def decide(self) -> dict[int, int]:
        """Return number of a place → how many neurons it is to get; a check, if one is due.

        Raises:
            RequestError: another loop has taken the module over.
        """
        if self._is_over:
            raise RequestError("growth: another GrowableCausalLM was made of this model since.")
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
                    "growth: no gradient of what can grow was seen so far: no optimizer of torch's "
                    "that holds its parameters has taken a step; call attach(optimizer).",
                    stacklevel=3,
                )
            return {}
        self._checked, self._decided = step, self.grower.decide(self.module, step)
        return dict(self._decided)

    def sources(self, number: int, count: int) -> list[int]:
        """Return the neurons of the highest pressure, again from the first where they are few."""
        pressures = self.grower.pressure.neurons[self.grower.places[number].layer]
        highest = pressures.topk(min(count, len(pressures))).indices.tolist()
        return (highest * -(-count // len(highest)))[:count]

    def grow(
        self, decided: Mapping[int, int], *, sources: Mapping[int, Sequence[int]] | None = None
    ) -> Growth | None:
        """Let places grow; None where no batch was seen since they have their sizes.

        Args:
            decided: number of a place → neurons; `sources` its layer → neurons they stem from.

        Raises:
            RequestError: it is not known what trains them, or several optimizers do.
        """
        grower, step = self.grower, self.steps
        if this_rank().count > 1:
            raise RequestError(
                "growth: in a loop of one's own each of several processes would grow by its own "
                "tokens, and DDP would go on with the old parameters; train with python train.py "
                "growth=foam trainer=ddp."
            )
        holding = [each for each in self._optimizers if self._holds(each)]
        if len(holding) > 1:
            names = ", ".join(sorted(type(each).__name__ for each in holding))
            raise RequestError(
                f"growth: {len(holding)} optimizers train what grows ({names}); it can follow one."
            )
        if not holding and not self._is_told:
            raise RequestError(
                "growth: no optimizer is known that trains what is about to grow, and one that "
                "was made before would go on with the old parameters: call attach(optimizer), or "
                "attach(None) and make yours anew of parameters() after each event."
            )
        probes = self.tokens.probes(self.module, grower.places)
        growth = grower.growth(self.module, decided, probes, step=step, sources=sources)
        if growth is None:
            return None
        old = {name: self.module.get_parameter(name) for name in self._shapes()}
        apply_plain(self.module, growth.change, optimizer=holding[0] if holding else None)
        # Which parameters were replaced is remembered as long as somebody holds them
        self._gone = {n: r for n, r in self._gone.items() if r() is not None}
        for name, parameter in old.items():
            if self.module.get_parameter(name) is not parameter:
                self._gone[id(parameter)] = ref(parameter)
        self._strangers.clear()
        for each in [o for o in self._optimizers if not self._holds(o)]:
            self._optimizers.discard(each)
        if growth.change.config:
            self.journal.append(entry_of(growth.change, step=step, reason=GROWTH))
        grower.grown(self.module, growth, step=step)
        self.tokens.clear()
        self._decided = {}
        return growth

    def see(self, layer: int, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Keep tokens of an FFN, where growth may follow; with a layer, a forward hook."""
        if self.grower.may_grow_after(self.steps + 1):
            self.tokens.see(layer, arguments[0], output)

    def state_dict(self) -> dict[str, Any]:
        """Return what another loop needs to go on, in plain containers and tensors."""
        return {
            "format_version": FORMAT_VERSION,
            "journal": [dict(entry) for entry in self.journal],
            "shapes": {name: list(shape) for name, shape in self._shapes().items()},
            "growth": self.grower.state_dict(),
            "steps": [self._num_steps, self._num_losses, self._checked],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loop was, the module's parameters in the shapes they had there.

        Raises:
            RequestError: they would change, and an optimizer holds them.
        """
        if state["format_version"] > FORMAT_VERSION:
            raise RequestError(
                f"a growable module's state of format {state['format_version']}; this Tritter "
                f"reads up to {FORMAT_VERSION}."
            )
        self.reshape({name: tuple(shape) for name, shape in state["shapes"].items()},
                     state["journal"])  # fmt: skip
        self.journal = [dict(entry) for entry in state["journal"]]
        self.grower.begin(self.module, places=self._places, restored=state["growth"])
        self._num_steps, self._num_losses, self._checked = state["steps"]

    def reshape(self, shapes: Mapping[str, tuple[int, ...]], journal: Sequence[Entry] = ()) -> None:
        """Give parameters other sizes before values are loaded into them; what fits stays.

        Raises:
            RequestError: an optimizer holds them.
        """
        held = self._shapes()
        if all(held[name] == shape for name, shape in shapes.items()):
            return
        if any(map(self._holds, self._optimizers)):
            raise RequestError(
                "the state is of a grown module, and an optimizer holds the parameters that there "
                "are: load it into a new one, and make the optimizer then."
            )
        if journal:
            replay(self.module, journal)
        else:
            values = {}
            for name, shape in shapes.items():  # what fits of the old values, and zeros
                parameter = self.module.get_parameter(name).detach()
                common = tuple(
                    slice(min(sizes)) for sizes in zip(parameter.shape, shape, strict=True)
                )
                values[name] = parameter.new_zeros(shape)
                values[name][common] = parameter[common]
            reshape(self.module, {}, values)
        self.grower.begin(self.module, places=self._places)
        self.tokens.clear()

    def widen(self, width: int) -> None:
        """Give the one place so many neurons, as `reshape` does."""
        (place,), shapes = self.grower.places, {n: list(s) for n, s in self._shapes().items()}
        for name, dim in place.axes(self.module):
            shapes[name][dim] = width
        self.reshape({name: tuple(shape) for name, shape in shapes.items()})

    def before_step(self, whole: Callable[[], Tensor | None]) -> None:
        """See the gradients of the step that an optimizer of ours is about to take."""
        norm = None if self._places is None else whole()
        self.grower.pressure.observe(self.module, self.grower.places, whole=norm)
        self.grower.maturity.before_update(self.module, self.grower.places, self.steps)

    def after_step(self, optimizer: Optimizer) -> None:
        """Let young neurons go further."""
        if self.is_ours(optimizer):
            self.grower.maturity.after_update(self.module, self.grower.places)
            self._num_steps += 1

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one process and one training; a copy looks for its own."""
        own = {"_optimizers", "_strangers", "_gone", "tokens"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "tokens": LastTokens(), "_is_told": False}
        self._begin_to_watch()

    def _begin_to_watch(self) -> None:
        self._optimizers = WeakSet()
        self._strangers = WeakKeyDictionary()
        self._gone = {}
        if self._is_watched:
            _watch_optimizers()
            _WATCHING.add(self)

    def is_ours(self, optimizer: Optimizer) -> bool:
        """Say whether an optimizer trains what grows here; once found, it is remembered."""
        if optimizer in self._optimizers:
            return True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._strangers.get(optimizer) == len(parameters):
            return False
        if self._holds(optimizer):
            self._optimizers.add(optimizer)
            return True
        if any((gone := self._gone.get(id(p))) and gone() is p for p in parameters):
            raise RequestError(
                f"growth: {type(optimizer).__name__} trains parameters that were replaced when "
                "neurons grew, and that no module has; make it anew of parameters(), or "
                "attach(optimizer) it before they grow."
            )
        self._strangers[optimizer] = len(parameters)
        return False

    def _holds(self, optimizer: Optimizer) -> bool:
        own = {id(self.module.get_parameter(name)) for name in self._shapes()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(self.module.get_parameter(name).shape)
            for place in self.grower.places
            for name, _ in place.axes(self.module)
        }


_WATCHING: WeakSet[PlainLoop] = WeakSet()


@cache
def _watch_optimizers() -> None:
    """Let all loops see the steps of all optimizers, from the first growable module on."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(
    optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Observe the gradients of this step; with a closure, after it has computed them."""
    loops = [loop for loop in list(_WATCHING) if loop.is_ours(optimizer)]
    if not loops:
        return None
    if isinstance(optimizer, LBFGS):
        raise _repeats_closure(optimizer)

    @cache
    def whole() -> Tensor | None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        held = [each for each in gradients if each is not None]
        return nn.utils.get_total_norm(held) if held else None

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


MAX_TOKENS = 256  # of the last batch, of each layer


class LastTokens:
    """Tokens of the last batch that was trained on, as places of neurons saw them."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def see(
        self, layer: int, inputs: Tensor, output: Tensor, *, computed: Tensor | None = None
    ) -> None:
        """Keep some tokens, if a backward pass follows.

        Args:
            inputs: [..., H], what neurons read.
            output: [..., O], what they write in the end.
            computed: [..., F], of the neurons themselves.
        """
        if torch.is_grad_enabled() and output.requires_grad:
            own = None if computed is None else some_rows(computed, MAX_TOKENS)
            output.register_hook(partial(self._keep, layer, some_rows(inputs, MAX_TOKENS), own))

    def probes(self, model: nn.Module, places: Iterable[FfnBlock]) -> dict[int, ActivationProbe]:
        """Return layer → what was seen of it, unless a neighbour has other sizes since."""
        found = {}
        for place in places:
            if place.layer not in self._last:
                continue
            inputs, computed, gradients = self._last[place.layer]
            width, size = place.turned(model.get_parameter(place.gate)).shape
            written = width
            if place.down is not None:
                written = len(place.turned(model.get_parameter(place.down)))
            if (inputs.shape[1], gradients.shape[1]) == (size, written):
                own = None if computed is None else computed.float()
                found[place.layer] = ActivationProbe(inputs.float(), gradients.float(), own)
        return found

    def clear(self) -> None:
        """Forget what was seen."""
        self._last.clear()

    def _keep(self, layer: int, inputs: Tensor, computed: Tensor | None, gradient: Tensor) -> None:
        self._last[layer] = (inputs, computed, some_rows(gradient, MAX_TOKENS))

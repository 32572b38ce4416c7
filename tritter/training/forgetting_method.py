"""What a method against forgetting needs, may do during a training, and leaves; and when.

A Lightning callback alone can neither change a batch nor add a loss, so methods have a protocol
of their own: the LightningModule holds them as a list, and one callback drives them. What is made
for them before the training (an importance, masks, a teacher) is made only when one needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from tritter.checkpoints.location import teacher_problems
from tritter.core.families import Config
from tritter.data.batches import BatchStream, sample_equally
from tritter.errors import Problem
from tritter.options import RunRequest, Start, options
from tritter.seeds import derived_seed
from tritter.targets import Component

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change

Values = Mapping[str, "Tensor"]  # by parameter name


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a method asks for, as far as its options tell; what none asks for is not made.

    Kinds are those of `tritter.core.parameter_map.carry`, where a method registers its own: all of
    them follow an expansion by their rule.

    Args:
        old_text: it can't do without text of the old domains.
        instead: kinds of state that do in place of old text, where all lie beside the model.
        prepares: kinds of state that its `prepare` makes.
        state: kinds that it takes from what lies beside the model that it starts from, if they
            do. `path_integral` is recorded while a base is trained.
        leaves: kinds that its `end_task` returns.
        carried: masks of the entries that hold old knowledge.
        teacher: a model to learn from.
        teacher_place: folder or hub id of it. Default: the model from before the expansion.
        writes: its `prepare` returns text that the model itself wrote. Where there is no text of
            the old domains, methods that need it get this.
        mixes: its `mix` puts old sequences into the batches, which one method of a run may.
        keeps: sequences of each domain's training text that are left beside the trained model, to
            stand for text that a later training has no more.
        copies: tensors as large as the model that it holds during a training.
    """

    old_text: bool = False
    instead: tuple[str, ...] = ()
    prepares: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    carried: bool = False
    teacher: bool = False
    teacher_folder: str | None = None
    writes: bool = False
    mixes: bool = False
    keeps: int = 0
    copies: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preparation:
    """What a method may look at once, before the expansion.

    Args:
        model: at the weights that the expansion starts from, on the device of the run; several
            methods look at it, none changes it.
        domains: what `draw` draws from: the old ones, or what the model wrote.
        latest: of these those that the model was trained on last; empty: not known.
        draw: as `Task.draw`: the training draws the same sequences by the same arguments.
        sequence_length: tokens of a sequence.
        end_of_text_id: the token that closes a document.
        seed: words → seed of the method's own randomness.
        state: kind → values, of what lies beside the model and the method asked for.
        say: prints a line.
        progress: shows how many sequences of a draw are done, of how many; None: nobody looks.
    """

    model: nn.Module
    domains: tuple[str, ...]
    latest: tuple[str, ...] = ()
    draw: Callable[..., Tensor]
    sequence_length: int
    end_of_text_id: int
    seed: Callable[..., int]
    state: Mapping[str, Values]
    say: Callable[[str], None]
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What a method has made of it.

    Args:
        state: kind → values; a parameter that is absent has none.
        written: int [N, T], of a method that says it writes.
        flops: that it took.
        found: plain data for the run's ledger.
        notes: what is worth telling, a sentence each.
    """

    state: Mapping[str, Values] = field(default_factory=dict)
    written: Tensor | None = None
    flops: float = 0.0
    found: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a method is told when a training begins: of all this what the run's methods need.

    Args:
        seed: of the method's own randomness.
        old_sequences: old domain → int [N, T], its packed training sequences, or what an earlier
            training kept of them beside the model; where there is neither, and a method let the
            model write, what it wrote.
        old_losses: domain → float [N], of those that were kept: when they were left.
        written: int [N, T], that.
        latest: of the old domains those that the model was trained on last; empty: not known.
        carried: parameter name → bool mask of the entries that hold old knowledge; everything
            else came with the expansion and is free.
        new_units: parameter name → by dimension, bool [size], the coordinates in which no weight
            stood before the expansion; None where there are none.
        state: kind → parameter name → what was prepared or lay beside the model before the
            expansion, carried through it. What starts anew is absent.
        state_before: kind → name on disk → the same, before the expansion.
        teacher: the model before the expansion, or another, frozen, where the trained one is.
    """

    seed: int
    old_sequences: Mapping[str, Tensor] = field(default_factory=dict)
    old_losses: Mapping[str, Tensor] = field(default_factory=dict)
    written: Tensor | None = None
    latest: tuple[str, ...] = ()
    carried: Values = field(default_factory=dict)
    new_units: Mapping[str, tuple[Tensor | None, ...]] = field(default_factory=dict)
    state: Mapping[str, Values] = field(default_factory=dict)
    state_before: Mapping[str, Values] = field(default_factory=dict)
    teacher: nn.Module | None = None

    def draw(self, count: int, *purpose: str, domains: Iterable[str] | None = None) -> Tensor:
        """Return `count` old sequences [N, T] at random, of each domain as many.

        Args:
            count: how many; fewer are drawn of a domain that has fewer.
            purpose: names the draw; the same purpose draws the same sequences.
            domains: old domains to draw from; None: all.
        """
        names = self.old_sequences if domains is None else domains
        sequences = {name: self.old_sequences[name] for name in names}
        return sample_equally(sequences, count, seed=partial(derived_seed, self.seed, *purpose))


@options
class NoOptions:
    """Of a method that has none."""


class ForgettingMethod:
    """Base of all methods, made of their options; each hook does nothing unless it is overridden.

    Order within a step: `observe_batch` and `extra_loss` before the backward pass; then, on
    unclipped gradients of the task, `observe_gradients` of all methods, and only then
    `add_to_gradients` of all; `look` when the step is taken.
    """

    name = "method"
    Options: ClassVar[type[Any]] = NoOptions  # whose fields are the arguments of the method
    uses_weights: ClassVar[bool] = True  # False: it only chooses what is trained on
    freezes: ClassVar[bool] = False  # parts of the model are not trained

    def __init__(self, **arguments: Any) -> None:
        self.options = self.Options(**arguments)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        """Yield what of a run does not go together with the method."""
        yield from ()

    @classmethod
    def start_problems(cls, options: Any, run: RunRequest, start: Start) -> Iterator[Problem]:
        """Yield what the method can't do with the models of a run."""
        yield from ()

    @classmethod
    def num_frozen(cls, options: Any, trained: Config, before: Config, run: RunRequest) -> int:
        """Return how many parameters of a model may stay out of the optimizer to the end.

        At most: where a parameter is frozen in part, the optimizer holds the whole of it.

        Args:
            trained: config.json of the model.
            before: that of the model before the expansion.
        """
        return 0

    @classmethod
    def needs(cls, options: Any) -> Needs:
        """Return what a method of these options needs; asked before anything is built."""
        return Needs()

    @classmethod
    def is_logged(cls) -> bool:
        """Return whether a training logs `forgetting/<name>/loss`: one of the two hooks says it."""
        own, none = (cls.extra_loss, cls.logged_loss), ForgettingMethod
        return own != (none.extra_loss, none.logged_loss)

    @classmethod
    def is_in_gradients(cls) -> bool:
        """Return whether the loss is of more than the new text: one of the two hooks says it."""
        own, none = (cls.mix, cls.extra_loss), ForgettingMethod
        return own != (none.mix, none.extra_loss)

    def prepare(self, given: Preparation) -> Prepared:
        """Make the kinds of state that `needs` says it prepares, or the text that it writes."""
        raise NotImplementedError(f"{self.name} prepares nothing")

    def freeze(self, model: nn.Module, task: Task, *, max_steps: int) -> None:
        """Say by `requires_grad` what is not trained, before an optimizer is built of the rest.

        In the process that the run began in; what is frozen already stays so.

        Args:
            max_steps: of the training.
        """

    def thawed(self, step: int) -> Collection[str]:
        """Return names of parameters that it has frozen and lets be trained after so many steps.

        By the step alone: a training that goes on asks again.
        """
        return ()

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Begin a training of `model`, whose weights are those after the expansion.

        Of a resumed training they are those that it goes on from, and where it changed its model
        of other shapes than the task's: what was read off the first ones, or follows changes,
        belongs into `state_dict`, which is given back after this.
        """

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        """Return the batches to train on; what is new keeps its order."""
        return batches

    def look(self, model: nn.Module, step: int) -> float:
        """Look at the model between steps; return the FLOPs that it took, of all processes.

        With those of every `extra_loss` since the last look. All processes look at once, and must
        come to the same. A training that goes on does not look once more where it was saved.

        Args:
            step: steps taken; 0 before the first.
        """
        return 0.0

    def extra_loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor
    ) -> Tensor | None:
        """Return a scalar to add to the loss of the task.

        Args:
            logits: [B, T, V], what the task's own forward pass gave, with its graph.
        """
        return None

    def observe_batch(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Look at a batch before its loss is taken; asked only where gradients will hold more than
        that of its new text's next-token loss (side losses, extra losses, replayed rows).

        Of a training it is asked for every batch or for none, in all processes alike.
        """

    def observe_gradients(self, model: nn.Module) -> None:
        """Read the gradients of the task, before any method changes them."""

    def add_to_gradients(self, model: nn.Module) -> None:
        """Add the gradient of a penalty in place."""

    def logged_loss(self, model: nn.Module) -> float | None:
        """Return the penalty's present value, logged as `forgetting/<name>/loss`."""
        return None

    def parameters_changed(self, change: Change) -> None:
        """Follow a change of the live model; see `Change.state` and `Change.masks`."""

    def end_task(self, model: nn.Module) -> Mapping[str, Values]:
        """Return, by kind, what the next training finds beside the trained model.

        Asked in every process; what the first one returns is kept.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in plain containers and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


def build_methods(chosen: Sequence[Component]) -> tuple[ForgettingMethod, ...]:
    """Build methods in the order asked for; their options are their arguments."""
    return tuple(one.kind(**one.arguments) for one in chosen)


def needs_of(chosen: Sequence[Component]) -> tuple[Needs, ...]:
    """Return what each method needs, in the order asked for."""
    return tuple(one.kind.needs(one.options) for one in chosen)


def method_start_problems(config: RunRequest, source: Config) -> Iterator[Problem]:
    """Yield what can't be had of a model that the run starts from.

    Args:
        source: its config.json; of a base that is to be trained the vocabulary is not known yet.
    """
    is_known = config.model.model_type == "hf"
    for one in config.forgetting:
        place = one.kind.needs(one.options).teacher_folder
        if place is not None:
            key = f"forgetting.{one.name}.teacher"
            yield from teacher_problems(place, source if is_known else None, key=key)
    if any(one.kind.needs(one.options).old_text for one in config.forgetting):
        data = config.data
        yield from config.text.kept.misfits(
            sequence_length=data.sequence_length, packing=data.packing
        )

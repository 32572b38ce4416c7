"""The optimizer: its class, parameter groups and learning-rate schedule."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from tritter.errors import Problem, RequestError, nearest
from tritter.options import options
from tritter.targets import (
    TARGET,
    argument_problems,
    dotted,
    import_object,
    parameters_of,
    parsed_module,
    resolve,
    silence_logging,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

_SIDE = 16  # size of the matrix for trial steps
_ADAMS = ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
# In a short run, the warm-up ratio rounds to 0 or 1 steps. The first update would use the full
# learning rate while Adam's second moments come from a single gradient.
_MINIMUM_WARMUP_STEPS = 5
_OPTIMIZER = "torch.optim.Optimizer"
_TORCH, _EIGHT_BIT = "torch.optim", "bitsandbytes.optim"
# Listed by name, because importing bitsandbytes is slow
_OF_BITSANDBYTES = (
    "Adam8bit",
    "AdamW8bit",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedLion8bit",
    "SGD8bit",
    "RMSprop8bit",
    "AdEMAMix",
    "AdEMAMix8bit",
)
_OWN = ("params", "lr")  # set by Tritter


@options
class OptimizerSettings:
    """An optimizer without its learning rate, which the schedule sets.

    Args:
        weight_decay: Weight decay of matrices; vectors (norm gains, biases) have none. None: the
            default of the class.
        target: Dotted name of the class.
        arguments: Arguments of the class except `weight_decay`.
    """

    KEYS: ClassVar = ("weight_decay",)  # of `optimizer` that are not arguments of its class

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    target: str = "torch.optim.AdamW"  # arXiv 1711.05101
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.95)})

    def kept_per_parameter(self) -> float:
        """Return the state values per parameter of a matrix, without its factors; 2 for Adam."""
        optimizer = _after_a_step(import_object(self.target), self.arguments)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]].values()
        total = 0
        for each in state:
            if isinstance(each, import_object("torch.Tensor")) and each.numel() > _SIDE:
                total += each.numel()
        return total / _SIDE**2

    def adam_problems(self, *, doing: str) -> Iterator[Problem]:
        """Yield a problem if it is not an Adam whose moments can be mapped.

        Args:
            doing: Start of the message: the feature that needs the moments.
        """
        name = self.target.rpartition(".")[2]
        if name not in _ADAMS or self.arguments.get("amsgrad"):
            reason = (
                f"{doing}, and {name} has a different state; allowed are {', '.join(_ADAMS)}, "
                "without amsgrad"
            )
            yield Problem("optimizer", name, reason=reason)

    def build(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, learning_rate: float
    ) -> torch.optim.Optimizer:
        """Return an optimizer for the parameters that require a gradient.

        Frozen parameters are excluded: weight decay and momentum would change them. There are
        always two groups (matrices, vectors) in the order of `parameters`, because saved state is
        matched by position.

        Args:
            parameters: (name, parameter) of the model.
            learning_rate: Peak learning rate.
        """
        kind = import_object(self.target)
        groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
        for name, parameter in parameters:
            if parameter.requires_grad:  # biases of experts are stacked
                groups[parameter.ndim < 2 or name.endswith("bias")]["params"].append(parameter)
        if "weight_decay" in inspect.signature(kind).parameters:
            groups[1]["weight_decay"] = 0.0
            if self.weight_decay is not None:
                groups[0]["weight_decay"] = self.weight_decay
        arguments = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.arguments.items()
        }
        return kind(groups, lr=learning_rate, **arguments)

    def problems(self, kind: type | str, *, shipped: Iterable[Mapping[str, Any]]) -> list[Problem]:
        """Return the problems of the arguments, found by a trial step.

        Args:
            kind: The class, or the dotted name of a class of torch.
            shipped: Bodies of the shipped options. The tests run these, so that torch need not be
                imported here.
        """
        arguments = self.arguments
        if "lr" in arguments:
            reason = "the schedule sets it; use training.learning_rate"
            return [Problem("optimizer.lr", arguments["lr"], reason=reason)]
        if self.weight_decay is not None and "weight_decay" not in parameters_of(kind):
            reason = (
                f"{dotted(kind).rpartition('.')[2]} has no weight decay; set "
                "optimizer.weight_decay=null"
            )
            return [Problem("optimizer.weight_decay", self.weight_decay, reason=reason)]
        if found := list(argument_problems(kind, arguments, key="optimizer", reserved=_OWN)):
            return found
        own = (*self.KEYS, "name")
        named = _spelling(dotted(kind).rpartition(".")[2])
        same_class = [body for body in shipped if _spelling(str(body["name"])) == named]
        if any({k: body[k] for k in body if k not in own} == arguments for body in same_class):
            return []
        made: Any = import_object(kind) if isinstance(kind, str) else kind
        failure = _failure(made, arguments)
        if failure is None:
            return []
        # Report the first argument that fails on its own
        single = ((name, _failure(made, {name: value})) for name, value in arguments.items())
        name, reason = next(((n, found) for n, found in single if found), (None, failure))
        key = "optimizer" if name is None else f"optimizer.{name}"
        value = f"{made.__module__}.{made.__name__}" if name is None else arguments[name]
        return [Problem(key, value, reason=reason or failure)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning-rate schedule: warm-up, then constant, cosine or warmup-stable-decay.

    `rewarm` is `cosine` with a warm-up from the final learning rate of an earlier run: re-warming
    and re-decaying (Ibrahim et al. 2024, arXiv 2403.08763).

    Args:
        learning_rate: Peak learning rate.
        max_steps: Total number of optimizer steps.
        warmup_ratio: Fraction of the steps with linear warm-up. If positive, the warm-up has at
            least `_MINIMUM_WARMUP_STEPS` steps, or a quarter of a run too short for them.
        shape: `constant`, `cosine`, `rewarm`, `wsd` (arXiv 2404.06395: constant, then linear
            decay), or `range` (an exponential rise from the minimum, for a range test).
        decay_ratio: Fraction of the steps with decay, for `wsd`.
        minimum_ratio: Final learning rate relative to the peak, for all shapes but `constant`.
        start_rate: Initial learning rate of the warm-up, for `rewarm`.
    """

    learning_rate: float
    max_steps: int
    warmup_ratio: float = 0.05
    shape: str = "cosine"
    decay_ratio: float = 0.2
    minimum_ratio: float = 0.0
    start_rate: float = 0.0

    @classmethod
    def constant(cls, learning_rate: float, *, max_steps: int) -> Schedule:
        """Return a schedule with a constant learning rate and no warm-up."""
        return cls(
            learning_rate=learning_rate, max_steps=max_steps, warmup_ratio=0.0, shape="constant"
        )

    @property
    def warmup_steps(self) -> int:
        if not self.warmup_ratio:
            return 0
        rounded = round(self.warmup_ratio * self.max_steps)
        return max(rounded, min(_MINIMUM_WARMUP_STEPS, self.max_steps // 4))

    @property
    def last_rate(self) -> float:
        """Learning rate of the last step."""
        return self.rate(self.max_steps - 1)

    def rate(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0)."""
        return self.learning_rate * self.factor(step)

    def factor(self, step: int) -> float:
        """Return the learning rate of step `step` (from 0) relative to the peak."""
        if step < self.warmup_steps:
            risen = (step + 1) / self.warmup_steps
            start = self.start_rate / self.learning_rate if self.shape == "rewarm" else 0.0
            return start + (1 - start) * risen
        match self.shape:
            case "constant":
                return 1.0
            case "cosine" | "rewarm":
                progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
                decay = (1 + math.cos(math.pi * min(1.0, progress))) / 2
                return self.minimum_ratio + (1 - self.minimum_ratio) * decay
            case "wsd":
                decay_steps = max(1, round(self.decay_ratio * self.max_steps))
                decay = min(1.0, max(0.0, (self.max_steps - step) / decay_steps))
                return self.minimum_ratio + (1 - self.minimum_ratio) * decay
            case "range":
                return float(self.minimum_ratio ** (1 - step / max(1, self.max_steps - 1)))
        raise ValueError(
            f"training.schedule = '{self.shape}'; allowed are constant, cosine, wsd and rewarm."
        )


def optimizer_class(raw: Mapping[str, Any]) -> type | str:
    """Return the class of an optimizer by its `name` or `_target_`.

    For an optimizer of torch, return the dotted name instead, without importing torch.
    """
    name, target = raw.get("name"), raw.get(TARGET)
    if name is None and target is None:
        reason = (
            "choose an option of optimizer, or name a class of torch.optim or bitsandbytes.optim"
        )
        raise RequestError(Problem("optimizer.name", None, reason=reason))
    if name is not None and target is not None:
        reason = f"it conflicts with optimizer.name = {name}; also set optimizer.name=null"
        raise RequestError(Problem(f"optimizer.{TARGET}", target, reason=reason))
    if name is None:
        return resolve(f"optimizer.{TARGET}", target, base=_OPTIMIZER)
    classes, spelled = _classes(), _spelling(str(name))
    if (found := classes.get(spelled)) is not None:
        if not found.startswith(_EIGHT_BIT):
            return found
        with silence_logging():
            return resolve("optimizer.name", found, base=_OPTIMIZER)
    names = {spelling: target.rpartition(".")[2] for spelling, target in classes.items()}
    reason = f"must be one of {', '.join(sorted(names.values()))}, or optimizer.{TARGET}"
    near = names.get(nearest(spelled, names) or "")
    raise RequestError(Problem("optimizer.name", name, reason=reason, nearest=near))


def _classes() -> dict[str, str]:
    """Return spelling → dotted name of the optimizers of torch and bitsandbytes."""
    names, renamed = list[str](), list[str]()
    for node in parsed_module(_TORCH).body:  # `from torch.optim.sgd import SGD as SGD`
        if isinstance(node, ast.ImportFrom):
            own = [each.name for each in node.names if each.name[0].isupper()]
            names += [f"{node.module}.{name}" for name in own if name != "Optimizer"]
        elif isinstance(node, ast.Assign):  # `Muon.__module__ = "torch.optim"`
            renamed.append(ast.unparse(node.targets[0]).partition(".")[0])
    names += [f"{_EIGHT_BIT}.{name}" for name in _OF_BITSANDBYTES]
    found = {_spelling(name.rpartition(".")[2]): name for name in reversed(names)}
    return found | {_spelling(name): f"{_TORCH}.{name}" for name in renamed if name[0].isupper()}


def _spelling(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _failure(kind: Any, arguments: Mapping[str, Any]) -> str | None:
    try:
        _after_a_step(kind, arguments)
    except Exception as error:  # third-party classes can raise any error
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def _after_a_step(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """Return an optimizer after a trial step on a matrix and a vector."""
    ones = import_object("torch.ones")
    trial = [
        import_object("torch.nn.Parameter")(ones(*shape)) for shape in ((_SIDE, _SIDE), (_SIDE,))
    ]
    for each in trial:
        each.grad = ones(each.shape)
    with silence_logging():
        made = kind([{"params": trial[:1]}, {"params": trial[1:]}], lr=1e-3, **arguments)
        made.step()
    return made

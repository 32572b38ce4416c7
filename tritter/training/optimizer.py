"""The optimizer: which class, and which parameters it holds, in which groups, in which order."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tritter.checkpoints.location import state_kinds_of
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.options import RunRequest, field_keys, options
from tritter.targets import (
    TARGET,
    argument_problems,
    dotted,
    imported,
    parameters_of,
    parsed_module,
    quietly,
    resolve,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

_SIDE = 16  # of the matrix that a step is tried with


@options
class OptimizerValues:
    """The keys of `optimizer` that are no arguments of its class.

    Args:
        weight_decay: on matrices; vectors (norm gains, biases) are not decayed. None: the default
            of the class.
        carry: trainings start from the moments beside the checkpoint.
    """

    weight_decay: Annotated[float, Field(ge=0)] | None = None
    carry: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings(OptimizerValues):
    """An optimizer but for the learning rate, which the schedule gives.

    Args:
        target: dotted name of its class.
        arguments: those of the class besides `weight_decay`.
    """

    target: str = "torch.optim.AdamW"  # arXiv 1711.05101
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.95)})

    def kept_per_parameter(self) -> float:
        """Return how many numbers it keeps for each parameter of a matrix: of Adam two."""
        held = _after_a_step(imported(self.target), self.arguments)
        state = held.state[held.param_groups[0]["params"][0]].values()
        sizes = [value.numel() for value in state if hasattr(value, "numel")]
        return sum(size for size in sizes if size > 1) / _SIDE**2


_ADAMS = ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def adam_problems(optimizer: Any, *, doing: str) -> Iterator[Problem]:
    """Yield that an optimizer is no Adam whose moments can follow a change of the model.

    Args:
        optimizer: as a config has it.
        doing: what needs it.
    """
    name = optimizer.target.rpartition(".")[2]
    if name not in _ADAMS or optimizer.arguments.get("amsgrad"):
        reason = (
            f"{doing}, and {name} has other state; allowed are {', '.join(_ADAMS)} without amsgrad"
        )
        yield Problem("optimizer", name, reason=reason)


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    *,
    learning_rate: float,
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters that require a gradient.

    A frozen parameter stays out altogether: inside, weight decay and momentum would move it.
    Two groups always, each in the order given, so that saved state finds its place by position.
    """
    kind = imported(settings.target)
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2]},
    ]
    if "weight_decay" in inspect.signature(kind).parameters:
        groups[1]["weight_decay"] = 0.0
        if settings.weight_decay is not None:
            groups[0]["weight_decay"] = settings.weight_decay
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.arguments.items()
    }
    return kind(groups, lr=learning_rate, **arguments)


# A share of a short training rounds to no step or one: the first update would be at full rate,
# while Adam's second moments rest on a single gradient.
MINIMUM_WARMUP_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Warm-up, then constant, cosine or warmup-stable-decay.

    `rewarm` is `cosine` whose warm-up begins at the rate that an earlier training ended with:
    re-warming and re-decaying (Ibrahim et al. 2024, arXiv 2403.08763).

    Args:
        learning_rate: the peak.
        max_steps: optimizer steps of the whole training.
        warmup_ratio: share of the steps over which the rate rises linearly to its peak; above 0
            at least `MINIMUM_WARMUP_STEPS`, or a quarter of a training too short for them.
        shape: `constant`, `cosine`, `rewarm`, or `wsd` (arXiv 2404.06395: constant, then a linear
            decay).
        decay_ratio: share of the steps that decay, for `wsd`.
        minimum_ratio: what is left of the peak at the end of all but `constant`.
        start_rate: where the warm-up of `rewarm` begins.
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
        """Return one rate from the first step to the last."""
        return cls(
            learning_rate=learning_rate, max_steps=max_steps, warmup_ratio=0.0, shape="constant"
        )

    @property
    def warmup_steps(self) -> int:
        if not self.warmup_ratio:
            return 0
        asked = round(self.warmup_ratio * self.max_steps)
        return max(asked, min(MINIMUM_WARMUP_STEPS, self.max_steps // 4))

    @property
    def last_rate(self) -> float:
        """The rate of the last step."""
        return self.rate(self.max_steps - 1)

    def rate(self, step: int) -> float:
        """Return the rate of step `step` (from 0)."""
        return self.learning_rate * self.factor(step)

    def factor(self, step: int) -> float:
        """Return the share of the peak rate that step `step` (from 0) uses."""
        if step < self.warmup_steps:
            risen = (step + 1) / self.warmup_steps
            start = self.start_rate / self.learning_rate if self.shape == "rewarm" else 0.0
            return start + (1 - start) * risen
        match self.shape:
            case "constant":
                return 1.0
            case "cosine" | "rewarm":
                progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
                left = (1 + math.cos(math.pi * min(1.0, progress))) / 2
                return self.minimum_ratio + (1 - self.minimum_ratio) * left
            case "wsd":
                decay_steps = max(1, round(self.decay_ratio * self.max_steps))
                left = min(1.0, max(0.0, (self.max_steps - step) / decay_steps))
                return self.minimum_ratio + (1 - self.minimum_ratio) * left
        raise ValueError(f"training.schedule = '{self.shape}': constant, cosine, wsd or rewarm.")


OPTIMIZER = "torch.optim.Optimizer"
_TORCH, _EIGHT_BIT = "torch.optim", "bitsandbytes.optim"
# By name: to import bitsandbytes takes long
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
_OWN = ("params", "lr")  # which Tritter gives


def optimizer_class(raw: Mapping[str, Any]) -> type | str:
    """Return the class of an optimizer, by its name or by `_target_`; of one of torch its name.

    Raises:
        RequestError: there is none of this name, or both are given, or neither.
    """
    name, target = raw.get("name"), raw.get(TARGET)
    if name is None and target is None:
        reason = "choose an option of it, or name a class of torch.optim or bitsandbytes.optim"
        raise RequestError(Problem("optimizer.name", None, reason=reason))
    if name is not None and target is not None:
        reason = f"optimizer.name = {name} names another; set optimizer.name=null besides"
        raise RequestError(Problem(f"optimizer.{TARGET}", target, reason=reason))
    if name is None:
        return resolve(f"optimizer.{TARGET}", target, base=OPTIMIZER)
    classes, spelled = _classes(), _spelling(str(name))
    if (found := classes.get(spelled)) is not None:
        if not found.startswith(_EIGHT_BIT):
            return found
        with quietly():
            return resolve("optimizer.name", found, base=OPTIMIZER)
    names = {spelling: target.rpartition(".")[2] for spelling, target in classes.items()}
    reason = f"must be one of {', '.join(sorted(names.values()))}, or optimizer.{TARGET}"
    near = names.get(nearest(spelled, names) or "")
    raise RequestError(Problem("optimizer.name", name, reason=reason, nearest=near))


def _classes() -> dict[str, str]:
    """Return, by spelling, the dotted names of torch's optimizers and bitsandbytes'."""
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


def optimizer_problems(
    kind: type | str,
    arguments: Mapping[str, Any],
    weight_decay: float | None,
    *,
    shipped: Iterable[Mapping[str, Any]],
) -> list[Problem]:
    """Return what is wrong with the arguments of an optimizer; a step is taken for trial.

    Args:
        kind: the class, or the dotted name of one of torch's.
        shipped: the bodies of options that a test has tried, so that torch need not be imported.
    """
    if "lr" in arguments:
        reason = "the schedule gives it; say training.learning_rate"
        return [Problem("optimizer.lr", arguments["lr"], reason=reason)]
    if weight_decay is not None and "weight_decay" not in parameters_of(kind):
        reason = f"{dotted(kind).rpartition('.')[2]} has none; set optimizer.weight_decay=null"
        return [Problem("optimizer.weight_decay", weight_decay, reason=reason)]
    if found := list(argument_problems(kind, arguments, key="optimizer", reserved=_OWN)):
        return found
    own = (*field_keys(OptimizerValues, ""), "name")
    named = _spelling(dotted(kind).rpartition(".")[2])
    alike = [body for body in shipped if _spelling(str(body["name"])) == named]
    if any({k: body[k] for k in body if k not in own} == arguments for body in alike):
        return []
    made: Any = imported(kind) if isinstance(kind, str) else kind
    whole = _failure(made, arguments)
    if whole is None:
        return []
    # It is told of the first argument that alone leads to it
    alone = ((name, _failure(made, {name: value})) for name, value in arguments.items())
    name, said = next(((n, told) for n, told in alone if told), (None, whole))
    key = "optimizer" if name is None else f"optimizer.{name}"
    value = f"{made.__module__}.{made.__name__}" if name is None else arguments[name]
    return [Problem(key, value, reason=said or whole)]


def _failure(kind: Any, arguments: Mapping[str, Any]) -> str | None:
    try:
        _after_a_step(kind, arguments)
    except Exception as error:  # whatever a class of somebody else raises
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def _after_a_step(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """Return an optimizer that took a step with a matrix and a vector."""
    ones = imported("torch.ones")
    held = [imported("torch.nn.Parameter")(ones(*shape)) for shape in ((_SIDE, _SIDE), (_SIDE,))]
    for each in held:
        each.grad = ones(each.shape)
    with quietly():
        made = kind([{"params": held[:1]}, {"params": held[1:]}], lr=1e-3, **arguments)
        made.step()
    return made


_MOMENTS_KEY = "optimizer.carry"
# Beginnings of dotted names: bitsandbytes' have bits and pages in theirs
_WITH_MOMENTS = tuple(
    f"{library}.optim.{name}"
    for library in ("torch", "bitsandbytes")
    for name in ("adam.Adam", "adamw.AdamW")
)
_MOMENTS = {"exp_avg", "exp_avg_sq"}


def carry_problems(config: RunRequest) -> Iterator[Problem]:
    """Yield why trainings can't start from moments, as far as files are at hand."""
    if not config.optimizer.carry:
        return
    optimizer, options = config.optimizer, config.adaptation
    name = optimizer.target.rpartition(".")[2]
    other = "; choose optimizer=adamw, or leave optimizer.carry out"
    reasons: list[str] = []
    if not optimizer.target.startswith(_WITH_MOMENTS):
        reasons.append(
            f"{name} has other state than the two moments of Adam and AdamW, which are carried"
            f"{other}"
        )
    elif optimizer.arguments.get("amsgrad"):
        reasons.append(
            f"with optimizer.amsgrad = true there is a third moment, which is not carried{other}"
        )
    if any(spec.new_blocks_only for spec in config.expansion):
        reasons.append(
            "with expansion.llama_pro.new_blocks_only = true only new blocks are trained, and "
            "they have no moments yet; leave one of the two out"
        )
    appends = any(getattr(spec, "is_append", False) for spec in config.expansion)
    if appends and options.freeze_base and options.unfreeze_after is None:
        reasons.append(
            "with adaptation.freeze_base = true only appended experts are trained, and they have "
            "no moments yet; leave it out, or set adaptation.freeze_base=false or "
            "adaptation.unfreeze_after"
        )
    for reason in reasons:
        yield Problem(_MOMENTS_KEY, True, reason=reason)
    if config.model.model_type == "hf" and Path(config.model.path).is_dir():
        yield from moment_problems(Path(config.model.path))


def moment_problems(folder: Path) -> list[Problem]:
    """Return why trainings can't start from the moments beside a checkpoint."""
    try:
        if state_kinds_of(folder) >= _MOMENTS:
            return []
    except TritterError as error:
        return [Problem(_MOMENTS_KEY, True, reason=str(error))]
    reason = (
        f"{folder} has no state/ with Adam's moments (exp_avg and exp_avg_sq); a run with "
        "optimizer.carry=true leaves them beside what it trained, and tritter export takes "
        "them from a .ckpt. Leave optimizer.carry out to start without"
    )
    return [Problem(_MOMENTS_KEY, True, reason=reason)]

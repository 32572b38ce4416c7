"""`optimizer`: any of torch's and bitsandbytes' by name, or anybody's by `_target_`."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.util import find_spec
from typing import Any

from tritter.config.reading import Reader, new_name
from tritter.config.schema import OptimizerConfig, OptimizerValues
from tritter.errors import Problem, RequestError, nearest
from tritter.targets import TARGET, argument_problems, dotted, imported, quietly, resolve

OPTIMIZER = "torch.optim.Optimizer"
_TORCH, _EIGHT_BIT = "torch.optim", "bitsandbytes.optim"
# Known by name where bitsandbytes is not installed
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
_SIDE = 16  # of the matrix that a step is tried with
_OWN = ("params", "lr")  # which Tritter gives


def optimizer_class(raw: Mapping[str, Any]) -> type:
    """Return the class of an optimizer, by its name or by `_target_`.

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
        if not found.startswith(_EIGHT_BIT) or find_spec("bitsandbytes") is not None:
            with quietly():
                return resolve("optimizer.name", found, base=OPTIMIZER)
        reason = "it needs bitsandbytes, which is not installed: pip install 'tritter[8bit]'"
        raise RequestError(Problem("optimizer.name", name, reason=reason))
    names = {spelling: target.rpartition(".")[2] for spelling, target in classes.items()}
    reason = f"allowed is one of {', '.join(sorted(names.values()))}, or optimizer.{TARGET}"
    near = names.get(nearest(spelled, names) or "")
    raise RequestError(Problem("optimizer.name", name, reason=reason, nearest=near))


def read_optimizer(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> OptimizerConfig | None:
    """Return the optimizer of a run, or None when there were problems (now reported)."""
    kind = classes.get("optimizer")
    own = [field.name for field in fields(OptimizerValues)]
    given = {name: value for name, value in raw.items() if name in own}
    values = reader.read(OptimizerValues, given, prefix="optimizer")
    arguments = {n: value for n, value in raw.items() if n not in (*own, "name", TARGET)}
    if values is None or kind is None:
        return None
    old = {name: now for name in arguments if (now := new_name(f"optimizer.{name}"))}
    for name, now in old.items():
        reader.report(f"optimizer.{name}", arguments[name], reason=f"it is called {now} now")
    known = {name: value for name, value in arguments.items() if name not in old}
    reader.problems += _problems(kind, known, values.weight_decay)
    return OptimizerConfig(target=dotted(kind), arguments=arguments, **asdict(values))


def _classes() -> dict[str, str]:
    """Return, by spelling, the dotted names of torch's optimizers and bitsandbytes'."""
    torch_optim, base = imported(_TORCH), imported(OPTIMIZER)
    names = [
        f"{_TORCH}.{name}"
        for name, kind in vars(torch_optim).items()
        if inspect.isclass(kind) and issubclass(kind, base) and kind is not base
    ]
    names += [f"{_EIGHT_BIT}.{name}" for name in _OF_BITSANDBYTES]
    return {_spelling(name.rpartition(".")[2]): name for name in reversed(names)}


def _spelling(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _problems(
    kind: type, arguments: Mapping[str, Any], weight_decay: float | None
) -> list[Problem]:
    if "lr" in arguments:
        reason = "the schedule gives it; say training.learning_rate"
        return [Problem("optimizer.lr", arguments["lr"], reason=reason)]
    if weight_decay is not None and "weight_decay" not in inspect.signature(kind).parameters:
        reason = f"{kind.__name__} has none; set optimizer.weight_decay=null"
        return [Problem("optimizer.weight_decay", weight_decay, reason=reason)]
    return list(argument_problems(kind, arguments, key="optimizer", given=_OWN)) or _tried(
        kind, arguments
    )


def _tried(kind: Any, arguments: Mapping[str, Any]) -> list[Problem]:
    """Take a step for trial; what comes of it is told of the first argument that alone leads to
    it."""
    whole = _failure(kind, arguments)
    if whole is None:
        return []
    alone = ((name, _failure(kind, {name: value})) for name, value in arguments.items())
    name, said = next(((n, told) for n, told in alone if told), (None, whole))
    key = "optimizer" if name is None else f"optimizer.{name}"
    value = f"{kind.__module__}.{kind.__name__}" if name is None else arguments[name]
    return [Problem(key, value, reason=said or whole)]


def _failure(kind: Any, arguments: Mapping[str, Any]) -> str | None:
    try:
        _after_a_step(kind, arguments)
    except Exception as error:  # whatever a class of somebody else raises
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return None


def kept_per_parameter(optimizer: OptimizerConfig) -> float:
    """Return how many numbers an optimizer keeps for each parameter of a matrix: of Adam two."""
    held = _after_a_step(imported(optimizer.target), optimizer.arguments)
    state = held.state[held.param_groups[0]["params"][0]].values()
    sizes = [value.numel() for value in state if hasattr(value, "numel")]
    return sum(size for size in sizes if size > 1) / _SIDE**2


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

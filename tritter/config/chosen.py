"""Groups of which one option is chosen that names a class of ours, or none: growth, experts."""

from collections.abc import Iterator, Mapping
from typing import Any

from tritter.config.folders import body_of, option_files
from tritter.config.schema import ONE_OF, RunConfig
from tritter.errors import Problem, RequestError
from tritter.options import is_options
from tritter.targets import TARGET, resolve

_ADAMS = ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def chosen_class(group: str, raw: Mapping[str, Any], *, base: str, nothing: str) -> type | None:
    """Return the class that a group names; None where it is `none`.

    Args:
        base: dotted name of what it has to be a subclass of.
        nothing: what happens with `none`, for the message about a key of it.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    if not raw:
        return None
    options = [name for name in option_files().get(group, {}) if name != "none"]
    if TARGET not in raw:
        key, value = next(iter(raw.items()))
        reason = f"{nothing} with {group}=none, which has no keys; choose {group}={options[0]}"
        raise RequestError(Problem(f"{group}.{key}", value, reason=reason))
    kind: type = resolve(f"{group}.{TARGET}", raw[TARGET], base=base)
    if not is_options(kind.Options):  # type: ignore[attr-defined]
        reason = "its Options are no record of options (see tritter.options.options)"
        raise RequestError(Problem(f"{group}.{TARGET}", raw[TARGET], reason=reason))
    return kind


def chosen_keys() -> list[str]:
    """Return the dotted keys of such groups, as their options state them."""
    keys = (
        f"{group}.{key}"
        for group in ONE_OF
        for path in option_files().get(group, {}).values()
        for key in body_of(path)
        if key != TARGET
    )
    return list(dict.fromkeys(keys))


def adam_problems(config: RunConfig, *, doing: str) -> Iterator[Problem]:
    """Yield that the optimizer is no Adam whose moments can follow a change of the model.

    Args:
        doing: what needs it.
    """
    name = config.optimizer.target.rpartition(".")[2]
    if name not in _ADAMS or config.optimizer.arguments.get("amsgrad"):
        reason = (
            f"{doing}, and {name} has other state; allowed are {', '.join(_ADAMS)} without amsgrad"
        )
        yield Problem("optimizer", name, reason=reason)

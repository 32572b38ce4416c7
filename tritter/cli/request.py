"""From the words of `tritter expand` to expansions: which option belongs to which method."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tritter.config.problems import describe, raise_problems
from tritter.config.reading import Reader
from tritter.errors import RequestError, TritterError, did_you_mean, nearest
from tritter.expansion import EXPANSIONS, ExpansionSpec

Name = TypeVar("Name", bound=str)

# Option → the methods that take it, and what it is called there.
METHOD_OPTIONS: dict[str, dict[str, str]] = {
    "target_layers": dict.fromkeys(("dus", "stack", "interpolate", "llama_pro"), "target_layers"),
    "drop_layers": {"dus": "drop_layers"},
    "identity_init": dict.fromkeys(("dus", "stack", "interpolate"), "identity_init"),
    "partial": {"stack": "partial"},
    "positions": {"llama_pro": "positions"},
    "hidden_size": {"width": "hidden_size"},
    "intermediate_size": {"width": "intermediate_size"},
    "num_heads": {"width": "num_attention_heads"},
    "num_kv_heads": {"width": "num_key_value_heads"},
    "head_strategy": {"width": "head_strategy"},
    "width_init": {"width": "init"},
    "shares": {"width": "shares"},
    "num_experts": dict.fromkeys(("moe", "moe_add"), "num_experts"),
    "experts_per_token": {"moe": "experts_per_token"},
    "reinit_fraction": {"moe": "reinit_fraction"},
    "granularity": {"moe": "granularity"},
    "sparse_layers": {"moe": "layers"},
    "addition": {"moe_add": "addition"},
    "expert_init": {"moe_add": "init"},
    "clone_from": {"moe_add": "clone_from"},
    "teacher": {"moe_add": "teacher"},
    "noise": dict.fromkeys(("width", "moe", "moe_add"), "noise"),
}


def spelled(name: str) -> str:
    """Return a name as the command line writes it: dashes for underscores."""
    return name.replace("_", "-")


def method_names(words: Sequence[str]) -> tuple[str, ...]:
    """Return the methods named by `--method`, in order.

    Raises:
        RequestError: one does not exist; names those that do.
    """
    names = [name.strip().replace("-", "_") for word in words for name in word.split(",")]
    for name in names:
        if name not in EXPANSIONS:
            shown, allowed = spelled(name) or "(empty)", [spelled(known) for known in EXPANSIONS]
            raise RequestError(
                f"--method = {shown}: there are {', '.join(allowed)}; several are joined by "
                f"commas.{did_you_mean(shown, allowed)}"
            )
    return tuple(names)


def specs_of(methods: Sequence[str], given: Mapping[str, Any]) -> tuple[ExpansionSpec, ...]:
    """Return the expansions that methods and options describe.

    Args:
        given: option → value, of those that were given; other names are not looked at.

    Raises:
        RequestError: an option that no method takes, or that several would; a value that is not
            allowed. All problems at once.
    """
    problems = []
    fields: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for option, takers in METHOD_OPTIONS.items():
        if option not in given:
            continue
        taking = [name for name in methods if name in takers]
        if len(taking) == 1:
            fields[taking[0]][takers[taking[0]]] = given[option]
        else:
            problems.append(_misplaced(option, given[option], methods=methods, taking=taking))
    raise_problems(problems)
    reader = Reader([])
    specs = tuple(_read(reader, name, fields[name]) for name in methods)
    with in_options():
        raise_problems(reader.problems)
    return specs


def choice(option: str, word: str, allowed: Sequence[Name]) -> Name:
    """Return the allowed word that an option's value spells, with - or _.

    Raises:
        RequestError: it is none of them.
    """
    for name in allowed:
        if name == word.replace("-", "_"):
            return name
    shown = [spelled(name) for name in allowed]
    reason = f"allowed is one of {', '.join(shown)}"
    raise RequestError(
        describe(f"--{option}", word, reason=reason, nearest=nearest(spelled(word), shown))
    )


@contextmanager
def in_options() -> Iterator[None]:
    """Let refusals speak of the options that were typed, not of configuration keys."""
    try:
        yield
    except RequestError as error:
        raise RequestError(_with_options(str(error))) from error


@contextmanager
def damage_is_a_wrong_request() -> Iterator[None]:
    """Refuse a checkpoint that cannot be opened as what it is: the wrong thing to ask for."""
    try:
        yield
    except TritterError as error:
        raise RequestError(_with_options(str(error))) from error


def _misplaced(option: str, value: Any, *, methods: Sequence[str], taking: Sequence[str]) -> str:
    key = f"--{spelled(option)}"
    if taking:
        reason = (
            f"{_listed(taking)} would {'both' if len(taking) == 2 else 'all'} take it; expand in "
            "commands of their own to say which"
        )
    else:
        takers = list(METHOD_OPTIONS[option])
        reason = (
            f"--method {','.join(map(spelled, methods))} does not take it; {_listed(takers)} "
            f"{'does' if len(takers) == 1 else 'do'}"
        )
    return describe(key, value, reason=reason)


def _listed(names: Sequence[str]) -> str:
    """Return `dus, stack and llama-pro` for these names."""
    *others, last = map(spelled, names)
    return f"{', '.join(others)} and {last}" if others else last


def _read(reader: Reader, name: str, values: Mapping[str, Any]) -> Any:
    """Read a method's options as a configuration's are read, defaults filled in."""
    defaults = {field.name: field.default for field in dataclasses.fields(EXPANSIONS[name])}
    return reader.read(EXPANSIONS[name], defaults | dict(values), prefix=f"expansion.{name}")


def _with_options(text: str) -> str:
    by_field = {
        f"expansion.{method}.{field}": f"--{spelled(option)}"
        for option, takers in METHOD_OPTIONS.items()
        for method, field in takers.items()
    }
    text = re.sub(r"expansion\.\w+\.\w+", lambda key: by_field.get(key[0], key[0]), text)
    return re.sub(r"^(checkpoint|target_params|dtype)\b", lambda key: f"--{spelled(key[0])}", text)

"""Expansions as a program hands them over: each one, and its options of the right type."""

from dataclasses import fields, is_dataclass

from tritter.config.problems import raise_problems
from tritter.config.reading import Reader
from tritter.errors import RequestError, brief
from tritter.expansion import EXPANSIONS, ExpansionSpec


def checked_specs(specs: object) -> tuple[ExpansionSpec, ...]:
    """Return expansions as they were given, their options of the right type and in their limits.

    Raises:
        RequestError: there is none, something else is among them, or an option is wrong.
    """
    known = ", ".join(f"{kind.__name__}()" for kind in EXPANSIONS.values())
    if not isinstance(specs, list | tuple):
        raise RequestError(
            f"specs = {brief(specs)}: give a list of expansions, such as [Width()]; there are "
            f"{known}."
        )
    if not specs:
        raise RequestError("expand needs at least one expansion.")
    reader = Reader([])
    for spec in specs:
        if isinstance(spec, type) or not (is_dataclass(spec) and hasattr(spec, "target_config")):
            raise RequestError(f"specs: {brief(spec)} is no expansion; there are {known}.")
        options = {field.name: getattr(spec, field.name) for field in fields(spec)}
        reader.read(type(spec), options, prefix=f"expansion.{getattr(spec, 'name', '')}")
    raise_problems(reader.problems)
    return tuple(specs)

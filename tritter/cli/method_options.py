"""Options of `tritter expand` that belong to a method: the keys that its option file states.

Help reads the files and imports nothing; what a value may be is judged by the method's own record,
when the command runs.
"""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from functools import cache
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from tritter.cli.option import CheckpointCommand
from tritter.cli.values import spelled
from tritter.config.folders import (
    Front,
    body_of,
    composing_from,
    front,
    front_of,
    option_files,
)
from tritter.config.launch.help import comments
from tritter.targets import TARGET

# Keys that the command line calls otherwise: by fewer words, or by which `init` is meant
_CALLED = {
    "width.num_attention_heads": "num_heads",
    "width.num_key_value_heads": "num_kv_heads",
    "width.init": "width_init",
    "moe.layers": "sparse_layers",
    "moe_add.init": "expert_init",
}
_OF_THE_TRAINING = "new_blocks_only"


class MethodCommand(CheckpointCommand):
    """A command with the options of all methods besides its own; they end up in `ctx.obj`."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [*super().get_params(ctx), *_parameters(front())]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.with_resource(composing_from(front_of(_folders(args), None)))
        rest = super().parse_args(ctx, args)
        given = {name: ctx.params.pop(name) for name in method_options()}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        return rest


def _folders(words: Sequence[str]) -> list[str]:
    """Return what --config-dir names, which says what other options there are."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config-dir", "--config_dir", "-cd", action="append", default=[])
    try:
        return list(parser.parse_known_args(list(words))[0].config_dir)
    except ArgumentError:  # the folder is missing, which is told where options are read
        return []


def method_bodies() -> dict[str, dict[str, Any]]:
    """Return method → key → default, as the option files state them."""
    return _bodies(front())


@cache
def _bodies(_of: Front) -> dict[str, dict[str, Any]]:
    files = option_files()["expansion"]
    bodies = {name: body_of(path).get(name) for name, path in files.items() if name != "none"}
    return {name: body for name, body in bodies.items() if isinstance(body, dict)}


def method_options() -> dict[str, dict[str, str]]:
    """Return option → method that takes it → what it is called there."""
    options: dict[str, dict[str, str]] = {}
    for method, body in method_bodies().items():
        for key in body:
            if key not in (TARGET, _OF_THE_TRAINING):
                option = _CALLED.get(f"{method}.{key}", key)
                options.setdefault(option, {})[method] = key
    return options


@cache
def _parameters(_of: Front) -> list[Any]:
    """Return the options as Typer makes them of a function's parameters."""

    def carrier() -> None: ...

    carrier.__signature__ = Signature(list(_declared()))  # type: ignore[attr-defined]
    one = typer.Typer(add_completion=False, context_settings={"help_option_names": []})
    one.command()(carrier)
    return typer.main.get_command(one).params


def _declared() -> Iterator[Parameter]:
    told = {method: comments(option_files()["expansion"][method]) for method in method_bodies()}
    for option, takers in method_options().items():
        helps: dict[str, list[str]] = {}
        for method, key in takers.items():
            helps.setdefault(_told(method, key, told[method].get(key, "")), []).append(method)
        is_flag = all(method_bodies()[method][key] is False for method, key in takers.items())
        declared = typer.Option(
            f"--{spelled(option)}",
            metavar=" " if is_flag else "VALUE",
            help=" ".join(f"{spelled(', '.join(names))}: {text}." for text, names in helps.items()),
            rich_help_panel="Methods",
        )
        kind: Any = bool if is_flag else str
        annotation = Annotated[kind | None, declared]
        yield Parameter(option, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _told(method: str, key: str, comment: str) -> str:
    """Return a comment as a line of help, the default named."""
    default = method_bodies()[method][key]
    stated = [] if default is None or default is False else [f"default: {default}"]
    told = "; ".join([*filter(None, [comment]), *stated]).replace("null = ", "default: ")
    return told.replace("[", r"\[")  # which is markup else

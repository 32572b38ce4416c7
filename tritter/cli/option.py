"""How an option of `tritter` is declared, and which may be typed as plain words."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand

# Options that name a checkpoint, in the order of their plain words
_CHECKPOINTS = ("checkpoint", "source", "result")


class CheckpointCommand(TyperCommand):
    """A command whose checkpoints are typed as plain words, or after their options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = {each.name: each for each in self.params}
        self._named = [options[name] for name in _CHECKPOINTS if name in options]
        self._is_required = any(each.required for each in self._named)
        for each in self._named:
            each.required = False
        self.params = [*map(_plain_word, self._named), *self.params]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        words = {each.name: ctx.params.pop(f"{each.name}_word") for each in self._named}
        words = {name: word for name, word in words.items() if word is not None}
        options = [each for each in self._named if ctx.params[each.name] is not None]
        shown = " ".join([ctx.command_path, *(str(each.metavar) for each in self._named)])
        if words and options:
            names = " and ".join(each.opts[0] for each in options)
            plain = " ".join(words.values())
            ctx.fail(f"{plain} together with {names}: use plain words (`{shown}`) or options.")
        ctx.params |= words
        missing = [each for each in self._named if ctx.params[each.name] is None]
        if missing and self._is_required and not ctx.resilient_parsing:
            names = " and ".join(each.opts[0] for each in missing)
            ctx.fail(f"Missing {names}: type `{shown}` with a folder or a hub id.")
        for name in words:
            ctx.set_parameter_source(name, ctx.get_parameter_source(f"{name}_word"))
        return rest


def _plain_word(option: Any) -> TyperArgument:
    """Return the plain word that stands for an option, which then refers to it in the help."""
    word = TyperArgument(
        param_decls=[f"{option.name}_word"],
        type_descriptor=option.type_descriptor,
        metavar=option.metavar,
        help=option.help,
    )
    option.help = f"The same as {option.metavar}."
    return word


def option(
    names: str,
    metavar: str,
    told: str,
    *,
    panel: str | None = None,
    parser: Callable[[str], Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    shows_default: bool = True,
    completes: Callable[[str], list[str]] | None = None,
) -> Any:
    """Return Typer's description of an option.

    Args:
        names: as it is typed, one or two, parted by a blank.
        metavar: what stands for its value in the help.
        told: its line of help.
        panel: under which heading it stands.
        completes: returns what a shell may put in place of a value that is begun.
    """
    return typer.Option(
        *names.split(),
        metavar=metavar,
        help=told,
        rich_help_panel=panel,
        parser=parser,
        min=least,
        max=most,
        show_default=shows_default,
        autocompletion=completes,
    )


def flag(names: str, told: str, *, panel: str | None = None) -> Any:
    """Return Typer's description of an option without a value."""
    return option(names, " ", told, panel=panel)

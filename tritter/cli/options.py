"""Options that several commands share, and the parsers of their values."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperArgument, TyperCommand

from tritter.errors import Problem, RequestError, brief, nearest
from tritter.limits import MAX_BYTES, MAX_PARAMETERS, MAX_SEED, parse_count
from tritter.storage.reading import named_path

# Options that name a checkpoint, in the order of the positional arguments
_CHECKPOINTS = ("checkpoint", "source", "result")
_MAX_FLOPS = 10**24  # per second and device
_Name = TypeVar("_Name", bound=str)
WRITING = "Writing"
Folder = Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint.", metavar="DIR")]
RUNS_ARGUMENT = "RUN_OR_SWEEP"


class CheckpointCommand(TyperCommand):
    """A command that accepts checkpoints as positional arguments or as options."""

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
            ctx.fail(f"{plain} together with {names}: use arguments (`{shown}`) or options.")
        ctx.params |= words
        missing = [each for each in self._named if ctx.params[each.name] is None]
        if missing and self._is_required and not ctx.resilient_parsing:
            names = " and ".join(each.opts[0] for each in missing)
            ctx.fail(f"Missing {names}: type `{shown}` with a folder or a hub id.")
        for name in words:
            ctx.set_parameter_source(name, ctx.get_parameter_source(f"{name}_word"))
        return rest


def _plain_word(option: Any) -> TyperArgument:
    """Return a positional argument for an option, whose help then refers to the argument."""
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
    help_text: str,
    *,
    panel: str | None = None,
    parser: Callable[[str], Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    shows_default: bool = True,
    completes: Callable[[], Iterable[str]] | None = None,
) -> Any:
    """Declare an option for Typer.

    Args:
        names: spellings of the option, separated by blanks.
        metavar: placeholder of the value in the help.
        help_text: its help.
        panel: its heading in the help.
        parser: converts the typed text.
        least: smallest allowed value.
        most: largest allowed value.
        shows_default: show the default in the help.
        completes: returns the names that complete the last one in a comma-separated list.
    """
    return typer.Option(
        *names.split(),
        metavar=metavar,
        help=help_text,
        rich_help_panel=panel,
        parser=parser,
        min=least,
        max=most,
        show_default=shows_default,
        autocompletion=None if completes is None else _completer(completes),
    )


def _completer(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a completion function for the last name in a comma-separated list."""

    def completes(incomplete: str) -> list[str]:
        done = incomplete[: incomplete.rfind(",") + 1]
        return [found for name in names() if (found := done + name).startswith(incomplete)]

    return completes


def flag(names: str, help_text: str, *, panel: str | None = None) -> Any:
    """Declare an option without a value for Typer."""
    return option(names, " ", help_text, panel=panel)


def with_dashes(name: str) -> str:
    """Return a name in command-line spelling, with dashes instead of underscores."""
    return name.replace("_", "-")


def choice(option: str, word: str, allowed: Sequence[_Name]) -> _Name:
    """Return the allowed value that matches the typed one, spelled with - or _."""
    for name in allowed:
        if name == word.replace("-", "_"):
            return name
    shown = [with_dashes(name) for name in allowed]
    reason = f"must be one of {', '.join(shown)}"
    raise RequestError(
        Problem(option, word, reason=reason, nearest=nearest(with_dashes(word), shown))
    )


def parameter_count(text: str) -> int:
    """Parse a count such as 7B, 1.5b, 350M, 7e9 or 7_000_000."""
    example = "a count above 0, such as 7B, 350M or 7e9"
    return _parse_scaled(str(text), example=example, limit=MAX_PARAMETERS)


def flops_rate(text: str) -> int:
    """Parse FLOPs per second, such as 312T or 9.89e14."""
    example = "FLOPs per second above 0, such as 312T or 9.89e14"
    return _parse_scaled(str(text), example=example, limit=_MAX_FLOPS)


def _byte_count(text: str) -> int:
    """Parse a size such as 5GB, 500MB (powers of 1000) or 4GiB (powers of 1024)."""
    example = "a size above 0, such as 5GB, 500MB or 4GiB"
    return _parse_scaled(str(text), example=example, limit=MAX_BYTES, is_bytes=True)


def parse_path(text: str) -> Path:
    """Parse a path and expand `~`."""
    try:
        return named_path(str(text), key="path")
    except RequestError as error:
        raise typer.BadParameter(str(error).removeprefix("path = ")) from error


def named_paths(key: str, words: Iterable[str]) -> dict[str, list[str]]:
    """Return domain → paths for NAME=PATH or PATH words; a name may occur several times.

    A plain path is a domain named after it.

    Args:
        key: the option of the words, for messages.
        words: as typed.
    """
    from tritter.data.options import named_after, unused_name

    found: dict[str, list[str]] = {}
    for word in words:
        name, sign, path = word.partition("=")
        is_named = bool(sign) and name.replace("-", "_").isidentifier()
        if not named_path(word, key=key).exists() and is_named:
            found.setdefault(name, []).append(path)
        else:
            found[unused_name(named_after([word]), found)] = [word]
    return found


def _parse_scaled(text: str, *, example: str, limit: int, is_bytes: bool = False) -> int:
    value = parse_count(text, is_bytes=is_bytes)
    if value is None:
        raise typer.BadParameter(f"{brief(text)} is not {example}.")
    if value > limit:
        raise typer.BadParameter(f"{brief(text)} is above the maximum of {limit:.0e}.")
    return value


AsJson = Annotated[bool, flag("--json", "Print one JSON object only.")]
Checkpoint = Annotated[str, option("--checkpoint", "SRC", "Folder or hub id of the model.")]
Seed = Annotated[int, option("--seed", "N", "Random seed.", least=0, most=MAX_SEED)]
MaxShardSize = Annotated[
    int,
    option(
        "--max-shard-size",
        "SIZE",
        "Maximum size of a file, such as 500MB or 4GiB. Default: 5GB.",
        parser=_byte_count,
        shows_default=False,
        panel=WRITING,
    ),
]
DType = Annotated[
    str | None,
    option(
        "--dtype",
        "float32|bfloat16|float16|float64",
        "dtype of the result. Default: that of the source.",
        panel=WRITING,
    ),
]
Overwrite = Annotated[bool, flag("--overwrite", "Replace the checkpoint at DST.", panel=WRITING)]
Runs = Annotated[
    list[Path],
    typer.Argument(
        help="Run folders, or folders that contain them.",
        metavar=f"{RUNS_ARGUMENT}...",
        parser=parse_path,
    ),
]
ReportOverwrite = Annotated[bool, flag("--overwrite", "Replace the file at --output.")]


def is_typed(context: typer.Context, name: str) -> bool:
    """Return True if an option was typed on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

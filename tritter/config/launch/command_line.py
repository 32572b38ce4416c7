"""The words after `python train.py`, sorted; imports nothing heavy, so that help is quick."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tritter.config.folders import SEARCHPATH
from tritter.config.suggestions import flag_advice
from tritter.errors import Problem, RequestError, brief, nearest

# As Hydra's own parser has them; those with a value → what may stand behind them
_WHAT = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_SWITCHES = (
    ("-h", "--help"),
    ("--help-all",),
    ("--hydra-help",),
    ("--version",),
    ("-m", "--multirun"),
    ("--resolve",),
    ("-sc", "--shell-completion"),
)
_VALUED = {
    ("-c", "--cfg"): ("job", "hydra", "all"),
    ("-p", "--package"): (),
    ("-cn", "--config-name"): (),
    ("-cd", "--config-dir"): (),
    ("-i", "--info"): _WHAT,
}
FLAGS = (*_SWITCHES, *_VALUED)
HELP_FLAGS = frozenset({"-h", "--help", "--help-all"})


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The words after `python train.py`, sorted.

    Args:
        overrides: GROUP=OPTION and KEY=VALUE words, as typed.
        is_multirun: -m was given.
        shows: a flag that Hydra answers by itself: cfg, info, hydra_help or shell_completion.
        what: the value of that flag.
        package: of --package, which goes with --cfg.
        is_resolved: --resolve was given, which goes with --cfg.
        config_folders: of --config-dir, as typed.
        config_name: of --config-name.
        searchpath: of hydra.searchpath, as typed.
        is_help: -h or --help-all was given.
        is_help_whole: --help-all was given.
        is_version: --version was given.
    """

    overrides: tuple[str, ...]
    is_multirun: bool = False
    shows: str | None = None
    what: str | None = None
    package: str | None = None
    is_resolved: bool = False
    config_folders: tuple[str, ...] = ()
    config_name: str | None = None
    searchpath: tuple[str, ...] = ()
    is_help: bool = False
    is_help_whole: bool = False
    is_version: bool = False


# What the system, not the program, refuses
UNFORESEEN = (OSError, MemoryError, RecursionError, OverflowError, UnicodeError)


def said(error: BaseException) -> str:
    """Return what an unforeseen error says, in one line."""
    return f"{' '.join(str(error).split()) or 'no memory is left'} ({type(error).__name__})."


def check_encodable(words: Sequence[str]) -> None:
    """Refuse words that are no text.

    Raises:
        RequestError: one holds a NUL character, or bytes that are not UTF-8.
    """
    for number, word in enumerate(words, start=1):
        if "\0" in word:
            raise RequestError(f"word {number} = {brief(word)}: it holds a NUL character.")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"word {number} = {brief(word)}: it holds bytes that are not UTF-8 text."
            ) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help).")


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Sort the words of a command line.

    Raises:
        RequestError: a flag that there is not, or that goes with another.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names in _SWITCHES:
        parser.add_argument(*names, action="store_true")
    for names, choices in _VALUED.items():
        how: dict[str, Any] = {"nargs": "?", "const": "all"} if "--info" in names else {}
        if "--config-dir" in names:
            how = {"action": "append", "default": []}
        parser.add_argument(*names, choices=choices or None, **how)
    parser.add_argument("overrides", nargs="*")
    words = list(arguments)
    for place, word in enumerate(words[:-1]):  # an --info does not take the setting after it
        if word in ("-i", "--info") and "=" in words[place + 1]:
            words[place] = "--info=all"
    known, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        known_flags = {flag[-1].strip("-"): flag[-1] for flag in FLAGS}
        typed = unknown[0].partition("=")[0].strip("-")
        near = nearest(typed, known_flags) if len(unknown) == 1 else None
        meant = f" Did you mean {known_flags[near]}?" if near else ""
        if (advice := flag_advice(unknown[0], arguments, command="train")) is not None:
            meant = f" {advice}"
        raise RequestError(f"unrecognized arguments: {' '.join(unknown)} (see --help).{meant}")
    searchpath, overrides = split_searchpath(known.overrides)
    asked = {"cfg": known.cfg, "info": known.info}
    asked |= {name: "" for name in ("hydra_help", "shell_completion") if getattr(known, name)}
    shows = [name for name, value in asked.items() if value is not None]
    has_help = known.help or known.help_all
    is_help = has_help or known.version
    if not is_help and len(shows) + known.multirun > 1:
        flags = [f"--{name.replace('_', '-')}" for name in (*shows, *["multirun"] * known.multirun)]
        raise RequestError(f"{' and '.join(flags)}: each asks for something else; give one.")
    if not is_help and (known.package or known.resolve) and known.cfg is None:
        raise RequestError("--package and --resolve go with --cfg job, --cfg hydra or --cfg all.")
    return CommandLine(
        overrides=overrides,
        is_multirun=known.multirun,
        shows=None if is_help or not shows else shows[0],
        what=None if is_help or not shows else asked[shows[0]],
        package=known.package,
        is_resolved=known.resolve,
        config_folders=tuple(known.config_dir),
        config_name=known.config_name,
        searchpath=searchpath,
        is_help=has_help,
        is_help_whole=known.help_all,
        is_version=known.version and not has_help,
    )


def takes_value(flag: str, word: str) -> bool:
    """Return whether the word behind a flag is, or may be, its value; also of unknown flags."""
    if any(flag in names for names in _SWITCHES):
        return False
    return flag not in ("-i", "--info") or word in _WHAT


def split_searchpath(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the entries of `hydra.searchpath` among some words, and the other words.

    Raises:
        RequestError: it is no list of texts.
    """
    entries: list[str] = []
    others: list[str] = []
    for word in words:
        if not word.lstrip("+").startswith(f"{SEARCHPATH}="):
            others.append(word)
            continue
        from tritter.config.overrides import parse  # Hydra is slow to import

        value = parse([word])[0].value()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            reason = f"must be a list of folders, {SEARCHPATH}=[DIR], as --config-dir names them"
            raise RequestError(Problem(SEARCHPATH, word.partition("=")[2], reason=reason))
        entries += map(str, value)
    return tuple(entries), tuple(others)

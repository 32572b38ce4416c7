"""Parses the arguments of `python train.py`; imports nothing heavy, so that help is fast."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn, Self

from tritter.config.folders import SEARCHPATH, SearchPath
from tritter.config.suggestions import flag_advice
from tritter.errors import Problem, RequestError, brief, nearest

# The flags of Hydra's own parser, and attribute → its flags
_WHAT = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_SWITCHES = {
    "is_help": ("-h", "--help"),
    "is_full_help": ("--help-all",),
    "hydra_help": ("--hydra-help",),
    "is_version": ("--version",),
    "is_multirun": ("-m", "--multirun"),
    "is_resolved": ("--resolve",),
    "shell_completion": ("-sc", "--shell-completion"),
}
# Flags with a value → allowed values
_VALUED = {
    ("-c", "--cfg"): ("job", "hydra", "all"),
    ("-p", "--package"): (),
    ("-cn", "--config-name"): (),
    ("-cd", "--config-dir"): (),
    ("-i", "--info"): _WHAT,
}
_OF_HYDRA = ("hydra_help", "shell_completion")
FLAGS = (*_SWITCHES.values(), *_VALUED)
HELP_FLAGS = frozenset({"-h", "--help", "--help-all"})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help).")


class CommandLine(argparse.Namespace):
    """The parsed arguments of `python train.py`.

    Attributes:
        overrides: GROUP=OPTION and KEY=VALUE arguments, as typed.
        is_multirun: True with -m.
        info_flag: flag that only prints: cfg, info, hydra_help or shell_completion.
        info_value: value of that flag.
        package: value of --package, which requires --cfg.
        is_resolved: True with --resolve, which requires --cfg.
        config_dir: values of --config-dir, as typed.
        config_name: value of --config-name.
        searchpath: entries of hydra.searchpath, as typed.
        is_help: True with -h or --help-all.
        is_full_help: True with --help-all.
        is_version: True with --version.
    """

    overrides: Sequence[str]
    is_multirun: bool
    info_flag: str | None
    info_value: str | None
    package: str | None
    is_resolved: bool
    config_dir: Sequence[str]
    config_name: str | None
    searchpath: Sequence[str]
    is_help: bool
    is_full_help: bool
    is_version: bool

    @property
    def search_path(self) -> SearchPath:
        """The search path that the options name; a RequestError if a folder does not exist."""
        return SearchPath.of(self.config_dir, self.config_name, searchpath=self.searchpath)

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """Parse the arguments of a command line."""
        check_encodable(arguments)
        parser = _Parser(add_help=False, allow_abbrev=False)
        for attribute, names in _SWITCHES.items():
            parser.add_argument(*names, action="store_true", dest=attribute)
        for names, choices in _VALUED.items():
            settings: dict[str, Any] = {"nargs": "?", "const": "all"} if "--info" in names else {}
            if "--config-dir" in names:
                settings = {"action": "append", "default": []}
            parser.add_argument(*names, choices=choices or None, **settings)
        parser.add_argument("overrides", nargs="*")
        remaining = list(arguments)
        for index, argument in enumerate(remaining[:-1]):  # KEY=VALUE is not the value of --info
            if argument in ("-i", "--info") and "=" in remaining[index + 1]:
                remaining[index] = "--info=all"
        parsed, unknown = parser.parse_known_intermixed_args(remaining, cls())
        if unknown:
            known_flags = {flag[-1].strip("-"): flag[-1] for flag in FLAGS}
            typed = unknown[0].partition("=")[0].strip("-")
            near = nearest(typed, known_flags) if len(unknown) == 1 else None
            suggestion = f" Did you mean {known_flags[near]}?" if near else ""
            if (advice := flag_advice(unknown[0], arguments, command="train")) is not None:
                suggestion = f" {advice}"
            raise RequestError(
                f"unrecognized arguments: {' '.join(unknown)} (see --help).{suggestion}"
            )
        parsed.searchpath, parsed.overrides = _split_searchpath(parsed.overrides)
        parsed.is_help |= parsed.is_full_help
        parsed.is_version &= not parsed.is_help
        parsed.info_flag = parsed.info_value = None
        if parsed.is_help or parsed.is_version:
            return parsed
        printing = {name: getattr(parsed, name) for name in ("cfg", "info")}
        printing |= {name: "" if getattr(parsed, name) else None for name in _OF_HYDRA}
        flags = [name for name, value in printing.items() if value is not None]
        if len(flags) + parsed.is_multirun > 1:
            names = (*flags, *["multirun"] * parsed.is_multirun)
            shown = " and ".join(f"--{name.replace('_', '-')}" for name in names)
            raise RequestError(f"{shown}: these flags exclude each other; choose one.")
        if (parsed.package or parsed.is_resolved) and parsed.cfg is None:
            raise RequestError(
                "--package and --resolve require --cfg job, --cfg hydra or --cfg all."
            )
        if flags:
            parsed.info_flag, parsed.info_value = flags[0], printing[flags[0]]
        return parsed


def check_encodable(arguments: Sequence[str]) -> None:
    """Reject arguments that are not valid text."""
    for number, argument in enumerate(arguments, start=1):
        if "\0" in argument:
            raise RequestError(
                f"argument {number} = {brief(argument)}: it contains a NUL character."
            )
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"argument {number} = {brief(argument)}: it contains bytes that are not UTF-8."
            ) from error


def takes_value(flag: str, argument: str) -> bool:
    """Return True if the next argument is, or may be, the value of a flag (known or unknown)."""
    if any(flag in names for names in _SWITCHES.values()):
        return False
    return flag not in ("-i", "--info") or argument in _WHAT


def _split_searchpath(overrides: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the entries of `hydra.searchpath` and all other overrides."""
    entries: list[str] = []
    others: list[str] = []
    for override in overrides:
        if not override.lstrip("+").startswith(f"{SEARCHPATH}="):
            others.append(override)
            continue
        from tritter.config.overrides import parse  # Hydra is slow to import

        value = parse([override])[0].value()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            reason = f"allowed: a list of folders, {SEARCHPATH}=[DIR], or --config-dir DIR"
            raise RequestError(Problem(SEARCHPATH, override.partition("=")[2], reason=reason))
        entries += map(str, value)
    return tuple(entries), tuple(others)

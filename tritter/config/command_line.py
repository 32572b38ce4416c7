"""The words after `python train.py`, sorted; imports nothing heavy, so that help is quick."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from tritter.errors import RequestError


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The words after `python train.py`, sorted.

    Args:
        overrides: GROUP=OPTION and KEY=VALUE words, as typed.
        is_multirun: -m was given.
        hydra_flags: flags that Hydra answers by itself (--cfg, --info, --hydra-help).
        config_folders: of --config-dir, as typed.
        config_name: of --config-name.
        is_help: -h was given.
        is_version: --version was given.
        completion: of -sc: what Hydra's completion is asked for.
    """

    overrides: tuple[str, ...]
    is_multirun: bool = False
    hydra_flags: tuple[str, ...] = ()
    config_folders: tuple[str, ...] = ()
    config_name: str | None = None
    is_help: bool = False
    is_version: bool = False
    completion: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help).")


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Sort the words of a command line.

    Raises:
        RequestError: a flag that there is not.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    parser.add_argument("-cd", "--config-dir", action="append", default=[])
    parser.add_argument("-cn", "--config-name")
    parser.add_argument("-sc", "--shell-completion", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("overrides", nargs="*")
    known = parser.parse_intermixed_args(list(arguments))
    flags = ["--resolve"] if known.resolve else []
    flags += ["--hydra-help"] if known.hydra_help else []
    for name in ("cfg", "package", "info"):
        if getattr(known, name) is not None:
            flags += [f"--{name}", getattr(known, name)]
    return CommandLine(
        overrides=tuple(known.overrides),
        is_multirun=known.multirun,
        hydra_flags=tuple(flags),
        config_folders=tuple(known.config_dir),
        config_name=known.config_name,
        is_help=known.help,
        is_version=known.version,
        completion=known.shell_completion,
    )

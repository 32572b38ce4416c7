"""The words after `python train.py`, sorted; imports nothing heavy, so that help is quick."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tritter.config.folders import SEARCHPATH
from tritter.config.launch.flags import FLAGS, REFUSED, SHELL_REQUESTS
from tritter.config.suggestions import flag_advice
from tritter.errors import Problem, RequestError, nearest


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The words after `python train.py`, sorted.

    Args:
        overrides: GROUP=OPTION and KEY=VALUE words, as typed.
        is_multirun: -m was given.
        hydra_flags: flags that Hydra answers by itself (--cfg, --info).
        config_folders: of --config-dir, as typed.
        config_name: of --config-name.
        searchpath: of hydra.searchpath, as typed.
        is_help: -h was given.
        is_hydra_help: --hydra-help was given.
        is_version: --version was given.
        shell_request: of -sc, one of `SHELL_REQUESTS`; None where it was not given.
    """

    overrides: tuple[str, ...]
    is_multirun: bool = False
    hydra_flags: tuple[str, ...] = ()
    config_folders: tuple[str, ...] = ()
    config_name: str | None = None
    searchpath: tuple[str, ...] = ()
    is_help: bool = False
    is_hydra_help: bool = False
    is_version: bool = False
    shell_request: str | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help).")


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Sort the words of a command line.

    Raises:
        RequestError: a flag that there is not, that Tritter refuses, or that goes with another.
    """
    known, unknown = _parser().parse_known_intermixed_args(_info_alone(arguments))
    _refuse_unknown(unknown, arguments)
    searchpath, overrides = split_searchpath(known.overrides)
    if known.help or known.version:
        return CommandLine(
            overrides,
            config_folders=tuple(known.config_dir),
            config_name=known.config_name,
            searchpath=searchpath,
            is_help=known.help,
            is_version=known.version and not known.help,
        )
    _refuse_together(known)
    request = None
    if known.shell_completion:
        request, overrides = _shell_request(overrides), ()
    flags = ["--resolve"] if known.resolve else []
    for name in ("cfg", "package", "info"):
        if getattr(known, name) is not None:
            flags += [f"--{name}", getattr(known, name)]
    return CommandLine(
        overrides=overrides,
        is_multirun=known.multirun,
        hydra_flags=tuple(flags),
        config_folders=tuple(known.config_dir),
        config_name=known.config_name,
        searchpath=searchpath,
        is_hydra_help=known.hydra_help,
        shell_request=request,
    )


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
            reason = f"allowed is a list of folders, {SEARCHPATH}=[DIR], as --config-dir names them"
            raise RequestError(Problem(SEARCHPATH, word.partition("=")[2], reason=reason))
        entries += map(str, value)
    return tuple(entries), tuple(others)


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag in FLAGS:
        how: dict[str, Any] = {}
        if flag.choices:
            how = {"choices": flag.choices}
        elif not flag.value:
            how = {"action": "store_true"}
        if "--info" in flag.names:
            how |= {"nargs": "?", "const": "all"}
        if "--config-dir" in flag.names:
            how |= {"action": "append", "default": []}
        parser.add_argument(*flag.names, **how)
    for names in REFUSED:
        parser.add_argument(*names, nargs="?", const="", action=_Refused)
    parser.add_argument("overrides", nargs="*")
    return parser


class _Refused(argparse.Action):
    """A flag of Hydra's that is none here."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        reason = next(why for names, why in REFUSED.items() if option_string in names)
        raise RequestError(f"{option_string} is none of Tritter's flags: {reason}.")


def _info_alone(arguments: Sequence[str]) -> list[str]:
    """Return the words, in which an --info before a setting doesn't take it for its own."""
    words = list(arguments)
    for place, word in enumerate(words[:-1]):
        if word in ("-i", "--info") and "=" in words[place + 1]:
            words[place] = "--info=all"
    return words


def _refuse_unknown(words: Sequence[str], arguments: Sequence[str]) -> None:
    """Refuse flags that there are not, and name what was probably meant.

    Args:
        words: the unknown flags.
        arguments: all that was typed.
    """
    if not words:
        return
    names = {flag.names[-1].strip("-"): flag.names[-1] for flag in FLAGS}
    near = nearest(words[0].partition("=")[0].strip("-"), names) if len(words) == 1 else None
    meant = f" Did you mean {names[near]}?" if near else ""
    if (advice := flag_advice(words[0], arguments, command="train")) is not None:
        meant = f" {advice}"
    raise RequestError(f"unrecognized arguments: {' '.join(words)} (see --help).{meant}")


def _refuse_together(known: argparse.Namespace) -> None:
    """Refuse flags of which one would be passed over."""

    def is_given(name: str) -> bool:
        return getattr(known, name[2:].replace("-", "_")) not in (None, False)

    asking = [flag.names[-1] for flag in FLAGS if flag.is_asking and is_given(flag.names[-1])]
    if len(asking) == 2 and asking[0] == "--multirun" and asking[1] in ("--cfg", "--info"):
        raise RequestError(f"-m with {asking[1]}: show one job at a time, without -m.")
    if len(asking) > 1:
        raise RequestError(f"{' and '.join(asking)}: each asks for something else; give one.")
    lone = [name for name in ("--package", "--resolve") if is_given(name)]
    if lone and known.cfg is None:
        raise RequestError(f"{lone[0]} goes with --cfg job, --cfg hydra or --cfg all.")


def _shell_request(words: Sequence[str]) -> str:
    if len(words) == 1 and words[0] in SHELL_REQUESTS:
        return words[0]
    shell = " ".join(words).partition("=")[2]
    reason = f"allowed is one of {', '.join(SHELL_REQUESTS)}"
    if shell in ("zsh", "fish", "powershell", "pwsh"):
        reason += "; `tritter --install-completion` is for bash, zsh, fish and PowerShell, and "
        reason += "completes tritter train, the same program"
    near = nearest(words[0], SHELL_REQUESTS) if len(words) == 1 else None
    raise RequestError(Problem("-sc", " ".join(words), reason=reason, nearest=near))

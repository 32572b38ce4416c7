"""Command-line overrides: spelling, sweeps and the jobs of a sweep."""

import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import OverrideParseException

from tritter.config.folders import (
    CHOSEN_BY,
    LADDERS,
    body_of,
    option_files,
    search_path,
    shipped_options,
)
from tritter.config.schema import TYPED_ONLY, RootValues
from tritter.errors import Problem, RequestError, brief, raise_problems
from tritter.options import field_keys, leaves
from tritter.training.options import further_trainer_keys

_Options = Mapping[str, Sequence[str]]

# A dataset name with #COLUMN or [FROM:TO], which Hydra accepts only in quotes
_DATASET = re.compile(r"(?<![\w'\"/.-])hf:[^\s,{}\[\]'\"#]+(?:\[[^\]\s]*\](?:#[\w.-]+)?|#[\w.-]+)")
_PLAIN = re.compile(r"[\w./+-]+")  # needs no quotes in an override, nor within a list of one
_NOTHING = ("null", "none", "off")
_OF_DOMAIN = re.compile(r"data\.(old|new|weights)\.[^._][^.]*")  # keys of a mapping


def normalise(override: str, options: _Options) -> str:
    """Return an override with underscores in place of dashes, as in the config.

    Args:
        override: as typed, `forgetting.l2sp.l2sp-lambda=3` or `expansion=llama-pro`.
        options: group → names of its options.
    """
    key, equals, value = override.partition("=")
    if key.lstrip("+~").startswith("hydra"):
        return override
    key = key.replace("-", "_")
    if key.lstrip("+~").startswith("data."):
        value = _DATASET.sub(lambda match: quote(match[0]), value)
    group = key.lstrip("+~")
    known = options.get(group)
    if known is None:
        return key + equals + value
    # Other groups require an option
    nothing = next((name for name in ("none", "off", "csv") if name in known), None)
    if nothing is not None and (override == f"~{group}" or value in _NOTHING):
        return f"{group}={nothing}"
    if group == "experiment":
        if value == "null":
            return "~experiment"  # this group has no option for none
        key = key.lstrip("+")  # +experiment=NAME, as in Hydra's examples

    def normalise_option(found: re.Match[str]) -> str:
        spelling = found[0].replace("-", "_")
        return spelling if found[0] not in known and spelling in known else found[0]

    return key + equals + re.sub(r"[\w-]+", normalise_option, value)


def quote(value: str) -> str:
    """Return a text as a quoted override value; all characters are allowed."""
    return QuotedString(value, Quote.single).with_quotes()


def override_value(text: str) -> str:
    """Return a text as an override value, quoted only if Hydra would parse it differently."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([f"key={text}"])
        is_read = not parsed.is_sweep_override() and parsed.value() == text
    except OverrideParseException:
        is_read = False
    return text if is_read else quote(text)


def nested_value(value: object) -> str:
    """Return nested mappings, lists and strings as the value of an override."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{nested_value(each)}' for name, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(nested_value, value))}]"
    text = str(value)
    return override_value(text) if _PLAIN.fullmatch(text) else quote(text)


def override_key(override: str) -> str:
    """Return the key of an override, with underscores."""
    return override.partition("=")[0].lstrip("+~").replace("-", "_")


def recorded_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides that a run records: all except the location of the run."""
    omitted = ("resume", "hydra.run.dir", "hydra.sweep.dir")
    return tuple(override for override in overrides if override_key(override) not in omitted)


def parse(overrides: Sequence[str], *, loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides."""
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    problems: list[Problem] = []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except OverrideParseException as error:
            problems.append(_parse_problem(override, str(error.message)))
        except (ValueError, RecursionError, OverflowError) as error:  # Python's, of huge values
            problems.append(_parse_problem(override, str(error)))
    raise_problems(problems)
    return parsed


def _parse_problem(override: str, message: str) -> Problem:
    if "=" not in override:
        text = f"{brief(override)} is not a setting; write KEY=VALUE (see --help)."
        return Problem("", reason=text)
    key, _, value = override.partition("=")
    reason = (message.splitlines() or ["the value is too large"])[0].rstrip(".")
    advice = "put quotes around a value with special characters: 'KEY=\"VALUE\"'"
    return Problem(key, value, reason=f"the value can't be read ({reason}); {advice}")


def _replayed_keys() -> frozenset[str]:
    """Return the keys of shipped options that `resume` replays: all but `TYPED_ONLY`."""
    keys = {*field_keys(RootValues, ""), *further_trainer_keys()}
    for group, options in shipped_options().items():
        if group in ("experiment", LADDERS):
            continue
        for path in options.values():
            keys |= {key for key, value in leaves(body_of(path), group).items() if value != {}}
    return frozenset(key for key in keys - TYPED_ONLY if not key.endswith("._target_"))


def unreplayed_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a run that `resume` does not replay from its folder.

    Replayed are options that are part of Tritter, and plain values of all keys but `TYPED_ONLY`.
    """
    options = {group: [*names] for group, names in shipped_options().items()}
    options[f"gate.{LADDERS}"] = ["null", *options.pop(LADDERS)]
    keys = _replayed_keys()

    def is_replayed(one: str) -> bool:
        try:
            (override,) = parse([one])
        except RequestError:
            return False
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override() or override.package is not None:
            return False
        if key not in options:
            is_known = key in keys or _OF_DOMAIN.fullmatch(key) is not None
            return is_known and _is_plain(value) and not _names_file(key, value)
        if override.is_delete():
            return value is None
        names = value if isinstance(value, list) else ["null" if value is None else value]
        return all(name in options[key] for name in names)

    return [one for one in overrides if not is_replayed(one)]


def _names_file(key: str, value: object) -> bool:
    """Return whether a value names an option file that is not part of Tritter."""
    name = value.get("name") if isinstance(value, dict) else value
    folders = [folder for folder, chosen in CHOSEN_BY.items() if chosen == key]
    is_name = isinstance(name, str)
    return is_name and any(name in option_files().get(folder, {}) for folder in folders)


def _is_plain(value: object) -> bool:
    """Return True if a value contains no class name and no interpolation, at any depth."""
    if isinstance(value, dict):
        is_named = any(str(key).startswith("_") for key in value)
        return not is_named and _is_plain([*value, *value.values()])
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not (isinstance(value, str) and "${" in value)


def refuse_sweeps(overrides: Sequence[Override]) -> None:
    """Reject sweeps in a single run."""
    problems = []
    for override in overrides:
        if override.is_sweep_override():
            key, _, value = (override.input_line or "").partition("=")
            reason = f"several values mean several runs: add -m (or pass a list, {key}=[{value}])"
            if override.value_type is not ValueType.SIMPLE_CHOICE_SWEEP:
                reason = "a sweep requires -m"
            problems.append(Problem(key, value, reason=reason))
    raise_problems(problems)


def program_command() -> tuple[str, ...]:
    """Return the command that started this program, or one like it; it works in the same folder."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name == "train.py":
        return (_python(), str(called))
    if called.name == "tritter" or _is_in_environment("tritter"):
        return ("tritter", "train")
    return (_python(), "-m", "tritter", "train")


def command(arguments: Sequence[str]) -> str:
    """Return a command line of this program, quoted for a shell, with the same search path."""
    return shlex.join([*program_command(), *search_path().flags, *arguments])


def tool_command(program: str, arguments: Sequence[str]) -> str:
    """Return a command line of `tritter`, or of another program in the environment of this one."""
    is_found = _is_in_environment(program) or (program, "train") == program_command()
    start = [program] if is_found else [_python(), "-m", program]
    return shlex.join([*start, *arguments])


def resume_command(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Return the command that resumes the run in a folder.

    Args:
        folder: folder of the run.
        overrides: overrides of the run. The command includes them if `resume` alone does not
            replay all of them.
    """
    recorded = recorded_overrides(overrides)
    needed = recorded if unreplayed_overrides(recorded) else ()
    return command([*needed, f"resume={override_value(str(folder))}"])


def _python() -> str:
    return "python" if _is_in_environment("python") else sys.executable


def _is_in_environment(program: str) -> bool:
    """Return True if the shell finds a program in the environment of this one."""
    found = shutil.which(program)
    return found is not None and Path(found).parent == Path(sys.executable).parent

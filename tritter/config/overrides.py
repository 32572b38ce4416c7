"""The words of a command line: the two spellings of a name, sweeps, and the jobs they make."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    OverrideType,
    Quote,
    QuotedString,
    ValueType,
)
from hydra.errors import OverrideParseException

from tritter.config.folders import CHOSEN_BY, LADDERS, option_files, search_path, shipped_options
from tritter.config.schema import REPLAYED_KEYS
from tritter.config.suggestions import hint_for
from tritter.errors import Problem, RequestError, brief, nearest, raise_problems

Options = Mapping[str, Sequence[str]]

# The name of a data set whose #COLUMN or [FROM:TO] Hydra would not read without quotes
_DATASET = re.compile(r"(?<![\w'\"/.-])hf:[^\s,{}\[\]'\"#]+(?:\[[^\]\s]*\](?:#[\w.-]+)?|#[\w.-]+)")
_PLAIN = re.compile(r"[\w./+-]+")  # needs no quotes in an override, nor within a list of one
_NOTHING = ("null", "none", "off")
# Group=option → the extra of ours that brings it
_EXTRAS = {
    "hydra/launcher=joblib": "sweeps",
    "hydra/launcher=submitit_local": "sweeps",
    "hydra/launcher=submitit_slurm": "sweeps",
    "hydra/launcher=ray": "ray",
    "hydra/sweeper=optuna": "sweeps",
}


def normalise(override: str, options: Options) -> str:
    """Write one override with underscores where the config has them.

    Args:
        override: as typed, `forgetting.l2sp.l2sp-lambda=3` or `expansion=llama-pro`.
        options: group → names of its options.
    """
    key, equals, value = override.partition("=")
    if key.lstrip("+~").startswith("hydra"):
        return override
    key = key.replace("-", "_")
    if key.lstrip("+~").startswith("data."):
        value = _DATASET.sub(lambda match: quoted(match[0]), value)
    group = key.lstrip("+~")
    known = options.get(group)
    if known is None:
        return key + equals + value
    # A group without such an option needs a choice
    nothing = next((name for name in ("none", "off", "csv") if name in known), None)
    if nothing is not None and (override == f"~{group}" or value in _NOTHING):
        return f"{group}={nothing}"
    if group == "experiment":
        if value == "null":
            return "~experiment"  # no option of this group stands for none
        key = key.lstrip("+")  # how Hydra's own examples choose one

    def spelled(found: re.Match[str]) -> str:
        spelling = found[0].replace("-", "_")
        return spelling if found[0] not in known and spelling in known else found[0]

    return key + equals + re.sub(r"[\w-]+", spelled, value)


def quoted(value: str) -> str:
    """Return a text as an override's value, whatever characters it holds."""
    return QuotedString(value, Quote.single).with_quotes()


def as_value(text: str) -> str:
    """Return a text as an override's value, in quotes only where it would be read otherwise."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([f"key={text}"])
        is_read = not parsed.is_sweep_override() and parsed.value() == text
    except OverrideParseException:
        is_read = False
    return text if is_read else quoted(text)


def nested_value(value: object) -> str:
    """Return mappings, lists and texts, in each other, as an override's value."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{nested_value(each)}' for name, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(nested_value, value))}]"
    text = str(value)
    return as_value(text) if _PLAIN.fullmatch(text) else quoted(text)


def override_key(word: str) -> str:
    """Return what an override sets, with underscores."""
    return word.partition("=")[0].lstrip("+~").replace("-", "_")


def recorded_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return what a run records of its overrides: not where it lies."""
    left_out = ("resume", "hydra.run.dir", "hydra.sweep.dir")
    return tuple(word for word in overrides if override_key(word) not in left_out)


def parse(overrides: Sequence[str], *, loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides.

    Raises:
        RequestError: names every word that is no override.
    """
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
        text = f"{brief(override)} is no setting; settings are written KEY=VALUE (see --help)."
        return Problem("", reason=text)
    key, _, value = override.partition("=")
    reason = (message.splitlines() or ["it is too large"])[0].rstrip(".")
    advice = "put quotes around a value with special characters: 'KEY=\"VALUE\"'"
    return Problem(key, value, reason=f"the value can't be read ({reason}); {advice}")


def check_command_line(overrides: Sequence[Override], options: Options) -> None:
    """Refuse what composes into something else than was meant.

    Raises:
        RequestError: a group that is added, not chosen, or given something that is no option.
    """
    problems = []
    for override in overrides:
        group, known = override.key_or_group, options.get(override.key_or_group)
        if override.is_hydra_override() and override.is_sweep_override():
            reason = "Hydra's own settings can't be swept; must be one value"
            problems.append(
                Problem(group, (override.input_line or "=")[len(group) + 1 :], reason=reason)
            )
        if override.is_hydra_override() and "/" in group and override.value() is None:
            reason = "it takes the name of an option; leave it out for the usual one"
            problems.append(Problem(group, None, reason=reason))
        if known is None:
            continue
        if override.is_delete():
            if (deleted := override.value()) is not None:
                reason = f"~{group} takes no value; name what stays: {group}=[A,B]"
                problems.append(Problem(f"~{group}", deleted, reason=reason))
            continue
        value = override.input_line.partition("=")[2] if override.input_line else ""
        allowed = f"one of {', '.join(known)}"
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD):
            reason = f"a group is chosen without +; allowed is {allowed}"
            problems.append(Problem(f"+{group}", value, reason=reason, nearest=f"{group}={value}"))
        elif not override.is_sweep_override() and not isinstance(override.value(), str | list):
            reason = f"{group} takes the name of an option, {allowed}; single keys as {group}.KEY"
            problems.append(Problem(group, value, reason=reason))
    raise_problems(problems)


def option_problems(overrides: Sequence[Override], options: Options) -> Iterator[Problem]:
    """Yield what was chosen in groups that have no such option."""
    for override in overrides:
        known = options.get(override.key_or_group)
        if known is None or override.is_delete() or override.is_sweep_override():
            continue
        value = override.value()
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name not in known and not {"/", "$"} & {*name}:
                yield no_option(override.key_or_group, name, known)


def no_option(group: str, name: str, options: Sequence[str]) -> Problem:
    """Say which options a group has in place of one."""
    reason = f"there is no such option; allowed is {', '.join(options) or 'none here'}"
    if (extra := _EXTRAS.get(f"{group}={name}")) is not None:
        advice = f"it comes with an extra: pip install 'tritter[{extra}]'"
        return Problem(group, name, reason=reason, advice=advice)
    if (hint := hint_for(group, name)) is not None:
        return Problem(group, name, reason=reason, nearest=hint.advice)
    return Problem(group, name, reason=reason, nearest=nearest(name, options))


def not_replayed(words: Sequence[str]) -> list[str]:
    """Return the words among a run's overrides that `resume` does not take from its folder.

    It takes options that are part of Tritter, and plain values of `REPLAYED_KEYS`.
    """
    choices = {group: [*names] for group, names in shipped_options().items()}
    choices[f"gate.{LADDERS}"] = ["null", *choices.pop(LADDERS)]

    def is_replayed(word: str) -> bool:
        try:
            (override,) = parse([word])
        except RequestError:
            return False
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override() or override.package is not None:
            return False
        if key not in choices:
            return key in REPLAYED_KEYS and _is_plain(value) and not _names_file(key, value)
        if override.is_delete():
            return value is None
        names = value if isinstance(value, list) else ["null" if value is None else value]
        return all(name in choices[key] for name in names)

    return [word for word in words if not is_replayed(word)]


def _names_file(key: str, value: object) -> bool:
    """Return whether a value names an option file that is not part of Tritter."""
    name = value.get("name") if isinstance(value, dict) else value
    folders = [folder for folder, chosen in CHOSEN_BY.items() if chosen == key]
    is_name = isinstance(name, str)
    return is_name and any(name in option_files().get(folder, {}) for folder in folders)


def _is_plain(value: object) -> bool:
    """Return whether a value names no class and refers to nothing, at any depth."""
    if isinstance(value, dict):
        is_named = any(str(key).startswith("_") for key in value)
        return not is_named and _is_plain([*value, *value.values()])
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not (isinstance(value, str) and "${" in value)


def refuse_sweeps(overrides: Sequence[Override]) -> None:
    """Refuse sweeps where one run was asked for.

    Raises:
        RequestError: names each sweep and the two ways to mean it.
    """
    problems = []
    for override in overrides:
        if override.is_sweep_override():
            key, _, value = (override.input_line or "").partition("=")
            reason = f"several values are several runs: add -m (or write a list, {key}=[{value}])"
            if override.value_type is not ValueType.SIMPLE_CHOICE_SWEEP:
                reason = "a sweep is several runs: add -m"
            problems.append(Problem(key, value, reason=reason))
    raise_problems(problems)


def first_value(override: Override) -> str:
    """Return the override of one job: of a sweep, with its first value."""
    if not override.is_sweep_override():
        return override.input_line or ""
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return f"{key}={next(override.sweep_string_iterator(), '')}"
    interval = override.value()
    assert isinstance(interval, IntervalSweep), "Hydra has choices, ranges and intervals"
    return f"{key}={interval.start}"


def forced(override: Override, options: Options) -> str:
    """Return the override so that Hydra sets any key and leaves the judgement to our schema."""
    line = override.input_line or ""
    is_ours = not override.is_hydra_override() and override.key_or_group not in options
    if is_ours and not override.is_delete() and override.package is None:
        return "++" + line.lstrip("+")
    return line


def split_sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of each job of Hydra's basic sweeper, in its order.

    Raises:
        RequestError: a sweep that has no list of values.
    """
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            key, _, value = (override.input_line or "").partition("=")
            reason = "the basic sweeper tries listed values; allowed is A,B or range(START,STOP)"
            raise RequestError(Problem(key, value, reason=reason))
    return BasicSweeper.split_arguments(list(overrides), None)[0]


def program_command() -> tuple[str, ...]:
    """Return how this program was called, so that it can be called again from the same place."""
    called = sys.argv[0] if sys.argv else ""
    name = Path(called).name
    if name == "tritter":
        return ("tritter", "train")
    if name == "__main__.py" and Path(called).parent.name == "tritter":
        return (_python(), "-m", "tritter", "train")
    return (_python(), called if name == "train.py" else "train.py")


def command(words: Sequence[str]) -> str:
    """Return a command line with these words, quoted for a shell; it finds the same options."""
    return shlex.join([*program_command(), *search_path().flags, *words])


def tritter_command(words: Sequence[str]) -> str:
    """Return a command line of `tritter`, which may be called beside this program."""
    is_found = program_command()[0] == "tritter"
    return shlex.join(["tritter", *words]) if is_found else tool_command("tritter", words)


def tool_command(program: str, words: Sequence[str]) -> str:
    """Return a command line of a program that is installed beside this one."""
    start = [program] if _is_ours(program) else [_python(), "-m", program]
    return shlex.join([*start, *words])


def resume_command(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Return the command that resumes the run in a folder.

    Args:
        folder: of the run.
        overrides: those of the run; they are part of the command if `resume` alone does not replay
            all of them.
    """
    recorded = recorded_overrides(overrides)
    needed = recorded if not_replayed(recorded) else ()
    return command([*needed, f"resume={as_value(str(folder))}"])


def _python() -> str:
    return "python" if _is_ours("python") else sys.executable


def _is_ours(program: str) -> bool:
    """Say whether a shell finds a program in the environment that runs this one."""
    found = shutil.which(program)
    return found is not None and Path(found).parent == Path(sys.executable).parent

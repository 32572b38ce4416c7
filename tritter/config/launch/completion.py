"""What may stand where the cursor is: groups, options, keys and flags of train.py.

Keys are found as Hydra's own completion finds them, over the same folders as everything else. Its
script for bash is none of ours: it runs any `python FILE` with -sc to ask for completions, and
knows no lists, no --config-dir and no other program than `python train.py`.
"""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.errors import HydraException
from hydra.plugins.completion_plugin import CompletionPlugin
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from tritter.config.components import REFUSED, trainer_parameters
from tritter.config.folders import composing_from, config_names, front, front_of
from tritter.config.ladder import LADDER, ladder_names
from tritter.config.launch.command_line import CommandLine, read_command_line
from tritter.config.launch.composition import Composer, composer
from tritter.config.launch.flags import FLAGS, SHELL_REQUESTS, flag_of
from tritter.config.launch.hydra_settings import is_for_runs
from tritter.config.overrides import first_value, forced, normalise, option_of_nothing, parse
from tritter.errors import RequestError

_GROUPS_OF_HYDRA = ("hydra/launcher", "hydra/sweeper")
_SCRIPT = """\
_tritter_train() {
    local line="${COMP_LINE:0:COMP_POINT}" begun="${2#[\\"\\']}" program=() word choice
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
        program+=("${word/#\\~/$HOME}")
        [[ $word == *train.py ]] && break
    done
    # Only Tritter's train.py is asked, and nothing else is run
    grep -qs "tritter.config.launch.entry import main" "${program[@]: -1}" || return
    word="${line##*[[:space:]]}"
    word="${word#[\\"\\']}"
    while IFS= read -r choice; do
        COMPREPLY+=("${choice#"${word%"$begun"}"}")
    done < <(COMP_LINE="$line" "${program[@]}" -sc query=bash 2> /dev/null)
}
complete -o bashdefault -o default -o nospace -F _tritter_train NAMES"""


def shell_script(request: str) -> str:
    """Return what a shell evaluates to turn completion on, or off."""
    names = " ".join(sorted({"python", "python3", Path(sys.executable).name}))
    if request == "install=bash":
        return _SCRIPT.replace("NAMES", names)
    return f"complete -r {names}; unset -f _tritter_train"


def line_completions(line: str) -> list[str]:
    """Return what the last word of a shell's line may become."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words += lexer
    except ValueError:  # a quote is still open
        words.append(lexer.token)
    else:
        words += [""] if line[-1:].isspace() else []
    starts = [n for n, word in enumerate(words) if word.endswith("train.py") or word == "train"]
    return completions(words[starts[0] + 1 :]) if starts else []


def completions(words: Sequence[str]) -> list[str]:
    """Return what the last of some words may become; nothing where files may stand or none fits.

    Args:
        words: those behind the program; the last one is begun, and may be empty.
    """
    *before, word = words or [""]
    flag = flag_of(before[-1]) if before else None
    names = [name for each in FLAGS for name in each.names]
    if flag is not None and "--config-name" in flag.names:
        found = _config_names(before[:-1])
    elif flag is not None and (flag.choices or flag.value):
        found = list(flag.choices)
    elif {"-sc", "--shell-completion"} & set(before):
        found = list(SHELL_REQUESTS)
    else:
        found = names if word.startswith("-") else _settings(before, word)
    return sorted({one for one in found if one.startswith(word)} - {word})


def _config_names(before: Sequence[str]) -> list[str]:
    command = _read(before)
    if command is None:
        return []
    try:
        with composing_from(front_of(command.config_folders, None, searchpath=command.searchpath)):
            return config_names()
    except RequestError:
        return []


def _settings(before: Sequence[str], word: str) -> list[str]:
    """Return groups, options and keys; none behind what is wrong."""
    command = _read(before)
    if command is None:
        return []
    # What a key may begin with, which says how it is set
    sign = next(sign for sign in ("++", "+", "~", "") if word.startswith(sign))
    bare = word.removeprefix(sign)
    try:
        meant = front_of(command.config_folders, command.config_name, searchpath=command.searchpath)
        with composing_from(meant), composer() as composing:
            found = [*_options(composing, bare, sign=sign)]
            if sign != "~" and bare.partition("=")[0] not in composing.options:
                found += _keys(composing, command.overrides, bare)
            return [sign + one for one in found]
    except RequestError:
        return []


def _options(composing: Composer, word: str, *, sign: str) -> Iterator[str]:
    """Yield groups, or one's options: also within a list, or a sweep."""
    group, equals, value = word.partition("=")
    hydras = {name: composing.loader.get_group_options(name) for name in _GROUPS_OF_HYDRA}
    for name, known in {**composing.options, **hydras}.items():
        if not equals and sign == "~":
            yield from [name] if option_of_nothing(known) else []
        elif not equals and (not sign or name == "experiment"):
            yield f"{name}="
        elif equals and name == group.replace("-", "_"):
            done = value[: max(value.rfind("["), value.rfind(",")) + 1]
            taken = re.findall(r"[\w-]+", done)
            yield from (f"{group}={done}{one}" for one in known if one not in taken)


def _keys(composing: Composer, overrides: Sequence[str], word: str) -> list[str]:
    """Return keys that are set with what was chosen so far, or the value that one has."""
    parsed = parse([normalise(override, composing.options) for override in overrides])
    lines = [forced(one, composing.options) for one in parse([*map(first_value, parsed)])]
    try:
        config = composing.loader.load_configuration(
            front().config_name, lines, run_mode=RunMode.RUN
        )
        found = CompletionPlugin._get_matches(config, word)
    except (HydraException, OmegaConfBaseException, AssertionError):  # keys below a plain value
        return []
    if word.startswith("trainer.") and "=" not in word:
        found += [f"trainer.{name}=" for name in trainer_parameters() if name not in REFUSED]
    if word.startswith(f"{LADDER}="):
        found += [f"{LADDER}={name}" for name in ladder_names()]
    return [one for one in found if is_for_runs(one)]


def _read(before: Sequence[str]) -> CommandLine | None:
    try:
        return read_command_line(before)
    except RequestError:
        return None

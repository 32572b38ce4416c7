"""Which of Hydra's own settings a request may change: those that leave a run whole.

Hydra's settings decide where files appear, what is imported and how jobs are started. Most of
them can send a run's files elsewhere, or fail after its folder was made, so what is sound is
listed here with its reason, and everything else is refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from tritter.config.launch.launchers import launcher_problems
from tritter.config.launch.optuna import sweeper_problems
from tritter.config.selection import Origin
from tritter.errors import Problem, nearest
from tritter.options import leaves
from tritter.targets import TARGET, argument_problems, dotted

# Setting, or the section of settings → why it is sound.
ALLOWED = {
    "run.dir": "where a run lies",
    "sweep.dir": "where a sweep lies",
    "sweep.subdir": "where a job lies in it",
    "mode": "a run or a sweep, as -m says it",
    "launcher": "how the jobs of a sweep are started, by a launcher that is installed",
    "sweeper": "which jobs a sweep has, by a sweeper that is installed",
    "job.config.override_dirname": "how a job's folder is called after its overrides",
    "searchpath": "folders with options of your own, as --config-dir; on the command line only",
    "verbose": "what Hydra says of itself",
    "hydra_logging.root.level": "how much of it",
    "job_logging.root.level": "how much is logged in the run folder",
}
_REASONS = {
    "output_subdir": "a run's configuration lies in .hydra of its folder, where it is looked for",
    "job.chdir": "a run stays in the folder it is started from, which its paths are relative to",
    "job.name": "it names the log in the run folder, which is told from other files by its name",
    "job.env_set": "set the environment before the command: NAME=VALUE python train.py",
    "job.env_copy": "set the environment before the command: NAME=VALUE python train.py",
    "callbacks": "they run before a request is checked",
    "searchpath": "only the command line adds folders: hydra.searchpath=[DIR] or --config-dir DIR",
    "job_logging": "a run logs to a file in its folder; the terminal is for progress and the table",
    "hydra_logging": "Hydra's own log is no part of a run",
    "runtime": "Hydra fills it in",
    "overrides": "Hydra fills it in",
    "job": "Hydra fills it in",
}
# Filled in by Hydra: they differ from one command line to the next without having been set.
_FILLED_IN = ("overrides", "runtime", "job.override_dirname", "job.config_name", "job.num")
_PLUGINS = {"launcher": Launcher, "sweeper": Sweeper}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def hydra_problems(
    composed: DictConfig,
    default: DictConfig,
    overrides: Sequence[Override],
    *,
    origin: Origin,
) -> Iterator[Problem]:
    """Yield what is wrong with Hydra's own settings of a composed job.

    Args:
        composed: the node `hydra` of the job.
        default: the same of a job without overrides.
        overrides: those of the command line.
        origin: tells which file a dotted key came from.
    """
    refused = list(_refusals(composed, default, overrides, origin=origin))
    # Values are looked at where nothing is refused: half a section would be blamed for the rest
    yield from refused or [*_plugin_problems(composed), *_value_problems(composed)]


def is_for_runs(word: str) -> bool:
    """Say whether a key, or the beginning of keys as in `hydra.run.`, is one to be set."""
    name, _, rest = word.partition("=")[0].replace("/", ".").rstrip(".").partition(".")
    is_whole = name != "hydra" or not rest or _is_allowed(rest)
    return is_whole or any(_is_below(allowed, [rest]) for allowed in ALLOWED)


def _refusals(
    composed: DictConfig, default: DictConfig, overrides: Sequence[Override], *, origin: Origin
) -> Iterator[Problem]:
    settings, usual = (leaves(OmegaConf.to_container(c)) for c in (composed, default))
    changed = {key for key in {*settings, *usual} if settings.get(key) != usual.get(key)}
    changed |= {"searchpath"} & {key for key in settings if settings[key]}  # of --config-name, too
    typed = {
        o.key_or_group.replace("/", ".").removeprefix("hydra."): o
        for o in overrides
        if o.is_hydra_override()
    }
    for key, override in typed.items():
        is_filled_in = _is_below(key, _FILLED_IN)
        if (is_filled_in or any(_is_below(c, [key]) for c in changed)) and not _is_allowed(key):
            value = (override.input_line or "").partition("=")[2]
            yield _refusal(override.key_or_group, key, value)
    for key in sorted(changed):
        is_told = any(_is_below(key, [k]) or _is_below(k, [key]) for k in typed)
        if not is_told and not _is_below(key, _FILLED_IN) and not _is_allowed(key):
            name = f"hydra.{key}"
            yield _refusal(name, key, settings.get(key), origin=origin(name))


def _refusal(name: str, key: str, value: object, *, origin: str | None = None) -> Problem:
    reason = next((_REASONS[k] for k in _REASONS if _is_below(key, [k])), "it is not for a run")
    allowed = ", ".join(f"hydra.{name}" for name in ALLOWED)
    return Problem(
        name, value, reason=f"{reason}; of Hydra's settings allowed are {allowed}", origin=origin
    )


def _plugin_problems(composed: DictConfig) -> Iterator[Problem]:
    """Yield what Hydra would say of launcher and sweeper only after it has made folders."""
    for name, kind in _PLUGINS.items():
        node = composed[name]
        settings = OmegaConf.to_container(node) if OmegaConf.is_config(node) else None
        known = {dotted(each): each for each in Plugins.instance().discover(kind)}
        settings = settings if isinstance(settings, dict) else {}
        target = settings.pop(TARGET, None)
        if target in known:
            arguments = {str(key): value for key, value in settings.items()}
            found = [*argument_problems(known[str(target)], arguments, key=f"hydra.{name}")]
            judge = {"launcher": launcher_problems, "sweeper": sweeper_problems}[name]
            yield from found or judge(composed)
        else:
            reason = f"choose an installed one with hydra/{name}=NAME, or leave it out"
            yield Problem(f"hydra.{name}.{TARGET}", target, reason=reason)


def _value_problems(composed: DictConfig) -> Iterator[Problem]:
    """Yield values of allowed settings that Hydra takes and fails on later."""
    for key in ("run.dir", "sweep.dir"):
        if not OmegaConf.select(composed, key):
            yield Problem(f"hydra.{key}", "", reason="name a folder, or leave it out")
    verbose = composed.verbose
    if not isinstance(verbose, bool | str) and not OmegaConf.is_list(verbose):
        reason = "allowed is true, false, or names of loggers"
        shown = OmegaConf.to_container(verbose) if OmegaConf.is_config(verbose) else verbose
        yield Problem("hydra.verbose", shown, reason=reason)
    for key in ("hydra_logging", "job_logging"):
        level = OmegaConf.select(composed, f"{key}.root.level")
        if not isinstance(level, str) or level not in _LEVELS:
            reason = f"allowed is one of {', '.join(_LEVELS)}"
            yield Problem(
                f"hydra.{key}.root.level",
                level,
                reason=reason,
                nearest=nearest(str(level).upper(), _LEVELS),
            )
    batch = composed.sweeper.get("max_batch_size") if composed.sweeper else None
    if isinstance(batch, int) and batch < 1:
        reason = "allowed is a whole number at least 1, or null"
        yield Problem("hydra.sweeper.max_batch_size", batch, reason=reason)


def _is_allowed(key: str) -> bool:
    # What is typed of the search path was taken from the command line before it comes here
    return _is_below(key, ALLOWED) and not _is_below(key, ("searchpath",))


def _is_below(key: str, sections: Any) -> bool:
    """Say whether a dotted key is one of the sections, or lies in one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)

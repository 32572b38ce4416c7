"""What a command line asks for, job by job, checked whole before anything is written."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

from tritter.config.ladder import of_rung
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.composition import Composer, Composition, composer
from tritter.config.launch.launchers import ONE_BY_ONE, Launching, device_rule, launching
from tritter.config.launch.optuna import is_optuna, pinned, storage_problems, tried
from tritter.config.launch.resume import Resumption, resumption
from tritter.config.memory import memory_problems, side_by_side_problems
from tritter.config.overrides import (
    check_command_line,
    first_value,
    forced,
    normalise,
    parse,
    quoted,
    refuse_sweeps,
    split_sweep,
)
from tritter.config.rules import compiler_problems
from tritter.config.run_folder import OUTPUT_FILE, RunState, check_run_folder
from tritter.config.schema import RunConfig
from tritter.config.text_resolution import side_problems
from tritter.config.validation import Rule, known_config
from tritter.data.options import text_requests
from tritter.data.sources import check_contents
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.families import Config
from tritter.storage.lock import LOCK_NAME, check_free
from tritter.storage.reading import RUN_FILE
from tritter.terminal import say

_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is about to start.

    Args:
        state: what is in its folder.
        composition: what it is started with; None in a sweep, whose jobs Hydra composes.
    """

    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    state: RunState
    composition: Composition | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """The checked jobs of a command line.

    Args:
        overrides: those of the command line, spelled as the config spells them, for Hydra.
        jobs: one of a run; all of a sweep whose sweeper lists them; none when the sweeper
            decides as it goes, in which case each job is checked when it starts.
        sweep_folder: None for a single run.
        launching: how the jobs of a sweep are run.
        samples: of a sweeper that decides as it goes, jobs that show what it may try.
        notes: what to tell before it starts, a line each.
    """

    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]
    sweep_folder: Path | None = None
    launching: Launching = ONE_BY_ONE
    samples: tuple[Job, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_adaptive(self) -> bool:
        """Whether a sweeper decides by each job what the next ones are."""
        return not self.jobs


def make_plan(command: CommandLine) -> Plan:
    """Compose, validate and place every job; writes nothing.

    What a resumed run replays is printed first, before any data or weights are opened.

    Raises:
        RequestError: whatever is wrong, with the command or with any of its jobs.
    """
    with composer() as composing:
        overrides = [normalise(word, composing.options) for word in command.overrides]
        resumed = None if command.is_multirun else resumption(composing, overrides)
        if resumed is not None:
            overrides = list(resumed.overrides)
            for note in resumed.notes:
                say(note, is_error=bool(command.hydra_flags))
        parsed = parse(overrides, loader=composing.loader)
        check_command_line(parsed, composing.options)
        if not command.is_multirun:
            refuse_sweeps(parsed)
            plan = _plan_run(composing, overrides, resumed, is_shown=bool(command.hydra_flags))
        else:
            sample = [first_value(override) for override in parsed]
            plan = _plan_sweep(composing, overrides, sample)
    if not command.hydra_flags:  # else nothing is run
        for job in plan.jobs:
            check_free(job.folder, key="hydra.run.dir")
        if plan.sweep_folder is not None:
            _check_sweep_is_free(plan.sweep_folder)
        _check_means(plan)
    return plan


def _check_sweep_is_free(folder: Path) -> None:
    """Refuse a sweep that another process runs, or of which a job runs on by itself.

    Raises:
        RequestError: says which process; or the folder is that of a run.
    """
    if os.path.lexists(folder / RUN_FILE):
        raise RequestError(
            f"hydra.sweep.dir = {folder}: it is the folder of a run, below which no report looks "
            "for others; name a folder of the sweep's own."
        )
    check_free(folder, key="hydra.sweep.dir")
    for held in sorted(folder.rglob(LOCK_NAME)):
        check_free(held.parent, key="hydra.sweep.dir")


def _check_means(plan: Plan) -> None:
    """Refuse jobs that the machine can't hold, and text that can't be read or split."""
    jobs = plan.jobs or plan.samples
    todo = {n: job for n, job in enumerate(jobs) if job.state is not RunState.FINISHED}
    # Of a hub id the shapes are known later
    known = {n: shape for n, job in todo.items() if (shape := known_config(job.config)) is not None}
    found = {n: _memory_problems(todo[n].config, known[n]) if n in known else () for n in todo}
    _raise_of_jobs(found, [job.overrides for job in jobs])
    raise_problems(
        side_by_side_problems(
            [(todo[n].config, shape) for n, shape in known.items()],
            launcher=plan.launching.launcher,
            at_once=plan.launching.at_once,
        )
    )
    check_contents(request for job in todo.values() for request in text_requests(job.config.data))
    sides = {n: list(side_problems(job.config.text)) for n, job in todo.items()}
    _raise_of_jobs(sides, [job.overrides for job in jobs])


def _memory_problems(config: RunConfig, source: Config) -> list[Problem]:
    """Return why a run's first attempt can't be held, or its further ones."""
    problems = memory_problems(config, source)
    for number, rung in enumerate(() if problems else config.rungs, start=1):
        held = memory_problems(rung, source)
        problems += (of_rung(problem, config.gate, number) for problem in held)
    return problems


def _words_for_hydra(composing: Composer, overrides: Sequence[str]) -> tuple[str, ...]:
    """Return checked overrides so that Hydra takes them as we did.

    Hydra minds a + too many, and composes a sweep's config without the sweep first, in which
    the keys of swept methods have no place.
    """
    parsed = parse(overrides, loader=composing.loader)
    return tuple(forced(override, composing.options) for override in parsed)


def _plan_run(
    composing: Composer, overrides: list[str], resumed: Resumption | None, *, is_shown: bool
) -> Plan:
    composed = composing.compose(overrides, rules=_OF_RUNS[:1] if resumed else _OF_RUNS)
    if composed.hydra.mode == RunMode.MULTIRUN:
        return _plan_sweep(composing, overrides, overrides)
    is_single = not is_shown and resumed is None  # a job of a sweep can be resumed by itself
    if is_single and (swept := composed.hydra.sweeper.get("params")):
        names = ", ".join(map(str, swept))
        raise RequestError(
            f"hydra.sweeper.params names values of {names} for a sweep, and this is a single run: "
            "add -m."
        )
    folder = resumed.folder if resumed else Path(composed.hydra.run.dir).absolute()
    state = check_run_folder(folder, composed.config)
    job = Job(tuple(overrides), composed.config, folder, state, composed)
    return Plan(_words_for_hydra(composing, overrides), (job,))


def _plan_sweep(composing: Composer, overrides: list[str], sample: list[str]) -> Plan:
    """Plan a sweep; `sample` is a job of it, which may lack the sweeper's own parameters."""
    hydra = composing.hydra_settings(sample)
    if hydra.mode == RunMode.RUN:
        raise RequestError("hydra.mode = RUN: -m asks for a sweep; give one of them.")
    sweep_folder = Path(hydra.sweep.dir).absolute()
    words_for_hydra = (*_words_for_hydra(composing, overrides), *pinned(hydra))
    parameters = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    typed = parse([*parameters, *overrides], loader=composing.loader)
    shared = [o.input_line or "" for o in typed if o.is_hydra_override()]
    # Hydra's time resolver would give every job a sweep folder of its own
    shared.append(f"hydra.sweep.dir={quoted(str(sweep_folder))}")
    task = [override for override in typed if not override.is_hydra_override()]
    if hydra.sweeper.get("_target_") != _BASIC_SWEEPER:
        return _plan_adaptive(composing, task, shared, hydra=hydra, words=words_for_hydra)
    split = split_sweep(task)
    _refuse_equal_jobs(split)
    jobs = _plan_jobs(composing, split, shared, device_rule(hydra))
    if len({job.folder for job in jobs}) < len(jobs):
        raise RequestError(
            f"hydra.sweep.subdir = {jobs[0].folder.name}: several jobs would share one folder; "
            "allowed is what differs from job to job, as ${hydra.job.num}."
        )
    how = launching(hydra, num_jobs=len(jobs))
    return Plan(words_for_hydra, jobs, sweep_folder, how, notes=_notes(how))


def _refuse_equal_jobs(split: Sequence[Sequence[str]]) -> None:
    """Refuse a sweep in which jobs have the same overrides, as of `seed=0,0`.

    Raises:
        RequestError: names the jobs.
    """
    numbers: dict[tuple[str, ...], list[int]] = {}
    for number, words in enumerate(split):
        numbers.setdefault(tuple(words), []).append(number)
    raise_problems(
        [
            Problem("", reason=f"jobs {listed} are equal ({' '.join(words)}): list a value once.")
            for words, equal in numbers.items()
            if len(equal) > 1 and (listed := f"{', '.join(map(str, equal[:-1]))} and {equal[-1]}")
        ]
    )


def _plan_adaptive(
    composing: Composer,
    task: Sequence[Override],
    shared: Sequence[str],
    *,
    hydra: DictConfig,
    words: tuple[str, ...],
) -> Plan:
    """Plan a sweep whose sweeper thinks of its jobs as it goes: all that it may try is checked."""
    sweep_folder, samples = Path(hydra.sweep.dir).absolute(), [[*map(first_value, task)]]
    if is_optuna(hydra):
        raise_problems([*storage_problems(hydra, sweep_folder)])
        samples = tried(task)
    jobs = _plan_jobs(composing, samples, shared, device_rule(hydra), is_sample=True)
    how = launching(hydra, num_jobs=int(hydra.sweeper.get("n_jobs") or 1))
    notes = (*_notes(how), *(f"sweep      {word}, so that it can go on" for word in pinned(hydra)))
    return Plan(words, (), sweep_folder, how, samples=jobs, notes=notes)


def _notes(how: Launching) -> tuple[str, ...]:
    if not how.is_in_processes:
        return ()
    output = f"what each prints is in its folder, {OUTPUT_FILE}"
    if how.threads is None:
        return (f"sweep      {how.launcher} runs the jobs; {output}",)
    each = "1 thread" if how.threads == 1 else f"{how.threads} threads"
    if asked := os.environ.get("OMP_NUM_THREADS"):
        each = f"OMP_NUM_THREADS={asked}"
    at_once = f"{how.at_once} {'job' if how.at_once == 1 else 'jobs'} at a time, {each} each"
    return (f"sweep      {how.launcher}: {at_once}; {output}",)


def _plan_jobs(
    composing: Composer,
    split: Sequence[list[str]],
    shared: Sequence[str],
    rule: Rule,
    *,
    is_sample: bool = False,
) -> tuple[Job, ...]:
    """Compose, validate and place jobs.

    Args:
        shared: overrides of Hydra's own settings.
        rule: to be asked besides those of every sweep.
        is_sample: they only show what a sweeper may try; no folder is theirs.

    Raises:
        RequestError: what is wrong with any of them.
    """
    jobs: list[Job] = []
    found: dict[int, Sequence[Problem]] = dict.fromkeys(range(len(split)), ())
    for number, words in enumerate(split):
        try:
            jobs.append(
                _plan_job(composing, words, shared, number=number, rule=rule, is_sample=is_sample)
            )
        except RequestError as error:
            found[number] = error.problems
        except TritterError as error:
            raise type(error)(f"{_jobs([number], split)}: {error}") from error
    _raise_of_jobs(found, split)
    return tuple(jobs)


def _resume_problems(config: RunConfig, *, reason: str) -> Iterator[Problem]:
    if config.resume is not None:
        yield Problem("resume", config.resume, reason=reason)


def _process_problems(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.strategy != "auto":
        reason = (
            "a sweep's launcher may run its jobs side by side, and their processes would meet on "
            "the same devices; leave -m out, or sweep with trainer=cpu or trainer=gpu"
        )
        yield Problem("trainer.strategy", config.trainer.strategy, reason=reason)


def _device_problems(config: RunConfig) -> Iterator[Problem]:
    import torch

    if config.trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        reason = "torch finds no Apple GPU on this machine; allowed is cpu, or auto (trainer=cpu, "
        yield Problem("trainer.accelerator", "mps", reason=f"{reason}trainer=auto)")
    if config.trainer.accelerator != "gpu":
        return
    found, devices = torch.cuda.device_count(), config.trainer.devices
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        reason = "torch finds no GPU on this machine; allowed is cpu, or auto (trainer=cpu, "
        yield Problem("trainer.accelerator", "gpu", reason=f"{reason}trainer=auto)")
    elif devices > max(1, found):
        reason = f"torch finds {found} GPUs on this machine; allowed is at most that"
        yield Problem("trainer.devices", devices, reason=reason)


_IN_A_FILE = "it stands in an option file; it is for the command line"
_IN_A_SWEEP = (
    "a sweep goes on when it is given its own folder again (hydra.sweep.dir=FOLDER); resume is for "
    "single runs"
)
_OF_RUNS = (_device_problems, compiler_problems, partial(_resume_problems, reason=_IN_A_FILE))
_OF_SWEEPS = (partial(_resume_problems, reason=_IN_A_SWEEP), _process_problems)


def _plan_job(
    composing: Composer,
    words: list[str],
    shared: Sequence[str],
    *,
    number: int,
    rule: Rule,
    is_sample: bool,
) -> Job:
    rules = (*_OF_SWEEPS, _device_problems, compiler_problems, rule)
    composed = composing.compose([*shared, *words], job_number=number, rules=rules)
    sweep = composed.hydra.sweep
    folder = _job_folder(Path(sweep.dir).absolute(), str(sweep.subdir))
    state = RunState.NEW if is_sample else check_run_folder(folder, composed.config)
    return Job(tuple(words), composed.config, folder, state)


def _raise_of_jobs(found: Mapping[int, Sequence[Problem]], words: Sequence[Sequence[str]]) -> None:
    """Refuse what is wrong with jobs, pass by pass, each thing once; of all jobs it names none.

    Args:
        found: number of a job → its problems.
        words: of all jobs.
    """
    told: dict[str, tuple[Problem, list[int]]] = {}
    for number, problems in found.items():
        for line, problem in {str(each): each for each in problems}.items():
            told.setdefault(line, (problem, []))[1].append(number)
    raise_problems(
        [
            problem if len(numbers) == len(found) else replace(problem, job=_jobs(numbers, words))
            for problem, numbers in sorted(told.values(), key=lambda each: each[0].found_by)
        ]
    )


def _jobs(numbers: Sequence[int], words: Sequence[Sequence[str]]) -> str:
    if len(numbers) == 1:
        return f"job {numbers[0]} ({' '.join(words[numbers[0]])})"
    return f"jobs {', '.join(map(str, numbers))}"


def _job_folder(sweep_folder: Path, name: str) -> Path:
    """Return a job's folder.

    Raises:
        RequestError: it is not below the sweep's.
    """
    sweep_folder = Path(os.path.normpath(sweep_folder))
    folder = Path(os.path.normpath(sweep_folder / name))
    if sweep_folder not in folder.parents:
        raise RequestError(
            f"hydra.sweep.subdir = {name}: a job's folder lies below that of its sweep "
            "(hydra.sweep.dir); allowed is a name that differs from job to job, as "
            "${hydra.job.num}."
        )
    return folder

"""What a command line asks for, job by job, checked whole before anything is written."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.types import RunMode

from tritter.config.command_line import CommandLine
from tritter.config.composition import Composer, composer
from tritter.config.memory import memory_problems
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
from tritter.config.resume import Resumption, resumption
from tritter.config.run_folder import RunState, check_run_folder
from tritter.config.schema import RunConfig
from tritter.config.text_contents import check_contents, text_requests
from tritter.config.validation import known_config
from tritter.errors import Problem, RequestError, TritterError, raise_problems

_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is about to start: its overrides, its record, its folder and what is in it."""

    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    state: RunState


@dataclass(frozen=True, slots=True)
class Plan:
    """The checked jobs of a command line.

    Args:
        overrides: those of the command line, spelled as the config spells them, for Hydra.
        jobs: one of a run; all of a sweep whose sweeper lists them; none when the sweeper
            decides as it goes, in which case each job is checked when it starts.
        sweep_folder: None for a single run.
        notes: what to tell before it starts, a line each.
    """

    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]
    sweep_folder: Path | None = None
    notes: tuple[str, ...] = ()


def make_plan(command: CommandLine) -> Plan:
    """Compose, validate and place every job; writes nothing.

    Raises:
        RequestError: whatever is wrong, with the command or with any of its jobs.
    """
    with composer() as composing:
        overrides = [normalise(word, composing.options) for word in command.overrides]
        resumed = None if command.is_multirun else resumption(composing, overrides)
        if resumed is not None:
            overrides = list(resumed.overrides)
        parsed = parse(overrides, loader=composing.loader)
        check_command_line(parsed, composing.options)
        if not command.is_multirun:
            refuse_sweeps(parsed)
            plan = _plan_run(composing, overrides, resumed, is_shown=bool(command.hydra_flags))
        else:
            sample = [first_value(override) for override in parsed]
            plan = _plan_sweep(composing, overrides, sample)
    if not command.hydra_flags:  # else nothing is run
        _check_means(plan)
    return plan


def _check_means(plan: Plan) -> None:
    """Refuse jobs that the machine can't hold, and text that can't be read; each file once."""
    todo = [(n, job) for n, job in enumerate(plan.jobs) if job.state is not RunState.FINISHED]
    found: dict[str | None, Sequence[Problem]] = {}
    for number, job in todo:
        source = known_config(job.config)  # of a hub id the shapes are known later
        name = None if plan.sweep_folder is None else _job_name(number, job.overrides)
        found[name] = () if source is None else memory_problems(job.config, source)
    _raise_of_jobs(found)
    check_contents(request for _, job in todo for request in text_requests(job.config.data))


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
    composed = composing.compose(overrides)
    if composed.hydra.mode == RunMode.MULTIRUN:
        return _plan_sweep(composing, overrides, overrides)
    if not is_shown and (swept := composed.hydra.sweeper.get("params")):
        names = ", ".join(map(str, swept))
        raise RequestError(
            f"hydra.sweeper.params names values of {names} for a sweep, and this is a single run: "
            "add -m."
        )
    config = composed.config
    folder = resumed.folder if resumed else Path(composed.hydra.run.dir).absolute()
    if config.resume is not None and resumed is None:
        raise RequestError(
            f"resume = {config.resume}: it stands in an option file; it is for the command line."
        )
    _check_device(config)
    state = check_run_folder(folder, config)
    job = Job(tuple(overrides), config, folder, state)
    notes = resumed.notes if resumed else ()
    return Plan(_words_for_hydra(composing, overrides), (job,), notes=notes)


def _plan_sweep(composing: Composer, overrides: list[str], sample: list[str]) -> Plan:
    """Plan a sweep; `sample` is a job of it, which may lack the sweeper's own parameters."""
    hydra = composing.hydra_settings(sample)
    if hydra.mode == RunMode.RUN:
        raise RequestError("hydra.mode = RUN: -m asks for a sweep; give one of them.")
    sweep_folder = Path(hydra.sweep.dir).absolute()
    words_for_hydra = _words_for_hydra(composing, overrides)
    if hydra.sweeper.get("_target_") != _BASIC_SWEEPER:
        composed = composing.compose(sample, job_number=0)
        _check_sweepable(composed.config)
        _job_folder(sweep_folder, str(composed.hydra.sweep.subdir))
        return Plan(words_for_hydra, (), sweep_folder)
    parameters = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    typed = parse([*parameters, *overrides], loader=composing.loader)
    shared = [o.input_line or "" for o in typed if o.is_hydra_override()]
    # Hydra's time resolver would give every job a sweep folder of its own
    shared.append(f"hydra.sweep.dir={quoted(str(sweep_folder))}")
    task = [override for override in typed if not override.is_hydra_override()]
    jobs: list[Job] = []
    found: dict[str | None, Sequence[Problem]] = {}
    for number, words in enumerate(split_sweep(task)):
        name = _job_name(number, words)
        found[name] = ()
        try:
            jobs.append(_plan_job(composing, words, shared, number=number))
        except RequestError as error:
            found[name] = error.problems
        except TritterError as error:
            raise type(error)(f"{name}: {error}") from error
    _raise_of_jobs(found)
    if len({job.folder for job in jobs}) < len(jobs):
        raise RequestError(
            f"hydra.sweep.subdir = {jobs[0].folder.name}: several jobs would share one folder; "
            "allowed is what differs from job to job, as ${hydra.job.num}."
        )
    return Plan(words_for_hydra, tuple(jobs), sweep_folder)


def _check_sweepable(config: RunConfig) -> None:
    if config.resume is not None:
        raise RequestError(
            f"resume = {config.resume}: a sweep goes on when it is given its own folder again "
            "(hydra.sweep.dir=FOLDER); resume is for single runs."
        )
    if config.trainer.strategy == "ddp":
        raise RequestError(
            "trainer.strategy = ddp: a sweep's launcher may run its jobs side by side, and their "
            "processes would meet on the same devices; leave -m out, or sweep with trainer=cpu or "
            "trainer=gpu."
        )


def _check_device(config: RunConfig) -> None:
    import torch

    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if config.trainer.accelerator == "gpu" and not has_gpu:
        raise RequestError(
            "trainer.accelerator = 'gpu': torch finds no GPU on this machine; allowed is cpu, or "
            "auto (trainer=cpu, trainer=auto)."
        )
    found, devices = torch.cuda.device_count(), config.trainer.devices
    if config.trainer.accelerator == "gpu" and devices > max(1, found):
        raise RequestError(
            f"trainer.devices = {devices}: torch finds {found} GPUs on this machine; allowed is at "
            "most that."
        )


def _plan_job(composing: Composer, words: list[str], shared: list[str], *, number: int) -> Job:
    composed = composing.compose([*shared, *words], job_number=number)
    _check_sweepable(composed.config)
    _check_device(composed.config)
    sweep = composed.hydra.sweep
    folder = _job_folder(Path(sweep.dir).absolute(), str(sweep.subdir))
    return Job(tuple(words), composed.config, folder, check_run_folder(folder, composed.config))


def _job_name(number: int, words: Sequence[str]) -> str:
    return f"job {number} ({' '.join(words)})"


def _raise_of_jobs(found: Mapping[str | None, Sequence[Problem]]) -> None:
    """Refuse what is wrong with jobs; what is wrong with all of them is said once.

    Args:
        found: name of each job, None for a single run → its problems.
    """
    jobs_of = Counter(said for problems in found.values() for said in {*map(str, problems)})
    said_once: dict[str, Problem] = {}
    for name, problems in found.items():
        for problem in problems:
            of = None if jobs_of[str(problem)] == len(found) else name
            one = replace(problem, job=of)
            said_once.setdefault(str(one), one)
    raise_problems(said_once.values())


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

"""What a command line asks for, job by job, checked whole before anything is written."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from tritter.checkpoints.run_text import side_problems
from tritter.config.fallbacks import for_fallback
from tritter.config.folders import SearchPath, composing_from, search_path
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.composition import Composer
from tritter.config.launch.jobs import ONE_BY_ONE, Job, Launching, Task, launching, side_by_side
from tritter.config.overrides import (
    as_value,
    check_command_line,
    command,
    first_value,
    normalise,
    not_replayed,
    override_key,
    parse,
    quoted,
    refuse_sweeps,
    split_sweep,
)
from tritter.config.run_folder import (
    OUTPUT_FILE,
    RunState,
    check_run_folder,
    find_run,
    read_run,
    require_writable,
)
from tritter.config.schema import RunConfig
from tritter.config.validation import known_config
from tritter.data.options import text_requests
from tritter.data.sources import check_contents
from tritter.errors import Problem, RequestError, TritterError, brief, raise_problems
from tritter.planning.run_memory import memory_problems, side_by_side_problems
from tritter.storage.lock import LOCK_NAME, alone_in, check_free
from tritter.storage.reading import RUN_FILE, SUMMARY_FILE
from tritter.terminal import say
from tritter.training.options import compiler_problems

_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True, slots=True)
class Plan:
    """The checked jobs of a command line.

    Args:
        jobs: one of a run; all of a sweep whose sweeper lists them; none when the sweeper
            decides as it goes.
        sweep_folder: None for a single run.
        launching: how the jobs of a sweep are run.
        examples: of a sweeper that decides as it goes, a job that shows what it tries.
        notes: what to tell before it starts, a line each.
    """

    jobs: tuple[Job, ...]
    sweep_folder: Path | None = None
    launching: Launching = ONE_BY_ONE
    examples: tuple[Job, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_adaptive(self) -> bool:
        """Whether a sweeper decides by each job what the next ones are."""
        return not self.jobs


@dataclass(slots=True)
class Request:
    """A command that Hydra is asked to run.

    Args:
        overrides: of the command line, and what a resumed run recorded.
        resumed: the folder of the run that is resumed, if any.
        is_multirun: -m was typed.
        is_shown: nothing is run.
        task: what Hydra calls with each job.

    Attributes:
        plan: what it asks for, once that is judged.
        until_over: holds the folder against other processes.
    """

    composing: Composer
    overrides: tuple[str, ...]
    resumed: Path | None
    is_multirun: bool
    is_shown: bool
    task: Task | None = None
    plan: Plan | None = None
    until_over: ExitStack = field(default_factory=ExitStack)


class Refused(BaseException):
    """What the callback raises: Hydra only warns of an Exception, and goes on.

    Args:
        error: why; None: the run is finished already.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error


_REQUEST: ContextVar[Request] = ContextVar("request")


class Judge(Callback):
    """Judges a request whole, and holds its folder, before Hydra makes that folder.

    `Loader` puts it before all callbacks of any other configuration.
    """

    def on_run_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Judge a run, or all jobs of a sweep; of a sweeper that decides as it goes, an example."""
        request, hydra = _REQUEST.get(), config.hydra
        try:
            request.plan = plan = plan_of(request, config)
            for note in plan.notes:
                say(note)
            if plan.sweep_folder is None:
                (job,), key, folder = plan.jobs, "hydra.run.dir", plan.jobs[0].folder
                if job.state is RunState.FINISHED:
                    summary = folder / SUMMARY_FILE
                    say(f"This run is finished; nothing to do. Its summary: {summary}")
                    raise Refused
                hydra.run.dir = str(folder)
            else:
                key, folder = "hydra.sweep.dir", plan.sweep_folder
                hydra.sweep.dir = str(folder)
                # By Hydra's time resolver a job in another process would have another one
                hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")
            require_writable(folder, key=key)
            request.until_over.enter_context(alone_in(folder, key=key))
            if plan.sweep_folder is not None:
                request.until_over.enter_context(side_by_side(folder, plan.launching))
            if request.task is not None:
                request.task.jobs, request.task.keeps_failed = plan.jobs, plan.is_adaptive
        except Exception as error:
            raise Refused(error) from error

    on_multirun_start = on_run_start


@contextmanager
def requested(request: Request) -> Iterator[Request]:
    """Let Hydra run a request inside."""
    token = _REQUEST.set(request)
    try:
        with request.until_over:
            yield request
    finally:
        _REQUEST.reset(token)


def read_request(typed: CommandLine, composing: Composer) -> Request:
    """Return what a command line asks for, before anything is composed.

    What a resumed run replays is printed first, before any data or weights are opened.

    Raises:
        RequestError: a word is no override, or there is no such run.
    """
    is_shown, folder = typed.shows is not None, None
    overrides = [normalise(word, composing.options) for word in typed.overrides]
    if not typed.is_multirun:
        overrides, folder = _with_resumed(composing, overrides, is_shown=is_shown)
    parsed = parse(overrides, loader=composing.loader)
    check_command_line(parsed, composing.options)
    if not typed.is_multirun:
        refuse_sweeps(parsed)
    return Request(composing, tuple(overrides), folder, typed.is_multirun, is_shown)


def _with_resumed(
    composing: Composer, overrides: list[str], *, is_shown: bool
) -> tuple[list[str], Path | None]:
    """Return overrides with those of the run that `resume` among them means, and its folder.

    The folder may come from anywhere. Of what it records only options that are part of Tritter and
    plain values of listed keys are replayed (`schema.REPLAYED_KEYS`). Everything else, the folders
    of its options included, has to be typed by somebody who trusts it.

    Raises:
        RequestError: there is no such run, or it recorded what is not replayed.
    """
    typed = parse(overrides, loader=composing.loader)
    asked = [o for o in typed if o.key_or_group == "resume" and not o.is_delete()]
    value = asked[-1].value() if asked and not asked[-1].is_sweep_override() else None
    if value is None:
        return overrides, None
    if any(o.key_or_group == "hydra.run.dir" for o in typed):
        raise RequestError(
            f"resume = {value}: it chooses the folder, and so does hydra.run.dir; give one of them."
        )
    folder, notes = find_run(str(value))
    run = read_run(folder)

    def is_overridden(word: str) -> bool:  # by its key typed again, or by another group
        key = override_key(word)
        return any(
            key == other.key_or_group
            or (key.startswith(f"{other.key_or_group}.") and other.input_line not in run.overrides)
            for other in typed
        )

    kept = [word for word in run.overrides if not is_overridden(word)]
    words = [*kept, *(o.input_line or "" for o in typed if o.key_or_group != "resume")]
    meant = search_path() if search_path() != SearchPath() else run.search_path
    if refused := [*(meant.flags if search_path() == SearchPath() else ()), *not_replayed(kept)]:
        with composing_from(meant):
            whole = command([*words, f"resume={as_value(str(folder))}"])
        raise RequestError(
            f"resume = {value}: the run was started with {', '.join(map(brief, refused))}. A run "
            "folder may come from anywhere, so only shipped options and plain settings are "
            f"replayed. If you trust the rest, type the whole command:\n  {whole}"
        )
    for note in (*notes, f"resume     {folder}{': ' if kept else ''}{' '.join(kept)}"):
        say(note, is_error=is_shown)
    return [*words, asked[-1].input_line or ""], folder


def plan_of(request: Request, composed: DictConfig) -> Plan:
    """Judge a request: all of its jobs, with their text, weights, folders and machine.

    Args:
        composed: what Hydra composed of it last.

    Raises:
        RequestError: whatever is wrong with any of its jobs.
    """
    is_sweep = request.is_multirun or composed.hydra.mode == RunMode.MULTIRUN
    plan = _plan_sweep(request, composed) if is_sweep else _plan_run(request, composed)
    if not request.is_shown:
        for job in plan.jobs:
            check_free(job.folder, key="hydra.run.dir")
        if plan.sweep_folder is not None:
            folder = plan.sweep_folder
            if os.path.lexists(folder / RUN_FILE):
                raise RequestError(
                    f"hydra.sweep.dir = {folder}: it is the folder of a run, below which no report "
                    "looks for others; name a folder of the sweep's own."
                )
            check_free(folder, key="hydra.sweep.dir")
            for held in sorted(folder.rglob(LOCK_NAME)):  # a job may run on by itself
                check_free(held.parent, key="hydra.sweep.dir")
        _check_means(plan)
    return plan


def _check_means(plan: Plan) -> None:
    """Refuse jobs that the machine can't hold, and text that can't be read or split."""
    jobs = plan.jobs or plan.examples
    todo = {n: job for n, job in enumerate(jobs) if job.state is not RunState.FINISHED}
    # Of a hub id the shapes are known later
    known = {n: shape for n, job in todo.items() if (shape := known_config(job.config)) is not None}
    found: dict[int, list[Problem]] = {n: [] for n in todo}
    for n, shape in known.items():
        config = todo[n].config
        found[n] += memory_problems(config, shape)
        for number, fallback in enumerate(() if found[n] else config.fallbacks, start=1):
            of_attempt = memory_problems(fallback, shape)
            found[n] += (for_fallback(problem, config.gate, number) for problem in of_attempt)
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


def _plan_run(request: Request, composed: DictConfig) -> Plan:
    resumed, hydra = request.resumed, composed.hydra
    rules = _OF_RUNS[:1] if resumed else _OF_RUNS
    config = request.composing.judged(composed, request.overrides, rules=rules)
    is_single = not request.is_shown and resumed is None  # a job of a sweep is resumed by itself
    if is_single and (swept := hydra.sweeper.get("params")):
        names = ", ".join(map(str, swept))
        raise RequestError(
            f"hydra.sweeper.params names values of {names} for a sweep, and this is a single run: "
            "add -m."
        )
    if not hydra.run.dir:
        raise_problems([Problem("hydra.run.dir", "", reason="name a folder, or leave it out")])
    folder = resumed or Path(hydra.run.dir).absolute()
    return Plan((Job(request.overrides, config, folder, check_run_folder(folder, config)),))


def _plan_sweep(request: Request, composed: DictConfig) -> Plan:
    composing, hydra = request.composing, composed.hydra
    if hydra.mode == RunMode.RUN:
        raise RequestError("hydra.mode = RUN: -m asks for a sweep; give one of them.")
    folder = Path(hydra.sweep.dir).absolute()
    parameters = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    typed = parse([*parameters, *request.overrides], loader=composing.loader)
    shared = [o.input_line or "" for o in typed if o.is_hydra_override()]
    # Hydra's time resolver would give every job a sweep folder of its own
    shared.append(f"hydra.sweep.dir={quoted(str(folder))}")
    task = [override for override in typed if not override.is_hydra_override()]
    if hydra.sweeper.get("_target_") != _BASIC_SWEEPER:
        # It decides by each job what the next ones are, and each is judged when it starts
        example = _plan_jobs(composing, [[*map(first_value, task)]], shared, is_example=True)
        how = launching(hydra, num_jobs=int(hydra.sweeper.get("n_jobs") or 1))
        notes = _notes(how, folder)
        sampler = hydra.sweeper.get("sampler") if hydra.sweeper.get("storage") is None else None
        if sampler is not None and "seed" in sampler and sampler.seed is None:
            # A sweep that is begun again thinks of the same jobs; a stored study goes on elsewhere
            sampler.seed = 0
            notes += ("sweep      hydra.sweeper.sampler.seed=0, so that it can go on",)
        return Plan((), folder, how, example, notes)
    split = split_sweep(task)
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
    jobs = _plan_jobs(composing, split, shared)
    if len({job.folder for job in jobs}) < len(jobs):
        raise RequestError(
            f"hydra.sweep.subdir = {jobs[0].folder.name}: several jobs would share one folder; "
            "must be what differs from job to job, as ${hydra.job.num}."
        )
    how = launching(hydra, num_jobs=len(jobs))
    return Plan(jobs, folder, how, notes=_notes(how, folder, num_jobs=len(jobs)))


def _notes(how: Launching, folder: Path, *, num_jobs: int | None = None) -> tuple[str, ...]:
    output = f"output of each: {folder}/JOB/{OUTPUT_FILE}"
    if not how.is_in_processes:
        number = "jobs" if num_jobs is None else f"{num_jobs} job{'s' * (num_jobs != 1)}"
        return (f"sweep      {number}, one at a time; {output}",)
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
    *,
    is_example: bool = False,
) -> tuple[Job, ...]:
    """Compose, validate and place jobs.

    Args:
        shared: overrides of Hydra's own settings.
        is_example: they only show what a sweeper may try; no folder is theirs.

    Raises:
        RequestError: what is wrong with any of them.
    """
    jobs: list[Job] = []
    found: dict[int, Sequence[Problem]] = dict.fromkeys(range(len(split)), ())
    for number, words in enumerate(split):
        try:
            composed = composing.compose([*shared, *words], job_number=number, rules=_OF_SWEEPS)
            sweep = composed.hydra.sweep
            folder = _job_folder(Path(sweep.dir).absolute(), str(sweep.subdir))
            state = RunState.NEW if is_example else check_run_folder(folder, composed.config)
            jobs.append(Job(tuple(words), composed.config, folder, state))
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
    if config.trainer.accelerator not in ("gpu", "mps"):
        return
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
        reason = f"torch finds {found} GPUs on this machine; must be at most that"
        yield Problem("trainer.devices", devices, reason=reason)


_IN_A_FILE = "it stands in an option file; it is for the command line"
_IN_A_SWEEP = (
    "a sweep goes on when it is given its own folder again (hydra.sweep.dir=FOLDER); resume is for "
    "single runs"
)
_OF_RUNS = (_device_problems, compiler_problems, partial(_resume_problems, reason=_IN_A_FILE))
_OF_SWEEPS = (
    partial(_resume_problems, reason=_IN_A_SWEEP),
    _process_problems,
    _device_problems,
    compiler_problems,
)


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
            "(hydra.sweep.dir); must be a name that differs from job to job, as "
            "${hydra.job.num}."
        )
    return folder

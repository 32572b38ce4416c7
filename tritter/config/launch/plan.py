"""Turns a command line into a plan of jobs, validated completely before anything is written."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tritter.config.fallbacks import FallbackChain
from tritter.config.folders import SearchPath, search_path
from tritter.config.launch.command_line import CommandLine
from tritter.config.launch.composition import Loader
from tritter.config.launch.jobs import Job, LaunchSettings, Task
from tritter.config.overrides import (
    command,
    normalise,
    override_key,
    override_value,
    parse,
    quote,
    refuse_sweeps,
    unreplayed_overrides,
)
from tritter.config.run_folder import (
    OUTPUT_FILE,
    RunRecord,
    RunState,
    check_run_folder,
)
from tritter.config.schema import RunConfig
from tritter.data.sources import check_contents
from tritter.errors import (
    Problem,
    RequestError,
    TritterError,
    brief,
    did_you_mean,
    raise_problems,
    refused,
)
from tritter.planning.run_memory import RunMemory, side_by_side_problems
from tritter.storage.lock import FolderLock
from tritter.storage.reading import RUN_FILE, SUMMARY_FILE, named_path
from tritter.terminal import SYSTEM_ERRORS, say
from tritter.training.options import compiler_problems

_SEQUENTIAL = LaunchSettings()
_RUNS = Path("outputs/runs")  # hydra.run.dir of conf/config.yaml, without the timestamp
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_RESUME_IN_FILE = "it is set in an option file; set it on the command line"
_RESUME_IN_SWEEP = (
    "to resume a sweep, set its folder (hydra.sweep.dir=FOLDER); resume is for single runs"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The validated jobs of a command line.

    Args:
        jobs: the job of a single run, or all jobs of a sweep; empty if the sweeper is adaptive.
        sweep_folder: folder of the sweep; None for a single run.
        launching: settings of the sweep's launcher.
        examples: a representative job of an adaptive sweeper.
        notes: lines to print before the start.
    """

    jobs: tuple[Job, ...]
    sweep_folder: Path | None = None
    launching: LaunchSettings = _SEQUENTIAL
    examples: tuple[Job, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_adaptive(self) -> bool:
        """Whether the sweeper chooses new jobs from the results of earlier ones."""
        return not self.jobs


@dataclass(slots=True)
class Request:
    """A command for Hydra.

    Args:
        loader: composes the jobs.
        overrides: overrides of the command line and of the resumed run.
        resumed: folder of the resumed run, if any.
        is_multirun: True with -m.
        is_shown: print the config without running.
        task: task function that Hydra calls with each job.

    Attributes:
        plan: the plan, once the request is validated.
        exit_stack: holds the folder lock until the command ends.
    """

    loader: Loader
    overrides: tuple[str, ...]
    resumed: Path | None
    is_multirun: bool
    is_shown: bool
    task: Task | None = None
    plan: Plan | None = None
    exit_stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, typed: CommandLine, loader: Loader) -> Self:
        """Return the request of a command line, before composition.

        Overrides replayed from a resumed run are printed first, before data or weights are opened.
        """
        is_shown, folder = typed.info_flag is not None, None
        overrides = [normalise(override, loader.options) for override in typed.overrides]
        if not typed.is_multirun:
            overrides, folder = _add_resumed(loader, overrides, is_shown=is_shown)
        parsed = parse(overrides, loader=loader)
        _check_overrides(parsed, loader.options)
        if not typed.is_multirun:
            refuse_sweeps(parsed)
        return cls(loader, tuple(overrides), folder, typed.is_multirun, is_shown)

    def plan_of(self, composed: DictConfig) -> Plan:
        """Return the validated plan (data, folders, devices) for a composed config."""
        is_sweep = self.is_multirun or composed.hydra.mode == RunMode.MULTIRUN
        try:
            plan = _plan_sweep(self, composed) if is_sweep else _plan_run(self, composed)
        except OmegaConfBaseException as error:  # interpolations are resolved when they are read
            raise RequestError(f"{error.full_key}: {str(error).splitlines()[0]}.") from None
        if not self.is_shown:
            for job in plan.jobs:
                FolderLock(job.folder).check(key="hydra.run.dir")
            if (folder := plan.sweep_folder) is not None:
                if os.path.lexists(folder / RUN_FILE):
                    raise RequestError(
                        f"hydra.sweep.dir = {folder}: it is the folder of a run; set a new folder "
                        "for the sweep."
                    )
                FolderLock(folder).check(key="hydra.sweep.dir")
                for lock in sorted(folder.rglob(FolderLock.NAME)):  # a job may still be running
                    FolderLock(lock.parent).check(key="hydra.sweep.dir")
            _check_resources(plan)
        return plan

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Run the request with Hydra inside this context.

        What the callback refused is raised. An error of Hydra before the run began is raised as a
        bad request. A run that is finished already ends the block without an error.
        """
        token = _REQUEST.set(self)
        try:
            with self.exit_stack:
                yield
        except _RequestRefused as refused:
            if refused.error is not None:
                raise refused.error from None
        except (TritterError, *SYSTEM_ERRORS):
            raise
        except Exception as error:
            if self.plan is not None:
                raise
            # A setting that Hydra rejects
            reason = " ".join(str(error).split())
            raise RequestError(f"Hydra can't start: {reason} ({type(error).__name__}).") from error
        finally:
            _REQUEST.reset(token)


class _RequestRefused(BaseException):
    """Raised by the callback, because Hydra only warns about an Exception and continues.

    Args:
        error: the reason; None if the run is already finished.
    """

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error


_REQUEST: ContextVar[Request] = ContextVar("request")


class RequestValidation(Callback):
    """Hydra callback that validates a request and locks its folder before Hydra creates it.

    `Loader` puts it before all other callbacks.
    """

    def on_run_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Validate a run or all jobs of a sweep; for an adaptive sweeper, an example."""
        request, hydra = _REQUEST.get(), config.hydra
        try:
            request.plan = plan = request.plan_of(config)
            for note in plan.notes:
                say(note)
            if plan.sweep_folder is None:
                (job,), key, folder = plan.jobs, "hydra.run.dir", plan.jobs[0].folder
                if job.state is RunState.FINISHED:
                    say(f"This run is finished, nothing to do. Summary: {folder / SUMMARY_FILE}")
                    raise _RequestRefused
                hydra.run.dir = str(folder)
            else:
                key, folder = "hydra.sweep.dir", plan.sweep_folder
                hydra.sweep.dir = str(folder)
                # A worker process would resolve the time to another folder
                hydra.overrides.hydra.append(f"hydra.sweep.dir={quote(str(folder))}")
            _require_writable(folder, key=key)
            request.exit_stack.enter_context(FolderLock(folder).held(key=key))
            if plan.sweep_folder is not None:
                request.exit_stack.enter_context(plan.launching.parallel_jobs(folder))
            if request.task is not None:
                request.task.jobs, request.task.keeps_failed = plan.jobs, plan.is_adaptive
        except Exception as error:
            raise _RequestRefused(error) from error

    on_multirun_start = on_run_start


def _check_overrides(overrides: Sequence[Override], options: Mapping[str, Sequence[str]]) -> None:
    """Reject overrides that Hydra would accept with an unintended meaning."""
    problems = []
    for override in overrides:
        group, known = override.key_or_group, options.get(override.key_or_group)
        if override.is_hydra_override() and override.is_sweep_override():
            reason = "Hydra's settings can't be swept; set one value"
            problems.append(
                Problem(group, (override.input_line or "=")[len(group) + 1 :], reason=reason)
            )
        if override.is_hydra_override() and "/" in group and override.value() is None:
            reason = "it requires the name of an option; omit it for the default"
            problems.append(Problem(group, None, reason=reason))
        if known is None:
            continue
        if override.is_delete():
            if (deleted := override.value()) is not None:
                reason = f"~{group} takes no value; list the options to keep: {group}=[A,B]"
                problems.append(Problem(f"~{group}", deleted, reason=reason))
            continue
        value = override.input_line.partition("=")[2] if override.input_line else ""
        allowed = f"one of {', '.join(known)}"
        if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD):
            reason = f"select a group without +; allowed: {allowed}"
            problems.append(Problem(f"+{group}", value, reason=reason, nearest=f"{group}={value}"))
        elif not override.is_sweep_override() and not isinstance(override.value(), str | list):
            reason = (
                f"{group} requires the name of an option, {allowed}; set single keys as {group}.KEY"
            )
            problems.append(Problem(group, value, reason=reason))
    raise_problems(problems)


def _add_resumed(
    loader: Loader, overrides: list[str], *, is_shown: bool
) -> tuple[list[str], Path | None]:
    """Return the overrides with those of the resumed run, and its folder.

    A run folder may be untrusted: only Tritter's own options and plain values are
    replayed, without `TYPED_ONLY`.
    """
    typed = parse(overrides, loader=loader)
    resumes = [o for o in typed if o.key_or_group == "resume" and not o.is_delete()]
    value = resumes[-1].value() if resumes and not resumes[-1].is_sweep_override() else None
    if value is None:
        return overrides, None
    if any(o.key_or_group == "hydra.run.dir" for o in typed):
        raise RequestError(
            f"resume = {value}: it sets the folder, and so does hydra.run.dir; use one of them."
        )
    folder, notes = _find_run(str(value))
    run = RunRecord.read(folder)

    def is_overridden(text: str) -> bool:  # by the same key, or by its group
        key = override_key(text)
        return any(
            key == other.key_or_group
            or (key.startswith(f"{other.key_or_group}.") and other.input_line not in run.overrides)
            for other in typed
        )

    kept = [text for text in run.overrides if not is_overridden(text)]
    combined = [*kept, *(o.input_line or "" for o in typed if o.key_or_group != "resume")]
    path = search_path() if search_path() != SearchPath() else run.search_path
    if refused := [
        *(path.flags if search_path() == SearchPath() else ()),
        *unreplayed_overrides(kept),
    ]:
        with path.in_use():
            full_command = command([*combined, f"resume={override_value(str(folder))}"])
        raise RequestError(
            f"resume = {value}: the run was started with {', '.join(map(brief, refused))}. A run "
            "folder may be untrusted, so only shipped options and plain settings are replayed. "
            f"If you trust the rest, type the full command:\n  {full_command}"
        )
    for note in (*notes, f"resume     {folder}{': ' if kept else ''}{' '.join(kept)}"):
        say(note, is_error=is_shown)
    return [*combined, resumes[-1].input_line or ""], folder


def _find_run(resume: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder that `resume` refers to (latest or a folder), and notes on skipped runs."""
    found = _RUNS.glob(f"*/{RUN_FILE}")
    runs = sorted(found, key=lambda path: (path.lstat().st_mtime_ns, str(path)), reverse=True)
    folders = [path.parent.absolute() for path in runs]
    if resume == "latest":
        skipped: list[str] = []
        for folder in folders:
            try:
                RunRecord.read(folder)
                return folder, tuple(skipped)
            except RequestError as error:
                skipped.append(f"resume     skipped {folder}: {error}")
        none = f"resume = latest: there is no run in {_RUNS.absolute()}; set the folder of a "
        none += "run, or omit resume to start a new one."
        raise RequestError("\n".join([none, *skipped]))
    folder = named_path(resume, key="resume").absolute()
    if not os.path.lexists(folder / RUN_FILE):
        known = ["latest", *(str(path.relative_to(Path.cwd())) for path in folders)]
        raise RequestError(
            f"resume = {resume}: the folder contains no run ({RUN_FILE} is missing); allowed: "
            f"latest, or the folder of a run.{did_you_mean(resume, known)}"
        )
    return folder, ()


def _require_writable(folder: Path, *, key: str) -> None:
    """Create the folder before Hydra does, which would fail with a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise refused(key, folder, f"the folder can't be created ({error.strerror})") from error
    if not is_writable:
        raise refused(key, folder, "the folder is not writable")


def _check_resources(plan: Plan) -> None:
    """Reject jobs that do not fit into memory, and data that can't be read or split."""
    jobs = plan.jobs or plan.examples
    todo = {n: job for n, job in enumerate(jobs) if job.state is not RunState.FINISHED}
    # The shape of a Hub model is known later
    known = {n: model for n, job in todo.items() if (model := job.config.known_model()) is not None}
    found: dict[int, list[Problem]] = {n: [] for n in todo}
    for n, model in known.items():
        config = todo[n].config
        found[n] += RunMemory(config, model).problems()
        for number, fallback in enumerate(() if found[n] else config.fallbacks, start=1):
            attempt_problems = RunMemory(fallback, model).problems()
            chain = FallbackChain(config.gate)
            found[n] += (chain.locate(problem, number) for problem in attempt_problems)
    _raise_job_problems(found, [job.overrides for job in jobs])
    raise_problems(
        side_by_side_problems(
            [RunMemory(todo[n].config, model) for n, model in known.items()],
            launcher=plan.launching.launcher,
            num_parallel=plan.launching.num_parallel,
        )
    )
    check_contents(request for job in todo.values() for request in job.config.data.text_requests)
    same = {n: list(job.config.data.same_source_problems()) for n, job in todo.items()}
    _raise_job_problems(same, [job.overrides for job in jobs])
    sides = {n: list(job.config.text.side_problems()) for n, job in todo.items()}
    _raise_job_problems(sides, [job.overrides for job in jobs])


def _plan_run(request: Request, composed: DictConfig) -> Plan:
    resumed, hydra = request.resumed, composed.hydra
    rules = _RUN_RULES[:1] if resumed else _RUN_RULES
    config = request.loader.validated(composed, request.overrides, rules=rules)
    is_single = not request.is_shown and resumed is None  # jobs of a sweep resume as single runs
    if is_single and (swept := hydra.sweeper.get("params")):
        raise RequestError(
            f"hydra.sweeper.params sets values of {', '.join(map(str, swept))} for a sweep, but "
            "this is a single run: add -m."
        )
    if not hydra.run.dir:
        raise_problems([Problem("hydra.run.dir", "", reason="set a folder, or omit this key")])
    folder = resumed or Path(hydra.run.dir).absolute()
    missing = tuple(path for path in (folder, *folder.parents) if not path.exists())
    state = check_run_folder(folder, config)
    job, loader = Job(request.overrides, config, folder, state, missing), request.loader
    text, notes = OmegaConf.to_yaml(composed), list[str]()
    for override in () if config.fallbacks else parse(request.overrides, loader=loader):
        for key, need in loader.unread_keys(composed).items():
            name, is_noted = override.key_or_group, "decay" in key  # by `rate_notes`
            if f"{name}.".startswith(f"{key}.") and not is_noted and f"${{{name}}}" not in text:
                notes.append(f"unread     {override.input_line}: it needs {need}")
    return Plan((job,), notes=tuple(notes))


def _plan_sweep(request: Request, composed: DictConfig) -> Plan:
    loader, hydra = request.loader, composed.hydra
    if hydra.mode == RunMode.RUN:
        raise RequestError("hydra.mode = RUN: -m starts a sweep; use one of them.")
    folder = Path(hydra.sweep.dir).absolute()
    parameters = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    typed = parse([*parameters, *request.overrides], loader=loader)
    shared = [o.input_line or "" for o in typed if o.is_hydra_override()]
    # Hydra's time resolver would give each job a different sweep folder
    shared.append(f"hydra.sweep.dir={quote(str(folder))}")
    task = [override for override in typed if not override.is_hydra_override()]
    if hydra.sweeper.get("_target_") != _BASIC_SWEEPER:
        # An adaptive sweeper: each job is validated when it starts
        example = _plan_jobs(loader, [[*map(_first_value, task)]], shared, is_example=True)
        launcher = LaunchSettings.of(hydra, num_jobs=int(hydra.sweeper.get("n_jobs") or 1))
        notes = _notes(launcher, folder)
        sampler = hydra.sweeper.get("sampler") if hydra.sweeper.get("storage") is None else None
        if sampler is not None and "seed" in sampler and sampler.seed is None:
            # A restarted sweep proposes the same jobs again; a stored study resumes on its own
            sampler.seed = 0
            notes += ("sweep      hydra.sweeper.sampler.seed=0, so that the sweep can resume",)
        return Plan((), folder, launcher, example, notes)
    split = _split_sweep(task)
    jobs = _plan_jobs(loader, split, shared)
    if len({job.folder for job in jobs}) < len(jobs):
        raise RequestError(
            f"hydra.sweep.subdir = {jobs[0].folder.name}: several jobs would share this folder; "
            "use a name that differs between jobs, such as ${hydra.job.num}."
        )
    launcher = LaunchSettings.of(hydra, num_jobs=len(jobs))
    return Plan(jobs, folder, launcher, notes=_notes(launcher, folder, num_jobs=len(jobs)))


def _notes(
    launcher: LaunchSettings, folder: Path, *, num_jobs: int | None = None
) -> tuple[str, ...]:
    output = f"output of each: {folder}/JOB/{OUTPUT_FILE}"
    if not launcher.is_in_processes:
        number = "jobs" if num_jobs is None else f"{num_jobs} job{'s' * (num_jobs != 1)}"
        return (f"sweep      {number}, one at a time; {output}",)
    if launcher.threads is None:
        return (f"sweep      {launcher.launcher} runs the jobs; {output}",)
    each = "1 thread" if launcher.threads == 1 else f"{launcher.threads} threads"
    if num_threads := os.environ.get("OMP_NUM_THREADS"):
        each = f"OMP_NUM_THREADS={num_threads}"
    jobs = f"{launcher.num_parallel} job{'s' * (launcher.num_parallel != 1)}"
    return (f"sweep      {launcher.launcher}: {jobs} at a time, {each} each; {output}",)


def _plan_jobs(
    loader: Loader,
    split: Sequence[list[str]],
    shared: Sequence[str],
    *,
    is_example: bool = False,
) -> tuple[Job, ...]:
    """Compose and validate jobs, and assign their folders.

    Args:
        shared: Hydra overrides of all jobs.
        is_example: the jobs are examples without a folder.
    """
    jobs: list[Job] = []
    found: dict[int, Sequence[Problem]] = dict.fromkeys(range(len(split)), ())
    for number, overrides in enumerate(split):
        try:
            words = [*shared, *overrides]
            composed = loader.composed(words)
            config = loader.validated(composed, words, rules=_SWEEP_RULES)
            with open_dict(composed.hydra):
                composed.hydra.job.num, composed.hydra.job.id = number, str(number)
            sweep = composed.hydra.sweep
            folder = _job_folder(Path(sweep.dir).absolute(), str(sweep.subdir))
            state = RunState.NEW if is_example else check_run_folder(folder, config)
            jobs.append(Job(tuple(overrides), config, folder, state))
        except RequestError as error:
            found[number] = error.problems
        except TritterError as error:
            raise type(error)(f"{_jobs([number], split)}: {error}") from error
    _raise_job_problems(found, split)
    return tuple(jobs)


def _resume_problems(config: RunConfig, *, reason: str) -> Iterator[Problem]:
    if config.resume is not None:
        yield Problem("resume", config.resume, reason=reason)


def _process_problems(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.strategy != "auto":
        reason = (
            "a launcher may run the jobs of a sweep in parallel, and their processes would use the "
            "same devices; omit -m, or sweep with trainer=cpu or trainer=gpu"
        )
        yield Problem("trainer.strategy", config.trainer.strategy, reason=reason)


def _device_problems(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.accelerator not in ("gpu", "mps"):
        return
    import torch

    if config.trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        reason = "torch finds no Apple GPU on this machine; use cpu or auto (trainer=cpu, "
        yield Problem("trainer.accelerator", "mps", reason=f"{reason}trainer=auto)")
    if config.trainer.accelerator != "gpu":
        return
    found, devices = torch.cuda.device_count(), config.trainer.devices
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        reason = "torch finds no GPU on this machine; use cpu or auto (trainer=cpu, "
        yield Problem("trainer.accelerator", "gpu", reason=f"{reason}trainer=auto)")
    elif devices > max(1, found):
        reason = f"torch finds {found} GPUs on this machine; use at most that many"
        yield Problem("trainer.devices", devices, reason=reason)


_RUN_RULES = (
    _device_problems,
    compiler_problems,
    partial(_resume_problems, reason=_RESUME_IN_FILE),
)
_SWEEP_RULES = (
    partial(_resume_problems, reason=_RESUME_IN_SWEEP),
    _process_problems,
    _device_problems,
    compiler_problems,
)


def _raise_job_problems(
    found: Mapping[int, Sequence[Problem]], overrides: Sequence[Sequence[str]]
) -> None:
    """Raise the problems of all jobs, each once, in order of the validation pass.

    Args:
        found: number of a job → its problems.
        overrides: overrides of each job.
    """
    unique: dict[str, tuple[Problem, list[int]]] = {}
    for number, problems in found.items():
        for line, problem in {str(each): each for each in problems}.items():
            unique.setdefault(line, (problem, []))[1].append(number)
    raise_problems(
        [
            problem
            if len(numbers) == len(found)
            else replace(problem, job=_jobs(numbers, overrides))
            for problem, numbers in sorted(unique.values(), key=lambda each: each[0].found_by)
        ]
    )


def _jobs(numbers: Sequence[int], overrides: Sequence[Sequence[str]]) -> str:
    if len(numbers) == 1:
        return f"job {numbers[0]} ({' '.join(overrides[numbers[0]])})"
    return f"jobs {', '.join(map(str, numbers))}"


def _job_folder(sweep_folder: Path, name: str) -> Path:
    """Return a job's folder."""
    sweep_folder = Path(os.path.normpath(sweep_folder))
    folder = Path(os.path.normpath(sweep_folder / name))
    if sweep_folder not in folder.parents:
        raise RequestError(
            f"hydra.sweep.subdir = {name}: a job's folder must be inside the sweep's folder "
            "(hydra.sweep.dir); use a name that differs between jobs, such as "
            "${hydra.job.num}."
        )
    return folder


def _split_sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the overrides of each job, in the order of Hydra's basic sweeper."""
    for override in overrides:
        if isinstance(sweep := override.value(), IntervalSweep) or getattr(sweep, "shuffle", False):
            key, _, value = (override.input_line or "").partition("=")
            reason = "the basic sweeper requires values in a fixed order: A,B or range(START,STOP)"
            raise RequestError(Problem(key, value, reason=reason))
    return BasicSweeper.split_arguments(list(overrides), None)[0]


def _first_value(override: Override) -> str:
    """Return an override with a single value: for a sweep, its first value."""
    if not override.is_sweep_override():
        return override.input_line or ""
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return f"{key}={next(override.sweep_string_iterator(), '')}"
    interval = override.value()
    assert isinstance(interval, IntervalSweep), "Hydra sweeps are choices, ranges or intervals"
    return f"{key}={interval.start}"

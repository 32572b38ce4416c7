"""The program `python train.py`: Hydra with Tritter's error messages and exit codes.

`hydra.main` composes every job twice to find its mode, prints exceptions, and exits with 1.
Therefore `main` calls Hydra's `run` and `multirun` directly. They pass the composed config to the
callback `plan.RequestValidation` before they create a folder.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from tritter import __version__
from tritter.config.folders import search_path
from tritter.config.launch.command_line import (
    FLAGS,
    CommandLine,
)
from tritter.errors import RequestError, TritterError
from tritter.launched import Launch
from tritter.stopping import Stopped
from tritter.terminal import exit_code, say

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from tritter.config.launch.composition import Loader
    from tritter.config.launch.jobs import Pipeline, Task
    from tritter.config.launch.plan import Request
    from tritter.config.schema import RunConfig

_NO_SWEEP = (
    "a sweep is several runs, and run starts one: call it once for each value, or use "
    "python train.py -m."
)


def main(pipeline: "Pipeline", *, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code (0, 1, 2 or 3, see `--help`).

    The exit code is 130 after Ctrl-C and 143 after SIGTERM. Of several processes that torchrun or
    srun started, the first runs the command line, and the others join its training runs.

    Args:
        pipeline: `tritter.pipeline.run_pipeline`, or a function that imports it lazily.
        arguments: command-line arguments; default: those of the process.
    """
    try:
        launch = Launch.of()
        if launch is None:
            return _main(pipeline, arguments)
        from tritter.training.ranks import Ranks

        if launch.rank:
            return Ranks(launch).serve()
        with Ranks(launch).lead():
            return _main(pipeline, arguments)
    except TritterError as error:  # of the launch; _main handles all others
        say(f"error: {error}", is_error=True)
        return 2 if isinstance(error, RequestError) else 1


def _main(pipeline: "Pipeline", arguments: Sequence[str] | None) -> int:
    typed = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(partial(_run, typed, pipeline), describe_stop=_describe_stop)


def _describe_stop(stop: Stopped) -> str:
    location = f" {stop.location}" if stop.location else ""
    return "\n".join(["", f"Stopped{location}.", *stop.advice])


def _run(typed: list[str], pipeline: "Pipeline") -> int:
    command = CommandLine.parse(typed)
    if command.is_version:
        say(f"tritter {__version__}")
        return 0
    with command.search_path.in_use():
        if command.is_help:
            from tritter.config.launch.help import help_text

            say(help_text(command.overrides, is_full=command.is_full_help))
            return 0
        # Importing Hydra and the target checks takes half a second, which --help does not need
        from tritter.config.launch.composition import Loader

        with Loader.opened() as loader:
            if command.info_flag in ("hydra_help", "shell_completion"):
                return _print_hydra_answer(command, loader.hydra)
            return _execute(command, loader, pipeline, typed)


def _print_hydra_answer(command: CommandLine, hydra: "Hydra") -> int:
    """Print Hydra's own help, or the answer to a shell's completion request."""
    from hydra._internal.utils import get_args_parser

    overrides = list(command.overrides)
    try:
        if command.info_flag == "hydra_help":
            hydra.hydra_help(None, get_args_parser(), argparse.Namespace(overrides=overrides))
        else:
            hydra.shell_completion(search_path().config_name, overrides)
    except ValueError as error:
        raise RequestError(f"{' '.join(overrides)}: {' '.join(str(error).split())}.") from error
    return 0


def _execute(
    command: CommandLine, loader: "Loader", pipeline: "Pipeline", arguments: list[str]
) -> int:
    from tritter.config.launch.composition import SweepInConfig
    from tritter.config.launch.jobs import Task
    from tritter.config.launch.plan import Request

    request = Request.of(command, loader)
    if command.info_flag is not None:
        composed = loader.composed(request.overrides)
        request.plan_of(composed)
        if command.info_value == "job":
            loader.show(composed, is_resolved=command.is_resolved)
        else:
            loader.shown = composed
        return _show(command, request)
    request.task = task = Task(pipeline=pipeline)
    with request.handled():
        if not request.is_multirun:
            try:
                return _run_one(request, task)
            except SweepInConfig:
                request.is_multirun = loader.is_sweep = True
        from tritter.config.launch.sweep import run_sweep

        return run_sweep(request, task, typed=arguments)
    return 0  # it was finished before


def config_of_run(arguments: Sequence[str]) -> "RunConfig":
    """Return the configuration of a single run that is not started, for `--find-lr`.

    Args:
        arguments: as `main` takes them.
    """
    command = CommandLine.parse(arguments)
    keys = {override.lstrip("+~").partition("=")[0] for override in command.overrides}
    refused = [key for key in sorted(keys) if key == "resume" or key.startswith("hydra.")]
    if command.is_multirun or command.info_flag is not None or command.is_version:
        raise RequestError("--find-lr takes the arguments of one run: not -m, --cfg, --version.")
    if refused:
        raise RequestError(f"{refused[0]}: not with --find-lr; name its folder with --output.")
    if Launch.of() is not None:
        raise RequestError("--find-lr starts its own processes: omit torchrun or srun.")
    with command.search_path.in_use():
        from tritter.config.launch.composition import Loader

        with Loader.opened() as loader:
            return loader.compose(command.overrides)


def run_once(arguments: Sequence[str], pipeline: "Pipeline") -> Path:
    """Run a single run for another program and return its folder.

    Neither the working directory nor the loggers of the process are changed. A run that is
    finished already is not run again.

    Args:
        arguments: overrides, and of the flags `--config-dir` and `--config-name`.
        pipeline: as `main` takes it.
    """
    command = CommandLine.parse(arguments)
    if Launch.of() is not None:
        raise RequestError("run starts its own processes; with torchrun or srun, use train.py.")
    if command.is_multirun:
        raise RequestError(_NO_SWEEP)
    if command.info_flag is not None or command.is_help or command.is_version:
        raise RequestError("run takes overrides; use python train.py for help and --cfg.")
    with command.search_path.in_use():
        from tritter.config.launch.composition import Loader, SweepInConfig
        from tritter.config.launch.jobs import Task
        from tritter.config.launch.plan import Request
        from tritter.config.run_folder import RunStatus

        with Loader.opened() as loader:
            request = Request.of(command, loader)
            request.task = task = Task(pipeline=pipeline)
            loader.is_sweep = False

            def run_logged(config: "DictConfig") -> float | None:
                with _log_file(task.jobs[0].folder / "train.log"):
                    return task(config)

            overrides = list(request.overrides)
            with request.handled():
                try:
                    name = search_path().config_name
                    loader.hydra.run(name, run_logged, overrides, with_log_configuration=False)
                except SweepInConfig as error:
                    raise RequestError(_NO_SWEEP) from error
                except Stopped as stop:
                    if request.plan is not None:
                        stop.advice = (str(request.plan.jobs[0].folder),)
                    raise
    assert request.plan is not None, "Hydra called the callback"
    folder = request.plan.jobs[0].folder
    status = RunStatus.read(folder)
    if status.error is not None:
        if status.exit_code == status.EXIT_REQUEST and request.plan.jobs[0].undo():
            raise RequestError(status.error)
        raise TritterError(f"{status.error}\nRun folder: {folder}")
    return folder


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Append warnings to a file, as Hydra's own setup of logging would, which closes others."""
    handler, root = logging.FileHandler(path, delay=True), logging.getLogger()
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _show(command: CommandLine, request: "Request") -> int:
    """Print the output of --cfg or --info for a valid command line."""
    overrides, errors, hydra = list(request.overrides), StringIO(), request.loader.hydra
    name, info_value = search_path().config_name, command.info_value or "all"
    if command.info_flag == "info":
        hydra.show_info(info_value, name, overrides)
        return 0
    try:
        with redirect_stderr(errors):
            hydra.show_cfg(
                name, overrides, info_value, command.package, resolve=command.is_resolved
            )
    except SystemExit as end:
        raise RequestError(f"--cfg {info_value}: {' '.join(errors.getvalue().split())}.") from end
    return 0


def _run_one(request: "Request", task: "Task") -> int:
    """Run a single run, print its outcome and the command that resumes it; return the exit code."""
    from tritter.config.overrides import resume_command
    from tritter.config.run_folder import RunStatus

    request.loader.is_sweep = False
    unwritten = ""
    try:
        request.loader.hydra.run(search_path().config_name, task, list(request.overrides))
    except Stopped as stop:
        if request.plan is not None:
            (job,) = request.plan.jobs
            stop.advice = (f"Resume with:\n  {resume_command(job.folder, job.overrides)}",)
        raise
    except Exception as error:
        if request.plan is None:  # composition failed
            raise
        if isinstance(error, TritterError):  # the disk is full: the status does not have it
            unwritten = str(error)
        else:
            traceback.print_exc()
    assert request.plan is not None, "Hydra called the callback"
    (job,) = request.plan.jobs
    status = RunStatus.read(job.folder)
    if (failure := unwritten or status.error) is None:
        return status.exit_code
    is_request = status.exit_code == status.EXIT_REQUEST
    if is_request and job.undo():
        raise RequestError(failure)
    say(f"error: {failure}", is_error=True)
    # The same request on the same data would be rejected again
    action = "Fix this, then resume with" if is_request else "Resume with"
    if not job.has_finished_stage:
        action += " (keys may change, as no stage has finished)"
    elif is_request:
        action += " (most changed keys need a new run)"
    resuming = resume_command(job.folder, job.overrides)
    say(f"Run folder: {job.folder}\n{action}:\n  {resuming}", is_error=True)
    return 1 if is_request else status.exit_code


def completions(arguments: Sequence[str]) -> list[str]:
    """Return the completions of the last argument; none after an invalid argument.

    Args:
        arguments: arguments after the program name; the last one is incomplete and may be empty.
    """
    *before, incomplete = arguments or [""]
    if incomplete.startswith("-"):
        return sorted(flag for names in FLAGS for flag in names if flag.startswith(incomplete))
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from tritter.config.launch.composition import Loader

    try:
        command = CommandLine.parse(before)
        with command.search_path.in_use(), Loader.opened() as loader:
            line = " ".join([*command.overrides, incomplete])
            plugin = DefaultCompletionPlugin(loader)
            found: list[str] = plugin._query(search_path().config_name, line)
    except RequestError:
        return []
    return [one for one in found if one != incomplete]

"""The program behind `python train.py`: help, refusals, one run or a sweep, and the exit code.

Hydra makes folders before it calls anybody, and its errors exit 1 with its own words. So every
job is composed and validated here first, and Hydra is only started on a request that is right.
"""

import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING

from tritter import __version__
from tritter.config.folders import composing_from, front_of
from tritter.config.launch.command_line import CommandLine, read_command_line
from tritter.config.launch.help import help_text
from tritter.config.launch.words import UNFORESEEN, check_words, said
from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped, stopping
from tritter.terminal import close_pipe, say

if TYPE_CHECKING:
    from tritter.config.launch.jobs import Pipeline
    from tritter.config.launch.plan import Plan


def main(pipeline: "Pipeline", *, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code (0, 1, 2 or 3 as in `--help`).

    After Ctrl-C it is 130, after SIGTERM 143.

    Args:
        pipeline: `tritter.pipeline.run_pipeline`, or something that imports it when called.
        arguments: the words of the command line; default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_words(words)
        with stopping():
            return _run(words, pipeline)
    except RequestError as error:
        say(f"error: {error}\nNothing was written.", is_error=True)
        return 2
    except TritterError as error:
        say(f"error: {error}", is_error=True)
        return 1
    # What the system refuses on the way (a full disk, a name too long, no memory) is no fault of
    # the program, and needs no traceback
    except UNFORESEEN as error:
        say(f"error: {said(error)}", is_error=True)
        return 1
    except Stopped as stop:
        if stop.signal_number == signal.SIGPIPE:  # nobody reads on, as behind `| head`
            close_pipe()
            return stop.exit_code
        where = f" {stop.where}" if stop.where else ""
        say("\n".join(["", f"Stopped{where}.", *stop.advice]), is_error=True)
        return stop.exit_code


def _run(words: list[str], pipeline: "Pipeline") -> int:
    command = read_command_line(words)
    if command.is_version:
        say(f"tritter {__version__}")
        return 0
    with composing_from(
        front_of(command.config_folders, command.config_name, searchpath=command.searchpath)
    ):
        if command.is_help:
            say(help_text(command.overrides))
            return 0
        if command.shell_request is not None:
            return _answer_shell(command.shell_request)
        if command.is_hydra_help:
            from tritter.config.launch.hydra_help import hydra_help

            say(hydra_help())
            return 0
        return _act(command, pipeline, words)


def _act(command: CommandLine, pipeline: "Pipeline", words: list[str]) -> int:
    # Hydra and the checks of targets take half a second to import, which --help does not need
    from tritter.config.launch.plan import make_plan

    if command.hydra_flags:
        return _show(command)
    plan = make_plan(command)
    for note in plan.notes:
        say(note)
    if plan.sweep_folder is not None:
        from tritter.config.launch.sweep import run_sweep

        return run_sweep(plan, plan.sweep_folder, pipeline, typed=words)
    return _run_one(plan, pipeline)


def _answer_shell(request: str) -> int:
    """Print what a shell evaluates, or what may stand at the end of $COMP_LINE, a line each."""
    from tritter.config.launch.completion import line_completions, shell_script
    from tritter.config.overrides import program_words

    if request == "query=bash":
        found = line_completions(os.environ.get("COMP_LINE", ""))
        say("\n".join(found)) if found else None
    elif not program_words()[-1].endswith("train.py"):
        raise RequestError(
            f"-sc {request}: it is for train.py; `tritter --install-completion` is for tritter, "
            "whose completion knows tritter train."
        )
    else:
        say(shell_script(request))
    return 0


def _show(command: CommandLine) -> int:
    """Let Hydra answer --cfg and --info, on a command line that is right.

    Raises:
        RequestError: what is asked for is not there.
    """
    from tritter.config.launch.plan import make_plan
    from tritter.config.launch.starting import start_hydra

    plan, told = make_plan(command), StringIO()
    try:
        with redirect_stderr(told):
            start_hydra([*command.hydra_flags, *plan.overrides], lambda cfg: math.nan)
    except SystemExit as end:
        if end.code:
            asked = " ".join(command.hydra_flags)
            raise RequestError(f"{asked}: {' '.join(told.getvalue().split())}.") from end
    return 0


def _run_one(plan: "Plan", pipeline: "Pipeline") -> int:
    from tritter.config.launch.jobs import read_status, start_run
    from tritter.config.launch.resume import recorded_words
    from tritter.config.overrides import resume_command
    from tritter.config.run_folder import RunState, require_writable
    from tritter.storage.reading import SUMMARY_FILE

    job = plan.jobs[0]
    if job.state is RunState.FINISHED:
        say(f"This run is finished; nothing to do. Its summary: {job.folder / SUMMARY_FILE}")
        return 0
    require_writable(job.folder, key="hydra.run.dir")
    goes_on = f"Go on with:\n  {resume_command(job.folder, recorded_words(job.overrides))}"
    try:
        start_run(job, pipeline)
    except Stopped as stop:
        stop.advice = (goes_on,)
        raise
    status = read_status(job.folder)
    if status["error"] is not None:
        say(f"error: {status['error']}", is_error=True)
        # The same words on the same text are refused again
        once = "Once that is mended, go on with" if status["exit_code"] == 2 else "Go on with"
        goes_on = goes_on.replace("Go on with", once)
        say(f"The run so far: {job.folder}\n{goes_on}", is_error=True)
    return int(status["exit_code"])

"""The `tritter` commands and their exit codes. Each command and its options have their own module.

Nothing here imports torch, so `tritter --help` and rejected requests return immediately.
"""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tritter import __version__
from tritter.cli.compare import compare
from tritter.cli.evaluate import evaluate
from tritter.cli.expand import expand
from tritter.cli.export import export
from tritter.cli.generate import generate
from tritter.cli.history import history
from tritter.cli.inspect import inspect
from tritter.cli.methods import MethodCommand
from tritter.cli.options import CheckpointCommand
from tritter.cli.plan import plan
from tritter.cli.push import push
from tritter.cli.report import report
from tritter.cli.train import TrainCommand, train
from tritter.cli.validate import validate
from tritter.config.launch.command_line import SYSTEM_ERRORS, check_encodable, one_line
from tritter.config.suggestions import Hint, flag_advice
from tritter.errors import RequestError, TritterError, panics_as_errors
from tritter.stopping import Stopped, stopping
from tritter.terminal import close_pipe, say

# In the order of the help
_COMMANDS: tuple[tuple[Callable[..., int], type[TyperCommand]], ...] = (
    (expand, MethodCommand),
    (history, TyperCommand),
    (report, TyperCommand),
    (compare, TyperCommand),
    (inspect, TyperCommand),
    (export, CheckpointCommand),
    (push, TyperCommand),
    (generate, CheckpointCommand),
    (evaluate, CheckpointCommand),
    (validate, CheckpointCommand),
    (plan, CheckpointCommand),
    (train, TrainCommand),
)

_HELP_ALL = "--help-all"
# Words of other tools → commands of `tritter`
_SYNONYMS = {
    **dict.fromkeys(("finetune", "fine-tune", "pretrain", "continue", "fit", "run"), "train"),
    **dict.fromkeys(("grow", "merge", "upcycle", "stack", "widen", "deepen"), "expand"),
    **dict.fromkeys(("chat", "sample", "infer", "inference", "predict"), "generate"),
    **dict.fromkeys(("eval", "test", "benchmark", "score"), "evaluate"),
    **dict.fromkeys(("show", "info", "describe"), "inspect"),
    **dict.fromkeys(("convert", "save"), "export"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("lineage", "log"), "history"),
    **dict.fromkeys(("diff",), "compare"),
    **dict.fromkeys(("check", "verify"), "validate"),
}


class _Commands(TyperGroup):
    """All commands. Flags get a default: without one, Typer imports pydantic, which is slow."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for flag in params:
            if flag.default is None:  # --help and the completion flags
                flag.default = False
        return params

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and (meant := _SYNONYMS.get(args[0].lower())) is not None:
            ctx.fail(f"No such command '{args[0]}'. Did you mean {meant}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tritter",
    cls=_Commands,
    help="Grow language models: function-preserving expansion of Hugging Face checkpoints.",
    epilog="Exit codes: 0 done, 1 failed, 2 invalid request (nothing was written), 3 a check "
    "failed, 130 and 143 stopped by Ctrl-C or SIGTERM, 141 broken pipe. Options may be spelled "
    "with - or _.",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return its exit code.

    The exit codes are 0 (done), 1 (failed), 2 (invalid request), 3 (a check failed), 130 (Ctrl-C),
    141 (broken pipe) and 143 (SIGTERM).
    """
    argv = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        check_encodable(argv)
        with panics_as_errors(), stopping():
            command = typer.main.get_command(app)
            is_folded = _HELP_ALL not in argv
            if argv[0] != "train":  # train prints the help of train.py
                argv = ["--help" if argument == _HELP_ALL else argument for argument in argv]
            run = partial(command.main, argv, prog_name="tritter", standalone_mode=False)
            return run(obj=is_folded) or 0
    except RequestError as error:
        say(f"error: {error}\nNothing was written.", is_error=True)
        return 2
    except TritterError as error:  # its notes list files that were written
        say("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), is_error=True)
        return 1
    # System errors (a full disk, a name that is too long, no memory) are not bugs and need no
    # traceback
    except SYSTEM_ERRORS as error:
        say(f"error: {one_line(error)}", is_error=True)
        return 1
    except Stopped as stop:
        if stop.signal_number == signal.SIGPIPE:  # the reader closed the pipe, as in `| head`
            close_pipe()
            return stop.exit_code
        written = " ".join(getattr(stop, "__notes__", ())) or "Nothing was written."
        say(f"\nStopped. {written}", is_error=True)
        return stop.exit_code
    except typer.TyperException as error:
        possibilities = getattr(error, "possibilities", None)
        context, flag = getattr(error, "ctx", None), getattr(error, "option_name", None)
        command_path = context.command_path if context is not None else "tritter"
        near = f". Did you mean {possibilities[0]}?" if possibilities else ""
        advice = None if context is None else _setting_advice(context, error.message, argv)
        if flag:
            advice = flag_advice(flag, argv, command=command_path.rpartition(" ")[2])
        if advice:
            near, possibilities = f". {advice}", True
        message = error.message if possibilities else error.format_message()
        hint = f"`{command_path} --help` lists the options."
        say(f"error: {message}{near}\n{hint}", is_error=True)
        return error.exit_code


def _setting_advice(context: Any, message: str, words: Sequence[str]) -> str | None:
    """Return the option for an extra argument: a `key=value`, or a second folder, the output."""
    _, is_extra, extra = message.partition("extra argument")
    listed = re.findall(r"\((\S.*)\)", extra.removeprefix("(s)"))
    extras = listed[0].split() if is_extra and listed else []
    settings = [word for word in extras if "=" in word]
    if not settings:
        return _output_advice(extras, words) if context.info_name in ("expand", "export") else None
    key, _, value = settings[0].partition("=")
    value = value.strip("[]")  # of an ordered list
    if (hint := Hint.of(key, value, command=context.info_name)) and hint.advice.startswith("--"):
        return f"Did you mean: {hint.advice}"
    name = "--" + key.rpartition(".")[2].replace("_", "-")
    options = {each.opts[0]: each for each in context.command.get_params(context)}
    if name not in options:
        return None
    is_flag = getattr(options[name], "is_flag", False)
    return f"Did you mean: {name if is_flag else f'{name} {value}'}"


def _output_advice(extras: Sequence[str], words: Sequence[str]) -> str | None:
    """Return the option for a second folder, which other tools take as the output."""
    if len(extras) != 1 or any(word.startswith("--output") for word in words):
        return None
    before = words[max(0, words.index(extras[0]) - 2)] if extras[0] in words else ""
    if before.startswith("--"):  # a second value of an option
        return None
    return f"Did you mean: --output {shlex.quote(extras[0])}?"


def _print_version(is_requested: bool) -> None:
    if is_requested:
        say(f"tritter {__version__}")
        raise typer.Exit


@app.callback()
def _everything(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Parse the options before the command."""


for _function, _kind in _COMMANDS:
    app.command(cls=_kind)(_function)

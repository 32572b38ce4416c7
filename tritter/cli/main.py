"""The `tritter` commands and their exit codes. Each command and its options have their own module.

Nothing here imports torch, so `tritter --help` and rejected requests return immediately.
"""

import re
import shlex
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
from tritter.config.launch.command_line import check_encodable
from tritter.config.suggestions import Hint, flag_advice
from tritter.stopping import Stopped
from tritter.terminal import exit_code, say

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
    return exit_code(partial(_run, argv), describe_stop=_describe_stop)


def _run(argv: list[str]) -> int:
    check_encodable(argv)
    command = typer.main.get_command(app)
    words = argv
    if argv[0] != "train":  # train prints the help of train.py
        words = ["--help" if argument == _HELP_ALL else argument for argument in argv]
    try:
        run = partial(command.main, words, prog_name="tritter", standalone_mode=False)
        return run(obj=_HELP_ALL not in argv) or 0
    except typer.TyperException as error:
        possibilities = getattr(error, "possibilities", None)
        context, flag = getattr(error, "ctx", None), getattr(error, "option_name", None)
        command_path = context.command_path if context is not None else "tritter"
        near = f". Did you mean {possibilities[0]}?" if possibilities else ""
        advice = None if context is None else _setting_advice(context, error.message, words)
        if flag:
            advice = flag_advice(flag, words, command=command_path.rpartition(" ")[2])
        if advice:
            near, possibilities = f". {advice}", True
        message = error.message if possibilities else error.format_message()
        hint = f"`{command_path} --help` lists the options."
        say(f"error: {message}{near}\n{hint}", is_error=True)
        return error.exit_code


def _describe_stop(stop: Stopped) -> str:
    written = " ".join(getattr(stop, "__notes__", ())) or "Nothing was written."
    return f"\nStopped. {written}"


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

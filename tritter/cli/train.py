"""`tritter train`: run train.py, or continue training a checkpoint."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tritter.cli.options import AsJson, flag, option, parse_path
from tritter.cli.output import print_json
from tritter.config.launch.command_line import HELP_FLAGS, takes_value
from tritter.config.suggestions import flag_advice
from tritter.errors import Names, Problem, RequestError, TritterError, did_you_mean
from tritter.loading import loading
from tritter.stopping import Stopped
from tritter.storage.atomic import refuse_existing
from tritter.storage.reading import RUN_FILE, SUMMARY_FILE, named_path, read_text
from tritter.terminal import redirected, say

if TYPE_CHECKING:
    from tritter.config.launch.jobs import Outcome
    from tritter.config.schema import RunConfig
    from tritter.data.options import TextSources

# Keys that options set
_OPTIONS = {
    "data.old": "--old-data",
    "data.new": "--data",
    "training.max_steps": "--steps",
    "forgetting.ewc.ewc_lambda": "--ewc-lambda",
    "hydra.run.dir": "--output",
    "model.path": "--checkpoint",
}
_VALUED = ("--checkpoint", "--mode", "--steps", "--ewc-lambda", "--data", "--old-data", "--output")

_CheckpointDir = Annotated[
    str | None,
    option(
        "--checkpoint",
        "DIR",
        "The same as DIR: a folder or hub id of a supported family. Selects "
        "experiment=continued (model=hf, data=text, expansion=none).",
    ),
]
_Mode = Annotated[str | None, option("--mode", "continue", "Continue training (the only mode).")]
_Steps = Annotated[str | None, option("--steps", "N", "Training steps (training.max_steps).")]
_EwcLambda = Annotated[
    str | None,
    option(
        "--ewc-lambda",
        "L",
        "Use forgetting=ewc with this lambda; without old data, on text that the model "
        "generates. Default: forgetting=replay.",
    ),
]
_NewData = Annotated[
    list[str] | None,
    option(
        "--data", "PATH", "New data: a file, folder or glob of .txt, .jsonl and so on. Repeatable."
    ),
]
_OldData = Annotated[
    list[str] | None,
    option(
        "--old-data",
        "PATH",
        "Old data, in the same formats. Default: the data that the checkpoint recorded.",
    ),
]
_RunDir = Annotated[
    Path | None,
    option(
        "--output",
        "DIR",
        "Run folder; the result is in its checkpoint/. Default: DIR-continued, or RUN-continued "
        "for RUN/checkpoint.",
        parser=parse_path,
    ),
]
_NOT_ONE_RUN = {"-m", "--multirun", "-c", "--cfg", "-i", "--info", "--version"}
_FindLr = Annotated[
    bool,
    flag(
        "--find-lr",
        "Instead of the run, train 100 steps at rising learning rates; write a plot and the rates.",
    ),
]


class TrainCommand(TyperCommand):
    """A command that passes unknown arguments and --help to train.py."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        super().__init__(*args, **{**kwargs, "add_help_option": False})
        self.context_settings = {**self.context_settings, **settings}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not HELP_FLAGS & set(args):
            return super().parse_args(ctx, args)
        # Help needs no values; parsing them would import pydantic
        _, ctx.args, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.params = {each.name: None for each in self.params}
        return list(ctx.args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the completions of an incomplete argument.

        Bash splits arguments at each = and each colon. Completions are returned without the part
        before the split.
        """
        from typer._click.shell_completion import CompletionItem

        from tritter.config.launch.entry import completions

        arguments = list(ctx.args)
        if not incomplete and os.environ.get("COMP_WORDS", "").endswith("\n="):
            arguments.append("=")  # Typer drops it
        whole: list[str] = []
        for before, argument in pairwise(["", *arguments, incomplete]):
            is_part = bool(whole) and not {argument, before}.isdisjoint({"=", ":"})
            whole = [*whole[:-1], whole[-1] + argument] if is_part else [*whole, argument]
        *earlier, last = whole
        found = completions([*earlier, last])
        if len(found) == 1 and found[0][-1] in "=.":  # otherwise the shell appends a blank
            found = completions([*earlier, *found]) or found
        found += _VALUED if last.startswith("-") else ()
        start = last.removesuffix(incomplete)
        return [CompletionItem(one.removeprefix(start)) for one in found if one.startswith(last)]


def train(
    context: typer.Context,
    checkpoint: _CheckpointDir = None,
    mode: _Mode = None,
    steps: _Steps = None,
    ewc_lambda: _EwcLambda = None,
    data: _NewData = None,
    old_data: _OldData = None,
    output: _RunDir = None,
    find_lr: _FindLr = False,
    as_json: AsJson = False,
) -> int:
    """Grow and train a model, or continue training a checkpoint (same as train.py)."""
    from tritter.config.launch.entry import main

    plain, arguments = _split_arguments(context.args)
    if HELP_FLAGS & set(arguments):
        _print_options(context)
        return main(_pipeline, arguments=arguments)
    begin: Callable[..., int] = _run_json if as_json else partial(main, _pipeline)
    needless = {"as_json"}  # options that need no checkpoint
    if find_lr:
        begin, needless = partial(_find_rate, output, as_json), {"as_json", "find_lr", "output"}
    typed = [each for each, value in context.params.items() if value and each not in needless]
    if not (typed or plain) or "--version" in arguments:
        return begin(arguments=arguments)
    from tritter.config.overrides import nested_value

    checkpoint = _named_checkpoint(plain, checkpoint, typed)
    _check_flags(arguments)
    if mode not in (None, "continue"):
        raise RequestError(f"--mode = {mode}: must be continue.")
    if output is None and not find_lr:
        # DIR-continued next to a folder; of a hub id, in the current one
        folder = named_path(checkpoint, key="--checkpoint")
        near = folder.resolve() if folder.is_dir() else Path(folder.name)
        if near.name == "checkpoint" and (near.parent / RUN_FILE).is_file():
            near = near.parent  # not inside another run
        output = near.parent / f"{near.name}-continued"
    settings: dict[str, str | None] = {
        "training.max_steps": steps,
        "hydra.run.dir": None if find_lr else nested_value(str(output)),
    }
    if ewc_lambda is not None:
        settings |= {"forgetting": "ewc", "forgetting.ewc.ewc_lambda": ewc_lambda}
        typed_keys = _typed_keys(context.args)
        is_typed = any(_is_typed(key, typed_keys) for key in ("data.old", "forgetting"))
        if not (is_typed or old_data or _has_old_knowledge(checkpoint)):
            settings |= {
                "forgetting": "[ewc,self_replay]",
                "forgetting.self_replay.fraction": "0",  # the text only estimates importances
            }
    arguments = continuation(
        checkpoint, data=data or (), old_data=old_data or (), settings=settings, arguments=arguments
    )
    keys = _typed_keys(context.args)
    with Names.of({k: o for k, o in _OPTIONS.items() if not _is_typed(k, keys)}).in_use():
        return begin(arguments=arguments)


def _print_options(context: typer.Context) -> None:
    """Print the usage of `tritter train` and its options; the page of train.py follows."""
    say("Usage: tritter train [DIR] [OPTIONS] [GROUP=OPTION ...] [KEY=VALUE ...]\n")
    say("Continue training the checkpoint in DIR. Without DIR, the same program as train.py.\n")
    say("Options")
    for each in context.command.params:
        label = f"  {each.opts[0]} {each.metavar or ''}"
        described: str = each.help  # type: ignore[attr-defined]
        say(textwrap.fill(described, 99, initial_indent=f"{label:<21}", subsequent_indent=" " * 21))
    say("")


def continuation(
    checkpoint: str,
    *,
    data: Sequence[str] = (),
    old_data: Sequence[str] = (),
    settings: Mapping[str, str | None],
    arguments: Sequence[str] = (),
) -> list[str]:
    """Return the arguments of train.py that continue training a checkpoint.

    Args:
        checkpoint: a folder or hub id.
        data: paths of new data.
        old_data: paths of old data; empty for the data that the checkpoint recorded.
        settings: key → value of other options; None if not typed.
        arguments: flags, GROUP=OPTION and KEY=VALUE arguments, which take precedence.
    """
    from tritter.checkpoints.location import checkpoint_location
    from tritter.config.overrides import nested_value

    folder = checkpoint_location(checkpoint, key="--checkpoint")
    keys = _typed_keys(arguments)
    if not data and not any(_is_typed(key, keys) for key in ("data.new", "data.tasks")):
        raise RequestError("--data is missing: name the training data, --data PATH.")
    new, old, is_of_hub = _sources(data, old_data, arguments)
    recorded = _recorded_settings(Path(folder), is_text=not is_of_hub)
    seed = recorded.get("seed")
    for argument in arguments:  # another seed than the split's would train on validation data
        key, _, value = argument.lstrip("+").partition("=")
        if key == "seed" and seed is not None and value.isdecimal() and int(value) != seed:
            raise RequestError(
                f"seed = {value}: the checkpoint's data was split with seed {seed}; another seed "
                "would train on its validation data. Remove seed. To shuffle differently with the "
                "same split, use train.py model=hf."
            )
    groups = {"experiment": "continued"}
    if "experiment" in keys:  # there is one at a time
        groups = {"model": "hf", "data": "text", "expansion": "none"}
    defaults = {
        **groups,
        **({"data": "hf"} if is_of_hub else {}),
        "model.path": nested_value(folder),
        **recorded,
        "data.new": nested_value(new) if new else None,
        "data.old": nested_value(old) if old else None,
        **settings,
    }
    stated = (f"{k}={v}" for k, v in defaults.items() if v is not None and not _is_typed(k, keys))
    return [*stated, *arguments]


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into positional ones, which are checkpoints, and all others."""
    plain: list[str] = []
    others: list[str] = []
    for before, argument in pairwise(["", *arguments]):
        is_plain = argument[:1] not in ("", "-", "~") and "=" not in argument
        is_after_flag = before[:1] == "-" and "=" not in before
        is_value = is_after_flag and takes_value(before, argument)  # possibly of an unknown flag
        (plain if is_plain and not is_value else others).append(argument)
    return plain, others


def _named_checkpoint(plain: Sequence[str], checkpoint: str | None, typed: Sequence[str]) -> str:
    """Return the requested checkpoint."""
    if len(plain) > 1:
        raise RequestError(
            f"{' and '.join(plain)}: tritter train takes one checkpoint; settings have the form "
            "KEY=VALUE (--help)."
        )
    if plain and checkpoint is not None:
        raise RequestError(
            f"{plain[0]} together with --checkpoint: use the argument (`tritter train DIR`) or the "
            "option, not both."
        )
    if plain or checkpoint is not None:
        return plain[0] if plain else str(checkpoint)
    raise RequestError(
        f"--{typed[0].replace('_', '-')} requires a checkpoint to train, `tritter train DIR`; "
        "without a checkpoint, settings have the form KEY=VALUE (--help)."
    )


def _check_flags(arguments: Sequence[str]) -> None:
    """Reject `resume` and flags that can't be combined with a checkpoint."""
    for argument in arguments:
        if argument.lstrip("+").startswith("resume="):
            raise RequestError(
                f"{argument}: a resumed run uses its own checkpoint and data. Resume it with "
                f"{shlex.join(['tritter', 'train', argument])}"
            )
        name = argument.partition("=")[0].replace("_", "-")
        if argument[:1] != "-" or name in ("-cd", "--config-dir", "-cn", "--config-name"):
            continue
        near = did_you_mean(argument.partition("=")[0], _VALUED)
        if (advice := flag_advice(argument, arguments, command="train")) is not None:
            near = f" {advice}"
        raise RequestError(
            f"{argument}: tritter train --checkpoint has no such option.{near} (see --help)"
        )


def _sources(
    data: Sequence[str], old_data: Sequence[str], arguments: Sequence[str]
) -> tuple[TextSources, TextSources, bool]:
    """Return domain → paths of new and of old data, and True if they are hub datasets."""
    from tritter.data.datasets import DatasetName
    from tritter.data.options import DatasetsConfig, TextDataConfig, read_sources
    from tritter.errors import raise_problems

    is_of_hub = bool(DatasetName.names_in((*data, *old_data))) or "data=hf" in arguments
    resolve = (DatasetsConfig if is_of_hub else TextDataConfig).path_resolver({})
    problems: list[Problem] = []
    new, old = (
        read_sources(
            option, list(paths) or None, default_name=name, problems=problems, resolve=resolve
        )
        for option, paths, name in (("--data", data, "new"), ("--old-data", old_data, "old"))
    )
    raise_problems(problems)
    return new, old, is_of_hub


def _recorded_settings(folder: Path, *, is_text: bool) -> dict[str, Any]:
    """Return key → value of settings that continued training reuses from the lineage."""
    from tritter.checkpoints import Lineage
    from tritter.config.overrides import nested_value

    try:
        lineage = Lineage.read(folder)
    except TritterError as error:
        raise RequestError(f"--checkpoint: {error}") from error
    if lineage is None:
        return {}
    settings: dict[str, Any] = {}
    if lineage.split is not None:
        settings["seed"] = lineage.split.seed
    data = lineage.training_config.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("sequence_length"), int):
        settings["data.sequence_length"] = data["sequence_length"]
        if data.get("packing") == "documents":
            settings["data.packing"] = "documents"
    fields = {domain.text_field for domain in lineage.domains.values()}
    if len(fields) == 1 and is_text:
        settings["data.text_field"] = nested_value(fields.pop())
    return settings


def _has_old_knowledge(checkpoint: str) -> bool:
    """Return True if a checkpoint records its data, or contains sequences or importances of it."""
    from tritter.checkpoints import Lineage
    from tritter.checkpoints.location import checkpoint_location
    from tritter.checkpoints.record import StateHead
    from tritter.checkpoints.state import KeptSequences

    folder = Path(checkpoint_location(checkpoint, key="--checkpoint"))
    if not folder.is_dir():
        return False
    with suppress(TritterError):  # the run reports damaged records
        lineage = Lineage.read(folder)
        is_recorded = lineage is not None and bool(lineage.domains)
        kept = is_recorded or KeptSequences.read(folder).sequences
        return bool(kept) or "fisher" in StateHead.kinds_in(folder)
    return True


def _typed_keys(arguments: Sequence[str]) -> set[str]:
    return {
        argument.partition("=")[0].lstrip("+").replace("-", "_")
        for argument in arguments
        if "=" in argument
    }


def _is_typed(key: str, keys: set[str]) -> bool:
    """Return True if a key or one of its subkeys was typed; for a group only its name counts."""
    return key in keys or ("." in key and any(each.startswith(f"{key}.") for each in keys))


def _pipeline(config: RunConfig, *, run_folder: Path) -> Outcome:
    """Run the stages. The import is here so that help and errors don't wait for Lightning."""
    with loading("lightning"):
        from tritter.pipeline import run_pipeline

    return run_pipeline(config, run_folder=run_folder)


def _run_json(*, arguments: Sequence[str]) -> int:
    """Run a single run and print its summary.json; everything else goes to standard error."""
    from tritter.config.launch.entry import run_once
    from tritter.config.run_folder import RunStatus

    if wrong := sorted(_NOT_ONE_RUN & {each.partition("=")[0] for each in arguments}):
        text = f"--json prints the summary of one run: it can't be combined with {wrong[0]}."
        raise RequestError(text)
    try:
        with redirected(1, sys.stderr):
            folder = run_once(arguments, _pipeline)
    except Stopped as stop:
        for run_folder in stop.advice:
            stop.add_note(f"Resume with: tritter train resume={run_folder} --json")
        raise
    say(read_text(folder / SUMMARY_FILE).rstrip())
    return RunStatus.read(folder).exit_code


def _find_rate(output: Path | None, as_json: bool, *, arguments: Sequence[str]) -> int:
    """Run the range test of a run that is not started."""
    from tritter.config.launch.entry import config_of_run

    config = config_of_run(arguments)
    folder = output or Path("outputs/find_lr", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
    refuse_existing(folder, overwrite=False)
    with loading("lightning"):
        from tritter.pipeline.find_rate import find_rate

    with redirected(1, sys.stderr) if as_json else nullcontext():
        found = find_rate(config, folder=folder)
    if as_json:
        print_json(asdict(found))
    return 0

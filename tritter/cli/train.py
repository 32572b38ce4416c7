"""`tritter train`: the program behind train.py, and the training of a checkpoint that exists."""

import argparse
import os
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tritter.config.launch.flags import flag_of
from tritter.config.suggestions import flag_advice
from tritter.errors import RequestError, did_you_mean
from tritter.loading import loading
from tritter.storage.reading import named_path
from tritter.terminal import say

if TYPE_CHECKING:
    from tritter.cli.continued import TrainRequest
    from tritter.config.folders import Front
    from tritter.config.launch.jobs import Outcome
    from tritter.config.schema import RunConfig

HELP = """
Training a checkpoint
  tritter train DIR [--mode continue] [--steps N]
                [--ewc-lambda L] [--data PATH] [--old-data PATH]
                [--output DIR] [--config-dir DIR]
                [GROUP=OPTION ...] [KEY=VALUE ...]

  DIR                a folder or hub id of a known family, ours or not:
                     model=hf, expansion=none; also as --checkpoint DIR
  --mode continue    train on; the only mode
  --steps N          training.max_steps
  --ewc-lambda L     forgetting=ewc with this lambda (without it:
                     forgetting=replay)
  --data PATH        new text: file, folder or glob of .txt, .jsonl and the
                     like; may be repeated
  --old-data PATH    old text, in the same forms; by default all that the
                     checkpoint learned
  --output DIR       folder of the run, with the result in DIR/checkpoint;
                     default: DIR-continued
  --config-dir DIR   options of yours (docs/extending.md)"""

_VALUED = ("checkpoint", "mode", "steps", "ewc-lambda", "data", "old-data", "output")


def run_train(words: Sequence[str]) -> int:
    """Run a command line of `tritter train` and return the exit code.

    Raises:
        RequestError: the options that go with `--checkpoint` are wrong.
    """
    from tritter.config.folders import composing_from
    from tritter.config.launch.entry import main

    words = _with_checkpoint(words)
    given = {_option(word) for word in words}
    if {"-h", "--help"} & set(words):
        asked = _parsed(words)
        outside = [*_front(asked).flags, *asked.overrides]
        code = main(_pipeline, arguments=[*outside, "--help"])
        say(HELP)
        return code
    if "--version" in words or not given & set(_VALUED):
        return main(_pipeline, arguments=words)
    if "checkpoint" not in given:
        named = next(word for word in words if _option(word) in _VALUED)
        raise RequestError(
            f"{named.partition('=')[0]} goes with the checkpoint to train, `tritter train DIR`; "
            "without a checkpoint everything is set by KEY=VALUE (--help)."
        )
    resumed = next((w for w in words if w.lstrip("+").startswith("resume=")), None)
    if resumed is not None:
        raise RequestError(
            f"{resumed}: a run is gone on with by itself, with its own checkpoint and text: "
            f"{shlex.join(['tritter', 'train', resumed])}"
        )
    from tritter.cli.continued import continuation

    asked = _parsed(words)
    with composing_from(_front(asked)):
        continued = continuation(_request(asked))
    return main(_pipeline, arguments=[*_front(asked).flags, *continued])


def _with_checkpoint(words: Sequence[str]) -> list[str]:
    """Return the words, in which a plain one, the checkpoint, follows its option.

    Raises:
        RequestError: there are several, or the option as well.
    """
    plain = [
        number
        for number, (before, word) in enumerate(pairwise(["", *words]))
        if word[:1] not in ("", "-", "~") and "=" not in word and not _is_value(before, word)
    ]
    if not plain:
        return list(words)
    named = [words[number] for number in plain]
    if len(plain) > 1:
        raise RequestError(
            f"{' and '.join(named)}: tritter train takes one checkpoint; settings are written "
            "KEY=VALUE (--help)."
        )
    if any(_option(word) == "checkpoint" for word in words):
        raise RequestError(
            f"{named[0]} together with --checkpoint: use a plain word (`tritter train DIR`) or the "
            "option, not both."
        )
    return [*words[: plain[0]], f"--checkpoint={named[0]}", *words[plain[0] + 1 :]]


def _is_value(before: str, word: str) -> bool:
    """Return whether a word is the value of the flag before it, or may be: of an unknown one."""
    if before[:1] != "-" or "=" in before:
        return False
    if (flag := flag_of(before)) is None:
        return True
    # The value of --info may be missing
    is_optional = flag.value.startswith("[")
    return word in flag.choices if is_optional else bool(flag.value or flag.choices)


def train_completions(words: Sequence[str], begun: str) -> list[str]:
    """Return what a shell may put in the place of the word that is begun.

    Args:
        words: those before it, of which bash makes several at each = and each colon.
        begun: the last of them; what it begins with is not returned with it.
    """
    from tritter.config.launch.completion import completions

    if not begun and os.environ.get("COMP_WORDS", "").endswith("\n="):
        words = [*words, "="]  # which Typer leaves out
    whole: list[str] = []
    for before, word in pairwise(["", *words, begun]):
        is_part = bool(whole) and not {word, before}.isdisjoint({"=", ":"})
        whole = [*whole[:-1], whole[-1] + word] if is_part else [*whole, word]
    *earlier, last = whole
    if earlier and _option(earlier[-1]) in _VALUED:
        return []
    kept = [word for before, word in pairwise(["", *earlier]) if not _is_of_training(before, word)]
    found = completions([*kept, last])
    if len(found) == 1 and found[0][-1] in "=.":  # else the shell puts a blank behind it
        found = completions([*kept, *found]) or found
    found += [f"--{name}" for name in _VALUED if last.startswith("-")]
    start = last.removesuffix(begun)
    return [one.removeprefix(start) for one in found if one.startswith(last)]


def _is_of_training(before: str, word: str) -> bool:
    """Say whether a word is an option that goes with --checkpoint, or the value of one."""
    return _option(word) in _VALUED or (_option(before) in _VALUED and "=" not in before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see tritter train --help).")


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    from tritter.config.launch.command_line import split_searchpath

    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cd", "--config-dir", action="append", default=[])
    parser.add_argument("-cn", "--config-name")
    for name in _VALUED:
        is_list = name in ("data", "old-data")
        parser.add_argument(f"--{name}", action="append" if is_list else "store")
    parser.add_argument("overrides", nargs="*")
    known, unknown = parser.parse_known_intermixed_args([_dashed(word) for word in words])
    if unknown:
        near = did_you_mean(unknown[0].partition("=")[0], [f"--{name}" for name in _VALUED])
        if (advice := flag_advice(unknown[0], words, command="train")) is not None:
            near = f" {advice}"
        raise RequestError(
            f"{unknown[0]}: tritter train --checkpoint has no such option.{near} (see --help)"
        )
    if known.mode not in (None, "continue"):
        raise RequestError(f"--mode = {known.mode}: allowed is continue.")
    known.searchpath, known.overrides = split_searchpath(known.overrides)
    return known


def _front(known: argparse.Namespace) -> "Front":
    """Return where options of the user's own are.

    Raises:
        RequestError: a folder does not exist, or none has the file of `--config-name`.
    """
    from tritter.config.folders import front_of

    return front_of(known.config_dir, known.config_name, searchpath=known.searchpath)


def _request(known: argparse.Namespace) -> "TrainRequest":
    from tritter.cli.continued import TrainRequest

    return TrainRequest(
        checkpoint=known.checkpoint,
        steps=known.steps,
        ewc_lambda=known.ewc_lambda,
        data=tuple(known.data or ()),
        old_data=tuple(known.old_data or ()),
        output=None if known.output is None else named_path(known.output, key="--output"),
        overrides=tuple(known.overrides),
    )


def _option(word: str) -> str:
    """Return the name of an option, in dashes; of any other word, nothing."""
    return _dashed(word).partition("=")[0][2:] if word.startswith("--") else ""


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _pipeline(config: "RunConfig", *, run_folder: Path) -> "Outcome":
    """Run the stages; imported here so that help and refusals don't wait for Lightning."""
    with loading("lightning"):
        from tritter.pipeline import run_pipeline

    return run_pipeline(config, run_folder=run_folder)

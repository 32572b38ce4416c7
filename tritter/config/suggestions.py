"""Nearest matches for unknown keys, and replacements for options of other tools."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from tritter.errors import is_short_for, show
from tritter.limits import NO_EPOCHS

_OPTIONAL_GROUPS = ("experts", "growth")  # offered last: most runs do not use them
_PRESET = re.compile(r"tiny|small|tritter_\w+")
_MODEL = (
    r"--(model|model[-_]path|model[-_]name[-_]or[-_]path|base[-_]model|ckpt|from[-_]pretrained)"
)


def _is_path_or_hub_id(value: str) -> bool:
    """Return whether a value looks like a folder or a Hub id."""
    return "/" in value or value in (".", "..") or Path(value).is_dir()


@dataclass(frozen=True, slots=True)
class Hint:
    """Advice for users who type the option of another tool.

    Args:
        typed: pattern of a key, a group or an option with its dashes, matched as a whole.
        advice: replacement to type. A word in capitals is replaced by the typed value, `{NAME}` by
            a named group of the pattern.
        reason: why the typed word is wrong. Default: the caller's message.
        command: the subcommand of `tritter` that it applies to; default: all.
        applies_to: predicate on the typed value; the advice applies if it returns True.
    """

    typed: str
    advice: str = ""
    reason: str = ""
    command: str = ""
    applies_to: Callable[[str], bool] = lambda value: True

    @classmethod
    def of(cls, typed: str, value: object = None, *, command: str = "train") -> "Hint | None":
        """Return the advice for a typed word, with the value filled in; None if there is none.

        Args:
            typed: a key, a group or an option with its dashes.
            value: the value typed after it; None for no value.
            command: the subcommand that rejects it.
        """
        text = "" if value is None else show(value)
        for hint in _HINTS:
            found = re.fullmatch(hint.typed, typed)
            if found is None or hint.command not in ("", command) or not hint.applies_to(text):
                continue
            advice = hint.advice.format(**found.groupdict())
            if text:
                advice = re.sub(r"\b[A-Z]+\b", lambda _: text, advice)
            return replace(hint, advice=advice)
        return None


def _is_file(value: str) -> bool:
    """Return whether a value looks like a data file or folder."""
    return "." in value or "/" in value or Path(value).exists()


def _is_no_preset(value: str) -> bool:
    """Return whether a value is a folder, a Hub id or another model's name, not a misspelling."""
    return _is_path_or_hub_id(value) or not get_close_matches(value, ("tiny", "small", "tritter"))


# The first match wins
_HINTS = (
    Hint("--model", "model=NAME", command="train", applies_to=lambda v: bool(_PRESET.fullmatch(v))),
    Hint(
        f"{_MODEL}|--checkpoint",
        "tritter train --checkpoint DIR, or model=hf model.path=DIR",
        command="train",
    ),
    Hint(_MODEL, "--checkpoint DIR"),
    Hint("--(find[-_]lr|lr[-_]find|auto[-_]lr[-_]find)", "tritter train --find-lr"),
    Hint("--(num[-_](train[-_])?)?epochs", reason=NO_EPOCHS),
    Hint(r"(--)?(lr|learning[-_]rate|peak[-_]lr)", "training.learning_rate=X", command="train"),
    Hint(r"(--)?(max[-_])?(train[-_])?steps", "training.max_steps=N", command="train"),
    Hint(
        r"(--)?(per[-_]device[-_](train[-_])?)?batch[-_]size", "data.batch_size=N", command="train"
    ),
    Hint(
        r"(--)?(max[-_])?(seq(uence)?[-_]len(gth)?|block[-_]size|cutoff[-_]len)",
        "data.sequence_length=N",
        command="train",
    ),
    Hint(r"(--)?weight[-_]decay", "optimizer.weight_decay=X", command="train"),
    Hint(
        r"(--)?((train[-_]?|data[-_])?(dataset|files?)|data[-_]path|data\.(path|train|files?|dataset))",
        "data=text data.new=PATH",
        command="train",
    ),
    Hint("(--)?data", "data=text data.new=PATH", command="train", applies_to=_is_file),
    Hint("(--)?(method|expand)", "expansion=METHOD", command="train"),
    Hint("--(lr|learning[-_]rate)", "--learning-rate X", command="expand"),
    Hint("--(data|dataset)", "--domain-data PATH", command="expand"),
    Hint(
        r"(--)?((run|save)[-_](dir|folder)|out(put)?([-_](dir|folder))?)|run\.(dir|directory|folder)",
        "hydra.run.dir=DIR",
        command="train",
    ),
    Hint("--(out|output[-_]dir)", "--output DST"),
    Hint(
        r"(--)?(grad(ient)?[-_]accum(ulation)?([-_]steps)?|accumulate[-_]grad[-_]batches)",
        "trainer.accumulate_grad_batches=N",
        command="train",
    ),
    Hint("(--)?bf16", "trainer.precision=bf16-mixed", command="train"),
    Hint("(--)?fp16", "trainer.precision=16-mixed", command="train"),
    Hint(
        "(--)?(device|accelerator)", "trainer=cpu", command="train", applies_to=lambda v: v == "cpu"
    ),
    Hint("(--)?(device|accelerator|gpu|cuda)", "trainer=gpu", command="train"),
    Hint(r"(--)?(lora([-_](r|rank))?|peft)", "experts=dylora", command="train"),
    Hint("(--)?wandb", "logger=wandb", command="train"),
    Hint("--no[-_]gate", "gate=off", command="train"),
    Hint("--resume", "resume=latest", command="train", applies_to=lambda v: not v),
    Hint(
        r"(num_)?(hidden_)?layers",
        "expansion=llama_pro expansion.llama_pro.target_layers=N",
        command="train",
    ),
    Hint("hidden_size", "expansion=width expansion.width.hidden_size=N", command="train"),
    Hint("--(num[-_])?gpus", "trainer=gpu trainer.devices=N", command="train"),
    Hint(
        "--(?P<key>data|expansion|forgetting|growth|experts|moe_routing|adaptation|pretraining"
        "|training|optimizer|trainer|gate|pipeline|evaluation|metrics|stages|callbacks|logger|experiment"
        r"|seed|resume|[a-z_]+(\.[a-z_-]+)+)",
        "{key}=VALUE",
        command="train",
    ),
    Hint("(--)?(expand|expansion)", "--method METHOD", command="expand"),
    Hint("model", "model=hf model.path=DIR", applies_to=_is_no_preset),
    Hint(r"model\.(path|name|id|checkpoint|(model_)?name_or_path)", "model=hf model.path=DIR"),
    Hint(
        r"(?P<key>data\.(new|old|tasks))",
        "data=hf {key}=SOURCE",
        applies_to=lambda value: "hf:" in value,
    ),
    Hint(r"(?P<key>data\.(new|old|tasks))", "data=text {key}=SOURCE"),
    Hint(
        r"((training|pretraining|trainer)\.)?((num_(train_)?)?epochs|(max|min)_epochs)",
        reason=NO_EPOCHS,
    ),
    Hint(r"gate\.(threshold|tolerance|max_forgetting|max_loss_increase)", "gate.retention"),
    Hint(r"(trainer\.)?(num_)?gpus", "trainer=gpu trainer.devices=N"),
)


def nearest_key(key: str, known: Collection[str], *, first: Collection[str] = ()) -> str | None:
    """Return the known dotted key that is closest to `key`, or None.

    In order of preference: the same last part (`learning_rate` → `training.learning_rate`), a
    similar name in the same section, a name that it abbreviates (`lr`), a similar name in another
    section (`trainer.max_stepz` → `training.max_steps`), and a similar key anywhere.
    Keys in `first` come first, then those in the section of `key`, then all others.
    """
    section, _, leaf = key.rpartition(".")
    by_length = sorted(known, key=lambda k: (_is_in_optional_group(k), len(k), k))
    inside = [other for other in by_length if section and other.startswith(f"{section}.")]
    leaves = {other: other.rpartition(".")[2] for other in by_length}
    ordered = ([other for other in by_length if other in first], inside, by_length)
    for candidates in ordered:
        same_leaf = [other for other in candidates if leaves[other] == leaf]
        usual = [other for other in same_leaf if not _is_in_optional_group(other)]
        if same_leaf := usual or same_leaf:
            return (get_close_matches(key, same_leaf, n=1, cutoff=0.0) or same_leaf)[0]
    siblings = {leaves[o]: o for o in by_length if o.rpartition(".")[0] == section}
    matches = get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if matches:
        return siblings[matches[0]]
    for candidates in ordered:
        longer = [other for other in candidates if is_short_for(leaf, leaves[other])]
        if longer:
            return longer[0]
    # In another section; the shortest key wins
    names = {leaves[other]: other for other in reversed(by_length)}
    if matches := get_close_matches(leaf, names, n=1, cutoff=0.8):
        return names[matches[0]]
    matches = get_close_matches(key, by_length, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _is_in_optional_group(key: str) -> bool:
    return key.partition(".")[0] in _OPTIONAL_GROUPS


def flag_advice(flag: str, arguments: Sequence[str], *, command: str) -> str | None:
    """Return a sentence with the replacement for an unknown option, or None.

    Args:
        flag: the option as typed, `--expansion` or `--expansion=dus`.
        arguments: the whole command line; the value of the option may be the next argument.
    """
    name = flag.partition("=")[0]
    values = [word[len(name) + 1 :] for word in arguments if word.startswith(f"{name}=")]
    values += [after for word, after in pairwise(arguments) if word == name and after[:1] != "-"]
    if (hint := Hint.of(name.lower(), next(iter(values), None), command=command)) is None:
        return None
    if not hint.advice:
        return f"{hint.reason[:1].upper()}{hint.reason[1:]}."
    return "Did you mean" + (f": {hint.advice}" if " " in hint.advice else f" {hint.advice}?")

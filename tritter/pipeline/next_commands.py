"""The commands that a run suggests at its end; they suit the verdict."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil, sqrt
from pathlib import Path

from tritter.checkpoints.run_text import RunText
from tritter.config.launch.composition import SweepInConfig, load_config
from tritter.config.overrides import command, tool_command
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.core.expansions import EXPANSIONS, vocab_place
from tritter.data.chat import TEMPLATE_FILE
from tritter.errors import TritterError
from tritter.report.summary import Summary
from tritter.report.table import ACCURACY
from tritter.training.forgetting_method import replayed_share

_WITH_BODY = ("expansion", "experts")
_MAX_FRACTION = 0.5  # of replayed or validation data; more would starve the rest
_Advice = Iterator[tuple[dict[str, str], str]]


def next_commands(
    config: RunConfig, summary: Summary, *, overrides: Sequence[str], folder: Path, rate: float
) -> list[str]:
    """Return valid commands that suit the verdict, each with a comment.

    Args:
        overrides: overrides of the run, in Hydra's syntax.
        folder: run folder.
        rate: peak learning rate of the run.
    """
    if summary.status == "rolled_back":
        changes = _after_rollback(config, summary, rate=rate)
    else:
        is_open = summary.status == "undecided"
        changes = (_after_undecided if is_open else _after_kept)(config, summary)
    typed = [each for each in overrides if each.partition("=")[0].lstrip("+") != "resume"]
    lines = []
    for change, why in changes:
        # Options of a replaced method are removed with it
        bodies = tuple(f"{key}." for key in change if key in _WITH_BODY)
        kept = [
            override
            for override in typed
            if override.lstrip("+~").partition("=")[0] not in change
            and not override.lstrip("+~").startswith(bodies)
        ]
        changed = [*kept, *(f"{key}={value}" for key, value in change.items())]
        with suppress(TritterError, OSError, SweepInConfig):  # other settings exclude it
            load_config(changed)
            lines.append(f"{command(changed)}   # {why}")
    checkpoint = str(folder / "checkpoint")
    trained = folder / f"attempt_{len(summary.attempts)}" / "trained"
    if summary.status != "rolled_back":
        chat = ["--chat"] if Path(checkpoint, TEMPLATE_FILE).is_file() else []
        asking = ["generate", "--checkpoint", checkpoint, *chat, "--prompt", "TEXT"]
        lines.append(tool_command("tritter", asking))
    elif any(trained.glob("*.safetensors")):
        inspection = tool_command("tritter", ["inspect", str(trained)])
        lines.append(f"{inspection}   # the trained model, which was not kept")
    lines.append(tool_command("tritter", ["history", checkpoint, "--verify"]))
    if (wandb := config.wandb) is not None and wandb.mode == "offline":
        runs = tool_command("wandb", ["sync", str(folder / "wandb")])
        lines.append(f"{runs}/offline-run-*   # upload to W&B")  # unquoted: the shell expands it
    return lines


def _after_kept(config: RunConfig, summary: Summary) -> _Advice:
    if not config.control and config.expansion:
        yield {"control": "true"}, "compare with the control (not grown)"
    if not isinstance(config.model, CheckpointModelConfig):
        yield {"seed": str(config.seed + 1)}, "check with another seed"
    is_dynamic = config.experts is not None and config.experts.kind.is_dynamic
    if is_dynamic and not isinstance(config.model, CheckpointModelConfig):
        yield {"experts": "single_lora"}, "compare with a single adapter"
    elif not isinstance(config.model, CheckpointModelConfig) and config.experts is None:
        used = {"layers", "moe_add"}  # they need a table, or a model with experts
        used |= {spec.name for spec in config.expansion}
        other = next(name for name in [*EXPANSIONS, "none"] if name not in used)
        yield {"expansion": other}, "another expansion"


def _after_rollback(config: RunConfig, summary: Summary, *, rate: float) -> _Advice:
    failed = {check.check for check in summary.gate if check.verdict == "failed"}
    names = [options.name for options in config.forgetting]
    replayed = "replay" if summary.domains.old else "self_replay"  # a benchmark was forgotten
    if failed & {"retention", "long_windows"}:
        mixing = [one for one in config.forgetting if one.kind.needs(one.options).mixes]
        room = _MAX_FRACTION - float(replayed_share(mixing))
        if not mixing:
            yield {"forgetting": _override_value([*names, replayed])}, "mix in replay data"
        elif room > 0:
            replay = max(mixing, key=lambda one: one.kind.needs(one.options).old_text)  # real data
            fraction = getattr(replay.options, "fraction", 0.0)
            more = f"{fraction + min(room, fraction):g}"
            yield {f"forgetting.{replay.name}.fraction": more}, "mix in more replay data"
        # Best combination with replay: experiments/2026-11-21_forgetting_methods
        has_tokens = vocab_place(config.expansion) is not None  # which no teacher knows
        if "distill" not in names and config.experts is None and not has_tokens:
            methods = ["distill", *names] if names else ["distill", replayed]
            yield {"forgetting": _override_value(methods)}, "also distill from the old model"
    if "new_capability" in failed:
        yield _twice_as_long(config), "more steps"
    if failed & {"retention", "long_windows", "training"}:
        group = "training" if config.experts is None else "experts"
        yield {f"{group}.learning_rate": f"{rate / 2:g}"}, "lower learning rate"


def _twice_as_long(config: RunConfig) -> dict[str, str]:
    """Return the override that doubles the length of training."""
    training = config.training
    key = "max_steps" if training.max_tokens is None else "max_tokens"
    return {f"training.{key}": str(2 * getattr(training, key))}


def _after_undecided(config: RunConfig, summary: Summary) -> _Advice:
    undecided = [check for check in summary.gate if check.verdict == "undecided"]
    for check in undecided:
        upper = check.bounds[1]
        # If the whole interval is below the bound, only documents are missing
        is_below = upper is not None and check.bound is not None and upper < check.bound
        if check.check == "new_capability" and not is_below:
            yield _twice_as_long(config), "more steps"
            break
    needs = [
        (check.documents_needed / check.n, check)
        for check in undecided
        if check.documents_needed and check.n and not check.subject.endswith(ACCURACY)
    ]
    if not needs:
        return
    factor, check = max(needs, key=lambda need: need[0])
    fraction = factor * (config.data.validation_fraction or RunText.DEFAULT_FRACTION)
    advice = f"{check.documents_needed} validation documents of {check.subject} are needed"
    held_out = summary.data.get(check.subject, {}).get("validation", 0)
    if factor > 1 and check.n < held_out:
        needed = check.documents_needed or held_out
        advice += f"; there are {held_out}" if held_out < needed else ""
        yield {"evaluation.max_documents": str(min(needed, held_out))}, advice
    elif isinstance(config.model, CheckpointModelConfig):
        return  # it keeps the split of its lineage
    elif factor > 1 and fraction <= _MAX_FRACTION:
        # Which documents are held out is random: two standard deviations more
        fraction *= 1 + 2 / sqrt(check.documents_needed or 1)
        fraction = min(ceil(100 * fraction) / 100, _MAX_FRACTION)
        yield {"data.validation_fraction": f"{fraction:.2f}"}, advice


def _override_value(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"

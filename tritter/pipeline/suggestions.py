"""What to do next, by how a run ended: commands to paste, which keep what was typed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritter.config.program import command, tool_command, tritter_command
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.config.text_resolution import DEFAULT_FRACTION
from tritter.expansion import EXPANSIONS

_WITH_BODY = ("expansion", "experts")
_REPLAYING = ("replay", "self_replay")
_LARGEST_FRACTION = 0.5  # of replayed or of validation text: beyond it the other half suffers


def next_commands(
    config: RunConfig, summary: Mapping[str, Any], *, words: Sequence[str], folder: Path
) -> list[str]:
    """Return commands that suit the verdict, each with a comment why.

    Args:
        summary: the contents of summary.json.
        words: the overrides that were typed, as Hydra reads them.
        folder: of the run.
    """
    advice = {"rolled_back": _after_rollback, "undecided": _undecided}
    changes = advice.get(str(summary["status"]), _after_kept)(config, summary)
    typed = [word for word in words if word.partition("=")[0].lstrip("+") != "resume"]
    lines = [f"{_changed(typed, change)}   # {why}" for change, why in changes]
    checkpoint = str(folder / "checkpoint")
    if summary["status"] != "rolled_back":
        lines.append(tritter_command(["generate", "--checkpoint", checkpoint, "--prompt", "TEXT"]))
    elif any((trained := _last_trained(folder, summary)).glob("*.safetensors")):
        refused = tritter_command(["inspect", str(trained)])
        lines.append(f"{refused}   # what was trained and not kept")
    lines.append(tritter_command(["history", checkpoint, "--verify"]))
    wandb = config.logger.wandb
    if wandb is not None and wandb.mode == "offline":
        runs = tool_command("wandb", ["sync", str(folder / "wandb")])
        lines.append(f"{runs}/offline-run-*   # upload to W&B")  # unquoted: the shell expands it
    return lines


def _last_trained(folder: Path, summary: Mapping[str, Any]) -> Path:
    return folder / f"attempt_{len(summary.get('attempts', ()))}" / "trained"


Advice = Iterator[tuple[dict[str, str], str]]


def _after_kept(config: RunConfig, summary: Mapping[str, Any]) -> Advice:
    if not config.control and config.expansion:
        yield {"control": "true"}, "the base that does not grow beside it"
    if not isinstance(config.model, CheckpointModelConfig):
        yield {"seed": str(config.seed + 1)}, "whether it holds with another seed"
    is_dynamic = config.experts is not None and config.experts.is_dynamic
    if is_dynamic and not isinstance(config.model, CheckpointModelConfig):
        yield {"experts": "single_lora"}, "one adapter for everything, beside it"
    elif not isinstance(config.model, CheckpointModelConfig) and config.experts is None:
        used = {spec.name for spec in config.expansion}
        # A model without experts has none to add to
        other = next(n for n in [*EXPANSIONS, "none"] if n not in used and n != "moe_add")
        yield {"expansion": other}, "another expansion"


def _after_rollback(config: RunConfig, summary: Mapping[str, Any]) -> Advice:
    failed = {check["check"] for check in summary["gate"] if check["verdict"] == "failed"}
    if "retention" in failed:
        yield from _stronger_protection(config)
    if "new_capability" in failed:
        yield _twice_as_long(config), "more steps"
    if failed & {"retention", "training"}:
        asked = config.training if config.experts is None else config.experts.options
        group = "training" if config.experts is None else "experts"
        yield {f"{group}.learning_rate": f"{asked.learning_rate / 2:g}"}, "smaller steps"


def _twice_as_long(config: RunConfig) -> dict[str, str]:
    """Return the key that says how long the run trains, doubled."""
    training = config.training
    if training.max_tokens is not None:
        return {"training.max_tokens": str(2 * training.max_tokens)}
    return {"training.max_steps": str(2 * training.max_steps)}


def _stronger_protection(config: RunConfig) -> Advice:
    names = [options.name for options in config.forgetting]
    replay = next((one for one in config.forgetting if one.name in _REPLAYING), None)
    if replay is None:
        yield {"forgetting": _listed([*names, "replay"])}, "old text mixed in"
    elif replay.options.fraction < _LARGEST_FRACTION:
        fraction = min(_LARGEST_FRACTION, 2 * replay.options.fraction)
        yield {f"forgetting.{replay.name}.fraction": f"{fraction:g}"}, "more old text mixed in"
    # Beside replay the one that kept most: experiments/2026-11-21_forgetting_methods
    if "distill" not in names and config.experts is None:
        protected = ["distill", *names] if names else ["distill", "replay"]
        yield {"forgetting": _listed(protected)}, "the old answers held as well"


def _undecided(config: RunConfig, summary: Mapping[str, Any]) -> Advice:
    undecided = [check for check in summary["gate"] if check["verdict"] == "undecided"]
    if any(check["check"] == "new_capability" and not _is_below(check) for check in undecided):
        yield _twice_as_long(config), "more steps"
    needs = [
        (check["documents_needed"] / check["n"], check)
        for check in undecided
        if check.get("documents_needed") and check.get("n")
    ]
    if not needs or isinstance(config.model, CheckpointModelConfig):
        return  # a checkpoint keeps the split that its lineage records
    factor, check = max(needs, key=lambda need: need[0])
    fraction = factor * (config.data.validation_fraction or DEFAULT_FRACTION)
    if factor > 1 and fraction <= _LARGEST_FRACTION:
        told = f"{check['documents_needed']} documents of {check['subject']} to decide on"
        yield {"data.validation_fraction": f"{fraction + 0.005:.2f}"}, told


def _is_below(check: Mapping[str, Any]) -> bool:
    """Say whether the whole interval lies below the bound, and only documents are missing."""
    upper = (check.get("interval") or [None, None])[1]
    return upper is not None and upper < check["bound"]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"


def _changed(words: Sequence[str], change: Mapping[str, str]) -> str:
    """Return the command with some keys changed; an option of another method goes with it."""
    kept = [
        word
        for word in words
        if not any(
            word.lstrip("+~").partition("=")[0] == key
            or (key in _WITH_BODY and word.lstrip("+~").startswith(f"{key}."))
            for key in change
        )
    ]
    return command([*kept, *(f"{key}={value}" for key, value in change.items())])

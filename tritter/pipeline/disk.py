"""What a run keeps on disk: which stage folders it removes, and how many bytes there are.

A stage folder that no later stage needs loses its weights, state and tokenizer. Its records
(`config.json`, `tritter.json`) stay, so that `history` and the rest of the run can read them. The
ledger is marked first: after a kill the removal is repeated, never missed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from tritter.pipeline import moe
from tritter.pipeline.branch import Branch
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import disk_bytes
from tritter.storage.atomic import remove_folder
from tritter.storage.reading import LINEAGE_NAME
from tritter.transform import Expanded, expand, size_text

_RECORDS = {"config.json", LINEAGE_NAME, "router.json"}
_BEFORE_FIT = ("expanded", "distilled", "adapted")
_AGAIN = "expanded_again"


def remove(context: RunContext, *places: str) -> None:
    """Remove stage folders that nothing needs any more, unless `pipeline.keep_stages` is on."""
    if context.config.pipeline.keep_stages:
        return
    for place in places:
        if (folder := context.folder / place).is_dir():
            context.ledger.mark_removed(place)
            strip(folder)


def strip(folder: Path) -> None:
    """Remove all of a checkpoint but its records, or the whole of a folder that is none."""
    if not (folder / LINEAGE_NAME).is_file():
        shutil.rmtree(folder)
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_dir() and path.name not in _RECORDS:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def remove_before_fit(context: RunContext, branch: Branch) -> None:
    """Remove what an arm's training started from, once the trained model is verified."""
    remove_folder(context.folder / branch.name / _AGAIN)
    remove(context, *(f"{branch.name}/{name}" for name in _BEFORE_FIT))
    if branch.task:
        remove(context, f"{branch.follows}/trained")


def remove_rest(context: RunContext, *branches: Branch) -> None:
    """Remove all that is left of arms when the run no longer needs them."""
    for branch in branches:
        remove_before_fit(context, branch)
        remove(context, f"{branch.name}/trained", f"{branch.name}/importance")
        if not branch.is_control and not branch.follows:
            prepared = (
                "importance" if branch.prepared_by == 1 else f"importance_{branch.prepared_by}"
            )
            remove(context, prepared)


def release_start(context: RunContext, branch: Branch) -> bool:
    """Say whether the weights of a training's start may go before its result is written.

    Those of an expanded checkpoint may: if the run is killed in between, the next call expands
    again, from the same source and seed.
    """
    place = f"{branch.name}/expanded"
    if moe.start_folder(context, branch) != place:
        return False
    folder = context.folder / place
    if context.ledger.is_incomplete(place):
        context.say("expand", f"the weights of {folder} were removed; expanding again")
        again = context.folder / branch.name / _AGAIN
        write_expanded(context, branch, again)
        for path in sorted(again.glob("*.safetensors")):
            path.replace(folder / path.name)
        remove_folder(again)
        context.ledger.check_complete(place)
    if context.config.pipeline.keep_stages or context.config.experts is not None:
        return False
    context.ledger.mark_released(place)
    return True


def record(context: RunContext) -> dict[str, dict[str, int]]:
    """Return, for summary.json, the bytes of weights and training state in the run folder.

    `peak` and `end` are of the whole folder; `source` and `result` of two checkpoints in it.
    """
    end = disk_bytes(context.folder)
    peak = context.ledger.peak
    use = {kind: {"peak": peak(kind), "end": end[kind]} for kind in ("weights", "state")}
    for name, place in (("source", "baseline"), ("result", "checkpoint")):
        use["weights"][name] = disk_bytes(context.folder / place)["weights"]
    return use


def report(use: Mapping[str, Mapping[str, int]]) -> str:
    """Return one line about the disk that a run used."""
    weights, state = use["weights"], use["state"]
    return (
        f"weights {size_text(weights['end'])} (at most {size_text(weights['peak'])}; source "
        f"{size_text(weights['source'])}, result {size_text(weights['result'])}), training state "
        f"{size_text(state['end'])} (at most {size_text(state['peak'])})"
    )


def write_expanded(context: RunContext, branch: Branch, folder: Path) -> Expanded:
    """Expand what an arm starts from into a folder."""
    # In float32 whatever the source is stored in: an exact map is exact only before rounding
    return expand(
        context.source(branch.start),
        folder,
        context.planned(branch),
        dtype=torch.float32,
        moments="carry" if context.config.optimizer.carry else "zero",
        overwrite=True,
    )

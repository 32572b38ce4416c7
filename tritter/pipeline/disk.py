"""Disk use of a run: removal of stage folders, and the number of bytes.

A stage folder that no later stage needs loses its weights, state and tokenizer. Its records
(`config.json`, `tritter.json`) stay, because `history` and later stages read them. The ledger is
marked first: after a kill the removal is repeated, never missed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import disk_bytes
from tritter.pipeline.run import Run
from tritter.storage.atomic import remove_folder
from tritter.storage.reading import LINEAGE_NAME
from tritter.transform import Expanded, expand, size_text

# Later stages read them: shapes, lineage, and the tokenizer of an expanded vocabulary
_RECORDS = {"config.json", LINEAGE_NAME, "router.json", "tokenizer.json", "tokenizer_config.json"}
_RECORDS |= {"special_tokens_map.json", "generation_config.json"}
_BEFORE_FIT = ("expanded", "distilled", "adapted")
_AGAIN = "expanded_again"


def remove(run: Run, *locations: str) -> None:
    """Remove stage folders that are no longer needed, unless `pipeline.keep_stages` is set."""
    if run.config.pipeline.keep_stages:
        return
    for location in locations:
        if (folder := run.folder / location).is_dir():
            run.ledger.mark_removed(location)
            _strip(folder)


def _strip(folder: Path) -> None:
    """Remove everything except a checkpoint's records; remove other folders completely."""
    if not (folder / LINEAGE_NAME).is_file():
        shutil.rmtree(folder)
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_dir() and path.name not in _RECORDS:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def keeps_start(run: Run) -> bool:
    """Return True if stages from outside may read the start of a training after it."""
    return any(one.kind.after in ("fit", "evaluate") for one in run.config.stages)


def remove_before_fit(run: Run, branch: Branch) -> None:
    """Remove the initial checkpoint of a branch's training, once the trained model is verified."""
    remove_folder(run.folder / branch.name / _AGAIN)
    own = (one.name for one in run.config.stages if one.kind.writes)
    remove(run, *(f"{branch.name}/{name}" for name in (*_BEFORE_FIT, *own)))
    if branch.task:
        remove(run, branch.start)


def remove_unneeded(run: Run, *branches: Branch) -> None:
    """Remove the remaining folders of branches that the run no longer needs."""
    for branch in branches:
        remove_before_fit(run, branch)
        remove(run, branch.trained, branch.preparation)


def may_release_start(run: Run, branch: Branch) -> bool:
    """Return True if the weights at the start of training may be removed before it ends.

    This holds for an expanded checkpoint: if the run is killed, the next call repeats the expansion
    from the same source and seed.
    """
    location = branch.expanded
    if not branch.specs or branch.location != location:
        return False
    folder = run.folder / location
    if run.ledger.is_incomplete(location):
        run.say("expand", f"the weights of {folder} were removed; expanding again")
        again = run.folder / branch.name / _AGAIN
        write_expanded(run, branch, again)
        for path in sorted(again.glob("*.safetensors")):
            path.replace(folder / path.name)
        remove_folder(again)
        run.ledger.check_complete(location)
    if run.config.pipeline.keep_stages or run.config.experts is not None or keeps_start(run):
        return False
    run.ledger.mark_released(location)
    return True


def record(run: Run) -> dict[str, dict[str, int]]:
    """Return the bytes of weights and training state in the run folder, for summary.json.

    `peak` and `end` cover the whole folder; `source` and `result` are two checkpoints in it.
    """
    end = disk_bytes(run.folder)
    use = {kind: {"peak": run.ledger.peak(kind), "end": end[kind]} for kind in ("weights", "state")}
    for name, location in (("source", "baseline"), ("result", "checkpoint")):
        use["weights"][name] = disk_bytes(run.folder / location)["weights"]
    return use


def report(use: Mapping[str, Mapping[str, int]]) -> str:
    """Return one line about the disk use of a run."""
    weights, state = use["weights"], use["state"]
    return (
        f"weights {size_text(weights['end'])} (peak {size_text(weights['peak'])}; source "
        f"{size_text(weights['source'])}, result {size_text(weights['result'])}), training state "
        f"{size_text(state['end'])} (peak {size_text(state['peak'])})"
    )


def write_expanded(run: Run, branch: Branch, folder: Path) -> Expanded:
    """Expand the initial checkpoint of a branch into a folder."""
    # In float32 for any source dtype: rounding would break function preservation
    with run.progress_bars() as new_bar:
        return expand(
            run.source(branch.start),
            folder,
            run.planned(branch),
            dtype=torch.float32,
            overwrite=True,
            progress=new_bar("writing tensors of the grown model"),
        )

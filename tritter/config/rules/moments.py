"""`optimizer.carry`: what a run must have so that its trainings can start from moments."""

from collections.abc import Iterator
from pathlib import Path

from tritter.config.rules.freezing import freezing
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.errors import Problem, TritterError
from tritter.expansion import MoeAdd
from tritter.storage.reading import read_object

_KEY = "optimizer.carry"
_HEAD = Path("state/state.json")
# Beginnings of dotted names: bitsandbytes' have bits and pages in theirs
_WITH_MOMENTS = tuple(
    f"{library}.optim.{name}"
    for library in ("torch", "bitsandbytes")
    for name in ("adam.Adam", "adamw.AdamW")
)
_MOMENTS = {"exp_avg", "exp_avg_sq"}


def carry_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield why trainings can't start from moments, as far as files are at hand."""
    if not config.optimizer.carry:
        return
    for reason in _reasons(config):
        yield Problem(_KEY, True, reason=reason)
    if isinstance(config.model, CheckpointModelConfig) and Path(config.model.path).is_dir():
        yield from given_problems(Path(config.model.path))


def given_problems(folder: Path) -> list[Problem]:
    """Return why trainings can't start from the moments beside a checkpoint."""
    try:
        if kinds_beside(folder) >= _MOMENTS:
            return []
    except TritterError as error:
        return [Problem(_KEY, True, reason=str(error))]
    reason = (
        f"{folder} has no state/ with Adam's moments (exp_avg and exp_avg_sq); a run with "
        "optimizer.carry=true leaves them beside what it trained, and tritter export takes "
        "them from a .ckpt. Leave optimizer.carry out to start without"
    )
    return [Problem(_KEY, True, reason=reason)]


def kinds_beside(folder: Path) -> set[str]:
    """Return the kinds of state that lie beside a checkpoint's weights.

    Raises:
        TritterError: what says so is damaged.
    """
    kinds = read_object(folder / _HEAD).get("kinds") if (folder / _HEAD).exists() else ()
    return {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()


def _reasons(config: RunConfig) -> Iterator[str]:
    """Yield why moments can't be carried through the map of a run, or have no use there."""
    optimizer, options = config.optimizer, config.adaptation
    name = optimizer.target.rpartition(".")[2]
    other = "; choose optimizer=adamw, or leave optimizer.carry out"
    if not optimizer.target.startswith(_WITH_MOMENTS):
        yield (
            f"{name} has other state than the two moments of Adam and AdamW, which are carried"
            f"{other}"
        )
    elif optimizer.arguments.get("amsgrad"):
        yield f"with optimizer.amsgrad = true there is a third moment, which is not carried{other}"
    if any(spec.new_blocks_only for spec in config.expansion):
        yield (
            "with expansion.llama_pro.new_blocks_only = true only new blocks are trained, and "
            "they have no moments yet; leave one of the two out"
        )
    if (frozen := freezing(config)) is not None and frozen.new_only:
        yield (
            "with forgetting.freeze.new_only = true only what is new is trained, and it has no "
            "moments yet; leave one of the two out"
        )
    appends = any(isinstance(s, MoeAdd) and s.addition == "append" for s in config.expansion)
    if appends and options.freeze_base and options.unfreeze_after is None:
        yield (
            "with adaptation.freeze_base = true only appended experts are trained, and they have "
            "no moments yet; leave it out, or set adaptation.freeze_base=false or "
            "adaptation.unfreeze_after"
        )

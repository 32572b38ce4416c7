"""`optimizer.carry`: what a run must have so that its trainings can start from moments."""

from pathlib import Path

from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.errors import TritterError
from tritter.expansion import MoeAdd
from tritter.storage.reading import read_object

_HEAD = Path("state/state.json")
_MOMENTS = {"exp_avg", "exp_avg_sq"}


def carry_problems(config: RunConfig) -> list[str]:
    """Return why trainings can't start from moments, as far as files are at hand."""
    if not config.optimizer.carry:
        return []
    problems = []
    if any(spec.new_blocks_only for spec in config.expansion):
        problems.append(
            "optimizer.carry = true: with expansion.llama_pro.new_blocks_only = true only new "
            "blocks are trained, and they have no moments yet; leave one of the two out."
        )
    if _trains_new_experts_only(config):
        problems.append(
            "optimizer.carry = true: with adaptation.freeze_base = true only appended experts are "
            "trained, and they have no moments yet; leave it out, or set "
            "adaptation.freeze_base=false or adaptation.unfreeze_after."
        )
    model = config.model
    if isinstance(model, CheckpointModelConfig) and Path(model.path).is_dir():
        problems += given_problems(Path(model.path))
    return problems


def given_problems(folder: Path) -> list[str]:
    """Return why trainings can't start from the moments beside a checkpoint."""
    try:
        kinds = read_object(folder / _HEAD).get("kinds") if (folder / _HEAD).exists() else ()
    except TritterError as error:
        return [f"optimizer.carry = true: {error}"]
    if isinstance(kinds, list) and {kind for kind in kinds if isinstance(kind, str)} >= _MOMENTS:
        return []
    return [
        f"optimizer.carry = true: {folder} has no state/ with Adam's moments (exp_avg and "
        "exp_avg_sq); a run with optimizer.carry=true leaves them beside what it trained, and "
        "tritter export takes them from a .ckpt. Leave optimizer.carry out to start without."
    ]


def _trains_new_experts_only(config: RunConfig) -> bool:
    options = config.adaptation
    return (
        any(isinstance(s, MoeAdd) and s.addition == "append" for s in config.expansion)
        and options.freeze_base
        and options.unfreeze_after is None
    )

"""`optimizer.carry`: what a run must have so that its trainings can start from moments."""

from pathlib import Path

from tritter.config.schema import CheckpointModelConfig, OptimizerConfig, RunConfig
from tritter.errors import Problem, TritterError
from tritter.expansion import MoeAdd
from tritter.storage.reading import read_object

_HEAD = Path("state/state.json")
_WITH_MOMENTS = ("torch.optim.adam.Adam", "torch.optim.adamw.AdamW")
_MOMENTS = {"exp_avg", "exp_avg_sq"}


def carry_problems(config: RunConfig) -> list[Problem]:
    """Return why trainings can't start from moments, as far as files are at hand."""
    if not config.optimizer.carry:
        return []
    problems = _optimizer_problems(config.optimizer)
    if any(spec.new_blocks_only for spec in config.expansion):
        problems.append(
            _problem(
                "with expansion.llama_pro.new_blocks_only = true only new blocks are trained, and "
                "they have no moments yet; leave one of the two out"
            )
        )
    if _trains_new_experts_only(config):
        problems.append(
            _problem(
                "with adaptation.freeze_base = true only appended experts are trained, and they "
                "have no moments yet; leave it out, or set adaptation.freeze_base=false or "
                "adaptation.unfreeze_after"
            )
        )
    model = config.model
    if isinstance(model, CheckpointModelConfig) and Path(model.path).is_dir():
        problems += given_problems(Path(model.path))
    return problems


def _optimizer_problems(optimizer: OptimizerConfig) -> list[Problem]:
    """Return why moments of an optimizer can't be carried through a map."""
    name = optimizer.target.rpartition(".")[2]
    reason = None
    if "8bit" in name:
        reason = f"{name} keeps its moments in 8 bits by blocks that run across rows, which no "
        reason += "map can carry"
    elif optimizer.target not in _WITH_MOMENTS:
        reason = f"{name} has other state than the two moments of Adam and AdamW, which are carried"
    elif optimizer.arguments.get("amsgrad"):
        reason = "with optimizer.amsgrad = true there is a third moment, which is not carried"
    if reason is None:
        return []
    reason += "; choose optimizer=adamw, or leave optimizer.carry out"
    return [Problem("optimizer.carry", True, reason=reason)]


def given_problems(folder: Path) -> list[Problem]:
    """Return why trainings can't start from the moments beside a checkpoint."""
    try:
        kinds = read_object(folder / _HEAD).get("kinds") if (folder / _HEAD).exists() else ()
    except TritterError as error:
        return [_problem(str(error))]
    if isinstance(kinds, list) and {kind for kind in kinds if isinstance(kind, str)} >= _MOMENTS:
        return []
    return [
        _problem(
            f"{folder} has no state/ with Adam's moments (exp_avg and exp_avg_sq); a run with "
            "optimizer.carry=true leaves them beside what it trained, and tritter export takes "
            "them from a .ckpt. Leave optimizer.carry out to start without"
        )
    ]


def _problem(reason: str) -> Problem:
    return Problem("optimizer.carry", True, reason=reason)


def _trains_new_experts_only(config: RunConfig) -> bool:
    options = config.adaptation
    return (
        any(isinstance(s, MoeAdd) and s.addition == "append" for s in config.expansion)
        and options.freeze_base
        and options.unfreeze_after is None
    )

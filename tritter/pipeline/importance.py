"""The importance of a model's weights for the old domains: estimated, kept, carried to its arms."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tritter.checkpoint.state import read_state, state_tensors, write_state
from tritter.config.schema import EWCOptions
from tritter.expand import plan_expansion, state_stream
from tritter.families import family_of, forward_flops, training_flops
from tritter.forgetting.ewc import mean_importance
from tritter.forgetting.fisher import diagonal_fisher
from tritter.models import disk_tensors, live_tensors, load_model, read_config
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import StageResult
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream


def estimate(context: RunContext, arm: Arm) -> StageResult:
    """Estimate, at the weights an arm starts from, how much each matters to the old domains."""
    options = _ewc_options(context)
    assert options is not None
    folder = context.folder / arm.start
    model = load_model(folder).to(context.device)
    chosen = context.drawn_equally(
        context.old_domains, options.num_sequences, "fisher", *arm.purpose
    )
    domains = ", ".join(context.old_domains)
    context.say("importance", f"Fisher of {len(chosen)} sequences of {domains}")
    fisher = diagonal_fisher(
        model,
        chosen,
        estimator="true" if options.estimator == "true" else "empirical",
        seed=context.seed("fisher", "labels", *arm.purpose),
    )
    config = read_config(folder)
    held = disk_tensors(config, {name: value.cpu() for name, value in fisher.items()})
    with atomic_folder(context.folder / _folder(arm), overwrite=True) as temporary:
        write_state(temporary, {"fisher": TensorStream.of(held.items())}, step=0)
    # The gradients of a training step, and no update; true labels take a pass of their own
    flops = training_flops(family_of(config), config)
    if options.estimator == "true":
        flops += forward_flops(family_of(config), config)
    return StageResult(
        found={"sequences": len(chosen)},
        flops={"importance": len(chosen) * flops.of(chosen.shape[1])},
        leaves=(_folder(arm),),
    )


def is_needed(context: RunContext) -> bool:
    """Say whether a method of the run needs the importance stage."""
    return _ewc_options(context) is not None


def _ewc_options(context: RunContext) -> EWCOptions | None:
    return next((o for o in context.config.forgetting if isinstance(o, EWCOptions)), None)


def _folder(arm: Arm) -> str:
    return f"{arm.follows}/importance" if arm.follows else "importance"


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """What `Task` is told of importances, by kind, and their means before the expansion."""

    values: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)


def carried_importance(context: RunContext, arm: Arm) -> Importance:
    """Return the importances that the arm's stage left, carried through the arm's maps."""
    options, state = _ewc_options(context), read_state(context.folder / _folder(arm))
    if options is None or state is None:
        return Importance()
    baseline_folder = context.folder / arm.start
    fisher = state.kinds["fisher"]
    means = {}
    if options.normalise == "mean":
        means["fisher"] = mean_importance(state_tensors(fisher))
    if not arm.specs:
        config = read_config(baseline_folder)
        return Importance({"fisher": live_tensors(config, state_tensors(fisher))}, means)
    plan = plan_expansion(baseline_folder, arm.specs, seed=context.seed("expansion", *arm.purpose))
    kind = "fisher_penalty" if options.carry == "penalty_preserving" else "fisher"
    carried = dict(state_stream(plan, kind, fisher, moments="carry").tensors)
    return Importance({"fisher": live_tensors(plan.target_config, carried)}, means)

"""The expansion of a branch."""

from dataclasses import replace
from functools import partial

import torch

from tritter.checkpoints import write_lineage
from tritter.checkpoints.record import layers_text
from tritter.core.families import Model, forward_flops
from tritter.core.models import load_model
from tritter.data.chat import ids_of
from tritter.evaluation.gate import Check
from tritter.evaluation.jump import Jump
from tritter.evaluation.measure import wrong_part
from tritter.evaluation.statistics import score_file
from tritter.methods.whole import reading_flops
from tritter.pipeline import windows
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import ExpansionFound, StageResult
from tritter.pipeline.run import Run
from tritter.pipeline.stage import Stage
from tritter.training.fitting import validation_metrics
from tritter.transform import PlannedExpansion
from tritter.transform.children import router_flops

_JUMP_SEQUENCES, _JUMP_TOKENS = 8, 128  # of each domain


class Expand(Stage):
    """Expand the branch's initial model, measure the logit shift and score the result."""

    name = "expand"
    found = ExpansionFound

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Write the expanded model, compare it with its source, and score it."""
        source, location = run.source(branch.start), branch.expanded
        if not branch.specs:
            return StageResult(ExpansionFound(parameters=source.model.num_parameters))
        plan = run.planned(branch)
        made = run.write_expanded(branch, run.folder / location)
        grown = run.register(location, made.lineage)
        notes = _announce(run, plan)
        texts = run.data.training_sequences(run.data.domains).values()
        pieces = [each[:_JUMP_SEQUENCES, :_JUMP_TOKENS] for each in texts]
        tokens = ids_of(torch.cat(pieces)).long()  # [B, T]
        new_tokens = None if plan.vocabulary is None else plan.vocabulary.new_ids
        with run.waiting("logit shift"):
            before, after = (load_model(each.folder, model=each.model) for each in (source, grown))
            jump = Jump.between(before, after, tokens, new_tokens=new_tokens, has_yardstick=True)
        if plan.is_exact and not jump.relative_to_std < Check.EXACT_JUMP:
            shift = f"the result differs by {jump.relative_to_std:.2g} standard deviations"
            run.say("", f"{shift}, although it is exact; {wrong_part(branch.specs)}")
        error, num_steps = jump.to_dict()["relative_to_std"], len(branch.specs)
        lineage = made.lineage.with_step0_error(error, num_new=num_steps)
        lineage = write_lineage(grown.folder, lineage, grown.config)
        run.sources[location] = replace(grown, lineage=lineage)
        run.reading(location).score(after, f"{branch.name}-expanded")
        evaluated, flops = dict[str, float](), dict[str, float]()
        if (text := run.data.validation_subset) is not None:
            evaluated = validation_metrics(before, text, run.config.trainer)
            flops["validation"] = sum(map(reading_flops(before).of, text.lengths))
        flops["expand"] = run.data.scoring.flops(forward_flops(grown.model))
        # The source is read in bfloat16 too
        passes = [forward_flops(each.model).of(tokens.shape[1]) for each in (source, source, grown)]
        flops["expand"] += len(tokens) * sum(passes) + router_flops(made.plan)
        files = list[str]()
        if (long_windows := windows.LongWindows(run, branch)).is_longer:
            readings = reading_flops(before), forward_flops(grown.model)
            files, spent = long_windows.score_start(before, after, readings)
            flops["expand"] += spent
        return StageResult(
            ExpansionFound(
                parameters=plan.target.num_parameters,
                notes=notes,
                jump=jump.to_dict(),
                before=evaluated,
            ),
            flops=flops,
            leaves=(location, score_file(f"{branch.name}-expanded"), *files),
        )

    @staticmethod
    def flops(run: Run, before: Model, after: Model, window: int) -> float:
        """Return the expected FLOPs; training reads windows of `window` tokens."""
        data, old = run.data, run.data.model.position_limit
        of_before, of_after = forward_flops(before), forward_flops(after)
        number = sum(map(partial(min, _JUMP_SEQUENCES), map(data.num_sequences, data.domains)))
        of_shift = (of_before + of_before + of_after).of(min(_JUMP_TOKENS, data.sequence_length))
        total = data.scoring.flops(of_after) + number * of_shift
        if old is not None and window > data.sequence_length:
            longer, both = data.reading(window), of_before + of_after
            total += windows.flops(longer, of_before, source_length=old, length=old)
            total += windows.flops(longer, both, source_length=old, length=window)
        return total

    def finish(self, run: Run, branch: Branch) -> Branch:
        """Return the branch with the expanded model, if it has expansions."""
        return replace(branch, reached=branch.expanded)


def _announce(run: Run, plan: PlannedExpansion) -> tuple[str, ...]:
    """Print what an expansion did, and return its notes."""
    notes = [f"{step.spec.name}: {note}" for step in plan.steps for note in step.notes]
    for step in plan.steps:
        layers = step.parameter_map.layer_sources
        if layers != tuple(range(len(layers))):
            notes.append(f"{step.spec.name}: layers from {layers_text(layers)}")
    run.say(
        "expand",
        f"{' then '.join(step.spec.name for step in plan.steps)}: "
        f"{plan.source.num_parameters:,} → {plan.target.num_parameters:,} parameters",
    )
    for note in notes:
        run.say("", note)
    if plan.vocabulary is not None:
        run.say("", "losses per token are now of other tokens; compare losses per byte")
    return tuple(notes)

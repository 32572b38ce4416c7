"""Stages of appended experts: which are cloned, distillation, and training of their routers."""

from dataclasses import replace
from typing import ClassVar

from tritter.core.expansions import MoeAdd
from tritter.core.families import training_flops
from tritter.core.models import load_model
from tritter.data.packing import DocumentMask, lengths_of
from tritter.methods.forgetting import build_methods
from tritter.methods.moe_routing.distill import DistillationModule, only_new_experts
from tritter.methods.moe_routing.opening import best_experts, redraw_rows
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult, TrainingFound
from tritter.pipeline.moe import NewExperts
from tritter.pipeline.run import Run
from tritter.pipeline.stage import Stage
from tritter.pipeline.stages import importance
from tritter.pipeline.stages.fit import fit_branch
from tritter.pipeline.trained import TrainedWriter
from tritter.storage.hub import locate
from tritter.storage.records import record
from tritter.training import BaseModule, FitResult, Schedule, discard_saved

_ROUTER_WARMUP = 0.05
_UTILITY_SEQUENCES = 64  # of the new domains, to select the expert to clone


@record
class _ChoiceFound:
    """For each layer, the expert from which new experts are cloned."""

    clone_from: tuple[int, ...]


class Choose(Stage):
    """Select the expert of each layer that the new domains' data affects most."""

    name = "choose"
    found = _ChoiceFound

    def is_needed(self, run: Run, branch: Branch) -> bool:
        """Return True if data selects the experts that the branch clones."""
        return any(isinstance(spec, MoeAdd) and spec.is_chosen_by_data for spec in branch.specs)

    def finish(self, run: Run, branch: Branch) -> Branch:
        """Return the branch with the selected experts to clone."""
        return branch.with_choice(run.ledger.found(self.key(branch), _ChoiceFound).clone_from)

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Measure the gradients of the experts on the new domains."""
        start = run.source(branch.start)
        sequences = run.data.spaced_sequences(run.data.new_domains_of(branch), _UTILITY_SEQUENCES)
        with run.waiting("affected experts"):
            model = run.load(branch.start).to(run.device)
            chosen = best_experts(model, sequences)
        run.say("choose", f"experts to clone, layer by layer: {' '.join(map(str, chosen))}")
        flops = training_flops(start.model, is_trained=lambda tensor: tensor.is_per_expert)
        return StageResult(
            _ChoiceFound(clone_from=tuple(chosen)),
            flops={"choose": flops.of_all(lengths_of(DocumentMask.of(model), sequences))},
        )


class _Training(Stage):
    """A training run before the main one, with its own saved state."""

    found = TrainingFound
    writes = True
    working: ClassVar[str]  # its folder, below that of the branch

    def accepted(self, run: Run, branch: Branch, result: FitResult) -> StageResult:
        """Verify what the training run wrote, and return its result."""
        location, label = self.folder(branch), branch.label(self.name)
        run.accept(location)
        run.ledger.watch_disk()
        found = TrainingFound.of(result)
        return StageResult(found, flops={label: result.flops}, leaves=(location,))

    def finish(self, run: Run, branch: Branch) -> Branch:
        """Remove the saved state and the initial model; return the branch with the trained one."""
        discard_saved(run.folder / branch.name / self.working)
        # Old routing and own stages read the expanded model; the start of the branch is not ours
        is_read = run.config.moe_routing.hold_old or run.config.stages
        if branch.location != branch.start and not is_read:
            run.remove(branch.location)
        return super().finish(run, branch)


class Distill(_Training):
    """Distill the new experts from the teacher on the new domains, before routers use them."""

    name = working = "distill"

    def folder(self, branch: Branch) -> str:
        """Return the folder of the model with distilled experts."""
        return f"{branch.name}/distilled"

    def is_needed(self, run: Run, branch: Branch) -> bool:
        """Return True if the new experts have a teacher."""
        return _teacher_of(branch) is not None

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Train the new experts alone."""
        options, teacher = run.config.adaptation, _teacher_of(branch)
        start, new = run.source(branch.location), NewExperts(run, branch)
        added = new.added
        assert teacher is not None and added is not None
        model = run.load(branch.location)
        folder, steps = run.folder / branch.name / self.working, options.distill_steps
        location, stage = self.folder(branch), "distillation of new experts"
        offset_after = new.offset_after(opens=False)
        write = TrainedWriter.of_stage(
            run, branch, start, location, stage=stage, offset_after=offset_after
        )
        run.say("distill", f"{steps} steps of the new experts; teacher: {teacher}")
        with only_new_experts(model, added.experts):
            module = DistillationModule(
                model,
                run.data.masked(load_model(locate(teacher, key="expansion.moe_add.teacher"))),
                new_experts=added.experts,
                temperature=options.distill_temperature,
                auxiliary_loss=run.config.moe_routing.auxiliary_loss,
                schedule=Schedule.constant(run.config.training.learning_rate, max_steps=steps),
                optimizer=run.config.optimizer,
            )
            result = fit_branch(
                run, branch, module, folder=folder, label="distill", write_result=write
            )
        return self.accepted(run, branch, result)


def _teacher_of(branch: Branch) -> str | None:
    return next((spec.teacher for spec in branch.specs if isinstance(spec, MoeAdd)), None)


class Adapt(_Training):
    """Train only the routers, so that they send new domains to the appended experts."""

    name, working = "adapt", "router"

    def folder(self, branch: Branch) -> str:
        """Return the folder of the model with adapted routers."""
        return f"{branch.name}/adapted"

    def is_needed(self, run: Run, branch: Branch) -> bool:
        """Return True if routers are trained before the other weights."""
        return bool(NewExperts(run, branch).router_steps)

    def work(self, run: Run, branch: Branch) -> StageResult:
        """Train the routers, which the options encourage to use the new experts."""
        start, folder = run.source(branch.location), run.folder / branch.name / self.working
        options, new = run.config.adaptation, NewExperts(run, branch)
        added, steps = new.added, new.router_steps
        assert added is not None
        model = run.load(branch.location)
        if options.router_update == "retrain":
            redraw_rows(model, added.experts, seed=run.seed("router", *branch.purpose))
        location, stage = self.folder(branch), "router adaptation"
        write = TrainedWriter.of_stage(
            run, branch, start, location, stage=stage, offset_after=new.offset_after()
        )
        run.say("adapt", f"{steps} router steps on {', '.join(run.data.new_domains_of(branch))}")
        with new.router_trainee(model) as trainee:
            module = BaseModule.of(
                trainee,
                schedule=Schedule(
                    learning_rate=options.router_learning_rate,
                    max_steps=steps,
                    warmup_ratio=_ROUTER_WARMUP,
                ),
                optimizer=replace(run.config.optimizer, weight_decay=0.0),
                methods=build_methods(run.config.forgetting),
            )
            result = fit_branch(
                run,
                branch,
                module,
                trainee=trainee,
                task=importance.task(run, branch, follow=trainee.follow),
                folder=folder,
                label="router",
                write_result=write,
            )
        return self.accepted(run, branch, result)

"""Experts that a run appends: training of their routers, and their opening."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.methods.moe_routing.objective import OldRouting, RoutingObjective
from tritter.methods.moe_routing.opening import ExpertOpening, Unfreezing
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.training import Trainee

_HOLD_OLD_SEQUENCES = 256  # old sequences whose routing is preserved


class NewExperts:
    """The appended experts of a branch, from their first router step until they are fully open.

    Args:
        run: the run.
        branch: the branch, whose expanded checkpoint is written.

    Attributes:
        added: the experts that the branch still has to open; None if there are none.
    """

    def __init__(self, run: Run, branch: Branch) -> None:
        self._run, self._branch = run, branch
        added = run.source(branch.expanded).added
        self.added: AddedExperts | None = None if added is None or added.is_settled else added

    @property
    def router_steps(self) -> int:
        """The number of steps of the router stage; 0 without one."""
        run = self._run
        if self.added is None or self.added.step:
            return 0
        sequences = sum(map(run.data.num_sequences, run.data.new_domains_of(self._branch)))
        of_step = run.data.batch_size * run.config.trainer.accumulate_grad_batches
        return run.config.adaptation.router_steps(sequences, of_step)

    @property
    def anneal_steps(self) -> int | None:
        """The number of steps until the offset of their routers reaches 0; None without experts."""
        if self.added is None:
            return None
        saved, config = self.added.anneal_steps, self._run.config
        steps = self.router_steps or max(1, config.training.max_steps // 2)
        return config.adaptation.anneal_steps or saved or steps

    @contextmanager
    def router_trainee(self, model: nn.Module) -> Iterator[Trainee]:
        """Prepare a model for the router stage: train only routers, encourage new experts."""
        added, opened_in, options = self.added, self.anneal_steps, self._run.config.adaptation
        assert added is not None and opened_in is not None
        routing = self._objective(
            model, encouragement=options.encouragement, new_experts=added.experts
        )
        opening = ExpertOpening(added, anneal_steps=opened_in)
        with only_trainable(model, lambda tensor: tensor.kind == "router"):
            yield Trainee(model, side_losses=(routing,), controls=(opening,))

    @contextmanager
    def training_of_routers(self, trainee: Trainee) -> Iterator[None]:
        """Train the routers of a model and open new experts, with a frozen base if requested."""
        model, added, opened_in = trainee.model, self.added, self.anneal_steps
        if RouterControl.of(model) is None:
            yield
            return
        trainee.side_losses, options = (self._objective(model),), self._run.config.adaptation
        if added is None or opened_in is None:
            yield
            return
        begun = added.at(added.step + self.router_steps, anneal_steps=opened_in)
        trainee.controls = (ExpertOpening(begun, anneal_steps=opened_in),)
        if not options.freeze_base:
            yield
            return
        with (
            SeparateExperts(model, added.experts[0]) as parts,
            only_trainable(model, lambda tensor: tensor.expert in added.experts),
        ):
            trainee.follow = parts.follow
            if options.unfreeze_after is not None:
                base = [p for p in model.parameters() if not p.requires_grad]
                trainee.controls += (Unfreezing(base, after_steps=options.unfreeze_after),)
            yield

    def _objective(
        self, model: nn.Module, *, encouragement: float = 0.0, new_experts: Sequence[int] = ()
    ) -> RoutingObjective:
        run, branch = self._run, self._branch
        options, old = run.config.moe_routing, None
        if options.hold_old:  # routing of old data before any training of the branch
            sequences = run.data.sample_equally(
                run.data.old_domains_of(branch), _HOLD_OLD_SEQUENCES, "hold_old", *branch.purpose
            )
            batch_size = max(1, run.data.batch_size // 4)
            with run.waiting("routing of old data"):
                before = run.load(branch.expanded)
                old = OldRouting.of(before.to(run.device), sequences, batch_size=batch_size)
        return RoutingObjective(
            model, options, encouragement=encouragement, new_experts=new_experts, old=old
        )

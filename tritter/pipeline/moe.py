"""Experts of a run's model: training of routers, opening of appended experts, and usage."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tritter.checkpoints import Source
from tritter.checkpoints.folder import Artifact
from tritter.core.models import load_model
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.methods.moe_routing.objective import RoutingObjective, moe_usage
from tritter.methods.moe_routing.opening import ExpertOpening, Unfreezing
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.training import Trainee
from tritter.training.checkpoint_io import SafetensorsCheckpointIO

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

    def offset_after(self, *, opens: bool = True) -> Callable[[int], Artifact | None] | None:
        """Return the `offset_after` of a `TrainedWriter`; None without appended experts.

        Args:
            opens: False for a training run that does not open the experts.
        """
        if self.added is None:
            return None
        return partial(_offset_after, self.added, self.anneal_steps if opens else None)

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
        objective = RoutingObjective(
            model, run.config.moe_routing, encouragement=encouragement, new_experts=new_experts
        )
        if objective.options.hold_old:  # routing of old data before any training of the branch
            sequences = run.data.sample_equally(
                run.data.old_domains_of(branch), _HOLD_OLD_SEQUENCES, "hold_old", *branch.purpose
            )
            batch_size = max(1, run.data.batch_size // 4)
            with run.waiting("routing of old data"):
                before = run.load(branch.expanded)
                objective.hold(before.to(run.device), sequences, batch_size=batch_size)
        return objective

    def usage(self, model: nn.Module, count: int) -> tuple[dict[str, Any] | None, list[Tensor]]:
        """Return the use of a model's experts by domain, and the sequences that it read.

        Args:
            model: the trained model; without routers, the use is None.
            count: number of sequences per domain.
        """
        run = self._run
        if RouterControl.of(model) is None:
            return None, []
        sequences = {name: run.data.spaced_sequences([name], count) for name in run.data.domains}
        with run.progress_bars() as new_bar:
            bar = new_bar("measuring routers")
            used = moe_usage(model.to(run.device), sequences, progress=bar)
        return used, [*sequences.values()]

    @staticmethod
    def save_routing(model: nn.Module, *, folder: Path) -> None:
        """Save the biases of a model's routers, which a checkpoint does not store."""
        routing = RouterControl.attached(model)
        assert routing is not None
        SafetensorsCheckpointIO().save_checkpoint(routing.state_dict(), folder)

    @staticmethod
    def load_with_routing(source: Source, folder: Path) -> nn.Module:
        """Load a trained model with the biases that `save_routing` saved."""
        model = load_model(source.folder, model=source.model)
        routing = RouterControl.of(model)
        assert routing is not None
        routing.load_state_dict(SafetensorsCheckpointIO().load_checkpoint(folder))
        return model


def _offset_after(added: AddedExperts, anneal_steps: int | None, steps: int) -> Artifact | None:
    """Return the writer of the router offset of experts after some steps; None once it is 0."""
    if anneal_steps is not None:
        added = added.at(added.step + steps, anneal_steps=anneal_steps)
    return None if added.is_settled else added.write

"""A stage: one part of a branch, which runs as a whole, once, and leaves its result on disk."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from json import dumps
from typing import ClassVar

from tritter.checkpoints import write_checkpoint
from tritter.checkpoints.record import Lineage
from tritter.errors import Problem, TritterError
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.run import Run
from tritter.storage.writer import TensorStream

# Names of Tritter's stages of a branch, in order
ORDER = ("importance", "vocabulary", "choose", "expand", "distill", "adapt", "fit", "evaluate")
_BEFORE_FIT = ("expand", "distill", "adapt")
# Further stages, folders and labels of a run
_TAKEN = {"baseline", "gate", "keep", "publish", "expanded", "expanded_again", "distilled"}
_TAKEN |= {"adapted", "trained", "router", "routing", "saved", "path", "left", "samples"}
_TAKEN |= {"pretraining", "validation", "control", "self_replay", "total"}


class Stage(ABC):
    """One part of a branch: `stage(run, branch)` runs it, unless the ledger has its result.

    A killed stage starts again; it reads what it needs from the results of earlier stages.

    Attributes:
        name: its part of the name in the ledger, and its label in reports; a stage from outside has
            the name of its entry in `stages`.
        found: type of its result: a class with `tritter.storage.records.record`, or a dict of plain
            values.
        after: for a stage from outside, the stage of Tritter that it follows.
        writes: it writes a checkpoint, from which later stages start, to `folder`.
    """

    name: str
    found: ClassVar[type] = dict
    after: ClassVar[str] = "expand"
    writes: ClassVar[bool] = False

    @classmethod
    def problems(cls, key: str) -> Iterator[Problem]:
        """Yield the problems of a stage from outside: of its name or its place.

        Args:
            key: its key in the configuration.
        """
        if (name := key.rpartition(".")[2]) in {*ORDER, *_TAKEN} or not name.isidentifier():
            yield Problem(key, reason=f"{name} is not free for a stage; use another name")
        if cls.after not in ORDER:
            reason = f"{cls.__qualname__}.after = {cls.after!r}; use one of {', '.join(ORDER)}"
            yield Problem(key, reason=reason)
        elif cls.writes and cls.after not in _BEFORE_FIT:
            reason = f"{cls.__qualname__} writes a checkpoint, but follows {cls.after}; "
            yield Problem(key, reason=f"{reason}it can follow {', '.join(_BEFORE_FIT)}")

    def is_needed(self, run: Run, branch: Branch) -> bool:
        """Return True if the branch has this stage."""
        return True

    @abstractmethod
    def work(self, run: Run, branch: Branch) -> StageResult:
        """Do the work, and return the result, with its FLOPs and the files that it leaves.

        Args:
            run: the run, with the data as the branch's checkpoint reads it.
            branch: the branch; `run.source(branch.location)` is its checkpoint so far.
        """

    def finish(self, run: Run, branch: Branch) -> Branch:
        """Return the branch as the next stage gets it; folders that none reads are removed.

        It is called after `work`, and again by each resumed run.
        """
        return replace(branch, reached=self.folder(branch)) if self.writes else branch

    def write(self, run: Run, branch: Branch, tensors: TensorStream) -> str:
        """Write the branch's checkpoint with other weights, and return its folder.

        Args:
            run: the run that `work` got.
            branch: the branch.
            tensors: all tensors, with the names and shapes of `run.source(branch.location)`.
        """
        source, location = run.source(branch.location), self.folder(branch)
        parent, folder = source.own_lineage, run.folder / location
        lineage = replace(
            parent,
            parent_hash=parent.model_hash,
            parent_path=os.path.relpath(source.folder, folder),
            training_config={
                **parent.training_config,
                "stage": Lineage.OWN_STAGE,
                "name": self.name,
            },
        )
        written = write_checkpoint(
            folder,
            config=source.config,
            tensors=tensors,
            lineage=lambda: lineage,
            artifacts=source.artifacts(),
            overwrite=True,
        )
        run.register(location, written)
        return location

    def folder(self, branch: Branch) -> str:
        """Return the folder of the checkpoint that it writes, relative to the run folder."""
        return f"{branch.name}/{self.name}"

    def key(self, branch: Branch) -> str:
        """Return the stage's name in the ledger."""
        return f"{branch.name}.{self.name}"

    def __call__(self, run: Run, branch: Branch) -> Branch:
        """Run the stage if the branch has it and the ledger has no result."""
        run = run.reading(branch.location)
        if not self.is_needed(run, branch):
            return branch
        label = branch.label(self.name)
        run.stage(self.key(branch), lambda: self._checked(run, branch), label=label)
        return self.finish(run, branch)

    def _checked(self, run: Run, branch: Branch) -> StageResult:
        """Do the work; the result of a stage from outside must be JSON."""
        result = self.work(run, branch)
        if self.name in ORDER:
            return result
        try:
            dumps([result.plain(), result.flops, result.seconds], allow_nan=False)
        except (AttributeError, TypeError, ValueError) as error:
            reason = f"{self.key(branch)}: its result is not plain values: {error}. "
            raise TritterError(f"{reason}Mend the stage; the run resumes before it.") from error
        return result

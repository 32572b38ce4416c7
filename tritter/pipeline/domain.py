"""Adds experts for a domain: expand, train the routers, train the experts, write a checkpoint.

It runs the stages of the main job in a temporary folder next to the destination. The result is one
checkpoint whose parent is the source.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritter.checkpoints import Lineage, write_lineage
from tritter.checkpoints.location import check_output, check_replaceable
from tritter.config.launch.composition import load_config
from tritter.config.overrides import nested_value, quote
from tritter.config.schema import RunConfig
from tritter.core.expansions import ExpansionSpec, MoeAdd
from tritter.core.models import read_model
from tritter.data.options import TextSources
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.pipeline import run_branch
from tritter.pipeline.run import Run
from tritter.pipeline.stages.baseline import check_source, run_baseline
from tritter.pipeline.summary import moe_record
from tritter.pipeline.verdict import Candidate
from tritter.report.summary import MoeRecord
from tritter.storage.atomic import atomic_folder
from tritter.storage.reading import named_path
from tritter.terminal import Console
from tritter.transform import PlannedExpansion
from tritter.transform.folder import child_lineage

_BRANCH = "adapted"
_MAX_SEQUENCE_LENGTH = 256
_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainExpansion:
    """Result of an expansion for a domain.

    Args:
        plan: the expansions with their parameter maps.
        lineage: lineage of the checkpoint as written.
        scores: `before` and `after` → domain → record, as in summary.json.
        experts: expert usage by domain, as in summary.json.
    """

    plan: PlannedExpansion
    lineage: Lineage
    scores: dict[str, dict[str, Any]]
    experts: MoeRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainTask:
    """The training task of new experts for a domain.

    Args:
        new: domain → paths of its data.
        old: domain → paths of old data for `replay`. If empty, replay uses the data recorded in the
            checkpoint's lineage, if any.
        steps: training steps of the new experts; the routers have their own.
        learning_rate: peak learning rate.
        seed: random seed.
    """

    new: TextSources
    old: TextSources
    steps: int
    learning_rate: float
    seed: int

    def expand(
        self,
        source: Path,
        destination: Path,
        specs: Sequence[ExpansionSpec],
        *,
        console: Console,
        overwrite: bool = False,
    ) -> DomainExpansion:
        """Add experts to a checkpoint and train them; nothing is written if that fails."""
        teachers = [spec.teacher for spec in specs if isinstance(spec, MoeAdd) and spec.teacher]
        key = "expansion.moe_add.teacher"
        sources = [source, *(named_path(teacher, key=key) for teacher in teachers)]
        check_output(destination, sources=sources, overwrite=overwrite)
        parent = next(folder for folder in destination.absolute().parents if folder.is_dir())
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=parent) as name:
            folder = Path(name)
            config = replace(self._config(source, folder), expansion=tuple(specs))
            run = Run(config=config, folder=folder, console=console, ledger=Ledger(folder))
            branch = Branch(_BRANCH, config.expansion)
            check_source(run)
            initial_checkpoint = run.data.initial_checkpoint
            assert initial_checkpoint is not None
            run.data.check_text()
            for note in run.notes:
                run.say("data", note)
            run_baseline(run)
            # Refuses a changed source: not after training, whose result would be lost
            of_source = child_lineage(initial_checkpoint, destination, ())
            branch = run_branch(run, branch)
            Candidate(run, (branch,)).publish(keep=True)
            used = moe_record(run, (branch,))
            assert used is not None
            plan = run.planned(branch)
            domains = " and ".join(run.data.new_domains_of(branch))  # those in the run may differ
            trained = f"on {domains}: {used.router_steps} router steps, {self.steps} steps of the "
            trained += "new experts; open to all tokens"
            steps = [  # replace the planned steps in the notes by the result
                replace(step, notes=(step.notes[0], trained))
                if isinstance(step.spec, MoeAdd)
                else step
                for step in plan.steps
            ]
            plan = replace(plan, steps=tuple(steps))
            scores = {
                "before": run.read_scores("baseline").records(),
                "after": run.read_scores(f"{_BRANCH}-trained").records(),
            }
            check = check_replaceable
            with atomic_folder(destination, overwrite=overwrite, check=check) as temporary:
                shutil.copytree(folder / "checkpoint", temporary, dirs_exist_ok=True)
                # The parent is the source, because the stage folders are temporary
                made = run.source("checkpoint")
                adopted = replace(
                    made.own_lineage,
                    parent_hash=of_source.parent_hash,
                    parent_path=of_source.parent_path,
                    parent_tensor_digests=of_source.parent_tensor_digests,
                    parent_file_digests=of_source.parent_file_digests,
                )
                lineage = write_lineage(temporary, adopted, made.config)
            return DomainExpansion(plan=plan, lineage=lineage, scores=scores, experts=used)

    def _config(self, source: Path, folder: Path) -> RunConfig:
        """Return the run configuration of the task; its caches are in `folder`."""
        limit = read_model(source).position_limit or _MAX_SEQUENCE_LENGTH
        settings = {
            "model": "hf",
            "model.path": quote(str(source.resolve())),
            "expansion": "none",
            "data": "text",
            "data.new": nested_value(self.new),
            "data.old": nested_value(self.old) if self.old else "null",
            "data.sequence_length": min(limit, _MAX_SEQUENCE_LENGTH),
            "data.batch_size": _BATCH_SIZE,
            "forgetting": "none",
            "gate": "'off'",
            "logger": "csv",
            "training.max_steps": self.steps,
            "training.learning_rate": self.learning_rate,
            "evaluation.sample_tokens": 0,
            "evaluation.every_n_steps": 0,
            "seed": self.seed,
            "cache_dir": quote(str(folder / "cache")),
        }
        config = load_config([f"{key}={value}" for key, value in settings.items()])
        # Replay old data if there is any
        if not config.text.old:
            return config
        settings["forgetting"] = "replay"
        return load_config([f"{key}={value}" for key, value in settings.items()])

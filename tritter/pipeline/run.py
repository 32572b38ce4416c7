"""The run that every stage gets: config, run folder, checkpoints, data and console."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from json import dumps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import nn

from tritter.checkpoints import Lineage, Source
from tritter.checkpoints.history import Link
from tritter.checkpoints.location import checkpoint_model
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.core.expansions import target_model
from tritter.core.families import SIGMOID_ROUTERS
from tritter.core.models import load_model, read_model
from tritter.data.answers import TrainingCounts, scoring_note
from tritter.data.datasets import DatasetName
from tritter.data.packing import padding_fraction
from tritter.data.sources import skipped_note
from tritter.errors import RequestError, TritterError, key_name
from tritter.evaluation.statistics import score_file
from tritter.methods.forgetting import needs_of
from tritter.methods.whole import load_whole
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import Ledger, StageResult
from tritter.pipeline.run_data import RunData
from tritter.pipeline.scoring import Scores
from tritter.planning.run_memory import RunMemory
from tritter.planning.upcycling import upcycling_notes
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.storage.atomic import remove_folder, write_text_atomic
from tritter.storage.hub import locate
from tritter.storage.reading import LINEAGE_NAME, TOKENIZER_NAME
from tritter.terminal import Console, NewBar, waiting
from tritter.training.options import rate_notes
from tritter.transform import Expanded, PlannedExpansion, expand, planned

_PUBLISHED_DTYPES = ("float32", "bfloat16", "float16")
_MUCH_PADDING, _SMALL_SHARE = 0.1, 0.05
# Later stages read them: shapes, lineage, and the tokenizer of an expanded vocabulary
_RECORDS = {"config.json", LINEAGE_NAME, "router.json", "tokenizer.json", "tokenizer_config.json"}
_RECORDS |= {"special_tokens_map.json", "generation_config.json"}
_BEFORE_FIT = ("expanded", "distilled", "adapted")


@dataclass(frozen=True)
class Run:
    """A run with configuration `config` in `folder`, or one of its attempts.

    Args:
        config: validated configuration.
        folder: run folder.
        console: console for output.
        ledger: results of finished stages.
        wandb_loggers: part → logger of its open W&B run, shared by all attempts.
        loggers: loggers of the branch that is training.
        sources: folder, relative to the run folder → opened checkpoint.
        other_data: the data if it is not that of `config`, as in another attempt.
    """

    config: RunConfig
    folder: Path
    console: Console
    ledger: Ledger
    wandb_loggers: dict[str | None, WandbLogger] = field(default_factory=dict, repr=False)
    loggers: list[Logger] = field(default_factory=list, repr=False, compare=False)
    sources: dict[str, Source] = field(default_factory=dict, repr=False, compare=False)
    other_data: RunData | None = field(default=None, repr=False, compare=False)
    _planned: dict[tuple[object, ...], PlannedExpansion] = field(
        default_factory=dict, repr=False, compare=False
    )

    def of_attempt(self, number: int) -> "Run":
        """Return an attempt, numbered from 1: the run with its configuration."""
        return replace(self, config=self.config.attempts[number - 1], other_data=self.data)

    def reading(self, location: str) -> "Run":
        """Return the run with the data as one of its checkpoints reads it.

        It is this run, unless an expansion changed the tokenizer or the context length.
        """
        sources = [self.source(each) for each in ("baseline", location)]
        lengths = [each.model.position_limit for each in sources]
        digests = [each.own_lineage.file_digests[TOKENIZER_NAME] for each in sources]
        data = self.data.reading(
            None if lengths[0] == lengths[1] else lengths[1],
            tokenizer=None if digests[0] == digests[1] else sources[1],
        )
        return self if data is self.data else replace(self, other_data=data)

    @cached_property
    def data(self) -> RunData:
        """The data of the run."""
        model, start = self.config.model, None
        if self.other_data is not None:
            return self.other_data
        if self.ledger.get("baseline") is not None and isinstance(model, CheckpointModelConfig):
            start = self.source("baseline")
        elif isinstance(model, CheckpointModelConfig):
            folder = locate(model.path, key="model.path")
            checkpoint_model(str(folder), with_experts=True)
            try:
                start = Source(folder, read_model(folder), Lineage.read(folder))
            except TritterError as error:
                raise RequestError(f"{key_name('model.path')}: {error}") from error
        return RunData(self.config, start)

    @property
    def _dense_tokens(self) -> float | None:
        """The training tokens of the model that the run starts from, if they are known."""
        config = self.config
        if config.model.model_type == "hf":
            start = self.data.initial_checkpoint
            lineage = None if start is None else start.lineage
            return None if lineage is None else lineage.pretraining_tokens
        return float(
            config.pretraining.max_steps
            * config.trainer.accumulate_grad_batches
            * config.data.batch_size
            * config.data.sequence_length
        )

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Notes on the inputs of the run, a sentence each."""
        data, source = self.data, self.data.model
        # Skipped files of each domain
        domains = data.text.domains.items()
        notes = [skipped_note(name, each.paths, key=each.key) for name, each in domains]
        notes += [*data.text.notes, *data.corpus.notes]
        notes += [
            f"{name} is streamed: training reads all of it, everything else its first "
            f"{DatasetName.HEAD_ROWS:,} rows."
            for name in data.streams
        ]
        if data.packing == "documents":
            notes += _packing_notes(data)
        notes += _scored_notes(data)
        notes += _share_notes(self.config, data.num_sequences, data.streams)
        optimizer = self.config.optimizer.target.rpartition(".")[2]
        if optimizer.startswith("Paged") and self.device.type == "cpu":
            same = optimizer.removeprefix("Paged")
            notes.append(f"There is no paging on the CPU: {optimizer} is equivalent to {same}.")
        notes += [data.source_tokenizer.note] if data.source_tokenizer else []
        notes += [self.config.rate_note]
        notes += [*RunMemory(self.config, source).notes(), *rate_notes(self.config, source)]
        notes += upcycling_notes(self.config, source, self._dense_tokens)
        return tuple(filter(None, notes))

    @cached_property
    def published_dtype(self) -> str:
        """The dtype of the published weights; requires the baseline stage."""
        dtype = self.config.pipeline.dtype
        if dtype != "source" or self.data.initial_checkpoint is None:
            return "float32" if dtype == "source" else dtype
        found = self.source("baseline").tensors.main_dtype
        return found if found in _PUBLISHED_DTYPES else "float32"

    @property
    def has_unsaved_bias(self) -> bool:
        """Whether training moves a selection bias of routers that checkpoints lack."""
        config = self.config
        if not config.moe_routing.bias_update_rate:
            return False
        return target_model(self.data.model, config.expansion).model_type not in SIGMOID_ROUTERS

    @cached_property
    def device(self) -> torch.device:
        """The device for evaluation."""
        wants_gpu = self.config.trainer.accelerator in ("gpu", "auto")
        return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")

    def seed(self, *purpose: str) -> int:
        """Return the seed for one purpose, such as data order, growth or replay."""
        return derived_seed(self.config.seed, *purpose)

    def stage(self, key: str, work: Callable[[], StageResult], *, label: str) -> None:
        """Run a stage and record its result, unless the ledger has it.

        Args:
            key: name in the ledger.
            work: runs the stage.
            label: name in reports, to which remaining time is assigned.
        """
        if self.ledger.get(key) is not None:
            self.say(label, "already finished")
            return
        since = time.perf_counter()
        try:
            result = work()
        except Stopped as stopped:
            stopped.location = stopped.location or f"during {key}, which will restart"
            raise
        elapsed = time.perf_counter() - since - sum(result.seconds.values())
        seconds = {**result.seconds, label: elapsed + result.seconds.get(label, 0.0)}
        result = replace(result, seconds=seconds)
        lineages = {
            location: s.lineage for location, s in self.sources.items() if s.lineage is not None
        }
        self.ledger.record(key, result, lineages=lineages)

    def source(self, location: str) -> Source:
        """Return a verified checkpoint of the run folder."""
        if location not in self.sources:
            self.register(location, Lineage.of(self.folder / location))
        return self.sources[location]

    def register(self, location: str, lineage: Lineage) -> Source:
        """Register a checkpoint that was just written to the run folder."""
        folder = self.folder / location
        model = read_model(folder, ffn_sizes=list(lineage.ffn_sizes))
        self.sources[location] = Source.written(folder, model, lineage)
        return self.sources[location]

    def accept(self, location: str) -> None:
        """Verify and register the checkpoint that a training run wrote."""
        self.check_trained(self.folder / location)
        self.register(location, Lineage.of(self.folder / location))

    def check_trained(self, folder: Path) -> None:
        """Verify the checksums of a checkpoint written by several processes."""
        if self.config.trainer.devices == 1:
            return
        if (problem := next(Link.of(folder).changes(), None)) is not None:
            raise TritterError(f"the trained checkpoint is damaged: {problem}")

    def load(self, location: str, *, with_experts: bool = False) -> nn.Module:
        """Load a checkpoint of the run folder in float32 on the CPU.

        Its attention separates documents if the data of the run is packed so.

        Args:
            location: folder, relative to the run folder.
            with_experts: with its LoRA experts, if it has any, on a base that is quantised as in
                their training.
        """
        source = self.source(location)
        load = load_whole if with_experts else load_model
        return self.data.masked(load(source.folder, model=source.model))

    def planned(self, branch: Branch) -> PlannedExpansion:
        """Return the planned expansions of a branch; parameter maps are built once."""
        key = (branch.start, branch.specs, branch.purpose)
        if key not in self._planned:
            seed = self.seed("expansion", *branch.purpose)
            self._planned[key] = planned(self.source(branch.start), branch.specs, seed=seed)
        return self._planned[key]

    def write_expanded(self, branch: Branch, folder: Path) -> Expanded:
        """Expand the initial checkpoint of a branch into a folder."""
        # In float32 for any source dtype: rounding would break function preservation
        with self.progress_bars() as new_bar:
            return expand(
                self.source(branch.start),
                folder,
                self.planned(branch),
                dtype=torch.float32,
                overwrite=True,
                progress=new_bar("writing tensors of the grown model"),
            )

    def remove(self, *locations: str) -> None:
        """Remove stage folders that no later stage needs, unless `pipeline.keep_stages` is set.

        A checkpoint loses its weights, state and tokenizer; its records stay, because `history` and
        later stages read them. The ledger is marked first: after a kill the removal is repeated.
        """
        if self.config.pipeline.keep_stages:
            return
        for location in locations:
            if (folder := self.folder / location).is_dir():
                self.ledger.mark_removed(location)
                _strip(folder)

    @property
    def keeps_start(self) -> bool:
        """Whether stages from outside may read the start of a training after it."""
        return any(one.kind.after in ("fit", "evaluate") for one in self.config.stages)

    def remove_before_fit(self, branch: Branch) -> None:
        """Remove the start of a branch's training, once the trained model is verified."""
        remove_folder(self.folder / branch.expanded_again)
        own = (one.name for one in self.config.stages if one.kind.writes)
        self.remove(*(f"{branch.name}/{name}" for name in (*_BEFORE_FIT, *own)))
        if branch.task:
            self.remove(branch.start)

    def say(self, label: str, text: str) -> None:
        """Print one line of progress."""
        self.console.print(f"{label:<10} {text}", highlight=False, markup=False, soft_wrap=True)

    def progress_bars(self) -> AbstractContextManager[NewBar]:
        """Return progress bars, shown under the same conditions as those of training."""
        return self.console.progress_bars(self.config.trainer.progress)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show a bar without a count while the block lasts."""
        with self.progress_bars() as new_bar, waiting(new_bar, label):
            yield

    def score(self, model: nn.Module, name: str) -> Scores:
        """Score a model, move it to the CPU, and store the result in a file."""
        with self.progress_bars() as new_bar:
            scores = self.data.scoring.score(model.to(self.device), new_bar=new_bar)
        model.to("cpu")
        write_text_atomic(self.folder / score_file(name), dumps(scores.plain()))
        self.say("", scores.text())
        return scores

    def read_scores(self, name: str) -> Scores:
        """Return the scores that `score` stored under a name."""
        return self.data.scoring.read(self.folder / score_file(name))


def _strip(folder: Path) -> None:
    """Remove everything except a checkpoint's records; remove other folders completely."""
    if not (folder / LINEAGE_NAME).is_file():
        shutil.rmtree(folder)
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_dir() and path.name not in _RECORDS:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _packing_notes(data: RunData) -> Iterator[str]:
    """Yield notes on whole documents in sequences: what is cut, unscored or padding."""
    length, limit = data.sequence_length, data.config.evaluation.max_tokens_per_document
    text: dict[str, Any] = {"sequence_length": length, "bounds": data.bounds}
    for name, domain in data.corpus.domains.items():
        counts = TrainingCounts.of(domain.train, **text)
        rows = "of the first rows" if name in data.streams else ""
        is_read = _is_read(data.config, name)
        if is_read:
            yield counts.note(name, sequence_length=length, rows=rows)
        yield scoring_note(name, data.scored[name], sequence_length=length, max_tokens=limit)
        if not is_read or not domain.train.num_tokens:
            continue
        share = padding_fraction(domain.train, **text)
        longer = padding_fraction(domain.train, **{**text, "sequence_length": 2 * length})
        if _MUCH_PADDING < share < 1:  # 1: no document can be trained on, as noted above
            yield (
                f"{name}: {share:.0%} of the training sequences is padding, because its "
                f"documents are shorter than {length} tokens; "
                f"data.sequence_length={2 * length} gives {longer:.0%}."
            )


def _is_read(config: RunConfig, domain: str) -> bool:
    """Return whether a run reads training documents of a domain; some old ones are only scored."""
    needs_old = any(needs.old_text for needs in needs_of(config.forgetting))
    is_old = domain in config.text.old and domain not in config.text.new
    return not is_old or needs_old or bool(config.experts) or config.model.model_type != "hf"


def _scored_notes(data: RunData) -> Iterator[str]:
    """Yield a note on each domain of which not all held-out documents are scored."""
    why = ", in proportion to the training" if data.config.evaluation.max_documents is None else ""
    for name, documents in data.scored.items():
        total = len(data.corpus.domains[name].validation)
        if len(documents) < total:
            yield (
                f"{name}: scores read {len(documents):,} of {total:,} held-out documents{why}; "
                f"evaluation.max_documents={total} reads all."
            )


def _share_notes(
    config: RunConfig, num_sequences: Callable[[str], int], streams: Collection[str]
) -> Iterator[str]:
    """Yield a note on each new domain that few of its task's training sequences come from."""
    read = config.training.max_steps * config.trainer.accumulate_grad_batches
    read *= config.data.batch_size
    weights = getattr(config.data, "weights", None) or {}
    for task in config.text.tasks:
        if any(name in streams or name in weights for name in task):
            continue
        sizes = {name: num_sequences(name) for name in task}
        for name, size in sizes.items():
            if (share := size / sum(sizes.values())) < _SMALL_SHARE:
                yield (
                    f"{name}: {share:.1%} of the new training sequences, at most about "
                    f"{share * read:,.0f} of the {read:,} that its task reads; "
                    f"data.weights={{{name}:1}} gives all domains equal shares."
                )

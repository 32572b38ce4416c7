"""The shared context of all stages: config, run folder, data and console."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from tritter.checkpoints import Lineage, Source, lineage_of, read_lineage
from tritter.checkpoints.location import checkpoint_model
from tritter.checkpoints.record import LearnedDomain, recorded_tokens
from tritter.checkpoints.run_text import DomainText, RunText, recorded_chat, run_text
from tritter.config.derived import scored_counts, validation_tokens
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.config.validation import known_model
from tritter.core.families import Flops, Model
from tritter.core.models import load_tokenizer, read_model
from tritter.data.batches import BatchStream, Sequences, SequenceStream, sample_equally
from tritter.data.built_in import built_in_origin, is_built_in, questions_of
from tritter.data.chat import (
    LOSS_KEY,
    NONE,
    TEMPLATE_KEY,
    Chat,
    ChatChoice,
    chat_of,
    is_unpredicted,
)
from tritter.data.conversations import NO_ANSWERS
from tritter.data.corpus import Corpus, build_corpus, stdlib_corpus
from tritter.data.datamodule import ValidationSubset
from tritter.data.datasets import HEAD_ROWS, DatasetName, dataset_names
from tritter.data.documents import Documents
from tritter.data.local_files import TextFileError
from tritter.data.options import NamedTextConfig
from tritter.data.packing import (
    DocumentMask,
    MarkedText,
    Packing,
    num_packed,
    packed,
    read_marks,
)
from tritter.data.replay import ReplayBuffer
from tritter.data.sources import find_texts, source_documents
from tritter.data.stream import SequenceOptions, StreamedSequences
from tritter.data.tokens import (
    END_OF_TEXT,
    PretrainedTokenizer,
    TextBounds,
    TokenisedDocuments,
    concatenate,
    copy_backend,
    read_tokenizer,
)
from tritter.errors import Problem, RequestError, TritterError, key_name
from tritter.evaluation.losses import batch_that_fits
from tritter.evaluation.statistics import score_file
from tritter.evaluation.tasks import MetricTask, QuestionTask, Reader, ScoredTask, subject_of
from tritter.limits import MAX_VOCABULARY
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import Ledger, StageResult
from tritter.pipeline.notes import packing_notes, scored_notes, share_notes
from tritter.pipeline.scoring import (
    Scores,
    Scoring,
    benchmark_tasks,
    scores_text,
    stock_tokenizer,
)
from tritter.planning.run_memory import batch_size_at, memory_notes
from tritter.planning.upcycling import upcycling_notes
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.storage.atomic import write_text_atomic
from tritter.storage.hub import locate
from tritter.targets import dotted, instantiate
from tritter.terminal import Console, NewBar, progress_bars, waiting
from tritter.training.options import rate_notes
from tritter.transform import PlannedExpansion, planned

MAX_POSITIONS = 2048  # for a model without position limit
_PUBLISHED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunContext:
    """The context of a run with configuration `config` in `folder`.

    Args:
        config: validated configuration.
        folder: run folder.
        console: console for output.
        ledger: results of finished stages.
        wandb_loggers: part → logger of its open W&B run, shared by all attempts.
        sources: folder, relative to the run folder → opened checkpoint.
        original: of a context for another tokenizer: the context of the run's own.
        tokenizer_folder: checkpoint with that tokenizer.
        short: of a context for a longer model: the context with the sequences of its source, in
            which models are scored.
        first: of a context for another attempt: the context of the first one.
    """

    config: RunConfig
    folder: Path
    console: Console
    ledger: Ledger
    wandb_loggers: dict[str | None, WandbLogger] = field(default_factory=dict, repr=False)
    sources: dict[str, Source] = field(default_factory=dict, repr=False, compare=False)
    original: "RunContext | None" = field(default=None, repr=False, compare=False)
    tokenizer_folder: Path | None = None
    short: "RunContext | None" = field(default=None, repr=False, compare=False)
    first: "RunContext | None" = field(default=None, repr=False, compare=False)
    _readings: dict[str, "RunContext"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _planned: dict[Branch, PlannedExpansion] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _packed: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def of_attempt(self, number: int) -> "RunContext":
        """Return the context of an attempt, numbered from 1, with its configuration."""
        if number == 1:
            return self
        other = replace(self, config=self.config.attempts[number - 1], first=self)
        known = {name: value for name, value in vars(self).items() if name not in vars(other)}
        vars(other).update(known)  # cached data, shared by all attempts
        return other

    def reading(self, location: str) -> "RunContext":
        """Return the context in which a checkpoint of the run reads the data.

        It is this context, unless an expansion changed the tokenizer or the context length.
        Validation documents keep their bytes, so that scores per byte are paired.
        """
        own = self.short or self
        own = own.original or own
        sources = [self.source(each) for each in ("baseline", location)]
        lengths = [each.model.position_limit for each in sources]
        found = own._with_tokens_of(location)
        if lengths[0] == lengths[1] or lengths[1] is None:
            return found
        return found.at_length(lengths[1])

    def at_length(self, length: int) -> "RunContext":
        """Return the context for training on longer sequences, with about as many tokens per batch.

        Validation documents are cut at that length at least.
        """
        key = f"length {length}"
        if key not in self._readings:
            config, factor = self.config, length / self.config.data.sequence_length
            data = replace(
                config.data,
                sequence_length=length,
                batch_size=batch_size_at(length, config),
            )
            evaluation = replace(
                config.evaluation,
                batch_size=max(1, round(config.evaluation.batch_size / factor)),
                max_tokens_per_document=max(length, config.evaluation.max_tokens_per_document),
            )
            config = replace(config, data=data, evaluation=evaluation)
            other = replace(self, config=config, short=self)
            known = {name: vars(self)[name] for name in _OF_ANY_TOKENIZER if name in vars(self)}
            vars(other).update(known, _planned=self._planned)
            self._readings[key] = other
        return self._readings[key]

    def _with_tokens_of(self, location: str) -> "RunContext":
        """Return this context with the tokenizer of a checkpoint."""
        own = self
        digests = [
            self.source(each).own_lineage.file_digests[TOKENIZER_NAME]
            for each in ("baseline", location)
        ]
        if digests[0] == digests[1]:
            return own
        if digests[1] not in own._readings:
            other = replace(own, original=own, tokenizer_folder=self.source(location).folder)
            known = {name: vars(own)[name] for name in _OF_ANY_TOKENIZER if name in vars(own)}
            vars(other).update(known, _planned=own._planned)
            own._readings[digests[1]] = other
        return own._readings[digests[1]]

    @property
    def old_domains(self) -> tuple[str, ...]:
        return self.text.old

    @property
    def new_domains(self) -> tuple[str, ...]:
        return self.text.new

    def new_domains_of(self, branch: Branch) -> tuple[str, ...]:
        """Return the domains of a branch's task."""
        return self.text.tasks[branch.task]

    def old_domains_of(self, branch: Branch) -> tuple[str, ...]:
        """Return the domains to retain: the old domains, and those of earlier tasks."""
        earlier = [*self.old_domains, *chain.from_iterable(self.text.tasks[: branch.task])]
        return tuple(
            dict.fromkeys(name for name in earlier if name not in self.new_domains_of(branch))
        )

    @cached_property
    def initial_checkpoint(self) -> Source | None:
        """The initial checkpoint of the run; None if it pretrains a base model.

        Raises:
            RequestError: the checkpoint can't be opened.
        """
        model = self.config.model
        if not isinstance(model, CheckpointModelConfig):
            return None
        if self.ledger.get("baseline") is not None:
            return self.source("baseline")
        folder = locate(model.path, key="model.path")
        checkpoint_model(str(folder), with_experts=True)
        try:
            return Source(folder, read_model(folder), read_lineage(folder))
        except TritterError as error:
            raise RequestError(f"{key_name('model.path')}: {error}") from error

    @cached_property
    def model(self) -> Model:
        """The model that the run starts from."""
        if self.initial_checkpoint is not None:
            return self.initial_checkpoint.model
        model = known_model(self.config)
        assert model is not None  # only that of a Hub id is unknown, which is a checkpoint
        return model

    @cached_property
    def text(self) -> RunText:
        """The run's domains; those of a Hub checkpoint are known once it is downloaded."""
        config = self.config
        if self.initial_checkpoint is None or Path(config.model.path).is_dir():  # type: ignore[union-attr]
            return config.text
        return run_text(str(self.initial_checkpoint.folder), config.data, seed=config.seed)

    @cached_property
    def source_tokenizer(self) -> PretrainedTokenizer | None:
        """The tokenizer of the initial checkpoint, if any, or after an expansion."""
        if self.tokenizer_folder is not None:
            return read_tokenizer(self.tokenizer_folder, vocab_size=MAX_VOCABULARY)
        if self.initial_checkpoint is None:
            return None
        vocab_size = self.initial_checkpoint.model.sizes.vocab_size
        return read_tokenizer(self.initial_checkpoint.folder, vocab_size=vocab_size)

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenised domains; without a checkpoint, a tokenizer is trained on them.

        Raises:
            TextFileError: files can't be parsed.
            RequestError: a domain is too small, or the cache is not writable.
        """
        config, split, tokenizer = self.config, self.text.split, self.source_tokenizer
        settings: dict[str, Any] = {
            "vocab_size": config.data.vocab_size,
            "validation_fraction": split.validation_fraction,
            "max_validation_tokens_per_document": config.evaluation.max_tokens_per_document,
            "seed": split.seed,
            "cache_dir": config.cache_dir,
            "tokenizer": tokenizer.tokenizer if tokenizer else None,
        }
        if self.original is not None:
            original, length = self.original, config.data.sequence_length
            before = (original.at_length(length) if self.short else original).corpus.domains.items()
            settings["validation_bytes"] = {n: each.validation.num_bytes for n, each in before}
        domains = self.text.domains
        # Only the embedded corpus has an index in the cache
        if [(domain.name, domain.paths) for domain in domains] == _STDLIB_DOMAINS:
            return stdlib_corpus(**settings)
        origin = {domain.name: _origin(domain, config) for domain in domains}
        documents = all_documents(domains)
        folder = None if self.initial_checkpoint is None else self.initial_checkpoint.folder
        is_chat = any(each.num_conversations() for each in documents.values())
        chat = corpus_chat(is_chat, self.chat_choice, folder)
        corpus = build_corpus(documents, origin=origin, chat=chat, **settings)
        for domain in domains:
            found = corpus.domains[domain.name]
            for side in (found.train, found.validation):
                if side.has_marks and bool(is_unpredicted(side.tokens).all()):
                    reason = f"its conversations have {NO_ANSWERS}"
                    raise RequestError(Problem(domain.key, list(domain.paths), reason=reason))
        return corpus

    @property
    def chat_choice(self) -> ChatChoice:
        """The chat options of the run; those that are null are as in the checkpoint's lineage."""
        data, start = self.config.data, self.initial_checkpoint
        recorded = recorded_chat(None if start is None else start.lineage)
        return ChatChoice(
            data.chat_template or recorded.chat_template, data.loss_on or recorded.loss_on
        )

    @cached_property
    def packing(self) -> Packing:
        """The packing of the run's sequences.

        Raises:
            RequestError: conversations need `documents`, which the model or the user rules out.
        """
        domains, choice = self.corpus.domains.values(), self.config.data.packing
        has_marks = any(side.has_marks for d in domains for side in (d.train, d.validation))
        plain = "conversations are plain text with data.chat_template=none data.loss_on=all"
        if has_marks and choice == "stream":
            reason = f"attention would cross conversations; remove the key ({plain})"
            raise RequestError(Problem("data.packing", choice, reason=reason))
        if choice is None:
            is_kept = self.text.kept_sequences.of_documents
            choice = "documents" if has_marks or is_kept else "stream"
        source = self.model
        if choice == "documents" and not source.separates_documents:
            reason = f"a token of {source.model_type} depends on earlier documents; {plain}"
            raise RequestError(Problem("data.packing", self.config.data.packing, reason=reason))
        return choice

    @property
    def _dense_tokens(self) -> float | None:
        """The training tokens of the model that the run starts from, if they are known."""
        config = self.config
        if config.model.model_type == "hf":
            start = self.initial_checkpoint
            return None if start is None else recorded_tokens(start.lineage)
        return float(
            config.pretraining.max_steps
            * config.trainer.accumulate_grad_batches
            * config.data.batch_size
            * config.data.sequence_length
        )

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Notes on the inputs of the run, a sentence each."""
        source = self.model
        # Skipped files of each domain
        notes = [find_texts(each.key, each.paths).note(each.name) for each in self.text.domains]
        notes += [*self.text.notes, *self.corpus.notes]
        notes += [
            f"{name} is streamed: training reads all of it, everything else its first "
            f"{HEAD_ROWS:,} rows."
            for name in self.streams
        ]
        if self.packing == "documents":
            notes += packing_notes(
                self.config, self.corpus, self.scored, self.streams, bounds=self.bounds
            )
        notes += scored_notes(self.config, self.corpus, self.scored)
        notes += share_notes(self.config, self.num_sequences, self.streams)
        optimizer = self.config.optimizer.target.rpartition(".")[2]
        if optimizer.startswith("Paged") and self.device.type == "cpu":
            same = optimizer.removeprefix("Paged")
            notes.append(f"There is no paging on the CPU: {optimizer} is equivalent to {same}.")
        notes += [self.source_tokenizer.note] if self.source_tokenizer else []
        notes += [self.config.rate_note]
        notes += [*memory_notes(self.config, source), *rate_notes(self.config, source)]
        notes += upcycling_notes(self.config, source, self._dense_tokens)
        return tuple(filter(None, notes))

    @cached_property
    def published_dtype(self) -> str:
        """The dtype of the published weights; requires the baseline stage."""
        dtype = self.config.pipeline.dtype
        if dtype != "source" or self.initial_checkpoint is None:
            return "float32" if dtype == "source" else dtype
        found = self.source("baseline").tensors.main_dtype
        return found if found in _PUBLISHED_DTYPES else "float32"

    @property
    def domains(self) -> tuple[str, ...]:
        """Old and new domains."""
        return (*self.old_domains, *self.new_domains)

    @property
    def bounds(self) -> TextBounds:
        """The start and the end of a text."""
        if self.source_tokenizer is not None:
            return self.source_tokenizer.bounds
        end = self.corpus.tokenizer.token_to_id(END_OF_TEXT)
        assert end is not None
        return TextBounds(end)

    @cached_property
    def device(self) -> torch.device:
        """The device for evaluation."""
        wants_gpu = self.config.trainer.accelerator in ("gpu", "auto")
        return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")

    def seed(self, *purpose: str) -> int:
        """Return the seed for one purpose, such as data order, growth or replay."""
        return derived_seed(self.config.seed, *purpose)

    def stage(self, key: str, work: Callable[[], StageResult], *, label: str) -> StageResult:
        """Run a stage, or return its result from the ledger.

        Args:
            key: name in the ledger.
            work: runs the stage.
            label: name in reports, to which remaining time is assigned.
        """
        done = self.ledger.get(key)
        if done is not None:
            self.say(label, "already finished")
            return done
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
        return result

    def source(self, location: str) -> Source:
        """Return a verified checkpoint of the run folder."""
        if location not in self.sources:
            self.register(location, lineage_of(self.folder / location))
        return self.sources[location]

    def register(self, location: str, lineage: Lineage) -> Source:
        """Register a checkpoint that was just written to the run folder."""
        folder = self.folder / location
        model = read_model(folder, ffn_sizes=list(lineage.ffn_sizes))
        self.sources[location] = Source.written(folder, model, lineage)
        return self.sources[location]

    def planned(self, branch: Branch) -> PlannedExpansion:
        """Return the planned expansions of a branch; parameter maps are built once."""
        if branch not in self._planned:
            seed = self.seed("expansion", *branch.purpose)
            self._planned[branch] = planned(self.source(branch.start), branch.specs, seed=seed)
        return self._planned[branch]

    def say(self, label: str, text: str) -> None:
        """Print one line of progress."""
        self.console.print(f"{label:<11}{text}", highlight=False, markup=False, soft_wrap=True)

    def progress_bars(self) -> AbstractContextManager[NewBar]:
        """Return progress bars, shown under the same conditions as those of training."""
        return progress_bars(self.console, mode=self.config.trainer.progress)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show a bar without a count while the block lasts."""
        with self.progress_bars() as new_bar, waiting(new_bar, label):
            yield

    def training_sequences(self, domains: Sequence[str]) -> dict[str, Tensor]:
        """Return domain → packed training sequences [N, T]."""
        for name in domains:
            if name not in self._packed:
                self._packed[name] = packed(
                    self.corpus.domains[name].train,
                    packing=self.packing,
                    sequence_length=self.config.data.sequence_length,
                    bounds=self.bounds,
                )
        return {name: self._packed[name] for name in domains}

    def num_sequences(self, domain: str) -> int:
        """Return the number of training sequences of a domain, without packing them.

        Raises:
            RequestError: the domain is too small for one sequence.
        """
        train, length = self.corpus.domains[domain].train, self.config.data.sequence_length
        try:
            return num_packed(
                train, packing=self.packing, sequence_length=length, bounds=self.bounds
            )
        except RequestError as error:
            raise RequestError(f"{error} (Domain {domain}.)") from error

    @property
    def document_mask(self) -> DocumentMask | None:
        """The mask between documents of a training sequence; None to treat them as one stream."""
        is_masked = self.packing == "documents"
        return DocumentMask(self.bounds) if is_masked else None

    @property
    def marks(self) -> MarkedText | None:
        """How models read marked training sequences; None if these have no marks."""
        return self.document_mask or (MarkedText(self.bounds) if self.bounds.start else None)

    def masked(self, model: nn.Module) -> nn.Module:
        """Return a model that reads the run's training sequences, with their document mask."""
        return model if self.marks is None else read_marks(model, self.marks)

    def sample_equally(self, domains: Sequence[str], count: int, *purpose: str) -> Tensor:
        """Return `count` random training sequences [N, T], equally many per domain.

        Domains with fewer sequences contribute all of them.
        """
        sequences = self.training_sequences(domains)
        return sample_equally(sequences, count, seed=lambda name: self.seed(*purpose, name))

    def check_text(self) -> None:
        """Reject a domain that is too small, before any training.

        Raises:
            RequestError: names the domain.
        """
        for name in self.domains:
            self.num_sequences(name)

    def source_records(self, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the records of some domains in a checkpoint's lineage: hash and paths."""
        domain_of = {domain.name: domain for domain in self.text.domains}
        return {
            name: {
                **asdict(self.corpus.sources[name]),
                "paths": list(domain_of[name].recorded_paths),
                "text_field": domain_of[name].text_field,
            }
            for name in domains
        }

    def split_record(self) -> dict[str, Any]:
        """Return the settings that a later training run adopts, except the split."""
        data = self.config.data
        packing = {} if self.packing == "stream" else {"packing": self.packing}
        # A template file is part of the checkpoint
        choice = self.chat_choice
        chat = {"chat_template": NONE} if choice.chat_template == NONE else {}
        chat |= {"loss_on": "all"} if choice.loss_on == "all" else {}
        start = {_START: list(self.bounds.start)} if self.bounds.start else {}
        return {
            "data": {"sequence_length": data.sequence_length, **packing, **chat, **start},
            "seed": self.config.seed,
        }

    def learned(self, domains: Sequence[str]) -> dict[str, LearnedDomain]:
        """Return the learned domains of the lineage after training on some domains of the run."""
        domain_of = {domain.name: domain for domain in self.text.domains}
        records = {}
        for name in domains:
            source = asdict(self.corpus.sources[name])
            del source["name"]
            records[name] = LearnedDomain(
                **source,
                paths=domain_of[name].recorded_paths,
                text_field=domain_of[name].text_field,
            )
        return {**self.text.learned, **records}

    def batches(self, domains: Sequence[str], *, purpose: str, max_steps: int) -> BatchStream:
        """Return endless batches of some domains in a random order."""
        seed, data = self.seed("order", purpose), self.config.data
        # New domain → its weight within the task; empty to mix domains by size
        configured = (data.weights or {}) if isinstance(data, NamedTextConfig) else {}
        weights = {name: each for name, each in configured.items() if name in domains}
        streams: dict[str, Sequences] = {
            name: self._streamed(name, seed) for name in domains if name in self.streams
        }
        sequences = self.training_sequences([name for name in domains if name not in streams])
        stream: Sequences
        if weights or (streams and len(domains) > 1):
            for name, each in sequences.items():
                streams[name] = SequenceStream(each, seed=derived_seed(seed, "domain", name))
            stream = ReplayBuffer({name: streams[name] for name in domains}, weights=weights)
        elif streams:
            (stream,) = streams.values()
        else:
            stream = SequenceStream(concatenate(list(sequences.values())), seed=seed)
        gathered = self.config.trainer.accumulate_grad_batches
        return BatchStream(
            stream,
            batch_size=data.batch_size,
            num_batches=max_steps * gathered,
            window=1 if self.marks is None else gathered,
        )

    @cached_property
    def streams(self) -> dict[str, tuple[DatasetName, ...]]:
        """Trained domain → the data sets that are read while the model trains on it."""
        trains_old = self.initial_checkpoint is None  # a base model
        return {
            domain.name: domain.streams
            for domain in self.text.domains
            if domain.streams and (trains_old or not domain.is_old)
        }

    def _streamed(self, name: str, seed: int) -> StreamedSequences:
        """Return the training sequences of a streamed domain."""
        (domain,) = (each for each in self.text.domains if each.name == name)
        options = SequenceOptions(
            rule=self.text.split,
            tokenizer=copy_backend(self.corpus.tokenizer),  # for its thread
            chat=self.corpus.chat,
            packing=self.packing,
            sequence_length=self.config.data.sequence_length,
            bounds=self.bounds,
        )
        own = derived_seed(seed, "domain", name)
        return StreamedSequences(self.streams[name], key=domain.key, options=options, seed=own)

    @cached_property
    def validation_subset(self) -> ValidationSubset | None:
        """The validation subset for evaluation during training; None if it is switched off."""
        if self.short is not None:  # as the model before its expansion
            return self.short.validation_subset
        options = self.config.evaluation
        if not options.every_n_steps:
            return None
        max_tokens = validation_tokens(self.config, num_domains=len(self.domains))
        length = min(self.config.data.sequence_length, max_tokens)
        vocab_size = self.corpus.tokenizer.get_vocab_size()
        return ValidationSubset.of(
            {name: self.corpus.domains[name].validation for name in self.domains},
            every_n_steps=options.every_n_steps,
            max_tokens=max_tokens,
            sequence_length=length,
            bounds=self.bounds,
            batch_size=batch_that_fits(options.batch_size, length, vocab_size),
            seed=self.config.seed,
        )

    @cached_property
    def tasks(self) -> tuple[ScoredTask, ...]:
        """The tasks on which every model is scored, in addition to the losses."""
        options = self.config.evaluation
        number = options.task_questions
        questions = {d.name: questions_of(d.paths, number) for d in self.text.domains}
        skills = (
            QuestionTask(name, name, asked, self.corpus.chat)
            for name, asked in questions.items()
            if asked
        )
        length = self.model.position_limit or MAX_POSITIONS
        own = (
            MetricTask(one.name, instantiate(one.options), one.plain())
            for one in self.config.metrics
        )
        start = self.initial_checkpoint
        stock = None
        if options.tasks and start is not None:
            stock = stock_tokenizer(start.folder, self.chat_choice)
        return (*skills, *benchmark_tasks(options, positions=length, stock=stock), *own)

    @cached_property
    def scored(self) -> dict[str, TokenisedDocuments]:
        """Domain → its scored held-out documents, the same in all readings and attempts."""
        origin = self.short or self
        origin = origin.original or origin
        origin = origin.first or origin
        held_out = {name: origin.corpus.domains[name].validation for name in self.domains}
        sizes = {name: each.offsets.diff().tolist() for name, each in held_out.items()}
        counts = scored_counts(origin.config, sizes)
        return {n: self.corpus.domains[n].validation.first(counts[n]) for n in self.domains}

    @cached_property
    def scoring(self) -> Scoring:
        """The documents and tasks on which every model of the run is scored."""
        if self.short is not None:
            return self.short.scoring
        return Scoring(
            documents=self.scored,
            tasks=self.tasks,
            reader=Reader(
                tokenizer=self.corpus.tokenizer,
                bounds=self.bounds,
                batch_size=self.config.evaluation.batch_size,
            ),
            sequence_length=self.config.data.sequence_length,
        )

    def subjects_of(self, domains: Sequence[str | None]) -> list[str]:
        """Return the score names of some domains and their tasks; None selects other tasks."""
        return [
            subject
            for domain in domains
            for subject in (
                *filter(None, (domain,)),
                *(subject_of(task) for task in self.tasks if task.domain == domain),
            )
        ]

    def score(self, model: nn.Module, name: str) -> Scores:
        """Score a model, move it to the CPU, and store the result in a file."""
        with self.progress_bars() as new_bar:
            scores = self.scoring.score(model.to(self.device), new_bar=new_bar)
        model.to("cpu")
        content = dumps({subject: each.to_dict() for subject, each in scores.items()})
        write_text_atomic(self.folder / score_file(name), content)
        self.say("", scores_text(scores))
        return scores

    def read_scores(self, name: str) -> Scores:
        """Return the scores that `score` stored under a name."""
        return self.scoring.read(self.folder / score_file(name))

    def scoring_flops(self, reading: Flops) -> float:
        """Return the FLOPs of one scoring pass, given those of reading a sequence."""
        return self.scoring.flops(reading)


_START = "start_of_text"  # of a lineage: the ids in front of each training text
TOKENIZER_NAME = "tokenizer.json"
# Cached parts of a context that do not depend on the tokenizer
_OF_ANY_TOKENIZER = ("initial_checkpoint", "text", "packing", "published_dtype", "device", "tasks")
_FILES_ORIGIN, _DATASETS_ORIGIN = "text files", "data sets"
_STDLIB_DOMAINS = [("prose", ("stdlib:prose",)), ("code", ("stdlib:code",))]


def all_documents(domains: Iterable[DomainText]) -> dict[str, Documents]:
    """Return the documents of all domains.

    Raises:
        TextFileError: lists unreadable files of all domains.
    """
    documents: dict[str, Documents] = {}
    problems: list[str] = []
    for domain in domains:
        try:
            documents[domain.name] = source_documents(
                domain.paths,
                key=domain.key,
                text_field=domain.text_field,
                texts=domain.texts,
                is_streamed=domain.is_streamed,
                is_head=domain.is_head,
            )
        except TextFileError as error:
            problems += error.problems
    if problems:
        raise TextFileError(problems)
    return documents


def corpus_chat(is_chat: bool, data: ChatChoice, folder: Path | None) -> Chat | None:
    """Return the chat options of a corpus; None if it has no conversations.

    Args:
        is_chat: whether there are conversations.
        data: the chat options.
        folder: the checkpoint with the tokenizer; None for a new base model.

    Raises:
        RequestError: there is no such template, or an option needs conversations.
    """
    if is_chat:
        tokenizer = None if folder is None else load_tokenizer(folder)
        return chat_of(data, tokenizer=tokenizer)
    for key, value, is_used in (
        (TEMPLATE_KEY, data.chat_template, data.chat_template not in (None, NONE)),
        (LOSS_KEY, data.loss_on, data.loss_on == "answers"),
    ):
        if is_used:
            reason = "the data has no conversations; remove the key"
            raise RequestError(Problem(key, value, reason=reason))
    return None


def _origin(domain: DomainText, config: RunConfig) -> str:
    if domain.texts is not None:
        return dotted(type(config.data))
    datasets = dataset_names(domain.paths)
    has_files = any(not is_built_in(path) and path not in datasets for path in domain.paths)
    origins = (
        built_in_origin(domain.paths),
        _DATASETS_ORIGIN if datasets else "",
        _FILES_ORIGIN if has_files else "",
    )
    return " and ".join(filter(None, origins))

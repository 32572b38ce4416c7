"""The data of a run: its domains, their tokens, training sequences and scored documents."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tritter.checkpoints import Source
from tritter.checkpoints.record import LearnedDomain
from tritter.checkpoints.run_text import RunText, recorded_chat
from tritter.config.schema import RunConfig
from tritter.core.families import Model
from tritter.core.models import load_tokenizer
from tritter.data.batches import BatchStream, Sequences, SequenceStream, sample_equally
from tritter.data.built_in import built_in_origin, is_built_in
from tritter.data.chat import ChatChoice, is_unpredicted
from tritter.data.corpus import Corpus
from tritter.data.datamodule import ValidationSubset
from tritter.data.datasets import DatasetName, stream_identity
from tritter.data.options import NamedTextConfig
from tritter.data.packing import DocumentMask, MarkedText, Packing, num_packed, packed
from tritter.data.records import NO_ANSWERS
from tritter.data.replay import ReplayBuffer
from tritter.data.skills import SkillText
from tritter.data.sources import TextRequest
from tritter.data.stream import StreamedSequences
from tritter.data.tokens import (
    END_OF_TEXT,
    PretrainedTokenizer,
    TextBounds,
    TokenisedDocuments,
    concatenate,
    parsed_tokenizer,
)
from tritter.errors import Problem, RequestError
from tritter.evaluation.benchmarks.harness import Tokenizer as StockTokenizer
from tritter.evaluation.losses import batch_that_fits
from tritter.evaluation.tasks import MetricTask, QuestionTask, Reader, ScoredTask, subject_of
from tritter.limits import MAX_VOCABULARY
from tritter.pipeline.branch import Branch
from tritter.pipeline.scoring import BenchmarkTask, Scoring
from tritter.planning.run_memory import batch_size_at
from tritter.seeds import derived_seed
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import TOKENIZER_NAME, read_object
from tritter.targets import dotted, instantiate

_START = "start_of_text"  # of a lineage: the ids in front of each training text
_STREAMS = "streams.json"  # domain → file → its contents when the run began
_FILES_ORIGIN, _DATASETS_ORIGIN = "text files", "data sets"
_STDLIB_DOMAINS = [("prose", ("stdlib:prose",)), ("code", ("stdlib:code",))]


class RunData:
    """The data of a run as a model reads it: the tokens of a tokenizer, in windows of a length.

    Args:
        config: configuration of the run; for other windows, with their length and batch size.
        initial_checkpoint: the initial checkpoint of the run; None if it pretrains a base model.
        tokenizer: checkpoint with another tokenizer than the run's own.
        own: of another reading: the run's own.

    Attributes:
        short: of longer windows: these tokens in the run's own windows, in which models are scored.
    """

    max_positions: ClassVar[int] = 2048  # of a model without position limit

    def __init__(
        self,
        config: RunConfig,
        initial_checkpoint: Source | None,
        tokenizer: Source | None = None,
        own: "RunData | None" = None,
    ) -> None:
        self.config, self.initial_checkpoint = config, initial_checkpoint
        self.sequence_length = config.data.sequence_length
        self.batch_size = config.data.batch_size
        self.tokenizer, self.own = tokenizer, own
        self._digest: str | None = None
        if tokenizer is not None:
            self._digest = tokenizer.own_lineage.file_digests[TOKENIZER_NAME]
        self.short: RunData | None = None
        if own is not None and own.sequence_length != self.sequence_length:
            self.short = own.reading(tokenizer=tokenizer)
        # Digest of another tokenizer and length of the windows → reading
        self._readings: dict[tuple[str | None, int], RunData] = {}
        self._packed: dict[str, Tensor] = {}

    def reading(self, length: int | None = None, *, tokenizer: Source | None = None) -> "RunData":
        """Return the run's data in other tokens or windows.

        Validation documents keep their bytes, so that scores per byte are paired. Batches of longer
        windows have about as many tokens, and validation documents are cut at that length at least.

        Args:
            length: of the windows. None: as in the run.
            tokenizer: checkpoint with the tokenizer. None: the run's own.
        """
        own, digest = self.own or self, None
        if tokenizer is not None:
            digest = tokenizer.own_lineage.file_digests[TOKENIZER_NAME]
        key = (digest, length or own.sequence_length)
        if key == (None, own.sequence_length):
            return own
        if key not in own._readings:
            config = _in_windows(own.config, key[1])
            own._readings[key] = RunData(config, own.initial_checkpoint, tokenizer, own)
        return own._readings[key]

    def has_tokens_of(self, other: "RunData") -> bool:
        return self._digest == other._digest

    @cached_property
    def model(self) -> Model:
        """The model that the run starts from."""
        if self.initial_checkpoint is not None:
            return self.initial_checkpoint.model
        model = self.config.known_model()
        assert model is not None  # only that of a Hub id is unknown, which is a checkpoint
        return model

    @cached_property
    def text(self) -> RunText:
        """The run's domains; those of a Hub checkpoint are known once it is downloaded."""
        if self.own is not None:
            return self.own.text
        config = self.config
        if self.initial_checkpoint is None or Path(config.model.path).is_dir():  # type: ignore[union-attr]
            return config.text
        return RunText.of(str(self.initial_checkpoint.folder), config.data, seed=config.seed)

    @property
    def old_domains(self) -> tuple[str, ...]:
        return self.text.old

    @property
    def new_domains(self) -> tuple[str, ...]:
        return self.text.new

    @property
    def domains(self) -> tuple[str, ...]:
        """Old and new domains."""
        return (*self.old_domains, *self.new_domains)

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
    def source_tokenizer(self) -> PretrainedTokenizer | None:
        """The tokenizer of the initial checkpoint, if any, or after an expansion."""
        if self.tokenizer is not None:
            return PretrainedTokenizer.read(self.tokenizer.folder, vocab_size=MAX_VOCABULARY)
        if self.initial_checkpoint is None:
            return None
        vocab_size = self.initial_checkpoint.model.sizes.vocab_size
        return PretrainedTokenizer.read(self.initial_checkpoint.folder, vocab_size=vocab_size)

    @property
    def bounds(self) -> TextBounds:
        """The start and the end of a text."""
        if self.source_tokenizer is not None:
            return self.source_tokenizer.bounds
        end = self.corpus.tokenizer.token_to_id(END_OF_TEXT)
        assert end is not None
        return TextBounds(end)

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenised domains; without a checkpoint, a tokenizer is trained on them."""
        config, split, tokenizer = self.config, self.text.split, self.source_tokenizer
        settings: dict[str, Any] = {
            "vocab_size": config.data.vocab_size,
            "validation_fraction": split.validation_fraction,
            "max_validation_tokens_per_document": config.evaluation.max_tokens_per_document,
            "seed": split.seed,
            "cache_dir": config.cache_dir,
            "tokenizer": tokenizer.tokenizer if tokenizer else None,
        }
        if self.tokenizer is not None:
            before = self.reading(self.sequence_length).corpus.domains.items()
            settings["validation_bytes"] = {n: each.validation.num_bytes for n, each in before}
        domains = self.text.domains
        # Only the embedded corpus has an index in the cache
        if [(name, domain.paths) for name, domain in domains.items()] == _STDLIB_DOMAINS:
            return Corpus.of_stdlib(**settings)
        origin = {name: _origin(domain, config) for name, domain in domains.items()}
        documents = self.text.documents()
        start = self.initial_checkpoint
        is_chat = any(each.num_conversations() for each in documents.values())
        load = partial(load_tokenizer, start.folder) if start else lambda: None
        chat = self.chat_choice.of_corpus(load, is_chat=is_chat)
        corpus = Corpus.build(documents, origin=origin, chat=chat, **settings)
        for name, domain in domains.items():
            found = corpus.domains[name]
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
    def stock_tokenizer(self) -> StockTokenizer | None:
        """The tokenizer of the initial checkpoint, if any, with the chat template of the run."""
        if self.own is not None:
            return self.own.stock_tokenizer
        if self.initial_checkpoint is None:
            return None
        tokenizer: StockTokenizer = load_tokenizer(self.initial_checkpoint.folder)
        self.chat_choice.set_template(tokenizer)
        return tokenizer

    @cached_property
    def packing(self) -> Packing:
        """The packing of the run's sequences."""
        if self.own is not None:
            return self.own.packing
        domains, choice = self.corpus.domains.values(), self.config.data.packing
        has_marks = any(side.has_marks for d in domains for side in (d.train, d.validation))
        plain = "conversations are plain text with data.chat_template=none data.loss_on=all"
        if has_marks and choice == "stream":
            reason = f"attention would cross conversations; remove the key ({plain})"
            raise RequestError(Problem("data.packing", choice, reason=reason))
        if choice is None:
            choice = "documents" if has_marks or self.text.kept_sequences.of_documents else "stream"
        source = self.model
        if choice == "documents" and not source.separates_documents:
            reason = f"a token of {source.model_type} depends on earlier documents; {plain}"
            raise RequestError(Problem("data.packing", self.config.data.packing, reason=reason))
        return choice

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
        """Return the number of training sequences of a domain, without packing them."""
        length, own = self.config.data.sequence_length, self.corpus.domains[domain].train
        try:
            return num_packed(own, packing=self.packing, sequence_length=length, bounds=self.bounds)
        except RequestError as error:
            key = "data.sequence_length"
            now = key if self.short is None else "expansion.context.target_length"
            raise RequestError(f"{error} (Domain {domain}.)".replace(key, now)) from error

    @property
    def document_mask(self) -> DocumentMask | None:
        """The mask between documents of a training sequence; None to treat them as one stream."""
        return DocumentMask(self.bounds) if self.packing == "documents" else None

    @property
    def marks(self) -> MarkedText | None:
        """How models read marked training sequences; None if these have no marks."""
        return self.document_mask or (MarkedText(self.bounds) if self.bounds.start else None)

    def masked(self, model: nn.Module) -> nn.Module:
        """Return a model that reads the run's training sequences, with their document mask."""
        return model if self.marks is None else self.marks.attach(model)

    def sample_equally(self, domains: Sequence[str], count: int, *purpose: str) -> Tensor:
        """Return `count` random training sequences [N, T], equally many per domain.

        Domains with fewer sequences contribute all of them.
        """
        sequences = self.training_sequences(domains)
        return sample_equally(
            sequences, count, seed=lambda name: derived_seed(self.config.seed, *purpose, name)
        )

    def spaced_sequences(self, domains: Sequence[str], count: int) -> Tensor:
        """Return up to `count` training sequences [N, T], evenly spaced over some domains."""
        sequences = concatenate(list(self.training_sequences(domains).values()))
        chosen = min(count, len(sequences))
        return sequences[torch.arange(chosen) * len(sequences) // max(1, chosen)]

    def check_text(self) -> None:
        """Reject a domain that is too small, before any training."""
        for name in self.domains:
            self.num_sequences(name)

    def check_streams(self, folder: Path) -> None:
        """Record the streamed files of a run that begins; compare them when it resumes.

        Args:
            folder: of the run.
        """
        path = folder / _STREAMS
        current = {
            name: stream_identity(*sources, key=name) for name, sources in self.streams.items()
        }
        if not current:
            return
        if not path.exists():
            write_text_atomic(path, dumps(current, indent=1) + "\n")
            return
        keys = {name: domain.key for name, domain in self.text.domains.items()}
        for name, recorded in read_object(path).items():
            contents = current.get(name, {})
            changed = sorted(
                file for file in recorded | contents if recorded.get(file) != contents.get(file)
            )
            if changed:
                file = changed[0]
                before, now = recorded.get(file, "not there"), contents.get(file, "not there")
                reason = (
                    f"the streamed data has changed since the run in {folder} began "
                    f"(then {before}; now {now}); restore it, or start another run"
                )
                raise RequestError(Problem(keys.get(name, name), file, reason=reason))

    def source_records(self, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the records of some domains in a checkpoint's lineage: hash and paths."""
        return {
            name: {
                **self.corpus.domains[name].source,
                "paths": list(self.text.domains[name].recorded_paths),
                "text_field": self.text.domains[name].text_field,
            }
            for name in domains
        }

    def split_record(self) -> dict[str, Any]:
        """Return the settings that a later training run adopts, except the split."""
        data = self.config.data
        packing = {} if self.packing == "stream" else {"packing": self.packing}
        chat = self.chat_choice.to_record()
        start = {_START: list(self.bounds.start)} if self.bounds.start else {}
        return {
            "data": {"sequence_length": data.sequence_length, **packing, **chat, **start},
            "seed": self.config.seed,
        }

    def learned(self, domains: Sequence[str]) -> dict[str, LearnedDomain]:
        """Return the learned domains of the lineage after training on some domains of the run."""
        records = self.source_records(domains)
        for each in records.values():
            del each["name"]
            each["paths"] = tuple(each["paths"])
        learned = {name: LearnedDomain(**each) for name, each in records.items()}
        return {**self.text.learned, **learned}

    def batches(self, domains: Sequence[str], *, purpose: str, max_steps: int) -> BatchStream:
        """Return endless batches of some domains in a random order."""
        seed, data = derived_seed(self.config.seed, "order", purpose), self.config.data
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
            stream, batch_size=data.batch_size, num_batches=max_steps * gathered, window=gathered
        )

    @cached_property
    def streams(self) -> dict[str, tuple[DatasetName, ...]]:
        """Trained domain → the data sets that are read while the model trains on it."""
        trains_old = self.initial_checkpoint is None  # a base model
        return {
            name: domain.streams
            for name, domain in self.text.domains.items()
            if domain.streams and (trains_old or name not in self.text.old)
        }

    def _streamed(self, name: str, seed: int) -> StreamedSequences:
        """Return the training sequences of a streamed domain."""
        return StreamedSequences(
            self.streams[name],
            key=self.text.domains[name].key,
            rule=self.text.split,
            tokenizer=parsed_tokenizer(self.corpus.tokenizer.to_str()),  # for its thread
            chat=self.corpus.chat,
            packing=self.packing,
            sequence_length=self.config.data.sequence_length,
            bounds=self.bounds,
            seed=derived_seed(seed, "domain", name),
        )

    @cached_property
    def validation_subset(self) -> ValidationSubset | None:
        """The validation subset for evaluation during training; None if it is switched off."""
        if self.short is not None:  # as the model before its expansion
            return self.short.validation_subset
        options = self.config.evaluation
        if not options.every_n_steps:
            return None
        max_tokens = self.config.validation_tokens(num_domains=len(self.domains))
        length = min(self.config.data.sequence_length, max_tokens)
        vocab_size = self.corpus.tokenizer.get_vocab_size()
        return ValidationSubset(
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
        if self.own is not None:
            return self.own.tasks
        options = self.config.evaluation
        number = options.task_questions
        domains = self.text.domains.items()
        questions = {name: SkillText.questions_of(each.paths, number) for name, each in domains}
        skills = (
            QuestionTask(name, name, asked, self.corpus.chat)
            for name, asked in questions.items()
            if asked
        )
        length = self.model.position_limit or self.max_positions
        own = (
            MetricTask(one.name, instantiate(one.options), one.plain())
            for one in self.config.metrics
        )
        stock = self.stock_tokenizer if options.tasks else None
        return (*skills, *BenchmarkTask.chosen(options, positions=length, stock=stock), *own)

    @cached_property
    def scored(self) -> dict[str, TokenisedDocuments]:
        """Domain → its scored held-out documents, the same in all readings."""
        origin = self.own or self
        held_out = {name: origin.corpus.domains[name].validation for name in self.domains}
        sizes = {name: each.offsets.diff().tolist() for name, each in held_out.items()}
        counts = origin.config.scored_counts(sizes)
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


def _in_windows(config: RunConfig, length: int) -> RunConfig:
    """Return a configuration with sequences of another length."""
    if length == config.data.sequence_length:
        return config
    factor, evaluation = length / config.data.sequence_length, config.evaluation
    data = replace(config.data, sequence_length=length, batch_size=batch_size_at(length, config))
    evaluation = replace(
        evaluation,
        batch_size=max(1, round(evaluation.batch_size / factor)),
        max_tokens_per_document=max(length, evaluation.max_tokens_per_document),
    )
    return replace(config, data=data, evaluation=evaluation)


def _origin(domain: TextRequest, config: RunConfig) -> str:
    if domain.texts is not None:
        return dotted(type(config.data))
    datasets = DatasetName.names_in(domain.paths)
    has_files = any(not is_built_in(path) and path not in datasets for path in domain.paths)
    origins = (
        built_in_origin(domain.paths),
        _DATASETS_ORIGIN if datasets else "",
        _FILES_ORIGIN if has_files else "",
    )
    return " and ".join(filter(None, origins))

"""What every stage of a run has at hand: the config, the folder, the text, a console."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from tritter.checkpoints import Lineage, Source, lineage_of, read_lineage
from tritter.checkpoints.location import checkpoint_config
from tritter.checkpoints.record import LearnedDomain
from tritter.checkpoints.run_text import DomainText, RunText, run_text
from tritter.config.schema import CheckpointModelConfig, RunConfig
from tritter.config.validation import known_config
from tritter.core.families import Flops, position_limit
from tritter.core.models import read_config, wrapped_tokenizer
from tritter.data.batches import BatchStream, SequenceStream, sample_equally
from tritter.data.benchmark_names import CODE, benchmark_names
from tritter.data.built_in import built_in_origin, is_built_in, questions_of
from tritter.data.corpus import Corpus, build_corpus, stdlib_corpus
from tritter.data.datamodule import ValidationSubset
from tritter.data.datasets import dataset_names
from tritter.data.documents import Documents
from tritter.data.local_files import TextFileError
from tritter.data.options import DatasetsConfig
from tritter.data.packing import DocumentMask, mask_documents, num_packed, packed, padding_fraction
from tritter.data.replay import ReplayBuffer
from tritter.data.sources import find_texts, recorded_paths, source_documents
from tritter.data.tokens import END_OF_TEXT, PretrainedTokenizer, joined, read_tokenizer
from tritter.errors import RequestError, TritterError, key_name
from tritter.evaluation.benchmarks.files import Questions, TasksFolder, load
from tritter.evaluation.benchmarks.formats import BENCHMARKS, Benchmark
from tritter.evaluation.benchmarks.harness import (
    EvalOptions,
    require_harness,
    score_benchmark,
    score_from_hub,
    sequence_lengths,
)
from tritter.evaluation.benchmarks.harness import (
    Tokenizer as StockTokenizer,
)
from tritter.evaluation.code.sandbox import ExternalSandbox, NamespaceSandbox, Sandbox
from tritter.evaluation.options import TASKS_KEY, EvaluationConfig
from tritter.evaluation.statistics import PairedScores, score_file
from tritter.evaluation.tasks import QuestionTask, Reader, ScoredTask, subject_of
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import Ledger, StageResult
from tritter.pipeline.scoring import Scores, Scoring, scores_text
from tritter.planning.run_memory import memory_notes
from tritter.seeds import derived_seed
from tritter.stopping import Stopped
from tritter.storage.atomic import write_text_atomic
from tritter.storage.hub import locate
from tritter.targets import dotted
from tritter.terminal import Console, NewBar, progress_bars, shows_bar
from tritter.training.options import rate_notes
from tritter.transform import PlannedExpansion, planned

MAX_POSITIONS = 2048  # of a model that does not say
PUBLISHED_DTYPES = ("float32", "bfloat16", "float16")
EVALUATED_TOKENS = 4096  # of a domain, each time: 3 % of the default training, all together


@dataclass(frozen=True)
class RunContext:
    """One run: asked for by `config`, living in `folder`.

    Args:
        wandb_loggers: of the W&B runs that are open, one for all attempts: part → logger.
        sources: place in the folder → the checkpoint there, as far as it was opened.
    """

    config: RunConfig
    folder: Path
    console: Console
    ledger: Ledger
    wandb_loggers: dict[str | None, WandbLogger] = field(default_factory=dict, repr=False)
    sources: dict[str, Source] = field(default_factory=dict, repr=False, compare=False)
    _planned: dict[Branch, PlannedExpansion] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _packed: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def of_attempt(self, number: int) -> "RunContext":
        """Return the context of an attempt, from 1: with what it has of its own."""
        if number == 1:
            return self
        other = replace(self, config=self.config.attempts[number - 1])
        known = {name: value for name, value in vars(self).items() if name not in vars(other)}
        vars(other).update(known)  # the text, which is the same for all
        return other

    @property
    def old_domains(self) -> tuple[str, ...]:
        return self.text.old

    @property
    def new_domains(self) -> tuple[str, ...]:
        return self.text.new

    def new_of(self, branch: Branch) -> tuple[str, ...]:
        """Return the domains that an arm's task is about."""
        return self.text.tasks[branch.task]

    def old_of(self, branch: Branch) -> tuple[str, ...]:
        """Return what an arm is to keep: the old domains, and those of the tasks before its own."""
        met = [*self.old_domains, *chain.from_iterable(self.text.tasks[: branch.task])]
        return tuple(dict.fromkeys(name for name in met if name not in self.new_of(branch)))

    @cached_property
    def given(self) -> Source | None:
        """The checkpoint that the run starts from; None when it pretrains a base.

        Raises:
            RequestError: it can't be opened as what it is: the wrong thing to ask for.
        """
        model = self.config.model
        if not isinstance(model, CheckpointModelConfig):
            return None
        if self.ledger.get("baseline") is not None:
            return self.source("baseline")
        folder = locate(model.path)
        checkpoint_config(str(folder), with_experts=True)
        try:
            return Source(folder, read_config(folder), read_lineage(folder))
        except TritterError as error:
            raise RequestError(f"{key_name('model.path')}: {error}") from error

    @cached_property
    def text(self) -> RunText:
        """The run's text; what a checkpoint from the hub learned is known once it is here."""
        config = self.config
        if self.given is None or Path(config.model.path).is_dir():  # type: ignore[union-attr]
            return config.text
        return run_text(str(self.given.folder), config.data, seed=config.seed)

    @cached_property
    def source_tokenizer(self) -> PretrainedTokenizer | None:
        if self.given is None:
            return None
        vocab_size = self.given.family.dimensions(self.given.config).vocab_size
        return read_tokenizer(self.given.folder, vocab_size=vocab_size)

    @cached_property
    def corpus(self) -> Corpus:
        """The old and new domains, tokenised; without a checkpoint a tokenizer is trained on them.

        Raises:
            TextFileError: files can't be read as what they are.
            RequestError: a domain is too small, or the cache can't be written.
        """
        config, split, given = self.config, self.text.split, self.source_tokenizer
        asked: dict[str, Any] = {
            "vocab_size": config.data.vocab_size,
            "validation_fraction": split.validation_fraction,
            "max_validation_tokens_per_document": config.evaluation.max_tokens_per_document,
            "seed": split.seed,
            "cache_dir": config.cache_dir,
            "tokenizer": given.tokenizer if given else None,
        }
        domains = self.text.domains
        # Of the embedded corpus alone the cache keeps a note
        if [(domain.name, domain.paths) for domain in domains] == _STDLIB_DOMAINS:
            return stdlib_corpus(**asked)
        origin = {domain.name: _origin(domain, config) for domain in domains}
        return build_corpus(all_documents(domains), origin=origin, **asked)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of what the run is made from, a sentence each."""
        source = known_config(self.config) if self.given is None else self.given.config
        assert source is not None  # only that of a hub id is not known, and it is given
        # Of each domain whose paths mean other files too, what was skipped
        notes = [find_texts(each.key, each.paths).note(each.name) for each in self.text.domains]
        notes += [*self.text.notes, *self.corpus.notes]
        if count := sum(each.held_out_before for each in self.corpus.counts.values()):
            notes.append(
                f"Documents that were met before: {count} held out before, so that they are not "
                "trained on."
            )
        length = self.config.data.sequence_length
        is_masked = self.config.data.packing == "documents"
        for name, domain in self.corpus.domains.items() if is_masked else ():
            if not domain.train.num_tokens:
                continue
            share = padding_fraction(domain.train, sequence_length=length)
            longer = padding_fraction(domain.train, sequence_length=2 * length)
            if share > MUCH_PADDING:
                notes.append(
                    f"Of the training sequences of {name} {share:.0%} is padding: its documents "
                    f"fill no {length} tokens; data.sequence_length={2 * length} leaves "
                    f"{longer:.0%}."
                )
        optimizer = self.config.optimizer.target.rpartition(".")[2]
        if optimizer.startswith("Paged") and self.device.type == "cpu":
            same = optimizer.removeprefix("Paged")
            notes.append(f"On the CPU nothing is paged: {optimizer} does what {same} does.")
        notes.append(self.config.rate_note)
        notes += [*memory_notes(self.config, source), *rate_notes(self.config, source)]
        return tuple(filter(None, notes))

    @cached_property
    def published_dtype(self) -> str:
        """The dtype of the weights that the run publishes; the baseline must be there."""
        asked = self.config.pipeline.dtype
        if asked != "source" or self.given is None:
            return "float32" if asked == "source" else asked
        found = self.source("baseline").tensors.main_dtype
        return found if found in PUBLISHED_DTYPES else "float32"

    @property
    def domains(self) -> tuple[str, ...]:
        return (*self.old_domains, *self.new_domains)

    @property
    def end_of_text_id(self) -> int:
        given = self.source_tokenizer
        end_of_text = given.end_of_text if given else END_OF_TEXT
        token_id = self.corpus.tokenizer.token_to_id(end_of_text)
        assert token_id is not None
        return token_id

    @cached_property
    def device(self) -> torch.device:
        wants_gpu = self.config.trainer.accelerator in ("gpu", "auto")
        return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")

    def seed(self, *purpose: str) -> int:
        """Return the seed of one purpose: data order, growth and replay have their own."""
        return derived_seed(self.config.seed, *purpose)

    def stage(self, key: str, work: Callable[[], StageResult], *, label: str) -> StageResult:
        """Do a stage, or take what the ledger has of it.

        Args:
            key: of the ledger's entry.
            label: what reports call it; time that `work` does not account for counts here.
        """
        done = self.ledger.get(key)
        if done is not None:
            self.say(label, "done before; going on from there")
            return done
        since = time.perf_counter()
        try:
            result = work()
        except Stopped as stopped:
            stopped.where = stopped.where or f"during {key}, which starts again"
            raise
        elapsed = time.perf_counter() - since - sum(result.seconds.values())
        seconds = {**result.seconds, label: elapsed + result.seconds.get(label, 0.0)}
        result = replace(result, seconds=seconds)
        lineages = {place: s.lineage for place, s in self.sources.items() if s.lineage is not None}
        self.ledger.record(key, result, lineages=lineages)
        return result

    def source(self, place: str) -> Source:
        """Return a checkpoint of the run folder; it was checked when the run began, or written."""
        if place not in self.sources:
            self.wrote(place, lineage_of(self.folder / place))
        return self.sources[place]

    def wrote(self, place: str, lineage: Lineage) -> Source:
        """Take up a checkpoint that was written to the run folder just now."""
        folder = self.folder / place
        config = read_config(folder, ffn_sizes=list(lineage.ffn_sizes))
        self.sources[place] = Source.written(folder, config, lineage)
        return self.sources[place]

    def planned(self, branch: Branch) -> PlannedExpansion:
        """Return what an arm's expansions make of where it starts; its map is built once."""
        if branch not in self._planned:
            seed = self.seed("expansion", *branch.purpose)
            self._planned[branch] = planned(self.source(branch.start), branch.specs, seed=seed)
        return self._planned[branch]

    def say(self, label: str, text: str) -> None:
        """Print one line of what goes on."""
        self.console.print(f"{label:<11}{text}", highlight=False, markup=False, soft_wrap=True)

    def progress_bars(self) -> AbstractContextManager[NewBar]:
        """Return progress bars, shown where a training would show its own."""
        is_shown = shows_bar(self.config.trainer.progress, self.console)
        return progress_bars(self.console, is_shown=is_shown)

    def training_sequences(self, domains: Sequence[str]) -> dict[str, Tensor]:
        """Return, by domain, packed training sequences [N, T]."""
        for name in domains:
            if name not in self._packed:
                self._packed[name] = packed(
                    self.corpus.domains[name].train,
                    packing=self.config.data.packing,
                    sequence_length=self.config.data.sequence_length,
                    end_of_text_id=self.end_of_text_id,
                )
        return {name: self._packed[name] for name in domains}

    def num_sequences(self, domain: str) -> int:
        """Return how many training sequences a domain has, without making them.

        Raises:
            RequestError: it is too small to have one.
        """
        train, data = self.corpus.domains[domain].train, self.config.data
        return num_packed(train, packing=data.packing, sequence_length=data.sequence_length)

    @property
    def document_mask(self) -> DocumentMask | None:
        """How documents of a training sequence are told apart; None: they are one stream."""
        is_masked = self.config.data.packing == "documents"
        return DocumentMask(self.end_of_text_id) if is_masked else None

    def reading(self, model: nn.Module) -> nn.Module:
        """Let a model read the run's training sequences as they are packed, and return it."""
        return model if self.document_mask is None else mask_documents(model, self.document_mask)

    def sample_equally(self, domains: Sequence[str], count: int, *purpose: str) -> Tensor:
        """Return `count` training sequences [N, T] at random, of each domain as many.

        Fewer where a domain has not as many.
        """
        sequences = self.training_sequences(domains)
        return sample_equally(sequences, count, seed=lambda name: self.seed(*purpose, name))

    def check_text(self) -> None:
        """Refuse a domain that is too small to train on, before anything is trained.

        Raises:
            RequestError: names the domain.
        """
        for name in self.domains:
            try:
                self.num_sequences(name)
            except RequestError as error:
                raise RequestError(f"{error} (Domain {name}.)") from error

    def source_records(self, domains: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint records of some domains' text: hash, and where it lay."""
        places = {domain.name: domain for domain in self.text.domains}
        return {
            name: {
                **asdict(self.corpus.sources[name]),
                "paths": list(recorded_paths(places[name].paths, key=places[name].key)),
                "text_field": places[name].text_field,
            }
            for name in domains
        }

    def split_record(self) -> dict[str, Any]:
        """Return what a further training is to take over besides the split."""
        data = self.config.data
        packing = {} if data.packing == "stream" else {"packing": data.packing}
        return {
            "data": {"sequence_length": data.sequence_length, **packing},
            "seed": self.config.seed,
        }

    def learned(self, domains: Sequence[str]) -> dict[str, LearnedDomain]:
        """Return what the lineage has learned once some domains of the run are trained on."""
        places = {domain.name: domain for domain in self.text.domains}
        records = {}
        for name in domains:
            source = asdict(self.corpus.sources[name])
            del source["name"]
            records[name] = LearnedDomain(
                **source,
                paths=recorded_paths(places[name].paths, key=places[name].key),
                text_field=places[name].text_field,
            )
        return {**self.text.learned, **records}

    def batches(self, domains: Sequence[str], *, purpose: str, max_steps: int) -> BatchStream:
        """Return endless batches of some domains in an order of their own."""
        sequences, seed = self.training_sequences(domains), self.seed("order", purpose)
        data = self.config.data
        # New domain → its weight among those of its task; nothing where all are mixed
        asked = (data.weights or {}) if isinstance(data, DatasetsConfig) else {}
        weights = {name: each for name, each in asked.items() if name in domains}
        stream = (
            ReplayBuffer.of_domains(sequences, weights=weights, seed=seed, purpose="domain")
            if weights
            else SequenceStream(joined(list(sequences.values())), seed=seed)
        )
        num_batches = max_steps * self.config.trainer.accumulate_grad_batches
        return BatchStream(stream, batch_size=data.batch_size, num_batches=num_batches)

    @cached_property
    def validation_subset(self) -> ValidationSubset | None:
        """What trainings are evaluated on on their way; None where that is switched off."""
        options = self.config.evaluation
        if not options.every_n_steps:
            return None
        return ValidationSubset.of(
            {name: self.corpus.domains[name].validation for name in self.domains},
            every_n_steps=options.every_n_steps,
            max_tokens=EVALUATED_TOKENS,
            sequence_length=self.config.data.sequence_length,
            end_of_text_id=self.end_of_text_id,
            batch_size=options.batch_size,
            seed=self.config.seed,
        )

    @cached_property
    def tasks(self) -> tuple[ScoredTask, ...]:
        """What is asked of every model beside the losses."""
        options = self.config.evaluation
        asked = {d.name: questions_of(d.paths, options.task_questions) for d in self.text.domains}
        skills = (QuestionTask(name, name, asked[name]) for name in asked if asked[name])
        source = known_config(self.config) if self.given is None else self.given.config
        length = (source and position_limit(source)) or MAX_POSITIONS
        return (*skills, *benchmark_tasks(options, positions=length))

    @cached_property
    def scoring(self) -> Scoring:
        """What every model of the run is scored on."""
        return Scoring(
            documents={name: self.corpus.domains[name].validation for name in self.domains},
            tasks=self.tasks,
            reader=Reader(
                tokenizer=self.corpus.tokenizer,
                end_of_text_id=self.end_of_text_id,
                batch_size=self.config.evaluation.batch_size,
            ),
            sequence_length=self.config.data.sequence_length,
        )

    def subjects_of(self, domains: Sequence[str | None]) -> list[str]:
        """Return what scores of some domains are called, their tasks included; None: of none."""
        return [
            subject
            for domain in domains
            for subject in (
                *filter(None, (domain,)),
                *(subject_of(task) for task in self.tasks if task.domain == domain),
            )
        ]

    def score(self, model: nn.Module, name: str) -> Scores:
        """Score a model, which ends on the CPU, and keep the result in a file."""
        with self.progress_bars() as new_bar:
            scores = self.scoring.score(model.to(self.device), new_bar=new_bar)
        model.to("cpu")
        content = dumps({subject: each.to_dict() for subject, each in scores.items()})
        write_text_atomic(self.folder / score_file(name), content)
        self.say("", scores_text(scores))
        return scores

    def read_scores(self, name: str) -> Scores:
        """Return the scores that `score` kept under a name."""
        return self.scoring.read(self.folder / score_file(name))

    def scoring_flops(self, reading: Flops) -> float:
        """Count the FLOPs of one scoring, given those of reading a sequence."""
        return self.scoring.flops(reading)


MUCH_PADDING = 0.1
FILES_ORIGIN, DATASETS_ORIGIN = "text files", "data sets"
_STDLIB_DOMAINS = [("prose", ("stdlib:prose",)), ("code", ("stdlib:code",))]


def all_documents(domains: Iterable[DomainText]) -> dict[str, Documents]:
    """Return the documents of all domains.

    Raises:
        TextFileError: lists what can't be read, of all domains.
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
            )
        except TextFileError as error:
            problems += error.problems
    if problems:
        raise TextFileError(problems)
    return documents


def _origin(domain: DomainText, config: RunConfig) -> str:
    if domain.texts is not None:
        return dotted(type(config.data))
    datasets = dataset_names(domain.paths)
    has_files = any(not is_built_in(path) and path not in datasets for path in domain.paths)
    origins = (
        built_in_origin(domain.paths),
        DATASETS_ORIGIN if datasets else "",
        FILES_ORIGIN if has_files else "",
    )
    return " and ".join(filter(None, origins))


# Benchmarks


@dataclass(frozen=True, eq=False)
class BenchmarkTask:
    """A benchmark, scored by the metric that it is known by.

    Args:
        questions: None: the hub has them.
        positions: tokens that the run's models read.
    """

    benchmark: Benchmark
    questions: Questions | None
    harness: EvalOptions
    positions: int
    domain: str | None = None

    @property
    def name(self) -> str:
        return self.benchmark.name

    @cached_property
    def digest(self) -> str:
        held: Any = f"hub: {self.benchmark.hub}"
        if self.questions is not None:
            asked = self.questions.limited(self.harness.limit)
            held = [
                (name, astuple(asked.questions[name]), asked.examples[name])
                for name in asked.questions
            ]
        return sha256(dumps([held, self.harness.limit, version("lm_eval")]).encode()).hexdigest()

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Ask a model all questions.

        Raises:
            RequestError: the hub does not give them.
            TritterError: the model computes what is not finite.
        """
        harness = replace(self.harness, batch_size=reader.batch_size)
        if self.questions is None:
            found = score_from_hub(model, _tokenizer(reader), self.benchmark, harness)
        else:
            found = score_benchmark(model, _tokenizer(reader), self.questions, harness)
        return found.primary

    def lengths(self, reader: Reader) -> Sequence[int]:
        """Return the tokens of each sequence; generated answers count as long as they may be.

        Of a benchmark from the hub nothing is known before.
        """
        if self.questions is None:
            return ()
        asked = self.questions.limited(self.harness.limit)
        return sequence_lengths(_tokenizer(reader), asked, length=self.positions)


def benchmark_tasks(asked: EvaluationConfig, *, positions: int) -> tuple[BenchmarkTask, ...]:
    """Return the benchmarks of a run, once their files, lm-eval and the sandbox were tried.

    Raises:
        RequestError: one of them can't be had.
    """
    names = benchmark_names(asked.tasks, key=TASKS_KEY)
    if not names:
        return ()
    chosen = [BENCHMARKS[name] for name in names]
    held: Mapping[str, Questions] = {}
    if asked.tasks_path is not None:
        folder = TasksFolder(Path(asked.tasks_path), key="evaluation.tasks_path")
        loaded = load(chosen, folder, limit=asked.task_limit)
        held = {each.benchmark.name: each for each in loaded}
    require_harness()
    sandbox: Sandbox | None = None
    if set(names) & set(CODE):
        command = asked.code_sandbox_command
        is_external = asked.code_sandbox == "external" and command is not None
        sandbox = ExternalSandbox(str(command)) if is_external else NamespaceSandbox()
        sandbox.check()
    harness = EvalOptions(limit=asked.task_limit, sandbox=sandbox, is_null_run=False)
    return tuple(BenchmarkTask(each, held.get(each.name), harness, positions) for each in chosen)


def _tokenizer(reader: Reader) -> StockTokenizer:
    end_of_text = reader.tokenizer.id_to_token(reader.end_of_text_id)
    assert end_of_text is not None
    return wrapped_tokenizer(reader.tokenizer, end_of_text=end_of_text)

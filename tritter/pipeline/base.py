"""The base model: trained once on the old domains, cached by the hash of what made it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from tritter.checkpoint import Lineage, write_checkpoint
from tritter.checkpoint.left import checkpoint_changes
from tritter.checkpoint.record import training_record
from tritter.checkpoint.state import copy_states, read_state
from tritter.config.run_folder import effective_arguments, optimizer_record
from tritter.config.validation import source_config
from tritter.data.cache import one_at_a_time, set_aside
from tritter.data.options import DataConfig
from tritter.data.tokens import END_OF_TEXT
from tritter.errors import TritterError
from tritter.families import Config, count_parameters
from tritter.forgetting.path_integral import PathIntegral
from tritter.forgetting.si import RECORDED
from tritter.models import named_tensors, new_model, save_tokenizer
from tritter.pipeline import importance, moments
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import content_key
from tritter.pipeline.metrics import open_loggers, wandb_finished, write_rows
from tritter.pipeline.trained import check_trained
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import read_text
from tritter.storage.writer import TensorStream
from tritter.training import BaseModule, FitResult, Schedule, discard_saved, fit, read_metrics
from tritter.training.metrics import MAX_METRICS_BYTES
from tritter.training.options import TrainingConfig

_OF_DATASETS = ("text_column", "max_rows", "streaming", "weights")  # the last of new domains alone
FORMAT_VERSION = 1
_OF_TRAINER = ("accelerator", "precision", "gradient_clip_val", "devices", "compile")


def base_config(context: RunContext) -> Config:
    """Return the config.json of the base model that the run describes."""
    vocab_size = context.corpus.tokenizer.get_vocab_size()
    return {**source_config(context.config), "vocab_size": vocab_size}


@dataclass(frozen=True, slots=True)
class Base:
    """The base model in the cache, and the seconds that this run spent on training it."""

    folder: Path
    seconds: float


def obtain_base(context: RunContext) -> Base:
    """Train the base model, or find it in the cache; of jobs side by side one trains it.

    Raises:
        RequestError: the cache cannot be written.
        TritterError: the training of the base was broken off.
    """
    made_from = _made_from(context)
    folder = context.config.cache_dir / "bases" / content_key(made_from)
    logged = folder.with_name(f"{folder.name}.metrics.csv")  # beside the base, for later runs
    here = context.folder / "metrics_pretraining.csv"

    def wait() -> None:
        context.say("baseline", "another run is training this base; waiting for it")

    if not _is_intact(folder):
        with one_at_a_time(folder, waiting=wait):
            if not _is_intact(folder):
                seconds = _train_base(context, folder, made_from)
                for path in (logged, here):
                    write_rows(path, read_metrics(context.folder / "pretraining"))
                return Base(folder, seconds=seconds)
    context.say("baseline", f"base model from the cache ({folder.name[:12]})")
    if logged.is_file():
        write_text_atomic(here, read_text(logged, limit_bytes=MAX_METRICS_BYTES))
    return Base(folder, seconds=0.0)


def _made_from(context: RunContext) -> dict[str, Any]:
    """Return everything that determines the base's weights."""
    config = context.config
    trainer = asdict(config.trainer)
    pretraining = asdict(config.pretraining)
    del pretraining["max_tokens"]  # `max_steps` follows from it
    return {
        "format": "base",
        "format_version": FORMAT_VERSION,
        "recorded": list(RECORDED) if importance.is_recorded(context) else [],
        "torch": torch.__version__,
        "model": base_config(context),
        "corpus": context.corpus.digest,
        "domains": list(context.old_domains),
        "data": _text_options(config.data),
        "pretraining": pretraining,
        "warmup_steps": schedule_of(config.pretraining).warmup_steps,
        "optimizer": optimizer_record(config),
        # Several processes add up in another order, and sharded ones round in another way
        "trainer": {key: trainer[key] for key in _OF_TRAINER}
        | {"is_sharded": trainer["strategy"] == "fsdp"}
        | effective_arguments(config),
        "seed": config.seed,
    }


def _text_options(data: DataConfig) -> dict[str, Any]:
    """Return the options of the text; which text it is stands in the corpus's digest."""
    where = {"old", "new", "text_field", "validation_fraction", *_OF_DATASETS}
    return {key: value for key, value in asdict(data).items() if key not in where}


def _train_base(context: RunContext, folder: Path, made_from: Mapping[str, Any]) -> float:
    """Train a base into the cache and return the seconds it took."""
    config = base_config(context)
    parameters = count_parameters(config)
    pretraining = context.config.pretraining
    context.say(
        "baseline",
        f"training a base of {parameters:,} parameters on {', '.join(context.old_domains)} for "
        f"{pretraining.max_steps} steps (cached for the next run)",
    )
    module = BaseModule(
        context.reading(new_model(config, seed=context.seed("initialisation"))),
        schedule=schedule_of(pretraining),
        optimizer=context.config.optimizer,
    )
    batches = context.batches(
        context.old_domains, purpose="pretraining", max_steps=pretraining.max_steps
    )
    working = context.folder / "pretraining"
    recorded = working / "path"
    write = BaseWriter(
        folder=folder,
        config=config,
        lineage=_base_lineage(context, made_from),
        tokenizer=context.corpus.tokenizer,
        states=(recorded, *moments.left_in(context, working)),
    )
    recorders = [PathIntegral(recorded)] if importance.is_recorded(context) else []
    with wandb_finished(context), open_loggers(context, "pretraining") as loggers:
        result = fit(
            module,
            batches,
            settings=context.config.trainer,
            folder=working,
            label="pretraining",
            console=context.console,
            loggers=loggers,
            observers=[*recorders, *moments.keepers(context, working)],
            write_result=write,
        )
        _check_whole(context, result)
    check_trained(context, folder)
    context.ledger.watch_disk()
    discard_saved(working)
    moments.discard_left(working)
    return result.seconds


def _check_whole(context: RunContext, result: FitResult) -> None:
    if result.stopped_because is not None:
        raise TritterError(
            f"pretraining was broken off: {result.stopped_because}. Nothing was cached; lower "
            f"pretraining.learning_rate ({context.config.pretraining.learning_rate})."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWriter:
    """Writes a base into the cache, unless its training was broken off.

    Who trains it holds the lock of its entry.

    Args:
        lineage: all but the steps and their FLOPs.
        states: folders whose `state/` goes along.
    """

    folder: Path
    config: Config
    lineage: Lineage
    tokenizer: Tokenizer
    states: tuple[Path, ...]

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        if result.stopped_because is not None:
            return
        told = {"stage": "pretraining", "flops": result.flops, **self.lineage.training_config}
        lineage = replace(self.lineage, step=result.steps, training_config=told)
        if not self.folder.exists():
            write_checkpoint(
                self.folder,
                config=self.config,
                tensors=TensorStream.of(named_tensors(model, self.config)),
                lineage=lambda: lineage,
                artifacts=[self],
            )

    def write(self, folder: Path) -> None:
        """Write what stands beside the model."""
        save_tokenizer(self.tokenizer, folder, end_of_text=END_OF_TEXT)
        states = map(read_state, self.states)
        copy_states([state for state in states if state is not None], folder)


def _base_lineage(context: RunContext, made_from: Mapping[str, Any]) -> Lineage:
    return Lineage(
        model_hash="",
        base_model_hash="",
        tensor_digests={},
        file_digests={},
        training_config={
            "old": context.source_records(context.old_domains),
            **context.split_record(),
            "made_from": dict(made_from),
        },
        split=context.text.split,
        domains=context.learned(context.old_domains),
    )


def _is_intact(folder: Path) -> bool:
    """Check a cached base against its own hashes; put a damaged one aside.

    Raises:
        RequestError: the cache cannot be written.
    """
    if not folder.exists():
        return False
    problem = next(checkpoint_changes(folder), None)
    if problem is not None:
        set_aside(folder, reason=problem)
    return problem is None


def schedule_of(training: TrainingConfig, *, start_rate: float = 0.0) -> Schedule:
    """Return the schedule that a training's config describes.

    Args:
        start_rate: that the training before it ended with.
    """
    return Schedule(
        learning_rate=training.learning_rate,
        max_steps=training.max_steps,
        warmup_ratio=training.warmup_ratio,
        shape=training.schedule,
        decay_ratio=training.decay_ratio,
        minimum_ratio=training.minimum_ratio,
        start_rate=start_rate,
    )


def last_rate(context: RunContext, arm: Arm) -> float:
    """Return the rate of the last step of what an arm starts from; 0 where it is not recorded."""
    return recorded_rate(context.source(arm.start).own_lineage.training_config)


def recorded_rate(told: Mapping[str, Any]) -> float:
    """Return the last rate of the training that a lineage's record tells of.

    Where an older record does not say it, it is that of the last step that was asked for.
    """
    rate = told.get("last_rate")
    if isinstance(rate, int | float) and 0 <= rate < math.inf:
        return float(rate)
    try:
        training = training_record(told)
        schedule = Schedule(
            learning_rate=float(training["learning_rate"]),
            max_steps=int(training["max_steps"]),
            warmup_ratio=float(training["warmup_ratio"]),
            shape=str(training["schedule"]),
            decay_ratio=float(training["decay_ratio"]),
            minimum_ratio=float(training["minimum_ratio"]),
        )
        return schedule.last_rate
    except (KeyError, TypeError, ValueError):  # of a model from elsewhere, or damaged
        return 0.0

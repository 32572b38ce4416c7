"""The first stage: the initial model of a run, and its scores.

It is a checkpoint, or a base model that is trained once on the old domains and cached under the
hash of its settings.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from tritter.checkpoints import Lineage, Source, write_checkpoint
from tritter.checkpoints.history import Link
from tritter.checkpoints.location import checkpoint_model
from tritter.config.schema import CheckpointModelConfig
from tritter.config.validation import old_data_problems, start_problems
from tritter.core.families import Model
from tritter.core.models import new_model, read_model, save_tokenizer
from tritter.data.cache import entry_lock, quarantine
from tritter.data.chat import TEMPLATE_FILE, ChatChoice
from tritter.data.datasets import stream_identity
from tritter.data.tokens import END_OF_TEXT, PretrainedTokenizer
from tritter.errors import Problem, RequestError, TritterError, key_name, raise_problems
from tritter.evaluation.statistics import PairedScores, score_file
from tritter.methods.forgetting import needs_of
from tritter.methods.forgetting.path_integral import PathIntegral
from tritter.methods.forgetting.si import WeightPath
from tritter.methods.whole import load_whole, reading_flops_of
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult
from tritter.pipeline.metrics import open_loggers, wandb_finished, write_rows
from tritter.pipeline.run import Run
from tritter.pipeline.scoring import Scores
from tritter.pipeline.stages import importance, vocabulary
from tritter.pipeline.trained import write_states
from tritter.planning.run_memory import RunMemory
from tritter.storage.atomic import atomic_folder, copy_tree, write_text_atomic
from tritter.storage.hashing import tensor_digest
from tritter.storage.hub import locate
from tritter.storage.reading import read_object, read_text
from tritter.storage.records import record
from tritter.storage.writer import TensorStream
from tritter.training import BaseModule, FitResult, discard_saved, fit, read_metrics
from tritter.training.fitting import LEFTOVERS_NAME
from tritter.training.metrics import MAX_METRICS_BYTES
from tritter.transform import plan_expansion

# Options of `data` that select the data; the corpus checksum covers them
_WHICH_TEXT = {"old", "new", "text_field", "validation_fraction"}
_WHICH_TEXT |= {
    "text_column",
    "max_rows",
    "streaming",
    "weights",
    "chat_template",
    "loss_on",
}  # `weights` applies to new domains only
_BASE_VERSION, _SCORES_VERSION = 2, 1
_TRAINER_KEYS = ("accelerator", "precision", "gradient_clip_val", "devices", "compile")
_EXPERT_FILES = ("experts/", "state/experts.")

_logger = logging.getLogger(__name__)


@record
class BaselineFound:
    """Result of the baseline stage.

    Args:
        parameters: number of parameters of the initial model.
        model_hash: hash of the initial model.
        corpus: checksum of the run's data.
    """

    parameters: int
    model_hash: str
    corpus: str


def run_baseline(run: Run) -> None:
    """Create the initial model of the run."""
    is_finished = run.ledger.get("baseline") is not None
    run.stage("baseline", lambda: _baseline(run), label="baseline")
    for scores in run.read_scores("baseline").values() if is_finished else ():
        # An earlier version began texts in another way
        if scores.unit == "nats" and scores.start != run.data.bounds.start:
            raise RequestError(
                f"resume = {run.folder}: an earlier version scored texts that begin with the "
                "end of text; this one begins them as the tokenizer does. Start in another folder."
            )


def _baseline(run: Run) -> StageResult:
    """Write the initial model to the run folder and score it."""
    folder = run.folder / "baseline"
    seconds = {}
    if run.data.initial_checkpoint is not None:
        run.say("baseline", f"checkpoint {run.data.initial_checkpoint.folder}; no pretraining")
        with run.waiting("copying and hashing the checkpoint"):
            lineage = _copy_source(run, folder)
    else:
        base, seconds["pretraining"] = _obtain_base(run)
        with atomic_folder(folder, overwrite=True) as temporary:
            copy_tree(base, temporary)
        lineage = Lineage.of(folder)
    source = run.register("baseline", lineage)
    _score_baseline(run, source)
    flops = {"baseline": run.data.scoring.flops(reading_flops_of(source))}
    if (pretraining_flops := lineage.training_config.get("flops")) is not None:
        flops = {"pretraining": float(pretraining_flops), **flops}
    return StageResult(
        BaselineFound(
            parameters=source.model.num_parameters,
            model_hash=lineage.model_hash,
            corpus=run.data.corpus.digest,
        ),
        flops=flops,
        seconds=seconds,
        leaves=("baseline", score_file("baseline")),
    )


def _score_baseline(run: Run, source: Source) -> None:
    """Score the run's initial model, or load its scores from the cache."""
    made_from = _scores_made_from(run, source)
    location = run.config.cache_dir / "scores" / f"{_content_key(made_from)}.json"
    target = run.folder / score_file("baseline")
    if (scores := _intact_scores(location)) is None:
        with entry_lock(location):
            if (scores := _intact_scores(location)) is None:  # a parallel job may have written it
                run.score(load_whole(source.folder, model=source.model), "baseline")
                scores = json.loads(target.read_text(encoding="utf-8"))
                content = {
                    "format_version": _SCORES_VERSION,
                    "made_from": made_from,
                    "sha256": _content_key(scores),
                    "scores": scores,
                }
                write_text_atomic(location, json.dumps(content))
                return
    write_text_atomic(target, json.dumps(scores))
    run.say("", f"{Scores.of(scores).text()} (cached)")


def _scores_made_from(run: Run, source: Source) -> dict[str, Any]:
    """Return everything that determines the scores bit by bit."""
    is_gpu, text = run.device.type == "cuda", {}
    for name in run.data.domains:  # the tokenised documents in their order
        validation = run.data.scored[name]
        parts = {
            "tokens": validation.tokens,
            "offsets": validation.offsets,
            "bytes": validation.num_bytes,
        }
        digests = {part: tensor_digest(part, tensor) for part, tensor in parts.items()}
        if validation.has_marks:  # of the layout of their windows
            digests["windows"] = "2"
        text[name] = _content_key({**digests, "identifiers": list(validation.identifiers)})
    made_from = {
        "format": "scores",
        "format_version": _SCORES_VERSION,
        "torch": torch.__version__,
        "model": source.own_lineage.model_hash,
        "config": dict(source.config),
        "text": text,
        "tasks": {task.name: task.digest for task in run.data.tasks},
        "end_of_text": run.data.bounds.end,
        **({"start_of_text": list(start)} if (start := run.data.bounds.start) else {}),
        "sequence_length": run.data.sequence_length,
        "batch_size": run.config.evaluation.batch_size,
        "device": torch.cuda.get_device_name(run.device) if is_gpu else "cpu",
        "threads": None if is_gpu else torch.get_num_threads(),
    }
    files = source.own_lineage.file_digests
    of_experts = {n: d for n, d in files.items() if n.startswith(_EXPERT_FILES)}
    if of_experts:
        made_from["experts"] = of_experts
    return made_from


def _intact_scores(location: Path) -> dict[str, Any] | None:
    """Return the cached scores; None if they are missing or damaged."""
    if not location.exists():
        return None
    try:
        content = read_object(location, limit_bytes=PairedScores.MAX_FILE_BYTES)
    except TritterError as error:
        _logger.warning("scoring again: the cached file is damaged: %s: %s", location, error)
        return None
    scores = content.get("scores")
    if not isinstance(scores, dict) or content.get("sha256") != _content_key(scores):
        _logger.warning("scoring again, because the checksum of %s differs", location)
        return None
    return scores


# A base model, from the cache or trained into it.


def _pretrained_model(run: Run) -> Model:
    """Return the run's base model, with the size of its tokenizer."""
    vocab_size = run.data.corpus.tokenizer.get_vocab_size()
    return Model({**run.config.base_model().config, "vocab_size": vocab_size})


def _is_recorded(run: Run) -> bool:
    """Return True if a method of any attempt needs the path integral of pretraining."""
    needed = (needs for config in run.config.attempts for needs in needs_of(config.forgetting))
    return any(kind in needs.state for needs in needed for kind in WeightPath.kinds)


def _obtain_base(run: Run) -> tuple[Path, float]:
    """Find the base model in the cache, or train it; parallel jobs train it once.

    Returns:
        Its folder in the cache, and the seconds that this run spent training it.
    """
    made_from = _base_made_from(run)
    folder = run.config.cache_dir / "bases" / _content_key(made_from)
    logged = folder.with_name(f"{folder.name}.metrics.csv")  # by the base, for later runs
    own, working = run.folder / "metrics_pretraining.csv", run.folder / "pretraining"

    def wait() -> None:
        run.say("baseline", "another run is training this base model; waiting")

    if not _is_intact(folder):
        with entry_lock(folder, on_wait=wait):
            if not _is_intact(folder):
                seconds = _train_base(run, folder, made_from)
                discard_saved(working)
                for path in (logged, own):
                    write_rows(path, read_metrics(working))
                return folder, seconds
    run.say("baseline", f"base model from the cache ({folder.name[:12]})")
    if not logged.is_file() and (rows := read_metrics(working)):
        write_rows(logged, rows)  # this run was killed after it had cached the model
    discard_saved(working)
    if logged.is_file():
        write_text_atomic(own, read_text(logged, limit_bytes=MAX_METRICS_BYTES))
    return folder, 0.0


def _base_made_from(run: Run) -> dict[str, Any]:
    """Return everything that determines the weights of the base model."""
    config, trainer = run.config, asdict(run.config.trainer)
    text = {key: value for key, value in asdict(config.data).items() if key not in _WHICH_TEXT}
    text["packing"] = run.data.packing
    if text.get("piece_characters") is None:
        text.pop("piece_characters", None)  # bases of the usual size keep their key
    streams = {
        name: stream_identity(*sources, key=name)
        for name, sources in run.data.streams.items()
        if name in run.data.old_domains
    }
    pretraining = asdict(config.pretraining)
    del pretraining["max_tokens"]
    return {
        "format": "base",
        "format_version": _BASE_VERSION,
        "recorded": list(WeightPath.kinds) if _is_recorded(run) else [],
        "torch": torch.__version__,
        "model": _pretrained_model(run).config,
        "corpus": run.data.corpus.digest,
        **({"streams": streams} if streams else {}),
        "domains": list(run.data.old_domains),
        "data": text,
        "pretraining": pretraining,
        "warmup_steps": config.pretraining.rate_schedule().warmup_steps,
        "optimizer": config.optimizer_record(),
        # Several processes sum in another order, and sharding changes rounding
        "trainer": {key: trainer[key] for key in _TRAINER_KEYS}
        | {"is_sharded": trainer["strategy"] == "fsdp"}
        | config.trainer.effective_arguments(),
        "seed": config.seed,
    }


def _train_base(run: Run, folder: Path, made_from: Mapping[str, Any]) -> float:
    """Train a base model into the cache and return the training time in seconds."""
    model = _pretrained_model(run)
    pretraining = run.config.pretraining
    run.say(
        "baseline",
        f"training a base model with {model.num_parameters:,} parameters on "
        f"{', '.join(run.data.old_domains)} for {pretraining.max_steps} steps; "
        "the cache keeps it",
    )
    module = BaseModule(
        run.data.masked(new_model(model, seed=run.seed("initialisation"))),
        schedule=pretraining.rate_schedule(),
        optimizer=run.config.optimizer,
    )
    batches = run.data.batches(
        run.data.old_domains, purpose="pretraining", max_steps=pretraining.max_steps
    )
    working = run.folder / "pretraining"
    lineage = Lineage(
        model_hash="",
        base_model_hash="",
        tensor_digests={},
        file_digests={},
        training_config={
            "old": run.data.source_records(run.data.old_domains),
            **run.data.split_record(),
            "made_from": dict(made_from),
        },
        split=run.data.text.split,
        domains=run.data.learned(run.data.old_domains),
    )
    write = partial(
        _write_base,
        folder=folder,
        base=model,
        lineage=lineage,
        tokenizer=run.data.corpus.tokenizer,
        work=working,
    )
    with wandb_finished(run), open_loggers(run, "pretraining") as loggers:
        result = fit(
            module,
            batches,
            settings=run.config.trainer,
            folder=working,
            label="pretraining",
            console=run.console,
            loggers=loggers,
            observers=[PathIntegral(working / LEFTOVERS_NAME)] if _is_recorded(run) else [],
            write_result=write,
        )
        if result.stopped_because is not None:
            raise TritterError(
                f"pretraining stopped: {result.stopped_because}. Nothing was cached; lower "
                f"pretraining.learning_rate ({pretraining.learning_rate})."
            )
    for note in result.notes:
        run.say("data", note)
    run.check_trained(folder)
    run.ledger.watch_disk()
    return result.seconds


def _write_base(
    model: nn.Module,
    result: FitResult,
    *,
    folder: Path,
    base: Model,
    lineage: Lineage,
    tokenizer: Tokenizer,
    work: Path,
) -> None:
    """Write a base model into the cache, unless its training stopped early.

    The caller holds the lock of the cache entry.

    Args:
        model: the trained model.
        result: the result of its training.
        folder: cache entry.
        base: the base model.
        lineage: lineage without the steps and FLOPs.
        tokenizer: tokenizer of the base model.
        work: folder of the training run, which leaves state of methods.
    """
    if result.stopped_because is not None or folder.exists():
        return
    training = {"stage": "pretraining", "flops": result.flops, **lineage.training_config}
    whole = replace(lineage, step=result.steps, training_config=training)
    write_checkpoint(
        folder,
        config=base.config,
        tensors=TensorStream.of(base.disk_tensors(model.state_dict())).to(torch.float32),
        lineage=lambda: whole,
        artifacts=[
            partial(save_tokenizer, tokenizer, end_of_text=END_OF_TEXT),
            partial(write_states, work),
        ],
    )


def _is_intact(folder: Path) -> bool:
    """Return True if a cached base model matches its hashes; move a damaged one away."""
    if not folder.exists():
        return False
    problem = next(Link.of(folder).changes(), None)
    if problem is not None:
        quarantine(folder, reason=problem)
    return problem is None


# A checkpoint, and what a run can't start or learn from.


def check_source(run: Run) -> None:
    """Reject checkpoints that the run can't start or learn from, before using them."""
    attempts = [run.of_attempt(n) for n in range(1, 1 + len(run.config.attempts))]
    for each in attempts:
        _check_teacher(each)
    if (source := run.data.initial_checkpoint) is None:
        return
    for each in attempts:
        raise_problems([*old_data_problems(each.config, each.data.text, source.folder)])
        raise_problems(start_problems(each.config, source.model, folder=source.folder))
        raise_problems(RunMemory(each.config, source.model).problems())
    for expansion in dict.fromkeys(each.config.expansion for each in attempts):
        if expansion and run.config.pipeline.target_params is None:
            # The expert to clone may be selected by data later; any expert will do for this check
            branch = Branch("given", expansion).with_choice([0])
            plan_expansion(source, vocabulary.with_example(branch, source).specs)


def _copy_source(run: Run, target: Path) -> Lineage:
    """Write the initial checkpoint to `target` with unchanged tensors.

    A checkpoint with a lineage continues it; a plain Hugging Face folder starts a new lineage.

    Returns:
        The lineage as written.
    """
    model, source = run.config.model, run.data.initial_checkpoint
    assert isinstance(model, CheckpointModelConfig) and source is not None
    lineage = source.lineage
    if lineage is None:
        lineage = Lineage(
            model_hash="",
            base_model_hash="",
            tensor_digests={},
            file_digests={},
            training_config={"stage": "given", "path": model.path},
        )
    elif lineage.parent_path is not None:
        parent = (source.folder / lineage.parent_path).resolve()
        lineage = replace(lineage, parent_path=os.path.relpath(parent, target.resolve()))

    def checked() -> Lineage:
        source.read_digests()  # raises if tensors differ from the lineage
        return lineage

    try:
        source.check()
        if unread := source.unread:
            text = "tensors that the model class does not read are left out, such as"
            run.say("baseline", f"{len(unread)} {text} {unread[0]}")
        # Weight files can be shared by hard links if nothing writes into them: Tritter and the Hub
        # cache replace whole files. Other tools may overwrite files in place. A file with tensors
        # that the model does not have is written again.
        is_stable = source.lineage is not None or source.folder.parent.name == "snapshots"
        is_linked = is_stable and {t.name for t in source.stored} == set(source.tensors.files)
        return write_checkpoint(
            target,
            config=source.config,
            tensors=source.link_into if is_linked else source.stream(),
            lineage=checked,
            artifacts=[*source.artifacts(), partial(_write_template, run)],
            overwrite=True,
        )
    except TritterError as error:
        raise RequestError(f"{key_name('model.path')}: {error}") from error


def _write_template(run: Run, folder: Path) -> None:
    """Write the chat template of a run, which replaces that of the tokenizer, if it has one."""
    template = ChatChoice(run.config.data.chat_template).read_template()
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _check_teacher(run: Run) -> None:
    """Reject a teacher with another tokenizer or too few positions."""
    location = importance.teacher_folder(run)
    if location is None:
        return
    (key,) = {
        f"forgetting.{one.name}.teacher"
        for one in run.config.forgetting
        if one.kind.needs(one.options).teacher_folder == location
    }
    folder, reason = locate(location, key=key), ""
    checkpoint_model(str(folder), key=key)
    try:
        teacher, start = read_model(folder), run.data.initial_checkpoint
        student = _pretrained_model(run) if start is None else start.model
        own, expected = (each.sizes.vocab_size for each in (teacher, student))
        length, limit = run.data.sequence_length, teacher.position_limit
        if own != expected:
            reason = (
                f"it has {own} tokens, but the initial model of the run has {expected}; use a "
                "teacher with the same tokenizer"
            )
        elif (
            PretrainedTokenizer.read(folder, vocab_size=own).tokenizer.get_vocab()
            != run.data.corpus.tokenizer.get_vocab()
        ):
            reason = (
                "its tokenizer has a different vocabulary than the tokenizer of the run; use a "
                "teacher with the same tokenizer"
            )
        elif limit is not None and length > limit:
            reason = f"it supports {limit} positions, but data.sequence_length = {length}"
    except TritterError as error:
        reason = str(error)
    if reason:
        raise RequestError(Problem(key, location, reason=reason))


def _content_key(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of plain data, used as the name of a cache entry."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""The first stage: the initial model of a run, and its scores."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from tritter.checkpoints import Lineage, Source
from tritter.data.cache import entry_lock
from tritter.errors import TritterError
from tritter.evaluation.statistics import PairedScores, score_file
from tritter.methods.whole import load_whole, reading_flops_of
from tritter.pipeline.base import copy_source, obtain_base
from tritter.pipeline.ledger import StageResult, content_key
from tritter.pipeline.run import Run
from tritter.pipeline.scoring import scores_text
from tritter.storage.atomic import atomic_folder, copy_tree, write_text_atomic
from tritter.storage.hashing import tensor_digest
from tritter.storage.reading import read_object
from tritter.storage.records import record

_FORMAT_VERSION = 1
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


def baseline(run: Run) -> StageResult:
    """Write the initial model to the run folder and score it."""
    folder = run.folder / "baseline"
    seconds = {}
    if run.data.initial_checkpoint is not None:
        run.say("baseline", f"checkpoint {run.data.initial_checkpoint.folder}; no pretraining")
        with run.waiting("copying and hashing the checkpoint"):
            lineage = copy_source(run, folder)
    else:
        base, seconds["pretraining"] = obtain_base(run)
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
    made_from = _made_from(run, source)
    location = run.config.cache_dir / "scores" / f"{content_key(made_from)}.json"
    target = run.folder / score_file("baseline")
    if (scores := _intact_scores(location)) is None:
        with entry_lock(location):
            if (scores := _intact_scores(location)) is None:  # a parallel job may have written it
                run.score(load_whole(source.folder, model=source.model), "baseline")
                scores = json.loads(target.read_text(encoding="utf-8"))
                content = {
                    "format_version": _FORMAT_VERSION,
                    "made_from": made_from,
                    "sha256": content_key(scores),
                    "scores": scores,
                }
                write_text_atomic(location, json.dumps(content))
                return
    write_text_atomic(target, json.dumps(scores))
    known = {name: PairedScores.from_dict(record) for name, record in scores.items()}
    run.say("", f"{scores_text(known)} (cached)")


def _made_from(run: Run, source: Source) -> dict[str, Any]:
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
        text[name] = content_key({**digests, "identifiers": list(validation.identifiers)})
    made_from = {
        "format": "scores",
        "format_version": _FORMAT_VERSION,
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
    if not isinstance(scores, dict) or content.get("sha256") != content_key(scores):
        _logger.warning("scoring again, because the checksum of %s differs", location)
        return None
    return scores

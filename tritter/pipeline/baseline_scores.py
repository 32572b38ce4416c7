"""The baseline's scores, kept in the cache: the jobs of a sweep that start alike score it once."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from tritter.checkpoint import lineage_of
from tritter.data.cache import one_at_a_time
from tritter.data.tokens import TokenisedDocuments
from tritter.errors import TritterError
from tritter.evaluation.paired_scores import PairedScores
from tritter.experts.whole import load_whole
from tritter.models import load_model, read_config
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import content_key
from tritter.pipeline.scoring import MAX_SCORE_BYTES, score_file, told
from tritter.storage.atomic import write_text_atomic
from tritter.storage.hashing import tensor_digest
from tritter.storage.reading import read_object

FORMAT_VERSION = 1
NAME = "baseline"
_EXPERT_FILES = ("experts/", "state/experts.")

logger = logging.getLogger(__name__)


def score_baseline(context: RunContext, folder: Path) -> None:
    """Put the scores of the run's base into the run folder, from the cache where it has them.

    Raises:
        RequestError: the cache cannot be written.
    """
    made_from = _made_from(context, folder)
    place = context.config.cache_dir / "scores" / f"{content_key(made_from)}.json"
    target = context.folder / score_file(NAME)
    if (scores := _intact_scores(place)) is None:
        with one_at_a_time(place):
            if (scores := _intact_scores(place)) is None:  # nor from a job beside this one
                model = load_model if context.config.experts is None else load_whole
                context.score(model(folder), NAME)
                scores = json.loads(target.read_text(encoding="utf-8"))
                content = {
                    "format_version": FORMAT_VERSION,
                    "made_from": made_from,
                    "sha256": content_key(scores),
                    "scores": scores,
                }
                write_text_atomic(place, json.dumps(content))
                return
    write_text_atomic(target, json.dumps(scores))
    known = {name: PairedScores.from_dict(held) for name, held in scores.items()}
    context.say("", f"{told(known)} (scored before)")


def _made_from(context: RunContext, folder: Path) -> dict[str, Any]:
    """Return everything that determines the scores, to the last bit."""
    is_gpu = context.device.type == "cuda"
    made_from = {
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "model": lineage_of(folder).model_hash,
        "config": dict(read_config(folder)),
        "text": {
            name: _text_digest(context.corpus.domains[name].validation) for name in context.domains
        },
        "tasks": {task.name: task.digest for task in context.tasks},
        "end_of_text": context.end_of_text_id,
        "sequence_length": context.config.data.sequence_length,
        "batch_size": context.config.evaluation.batch_size,
        "device": torch.cuda.get_device_name(context.device) if is_gpu else "cpu",
        "threads": None if is_gpu else torch.get_num_threads(),
    }
    digests = lineage_of(folder).file_digests
    of_experts = {n: d for n, d in digests.items() if n.startswith(_EXPERT_FILES)}
    if of_experts and context.config.experts is not None:
        made_from["experts"] = of_experts
    return made_from


def _text_digest(documents: TokenisedDocuments) -> str:
    """Hash the documents that are scored, in their order, as they were cut into tokens."""
    parts = {"tokens": documents.tokens, "offsets": documents.offsets, "bytes": documents.num_bytes}
    digests = {name: tensor_digest(name, tensor) for name, tensor in parts.items()}
    return content_key({**digests, "identifiers": list(documents.identifiers)})


def _intact_scores(place: Path) -> dict[str, Any] | None:
    """Return what the cache holds; None where it holds nothing, or not what it once held."""
    if not place.exists():
        return None
    try:
        content = read_object(place, limit_bytes=MAX_SCORE_BYTES)
    except TritterError as error:
        logger.warning("%s is scored anew: %s", place, error)
        return None
    scores = content.get("scores")
    if not isinstance(scores, dict) or content.get("sha256") != content_key(scores):
        logger.warning("%s is scored anew: it is not what was once written there", place)
        return None
    return scores

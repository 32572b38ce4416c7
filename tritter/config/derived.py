"""Values of keys that are null, from the model that a run starts with and the length of the run."""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from tritter.checkpoints import Lineage
from tritter.checkpoints.record import window_length
from tritter.core.families.config_file import read_model_file
from tritter.errors import TritterError
from tritter.options import RunRequest, read_options
from tritter.storage.reading import named_path
from tritter.targets import TARGET
from tritter.training.options import EVALUATIONS, STEPS, positive_count

_Bodies = Mapping[str, Mapping[str, Any]]  # group → its body

_LENGTH, _BATCH = "sequence_length", "batch_size"
_SMALL_LENGTH, _MOST = 128, 16  # of a base that the run trains
# A token of a validation costs a third of one of training
_VALIDATION_BUDGET = 0.1 * 3  # tokens of all validations, relative to those of training
_VALIDATION_TOKENS = (1024, 4096)  # usual range per domain
_FEWEST_SCORED = 64  # documents per domain, by which intervals are narrow enough
_FEWEST_VALIDATED = 64  # per domain
_SAMPLES = "num_sequences"
_FEWEST, _FEWEST_TOKENS = 8, 2048  # sequences, or fewer if they have as many tokens
_UNMIXED_SHARE = 0.1  # of generated text that only other methods read


def with_batches(bodies: _Bodies) -> dict[str, Mapping[str, Any]]:
    """Return the bodies with `data.sequence_length` and `data.batch_size`.

    A base that the run trains reads 16 sequences of 128 tokens. A checkpoint reads windows as in
    its last training run, else up to 1024 tokens, and at most as many tokens per batch.
    """
    data = bodies.get("data", {})
    length, size = data.get(_LENGTH, 0), data.get(_BATCH, 0)
    if length is None:
        length = _default_length(bodies.get("model", {}))
    if size is None:
        trainer = bodies.get("trainer", {})
        processes = positive_count(trainer.get("devices")) or 1
        if trainer.get("strategy", "auto") == "auto":
            processes = 1
        size = _MOST
        if bodies.get("model", {}).get("model_type") == "hf":
            fitting = _MOST * _SMALL_LENGTH // (positive_count(length) or _SMALL_LENGTH)
            size = min(_MOST, max(1, fitting))
        size = processes * max(1, size // processes)
    chosen = {_LENGTH: length, _BATCH: size}
    return {**bodies, "data": {**data, **{key: chosen[key] for key in chosen if key in data}}}


def _default_length(model: Mapping[str, Any]) -> int:
    if model.get("model_type") != "hf":
        return _SMALL_LENGTH
    lineage = positions = None
    # A damaged checkpoint is reported elsewhere; that of the hub is not known yet
    with suppress(TritterError):
        folder = named_path(str(model.get("path")), key="model.path")
        if Path(folder).is_dir():
            positions = read_model_file(folder).position_limit
            lineage = Lineage.read(folder)
    return window_length(lineage, positions)


def with_samples(bodies: _Bodies, classes: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the bodies with `num_sequences` of forgetting methods.

    It is the default of the method. But a method reads no more in all than the sequences of
    training, or the share that it replays. The fewest are 8, or 2,048 tokens if these are fewer
    sequences, but at least 2. Generated text that only other methods read has a tenth of the
    sequences that training reads, and at least 8 if it reads so many.
    """
    data, trainer = bodies.get("data", {}), bodies.get("trainer", {})
    factors = (
        bodies.get("training", {}).get(STEPS),
        data.get(_BATCH),
        trainer.get("accumulate_grad_batches", 1),
    )
    length = positive_count(data.get(_LENGTH)) or _SMALL_LENGTH
    fewest = min(_FEWEST, max(2, _FEWEST_TOKENS // length))
    num_read = math.prod(filter(None, map(positive_count, factors)))
    steps = positive_count(factors[0]) or 1
    methods = dict(bodies.get("forgetting", {}))
    for name, body in methods.items():
        kind = classes.get(f"forgetting.{name}")
        if kind is None or not isinstance(body, Mapping) or body.get(_SAMPLES, 0) is not None:
            continue
        most, share = getattr(kind.Options(), _SAMPLES), body.get("fraction", 1)
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            share = 1  # reported elsewhere
        asked = {**body, _SAMPLES: most}
        asked.pop(TARGET, None)
        options = read_options(kind.Options, asked, prefix="", problems=[])  # reported elsewhere
        times = 1
        if options is not None:
            times = bool(kind.needs(options).prepares) + kind.refreshes(options, steps)
        least = fewest if share else max(fewest, min(_FEWEST, num_read))
        at_once = -(-num_read // max(1, times))
        count = min(most, max(least, math.ceil(at_once * (share or _UNMIXED_SHARE))))
        methods[name] = {**body, _SAMPLES: count}
    return {**bodies, "forgetting": methods} if "forgetting" in bodies else dict(bodies)


def validation_period(config: RunRequest) -> int:
    """Return the default of `evaluation.every_n_steps`, a tenth of the steps or more.

    All validations together cost at most a tenth of training.
    """
    fewest, _ = _VALIDATION_TOKENS
    count = int(_budget(config)) // (fewest * max(1, len(config.text.domains)))
    return max(1, config.training.max_steps // max(1, min(EVALUATIONS, count)))


def validation_tokens(config: RunRequest, *, num_domains: int) -> int:
    """Return the number of tokens of each domain that a validation during training reads."""
    _, most = _VALIDATION_TOKENS
    period, steps = config.evaluation.every_n_steps, config.training.max_steps
    if period != validation_period(config):  # chosen by the user
        return most
    count = 1 + math.ceil(steps / period)  # one before the first step
    return max(_FEWEST_VALIDATED, min(most, int(_budget(config)) // (count * num_domains)))


def _budget(config: RunRequest) -> float:
    return _VALIDATION_BUDGET * _trained_tokens(config)


def _trained_tokens(config: RunRequest) -> float:
    data, trainer = config.data, config.trainer
    of_step = data.batch_size * data.sequence_length * trainer.accumulate_grad_batches
    return float(of_step * config.training.max_steps)


def scored_counts(config: RunRequest, sizes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return domain → number of its held-out documents that are scored, in their random order.

    By default they are all documents of a run that trains its base. A run from a checkpoint scores
    about as many tokens as it trains on, over all domains, but at least 64 documents of each.

    Args:
        sizes: domain → tokens of each held-out document.
    """
    limit, is_base = config.evaluation.max_documents, config.model.model_type != "hf"
    if limit is not None or is_base:
        return {name: min(limit or len(each), len(each)) for name, each in sizes.items()}
    budget = _trained_tokens(config) / max(1, len(sizes))
    fitting = {name: bisect(list(accumulate(each)), budget) for name, each in sizes.items()}
    return {name: min(len(sizes[name]), max(_FEWEST_SCORED, n)) for name, n in fitting.items()}

"""Notes on the inputs of a run, and on the weights that it publishes."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tritter.config.schema import RunConfig
from tritter.data.answers import TrainingCounts, scoring_note
from tritter.data.packing import padding_fraction
from tritter.methods.forgetting import needs_of
from tritter.pipeline.run_data import RunData
from tritter.training import FitResult, read_metrics
from tritter.training.options import callbacks_of

_MUCH_PADDING, _SMALL_SHARE = 0.1, 0.05


def packing_notes(data: RunData) -> Iterator[str]:
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
        if share > _MUCH_PADDING:
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


def scored_notes(data: RunData) -> Iterator[str]:
    """Yield a note on each domain of which not all held-out documents are scored."""
    is_default = data.config.evaluation.max_documents is None
    why = ", in proportion to the training" if is_default else ""
    for name, documents in data.scored.items():
        total = len(data.corpus.domains[name].validation)
        if len(documents) < total:
            yield (
                f"{name}: scores read {len(documents):,} of {total:,} held-out documents{why}; "
                f"evaluation.max_documents={total} reads all."
            )


def share_notes(
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


def best_weights(config: RunConfig, folder: Path, result: FitResult) -> str:
    """Return which weights of a training are the best, and the start's value if it is better."""
    line = f"the best weights are those of step {result.best_step} of {result.steps}"
    (saver,) = callbacks_of("ModelCheckpoint", config)
    metric, sign = str(saver.options["monitor"]), -1 if saver.options.get("mode") == "max" else 1
    values = {int(row["step"]): row[metric] for row in read_metrics(folder) if row.get(metric)}
    start, best = (float(values.get(step, "nan")) for step in (0, result.best_step or 0))
    if sign * start < sign * best:  # not for a metric that the start does not have
        line += f"; {metric} was better before the first step: {start:.4g}, now {best:.4g}"
    return line

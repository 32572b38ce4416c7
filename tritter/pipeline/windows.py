"""Long windows of a run with a longer context: scores, loss by position, and their checks.

The long documents of a domain are the scored documents with more tokens than the context of the
source. The source reads them in windows of its own length, and also in long windows, for the
loss by position. The grown model reads them in long windows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from json import dumps
from typing import Any

import torch
from torch import Tensor, nn

from tritter.core.expansions import target_model
from tritter.core.families import Flops
from tritter.data.options import NamedTextConfig
from tritter.data.packing import Windows
from tritter.data.tokens import TokenisedDocuments
from tritter.evaluation.gate import Check, retention_check
from tritter.evaluation.losses import document_losses
from tritter.evaluation.statistics import PairedScores, score_file
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.pipeline.run_data import RunData
from tritter.pipeline.scoring import Scores
from tritter.planning.run_memory import tokens_note
from tritter.report.summary import WindowsRecord
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import read_object
from tritter.storage.records import validate_record

_NUM_BUCKETS = 16  # of positions
_CHARACTERS_PER_TOKEN = 5  # an upper estimate for prose
_SOURCE, _SOURCE_LONG = "source-windows", "source-long"  # names of the source's scores
_NAMES = ("source", "source_long", "expanded", "final")


@dataclass(frozen=True, slots=True)
class LongScores:
    """Scores of one model on the long documents.

    Args:
        scores: domain → losses, paired by document.
        positions: domain → mean loss and number of tokens of each bucket of positions.
    """

    scores: Mapping[str, PairedScores]
    positions: Mapping[str, Mapping[str, list[float]]]

    @classmethod
    def of(
        cls, run: Run, data: RunData, model: nn.Module, *, source_length: int, length: int
    ) -> "LongScores":
        """Score a model on the long documents, in windows of `length`, and move it to the CPU."""
        scores, positions, reader = {}, {}, data.scoring.reader
        factor = max(1, length // data.scoring.sequence_length)
        model.to(run.device)
        with run.progress_bars() as new_bar:
            for name, documents in _long_documents(data, source_length).items():
                sums = torch.zeros(2, length, dtype=torch.float64)
                scores[name] = document_losses(
                    model,
                    documents,
                    sequence_length=length,
                    bounds=reader.bounds,
                    batch_size=max(1, reader.batch_size // factor),
                    progress=new_bar(f"scoring {name} in windows of {length:,}"),
                    positions=sums,
                )
                positions[name] = _buckets(sums)
        model.to("cpu")
        return cls(scores, positions)

    def write(self, run: Run, name: str) -> str:
        """Write the scores and return their file, relative to the run folder."""
        plain = {"scores": Scores(self.scores).plain(), "positions": self.positions}
        write_text_atomic(run.folder / score_file(name), dumps(plain))
        return score_file(name)

    @classmethod
    def read(cls, run: Run, name: str) -> "LongScores":
        """Return scores that were written under a name."""
        plain = read_object(run.folder / score_file(name), limit_bytes=PairedScores.MAX_FILE_BYTES)
        return cls(Scores.of(plain["scores"]), plain["positions"])


def check(run: Run) -> None:
    """Reject data that is too small for the windows after an expansion, before any training."""
    size, needed, notes = run.data.text.split.piece_characters, 0, list[str]()
    for config in run.config.attempts:
        if not any(spec.expansion_type == "context" for spec in config.expansion):
            continue
        models = (run.data.model, target_model(run.data.model, config.expansion))
        old, new = (each.position_limit or 0 for each in models)
        run.data.reading(new).check_text()
        needed = max(needed, _CHARACTERS_PER_TOKEN * new)
        notes.append(tokens_note(new, config))
        if run.data.initial_checkpoint is None and config.data.sequence_length < old:
            notes.append(
                f"the base trains on {config.data.sequence_length} tokens, but its context counts "
                f"as {old} (model.max_position_embeddings); set both to the same length"
            )
    if needed > size and isinstance(run.config.data, NamedTextConfig):
        why = f"texts above {2 * size:,} characters are cut into pieces of about {size:,}"
        notes.append(f"{why}; longer ones, of a new lineage: data.piece_characters={needed}")
    for note in filter(None, dict.fromkeys(notes)):  # each once, for all attempts
        run.say("", note)


def _long_documents(data: RunData, length: int) -> dict[str, TokenisedDocuments]:
    """Return domain → its scored documents of more than `length` tokens, if there are any.

    The tokens are those of the run's own tokenizer, so that all models read the same documents.
    """
    found, own = {}, data.reading(data.sequence_length).scored
    for name, documents in data.scored.items():
        sizes = documents.offsets.diff()
        chosen = (own[name].offsets.diff() > length).nonzero().flatten().tolist()
        if chosen:
            found[name] = TokenisedDocuments(
                tokens=torch.cat([documents.document(index) for index in chosen]),
                offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes[chosen].cumsum(0)]),
                num_bytes=documents.num_bytes[chosen],
                identifiers=[documents.identifiers[index] for index in chosen],
            )
    return found


def _buckets(sums: Tensor) -> dict[str, list[float]]:
    """Return the mean loss of consecutive positions, without buckets that have no tokens."""
    ends = torch.linspace(0, sums.shape[1], _NUM_BUCKETS + 1).round().long().unique().tolist()
    found: dict[str, list[float]] = {"end": [], "loss": [], "tokens": []}
    for begin, end in pairwise(ends):
        nats, tokens = sums[:, begin:end].sum(dim=1).tolist()
        if tokens:
            for key, value in (("end", end), ("loss", nats / tokens), ("tokens", int(tokens))):
                found[key].append(value)
    return found


def flops(data: RunData, reading: Flops, *, source_length: int, length: int) -> float:
    """Return the FLOPs of one pass over the long documents."""
    texts = _long_documents(data, source_length).values()
    return sum(
        reading.of(window.length)
        for documents in texts
        for window in Windows(documents, sequence_length=length, bounds=data.bounds)
    )


class LongWindows:
    """The scores of a branch in long windows, for an expansion that makes the context longer.

    Args:
        run: the run, with the data as the model to score reads it.
        branch: the branch; of several tasks, the first one, which has the expansion.
    """

    def __init__(self, run: Run, branch: Branch) -> None:
        self._run, self._branch = run, branch

    @property
    def is_longer(self) -> bool:
        """Whether the expansion of the branch gives its model a longer context."""
        if not self._branch.specs:
            return False
        plan = self._run.planned(self._branch)
        return plan.source.position_limit != plan.target.position_limit

    def _lengths(self) -> tuple[int, int]:
        plan = self._run.planned(self._branch)
        old, new = plan.source.position_limit, plan.target.position_limit
        assert old is not None and new is not None
        return old, new

    def score_start(
        self, before: nn.Module, after: nn.Module, readings: tuple[Flops, Flops]
    ) -> tuple[list[str], float]:
        """Score source and result of an expansion; return the files and the FLOPs.

        Args:
            before: the source.
            after: the result.
            readings: FLOPs of reading a sequence, of both models.
        """
        run, branch, (old, new) = self._run, self._branch, self._lengths()
        longer = run.reading(f"{branch.name}/expanded").data
        # The same documents in the tokens of the source
        own = run.data.reading(new, tokenizer=run.data.tokenizer)
        spent, files = 0.0, []
        for where, model, reading, length, name in (
            (own, before, readings[0], old, _SOURCE),
            (own, before, readings[0], new, _SOURCE_LONG),
            (longer, after, readings[1], new, "expanded-long"),
        ):
            found = LongScores.of(run, where, model, source_length=old, length=length)
            files.append(found.write(run, f"{branch.name}-{name}"))
            spent += flops(where, reading, source_length=old, length=length)
        counts = {name: len(each) for name, each in _long_documents(own, old).items()}
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        listed = listed or "none, so nothing checks the longer context"
        run.say(
            "",
            f"training windows of {new:,} tokens, {longer.batch_size} per batch; "
            f"scored documents of more than {old:,} tokens: {listed}",
        )
        return files, spent

    def score_trained(self, model: nn.Module, reading: Flops) -> tuple[list[str], float]:
        """Score a trained model on the long documents; return the files and the FLOPs.

        Args:
            model: the model.
            reading: FLOPs of reading a sequence.
        """
        run = self._run
        old, new = run.source("baseline").model.position_limit, run.data.sequence_length
        assert old is not None
        found = LongScores.of(run, run.data, model, source_length=old, length=new)
        spent = flops(run.data, reading, source_length=old, length=new)
        return [found.write(run, f"{self._branch.name}-trained-long")], spent

    def checks(self, last: Branch) -> Iterator[Check]:
        """Yield the checks of the long windows of an attempt, one per domain with long documents.

        The trained model in long windows is compared with the source in windows of its own length.
        With few long documents the numbers are only reported: they do not decide on the run.

        Args:
            last: the branch of the last task.
        """
        run = self._run
        if not self.is_longer:
            return
        gate = run.config.gate
        before = LongScores.read(run, f"{self._branch.name}-{_SOURCE}").scores
        after = LongScores.read(run, f"{last.name}-trained-long").scores
        for name in before:
            check = retention_check(
                name, before[name], after[name], bound=gate.retention, confidence=gate.confidence
            )
            if check.verdict == "undecided" and len(before[name]) < Check.MIN_DOCUMENTS:
                detail = f"{check.detail.partition(';')[0]}; only reported"
                check = replace(
                    check, verdict="reported", detail=detail, bound=None, documents_needed=None
                )
            yield replace(check, name="long_windows")

    def record(self, last: Branch) -> WindowsRecord | None:
        """Return the part of the summary, or None if no expansion made the context longer.

        Args:
            last: the branch of the last task.
        """
        if not self.is_longer:
            return None
        run, first, (old, new) = self._run, self._branch, self._lengths()
        files = (_SOURCE, _SOURCE_LONG, "expanded-long")
        names = [*(f"{first.name}-{each}" for each in files), f"{last.name}-trained-long"]
        models = dict(zip(_NAMES, (LongScores.read(run, each) for each in names), strict=True))
        record: dict[str, Any] = {
            "source_length": old,
            "length": new,
            "scores": {
                domain: {name: each.scores[domain].record() for name, each in models.items()}
                for domain in models[_NAMES[0]].scores
            },
            "positions": {
                domain: {
                    name: dict(each.positions[domain])
                    for name, each in models.items()
                    if name != _NAMES[0]
                }
                for domain in models[_NAMES[0]].scores
            },
        }
        return validate_record(record, WindowsRecord, what="summary.json: windows")

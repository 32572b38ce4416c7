"""Losses of a checkpoint by domain, for given data or for the domains in its lineage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from tritter.checkpoints import Lineage
from tritter.checkpoints.run_text import RunText, recorded_chat
from tritter.config.validation import cache_folder
from tritter.core.models import load_tokenizer
from tritter.data.answers import scoring_note, unanswered_note
from tritter.data.corpus import Corpus
from tritter.data.documents import PIECE_CHARACTERS
from tritter.data.options import TextDataConfig
from tritter.data.records import DEFAULT_FIELD
from tritter.data.sources import TextRequest, skipped_note
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments, unencoded_note
from tritter.errors import RequestError
from tritter.evaluation.statistics import PairedScores
from tritter.evaluation.tasks import Reader
from tritter.pipeline.scoring import Scoring
from tritter.terminal import NewBar, no_bar

_MAX_TOKENS_PER_DOCUMENT = 1024  # as in conf/evaluation/default.yaml; at least one window


@dataclass(frozen=True, slots=True, eq=False)
class DomainsToScore:
    """Documents to score.

    Args:
        documents: domain → its documents; for domains of a lineage, the held-out documents.
        notes: sentences for the report.
    """

    documents: Mapping[str, TokenisedDocuments]
    notes: tuple[str, ...]

    @classmethod
    def named(
        cls,
        sources: Mapping[str, Sequence[str]],
        tokenizer: PretrainedTokenizer,
        *,
        folder: Path,
        lineage: Lineage | None,
        length: int,
        text_field: str = DEFAULT_FIELD,
    ) -> "DomainsToScore":
        """Return all documents in some files, truncated to 1,024 tokens or to longer windows.

        Conversations are tokenised as in training of the checkpoint in `folder`.
        """
        size = lineage.split.piece_characters if lineage and lineage.split else PIECE_CHARACTERS
        found = {
            name: TextRequest(
                paths, key=f"--data {name}", text_field=text_field, piece_characters=size
            ).documents()
            for name, paths in sources.items()
        }
        count = sum(each.num_conversations() for each in found.values())
        load = partial(load_tokenizer, folder)
        chat = recorded_chat(lineage).of_corpus(load, is_chat=count > 0)
        documents = {
            name: TokenisedDocuments.of(
                domain_documents,
                tokenizer.tokenizer,
                max_tokens_per_document=max(length, _MAX_TOKENS_PER_DOCUMENT),
                chat=chat,
            )
            for name, domain_documents in found.items()
        }
        files = (skipped_note(n, paths, key=f"--data {n}") for n, paths in sources.items())
        notes = list(filter(None, files))
        notes += [note for texts in found.values() for note in texts.notes]
        for n, each in documents.items():
            texts = (one.text for one in found[n])
            notes += filter(None, [unencoded_note(n, (each,), texts, tokenizer.tokenizer)])
        if chat is not None:
            notes.append(chat.note(count))
            notes += filter(
                None, (unanswered_note(n, (each,), found[n]) for n, each in documents.items())
            )
        return cls(documents, tuple(notes))

    @classmethod
    def learned(
        cls, folder: Path, lineage: Lineage | None, tokenizer: PretrainedTokenizer, *, length: int
    ) -> "DomainsToScore":
        """Return the held-out documents of every domain in a lineage, truncated as above."""
        text = None
        if lineage is not None:
            data = TextDataConfig(
                source="text",
                text_field=DEFAULT_FIELD,
                old=None,
                new={},
                tasks=[],
                weights=None,
                vocab_size=257,
                sequence_length=2,
                batch_size=1,
                validation_fraction=None,
            )
            try:
                text = RunText.of(
                    str(folder), data, seed=lineage.split.seed if lineage.split else 0
                )
            except RequestError as error:
                problem = error.problems[0]
                if problem.key != "data.old":
                    raise
                advice = "pass data with --data PATH"
                replaced = replace(problem, key="--checkpoint", value=folder, advice=advice)
                raise RequestError(replaced) from error
        if text is None or not text.domains:
            raise RequestError(
                f"--checkpoint = {folder}: its lineage records no training data; pass data with "
                "--data PATH, or benchmarks with --tasks NAMES."
            )
        found = text.documents()
        is_chat = any(each.num_conversations() for each in found.values())
        corpus = Corpus.build(
            found,
            origin="the domains in the lineage",
            vocab_size=tokenizer.tokenizer.get_vocab_size(),
            validation_fraction=text.split.validation_fraction,
            max_validation_tokens_per_document=max(length, _MAX_TOKENS_PER_DOCUMENT),
            seed=text.split.seed,
            cache_dir=cache_folder(None),
            tokenizer=tokenizer.tokenizer,
            chat=recorded_chat(lineage).of_corpus(partial(load_tokenizer, folder), is_chat=is_chat),
        )
        documents = {name: domain.validation for name, domain in corpus.domains.items()}
        held_out = (
            f"Documents held out from all training of this checkpoint: {', '.join(documents)}."
        )
        others = (note for note in text.notes if not note.startswith("Old text as"))
        return cls(documents, (held_out, *corpus.notes, *others))

    def first(self, limit: int | None, *, length: int) -> "DomainsToScore":
        """Return the first documents of each domain, with notes on what is not scored.

        Args:
            limit: maximum number of documents per domain.
            length: length of the windows into which documents are cut.
        """
        documents, notes = dict(self.documents), list(self.notes)
        for name, each in self.documents.items():
            if limit and len(each) > limit:
                documents[name] = each.first(limit)
                notes.append(f"{name}: {limit:,} of {len(each):,} documents are scored.")
        most = max(length, _MAX_TOKENS_PER_DOCUMENT)
        for name, each in documents.items():
            cut = int((each.offsets.diff() > most - 4).sum())  # a cut ends with a character
            begin = f"{name}: only the first {most:,} tokens of {cut:,} documents are scored."
            note = scoring_note(name, each, sequence_length=length, max_tokens=most)
            notes += filter(None, [note or (begin if cut else "")])
        return DomainsToScore(documents, tuple(notes))

    def losses(
        self,
        model: nn.Module,
        tokenizer: PretrainedTokenizer,
        *,
        length: int,
        batch_size: int,
        new_bar: NewBar = no_bar,
    ) -> dict[str, PairedScores]:
        """Score the documents of each domain.

        Args:
            length: length of the windows into which documents are cut.
        """
        reader = Reader(tokenizer.tokenizer, tokenizer.bounds, batch_size)
        return Scoring(self.documents, (), reader, length).score(model, new_bar=new_bar)

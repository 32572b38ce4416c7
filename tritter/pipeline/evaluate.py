"""A checkpoint's losses, domain by domain: of text that is named, or of what it learned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tritter.checkpoints import Lineage
from tritter.checkpoints.run_text import run_text
from tritter.config.validation import cache_folder
from tritter.data.corpus import build_corpus
from tritter.data.documents import notes_of
from tritter.data.options import TextDataConfig
from tritter.data.records import DEFAULT_FIELD
from tritter.data.sources import source_documents
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments, tokenise
from tritter.errors import RequestError
from tritter.evaluation.statistics import PairedScores
from tritter.evaluation.tasks import Reader
from tritter.pipeline.context import all_documents
from tritter.pipeline.scoring import Scoring
from tritter.terminal import NewBar, no_bar

MAX_TOKENS_PER_DOCUMENT = 1024  # as conf/evaluation/default.yaml has it
MAX_SEQUENCE_LENGTH = 1024


@dataclass(frozen=True, slots=True, eq=False)
class DomainsToScore:
    """Documents that are scored.

    Args:
        documents: domain → its documents; of what a lineage learned those that were held out.
        notes: what is worth telling, a sentence each.
    """

    documents: Mapping[str, TokenisedDocuments]
    notes: tuple[str, ...]


def named_domains(
    sources: Mapping[str, Sequence[str]], tokenizer: PretrainedTokenizer
) -> DomainsToScore:
    """Return all documents of text that is named, each up to its first tokens.

    Raises:
        RequestError: a path means no text.
        TextFileError: files can't be read as what they are.
    """
    found = {
        name: source_documents(paths, key=f"--data {name}", text_field=DEFAULT_FIELD)
        for name, paths in sources.items()
    }
    documents = {
        name: tokenise(
            of_domain, tokenizer.tokenizer, max_tokens_per_document=MAX_TOKENS_PER_DOCUMENT
        )
        for name, of_domain in found.items()
    }
    return DomainsToScore(
        documents, tuple(note for of_domain in found.values() for note in notes_of(of_domain))
    )


def learned_domains(
    folder: Path, lineage: Lineage | None, tokenizer: PretrainedTokenizer
) -> DomainsToScore:
    """Return what was held out of every domain that a lineage learned.

    Raises:
        RequestError: it learned none, or its text is not at hand.
    """
    text = None
    if lineage is not None:
        data = TextDataConfig(
            source="text",
            text_field=DEFAULT_FIELD,
            old=None,
            new={},
            tasks=[],
            vocab_size=257,
            sequence_length=2,
            batch_size=1,
            validation_fraction=None,
        )
        try:
            text = run_text(str(folder), data, seed=lineage.split.seed if lineage.split else 0)
        except RequestError as error:
            problem = error.problems[0]
            if problem.key != "data.old":
                raise
            advice = "name text, --data NAME=PATH"
            of_folder = replace(problem, key="--checkpoint", value=folder, advice=advice)
            raise RequestError(of_folder) from error
    if text is None or not text.domains:
        raise RequestError(
            f"--checkpoint = {folder}: its lineage records no text that it learned; name text, "
            "--data NAME=PATH, or benchmarks, --tasks NAMES."
        )
    corpus = build_corpus(
        all_documents(text.domains),
        origin="what the lineage learned",
        vocab_size=tokenizer.tokenizer.get_vocab_size(),
        validation_fraction=text.split.validation_fraction,
        max_validation_tokens_per_document=MAX_TOKENS_PER_DOCUMENT,
        seed=text.split.seed,
        cache_dir=cache_folder(None),
        tokenizer=tokenizer.tokenizer,
    )
    documents = {name: domain.validation for name, domain in corpus.domains.items()}
    held_out = f"Documents that no training of this checkpoint saw: of {', '.join(documents)}."
    others = (note for note in text.notes if not note.startswith("Old text as"))
    return DomainsToScore(documents, (held_out, *corpus.notes, *others))


def sequence_length(lineage: Lineage | None, positions: int | None) -> int:
    """Return into how long windows documents are cut: as in the last training, where recorded."""
    data = lineage.training_config.get("data") if lineage is not None else None
    recorded = data.get("sequence_length") if isinstance(data, Mapping) else None
    longest = positions or MAX_SEQUENCE_LENGTH
    wanted = recorded if isinstance(recorded, int) and recorded >= 2 else MAX_SEQUENCE_LENGTH
    return min(wanted, longest)


def domain_losses(
    model: nn.Module,
    domains: Mapping[str, TokenisedDocuments],
    tokenizer: PretrainedTokenizer,
    *,
    length: int,
    batch_size: int,
    new_bar: NewBar = no_bar,
) -> dict[str, PairedScores]:
    """Score the documents of each domain.

    Args:
        length: of the windows that documents are cut into.

    Raises:
        TritterError: a domain has no token.
    """
    reader = Reader(tokenizer.tokenizer, tokenizer.end_of_text_id, batch_size)
    return Scoring(domains, (), reader, length).score(model, new_bar=new_bar)


def read_domain_paths(words: Iterable[str]) -> dict[str, list[str]]:
    """Return domain → paths of words NAME=PATH; a name may come again.

    Raises:
        RequestError: a word names no domain.
    """
    sources: dict[str, list[str]] = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not (sign and path and name.replace("-", "_").isidentifier()):
            example = "" if sign else f" Did you mean 'text={word}'?"
            raise RequestError(
                f"--data = {word}: allowed is NAME=PATH, with a name of letters, digits, - and _."
                f"{example}"
            )
        sources.setdefault(name, []).append(path)
    return sources

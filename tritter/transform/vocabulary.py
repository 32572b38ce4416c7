"""Bind `vocab` to the tokenizer of its source, and write the extended tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tritter.checkpoints import Source
from tritter.checkpoints.state import KeptSequences
from tritter.core.expansions import BoundVocab, ExpansionSpec, Vocab
from tritter.data.tokens import PretrainedTokenizer, parsed_tokenizer
from tritter.data.vocabulary import BpeTokenizer, ExtendedTokenizer, pursuit_rows, retokenised
from tritter.errors import Problem, RequestError
from tritter.storage.hub import locate
from tritter.storage.reading import TOKENIZER_NAME, read_object

_KEY = "expansion.vocab"
_OTHER_FORMS = ("vocab.json", "merges.txt", "tokenizer.model", "tekken.json")


def learned(spec: Vocab, source: Source, texts: Iterable[str]) -> Vocab:
    """Return options with the merges that some texts give."""
    size = source.model.sizes.vocab_size
    merges = BpeTokenizer(PretrainedTokenizer.read(source.folder, vocab_size=size).tokenizer).learn(
        texts,
        num_tokens=spec.num_tokens(source.model),
        is_at_most=spec.new_tokens is None,
    )
    return replace(spec, merges=tuple(chain.from_iterable(merges)))


def bound_vocabulary(spec: ExpansionSpec, source: Source) -> BoundVocab:
    """Return `vocab` bound to the tokenizer of the source."""
    assert isinstance(spec, Vocab)
    size = source.model.sizes.vocab_size
    tokenizer = BpeTokenizer(PretrainedTokenizer.read(source.folder, vocab_size=size).tokenizer)
    stored = read_object(source.folder / TOKENIZER_NAME)
    kept = {name: stored.get(name) for name in ("truncation", "padding")}
    content, donor = {**tokenizer.content, **kept}, None
    if spec.tokenizer is not None:
        key = f"{_KEY}.tokenizer"
        donor = locate(spec.tokenizer, key=key)
        texts = BpeTokenizer(
            PretrainedTokenizer.read(donor, vocab_size=2**31).tokenizer, key=key
        ).texts()
    if spec.pairs is not None:
        merges = spec.pairs
    elif spec.tokens is not None:
        merges = tokenizer.merges_of(spec.tokens, key=f"{_KEY}.tokens")
    elif donor is not None:
        merges = tokenizer.merges_of(
            [texts[number] for number in sorted(texts)],
            key=key,
            is_lenient=True,
            most=spec.new_tokens,
        )
    else:
        reason = "data must give the new tokens: --domain-data in `tritter expand`, data.new in a"
        reason += f" run; or list them in {_KEY}.tokens"
        raise RequestError(Problem(_KEY, reason=reason))
    try:
        extended = ExtendedTokenizer(content, merges)
    except KeyError as error:
        reason = f"the tokenizer has no token {error}; the merges are of another tokenizer"
        raise RequestError(Problem(f"{_KEY}.merges", reason=reason)) from error
    if not (new_ids := tuple(extended.new_ids)):
        raise RequestError(Problem(_KEY, reason="the tokenizer already has all of these tokens"))
    rows, remarks = None, tuple[str, ...]()
    if spec.init != "random":
        fitted: Mapping[int, Mapping[int, float]] = {}
        if spec.init == "omp" and donor is not None:
            fitted = _fitted_rows(extended, donor, texts)
            remarks = (f"{len(fitted):,} of them have rows in {donor.name}; others get the mean",)
        rows = extended.row_weights(spec.init, fitted=fitted)
    return BoundVocab(
        options=replace(spec, merges=tuple(chain.from_iterable(merges))),
        new_ids=new_ids,
        num_ids=1 + max(*new_ids, *tokenizer.tokenizer.get_vocab().values()),
        rows=rows,
        tokenizer=extended.text,
        remarks=remarks,
    )


def _fitted_rows(
    extended: ExtendedTokenizer, donor: Path, texts: Mapping[int, str]
) -> dict[int, Mapping[int, float]]:
    """Return new token → its row by matching pursuit, for tokens that the donor has.

    Args:
        extended: the extended tokenizer.
        donor: folder of another model.
        texts: token id of the donor → its text.
    """
    from tritter.core.families.config_file import read_model_file

    rows = Source.open(donor, read_model_file(donor)).read("embed")
    own = {text: number for number, text in BpeTokenizer(extended.tokenizer()).texts().items()}
    # A tokenizer may have more tokens than its model has rows
    both = {
        number: own[text] for number, text in texts.items() if text in own and number < len(rows)
    }
    made = frozenset(extended.new_ids)
    old = [number for number, mine in both.items() if mine not in made]
    new = [number for number, mine in both.items() if mine in made]
    if not old or not new:
        reason = "it shares no tokens with the model from which rows could be fitted; use mean"
        raise RequestError(Problem(f"{_KEY}.init", "omp", reason=reason))
    fitted = pursuit_rows(rows[new], rows[old], [both[number] for number in old])
    return {both[number]: row for number, row in zip(new, fitted, strict=True)}


def write_tokenizer_file(text: str, folder: Path) -> None:
    """Write a tokenizer.json with new tokens and remove other forms of the old tokenizer."""
    for name in _OTHER_FORMS:
        (folder / name).unlink(missing_ok=True)
    (folder / TOKENIZER_NAME).write_text(text, encoding="utf-8")


def kept_in(source: Source, spec: BoundVocab | None) -> KeptSequences:
    """Return the sequences stored in a checkpoint, with the tokens of a new vocabulary.

    Losses of re-tokenised sequences are measured again by the next training run.
    """
    kept = source.kept_sequences
    if spec is None or not kept.sequences:
        return kept

    old = PretrainedTokenizer.read(source.folder, vocab_size=source.model.sizes.vocab_size)
    return kept.mapped(
        lambda each, is_masked: retokenised(
            each,
            old.tokenizer,
            parsed_tokenizer(spec.tokenizer),
            bounds=old.bounds,
            packing="documents" if is_masked else "stream",
        )
    )

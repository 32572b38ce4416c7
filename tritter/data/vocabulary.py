"""Further tokens of a BPE tokenizer: learned from documents or given, each as one more merge.

A new token is the merge of two tokens that come before it. Merges of lower rank are applied first,
so text without a new merge is tokenised as before, and decoding stays lossless. This continues the
training of the tokenizer (arXiv 1508.07909) instead of starting it again.

New tokens get the first ids that no token has, so they take rows that only pad the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count, islice, pairwise
from typing import TYPE_CHECKING, Any

from tritter.data.chat import ANSWER, ids_of
from tritter.data.tokens import TextBounds, TokenisedDocuments, encoded_texts, parsed_tokenizer
from tritter.errors import Problem, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from tritter.data.packing import Packing

_Merges = tuple[tuple[int, int], ...]

_FIRST_CHARACTER = 0x10000  # of the characters that stand for tokens while merges are learned
_LAST_CHARACTER = 0x10FFFF
_WORD_START = "▁"  # of SentencePiece
_BATCH = 256  # documents
_NEIGHBOURS, _SHARPNESS = 8, 10.0  # of the old tokens that a new one resembles
_GRAMS = (2, 3)
_KEY = "expansion.vocab"


class ExtendedTokenizer:
    """A tokenizer with further merges; a new token gets the first id without a token.

    Args:
        content: tokenizer.json before the extension.
        merges: pairs of token ids, in order; a new token may be part of a later pair.

    Attributes:
        surfaces: token id → its text in the vocabulary; old tokens, then new ones.
        ids: the reverse.
        new_ids: ids of the new tokens; fewer than merges if a merge gives a token that exists.
    """

    def __init__(self, content: Mapping[str, Any], merges: _Merges = ()) -> None:
        self.content, self.merges = content, merges
        self.ids: dict[str, int] = dict(content["model"]["vocab"])
        self.surfaces = {number: text for text, number in self.ids.items()}
        self.new_ids: list[int] = []
        taken = {*self.surfaces, *(each["id"] for each in content.get("added_tokens") or ())}
        self._free_ids = (number for number in count() if number not in taken)
        for left, right in merges:
            self.merge(left, right)

    def add(self, text: str) -> int:
        """Return the id of a text, as a new token if it is none."""
        if text not in self.ids:
            number = next(self._free_ids)
            self.ids[text], self.surfaces[number] = number, text
            self.new_ids.append(number)
        return self.ids[text]

    def merge(self, left: int, right: int) -> int:
        """Return the id of two tokens joined, as a new token if it is none."""
        return self.add(self.surfaces[left] + self.surfaces[right])

    @cached_property
    def parts(self) -> dict[int, tuple[int, ...]]:
        """New token → the old tokens that it consists of."""
        ids, new = self.ids, frozenset(self.new_ids)
        parts: dict[int, tuple[int, ...]] = {}
        for left, right in self.merges:
            made = ids[self.surfaces[left] + self.surfaces[right]]
            if made in new and made not in parts:
                parts[made] = parts.get(left, (left,)) + parts.get(right, (right,))
        return parts

    @cached_property
    def text(self) -> str:
        """The extended tokenizer.json."""
        model, surfaces = self.content["model"], self.surfaces
        old = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        new = [[surfaces[left], surfaces[right]] for left, right in self.merges]
        # Added tokens outside the vocabulary would be numbered after its size, which grows
        added = {each["content"]: each["id"] for each in self.content.get("added_tokens") or ()}
        made = {surfaces[number]: number for number in self.new_ids}
        vocabulary = {**model["vocab"], **added, **made}
        extended = {**model, "vocab": vocabulary, "merges": [*old, *new]}
        return json.dumps({**self.content, "model": extended}, ensure_ascii=False, indent=2)

    def tokenizer(self) -> Tokenizer:
        """Return the extended tokenizer."""
        return parsed_tokenizer(self.text)

    def mean_rows(self) -> list[dict[int, float]]:
        """Return each new row as the mean of the old tokens that the token consists of."""
        rows = []
        for number in self.new_ids:
            parts, row = self.parts[number], dict[int, float]()
            for part in parts:
                row[part] = row.get(part, 0.0) + 1 / len(parts)
            rows.append(row)
        return rows

    def overlap_rows(self) -> list[dict[int, float]]:
        """Return each new row as a mixture of the old tokens with the most similar characters.

        As in FOCUS (arXiv 2305.14481) the weights are a sparsemax of similarities; these are
        cosines of character n-grams, so no auxiliary embedding is trained. A token that resembles
        none gets the mean of its parts.
        """
        import numpy as np

        made_ids = frozenset(self.new_ids)
        old = [number for number in self.surfaces if number not in made_ids]
        new, fallback = self.new_ids, self.mean_rows()
        columns: dict[str, int] = {}
        known, made = (
            _grams([self.surfaces[number] for number in numbers], columns) for numbers in (old, new)
        )
        rows = []
        for begin in range(0, len(new), _BATCH):
            similar = (made[begin : begin + _BATCH, : known.shape[1]] @ known.T).toarray()
            best = np.argsort(-similar, axis=1, kind="stable")[:, :_NEIGHBOURS]
            for number, places in enumerate(best):
                weights = _sparsemax(_SHARPNESS * similar[number, places])
                found = {
                    old[place]: float(w) for place, w in zip(places, weights, strict=True) if w
                }
                is_similar = similar[number, places[0]] > 0
                rows.append(found if is_similar else fallback[begin + number])
        return rows

    def row_weights(
        self, init: str, *, fitted: Mapping[int, Mapping[int, float]]
    ) -> tuple[Tensor, Tensor]:
        """Return the embedding rows of the new tokens, as tensors of `BoundVocab.rows`.

        Args:
            init: `overlap`; otherwise each row is the mean of its parts.
            fitted: new token → old row → weight, in place of these.
        """
        import torch

        found = self.overlap_rows() if init == "overlap" else self.mean_rows()
        rows = [fitted.get(number, row) for number, row in zip(self.new_ids, found, strict=True)]
        width = max(map(len, rows), default=1)
        index = torch.full((len(rows), width), 0)
        weights = torch.zeros(len(rows), width, dtype=torch.float64)
        for number, row in enumerate(rows):
            index[number, : len(row)] = torch.tensor([*row])
            weights[number, : len(row)] = torch.tensor([*row.values()], dtype=torch.float64)
        return index, weights


class BpeTokenizer:
    """A tokenizer that merges extend.

    Args:
        tokenizer: the tokenizer.
        key: configuration key, for messages.

    Attributes:
        content: its tokenizer.json.
    """

    def __init__(self, tokenizer: Tokenizer, *, key: str = _KEY) -> None:
        self.tokenizer = tokenizer
        self.content: dict[str, Any] = json.loads(tokenizer.to_str())
        model = self.content["model"]
        if (kind := model.get("type")) != "BPE" or model.get("continuing_subword_prefix"):
            reason = f"it extends BPE tokenizers by merges, and this one is of the type {kind}"
            raise RequestError(Problem(key, reason=reason))

    def learn(self, texts: Iterable[str], *, num_tokens: int, is_at_most: bool = False) -> _Merges:
        """Return the merges that give the most frequent new tokens of some texts.

        The tokens of each word are written as characters, and the trainer of `tokenizers` learns
        merges of these. Merges never cross words or join special tokens and single bytes.

        Args:
            texts: the documents.
            num_tokens: number of new tokens.
            is_at_most: fewer tokens are fine, but at least one.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        lines = list(_Words(self.tokenizer, self.content).lines(texts))
        size, made = len(set().union(*lines)) + num_tokens, 0
        for spare in (64 + num_tokens // 8, 64 + 4 * num_tokens):  # merges that give no new token
            trainee = Tokenizer(models.BPE())
            trainee.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer = trainers.BpeTrainer(
                vocab_size=size + spare, show_progress=False, min_frequency=2
            )
            trainee.train_from_iterator(lines, trainer=trainer)
            merges = _first_merges(trainee, self.content, num_tokens)
            made = len(ExtendedTokenizer(self.content, tuple(merges)).new_ids)
            if made == num_tokens:
                return tuple(merges)
        if is_at_most and made:
            return tuple(merges)
        reason = f"the new data has only {made} frequent pairs of tokens; set at most {made}, or "
        reason += "add data"
        raise RequestError(Problem(f"{_KEY}.new_tokens", num_tokens, reason=reason))

    def merges_of(
        self,
        tokens: Iterable[str],
        *,
        key: str,
        is_lenient: bool = False,
        most: int | None = None,
    ) -> _Merges:
        """Return merges that make given texts single tokens.

        Merges go from left to right, and each result becomes a token.

        Args:
            tokens: the texts; a leading space belongs to the token.
            key: configuration key of the tokens, for messages.
            is_lenient: skip texts that can't be tokens.
            most: limit of new tokens.
        """
        known, ranks = ExtendedTokenizer(self.content), dict[tuple[int, int], int]()
        unknown = known.ids.get(self.content["model"].get("unk_token") or "")
        for token in tokens:
            surface, reason = self._surface(token)
            ids = [] if reason else [each.id for each in self.tokenizer.model.tokenize(surface)]
            if any(each == unknown or known.surfaces[each].startswith("<0x") for each in ids):
                reason = "it has characters that the tokenizer writes as single bytes"
            if reason and not is_lenient:
                raise RequestError(Problem(key, token, reason=reason))
            ids = [] if reason else _merged(ids, ranks, known)
            if most is not None and len(known.new_ids) + max(len(ids) - 1, 0) > most:
                break
            while len(ids) > 1:
                left, right = ids[:2]
                ranks.setdefault((left, right), len(ranks))
                known.merge(left, right)
                ids = _merged(ids, ranks, known)
        return tuple(ranks)

    def texts(self) -> dict[int, str]:
        """Return token id → its text, without special tokens and parts of characters."""
        special = {entry["id"] for entry in self.content.get("added_tokens") or ()}
        is_byte_level, texts = self._is_byte_level, dict[int, str]()
        for surface, number in self.content["model"]["vocab"].items():
            if is_byte_level:
                text = self.tokenizer.decoder.decode([surface])
            else:
                text = surface.replace(_WORD_START, " ")
            if number not in special and "�" not in text and not surface.startswith("<0x"):
                texts[number] = text
        return texts

    def _surface(self, token: str) -> tuple[str, str]:
        """Return the form of a text in the vocabulary, and the reason why it can't be a token."""
        if not self._is_byte_level:
            has_space = " " in token.lstrip(" ") or not token.strip()
            return token.replace(" ", _WORD_START), "a token can't cross words" if has_space else ""
        pieces = [text for text, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(token)]
        if len(pieces) == 1:
            return str(pieces[0]), ""
        return "", f"the tokenizer splits it into {len(pieces)} words; a token can't cross words"

    @property
    def _is_byte_level(self) -> bool:
        stated = [self.content.get("pre_tokenizer"), self.content.get("decoder")]
        return "ByteLevel" in json.dumps(stated)


def _first_merges(
    trainee: Tokenizer, content: Mapping[str, Any], num_tokens: int
) -> list[tuple[int, int]]:
    """Return learned merges up to `num_tokens` new tokens, as pairs of token ids."""
    tokens, merges = ExtendedTokenizer(content), list[tuple[int, int]]()
    special = {entry["content"] for entry in content.get("added_tokens") or ()}
    # What is learned → its text; a character stands for a token
    surfaces = {chr(number + _FIRST_CHARACTER): text for number, text in tokens.surfaces.items()}
    for left, right in json.loads(trainee.to_str())["model"]["merges"]:
        if left not in surfaces or right not in surfaces:
            continue  # part of a special token
        if (text := surfaces[left] + surfaces[right]) in special:
            continue
        if text not in tokens.ids and len(tokens.new_ids) == num_tokens:
            break
        tokens.add(text)
        surfaces[left + right] = text
        merges.append((tokens.ids[surfaces[left]], tokens.ids[surfaces[right]]))
    return merges


class _Words:
    """The words of documents, with a character for each token."""

    def __init__(self, tokenizer: Tokenizer, content: Mapping[str, Any]) -> None:
        import numpy as np

        model = content["model"]
        vocabulary: Mapping[str, int] = model["vocab"]
        special = {entry["id"] for entry in content.get("added_tokens") or ()}
        self._tokenizer = tokenizer
        size = 1 + max([*vocabulary.values(), *special], default=-1)
        if size > _LAST_CHARACTER - _FIRST_CHARACTER:
            reason = f"its tokenizer has more than {_LAST_CHARACTER - _FIRST_CHARACTER:,} tokens"
            raise RequestError(Problem(_KEY, reason=reason))
        self._starts_word, self._is_joined = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for text, number in vocabulary.items():
            is_byte = bool(model.get("byte_fallback")) and text.startswith("<0x")
            self._starts_word[number] = text.startswith(_WORD_START)
            self._is_joined[number] = not is_byte and text != model.get("unk_token")
        self._is_joined[list(special)] = False

    def lines(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the words of each text, separated by spaces."""
        import numpy as np

        remaining = iter(texts)
        while batch := list(islice(remaining, _BATCH)):
            for encoding in encoded_texts(batch, self._tokenizer):
                ids = np.asarray(encoding.ids, dtype=np.int64)
                if not len(ids):
                    continue
                words = np.asarray([-1 if w is None else w for w in encoding.word_ids])
                is_first = np.flatnonzero(np.diff(words, prepend=words[0]) | self._starts_word[ids])
                characters = np.where(self._is_joined[ids], ids + _FIRST_CHARACTER, ord(" "))
                spaced = np.insert(characters, is_first, ord(" "))
                yield spaced.astype("<u4").tobytes().decode("utf-32-le")


def _merged(
    ids: Sequence[int], ranks: Mapping[tuple[int, int], int], known: ExtendedTokenizer
) -> list[int]:
    """Apply new merges to the old tokens of a word, lowest rank first."""
    merged = list(ids)
    while pairs := [pair for pair in pairwise(merged) if pair in ranks]:
        left, right = min(pairs, key=ranks.__getitem__)
        place = list(pairwise(merged)).index((left, right))
        merged[place : place + 2] = [known.merge(left, right)]
    return merged


def _grams(texts: Sequence[str], columns: dict[str, int]) -> Any:
    """Return normalised counts of character n-grams, one sparse row for each text."""
    import numpy as np
    from scipy.sparse import csr_matrix

    places, counts, ends = list[int](), list[float](), [0]
    for text in texts:
        own: dict[int, float] = {}
        for size in _GRAMS:
            for start in range(len(text) - size + 1):
                column = columns.setdefault(text[start : start + size], len(columns))
                own[column] = own.get(column, 0.0) + 1
        norm = sum(value**2 for value in own.values()) ** 0.5
        places += own
        counts += [value / norm for value in own.values()]
        ends.append(len(places))
    return csr_matrix(
        (np.asarray(counts), np.asarray(places, dtype=np.int64), np.asarray(ends)),
        shape=(len(texts), max(len(columns), 1)),
    )


def _sparsemax(scores: Any) -> Any:
    """Return the projection of scores on the simplex (arXiv 1602.02068)."""
    import numpy as np

    ordered = np.sort(scores)[::-1]
    totals = np.cumsum(ordered) - 1
    size = int((ordered * np.arange(1, len(scores) + 1) > totals).sum())
    return np.maximum(scores - totals[size - 1] / size, 0)


def pursuit_rows(
    targets: Tensor, dictionary: Tensor, numbers: Sequence[int], *, size: int = _NEIGHBOURS
) -> list[dict[int, float]]:
    """Return rows as sparse combinations of others by orthogonal matching pursuit.

    As in arXiv 2506.06607: the coefficients are found in the embedding of another model and used
    in this one.

    Args:
        targets: [n, D] rows of the new tokens in the other model.
        dictionary: [m, D] rows of the tokens that both have.
        numbers: the m ids of these tokens in this model.
        size: number of rows in a combination.
    """
    import torch

    rows: list[dict[int, float]] = []
    units = torch.nn.functional.normalize(dictionary.float(), dim=1)
    for wanted in targets.float().split(_BATCH):
        rest, chosen = wanted, wanted.new_zeros((len(wanted), 0), dtype=torch.int64)
        factors = wanted.new_zeros((len(wanted), 0))
        for _ in range(min(size, len(dictionary))):
            fits = (rest @ units.T).abs()
            fits.scatter_(1, chosen, -1.0)  # each row is chosen once
            chosen = torch.cat([chosen, fits.argmax(dim=1, keepdim=True)], dim=1)
            basis = dictionary[chosen].double()  # [n, k, D]
            solved = torch.linalg.lstsq(
                basis.transpose(1, 2), wanted.double()[..., None], driver="gelsd"
            ).solution  # [n, k, 1]
            factors = solved.squeeze(2)
            rest = (wanted.double() - (basis.transpose(1, 2) @ solved).squeeze(2)).float()
        for places, weights in zip(chosen.tolist(), factors.tolist(), strict=True):
            rows.append({numbers[p]: w for p, w in zip(places, weights, strict=True)})
    return rows


def retokenised(
    sequences: Tensor, old: Tokenizer, new: Tokenizer, *, bounds: TextBounds, packing: Packing
) -> Tensor:
    """Return stored sequences with the tokens of another tokenizer, int32 [M, T].

    Documents are decoded and tokenised again; parts of characters at the ends of a sequence are
    lost. Fewer tokens give fewer sequences, at least one.

    Args:
        sequences: int [N, T].
        old: their tokenizer.
        new: the other tokenizer, with the same start and end of a text.
        bounds: start and end of a text.
        packing: of the sequences.
    """
    import torch

    from tritter.data.packing import packed

    is_start = torch.isin(ids_of(sequences), torch.tensor(bounds.start or [-1]))
    if bool(((sequences >= ANSWER) & ~is_start).any()):
        reason = "the checkpoint stores conversations, which can't be tokenised again; remove "
        reason += "state/ from a copy of it, and name the old data in the next run"
        raise RequestError(Problem(_KEY, reason=reason))
    pieces = []  # text of each document or part of one, and whether an end of text follows
    for row in sequences:
        ends = (row == bounds.end).nonzero().flatten().tolist()
        for begin, end in zip([-1, *ends], [*ends, len(row)], strict=True):
            ids = row[begin + 1 : end]
            text = old.decode(ids[ids < ANSWER].tolist()).strip("\ufffd")
            pieces.append((text, end < len(row)))
    texts, length = [text for text, _ in pieces if text], sequences.shape[1]
    if not texts:
        return sequences.int()
    if packing == "documents":
        documents = TokenisedDocuments.of_texts(texts, new)
        if documents.num_tokens + len(documents) < length:  # a single short sequence
            documents = TokenisedDocuments.of_texts(texts * length, new)
        again = packed(documents, packing=packing, sequence_length=length, bounds=bounds)
        return torch.as_tensor(again).int()
    ids, documents = list[int](), TokenisedDocuments.of_texts([text for text, _ in pieces], new)
    for number, (text, is_ended) in enumerate(pieces):  # a row may end within a document
        ids += bounds.marked_start if text else ()
        ids += documents.document(number).tolist() + [bounds.end] * is_ended
    ids *= -(-length // len(ids))
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length).int()
    return bounds.begun(rows)

"""Tokenizers, trained or from a checkpoint, and tokenised documents with their byte counts."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from tritter.data.chat import ANSWER, CONTEXT, START, Chat, ids_of, is_unpredicted
from tritter.data.documents import Document
from tritter.errors import RequestError, TritterError, panics_as_errors, refused
from tritter.storage.reading import read_object, require_file
from tritter.storage.spool import Spool

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
_STATED_IN = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERED_IN = ("generation_config.json", "config.json")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder")  # multimodal models
# transformers rebuilds their tokenizers, without what tokenizer.json puts in front of a text
_WITHOUT_START = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
_ANY_TEXT = "a"
# Characters per batch: encodings with offsets need many times the memory of the text
_ENCODED_CHARACTERS = 2**21
_PACKED_DOCUMENTS = 128
_SHOWN_CHARACTERS = 80  # of a text in a message


def train_tokenizer(documents: Iterable[Document], *, vocab_size: int) -> Tokenizer:
    """Train a lossless byte-level BPE tokenizer; training is deterministic.

    `END_OF_TEXT` is token 0. The vocabulary is smaller than `vocab_size` if the documents have
    too few pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer=trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class TextBounds:
    """How a tokenizer begins and ends a text.

    Attributes:
        end: id of the end of text, which closes each document.
        start: ids in front of each document, such as `<bos>`. Empty if the tokenizer puts nothing
            or the end of text in front: then an end of text separates documents.
        stops: further ids that end a generated text, such as an end of turn.
    """

    end: int
    start: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, end: int, *, stops: Iterable[int] = ()) -> TextBounds:
        """Return the bounds of a text, which ends with `end`; the tokenizer does not truncate."""
        try:
            encoding = tokenizer.encode(_ANY_TEXT)
        # The library's plain Exception: it has no token for the letter, and none for unknown ones
        except Exception:
            encoding = tokenizer.encode("")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        start = [token for token, _ in takewhile(lambda pair: pair[1], pairs)]
        if len(start) == len(encoding):  # it can't encode the letter, so the end may be behind it
            start = [token for token in start if token != end]
        is_separator = start == [end]
        others = tuple(token for token in dict.fromkeys(stops) if token != end)
        return cls(end, () if is_separator else tuple(start), others)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that a model reads before the first token of a text."""
        return self.start or (self.end,)

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a generated text."""
        return (self.end, *self.stops)

    @property
    def marked_start(self) -> tuple[int, ...]:
        """The start in a training sequence: marked like that of a conversation, not predicted."""
        marks = (CONTEXT | (0 if number else START) for number in range(len(self.start)))
        return tuple(token | mark for token, mark in zip(self.start, marks, strict=True))

    def check_length(self, sequence_length: int) -> None:
        """Refuse a sequence length without a token to predict."""
        least = 1 + len(self.prefix)
        if sequence_length < least:
            raise RequestError(
                f"data.sequence_length={sequence_length}: must be at least {least}, since each "
                f"token is predicted from those before it."
            )

    def cut_rows(
        self, tail: Tensor, tokens: Tensor, *, sequence_length: int
    ) -> tuple[Tensor, Tensor]:
        """Cut a stream into sequences, int32 [N, T], and the tokens that remain.

        Args:
            tail: tokens that remained before.
            tokens: those after them.
            sequence_length: T.
        """
        import torch

        joined = torch.cat([tail, tokens])
        end = len(joined) // sequence_length * sequence_length
        return self.begun(joined[:end].view(-1, sequence_length)), joined[end:].clone()

    def begun(self, sequences: Tensor) -> Tensor:
        """Return sequences [N, T], each with the start of a text in front.

        A model that expects a start predicts badly without it. Where a sequence begins within a
        document, the start replaces the first tokens: the first of a sequence is not predicted
        anyway.
        """
        if not self.start:
            return sequences
        start = sequences.new_tensor(self.marked_start)
        # One that begins with the end of a document has the next start right after it
        is_inner = (sequences[:, : len(start) + 1] < START).all(dim=1)
        if not bool(is_inner.any()):
            return sequences
        sequences = sequences.clone()
        sequences[is_inner, : len(start)] = start
        return sequences


@dataclass(frozen=True, slots=True, eq=False)
class PretrainedTokenizer:
    """A tokenizer, how it begins and ends a text, and a note on it."""

    tokenizer: Tokenizer
    bounds: TextBounds
    note: str = ""

    @classmethod
    def read(
        cls, folder: Path, *, vocab_size: int, ends: Iterable[object] = ()
    ) -> PretrainedTokenizer:
        """Read a checkpoint's tokenizer.json and its end of text (`eos_token`).

        The end of text comes from tokenizer_config.json or special_tokens_map.json; otherwise its
        id comes from generation_config.json or config.json.

        Args:
            folder: the checkpoint.
            vocab_size: size of the model's embedding.
            ends: of the model, for a folder that names none.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise RequestError(f"{folder} has no tokenizer.json.")
        try:
            require_file(path)
            tokenizer = _whole_texts(Tokenizer.from_file(str(path)))
        # The library raises plain Exception.
        except Exception as error:
            raise RequestError(f"{path} is not a usable tokenizer: {error}") from error
        _check_ids(tokenizer, path, vocab_size)
        declared = {
            name: token
            for name in (*_declared_ends(folder, tokenizer), *_names_of(ends, tokenizer))
            if (token := tokenizer.token_to_id(name)) is not None
        }
        for end in declared.values():
            if end < vocab_size:
                bounds = TextBounds.of(tokenizer, end, stops=declared.values())
                stated = _json(folder / _STATED_IN[0])
                if stated.get("tokenizer_class") in _WITHOUT_START:
                    bounds = replace(bounds, start=())
                note = "" if bounds.start else _start_note(stated, tokenizer, end)
                return cls(tokenizer, bounds, note)
        raise RequestError(
            f"{folder} has no valid end-of-text token: set eos_token in {_STATED_IN[0]} to a token "
            f"of its tokenizer."
        )

    @classmethod
    def of(cls, tokenizer: Any, *, ends: Iterable[object] = ()) -> PretrainedTokenizer:
        """Return a live Hugging Face tokenizer as ours; the original keeps its settings.

        Args:
            tokenizer: the tokenizer.
            ends: of the model, see `ends_of`: the end of text of a tokenizer without `eos_token`,
                else further tokens that end a text.
        """
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        tokens = dict[str, int]()
        if isinstance(backend, Tokenizer):
            named = [] if tokenizer.eos_token is None else [str(tokenizer.eos_token)]
            names = [*named, *_names_of(ends, backend)]
            tokens = {name: at for name in names if (at := backend.token_to_id(name)) is not None}
        if backend is None or not tokens:
            reason = (
                "pass a fast Hugging Face tokenizer with an eos_token, or a folder that holds one"
            )
            raise refused("tokenizer", type(tokenizer).__name__, reason)
        copied, end = parsed_tokenizer(backend.to_str()), next(iter(tokens.values()))
        return cls(copied, TextBounds.of(copied, end, stops=tokens.values()))


def _start_note(stated: dict[str, Any], tokenizer: Tokenizer, end: int) -> str:
    """Return a sentence if a tokenizer_config.json asks for a start that no text gets."""
    name = _name_of(stated.get("bos_token"))
    if stated.get("add_bos_token") is not True or name is None:
        return ""
    if tokenizer.token_to_id(name) in (None, end):
        return ""
    return (
        f"Texts begin without {name}, as in transformers 5: {_STATED_IN[0]} sets add_bos_token, "
        "but tokenizer.json puts nothing in front of a text (transformers 4 may)."
    )


def _check_ids(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that encodes a text with tokens without an embedding.

    A text has no special tokens, such as those of images.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}
    highest = max(set(tokenizer.get_vocab().values()) - special, default=-1)
    if highest >= vocab_size:
        raise RequestError(
            f"{path} has token ids up to {highest}, but the model has {vocab_size} embeddings "
            f"(vocab_size in its config.json): tokenizer and model do not match."
        )


def parsed_tokenizer(text: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, without a saved truncation and padding."""
    from tokenizers import Tokenizer

    return _whole_texts(Tokenizer.from_str(text))


def _whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ends_of(config: Any, *, generation: Any = None) -> list[int]:
    """Return the end tokens of a live config of transformers, or of the text config in it.

    Args:
        config: of a model or tokenizer.
        generation: the generation config of the model, which takes precedence.
    """
    nested = getattr(config, "get_text_config", lambda **_: None)(decoder=True)
    for each in (generation, config, nested):
        if (ends := getattr(each, "eos_token_id", None)) is not None:
            return list(ends) if isinstance(ends, list) else [int(ends)]
    return []


def _declared_ends(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    for file in _STATED_IN:
        if (name := _name_of(_json(folder / file).get("eos_token"))) is not None:
            yield name
    for file in _NUMBERED_IN:
        content = _json(folder / file)
        nested = (content.get(name) for name in _TEXT_CONFIGS)
        named = (each.get("eos_token_id") for each in (content, *nested) if isinstance(each, dict))
        numbers = next((each for each in named if each is not None), None)
        yield from _names_of(numbers if isinstance(numbers, list) else [numbers], tokenizer)


def _name_of(token: object) -> str | None:
    """Return the name of a special token as tokenizer_config.json states it."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _names_of(numbers: Iterable[object], tokenizer: Tokenizer) -> Iterator[str]:
    for number in numbers:
        if isinstance(number, int) and number >= 0:
            name = tokenizer.id_to_token(number)
            if name is not None:
                yield name


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_object(path)
    except TritterError as error:
        raise RequestError(str(error)) from error


@dataclass(frozen=True, slots=True, eq=False)
class _Names(Sequence[str]):
    """A sequence of names in two tensors, which may be memory-mapped.

    Attributes:
        text: uint8, UTF-8 bytes of all names.
        ends: int64 [n], end offset of each name.
    """

    text: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[at] for at in range(len(self))[index])
        at = range(len(self))[index]
        start = int(self.ends[at - 1]) if at else 0
        return self.text[start : int(self.ends[at])].numpy().tobytes().decode()


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedDocuments:
    """Concatenated tokens of n documents, without end-of-text tokens.

    Attributes:
        tokens: int32 [num_tokens]; those of conversations have marks, see `tritter.data.chat`.
        offsets: int64 [n + 1]; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        num_bytes: int64 [n], UTF-8 bytes of each tokenised text, of a marked one of its answers.
        identifiers: identifiers of the documents.
        cut: indices of conversations that exceed `max_tokens_per_document` of `of`.
    """

    tokens: Tensor
    offsets: Tensor
    num_bytes: Tensor
    identifiers: Sequence[str]
    cut: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        *,
        max_tokens_per_document: int | None = None,
        chat: Chat | None = None,
    ) -> TokenisedDocuments:
        """Tokenise documents; long ones are truncated between two characters.

        Of a long conversation, an answer and the end of its prompt are kept, see `Chat.fitted`.

        No special tokens are added. Special tokens in a text are encoded as plain text; those of a
        chat template are not.

        Args:
            documents: the documents.
            tokenizer: the tokenizer.
            max_tokens_per_document: limit of tokens, at least 4 (a character may have four bytes,
                each a token); None keeps whole documents.
            chat: how to tokenise conversations; None tokenises their plain text.
        """
        import numpy as np

        limit = max_tokens_per_document
        tokens, ends, num_bytes = Spool(), array("q", [0]), array("q")
        names, name_ends, cut = Spool(), array("q"), list[int]()
        # The fast version omits offsets, which only truncation and answers need
        is_fast = limit is None and not (chat is not None and chat.is_marked)
        is_rendered = chat is not None and chat.tokenizer is not None
        for batch in _batches(documents):
            texts = [each.text for each in batch if not (is_rendered and each.conversation)]
            encodings = iter(encoded_texts(texts, tokenizer, is_fast=is_fast))
            for document in batch:
                conversation, name = document.conversation, document.identifier
                ids: Sequence[int] | np.ndarray
                if conversation is not None and chat is not None:
                    chat.check(conversation, name)
                if conversation is None or chat is None or not chat.is_marked:
                    ids, size = _truncated(document.text, next(encodings), limit)
                else:
                    if is_rendered:
                        marked = chat.render(conversation, name)
                    else:
                        marked = _marked_answers(next(encodings), conversation.answer_spans)
                    size = chat.answer_bytes(conversation)
                    if limit is not None and len(marked) > limit:
                        cut.append(len(name_ends))
                        marked = chat.fitted(marked, limit, conversation, name)
                        kept = ids_of(marked[~is_unpredicted(marked)]).tolist()
                        size = min(size, len(tokenizer.decode(kept).encode()))
                    ids = marked
                tokens.append(np.asarray(ids, dtype=np.int32).data.cast("B"))
                ends.append(ends[-1] + len(ids))
                num_bytes.append(size)
                names.append(name.encode())
                name_ends.append(len(names))
        return cls(
            tokens=tokens.tensor("i4"),
            offsets=_int64(ends),
            num_bytes=_int64(num_bytes),
            identifiers=_Names(names.tensor("u1"), _int64(name_ends)),
            cut=tuple(cut),
        )

    @classmethod
    def of_texts(cls, texts: Iterable[str], tokenizer: Tokenizer) -> TokenisedDocuments:
        """Tokenise texts in memory; each is a document named by its number."""
        return cls.of([Document(str(number), text) for number, text in enumerate(texts)], tokenizer)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], *, cut: tuple[int, ...]) -> Self:
        """Return the documents of a `to_tensors`."""
        parts = {name: tensors[name] for name in ("tokens", "offsets", "num_bytes")}
        return cls(**parts, identifiers=_Names(tensors["names"], tensors["name_ends"]), cut=cut)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all but `cut` as tensors; the documents are those of `of` or `of_tensors`."""
        assert isinstance(self.identifiers, _Names)
        parts = {"tokens": self.tokens, "offsets": self.offsets, "num_bytes": self.num_bytes}
        return {**parts, "names": self.identifiers.text, "name_ends": self.identifiers.ends}

    def __len__(self) -> int:
        return len(self.identifiers)

    @property
    def num_tokens(self) -> int:
        """Total number of tokens."""
        return self.tokens.numel()

    @property
    def first_tokens(self) -> Tensor:
        """The first token of each document, int32 [n]; 0 for an empty one."""
        return _first_tokens(self.tokens, self.offsets)

    @property
    def has_marks(self) -> bool:
        """Whether any document has marks."""
        return bool((self.first_tokens >= ANSWER).any())

    def num_closed_tokens(self, bounds: TextBounds) -> int:
        """Return the number of tokens with the start and the end of text of each document."""
        number = self.num_tokens + len(self)
        if bounds.start:
            number += len(bounds.start) * int((self.first_tokens < START).sum())
        return number

    def closed_tokens(
        self, bounds: TextBounds, *, first: int = 0, count: int | None = None
    ) -> Tensor:
        """Return the tokens of `count` documents, int32, each with its start and an end of text.

        A rendered conversation has a start of its own.
        """
        import torch

        last = len(self) if count is None else first + count
        offsets = self.offsets[first : last + 1]
        tokens, lengths = self.tokens[offsets[0] : offsets[-1]], offsets.diff()
        start = bounds.marked_start
        is_text = _first_tokens(tokens, offsets - offsets[0]) < START
        leads = is_text * len(start)
        closed = lengths + leads + 1
        piece = torch.full((int(closed.sum()),), bounds.end, dtype=torch.int32)
        added_before = (leads + 1).cumsum(0) - 1
        piece[torch.arange(len(tokens)) + added_before.repeat_interleave(lengths)] = tokens
        begins = (closed.cumsum(0) - closed)[is_text]
        for at, token in enumerate(start):
            piece[begins + at] = token
        return piece

    def document(self, index: int) -> Tensor:
        """Return the tokens of one document, int32 [number of tokens]."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def first(self, count: int) -> TokenisedDocuments:
        """Return the first documents."""
        if count >= len(self):
            return self
        return TokenisedDocuments(
            tokens=self.tokens[: self.offsets[count]],
            offsets=self.offsets[: count + 1],
            num_bytes=self.num_bytes[:count],
            identifiers=self.identifiers[:count],
            cut=tuple(index for index in self.cut if index < count),
        )

    def num_sequences(self, *, sequence_length: int, bounds: TextBounds) -> int:
        """Return the number of sequences of `pack`."""
        bounds.check_length(sequence_length)
        available = self.num_closed_tokens(bounds)
        if available < sequence_length:
            raise RequestError(
                f"data.sequence_length={sequence_length}: the {len(self)} documents have only "
                f"{available} tokens. Add documents, or set at most {available}."
            )
        return available // sequence_length

    def pack(self, *, sequence_length: int, bounds: TextBounds) -> Tensor:
        """Concatenate documents, each with its start and an end of text, and cut into sequences.

        Returns:
            int32 [num_sequences, sequence_length], spooled. The incomplete last one is dropped.
        """
        self.num_sequences(sequence_length=sequence_length, bounds=bounds)
        stream, tail = Spool(), self.tokens[:0]
        for first in range(0, len(self), _PACKED_DOCUMENTS):
            piece = self.closed_tokens(bounds, first=first, count=_PACKED_DOCUMENTS)
            rows, tail = bounds.cut_rows(tail, piece, sequence_length=sequence_length)
            stream.append(rows.contiguous().view(-1).numpy().data.cast("B"))
        return stream.tensor("i4").view(-1, sequence_length)


def _marked_answers(encoding: Any, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the tokens of a plain text, of which those of the answers are predicted, int32 [T].

    Args:
        encoding: a `tokenizers.Encoding` of the text, with offsets.
        spans: start and end of each answer, in characters.
    """
    import numpy as np

    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    is_answer = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        # A token with the space before an answer belongs to the answer
        is_answer |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    ids = np.asarray(encoding.ids, dtype=np.int32)
    return ids | np.where(is_answer, ANSWER, CONTEXT).astype(np.int32)


def _truncated(text: str, encoding: Any, limit: int | None) -> tuple[list[int], int]:
    """Return the ids of a text up to a limit, and the bytes of the text that they encode."""
    num_kept = len(encoding)
    if limit is not None and num_kept > limit:
        # Byte-level tokens may be parts of a character; such tokens share their offsets.
        offsets, num_kept = encoding.offsets, limit
        while num_kept and offsets[num_kept][0] < offsets[num_kept - 1][1]:
            num_kept -= 1
        text = text[: offsets[num_kept - 1][1]] if num_kept else ""
    return encoding.ids[:num_kept], len(text.encode())


def concatenate(sequences: Sequence[Tensor]) -> Tensor:
    """Concatenate packed sequences int32 [N, T] of several domains, spooled."""
    if len(sequences) == 1:
        return sequences[0]
    spool = Spool()
    for each in sequences:
        spool.append(each.contiguous().view(-1).numpy().data.cast("B"))
    return spool.tensor("i4").view(-1, sequences[0].shape[1])


def _first_tokens(tokens: Tensor, offsets: Tensor) -> Tensor:
    import torch

    starts = offsets[:-1].clamp(max=max(0, len(tokens) - 1))
    first = tokens[starts] if len(tokens) else torch.zeros_like(starts, dtype=torch.int32)
    return first.masked_fill(offsets.diff() == 0, 0)


def _int64(numbers: array) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.frombuffer(numbers, dtype=np.int64).copy())


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield batches of documents of about `_ENCODED_CHARACTERS` each."""
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _ENCODED_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded_texts(
    texts: Sequence[str], tokenizer: Tokenizer, *, is_fast: bool = False
) -> list[Any]:
    """Return the encodings of texts without special tokens, which in a text are like other text.

    Args:
        texts: the texts.
        tokenizer: the tokenizer.
        is_fast: leave out offsets.
    """
    encode = tokenizer.encode_batch_fast if is_fast else tokenizer.encode_batch
    with _specials_as_text(tokenizer):
        try:
            with panics_as_errors():
                return list(encode(texts, add_special_tokens=False))
        except Exception:  # the library raises plain Exception; find the text
            for text in texts:
                _encode_alone(text, tokenizer)
            raise


def _encode_alone(text: str, tokenizer: Tokenizer) -> None:
    """Encode a text, and name it in an error."""
    shown = repr(text[:_SHOWN_CHARACTERS])
    try:
        with panics_as_errors(
            f"the normaliser or splitter of tokenizer.json, on the text {shown},"
        ):
            tokenizer.encode(text, add_special_tokens=False)
    except TritterError:
        raise
    except Exception as error:
        raise RequestError(
            f"tokenizer.json has no tokens for the text {shown}, and none for unknown characters: "
            f"{error}. Leave this text out, or give the tokenizer an unknown token."
        ) from error


def unencoded_note(
    name: str, sides: Sequence[TokenisedDocuments], texts: Iterable[str], tokenizer: Tokenizer
) -> str:
    """Return a sentence on what a tokenizer cannot represent of a domain; empty if it is lossless.

    Args:
        name: the domain.
        sides: its tokenised documents.
        texts: its texts; read only if the tokenizer drops characters.
        tokenizer: the tokenizer.
    """
    unknown = _unknown_id(tokenizer)
    if unknown is not None:
        count = sum(int((ids_of(side.tokens) == unknown).sum()) for side in sides)
        total = sum(side.num_tokens for side in sides)
        if not count:
            return ""
        return (
            f"{name}: {count:,} of {total:,} tokens ({count / total:.2%}) are "
            f"{tokenizer.id_to_token(unknown)}: the tokenizer does not know their characters."
        )
    count, total, dropped = _dropped(texts, tokenizer)
    if not count:
        return ""
    return (
        f"{name}: {count:,} of {total:,} texts have characters that the tokenizer drops, such as "
        f"{dropped!r}; these characters are neither trained nor scored."
    )


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of unknown characters; None if there is none."""
    from tokenizers.models import Unigram

    if isinstance(tokenizer.model, Unigram):
        number: int | None = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return number
    name = getattr(tokenizer.model, "unk_token", None)
    return None if name is None else tokenizer.token_to_id(name)


def _dropped(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[int, int, str]:
    """Return the number of texts that lose characters, that of all, and one of the characters."""
    from tokenizers.pre_tokenizers import ByteLevel

    bytes_of = (ByteLevel.alphabet(), [f"<0x{byte:02X}>" for byte in range(256)])
    if any(all(tokenizer.token_to_id(each) is not None for each in one) for one in bytes_of):
        return 0, 0, ""
    is_dropped: dict[str, bool] = {}
    count = total = 0
    for text in texts:
        new = [character for character in set(text) if character not in is_dropped]
        for character, encoding in zip(new, encoded_texts(new, tokenizer), strict=True):
            # A splitter may leave out spaces, and put one in front
            is_empty = not "".join(encoding.tokens).strip("▁ ")
            is_dropped[character] = is_empty and character.strip("▁").strip() != ""
        count += any(is_dropped[character] for character in set(text))
        total += 1
    return count, total, next((one for one, is_lost in is_dropped.items() if is_lost), "")


@contextmanager
def _specials_as_text(tokenizer: Tokenizer) -> Iterator[None]:
    """Encode special tokens in a text like other text."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before

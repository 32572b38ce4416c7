"""Tokenizers, trained or of a checkpoint, and documents as tokens that know their bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from tritter.data.documents import Document
from tritter.errors import RequestError, TritterError, refused
from tritter.storage.reading import read_object, require_file
from tritter.storage.spool import Spool

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
MINIMUM_VOCAB_SIZE = 257  # every byte, and the end of a text
_STATED_IN = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERED_IN = ("generation_config.json", "config.json")
MINIMUM_DOCUMENT_TOKENS = 4  # a character may take four bytes, and each a token
# At a time: what the tokenizer knows of a token, and the places of tokens, take many times more
ENCODED_CHARACTERS = 2**21
PACKED_DOCUMENTS = 128


def train_tokenizer(documents: Iterable[Document], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; every text survives encoding and decoding unchanged.

    `END_OF_TEXT` is token 0. The vocabulary is smaller than `vocab_size` when the documents
    hold too few pairs to merge. The same documents give the same tokenizer.

    Raises:
        RequestError: `vocab_size` has no room for all bytes and the end of a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise RequestError(
            f"data.vocab_size={vocab_size}: a byte-level vocabulary needs at least "
            f"{MINIMUM_VOCAB_SIZE} (256 bytes and the end of a text)."
        )
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


@dataclass(frozen=True, slots=True, eq=False)
class PretrainedTokenizer:
    """A tokenizer, and its token for the end of a text."""

    tokenizer: Tokenizer
    end_of_text: str

    @property
    def end_of_text_id(self) -> int:
        """The number of the end of a text, which the vocabulary has."""
        token_id = self.tokenizer.token_to_id(self.end_of_text)
        assert token_id is not None  # it was found by its vocabulary
        return token_id


def read_tokenizer(folder: Path, *, vocab_size: int) -> PretrainedTokenizer:
    """Read a checkpoint's tokenizer.json and its end of text (`eos_token`).

    The end of text is taken from tokenizer_config.json or special_tokens_map.json, else by its
    number from generation_config.json or config.json.

    Args:
        vocab_size: of the model's embedding.

    Raises:
        RequestError: there is no tokenizer.json, it is damaged, it gives tokens that the model
            has no embedding for, or no end of text is stated.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RequestError(f"{folder} holds no tokenizer.json.")
    try:
        require_file(path)
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises Exception itself, so nothing narrower catches it.
    except Exception as error:
        raise RequestError(f"{path} is no usable tokenizer: {error}") from error
    # A checkpoint may carry the settings of its last use, which would cut or pad our texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise RequestError(
            f"{path} gives tokens up to {highest}, but the model has embeddings for {vocab_size} "
            f"(vocab_size in its config.json); tokenizer and model do not belong together."
        )
    for name in _stated(folder, tokenizer):
        if tokenizer.token_to_id(name) is not None:
            return PretrainedTokenizer(tokenizer, name)
    raise RequestError(
        f"{folder} states no end of text that its tokenizer knows: set eos_token in "
        f"{_STATED_IN[0]} to one of its tokens."
    )


def copied_tokenizer(tokenizer: Any) -> PretrainedTokenizer:
    """Return a live Hugging Face tokenizer as ours; the original keeps its settings.

    Raises:
        RequestError: it is not a fast tokenizer, or has no `eos_token`.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or tokenizer.eos_token is None:
        reason = "pass a fast Hugging Face tokenizer with an eos_token, or a folder that holds one"
        raise refused("tokenizer", type(tokenizer).__name__, reason)
    copied = Tokenizer.from_str(backend.to_str())
    copied.no_truncation()
    copied.no_padding()
    return PretrainedTokenizer(copied, str(tokenizer.eos_token))


def _stated(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    for file in _STATED_IN:
        token = _json(folder / file).get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            yield name
    for file in _NUMBERED_IN:
        number = _json(folder / file).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
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
class Names(Sequence[str]):
    """Names as two tensors, which may lie on disk.

    Attributes:
        text: uint8, UTF-8 of all names, one after the other.
        ends: int64 [n], where each ends.
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedDocuments:
    """Tokens of n documents, one after the other, without an end of text between them.

    Attributes:
        tokens: int32 [num_tokens].
        offsets: int64 [n + 1]; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        num_bytes: int64 [n], UTF-8 bytes of the text that the tokens stand for.
        identifiers: the documents' names.
    """

    tokens: Tensor
    offsets: Tensor
    num_bytes: Tensor
    identifiers: Sequence[str]

    def __len__(self) -> int:
        return len(self.identifiers)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents together."""
        return self.tokens.numel()

    def document(self, index: int) -> Tensor:
        """Return the tokens of one document, int32 [its number of tokens]."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def tokenise(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    max_tokens_per_document: int | None = None,
) -> TokenisedDocuments:
    """Tokenise documents; a longer one keeps its beginning, cut between two characters.

    Special tokens are never added, and a text that spells one is read as plain text.

    Raises:
        RequestError: `max_tokens_per_document` is too small for one character.
    """
    import numpy as np

    limit = max_tokens_per_document
    if limit is not None and limit < MINIMUM_DOCUMENT_TOKENS:
        raise RequestError(
            f"data.max_validation_tokens_per_document={limit}: must be at least "
            f"{MINIMUM_DOCUMENT_TOKENS} (one character may take that many tokens), or null."
        )
    tokens, ends, num_bytes = Spool(), array("q", [0]), array("q")
    names, name_ends = Spool(), array("q")
    # The fast one leaves out the offsets, which only a cut needs.
    encode = tokenizer.encode_batch_fast if limit is None else tokenizer.encode_batch
    for batch in _batches(documents):
        with _specials_as_text(tokenizer):
            encodings = encode([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            num_kept, text = len(encoding), document.text
            if limit is not None and num_kept > limit:
                # A byte-level token may hold a part of a character; its neighbours share its
                # offsets then.
                offsets, num_kept = encoding.offsets, limit
                while num_kept and offsets[num_kept][0] < offsets[num_kept - 1][1]:
                    num_kept -= 1
                text = text[: offsets[num_kept - 1][1]] if num_kept else ""
            tokens.append(np.asarray(encoding.ids[:num_kept], dtype=np.int32).data.cast("B"))
            ends.append(ends[-1] + num_kept)
            num_bytes.append(len(text.encode()))
            names.append(document.identifier.encode())
            name_ends.append(len(names))
    return TokenisedDocuments(
        tokens=tokens.tensor("i4"),
        offsets=_int64(ends),
        num_bytes=_int64(num_bytes),
        identifiers=Names(names.tensor("u1"), _int64(name_ends)),
    )


def tokenised(texts: Iterable[str], tokenizer: PretrainedTokenizer) -> TokenisedDocuments:
    """Tokenise texts in memory; each is a document named by its number."""
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    return tokenise(documents, tokenizer.tokenizer)


def check_packs(documents: TokenisedDocuments, *, sequence_length: int) -> int:
    """Return how many sequences documents are packed into.

    Raises:
        RequestError: `sequence_length` is below 2, or there is not one full sequence.
    """
    available = documents.num_tokens + len(documents)
    if sequence_length < 2:
        raise RequestError(
            f"data.sequence_length={sequence_length}: must be at least 2, since each token is "
            f"predicted from those before it."
        )
    if available < sequence_length:
        raise RequestError(
            f"data.sequence_length={sequence_length}: the {len(documents)} documents hold "
            f"{available} tokens, not one full sequence. Give more text, or at most {available}."
        )
    return available // sequence_length


def pack(documents: TokenisedDocuments, *, sequence_length: int, end_of_text_id: int) -> Tensor:
    """Lay documents end to end, each closed by an end of text, and cut into full sequences.

    Returns int32 [num_sequences, sequence_length], spooled; the rest that fills no sequence is
    dropped.

    Raises:
        RequestError: as `check_packs`.
    """
    import torch

    num_sequences = check_packs(documents, sequence_length=sequence_length)
    stream = Spool()
    for first in range(0, len(documents), PACKED_DOCUMENTS):
        offsets = documents.offsets[first : first + PACKED_DOCUMENTS + 1]
        ends_before = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        held = documents.tokens[offsets[0] : offsets[-1]]
        piece = torch.full((len(held) + len(offsets) - 1,), end_of_text_id, dtype=torch.int32)
        piece[torch.arange(len(held)) + ends_before] = held
        stream.append(piece.numpy().data.cast("B"))
    packed = stream.tensor("i4")[: num_sequences * sequence_length]
    return packed.view(num_sequences, sequence_length)


def joined(sequences: Sequence[Tensor]) -> Tensor:
    """Return packed sequences int32 [N, T] of several domains as one tensor, spooled."""
    if len(sequences) == 1:
        return sequences[0]
    spool = Spool()
    for each in sequences:
        spool.append(each.contiguous().view(-1).numpy().data.cast("B"))
    return spool.tensor("i4").view(-1, sequences[0].shape[1])


def _int64(numbers: array) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.frombuffer(numbers, dtype=np.int64).copy())


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield documents in their order, about `ENCODED_CHARACTERS` at a time."""
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= ENCODED_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _specials_as_text(tokenizer: Tokenizer) -> Iterator[None]:
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before

"""A byte-level BPE tokenizer trained on the documents at hand, in seconds and offline."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tritter.data.documents import Document
from tritter.errors import RequestError

END_OF_TEXT = "<|endoftext|>"
MINIMUM_VOCAB_SIZE = 257  # every byte, and the end of a text


def train_tokenizer(documents: Iterable[Document], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; every text survives encoding and decoding unchanged.

    `END_OF_TEXT` is token 0. The vocabulary is smaller than `vocab_size` when the documents
    hold too few pairs to merge. The same documents give the same tokenizer.

    Raises:
        RequestError: `vocab_size` has no room for all bytes and the end of a text.
    """
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

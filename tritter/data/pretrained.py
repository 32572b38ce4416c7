"""The tokenizer of a checkpoint that exists, and the token that ends a text for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tritter.errors import RequestError, TritterError
from tritter.storage.reading import read_json, require_file

_STATED_IN = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERED_IN = ("generation_config.json", "config.json")


@dataclass(frozen=True, slots=True, eq=False)
class PretrainedTokenizer:
    """A tokenizer, and its token for the end of a text."""

    tokenizer: Tokenizer
    end_of_text: str


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
        content = read_json(path)
    except TritterError as error:
        raise RequestError(str(error)) from error
    return content if isinstance(content, dict) else {}

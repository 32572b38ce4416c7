"""The words of a command line before anybody reads them."""

from collections.abc import Sequence

from tritter.errors import RequestError, brief

# What the system, not the program, refuses
UNFORESEEN = (OSError, MemoryError, RecursionError, OverflowError, UnicodeError)


def said(error: BaseException) -> str:
    """Return what an unforeseen error says, in one line."""
    return f"{' '.join(str(error).split()) or 'no memory is left'} ({type(error).__name__})."


def check_words(words: Sequence[str]) -> None:
    """Refuse words that are no text.

    Raises:
        RequestError: one holds a NUL character, or bytes that are not UTF-8.
    """
    for number, word in enumerate(words, start=1):
        if "\0" in word:
            raise RequestError(f"word {number} = {brief(word)}: it holds a NUL character.")
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"word {number} = {brief(word)}: it holds bytes that are not UTF-8 text."
            ) from error

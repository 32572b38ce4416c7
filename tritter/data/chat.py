"""Conversations as tokens: rendered with a chat template, and marked with what to predict.

A token of a conversation is its id plus marks in high bits, so that packed sequences stay single
tensors, in memory and in files. `DocumentMask` removes the marks before a model reads the ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from tritter.data.conversations import Conversation
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.storage.reading import named_path, read_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    _Tokens = TypeVar("_Tokens", Tensor, np.ndarray)

LossOn = Literal["answers", "all"]
TOKENIZER, NONE = "tokenizer", "none"  # values of data.chat_template; others are files
TEMPLATE_FILE = "chat_template.jinja"  # in a checkpoint
TEMPLATE_KEY, LOSS_KEY = "data.chat_template", "data.loss_on"
MAX_TEMPLATE_BYTES = 2**20
# Marks: a role, whose bit of CONTEXT excludes a token from the loss, and the start of a
# conversation. Ids are below 2**28
ANSWER, CONTEXT, PADDING = 1 << 28, 2 << 28, 3 << 28
START = 1 << 30
_ID_BITS = (1 << 28) - 1
# Some templates contain today's date, which would change the data from one day to the next
FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ {'%d %b %Y': '26 Jul 2024'}.get(format, '2024-07-26') }}{% endmacro %}"
)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def ids_of(tokens: _Tokens) -> _Tokens:
    """Return the ids of marked tokens."""
    return tokens & _ID_BITS


def is_padding(tokens: _Tokens) -> _Tokens:
    """Return whether each token is padding after a conversation."""
    return (tokens & PADDING) == PADDING


def is_unpredicted(tokens: _Tokens) -> _Tokens:
    """Return whether each token is part of a prompt, or padding after a conversation."""
    return (tokens & CONTEXT) != 0


@dataclass(frozen=True, slots=True, eq=False)
class Chat:
    """How the conversations of a run become tokens.

    Args:
        tokenizer: a transformers tokenizer with a chat template; None reads plain text.
        loss_on: `answers`, or `all` to predict every token.
        has_template: False if the tokenizer has no template.
    """

    tokenizer: Any = None
    loss_on: LossOn = "answers"
    has_template: bool = True

    @property
    def is_marked(self) -> bool:
        """Whether conversations differ from plain text."""
        return self.tokenizer is not None or self.loss_on == "answers"

    @property
    def digest(self) -> str:
        """The checksum of everything that determines the tokens, except the vocabulary."""
        template = None
        if self.tokenizer is not None:
            template = (self.tokenizer.chat_template, self.tokenizer.special_tokens_map)
        return sha256(f"1\0{self.loss_on}\0{template}".encode()).hexdigest()

    def note(self, count: int) -> str:
        """Return a sentence about `count` conversations of a run."""
        how = "rendered with the chat template"
        if self.tokenizer is None:
            why = "" if self.has_template else ", because there is no chat template"
            how = f"read as plain text{why} ({TEMPLATE_KEY}={NONE})"
        loss = "answers" if self.loss_on == "answers" else "all tokens"
        number = "1 conversation is" if count == 1 else f"{count:,} conversations are"
        return f"{number} {how}; the loss is on {loss}."

    def render(self, conversation: Conversation, name: str) -> np.ndarray:
        """Return a conversation as marked tokens, int32 [T]; the tokenizer has a chat template.

        Answers come from the template's `{% generation %}` blocks. Without them, they are what
        the template adds to the messages before, rendered with the prompt for an answer.

        Args:
            conversation: the conversation.
            name: identifies it in messages.

        Raises:
            RequestError: the template fails, or a rendered prefix does not begin the whole.
        """
        import numpy as np

        rendered = self._ids(conversation, name, has_mask=self.loss_on == "answers")
        ids = rendered["input_ids"]
        is_answer = np.full(len(ids), self.loss_on == "all")
        if "assistant_masks" in rendered:
            is_answer[:] = rendered["assistant_masks"]
            # Messages of the assistant that are no answers have the first blocks
            begins = np.flatnonzero(np.diff(is_answer, prepend=False) & is_answer)
            num_others = len(conversation.assistant) - len(conversation.answers)
            is_answer[: begins[num_others] if num_others < len(begins) else len(ids)] = False
        elif self.loss_on == "answers":
            for start, end in self._answer_ranges(conversation, ids, name):
                is_answer[start:end] = True
        marked = np.asarray(ids, dtype=np.int32)
        marked |= np.where(is_answer, ANSWER, CONTEXT).astype(np.int32)
        marked[:1] = ids_of(marked[:1]) | CONTEXT | START  # nothing precedes it
        return marked

    def prompt(self, text: str) -> list[int]:
        """Return a user's message with the prompt for an answer, as marked tokens."""
        conversation = Conversation(({"role": "user", "content": text},))
        ids = [*self._ids(conversation, text, add_generation_prompt=True)["input_ids"]]
        return [ids[0] | START, *ids[1:]]

    def answer_bytes(self, conversation: Conversation) -> int:
        """Return the UTF-8 bytes of the predicted parts of the plain text.

        They do not depend on the template, so losses per byte are comparable between models.
        """
        text = str(conversation)
        if self.loss_on == "all":
            return len(text.encode())
        return sum(len(text[start:end].encode()) for start, end in conversation.answer_spans)

    def _answer_ranges(
        self, conversation: Conversation, ids: Sequence[int], name: str
    ) -> Iterator[tuple[int, int]]:
        """Yield start and end of each answer's tokens, from rendered prefixes."""
        for at in conversation.answers:
            before = self._ids(conversation, name, messages=at, add_generation_prompt=True)
            after = self._ids(conversation, name, messages=at + 1)
            for prefix in (before["input_ids"], after["input_ids"]):
                if ids[: len(prefix)] != prefix:
                    reason = (
                        f"message {at + 1} of {name!r} can't be located: the tokens of the "
                        "conversation do not begin with those of the messages up to it; add "
                        "{% generation %} blocks to a copy of the template"
                    )
                    raise _refused(reason)
            yield len(before["input_ids"]), len(after["input_ids"])

    def _ids(
        self,
        conversation: Conversation,
        name: str,
        *,
        messages: int | None = None,
        has_mask: bool = False,
        **options: bool,
    ) -> Mapping[str, Any]:
        """Render the first `messages` messages, all by default, and return their tokens.

        With `has_mask`, `assistant_masks` marks the `{% generation %}` blocks, if there are any.
        """
        tools = [dict(tool) for tool in conversation.tools] or None
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
            found: Mapping[str, Any] = self.tokenizer.apply_chat_template(
                [dict(message) for message in conversation.messages[:messages]],
                tools=tools,
                chat_template=FIXED_DATE + template,
                return_assistant_tokens_mask=has_mask and bool(_GENERATION.search(template)),
                tokenizer_kwargs={"verbose": False},
                **options,
            )
        # Templates come from a checkpoint and raise errors of any kind
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise _refused(f"the template fails for {name!r} ({message})") from error
        return found


def marked_answers(
    text: str, encoding: Any, num_kept: int, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """Return the tokens of a plain text, of which those of the answers are predicted.

    Args:
        text: the text.
        encoding: its `tokenizers.Encoding`, with offsets.
        num_kept: number of tokens to return.
        spans: start and end of each answer, in characters.

    Returns:
        int32 [num_kept], and the UTF-8 bytes of the answers that they encode.
    """
    import numpy as np

    offsets = np.asarray(encoding.offsets[:num_kept], dtype=np.int64).reshape(-1, 2)
    is_answer = np.zeros(num_kept, dtype=bool)
    last, num_bytes = int(offsets[-1, 1]) if num_kept else 0, 0
    for start, end in spans:
        # A token with the space before an answer belongs to the answer
        is_answer |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        num_bytes += len(text[start : min(end, last)].encode())
    ids = np.asarray(encoding.ids[:num_kept], dtype=np.int32)
    return ids | np.where(is_answer, ANSWER, CONTEXT).astype(np.int32), num_bytes


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the special token with which a chat template ends an answer; none if it has no such.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
    """
    answer = "the answer"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    # Templates come from a checkpoint and raise errors of any kind
    except Exception:
        return []
    ids = tokenizer.encode(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    return [token for token in ids[:1] if token in added and added[token].special]


def _refused(reason: str) -> RequestError:
    advice = f"set {TEMPLATE_KEY}=FILE to use another template, or {LOSS_KEY}=all"
    return RequestError(Problem(TEMPLATE_KEY, reason=reason, advice=advice))


class ChatChoice(NamedTuple):
    """The options of a run about conversations.

    Attributes:
        chat_template: `tokenizer`, `none` or a template file; None is `tokenizer` if it has a
            template, else `none`.
        loss_on: None is `answers`.
    """

    chat_template: str | None = None
    loss_on: LossOn | None = None


def chat_of(options: ChatChoice, *, tokenizer: Any) -> Chat:
    """Return the way in which conversations become tokens.

    Args:
        options: the options of the run.
        tokenizer: the transformers tokenizer of the checkpoint; None for a new base model.

    Raises:
        RequestError: there is no such template.
    """
    choice, loss_on = options.chat_template, options.loss_on or "answers"
    has_template = tokenizer is not None and tokenizer.chat_template is not None
    if choice == NONE or (choice is None and not has_template):
        return Chat(None, loss_on, has_template=has_template)
    if tokenizer is None:
        reason = "a new base model has no special tokens for a template; use none"
        raise RequestError(Problem(TEMPLATE_KEY, choice, reason=reason))
    if choice not in (None, TOKENIZER):
        tokenizer.chat_template = read_template(choice)
    elif not has_template:
        reason = "the checkpoint's tokenizer has no chat template; use none, or a file"
        raise RequestError(Problem(TEMPLATE_KEY, choice, reason=reason))
    return Chat(tokenizer, loss_on)


def template_location(choice: str) -> str:
    """Return a value of `data.chat_template`, a file as an absolute path.

    Raises:
        RequestError: the file does not exist.
    """
    if choice in (TOKENIZER, NONE):
        return choice
    path = named_path(choice, key=TEMPLATE_KEY).absolute()
    if not path.is_file():
        reason = "there is no such file; allowed are tokenizer, none and a file"
        near = nearest(choice, (TOKENIZER, NONE))
        raise RequestError(Problem(TEMPLATE_KEY, choice, reason=reason, nearest=near))
    return str(path)


def read_template(path: str) -> str:
    """Return the content of a template file.

    Raises:
        RequestError: the file can't be read.
    """
    try:
        return read_text(Path(path), limit_bytes=MAX_TEMPLATE_BYTES)
    except TritterError as error:
        raise RequestError(Problem(TEMPLATE_KEY, path, reason=str(error))) from error

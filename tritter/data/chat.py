"""Conversations as tokens: rendered with a chat template, and marked with what to predict.

A token of a conversation is its id plus marks in high bits, so that packed sequences stay single
tensors, in memory and in files. `DocumentMask` removes the marks before a model reads the ids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from tritter.data.records import ASSISTANT, REASONING, SYSTEM, TOOLS, USER, Conversation
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.storage.reading import named_path, read_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    _Tokens = TypeVar("_Tokens", Tensor, np.ndarray)

LossOn = Literal["answers", "all"]
_TOKENIZER, _NONE = "tokenizer", "none"  # values of data.chat_template; others are files
TEMPLATE_FILE = "chat_template.jinja"  # in a checkpoint
_TEMPLATE_KEY, _LOSS_KEY = "data.chat_template", "data.loss_on"
_MAX_TEMPLATE_BYTES = 2**20
_READ = ("role", "content", "train")  # fields of messages that Tritter itself reads
_NOTHING: tuple[object, ...] = (None, "", [], {})
_MAX_FIELDS = 8  # in a sentence
_END_TOKENS = 2  # such as <|im_end|> and a line end
# Marks: a role, whose bit of CONTEXT excludes a token from the loss, and the start of a
# conversation. Ids are below 2**28
ANSWER, CONTEXT, PADDING = 1 << 28, 2 << 28, 3 << 28
START = 1 << 30
_ID_BITS = (1 << 28) - 1
# Some templates contain today's date, which would change the data from one day to the next
_FIXED_DATE = (
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
        return sha256(f"2\0{self.loss_on}\0{template}".encode()).hexdigest()

    def note(self, count: int) -> str:
        """Return a sentence about `count` conversations of a run."""
        how = "rendered with the chat template"
        if self.tokenizer is None:
            why = "" if self.has_template else ", because there is no chat template"
            how = f"read as plain text{why} ({_TEMPLATE_KEY}={_NONE})"
        loss = "answers" if self.loss_on == "answers" else "all tokens"
        number = "1 conversation is" if count == 1 else f"{count:,} conversations are"
        return f"{number} {how}; the loss is on {loss}."

    def endless_note(self, domains: Iterable[Tensor]) -> str:
        """Return a sentence if no answer in some tokens ends its turn; empty otherwise."""
        import numpy as np

        if self.tokenizer is None or self.loss_on == "all":
            return ""
        added = self.tokenizer.added_tokens_decoder
        special = [token for token, each in added.items() if each.special]
        num_answers = 0
        for tokens in domains:
            is_predicted = ~is_unpredicted(tokens).numpy()
            ends = np.flatnonzero(np.diff(is_predicted, append=False) & is_predicted)
            num_answers += len(ends)
            for back in range(_END_TOKENS):
                at = np.maximum(ends - back, 0)
                if np.isin(ids_of(tokens.numpy()[at]), special).any():
                    return ""
        if not num_answers:
            return ""
        return (
            "No answer ends with a special token, so the model does not learn to end its turn: the "
            "chat template ends turns outside its {% generation %} blocks, or with the next role."
        )

    def unshown_note(self, conversations: Iterable[Conversation | None]) -> str:
        """Return a sentence on parts of conversations that the template does not show."""
        counts = Counter(dict.fromkeys((TOOLS, *REASONING), 0))
        for conversation in conversations:
            if conversation is None or self.tokenizer is None:
                continue
            messages = conversation.messages
            fields = {
                name: None
                for each in messages
                for name, value in each.items()
                if value not in _NOTHING
            }
            fields |= {TOOLS: None} if conversation.tools else {}
            counts.update(
                field
                for field in fields
                if field not in _READ and not self.shows(conversation, field)
            )
        parts = [f"{field} ({count:,} conversations)" for field, count in counts.items() if count]
        parts[_MAX_FIELDS:] = ["..."] if len(parts) > _MAX_FIELDS else []
        return f"The chat template does not show {', '.join(parts)}." if parts else ""

    def check(self, conversation: Conversation, name: str) -> None:
        """Check that the tokens can express a conversation."""
        if self.tokenizer is None and self.loss_on == "all" and conversation.untrained:
            at = conversation.untrained[0] + 1
            reason = f"message {at} of {name!r} is not to be trained, but plain text is predicted"
            raise RequestError(Problem(_LOSS_KEY, self.loss_on, reason=f"{reason}; use answers"))
        calls = [at for at, each in enumerate(conversation.messages) if each.get("tool_calls")]
        if calls and self.tokenizer is not None and not self.shows(conversation, "tool_calls"):
            raise _refused(f"it does not show the tool_calls of message {calls[0] + 1} of {name!r}")

    def render(self, conversation: Conversation, name: str) -> np.ndarray:
        """Return a conversation as marked tokens, int32 [T]; the tokenizer has a chat template.

        Answers come from the template's `{% generation %}` blocks. Without them, they are what
        the template adds to the messages before, rendered with the prompt for an answer.

        Args:
            conversation: the conversation.
            name: identifies it in messages.
        """
        import numpy as np

        rendered = self._ids(conversation, name, has_mask=self.loss_on == "answers")
        ids = rendered["input_ids"]
        is_answer = np.full(len(ids), self.loss_on == "all")
        excluded = conversation.untrained
        if "assistant_masks" in rendered:
            is_answer[:] = rendered["assistant_masks"]
            excluded = tuple(sorted({*conversation.assistant} - {*conversation.answers}))
            edges = np.flatnonzero(np.diff(is_answer, prepend=False, append=False))
            if len(edges) == 2 * len(conversation.assistant):  # a block of each message
                blocks = zip(conversation.assistant, edges[::2], edges[1::2], strict=True)
                for at, start, end in blocks:
                    is_answer[start:end] = at not in excluded
                excluded = ()
        elif self.loss_on == "answers":
            for start, end in self._ranges(conversation, conversation.answers, ids, name):
                is_answer[start:end] = True
            excluded = ()
        for start, end in self._ranges(conversation, excluded, ids, name):
            is_answer[start:end] = False
        marked = np.asarray(ids, dtype=np.int32)
        marked |= np.where(is_answer, ANSWER, CONTEXT).astype(np.int32)
        marked[:1] = ids_of(marked[:1]) | CONTEXT | START  # nothing precedes it
        return marked

    def prompt(self, text: str) -> list[int]:
        """Return a user's message with the prompt for an answer, as marked tokens."""
        conversation = Conversation(({"role": "user", "content": text},))
        ids = [*self._ids(conversation, text, add_generation_prompt=True)["input_ids"]]
        return [ids[0] | START, *ids[1:]]

    def turns(self) -> tuple[tuple[int, ...], ...]:
        """Return the tokens that open a question, and those between it and its answer, marked.

        Empty if no special token ends a question.
        """
        question = [{"role": USER, "content": "the question"}]
        ids = _around(self.tokenizer, question, add_generation_prompt=True)
        if not all(ids):
            return ()
        user, answer = ([token | CONTEXT for token in part] for part in ids)
        return (user[0] | START, *user[1:]), tuple(answer)

    def answer_bytes(self, conversation: Conversation) -> int:
        """Return the UTF-8 bytes of the predicted parts of the plain text.

        They do not depend on the template, so losses per byte are comparable between models; only
        the reasoning in an answer counts where a template shows it, because it is predicted then.
        """
        text, is_all = str(conversation), self.loss_on == "all"
        spans = [(0, len(text))] if is_all else conversation.answer_spans
        parts = [text[start:end] for start, end in spans]
        answers = conversation.assistant if is_all else conversation.answers
        messages, marks = [dict(each) for each in conversation.messages], dict[str, str]()
        for at, field in ((at, field) for at in answers for field in REASONING):
            thought = str(messages[at].get(field) or "").strip()
            if thought:
                messages[at][field] = mark = f"<{field} of message {at}>"
                marks[mark] = thought
        if marks and self.tokenizer is not None:
            # Templates may show the reasoning of the last answer alone
            marked = replace(conversation, messages=tuple(messages))
            rendered: Any = self._ids(marked, text[:40], tokenize=False)
            parts += [thought for mark, thought in marks.items() if mark in rendered]
        return sum(len(part.encode()) for part in parts)

    def fitted(
        self, marked: np.ndarray, limit: int, conversation: Conversation, name: str
    ) -> np.ndarray:
        """Return at most `limit` tokens of a conversation: its first answer, after its prompt.

        If the prompt does not fit, its end is kept, after the beginning of the template if there
        is room for it. At least half of the tokens are those of the answer, if it has as many.
        """
        import numpy as np

        is_predicted = ~is_unpredicted(marked)
        if len(marked) <= limit or not is_predicted.any():
            return marked[:limit]
        start = int(is_predicted.argmax())
        rest = is_predicted[start:]
        size = len(rest) if rest.all() else int(rest.argmin())
        size = min(size, max(limit - start, limit - limit // 2))
        if start + size <= limit:
            return marked[:limit]
        room = limit - size
        opening = 0 if self.tokenizer is None else self._opening(conversation)
        opening = opening if opening <= room // 2 else min(opening, 1, room)
        return np.concatenate([marked[:opening], marked[start - room + opening : start + size]])

    def _opening(self, conversation: Conversation) -> int:
        """Return the number of tokens before the content of the first message, or of the user."""
        system = [dict(each) for each in conversation.messages[:1] if each["role"] == SYSTEM]
        first = {**conversation.messages[len(system)], "content": "the question"}
        tools = [dict(tool) for tool in conversation.tools] or None
        return max(1, len(_around(self.tokenizer, [*system, first], tools=tools)[0]))

    def shows(self, conversation: Conversation, field: str) -> bool:
        """Return whether the template of a conversation reads a field of messages, or `tools`."""
        return field in self.tokenizer.get_chat_template(tools=list(conversation.tools) or None)

    def _ranges(
        self, conversation: Conversation, positions: Iterable[int], ids: Sequence[int], name: str
    ) -> Iterator[tuple[int, int]]:
        """Yield start and end of the tokens of some messages, from rendered prefixes."""
        for at in positions:
            is_prompted = conversation.messages[at]["role"] == ASSISTANT
            before = {"messages": at, "add_generation_prompt": is_prompted}
            ends = [
                self._num_tokens(conversation, name, ids, options) if options["messages"] else 0
                for options in (before, {"messages": at + 1})
            ]
            if None in ends:
                reason = (
                    f"message {at + 1} of {name!r} can't be located: the conversation does not "
                    "begin with the messages up to it; add {% generation %} blocks to a copy of "
                    "the template"
                )
                raise _refused(reason, other=f"{_LOSS_KEY}=all")
            yield ends[0] or 0, ends[1] or 0

    def _num_tokens(
        self, conversation: Conversation, name: str, ids: Sequence[int], options: dict[str, Any]
    ) -> int | None:
        """Return the number of tokens of a rendered prefix; None if it is no prefix."""
        prefix = self._ids(conversation, name, **options)["input_ids"]
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        # A token may reach over the end, such as a newline with the spaces that begin an answer
        part: Any = self._ids(conversation, name, tokenize=False, **options)
        whole: Any = self._ids(conversation, name, tokenize=False)
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        if not whole.startswith(part) or list(found["input_ids"]) != list(ids):
            return None
        return sum(end <= len(part) for _, end in found["offset_mapping"])

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
                chat_template=_FIXED_DATE + template,
                return_assistant_tokens_mask=has_mask and bool(_GENERATION.search(template)),
                tokenizer_kwargs={"verbose": False},
                **options,
            )
        # Templates come from a checkpoint and raise errors of any kind
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise _refused(f"the template fails for {name!r} ({message})") from error
        return found


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """Return the special token with which a chat template ends an answer; none if it has no such.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
    """
    messages = [{"role": USER, "content": "a"}, {"role": ASSISTANT, "content": "the answer"}]
    return _around(tokenizer, messages)[1][:1]


def _around(
    tokenizer: Any, messages: list[dict[str, Any]], *, tools: Any = None, **options: Any
) -> tuple[list[int], list[int]]:
    """Return the tokens before the last message's content, and after it if they begin specially."""
    try:
        template = _FIXED_DATE + tokenizer.get_chat_template(tools=tools)
        options |= {"chat_template": template, "tools": tools, "tokenize": False}
        text = str(tokenizer.apply_chat_template(messages, **options))
    # Templates come from a checkpoint and raise errors of any kind; or there is no tokenizer
    except Exception:
        return [], []
    before, _, after = text.rpartition(messages[-1]["content"])
    encode = partial(tokenizer.encode, add_special_tokens=False)
    ids, added = encode(after.lstrip()), tokenizer.added_tokens_decoder
    is_special = bool(ids) and ids[0] in added and added[ids[0]].special
    return encode(before.rstrip(" ")), ids if is_special else []


def _refused(reason: str, *, other: str = f"{_TEMPLATE_KEY}={_NONE}") -> RequestError:
    advice = f"set {_TEMPLATE_KEY}=FILE to use another template, or {other}"
    return RequestError(Problem(_TEMPLATE_KEY, reason=reason, advice=advice))


class ChatChoice(NamedTuple):
    """The options of a run about conversations.

    Attributes:
        chat_template: `tokenizer`, `none` or a template file; None is `tokenizer` if it has a
            template, else `none`.
        loss_on: None is `answers`.
    """

    chat_template: str | None = None
    loss_on: LossOn | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ChatChoice:
        """Return the options of a `to_record`; other values are None."""
        return cls(
            _NONE if record.get("chat_template") == _NONE else None,
            "all" if record.get("loss_on") == "all" else None,
        )

    def to_record(self) -> dict[str, str]:
        """Return the options that a lineage keeps; a template file is in the checkpoint."""
        chat = {"chat_template": _NONE} if self.chat_template == _NONE else {}
        return chat | ({"loss_on": "all"} if self.loss_on == "all" else {})

    def read_template(self) -> str | None:
        """Return the content of the template file; None if the options name none."""
        if (path := self.chat_template) in (None, _TOKENIZER, _NONE):
            return None
        try:
            return read_text(Path(path), limit_bytes=_MAX_TEMPLATE_BYTES)
        except TritterError as error:
            raise RequestError(Problem(_TEMPLATE_KEY, path, reason=str(error))) from error

    def set_template(self, tokenizer: Any) -> None:
        """Give a transformers tokenizer the template of the options."""
        if self.chat_template == _NONE:
            tokenizer.chat_template = None
        elif (template := self.read_template()) is not None:
            tokenizer.chat_template = template

    def chat(self, tokenizer: Any) -> Chat:
        """Return the way in which conversations become tokens.

        Args:
            tokenizer: the transformers tokenizer of the checkpoint; None for a new base model.
        """
        choice, loss_on = self.chat_template, self.loss_on or "answers"
        has_template = tokenizer is not None and tokenizer.chat_template is not None
        if choice == _NONE or (choice is None and not has_template):
            return Chat(None, loss_on, has_template=has_template)
        if tokenizer is None:
            reason = "a new base model has no special tokens for a template; use none"
            raise RequestError(Problem(_TEMPLATE_KEY, choice, reason=reason))
        if choice in (None, _TOKENIZER) and not has_template:
            reason = "the checkpoint's tokenizer has no chat template; use none, or a file"
            raise RequestError(Problem(_TEMPLATE_KEY, choice, reason=reason))
        self.set_template(tokenizer)
        return Chat(tokenizer, loss_on)

    def of_corpus(self, load_tokenizer: Callable[[], Any], *, is_chat: bool) -> Chat | None:
        """Return the way in which the conversations of a corpus become tokens; None without any.

        Args:
            load_tokenizer: loads the tokenizer for `chat`.
            is_chat: whether the corpus has conversations.
        """
        if is_chat:
            return self.chat(load_tokenizer())
        reason = "the data has no conversations; remove the key"
        if self.chat_template not in (None, _NONE):
            raise RequestError(Problem(_TEMPLATE_KEY, self.chat_template, reason=reason))
        if self.loss_on == "answers":
            raise RequestError(Problem(_LOSS_KEY, self.loss_on, reason=reason))
        return None


def template_location(choice: str) -> str:
    """Return a value of `data.chat_template`, a file as an absolute path."""
    if choice in (_TOKENIZER, _NONE):
        return choice
    path = named_path(choice, key=_TEMPLATE_KEY).absolute()
    if not path.is_file():
        reason = "there is no such file; allowed are tokenizer, none and a file"
        near = nearest(choice, (_TOKENIZER, _NONE))
        raise RequestError(Problem(_TEMPLATE_KEY, choice, reason=reason, nearest=near))
    return str(path)

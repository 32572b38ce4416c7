"""Conversations: records of messages, of prompts with completions, and of instructions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PART_BREAK = "\n\n"  # between the messages of a plain text
USER, ASSISTANT, SYSTEM, TOOLS = "user", "assistant", "system", "tools"
_ANSWERING = (ASSISTANT, "model", "gpt")
# ShareGPT's roles → those of chat templates
_ROLES = {
    "human": USER,
    "gpt": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}
_TURNS = ("messages", "conversations")
# Formats of prompts with answers: for each part its possible names, and whether it is required
_Form = tuple[tuple[tuple[str, ...], bool], ...]
_FORMS: tuple[_Form, ...] = (
    ((("instruction",), True), (("input", "context"), False), (("output", "response"), True)),
    ((("prompt",), True), (("completion", "response", "answer"), True)),
    ((("question",), True), (("answer",), True)),
)
_MESSAGE = '{"role": "...", "content": "..."}'


class WrongRecordError(Exception):
    """The problem of a record or a file, phrased to follow its location."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a record; `str` returns them as plain text.

    Args:
        messages: each with `role` and `content`, and further fields for a chat template.
        tools: JSON schemas of the tools that the messages may call.
        num_given: messages of the prompt, which are never answers.
        has_roles: whether the plain text states the role of each message.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    num_given: int = 0
    has_roles: bool = True

    def __str__(self) -> str:
        return "".join(text for text, _ in self._parts()).strip()

    @property
    def answers(self) -> tuple[int, ...]:
        """The positions of the messages that are answers; the first message answers nothing."""
        return tuple(at for at in self.assistant if at >= max(1, self.num_given))

    @property
    def assistant(self) -> tuple[int, ...]:
        """The positions of the messages of the assistant."""
        roles = [message["role"] for message in self.messages]
        return tuple(at for at, role in enumerate(roles) if role in _ANSWERING)

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each answer in the plain text, in characters."""
        parts = list(self._parts())
        whole = "".join(text for text, _ in parts)
        start, end = len(whole) - len(whole.lstrip()), len(whole.rstrip())
        spans, position = list[tuple[int, int]](), 0
        for text, is_answer in parts:
            begin, position = position, position + len(text)
            if is_answer and begin < end:
                spans.append((max(begin, start) - start, min(position, end) - start))
        return tuple(spans)

    def to_json(self) -> str:
        """Return the conversation as JSON, for `from_json`."""
        fields = [self.messages, self.tools, self.num_given, self.has_roles]
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Return the conversation of a `to_json`."""
        messages, tools, num_given, has_roles = json.loads(text)
        return cls(tuple(messages), tuple(tools), num_given, has_roles)

    def _parts(self) -> Iterator[tuple[str, bool]]:
        """Yield the parts of the plain text, and whether each is an answer."""
        answers, before = self.answers, ""
        for at, message in enumerate(self.messages):
            text = _plain(message)
            header = f"{message['role']}: " if self.has_roles else ""
            if header or text:
                yield before + header, False
                yield text, at in answers
                before = PART_BREAK


def conversation_of(record: Mapping[Any, Any]) -> Conversation | None:
    """Return the conversation of a record; None if it has none of the known formats.

    The formats are `messages`; ShareGPT's `conversations`; an instruction (instruction, input,
    output); and a prompt with an answer (prompt, completion; question, answer), as texts or as
    lists of messages. `system` and `tools` are included.

    Raises:
        WrongRecordError: a part has the wrong type.
    """
    if (turns := next((name for name in _TURNS if name in record), None)) is not None:
        messages = _messages(record[turns], name=turns)
        return _conversation(record, messages)
    form, names = next(_forms(record), ((), []))
    if not names:
        return None
    *given, completion = names
    if len(names) == 2 and isinstance(record[names[0]], list):
        prompt, answer = (_messages(record[name], name=str(name)) for name in names)
        return _conversation(record, [*prompt, *answer], num_given=len(prompt))
    parts = [
        _as_text(record[name], f"{name}:")
        for name, (_, is_needed) in zip(given, form, strict=False)
        if name is not None and (is_needed or record[name] is not None)
    ]
    answer_text = _as_text(record[completion], f"{completion}:")
    prompt_text = PART_BREAK.join(filter(None, parts))
    messages = [
        {"role": USER, "content": prompt_text},
        {"role": ASSISTANT, "content": answer_text},
    ]
    return _conversation(record, messages, has_roles=False)


def conversation_fields(names: Collection[str]) -> tuple[str, ...]:
    """Return the names that form a conversation; empty if there are none."""
    fields = tuple(name for name in _TURNS if name in names)[:1]
    if not fields:
        fields = next((tuple(filter(None, matched)) for _, matched in _forms(names)), ())
    return (*fields, *(name for name in (SYSTEM, TOOLS) if fields and name in names))


def kind_of_value(value: object) -> str:
    """Return the kind of a JSON value, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case Mapping():
            return "an object"
    return type(value).__name__


def _forms(names: Collection[str]) -> Iterator[tuple[_Form, list[str | None]]]:
    """Yield each format of prompts that matches the names, and the name of each part."""
    for form in _FORMS:
        matched = [next((each for each in known if each in names), None) for known, _ in form]
        if all(
            name is not None or not is_needed
            for name, (_, is_needed) in zip(matched, form, strict=True)
        ):
            yield form, matched


def _conversation(
    record: Mapping[Any, Any],
    messages: list[dict[str, Any]],
    *,
    num_given: int = 0,
    has_roles: bool = True,
) -> Conversation:
    """Return a conversation with the record's system message and tools."""
    system, tools = record.get(SYSTEM), record.get(TOOLS) if has_roles else None
    if isinstance(system, str) and system.strip():
        messages = [{"role": SYSTEM, "content": system}, *messages]
        num_given += bool(num_given)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise WrongRecordError(f"tools: is not valid JSON ({error})") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise WrongRecordError(f"tools: is {kind_of_value(tools)}; must be a list of JSON schemas")
    # JSON may contain unpaired surrogates, which UTF-8 cannot encode
    try:
        fields = [_without_null(messages), _without_null(tools or []), num_given, has_roles]
        content = json.dumps(fields, ensure_ascii=False, default=str)
        return Conversation.from_json(content.encode("utf-8", errors="replace").decode())
    except (RecursionError, TypeError) as error:
        raise WrongRecordError(
            f"has a message that is not JSON ({type(error).__name__})"
        ) from error


def _without_null(value: Any) -> Any:
    """Return a value without null fields: tables give each object the fields of all others."""
    if isinstance(value, Mapping):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list) else value


def _messages(value: object, *, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise WrongRecordError(f"{name}: is {kind_of_value(value)}; must be a list of messages")
    return [_message(each, f"{name}: number {at}") for at, each in enumerate(value, start=1)]


def _message(value: object, where: str) -> dict[str, Any]:
    """Return a message with `role` and `content`, also of one with ShareGPT's names."""
    fields = dict(value) if isinstance(value, Mapping) else {}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in fields and other in fields:
            fields[name] = fields.pop(other)
    if fields.get("tool_calls"):
        fields["content"] = fields.get("content") or ""
    if not {"role", "content"} <= set(fields):
        raise WrongRecordError(f"{where} is not a message; must be {_MESSAGE}")
    role = _as_text(fields["role"], f"{where}, role:")
    content = _as_text(fields["content"], f"{where}, content:")
    return {**fields, "role": _ROLES.get(role, role), "content": content}


def _plain(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    parts = [str(message["content"]).replace("\r\n", "\n")]
    parts += [json.dumps(calls, ensure_ascii=False)] if calls else []
    return "\n".join(filter(None, parts))


def _as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise WrongRecordError(f"{where} is {kind_of_value(value)}, not a string")
    return value

"""Records of data sets: texts and conversations, and counts of those that are skipped.

The formats of conversations are messages, prompts with completions, and instructions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tritter.errors import key_name, nearest, show

PART_BREAK = "\n\n"  # between the messages of a plain text
USER, ASSISTANT, SYSTEM, _TOOL, TOOLS = "user", "assistant", "system", "tool", "tools"
# Roles of data sets in lower case → those of chat templates
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "model", "gpt", "chatgpt", "bot", "chatbot", "ai"), ASSISTANT),
    **dict.fromkeys(("function_call", "tool_call"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "function", "function_response", "tool_response"), _TOOL),
    **dict.fromkeys(("observation", "ipython"), _TOOL),
}
TURNS = ("messages", "conversations")
_SYSTEMS = (SYSTEM, "system_prompt", "system_message")
_HISTORY = "history"
# Fields that exclude a message from training, and their value in a message that is trained
_TRAINED = {
    **dict.fromkeys(("weight", "loss_weight", "train", "training", "loss", "loss_mask"), 1),
    "masked": 0,
}
OF_RECORDS = ("weight", "loss_weight", "train")  # those that exclude a whole record, too
_NUMBERS = {"": None, "0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # of a .csv
REASONING = ("reasoning_content", "thinking")  # of an answer, in addition to its content
_PREFERENCES = "a rejected answer can't be used; write the chosen ones as prompt and completion"
# Fields that would change what is learned, if they were supported
_UNSUPPORTED = {
    "rejected": _PREFERENCES,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text is read"),
    "functions": "pass JSON schemas as tools",
    "chat_template_kwargs": "write the values into a copy of the template (data.chat_template)",
}
_VERDICTS = ("label", "kto_tag")  # of an answer: false if it is unwanted
# Formats of prompts with answers: for each part its possible names, and whether it is required
_Form = tuple[tuple[tuple[str, ...], bool], ...]
_MATERIAL = (("input", "context", "passage"), False)
_FORMS: tuple[_Form, ...] = (
    ((("instruction",), True), _MATERIAL, (("output", "response", "completion"), True)),
    ((("prompt",), True), _MATERIAL, (("completion", "response", "answer", "output"), True)),
    (_MATERIAL, (("question",), True), (("answer", "response", "output"), True)),
)
_ACCEPTED = "messages, conversations, prompt + completion, question + answer, instruction + output"
NO_ANSWERS = (
    "no answers: messages of the role assistant, after another one, that are neither empty nor "
    "excluded (weight: 0, train: false)"
)
_MESSAGE = '{"role": "...", "content": "..."}'
DEFAULT_FIELD, FIELD_KEY = "text", "data.text_field"
# Common names of the text field
_COMMON_FIELDS = ("text", "content", "body", "document", "article", "raw_content", "completion")
_MAX_NAMES, _MAX_NAME_LENGTH = 12, 40
_MAX_PROBLEMS_OF_FILE = 10
_MAX_REASONS = 8  # in a note
_DIGITS = re.compile(r"\d+")  # of a message, line or byte
_JSON_TURNS = re.compile(r"\s*\[\s*\{")


class WrongRecordError(Exception):
    """The problem of a record or a file, phrased to follow its location."""

    @classmethod
    def of_field(cls, field: str, found: Sequence[Any]) -> WrongRecordError:
        """Return the error of a missing field, with the available fields and the nearest match."""
        likely = next((name for name in _COMMON_FIELDS if name in found), None)
        likely = likely or nearest(field, [name for name in found if isinstance(name, str)])
        accepted = ""
        if field == DEFAULT_FIELD:
            accepted = f" Accepted: {field}, or a conversation: {_ACCEPTED}"
        advice = f". Did you mean {key_name(FIELD_KEY)}={show(likely)}?" if likely else "."
        if "rejected" in found:
            advice = f". Preference data: {_PREFERENCES}."
        names = [shown(name) for name in found[:_MAX_NAMES]]
        names += ["..."] if len(found) > _MAX_NAMES else []
        return cls(
            f"has no field {shown(field)} ({key_name(FIELD_KEY)} = {shown(field)}); available: "
            f"{', '.join(names) or 'none'}{advice}{accepted}"
        )


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

    @classmethod
    def of_question(cls, prompt: str, answer: str) -> Conversation:
        """Return a message of the user, and one of the assistant."""
        contents = {USER: prompt, ASSISTANT: answer}
        messages = tuple({"role": role, "content": text} for role, text in contents.items())
        return cls(messages, has_roles=False)

    @classmethod
    def of_record(
        cls, record: Mapping[Any, Any], *, turns: str | None = None
    ) -> Conversation | None:
        """Return the conversation of a record; None if it has none of the known formats.

        The formats are `messages`; ShareGPT's `conversations`; an instruction (instruction, input,
        output); and a prompt with an answer (prompt, completion; question, answer), as texts or as
        lists of messages. A system message, `history` and `tools` are included.

        Args:
            record: the record.
            turns: the field of the messages; None finds it.
        """
        # Tables give each record the fields of all others
        not_null = [name for name, value in record.items() if value is not None]
        names = next(_forms(not_null), None) or next(_forms(record), [])
        turns = turns or next((name for name in TURNS if name in not_null), None)
        if turns is None and not names:
            turns = next((name for name in TURNS if name in record), None)
        if turns is not None:
            _refuse_unsupported(record)
            return cls._of_messages(record, _messages(record[turns], name=turns))
        if not names:
            return None
        _refuse_unsupported(record)
        *given, completion = names
        parts = [name for name in given if name is not None and record[name] is not None]
        is_text = not any(isinstance(record[name], list) for name in (*parts, completion))
        prompt = _prompt(record, parts)
        if isinstance(record[completion], list):
            answer = _messages(record[completion], name=str(completion))
        else:
            text = _as_text(record[completion], f"{completion}:")
            answer = [{"role": ASSISTANT, "content": text}]
        before = _history(record.get(_HISTORY))
        num_given = 0 if is_text else len(before) + len(prompt)
        messages = [*before, *prompt, *answer]
        return cls._of_messages(record, messages, num_given=num_given, has_roles=not is_text)

    @classmethod
    def _of_messages(
        cls,
        record: Mapping[Any, Any],
        messages: list[dict[str, Any]],
        *,
        num_given: int = 0,
        has_roles: bool = True,
    ) -> Conversation:
        """Return a conversation with the record's system message and tools."""
        messages, added = _with_system(record, messages)
        num_given += added if num_given else 0
        excluded = _is_trained({name: record.get(name) for name in OF_RECORDS}, "")
        messages = [message | excluded for message in messages]
        tools = _tools(record.get(TOOLS), is_strict=has_roles)
        try:
            fields = [messages, tools, num_given, has_roles]
            content = json.dumps(fields, ensure_ascii=False, default=str)
            return cls.from_json(_encodable(content))
        except (RecursionError, TypeError) as error:
            raise WrongRecordError(
                f"has a message that is not JSON ({type(error).__name__})"
            ) from error

    def __str__(self) -> str:
        return "".join(text for text, _ in self._parts()).strip()

    @property
    def answers(self) -> tuple[int, ...]:
        """The positions of the messages that are answers; the first message answers nothing."""
        first = max(1, self.num_given)
        return tuple(at for at in self.assistant if at >= first and _is_answer(self.messages[at]))

    @property
    def untrained(self) -> tuple[int, ...]:
        """The positions of the messages that the record excludes from training."""
        return tuple(at for at, each in enumerate(self.messages) if each.get("train") is False)

    @property
    def assistant(self) -> tuple[int, ...]:
        """The positions of the messages of the assistant."""
        roles = [message["role"] for message in self.messages]
        return tuple(at for at, role in enumerate(roles) if role == ASSISTANT)

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


Text = str | Conversation  # the content of a record; `str` returns the plain text of both


def text_of(record: object, *, field: str) -> Text:
    """Return a record's text or conversation.

    A record is a text, or a mapping with a text in `field`. With the default field, it may also
    be a conversation, see `Conversation.of_record`; its turns may also be named. `weight: 0` and
    `train: false` exclude a record.

    Args:
        record: the parsed record.
        field: name of the text field.
    """
    if isinstance(record, str):
        return _encodable(record)
    if not isinstance(record, Mapping):
        raise WrongRecordError(
            f"is {_kind_of_value(record)}; must be a JSON object "
            '{"text": "..."}, a conversation, or a string "..."'
        )
    value = record.get(field)
    # A table of texts has messages as JSON
    is_turns = field in TURNS and bool(isinstance(value, list) or _JSON_TURNS.match(str(value)))
    if is_turns or (value is None and field == DEFAULT_FIELD):
        conversation = Conversation.of_record(record, turns=field if is_turns else None)
        if conversation is not None:
            return conversation
    if field not in record:
        raise WrongRecordError.of_field(field, list(record))
    if not isinstance(value, str):
        found = f"is {_kind_of_value(value)}, not a string"
        raise WrongRecordError(f"{key_name(FIELD_KEY)} = {field}: {found}")
    if excluding := _exclusion(record):
        raise WrongRecordError(f"is excluded from training ({excluding})")
    return _encodable(value)


def shown(name: object) -> str:
    """Return a field name for a message, escaped and shortened."""
    text = repr(name)[1:-1] if isinstance(name, str) else repr(name)
    return text if len(text) <= _MAX_NAME_LENGTH else f"{text[:_MAX_NAME_LENGTH]}..."


def unread_formats(names: Collection[str]) -> tuple[str, ...]:
    """Return the fields of further formats of a record whose turns are read; often none."""
    turns = [name for name in TURNS if name in names]
    forms = (name for matched in _forms(names) for name in matched if name is not None)
    return (*turns[1:], *dict.fromkeys(forms)) if turns else ()


def conversation_fields(names: Collection[str]) -> tuple[str, ...]:
    """Return the names that `Conversation.of_record` reads; empty if they form no conversation."""
    fields = [name for name in TURNS if name in names]
    fields += [name for matched in _forms(names) for name in matched if name is not None]
    others = (*_SYSTEMS, TOOLS, _HISTORY, *OF_RECORDS, *_VERDICTS, *_UNSUPPORTED) if fields else ()
    return tuple(dict.fromkeys([*fields, *(name for name in others if name in names)]))


def _kind_of_value(value: object) -> str:
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


def _refuse_unsupported(record: Mapping[Any, Any]) -> None:
    for name, advice in _UNSUPPORTED.items():
        if record.get(name):
            raise WrongRecordError(f"has {name}: {advice}")
    for name in _VERDICTS:
        if record.get(name) is False:
            raise WrongRecordError(f"has {name}: false, which marks an unwanted answer")


def _prompt(record: Mapping[Any, Any], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the messages of a prompt: its texts are one message, lists of messages several."""
    messages, texts = list[dict[str, Any]](), list[str]()
    for name in parts:
        if isinstance(record[name], list):
            messages += _messages(record[name], name=name)
        else:
            texts.append(_as_text(record[name], f"{name}:"))
    if messages and not any(texts):
        return messages
    return [*messages, {"role": USER, "content": PART_BREAK.join(filter(None, texts))}]


def _history(value: object) -> list[dict[str, Any]]:
    """Return the earlier turns of a record: pairs of a question and an answer, or messages."""
    messages = list[dict[str, Any]]()
    pairs = _parsed(value, name=_HISTORY)
    for at, pair in enumerate(pairs if isinstance(pairs, list) else [], start=1):
        where = f"{_HISTORY}: number {at}"
        if isinstance(pair, Mapping):
            messages.append(_message(pair, where))
        elif isinstance(pair, list) and len(pair) == 2:
            for role, text in zip((USER, ASSISTANT), pair, strict=True):
                messages.append({"role": role, "content": _as_text(text, f"{where}, {role}:")})
        else:
            raise WrongRecordError(f"{where} is not a pair of a question and an answer")
    if pairs and not isinstance(pairs, list):
        raise WrongRecordError(f"{_HISTORY}: is {_kind_of_value(pairs)}; must be a list of pairs")
    return messages


def _forms(names: Collection[str]) -> Iterator[list[str | None]]:
    """Yield the name of each part for each format of prompts that matches the names."""
    for form in _FORMS:
        matched = [next((each for each in known if each in names), None) for known, _ in form]
        if all(
            name is not None or not is_needed
            for name, (_, is_needed) in zip(matched, form, strict=True)
        ):
            yield matched


def _without_null(value: Any) -> Any:
    """Return a value without null fields: tables give each object the fields of all others."""
    try:
        if isinstance(value, Mapping):
            return {key: _without_null(each) for key, each in value.items() if each is not None}
        return [_without_null(each) for each in value] if isinstance(value, list) else value
    except RecursionError as error:
        raise WrongRecordError("is nested too deeply") from error


def _with_system(
    record: Mapping[Any, Any], messages: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    """Return messages with a single system message, and the number of messages added.

    Its text is that of the record and of the first message, without repetitions.
    """
    texts = [
        _as_text(record[name], f"{name}:") for name in _SYSTEMS if record.get(name) is not None
    ]
    head = list(takewhile(lambda message: _is_repeated(message, messages[0]), messages))
    texts += [each["content"] for each in head[:1]]
    distinct = {text.strip(): text for text in texts if text.strip()}
    first = head[:1]
    if distinct:
        text = PART_BREAK.join(distinct.values())
        first = [{"role": SYSTEM, **(head[0] if head else {}), "content": text}]
    return [*first, *messages[len(head) :]], len(first) - len(head)


def _is_repeated(message: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Return whether a message has the text of the first one, and both are of the system."""
    texts = [each["content"].strip() for each in (message, first) if each["role"] == SYSTEM]
    return len(texts) == 2 and texts[0] == texts[1]


def _tools(value: object, *, is_strict: bool) -> list[Any]:
    """Return the JSON schemas of tools; those of a prompt may be names, which are ignored."""
    try:
        tools = _parsed(_without_null(value), name=TOOLS)
        tools = [tools] if isinstance(tools, Mapping) else tools or []
        if isinstance(tools, list):
            tools = [_parsed(tool, name=TOOLS) for tool in tools]
        if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
            return tools
        raise WrongRecordError(
            f"{TOOLS}: is {_kind_of_value(value)}; must be a list of JSON schemas"
        )
    except WrongRecordError:
        if is_strict:
            raise
    return []


def _parsed(value: object, *, name: str) -> Any:
    """Return the value of a field that may be JSON in a string, as in a table of texts."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise WrongRecordError(f"{name}: is not valid JSON ({error})") from error


def _messages(value: object, *, name: str) -> list[dict[str, Any]]:
    messages = _parsed(value, name=name)
    if not isinstance(messages, list):
        raise WrongRecordError(f"{name}: is {_kind_of_value(messages)}; must be a list of messages")
    return [_message(each, f"{name}: number {at}") for at, each in enumerate(messages, start=1)]


def _message(value: object, where: str) -> dict[str, Any]:
    """Return a message with `role` and `content`, also of one with ShareGPT's names."""
    items = value.items() if isinstance(value, Mapping) else ()
    fields = {name: _without_null(each) for name, each in items}  # JSON in a field keeps its null
    for name, others in (("role", ("from",)), ("content", ("value", "text"))):
        for other in others:
            if name not in fields and other in fields:
                fields[name] = fields.pop(other)
    if isinstance(fields.get("function_call"), Mapping):  # OpenAI's earlier form
        call = {"type": "function", "function": fields.pop("function_call")}
        fields["tool_calls"] = fields.get("tool_calls") or [call]
    if fields.get("tool_calls"):
        fields["tool_calls"] = _calls(fields["tool_calls"], where)
    if any(fields.get(name) for name in ("tool_calls", *REASONING)):
        fields["content"] = fields.get("content") or ""
    if not {"role", "content"} <= set(fields):
        raise WrongRecordError(f"{where} is not a message; must be {_MESSAGE}")
    role = _as_text(fields["role"], f"{where}, role:").strip()
    if role.lower() not in _ROLES:
        raise WrongRecordError(f"{where} has the role {role!r}; accepted are {', '.join(_ROLES)}")
    content = _content(fields["content"], f"{where}, content:")
    trained = _is_trained(fields, f"{where}, ")
    kept = {n: each for n, each in fields.items() if each is not None and n not in _TRAINED}
    return {**kept, "role": _ROLES[role.lower()], "content": content} | trained


def _is_trained(fields: Mapping[str, Any], where: str) -> dict[str, bool]:
    """Return `{"train": False}` for a message that is excluded from training, else nothing.

    Args:
        fields: of the message, or of its record.
        where: precedes a field in the error.
    """
    if fields.get("train_detail"):
        raise WrongRecordError(f"{where}train_detail: only whole messages are excluded")
    is_trained = True
    for name, trained in _TRAINED.items():
        value = fields.get(name)
        value = _NUMBERS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if value not in (None, 0, 1):  # false and true are 0 and 1
            reason = "accepted are 0, 1, false and true"
            raise WrongRecordError(f"{where}{name}: is {value!r}; {reason}")
        is_trained = is_trained and value in (None, trained)
    return {} if is_trained else {"train": False}


def _exclusion(record: Mapping[Any, Any]) -> str:
    """Return the field that excludes a whole record from training, with its value; else ""."""
    fields = {name: record[name] for name in OF_RECORDS if name in record}
    excluding = (name for name in fields if _is_trained({name: fields[name]}, ""))
    return next((f"{name}: {json.dumps(fields[name], default=str)}" for name in excluding), "")


def _encodable(text: str) -> str:
    """Return a text of JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode-escape").decode()
        raise WrongRecordError(f"contains an unpaired surrogate ({half})") from error
    return text


def _is_answer(message: Mapping[str, Any]) -> bool:
    """Return whether a message of the assistant has something to predict."""
    is_empty = not str(message["content"]).strip()
    has_more = any(message.get(name) for name in ("tool_calls", *REASONING))
    return message.get("train") is not False and (has_more or not is_empty)


def _calls(value: object, where: str) -> Any:
    """Return tool calls with arguments as objects, which templates write as JSON."""
    if isinstance(calls := _parsed(value, name=f"{where}, tool_calls"), list):
        return [_calls(call, where) for call in calls]
    if not isinstance(calls, Mapping):
        return calls
    if isinstance(function := calls.get("function"), Mapping):
        return {**calls, "function": _calls(function, where)}
    with suppress(WrongRecordError, KeyError):  # other texts stay
        if isinstance(arguments := _parsed(calls["arguments"], name="arguments"), Mapping):
            return {**calls, "arguments": arguments}
    return calls


def _content(value: object, where: str) -> str:
    """Return the text of a message; parts of text are joined, as templates join them."""
    if not isinstance(value, list) or not value:
        return _as_text(value, where)
    texts = list[str]()
    for at, part in enumerate(value, start=1):
        fields = part if isinstance(part, Mapping) else {"text": part}
        kind, text = fields.get("type", "text"), fields.get("text", fields.get("value"))
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            found = f"of the type {kind!r}"[:60]
            raise WrongRecordError(
                f"{where} part {at} is {found}; only parts of the type text are read"
            )
        texts.append(text)
    return "".join(texts)


def _plain(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    parts = [str(message["content"]).replace("\r\n", "\n")]
    parts += [json.dumps(calls, ensure_ascii=False)] if calls else []
    return "\n".join(filter(None, parts))


def _as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise WrongRecordError(f"{where} is {_kind_of_value(value)}, not a string")
    return value


class SkippedRecords:
    """The records of a source that are skipped.

    Attributes:
        count: number of skipped records.
        first_lines: the problems of the first few, with their locations.
        reasons: kind of problem → the line of its first record, and the number of records.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first_lines: list[str] = []
        self.reasons: dict[str, tuple[str, int]] = {}

    def add(self, where: str, problem: str) -> None:
        """Count a record by the kind of its problem, which follows its location."""
        self.count += 1
        line = f"{where} {problem}"
        if len(self.first_lines) < _MAX_PROBLEMS_OF_FILE:
            self.first_lines.append(line)
        kind = _DIGITS.sub("", problem)
        if kind in self.reasons or len(self.reasons) < _MAX_REASONS:
            first, number = self.reasons.get(kind, (line, 0))
            self.reasons[kind] = (first, number + 1)

    def note(self, num_read: int, as_sentence: Callable[[str], str] = str) -> str:
        """Return a sentence with the number by reason and the first record; others were read."""
        text = (
            f"Skipped {self.count:,} of {num_read + self.count:,} records; the first: "
            f"{as_sentence(self.first_lines[0])}"
        )
        if len(self.reasons) < 2:
            return text
        parts = [f"{number:,}: {as_sentence(line)}" for line, number in self.reasons.values()]
        return f"{text} By reason: {' '.join(parts)}"

    def to_plain(self) -> dict[str, Any]:
        """Return the counts as plain data, which `from_plain` reads."""
        reasons = [[kind, line, number] for kind, (line, number) in self.reasons.items()]
        return {"count": self.count, "first_lines": [*self.first_lines], "reasons": reasons}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SkippedRecords:
        """Return the counts of `to_plain`."""
        skipped = cls()
        skipped.count, skipped.first_lines = int(plain["count"]), [*plain["first_lines"]]
        skipped.reasons = {kind: (line, int(number)) for kind, line, number in plain["reasons"]}
        return skipped

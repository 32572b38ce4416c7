"""Sentences on what is trained and scored of conversations, against counts by hand."""

from typing import Any

import pytest

from tests.oracle.chat import CHATML, MARKED, messages, tokenizer
from tritter.data.answers import TrainingCounts, scored_text, scoring_note, unanswered_note
from tritter.data.chat import Chat
from tritter.data.documents import Documents
from tritter.data.packing import packed
from tritter.data.records import Conversation
from tritter.data.tokens import TextBounds, TokenisedDocuments

END = "<|im_end|>\n"
NEXT_ROLE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def documents_of(records: list[dict[str, Any]]) -> Documents:
    found = map(Conversation.of_record, records)
    return Documents.of(each for each in found if each is not None)


def talks(records: list[dict[str, Any]]) -> list[Conversation | None]:
    return [each.conversation for each in documents_of(records)]


def tokenised(records: list[dict[str, Any]], chat: Chat, **limit: int) -> TokenisedDocuments:
    inner = tokenizer().backend_tokenizer
    return TokenisedDocuments.of(
        documents_of(records), inner, chat=chat, max_tokens_per_document=limit.get("limit")
    )


def pair(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, **fields}


LONG = " ".join(f"w{number}" for number in range(40))  # more than 80 tokens
RECORDS = [pair("what is a gate?", "a gate"), pair(f"{LONG}?", "it"), pair("all that", LONG)]


@pytest.mark.parametrize("chat", [Chat(tokenizer()), Chat(None)])
def test_cut_conversations_are_counted(chat: Chat) -> None:
    """One is whole, one has no answer within a sequence, one a part of its answer."""
    documents = tokenised(RECORDS, chat)
    bounds = TextBounds(0)
    counts = TrainingCounts.of(documents, sequence_length=64, bounds=bounds)
    note = counts.note("new", sequence_length=64)
    assert "new: 2 of 3 training conversations exceed data.sequence_length=64 and are cut" in note
    assert "not trained, and 1 conversation not at all." in note
    # By the packed rows themselves
    rows = packed(documents, packing="documents", sequence_length=64, bounds=bounds)
    whole = packed(documents, packing="documents", sequence_length=256, bounds=bounds)

    def count(rows: Any) -> int:
        return sum((rows.flatten() >> 28 & 3 == 1).tolist())

    assert f"{count(whole) - count(rows):,} of {count(whole):,} tokens of answers" in note
    longest = int(documents.offsets.diff().max())
    assert f"The longest has {longest} tokens" in note
    longer = TrainingCounts.of(documents, sequence_length=256, bounds=bounds)
    assert not longer.note("new", sequence_length=256)
    parts = [
        TrainingCounts.of(tokenised(part, chat), sequence_length=64, bounds=bounds)
        for part in (RECORDS[:1], RECORDS[1:])
    ]
    assert parts[0] + parts[1] == counts != parts[1]
    head = counts.note("new", sequence_length=64, rows="of the first rows")
    assert "3 training conversations of the first rows exceed" in head


def test_the_scored_part_is_counted() -> None:
    chat = Chat(tokenizer())
    documents = tokenised([*RECORDS, {"messages": [{"role": "user", "content": "Hi"}]}], chat)
    text = scored_text(documents)
    assert text.startswith("answers only, ")
    assert text.endswith("of 3 of 4 conversations")
    assert unanswered_note("new", (documents, documents)).endswith(": 2 of 8 conversations.")
    limits = {"sequence_length": 64, "max_tokens": 1024}
    assert "Longer than 64 tokens and not read whole: 2." in scoring_note(
        "new", documents, **limits
    )
    cut = tokenised(RECORDS, chat, limit=50)
    note = scoring_note("new", cut, sequence_length=64, max_tokens=50)
    assert "of 3 of 3 conversations" in note
    assert "Longer than 50 tokens and not read whole: 2." in note
    assert "Longer than" not in scoring_note("new", tokenised(RECORDS[:1], chat), **limits)
    everything = scored_text(tokenised(RECORDS, Chat(tokenizer(), "all")))
    assert everything.startswith("all tokens, ")


def test_conversations_without_an_answer_are_counted_by_reason() -> None:
    question, answer = messages(1)
    records = [
        *({"messages": [question, {**answer, "weight": 0}]} for _ in range(2)),
        {"messages": messages(2), "train": False},
        {"messages": [question, {**answer, "content": " "}]},
        {"messages": [answer]},
        {"messages": messages(3)},
    ]
    documents = Documents.of(filter(None, map(Conversation.of_record, records)))
    sides = [tokenised(records, Chat(tokenizer()))]
    note = unanswered_note("new", sides, documents)
    for part in ("4 of 5", "2 excluded", "1 with an empty", "1 without a message"):
        assert part in note


def test_a_template_whose_answers_never_end_is_noted() -> None:
    turns = [{"messages": messages(number, turns=2)} for number in range(3)]
    close = "{% endgeneration %}"
    content_only = MARKED.replace(END + close, close + END)
    for way, is_endless in ((CHATML, False), (MARKED, False), (content_only, True)):
        chat = Chat(tokenizer(way))
        note = chat.endless_note([tokenised(turns, chat).tokens])
        assert ("does not learn to end its turn" in note) is is_endless
    chat = Chat(tokenizer(NEXT_ROLE))
    assert chat.endless_note([tokenised(turns, chat).tokens])
    assert not Chat(None).endless_note([tokenised(turns, Chat(None)).tokens])


def test_parts_that_the_template_does_not_show_are_noted() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    turns = messages(1)
    turns[1]["reasoning_content"] = "because"
    records = [{"messages": turns, "tools": tools}, {"messages": messages(2)}]
    note = Chat(tokenizer()).unshown_note(talks(records))
    assert note.endswith("tools (1 conversations), reasoning_content (1 conversations).")
    called = messages(4)
    called[1] |= {"tool_calls": [tools[0]], "step": 0, "mask": 1, "note": ""}  # type: ignore[dict-item]
    note = Chat(tokenizer()).unshown_note(talks([*records, {"messages": called}]))
    assert note.endswith(
        ", ".join(f"{name} (1 conversations)" for name in ("tool_calls", "step", "mask")) + "."
    )
    shown = CHATML + "{# tools reasoning_content #}"
    assert not Chat(tokenizer(shown)).unshown_note(talks(records))

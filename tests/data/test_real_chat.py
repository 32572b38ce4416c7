"""Instruction data under the chat template of a real checkpoint."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.real import real_checkpoint
from tritter.data.answers import TrainingCounts, scored_text, scoring_note
from tritter.data.chat import Chat, ids_of, is_unpredicted
from tritter.data.documents import Documents
from tritter.data.packing import Windows, packed
from tritter.data.records import Conversation
from tritter.data.sources import TextRequest
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments

DATA = Path(__file__).resolve().parents[3] / "shared/data/instruct/dolly_hhrlhf_1k.jsonl"


@pytest.mark.slow
def test_plain_instructions_on_smollm2() -> None:
    """200 records at 128 tokens: no answer is trained without its question, all are scored."""
    folder = real_checkpoint("smollm2")
    if not DATA.is_file():
        pytest.skip(f"{DATA} is not beside this checkout")
    own, inner = (
        AutoTokenizer.from_pretrained(folder),
        PretrainedTokenizer.read(folder, vocab_size=49_152),
    )
    documents = TextRequest([str(DATA)], key="data.new", text_field="text").documents()[:200]
    chat, bounds = Chat(own), inner.bounds
    tokens = TokenisedDocuments.of(documents, inner.tokenizer, chat=chat)
    counts = TrainingCounts.of(tokens, sequence_length=128, bounds=bounds)
    note = counts.note("new", sequence_length=128)
    assert "new: 120 of 200 training conversations exceed data.sequence_length=128" in note
    assert "62 conversations not at all" in note
    rows = packed(tokens, packing="documents", sequence_length=128, bounds=bounds)
    header = own.apply_chat_template([{"role": "user", "content": ""}])["input_ids"][:5]
    for row in rows:
        starts = (row >= 1 << 30).nonzero().flatten().tolist()
        first = int((~is_unpredicted(row)).nonzero()[0])
        assert starts
        assert starts[0] < first
        for start in starts:
            assert ids_of(row[start : start + 5]).tolist() == header
    held_out = TokenisedDocuments.of(
        documents, inner.tokenizer, chat=chat, max_tokens_per_document=64
    )
    assert scored_text(held_out).endswith("of 200 of 200 conversations")
    assert "Longer than 64 tokens and not read whole: 200." in scoring_note(
        "new", held_out, sequence_length=128, max_tokens=64
    )
    assert {each.document for each in Windows(tokens, sequence_length=128, bounds=bounds)} == {
        *range(200)
    }
    assert not chat.endless_note([tokens.tokens])


@pytest.mark.slow
def test_calls_of_tools_on_qwen_and_smollm2() -> None:
    """Qwen's template writes calls as JSON; SmolLM2's would write an empty answer."""
    schema = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    call = {"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    record = {
        "tools": [schema],
        "messages": [
            {"role": "Human", "content": [{"type": "text", "text": "What time is it?"}]},
            {"role": "bot", "content": None, "tool_calls": [call]},
            {"role": "observation", "content": "12:00"},
            {"role": "ChatGPT", "content": "Noon."},
        ],
    }
    found = Conversation.of_record(record)
    assert found is not None
    documents = Documents.of([found])
    folder = real_checkpoint("qwen")
    own, inner = (
        AutoTokenizer.from_pretrained(folder),
        PretrainedTokenizer.read(folder, vocab_size=151_936),
    )
    tokens = TokenisedDocuments.of(documents, inner.tokenizer, chat=Chat(own)).tokens
    text = own.decode(ids_of(tokens[~is_unpredicted(tokens)]))
    assert '{"name": "clock", "arguments": {"zone": "UTC"}}' in text
    assert text.endswith("Noon.<|im_end|>\n")
    other = Chat(AutoTokenizer.from_pretrained(real_checkpoint("smollm2")))
    with pytest.raises(Exception, match="does not show the tool_calls of message 2"):
        other.check(found, "x")

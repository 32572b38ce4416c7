"""Conversations: formats of records, templates and masks against TRL and stock transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tests.oracle import chat as fixtures
from tests.oracle.chat import CHATML, FORGETFUL, INSTRUCT, MARKED, messages, tokenizer
from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.chat import (
    _FIXED_DATE,
    CONTEXT,
    START,
    Chat,
    ChatChoice,
    LossOn,
    ids_of,
    is_unpredicted,
)
from tritter.data.documents import Documents
from tritter.data.packing import (
    IGNORED,
    DocumentMask,
    Windows,
    inputs_for,
    labels_of,
    num_packed,
    packed,
    padding_fraction,
)
from tritter.data.records import Conversation, Text, WrongRecordError, text_of
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.errors import RequestError
from tritter.evaluation.losses import document_losses
from tritter.training import BaseModule, OptimizerSettings, Schedule

USER, ASSISTANT = "user", "assistant"
LOSSES: tuple[LossOn, ...] = ("answers", "all")
PAIR = [{"role": USER, "content": "Hi"}, {"role": ASSISTANT, "content": "Hello"}]
KIND = {"role": "system", "content": "Be kind."}


def conversation(number: int, **options: Any) -> Conversation:
    found = Conversation.of_record({"messages": messages(number, **options)})
    assert found is not None
    return found


def tokenised(conversations: Sequence[Text], chat: Chat) -> TokenisedDocuments:
    inner = tokenizer().backend_tokenizer
    return TokenisedDocuments.of(Documents.of(conversations), inner, chat=chat)


# Formats

FORMS = (
    ({"messages": PAIR}, PAIR, 0),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
     PAIR, 0),
    ({"prompt": "Hi", "completion": "Hello"}, PAIR, 0),
    ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR, 1),
    ({"question": "Hi", "answer": "Hello"}, PAIR, 0),
    ({"instruction": "Hi", "output": "Hello"}, PAIR, 0),
    ({"instruction": "Add.", "input": "1 2", "output": "3"},
     [{"role": USER, "content": "Add.\n\n1 2"}, {"role": ASSISTANT, "content": "3"}], 0),
    ({"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind."},
     [{"role": "system", "content": "Be kind."}, *PAIR], 0),
    ({"system": "Be kind.", "conversations": PAIR, "tools": "[]"},
     [{"role": "system", "content": "Be kind."}, *PAIR], 0),
    ({"messages": [*PAIR, {"role": USER, "content": "More", "name": None}]},
     [*PAIR, {"role": USER, "content": "More"}], 0),
    # Names of parts and roles
    ({"messages": json.dumps(PAIR), "tools": "", "prompt": None}, PAIR, 0),
    ({"messages": [{"role": " Human", "text": "Hi"}, {"from": "ChatGPT", "value": "Hello"}]},
     PAIR, 0),
    ({"messages": [{"role": "USER", "content": "Hi"}, {"role": "Bot", "content": "Hello"}]},
     PAIR, 0),
    ({"messages": None, "text": None, "prompt": "Hi", "response": "Hello", "input": ""}, PAIR, 0),
    ({"context": "A hat.", "question": "What?", "answer": "Hat"},
     [{"role": USER, "content": "A hat.\n\nWhat?"}, {"role": ASSISTANT, "content": "Hat"}], 0),
    ({"prompt": "Hi", "completion": PAIR[1:]}, PAIR, 1),
    ({"prompt": PAIR[:1], "completion": "Hello"}, PAIR, 1),
    # One system message, earlier turns, parts of text
    ({"system_prompt": "Be kind.", "question": "Hi", "response": "Hello"}, [KIND, *PAIR], 0),
    ({"system": "Be kind.", "messages": [KIND, *PAIR]}, [KIND, *PAIR], 0),
    ({"system": "Be kind.", "messages": [{**KIND, "content": "Be brief."}, *PAIR]},
     [{**KIND, "content": "Be kind.\n\nBe brief."}, *PAIR], 0),
    ({"system": "Be kind.", "prompt": [KIND, *PAIR[:1]], "completion": PAIR[1:]},
     [KIND, *PAIR], 2),
    ({"messages": [KIND, KIND, *PAIR]}, [KIND, *PAIR], 0),
    ({"system": "Be kind.", "prompt": [KIND, KIND, *PAIR[:1]], "completion": PAIR[1:]},
     [KIND, *PAIR], 2),
    ({"instruction": "More", "output": "Yes", "history": [["Hi", "Hello"]]},
     [*PAIR, {"role": USER, "content": "More"}, {"role": ASSISTANT, "content": "Yes"}], 0),
    ({"instruction": "Hi", "output": "Hello", "history": []}, PAIR, 0),
    ({"messages": [{"role": USER, "content": [{"type": "text", "text": "H", "image": None},
                                              {"type": "text", "text": "i"}]}, PAIR[1]]},
     PAIR, 0),
)  # fmt: skip
CALL = {"name": "clock", "arguments": {"zone": "UTC"}}
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"messages": [PAIR[0], {"role": "critic", "content": "Bad"}]},
     "messages: number 2 has the role 'critic'; accepted are user, human, .*chatgpt"),
    ({"messages": [{"role": USER, "content": [{"type": "image_url", "image_url": "x"}]}, PAIR[1]]},
     "messages: number 1, content: part 1 is of the type 'image_url'"),
    ({"messages": [PAIR[0], {**PAIR[1], "weight": 0.5}]}, "number 2, weight: is 0.5; accepted"),
    ({"messages": PAIR, "weight": 0.5}, "^weight: is 0.5; accepted"),
    ({"messages": [PAIR[0], {**PAIR[1], "train_detail": [{"begin_offset": 0}]}]}, "train_detail"),
    ({"messages": [PAIR[0], None]}, "number 2 is not a message"),
    ({"messages": None, "id": 3}, "messages: is null; must be a list of messages"),
    ({"prompt": "Hi", "completion": None}, "completion: is null, not a string"),
    ({"prompt": "Hi", "completion": ["Hello", "Hey"]}, "completion: number 1 is not a message"),
    ({"prompt": "Hi", "completion": "Hello", "rejected": "No"}, "has rejected: .*chosen"),
    ({"prompt": "Hi", "completion": "Hello", "label": False}, "label: false.*unwanted"),
    ({"messages": PAIR, "images": ["a.png"]}, "has images: only text"),
    ({"instruction": "Hi", "output": "Hello", "history": ["Hi"]},
     "history: number 1 is not a pair"),
)  # fmt: skip


@pytest.mark.parametrize(("record", "wanted", "num_given"), FORMS)
def test_records_become_messages(record: Any, wanted: Any, num_given: int) -> None:
    found = Conversation.of_record(record)
    assert found is not None
    assert list(found.messages) == wanted
    assert found.num_given == num_given
    answers = [m["content"] for m in wanted[num_given:] if m["role"] == ASSISTANT]
    assert [found.messages[at]["content"] for at in found.answers] == answers
    assert Conversation.from_json(found.to_json()) == found


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_refused_records_are_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongRecordError, match=message):
        Conversation.of_record(record)


def test_messages_without_weight_are_no_answers() -> None:
    turns = messages(3, turns=4)
    for at, field in ((1, {"weight": 0}), (3, {"train": False}), (5, {"loss": False})):
        turns[at] |= field  # type: ignore[arg-type]
    turns[0] |= {"weight": 1}  # type: ignore[arg-type]
    found = Conversation.of_record({"messages": turns})
    assert found is not None
    assert found.answers == (7,)
    assert found.untrained == (1, 3, 5)
    assert not {"weight", "loss"} & set().union(*found.messages)
    empty = [*PAIR, PAIR[0], {"role": ASSISTANT, "content": " "}]
    call = {"role": ASSISTANT, "content": None, "tool_calls": [{"function": CALL}]}
    for record, answers in (
        ({"messages": [*PAIR[:1], {**PAIR[1], "masked": True}]}, ()),
        ({"messages": [*PAIR[:1], {**PAIR[1], "loss_mask": 0}]}, ()),
        ({"messages": PAIR, "train": False}, ()),
        ({"prompt": "Hi", "completion": "Hello", "weight": 0}, ()),
        ({"prompt": "Hi", "completion": "Hello", "weight": "0"}, ()),  # of a .csv
        ({"prompt": "Hi", "completion": "Hello", "weight": "1", "train": ""}, (1,)),
        ({"messages": empty}, (1,)),
        ({"messages": [PAIR[0], call]}, (1,)),
        ({"prompt": "Hi", "completion": ""}, ()),
    ):
        found = Conversation.of_record(record)
        assert found is not None
        assert found.answers == answers


def test_arguments_of_calls_and_schemas_may_be_json() -> None:
    """Templates write arguments as JSON, which would quote a text a second time."""
    schema = {"type": "function", "function": {"name": "clock"}}
    for arguments in (CALL["arguments"], json.dumps(CALL["arguments"])):
        call = {"role": ASSISTANT, "tool_calls": [{"function": {**CALL, "arguments": arguments}}]}
        for tools in (schema, [json.dumps(schema)], json.dumps(schema), json.dumps([schema])):
            found = Conversation.of_record({"messages": [PAIR[0], call], "tools": tools})
            assert found is not None
            assert found.tools == (schema,)
            assert found.messages[1]["tool_calls"] == [{"function": CALL}]
    earlier = {"role": ASSISTANT, "content": None, "function_call": CALL}
    found = Conversation.of_record({"messages": [PAIR[0], earlier]})
    assert found is not None
    assert found.answers == (1,)
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]


def test_null_in_arguments_and_tools_that_are_json_in_a_string_stays() -> None:
    arguments = {"zone": None, "hour": 3}
    of_call = {"function": {"name": "clock", "arguments": json.dumps(arguments)}, "id": None}
    tool = {"type": "function", "function": {"name": "clock", "zone": {"default": None}}}
    call = {"role": ASSISTANT, "content": None, "name": None, "tool_calls": [of_call]}
    found = Conversation.of_record({"messages": [PAIR[0], call], "tools": json.dumps([tool])})
    assert found is not None and found.tools == (tool,)
    expected = [{"function": {"name": "clock", "arguments": arguments}}]  # id: null is left out
    assert found.messages[1] == {"role": ASSISTANT, "content": "", "tool_calls": expected}
    deep = json.loads("[" * 900 + "]" * 900)
    for record in ({"messages": [{**PAIR[0], "more": deep}]}, {"messages": PAIR, "tools": deep}):
        with pytest.raises(WrongRecordError, match="is nested too deeply"):
            Conversation.of_record(record)


def test_a_text_wins_over_messages_unless_they_are_named() -> None:
    both = {"text": "a text", "messages": PAIR}
    assert text_of(both, field="text") == "a text"
    assert text_of({**both, "text": None}, field="text") == Conversation.of_record(
        {"messages": PAIR}
    )
    assert text_of(both, field="messages") == Conversation.of_record({"messages": PAIR})
    for record, message in (
        ({"problem": "a", "solution": "b"}, "available: problem, solution. Accepted: text, or"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Preference data: a rejected answer"),
    ):
        with pytest.raises(WrongRecordError, match=message):
            text_of(record, field="text")


def test_the_documented_records_are_conversations() -> None:
    page = Path(__file__).parents[2] / "docs/how-to/use_your_data.md"
    records = [json.loads(line) for line in page.read_text().splitlines() if line[:2] == '{"']
    assert len(records) == 4
    assert all(Conversation.of_record(record) for record in records)


def test_other_records_are_no_conversations() -> None:
    assert Conversation.of_record({"text": "a"}) is None
    assert Conversation.of_record({"system": "a", "tools": "[]"}) is None


def test_tools_and_calls_are_kept() -> None:
    call = {"role": ASSISTANT, "content": None, "tool_calls": [{"function": {"name": "clock"}}]}
    tools = [{"type": "function", "function": {"name": "clock"}}]
    found = Conversation.of_record({"messages": [PAIR[0], call], "tools": json.dumps(tools)})
    assert found is not None
    assert found.tools == tuple(tools)
    assert found.messages[1]["tool_calls"] == call["tool_calls"]
    assert str(found) == 'user: Hi\n\nassistant: [{"function": {"name": "clock"}}]'
    with pytest.raises(WrongRecordError, match="tools: is a number; must be a list of JSON sch"):
        Conversation.of_record({"messages": PAIR, "tools": 3})
    for broken in ("{", "[" * 100_000):
        with pytest.raises(WrongRecordError, match="tools: is not valid JSON"):
            Conversation.of_record({"messages": PAIR, "tools": broken})
    with pytest.raises(WrongRecordError, match="has a message that is not JSON"):
        Conversation.of_record({"messages": [{**PAIR[0], "more": {b"x": 1}}]})
    # A table gives each call the arguments of all others; an Alpaca record may name its tools
    call["tool_calls"] = [{"function": {"name": "clock", "zone": None}}]
    assert (
        Conversation.of_record({"messages": [PAIR[0], call], "tools": json.dumps(tools)}) == found
    )
    assert Conversation.of_record({"instruction": "a", "output": "b", "tools": "calculator"})


def test_the_split_does_not_depend_on_format_or_template() -> None:
    documents = Documents.of(
        found for record, *_ in FORMS[:2] if (found := Conversation.of_record(record)) is not None
    )
    assert len(documents) == 1  # the same words under other names
    assert documents.num_conversations() == 1


@given(
    contents=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=4)
)
def test_answer_spans_are_the_answers(contents: list[str]) -> None:
    turns = [
        {"role": (USER, ASSISTANT)[at % 2], "content": text} for at, text in enumerate(contents)
    ]
    found = Conversation.of_record({"messages": turns})
    assert found is not None
    spans = [str(found)[start:end] for start, end in found.answer_spans]
    answers = [text.replace("\r\n", "\n") for text in contents[1::2] if text.strip()]
    assert spans[:-1] == answers[: len(spans) - 1]
    if spans:
        last = answers[len(spans) - 1]
        assert spans[-1] in (last, last.rstrip())


# Rendering and masks


def test_answers_are_rendered_by_the_stock_tokenizer_and_marked() -> None:
    own, turns = tokenizer(), messages(3, turns=2, system=True)
    marked = Chat(own).render(conversation(3, turns=2, system=True), "3")
    assert ids_of(marked).tolist() == own.apply_chat_template(turns)["input_ids"]
    spans = own.decode(ids_of(marked[~is_unpredicted(marked)]))
    assert spans == "".join(f"{each['content']}<|im_end|>\n" for each in turns[2::2])
    assert marked[0] == ids_of(marked[0]) | CONTEXT | START
    assert ((marked[1:] & START) == 0).all()


@pytest.mark.parametrize("template", [CHATML, INSTRUCT])
def test_what_opens_turns_is_what_a_prompt_adds_to_its_question(template: str) -> None:
    own = tokenizer(template)
    own.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    turns = Chat(own).turns()
    question = [{"role": USER, "content": "the gate"}]
    prompt = own.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    before, after = (own.decode(ids_of(np.array(each))) for each in turns)
    assert own.decode(prompt).replace(" ", "") == f"{before}thegate{after}".replace(" ", "")
    assert turns[0][0] == prompt[0] | CONTEXT | START
    assert all(is_unpredicted(each) for turn in turns for each in turn)


@pytest.mark.parametrize("template", [None, INSTRUCT, "{{ raise_exception('no') }}"])
def test_turns_without_a_token_that_ends_a_question_are_not_known(template: str | None) -> None:
    assert Chat(None if template is None else tokenizer(template)).turns() == ()


def test_both_ways_to_find_answers_agree() -> None:
    for number in range(12):
        each = conversation(number, turns=1 + number % 3, system=number % 2 == 1)
        prefixes, blocks = (Chat(tokenizer(way)).render(each, "") for way in (CHATML, MARKED))
        assert np.array_equal(prefixes, blocks)
    each = conversation(1, turns=2)
    everything = Chat(tokenizer(), loss_on="all").render(each, "")
    answers = Chat(tokenizer()).render(each, "")
    assert np.array_equal(ids_of(everything), ids_of(answers))
    assert is_unpredicted(everything).tolist() == [True] + [False] * (len(everything) - 1)


def test_the_assistants_first_words_and_given_answers_are_not_predicted() -> None:
    turns = messages(4, turns=2)
    greeting = [{"role": ASSISTANT, "content": "Hello"}, *turns]
    given = {"prompt": turns[:3], "completion": turns[3:]}
    for record, answers in (({"messages": greeting}, turns[1::2]), (given, turns[3:])):
        found = Conversation.of_record(record)
        assert found is not None
        both = [Chat(tokenizer(way)).render(found, "") for way in (CHATML, MARKED)]
        assert np.array_equal(*both)
        text = tokenizer().decode(ids_of(both[0][~is_unpredicted(both[0])]))
        assert text == "".join(f"{each['content']}<|im_end|>\n" for each in answers)
        assert [str(found)[a:b] for a, b in found.answer_spans] == [m["content"] for m in answers]


def test_a_template_has_the_same_date_on_all_days() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }}" + CHATML
    marked = Chat(tokenizer(dated)).render(conversation(1), "")
    assert tokenizer().decode(ids_of(marked)).startswith("2024-07-26 26 Jul 2024<|im_start|>")


def test_an_answer_may_begin_with_what_merges_with_its_header() -> None:
    own = tokenizer().train_new_from_iterator(["assistant\n    return\n\n"] * 9, 330)
    for content in ("    return x", "\n\nreturn"):
        found = Conversation.of_record({"prompt": "Write it.", "completion": content})
        assert found is not None
        header = own.encode("assistant\n")
        assert own.encode(f"assistant\n{content}")[: len(header)] != header
        marked = Chat(own).render(found, "x")
        predicted = own.decode(ids_of(marked[~is_unpredicted(marked)]))
        assert predicted == f"\n{content}<|im_end|>\n"  # the token of the newline is both
        assert not is_unpredicted(marked).all()


def test_bytes_of_reasoning_count_where_a_template_shows_it() -> None:
    turns = messages(1, turns=2)
    turns[1] |= {"reasoning_content": "because 猫", "thinking": "because 猫"}
    turns[3] |= {"reasoning_content": "\n\n"}
    found = Conversation.of_record({"messages": turns})
    assert found is not None
    thought = "<think>{{ message['reasoning_content'] }}</think>{{ message['content'] }}"
    shown = CHATML.replace("{{ message['content'] }}", thought)
    plain, thoughtful = (Chat(tokenizer(each)).answer_bytes(found) for each in (CHATML, shown))
    assert plain == sum(len(each["content"].encode()) for each in turns[1::2])
    assert thoughtful == plain + len("because 猫".encode())
    assert Chat(None).answer_bytes(found) == plain


def test_templates_that_hide_answers_or_fail_are_refused() -> None:
    once, twice = conversation(1), conversation(1, turns=2)
    chat = Chat(tokenizer(FORGETFUL))
    assert (~is_unpredicted(chat.render(once, "x"))).any()
    message = (
        r"data\.chat_template: message 2 of 'x' can't be located.*data\.chat_template=FILE.*"
        r"data\.loss_on=all"
    )
    with pytest.raises(RequestError, match=message):
        chat.render(twice, "x")
    assert len(Chat(tokenizer(FORGETFUL), loss_on="all").render(twice, "x"))
    with pytest.raises(RequestError, match=r"only user and assistant roles.*chat_template=none"):
        Chat(tokenizer(INSTRUCT)).render(conversation(1, system=True), "x")
    with pytest.raises(RequestError, match=r"the template fails for 'x'.*SecurityError"):
        hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        Chat(tokenizer(hostile)).render(once, "x")


# Templates that TRL ships: those of models, and its copies with {% generation %} for training
SHIPPED = ("qwen2_5", "qwen3", "qwen3_6", "llama3", "gemma3", "phi3_5", "cohere2", "glm4moe")
SHIPPED += ("gptoss", "lfm2_v2")


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["CHATML", "MARKED", "INSTRUCT", *SHIPPED, *(f"{name}_training" for name in SHIPPED)]
)
def test_tokens_and_masks_are_those_of_trl(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`messages` with assistant_only_loss; prompts and completions with completion_only_loss."""
    monkeypatch.setenv("CI", "1")
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    template = getattr(fixtures, name, None) or (folder / f"{name}.jinja").read_text()
    template = _FIXED_DATE + template  # TRL renders today's
    is_prompted = "generation %}" not in template
    turns = [messages(n, turns=1 + n % 2, system=name == "CHATML" and n % 3 == 0) for n in range(9)]
    rows = [
        {"prompt": each[:-1], "completion": each[-1:]} if is_prompted else {"messages": each}
        for each in turns
    ]
    trainer = trl.SFTTrainer(
        oracle.tiny_llama(vocab_size=330),
        trl.SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=not is_prompted,
            max_length=None,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(template),
    )
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ours = Conversation.of_record(row)
        assert ours is not None
        marked = Chat(tokenizer(template)).render(ours, "")
        assert ids_of(marked).tolist() == theirs["input_ids"]
        labels = np.where(is_unpredicted(marked), IGNORED, ids_of(marked)).tolist()
        assert labels == theirs["labels"]


# Plain text


def test_without_a_template_a_conversation_is_its_plain_text() -> None:
    inner, each = tokenizer().backend_tokenizer, conversation(5, turns=2)
    documents = Documents.of([each])
    plain = TokenisedDocuments.of(documents, inner)
    answers = TokenisedDocuments.of(documents, inner, chat=Chat(None))
    assert torch.equal(ids_of(answers.tokens), plain.tokens)
    assert not plain.has_marks
    assert answers.has_marks
    assert torch.equal(
        TokenisedDocuments.of(documents, inner, chat=Chat(None, "all")).tokens, plain.tokens
    )
    contents = [each.messages[at]["content"] for at in each.answers]
    kept = answers.tokens[~is_unpredicted(answers.tokens)]
    assert inner.decode(ids_of(kept).tolist()).split() == " ".join(contents).split()
    assert answers.num_bytes.tolist() == [sum(len(text.encode()) for text in contents)]


@pytest.mark.parametrize("limit", [5, 11, 60, 500])
def test_long_conversations_keep_an_answer_and_the_end_of_its_prompt(limit: int) -> None:
    inner = tokenizer().backend_tokenizer
    for chat in (Chat(None), Chat(tokenizer())):
        each = Documents.of([conversation(7, turns=3)])
        whole = TokenisedDocuments.of(each, inner, chat=chat)
        cut = TokenisedDocuments.of(each, inner, chat=chat, max_tokens_per_document=limit)
        assert cut.num_tokens == min(limit, whole.num_tokens)
        assert not cut.first(0).cut and cut.first(1).cut == cut.cut
        assert len(cut.cut) == (cut.num_tokens < whole.num_tokens)
        assert 0 < cut.num_bytes <= whole.num_bytes
        answers = (~is_unpredicted(whole.tokens)).tolist()
        first = answers.index(True)
        size = answers[first:].index(False)
        kept = (~is_unpredicted(cut.tokens)).tolist()
        start = kept.index(True)
        num_kept = min(sum(kept), size)
        assert num_kept >= min(size, limit // 2)
        tokens, wanted = cut.tokens.tolist(), whole.tokens.tolist()
        assert tokens[start : start + num_kept] == wanted[first : first + num_kept]
        assert tokens[start - 1] == wanted[first - 1]
        if chat.tokenizer is not None:
            assert tokens[0] == wanted[0]


@pytest.mark.parametrize("system", [False, True])
def test_the_beginning_of_the_template_stays_before_the_end_of_a_long_prompt(system: bool) -> None:
    own = tokenizer()
    turns = messages(3, system=system)
    turns[-2]["content"] = " ".join(f"word{n}" for n in range(300))
    found = Conversation.of_record({"messages": turns})
    assert found is not None
    marked = Chat(own).render(found, "x")
    cut = Chat(own).fitted(marked, 120, found, "x")
    text = own.decode(ids_of(cut))
    header = own.apply_chat_template([*turns[:-2], {"role": USER, "content": ""}], tokenize=False)
    assert len(cut) == 120
    assert text.startswith(header.removesuffix("<|im_end|>\n"))
    tail = f"word299<|im_end|>\n<|im_start|>assistant\n{turns[-1]['content']}<|im_end|>\n"
    assert text.endswith(tail)
    # No room for the beginning but its first token, and most for the answer
    tiny = Chat(own).fitted(marked, 20, found, "x")
    assert len(tiny) == 20
    assert tiny[0] == marked[0]
    assert (~is_unpredicted(tiny)).sum() >= min(10, (~is_unpredicted(marked)).sum())


def test_messages_without_weight_are_not_predicted() -> None:
    """With both ways to find answers, on answers and on all tokens, with and without a template."""
    turns = messages(3, turns=3)
    record = {"messages": [{**each, "weight": int(at != 3)} for at, each in enumerate(turns)]}
    found = Conversation.of_record(record)
    assert found is not None
    end, block = "<|im_end|>\n", "{% endgeneration %}"
    content_only = MARKED.replace(end + block, block + end)
    excluded = turns[3]["content"] + end
    for way in (CHATML, MARKED, content_only):
        own = tokenizer(way)
        marked = Chat(own).render(found, "x")
        text = own.decode(ids_of(marked[~is_unpredicted(marked)]))
        closing = "" if way is content_only else end
        assert text == "".join(turns[at]["content"] + closing for at in (1, 5))
        everything = Chat(own, "all").render(found, "x")
        assert own.decode(ids_of(everything[1:][is_unpredicted(everything[1:])])) == excluded
    inner = tokenizer().backend_tokenizer
    plain = TokenisedDocuments.of(Documents.of([found]), inner, chat=Chat(None)).tokens
    kept = inner.decode(ids_of(plain[~is_unpredicted(plain)]).tolist())
    assert kept.split() == f"{turns[1]['content']} {turns[5]['content']}".split()
    with pytest.raises(
        RequestError, match=r"data\.loss_on = all: message 4 of .* not to be trained"
    ):
        TokenisedDocuments.of(Documents.of([found]), inner, chat=Chat(None, "all"))


def test_calls_that_the_template_does_not_show_are_refused() -> None:
    call = {"role": ASSISTANT, "tool_calls": [{"function": CALL}]}
    found = Conversation.of_record({"messages": [PAIR[0], call]})
    assert found is not None
    match = r"does not show the tool_calls of message 2 of 'x'.*data\.chat_template=none"
    with pytest.raises(RequestError, match=match):
        Chat(tokenizer()).check(found, "x")
    Chat(tokenizer(CHATML.replace("}}", "}}{{ message.tool_calls }}", 2))).check(found, "x")
    Chat(None).check(found, "x")  # plain text has them as JSON


# Packing and losses


@given(
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=8), length=st.sampled_from([17, 40])
)
def test_packed_conversations_keep_their_labels_and_positions(
    lengths: list[int], length: int
) -> None:
    documents = tokenised([conversation(n, turns=t) for n, t in enumerate(lengths)], CHAT)
    end = CHAT.tokenizer.eos_token_id
    rows = packed(documents, packing="documents", sequence_length=length, bounds=TextBounds(end))
    mask = DocumentMask(TextBounds(end))
    model = mask.attach(oracle.tiny_llama(vocab_size=330, max_position_embeddings=256))
    labels, positions = labels_of(model, rows.long()), mask.positions(rows)
    # Each piece begins at position 0, unpredicted, and all other labels are those of the answers
    pieces: list[tuple[list[int], list[int]]] = []
    for row, label, position, is_padding in zip(
        rows, labels, positions, mask.padding(rows), strict=True
    ):
        columns = (ids_of(row), label, position, is_padding)
        for token, wanted, at, is_empty in zip(*(each.tolist() for each in columns), strict=True):
            if is_empty:
                assert wanted == IGNORED
                continue
            if at == 0:
                pieces.append(([], []))
            pieces[-1][0].append(token)
            pieces[-1][1].append(wanted)
    wanted_pieces = []
    for index in range(len(documents)):
        # The rest would be answers without their question
        piece = documents.document(index)[: length - 1].long()
        wanted = ids_of(piece).masked_fill(is_unpredicted(piece), IGNORED)
        wanted[0] = IGNORED
        if (wanted != IGNORED).any():  # others teach nothing
            wanted_pieces.append((ids_of(piece).tolist(), wanted.tolist()))
    assert sorted(pieces) == sorted(wanted_pieces)
    if not wanted_pieces:
        with pytest.raises(RequestError, match=r"data.sequence_length = .* the shortest needs "):
            num_packed(documents, packing="documents", sequence_length=length, bounds=TextBounds(0))
        return
    share = float(mask.padding(rows).float().mean())
    assert padding_fraction(
        documents, sequence_length=length, bounds=TextBounds(end)
    ) == pytest.approx(share)


CHAT = Chat(tokenizer(MARKED))


def stock_nats(model: Any, turns: list[dict[str, str]]) -> tuple[float, int]:
    """Return the loss of the answers by transformers alone, and the number of their tokens."""
    rendered = CHAT.tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True)
    ids = torch.tensor([rendered["input_ids"]])
    mask = torch.tensor([rendered["assistant_masks"]]).bool()
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[:, :-1]
    nats = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return float(nats[mask[:, 1:]].sum()), int(mask.sum())


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("window", [256, 9])
def test_scores_are_the_losses_of_answers(window: int, is_masked: bool) -> None:
    """Also after training with a document mask, whose end of text occurs in conversations."""
    model = oracle.tiny_llama(vocab_size=330, max_position_embeddings=256)
    end = CHAT.tokenizer.eos_token_id
    if is_masked:
        DocumentMask(TextBounds(end)).attach(model)
    turns = [messages(number, turns=1 + number % 2) for number in range(6)]
    found = [
        each for turn in turns if (each := Conversation.of_record({"messages": turn})) is not None
    ]
    documents = tokenised(found, CHAT)
    scores = document_losses(
        model, documents, sequence_length=window, bounds=TextBounds(end), batch_size=3
    )
    contents = {str(each): messages for each, messages in zip(found, turns, strict=True)}
    order = [contents[document.text] for document in Documents.of(found)]
    answers = [sum(len(m["content"].encode()) for m in each[1::2]) for each in order]
    assert scores.weights["bytes"].tolist() == answers
    alone = oracle.tiny_llama(vocab_size=330, max_position_embeddings=256)
    stock = [stock_nats(alone, each) for each in order]
    assert scores.weights["tokens"].tolist() == [count for _, count in stock]
    if window == 256:  # shorter windows see less context
        torch.testing.assert_close(
            scores.values, torch.tensor([nats for nats, _ in stock]).double(), rtol=1e-5, atol=1e-5
        )
    windows = Windows(documents, sequence_length=window, bounds=TextBounds(end))
    inputs, targets = windows.tensors(windows[:1])
    assert int(inputs_for(alone, inputs).max()) < 330
    assert (targets != IGNORED).any()


@pytest.mark.parametrize("length", [2, 9, 24, 40])
@pytest.mark.parametrize("chat", [Chat(tokenizer(MARKED)), Chat(None), Chat(tokenizer(), "all")])
def test_windows_show_the_end_of_the_prompt_to_each_answer(chat: Chat, length: int) -> None:
    """Each token of an answer is predicted once; its window has the end of its prompt."""
    found = [conversation(number, turns=1 + number % 4) for number in range(8)]
    documents = tokenised(found, chat)
    tokens, is_predicted = ids_of(documents.tokens), ~is_unpredicted(documents.tokens)
    prompt_end = [0] * len(tokens)  # the last unpredicted token before each token
    for at in range(1, len(tokens)):
        prompt_end[at] = prompt_end[at - 1] if is_predicted[at - 1] else at - 1
    counts = torch.zeros(len(tokens), dtype=torch.int64)
    starts = documents.offsets.tolist()
    windows = Windows(documents, sequence_length=length, bounds=TextBounds(0))
    for window in windows:
        inputs, targets = windows.tensors([window])
        assert inputs.shape == (1, window.length)
        assert window.length <= length
        own = (targets[0] != IGNORED).nonzero().flatten().tolist()
        num_before = window.length - (window.stop - window.start)
        at = [window.start + column - num_before for column in own]
        assert tokens[at].tolist() == targets[0, own].tolist()
        counts[at] += 1
        first = starts[window.document]
        assert int(ids_of(inputs[0, 0])) == (0 if chat.tokenizer is None else tokens[first])
        last, has_room = prompt_end[at[0]], length >= 8
        if has_room and last > first:
            assert int(tokens[last]) in ids_of(inputs[0, : own[0] + 1]).tolist()
    wanted = is_predicted.clone()
    if chat.tokenizer is not None:
        wanted[documents.offsets[:-1]] = False
    assert counts.tolist() == wanted.long().tolist()


def test_an_answer_after_the_window_sees_its_whole_question_if_it_fits() -> None:
    """The loss is that of stock transformers on the end of the prompt, which the template opens."""
    model = oracle.tiny_llama(vocab_size=330, max_position_embeddings=256)
    turns = messages(5)
    turns[0]["content"] = " ".join(f"w{number}" for number in range(60))
    found = Conversation.of_record({"messages": turns})
    assert found is not None
    documents = tokenised([found], CHAT)
    (window,) = Windows(documents, sequence_length=48, bounds=TextBounds(0))
    scores = document_losses(
        model, documents, sequence_length=48, bounds=TextBounds(0), batch_size=1
    )
    ids = CHAT.tokenizer.apply_chat_template(turns)["input_ids"]
    size = int((~is_unpredicted(documents.tokens)).sum())
    row = torch.tensor([[ids[0], *ids[-48:]]])
    with torch.no_grad():
        log_p = model(row[:, :-1]).logits[0].double().log_softmax(-1)
    nats = -sum(float(log_p[at - 1, row[0, at]]) for at in range(49 - size, 49))
    assert window.length == 48
    assert float(scores.values[0]) == pytest.approx(nats, rel=1e-5)


def test_a_training_batch_has_the_loss_of_answers_alone() -> None:
    """The mean over a packed batch is that of stock transformers over single conversations."""
    model = oracle.tiny_llama(vocab_size=330, max_position_embeddings=256)
    turns = [messages(number, turns=1 + number % 2) for number in range(6)]
    stock = [stock_nats(model, each) for each in turns]
    found = [
        each for turn in turns if (each := Conversation.of_record({"messages": turn})) is not None
    ]
    end = CHAT.tokenizer.eos_token_id
    rows = packed(
        tokenised(found, CHAT), packing="documents", sequence_length=200, bounds=TextBounds(end)
    ).long()
    DocumentMask(TextBounds(end)).attach(model)
    with torch.no_grad():
        loss = model(input_ids=rows, labels=labels_of(model, rows), use_cache=False).loss
    wanted = sum(nats for nats, _ in stock) / sum(count for _, count in stock)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_a_text_after_a_conversation_is_a_document_of_its_own() -> None:
    """Both are in one sequence; FLOPs and the histogram count them separately."""
    documents = tokenised([conversation(1), "a text of five words"], CHAT)
    end = CHAT.tokenizer.eos_token_id
    sizes = sorted(documents.offsets.diff().tolist())
    rows = packed(documents, packing="documents", sequence_length=128, bounds=TextBounds(end))
    assert len(rows) == 1
    counted = DocumentMask(TextBounds(end)).length_counts(rows)
    lengths = [length for length, count in enumerate(counted.tolist()) for _ in range(count)]
    assert [length for length in lengths if length > 1] in (
        [sizes[0], sizes[1]],
        [sizes[0] + 1, sizes[1]],  # with the end of text that it begins with
    )


def test_an_optimizer_step_is_the_mean_over_the_answers_of_its_batches() -> None:
    """Accumulated batches with different numbers of answers have the gradient of one batch."""
    turns = [conversation(number, turns=1 + number % 3) for number in range(8)]
    end = CHAT.tokenizer.eos_token_id
    rows = packed(
        tokenised(turns, CHAT), packing="documents", sequence_length=64, bounds=TextBounds(end)
    )
    rows = rows[: len(rows) // 4 * 4]
    losses = []
    for window in (1, 4):
        model = oracle.tiny_llama(vocab_size=330, max_position_embeddings=256)
        module = BaseModule(
            DocumentMask(TextBounds(end)).attach(model),
            schedule=Schedule(learning_rate=1e-3, max_steps=1),
            optimizer=OptimizerSettings(),
        )
        stream = BatchStream(
            SequenceStream(rows, seed=0), batch_size=len(rows) // window, window=window
        )
        batches = [batch for batch, _ in zip(stream, range(window), strict=False)]
        own = [module.task_loss(batch)[0] / window for batch in batches]
        torch.stack(own).sum().backward()
        losses.append((sum(map(float, own)), model.model.layers[0].mlp.up_proj.weight.grad))
    (whole, gradient), (parts, accumulated) = losses
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(accumulated, gradient, rtol=1e-4, atol=1e-7)


# Choice of a template


def test_the_default_is_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    default = ChatChoice()
    assert default.chat(tokenizer()).tokenizer is not None
    assert default.chat(tokenizer(None)).tokenizer is None
    assert default.chat(None).tokenizer is None
    assert ChatChoice("none", "all").chat(tokenizer()).is_marked is False
    file = tmp_path / "own.jinja"
    file.write_text(INSTRUCT)
    own = ChatChoice(str(file)).chat(tokenizer())
    assert own.tokenizer.chat_template == INSTRUCT
    with pytest.raises(RequestError, match=r"data\.chat_template = tokenizer: .* no chat template"):
        ChatChoice("tokenizer").chat(tokenizer(None))
    with pytest.raises(RequestError, match=r"data\.chat_template = tokenizer: a new base model"):
        ChatChoice("tokenizer").chat(None)
    digests = {
        ChatChoice(None, loss).chat(tokenizer(way)).digest
        for loss in LOSSES
        for way in (CHATML, MARKED, None)
    }
    assert len(digests) == 6


def test_a_saved_checkpoint_keeps_its_template(tmp_path: Path) -> None:
    folder = fixtures.checkpoint(tmp_path / "base", INSTRUCT)
    assert (folder / "chat_template.jinja").read_text() == INSTRUCT

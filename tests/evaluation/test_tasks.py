"""Tasks: compared with stock `generate` and manual scores, independent of the batch size."""

import string
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle.chat import CHATML, INSTRUCT, MARKED
from tests.oracle.chat import tokenizer as chat_tokenizer
from tritter.data.chat import Chat
from tritter.data.documents import Documents
from tritter.data.packing import DocumentMask
from tritter.data.skills import Question
from tritter.data.tokens import END_OF_TEXT, TextBounds, train_tokenizer
from tritter.evaluation.gate import new_task_check
from tritter.evaluation.tasks import QuestionTask, Reader

WORDS = [f"{a}{b}" for a in "bdfg" for b in "aeio"]
QUESTIONS = tuple(
    Question(f"{number}", f"After {one} comes", f" {two}")
    for number, (one, two) in enumerate(zip(WORDS, WORDS[3:] + WORDS[:3], strict=True))
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    texts = Documents.of(each.prompt + each.answer for each in QUESTIONS)
    tokenizer: Tokenizer = train_tokenizer(texts, vocab_size=290)
    return Reader(tokenizer, TextBounds(tokenizer.token_to_id(END_OF_TEXT)), batch_size=5)


@pytest.fixture(scope="module")
def model(reader: Reader) -> nn.Module:
    """Trained on half of the answers, so only some answers are correct."""
    texts = [each.prompt + each.answer for each in QUESTIONS[:8]]
    model = small_llama(290)
    learn(model, [[0, *each.ids, 0] for each in reader.tokenizer.encode_batch(texts)])
    return model


def small_llama(vocab_size: int) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip


def learn(model: nn.Module, sequences: list[list[int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [torch.tensor(each) for each in sequences]
    ids, labels = (pad_sequence(rows, batch_first=True, padding_value=each) for each in (0, -100))
    for _ in range(120):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def generated(model: nn.Module, reader: Reader, question: Question) -> str:
    ids = torch.tensor([[0, *reader.tokenizer.encode(question.prompt).ids]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
    )
    new = out[0, ids.shape[1] :].tolist()
    new = new[: new.index(0)] if 0 in new else new
    return str(reader.tokenizer.decode(new))


def test_an_answer_is_right_where_stock_generate_writes_it(model: nn.Module, reader: Reader):
    scores = QuestionTask("after", None, QUESTIONS).score(model, reader)
    answers = [generated(model, reader, question) for question in QUESTIONS]
    right = [one == question.answer for one, question in zip(answers, QUESTIONS, strict=True)]
    assert scores.values.tolist() == right, answers
    assert 4 <= sum(right) < len(QUESTIONS), answers
    assert scores.unit == "accuracy" and scores.chance == 0
    assert scores.identifiers == tuple(question.identifier for question in QUESTIONS)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_no_batch_changes_a_score(model: nn.Module, reader: Reader, batch_size: int):
    task = QuestionTask("after", None, (*QUESTIONS, Question("long", "After " * 9, " ba")))
    scores = [task.score(model, replace(reader, batch_size=n)) for n in (5, batch_size)]
    assert scores[0].values.equal(scores[1].values)


def test_a_large_vocabulary_is_read_in_smaller_batches(
    model: nn.Module, reader: Reader, monkeypatch: pytest.MonkeyPatch
):
    task, sizes = QuestionTask("after", None, QUESTIONS[:6]), list[int]()
    whole = task.score(model, reader)
    monkeypatch.setattr("tritter.evaluation.losses._MAX_LOGITS", 290 * 12)
    hook = model.register_forward_hook(lambda *seen: sizes.append(seen[-1].logits.numel()))
    parts = task.score(model, reader)
    hook.remove()
    assert len(sizes) > 2 and max(sizes) <= 290 * 12
    assert parts.values.equal(whole.values)


def test_of_choices_the_likeliest_counts(model: nn.Module, reader: Reader):
    """Compare with the log-likelihood of each choice, summed over tokens one at a time."""
    words = [f" {word}" for word in WORDS]
    asked = tuple(
        replace(
            each, choices=(words[number - 1], each.answer, words[number - 2], words[number - 4])
        )
        for number, each in enumerate(QUESTIONS)
    )
    scores = QuestionTask("after", "after", asked).score(model, reader)

    def likelihood(question: Question, choice: str) -> float:
        prompt = reader.tokenizer.encode(question.prompt).ids
        ids = reader.tokenizer.encode(question.prompt + choice).ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[0, *ids]])).logits[0].log_softmax(-1)
        return sum(float(logits[at, ids[at]]) for at in range(len(prompt), len(ids)))

    best = [max(each.choices, key=lambda choice: likelihood(each, choice)) for each in asked]
    right = [choice == each.answer for choice, each in zip(best, asked, strict=True)]
    assert scores.values.tolist() == right and sum(right) >= 8
    assert scores.chance == 0.25


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("template", "space"), [(CHATML, ""), (MARKED, ""), (INSTRUCT, " ")])
def test_a_conversation_is_right_where_stock_generate_answers_it(template: str, space: str):
    """The chat template's start and prompt are read, and the end of the turn ends the answer."""
    hf = chat_tokenizer(template)
    end = hf.eos_token_id
    reader = Reader(hf.backend_tokenizer, TextBounds(end), batch_size=5)
    asked = tuple(replace(each, answer=each.answer.strip(), is_chat=True) for each in QUESTIONS)
    turns = [[{"role": "user", "content": each.prompt}] for each in asked]
    prompts = hf.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    answers = [hf.encode(space + each.answer, add_special_tokens=False) for each in asked]
    model = small_llama(len(hf))
    learn(model, [[*one, *two, end] for one, two in zip(prompts[:8], answers, strict=False)])
    right = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
            eos_token_id=end,
        )  # fmt: skip
        right.append(out[0, len(prompt) :].tolist() == [*answer, end])
    task = QuestionTask("after", None, asked, Chat(hf))
    assert task.score(model, reader).values.tolist() == right
    assert 2 <= sum(right) < len(right)
    # The ends of turns before an answer are not ends of documents
    masked = DocumentMask(reader.bounds).attach(deepcopy(model))
    assert task.score(masked, reader).values.tolist() == right
    assert DocumentMask.of(masked) is not None
    sizes = [len(one) + len(two) for one, two in zip(prompts, answers, strict=True)]
    assert list(task.lengths(reader)) == sizes
    plain = replace(task, chat=Chat(None))
    text = f"{asked[0].prompt}\n\n{asked[0].answer}"
    assert plain.lengths(reader)[0] == 1 + len(hf.encode(text, add_special_tokens=False))
    assert plain.digest != task.digest


class _Said(nn.Module):
    """Predicts the same token for every input."""

    def __init__(self, token: int, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(nn.functional.one_hot(torch.tensor(token), size).float())

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_null_models_know_nothing(reader: Reader):
    """An empty answer and an endless one are wrong: an answer must end."""
    a, again = reader.tokenizer.encode("a").ids[0], reader.tokenizer.encode("\n").ids[0]
    asked = (Question("1", "b", "a"), Question("2", "b", "aa"))
    for token in (reader.bounds.end, a, again):
        assert QuestionTask("after", None, asked).score(_Said(token, 290), reader).mean() == 0


def test_what_is_read_is_counted_in_tokens(reader: Reader):
    task = QuestionTask(
        "after", None, (Question("1", "ab", "c"), Question("2", "a", "b", ("b", "c")))
    )
    assert list(task.lengths(reader)) == [4, 3, 3] and task.chance == 0.25
    other = QuestionTask("after", None, (Question("1", "ab", "d"),))
    assert task.digest != other.digest and len(other.digest) == 64
    assert set(other.digest) <= set(string.hexdigits)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(0, 0, "reported"), (0, 3, "reported"), (0, 40, "passed"), (100, 102, "reported"),
     (100, 140, "passed"), (140, 100, "failed"), (200, 200, "reported")],
)  # fmt: skip
def test_a_new_task_decides_where_it_is_sure(make_answers, before, after, verdict):
    """0 of 200 before and after is no evidence against a lower loss."""
    scores = [
        replace(make_answers((torch.arange(200) < right).double()), chance=0.0)
        for right in (before, after)
    ]
    check = new_task_check("sorting/accuracy", *scores, confidence=0.95)
    assert check.verdict == verdict and check.n == 200
    assert check.documents_needed is None and "decide" not in check.detail

"""Tasks: questions with one correct answer, scored by accuracy.

Greedy decoding yields an answer if and only if each of its tokens has the highest probability
after the preceding ones, and the next token ends the text or the line. A single forward pass over
prompt and answer checks all tokens at once, without generation.

B: rows per batch · T: tokens of the longest row · V: vocabulary size
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from hashlib import sha256
from itertools import groupby, islice
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import nn

from tritter.data.chat import Chat, ids_of, is_unpredicted
from tritter.data.packing import IGNORED, reading_whole
from tritter.data.records import PART_BREAK, Conversation
from tritter.data.skills import Question
from tritter.data.tokens import TextBounds
from tritter.errors import TritterError
from tritter.evaluation.inference import continued_text, eval_mode, sample_text
from tritter.evaluation.losses import batch_that_fits, nats_per_row, vocab_size_of
from tritter.evaluation.statistics import PairedScores

_Row = tuple[tuple[int, ...], int]  # tokens of a prompt with its answer, and where that begins


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Options of reading text with a model.

    Args:
        tokenizer: the tokenizer.
        bounds: start and end of a text.
        batch_size: texts per forward pass; scores do not depend on it.
    """

    tokenizer: Tokenizer
    bounds: TextBounds
    batch_size: int

    def continuation(self, model: nn.Module, prompt: str, *, max_new_tokens: int) -> str:
        """Return the text with which greedy decoding continues a prompt."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        tokens = sample_text(
            model, prompt_ids=ids, max_new_tokens=max_new_tokens, bounds=self.bounds
        )
        return continued_text(self.tokenizer.decode, ids, tokens)


class ScoredTask(Protocol):
    """A task with items that a model answers correctly or not."""

    @property
    def name(self) -> str:
        """Name of the task, unique among tasks and domains."""

    @property
    def domain(self) -> str | None:
        """The domain that teaches the task; None for a task to retain."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all items; tasks with the same digest have the same scores."""

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Return the accuracy per item, unit `accuracy`, with chance."""

    def lengths(self, reader: Reader) -> Sequence[int]:
        """Return the length in tokens of each sequence to score, for FLOPs."""


class Metric:
    """An own metric: the base of classes that a run names below `metrics`.

    It scores every model of a run on the same items, so that changes are paired by item. The gate
    checks that the score of a metric without a domain is retained, and that the score of one with a
    new domain rises. The scores are reported as accuracies.

    Attributes:
        domain: the domain that teaches it; None for an ability to retain.
        chance: mean score of a model that guesses.
    """

    domain: str | None = None
    chance: float = 0.0

    def items(self) -> Mapping[str, Any]:
        """Return identifier → item, as plain data: scores of changed items are not reused."""
        raise NotImplementedError

    def score(self, model: nn.Module, items: Sequence[Any], reader: Reader) -> Sequence[float]:
        """Return a score of each item in [0, 1]; higher is better.

        Args:
            model: `model(input_ids=[B, T], use_cache=False).logits` is [B, T, V], causal, in
                evaluation mode on its device.
            items: the values of `items`, in order.
            reader: the tokenizer; `reader.continuation` generates text.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class MetricTask:
    """An own metric as a task.

    Args:
        name: its name in the config.
        metric: the metric.
        identity: plain data that determines its scores, in addition to its items.
    """

    name: str
    metric: Metric
    identity: Any

    @property
    def domain(self) -> str | None:
        return self.metric.domain

    @property
    def digest(self) -> str:
        items = list(self._items.items())  # scores are in the order of the items
        return sha256(json.dumps([self.identity, items], sort_keys=True).encode()).hexdigest()

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Score all items."""
        items = self._items
        with eval_mode(model), reading_whole(model):
            found = self.metric.score(model, list(items.values()), reader)
        try:
            values = torch.as_tensor(found, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            values = torch.empty(0)
        is_whole = values.shape == (len(items),) and len(items) > 0
        if not is_whole or not bool(((values >= 0) & (values <= 1)).all()):
            raise TritterError(
                f"metrics.{self.name}: it must score each of its items in [0, 1], at least one. It "
                f"has {len(items)} items and returned {str(found)[:80]}."
            )
        return PairedScores.of_answers(tuple(items), values, self.metric.chance)

    def lengths(self, reader: Reader) -> Sequence[int]:
        """Return nothing: the FLOPs of own metrics are not counted."""
        return ()

    @property
    def _items(self) -> Mapping[str, Any]:
        """The items, as JSON stores them."""
        items = self.metric.items()
        if not isinstance(items, Mapping) or not all(isinstance(name, str) for name in items):
            raise TritterError(f"metrics.{self.name}: items() must return a mapping of strings.")
        try:
            return dict(json.loads(json.dumps(dict(items))))
        except (TypeError, ValueError) as error:
            raise TritterError(
                f"metrics.{self.name}: its items must be plain data: {error}."
            ) from error


def subject_of(task: ScoredTask) -> str:
    """Return the name of a task's scores and checks; domain names have no slash."""
    return f"{task.name}/accuracy"


@dataclass(frozen=True, slots=True)
class QuestionTask:
    """A task of questions, with or without choices.

    With choices, the model selects the one with the highest log-likelihood, summed over its
    tokens; ties select the first. Without choices, greedy decoding must yield the answer exactly.

    Args:
        name: name of the task.
        domain: the domain that teaches it.
        questions: the questions.
        chat: how those that are conversations become tokens; without a chat template, a blank
            line is between prompt and answer.
    """

    name: str
    domain: str | None
    questions: tuple[Question, ...]
    chat: Chat | None = None

    @property
    def digest(self) -> str:
        # 2: a model with a document mask reads a conversation as one document
        template = None if self.chat is None else f"2 {self.chat.digest}"
        plain = [template, *(astuple(question) for question in self.questions)]
        return sha256(json.dumps(plain).encode()).hexdigest()

    @property
    def chance(self) -> float:
        """The mean chance of all questions."""
        return sum(question.chance for question in self.questions) / len(self.questions)

    def score(self, model: nn.Module, reader: Reader) -> PairedScores:
        """Score all questions.

        Args:
            model: `model(input_ids=[B, T], use_cache=False).logits` is [B, T, V], causal.
            reader: options of reading text.
        """
        answers = iter(_read(model, self._rows(reader), reader))
        values = []
        for question in self.questions:
            if question.choices:
                nats = [cost for _, cost in islice(answers, len(question.choices))]
                values.append(question.choices[nats.index(min(nats))] == question.answer)
            else:
                is_greedy, _ = next(answers)
                values.append(is_greedy)
        names = [question.identifier for question in self.questions]
        right = torch.tensor(values, dtype=torch.float64)
        return PairedScores.of_answers(names, right, self.chance)

    def lengths(self, reader: Reader) -> Sequence[int]:
        return [len(ids) for ids, _ in self._rows(reader)]

    def _rows(self, reader: Reader) -> list[_Row]:
        rows = list[_Row]()
        for is_chat, questions in groupby(self.questions, key=lambda each: each.is_chat):
            pairs = [
                (question.prompt, answer)
                for question in questions
                for answer in question.choices or (question.answer,)
            ]
            if is_chat and self.chat is not None and self.chat.tokenizer is not None:
                rows += _chat_rows(pairs, replace(self.chat, loss_on="answers"), reader)
            else:
                rows += _plain_rows(pairs, reader, between=PART_BREAK if is_chat else "")
        return rows


def _plain_rows(
    pairs: Sequence[tuple[str, str]], reader: Reader, *, between: str = ""
) -> list[_Row]:
    pairs = [(prompt + between, answer) for prompt, answer in pairs]
    prompts, texts = (
        [encoding.ids for encoding in reader.tokenizer.encode_batch(texts, False, False)]
        for texts in ([prompt for prompt, _ in pairs], [p + answer for p, answer in pairs])
    )
    rows, prefix = list[_Row](), reader.bounds.prefix
    for prompt, ids in zip(prompts, texts, strict=True):
        # If the prompt's last token merges with the answer, it counts as answer
        shared = enumerate(zip(prompt, ids, strict=False))
        start = next((at for at, (one, other) in shared if one != other), len(prompt))
        rows.append(((*prefix, *ids), len(prefix) + start))
    return rows


def _chat_rows(pairs: Sequence[tuple[str, str]], chat: Chat, reader: Reader) -> list[_Row]:
    rows, ends = list[_Row](), torch.tensor(reader.bounds.ends)
    for prompt, answer in pairs:
        marked = chat.render(Conversation.of_question(prompt, answer), prompt)
        is_predicted = torch.from_numpy(~is_unpredicted(marked))
        ids = ids_of(torch.from_numpy(marked))
        is_answer = is_predicted & ~torch.isin(ids, ends)
        start = int(is_answer.long().argmax())
        # The template's end of the answer is not part of it
        stop = start + int(is_answer[start:].long().cumprod(0).sum())
        rows.append((tuple(ids[:stop].tolist()), start))
    return rows


def _read(model: nn.Module, rows: Sequence[_Row], reader: Reader) -> list[tuple[bool, float]]:
    """Return whether greedy decoding yields each answer, and its −log p.

    Rows of similar length are a batch.
    """
    found: dict[int, tuple[bool, float]] = {}
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    longest = max((len(ids) for ids, _ in rows), default=0)
    batch_size = batch_that_fits(reader.batch_size, longest, vocab_size_of(model))
    with eval_mode(model) as device, reading_whole(model):
        for start in range(0, len(rows), batch_size):
            batch = by_length[start : start + batch_size]
            texts = [rows[index] for index in batch]
            length = max(len(ids) for ids, _ in texts)
            input_ids = torch.full((len(texts), length), reader.bounds.end)  # [B, T]
            targets = torch.full((len(texts), length), IGNORED)
            for number, (row, begin) in enumerate(texts):
                ids = torch.tensor(row, dtype=torch.int64)
                input_ids[number, : len(ids)] = ids
                targets[number, begin - 1 : len(ids) - 1] = ids[begin:]
            logits_BTV = model(input_ids=input_ids.to(device), use_cache=False).logits.float()
            nats_B = nats_per_row(logits_BTV, targets.to(device)).tolist()
            greedy_BT = logits_BTV.argmax(dim=-1).cpu()
            is_right_B = ((greedy_BT == targets) | (targets == IGNORED)).all(dim=1)
            for number, (index, (row, _)) in enumerate(zip(batch, texts, strict=True)):
                after = int(greedy_BT[number, len(row) - 1])
                is_closed = after in reader.bounds.ends or reader.tokenizer.decode(
                    [after]
                ).startswith(("\n", "\r"))
                found[index] = bool(is_right_B[number]) and is_closed, nats_B[number]
    return [found[index] for index in range(len(rows))]

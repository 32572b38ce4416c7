"""Text samples: continuations of prompts before, during and after training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from tokenizers import Tokenizer
from torch import nn

from tritter.core.models import model_of
from tritter.data.chat import (
    ANSWER,
    START,
    Chat,
    end_of_turn_ids,
    ids_of,
    is_unpredicted,
)
from tritter.data.tokens import TextBounds
from tritter.evaluation.inference import (
    continued_text,
    generated_tokens,
    sample_text,
    whole_word_prompt,
)
from tritter.methods.whole import reading_flops
from tritter.pipeline.metrics import log_samples
from tritter.pipeline.run import Run
from tritter.pipeline.run_data import RunData
from tritter.training.callbacks import Validation, find_callback
from tritter.training.module import base_of

_SAMPLE_PROMPT_TOKENS = 24
_CONTINUATION_TOKENS, _ANSWER_TOKENS = 48, 256  # limits without evaluation.sample_tokens


def generate_samples(
    start: Run,
    before: nn.Module,
    run: Run,
    after: nn.Module,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, str]], float]:
    """Return the continuations of both models, as in summary.json, and their FLOPs.

    Those of a prompt of each domain come first, then those of own prompts.

    Args:
        start: the run with the data in the tokens of `before`.
        before: the model before training.
        run: the same with the tokens of `after`.
        after: the trained model.
        progress: called with the number of prompts that are finished, and the total.
    """
    positions = _positions(before)
    prompts = [(domain, _prompt_of(start, domain, positions)) for domain in start.data.domains]
    prompts += [("", ids) for ids in _own_prompts(start, before).values()]
    own, other = _Sampler.of(start), _Sampler.of(run)
    is_same = run.data.has_tokens_of(start.data)
    samples, flops = list[dict[str, str]](), 0.0
    for domain, ids in prompts:
        if progress is not None:
            progress(len(samples), len(prompts))
        shown, again = own.shown(ids), ids
        if not is_same:  # another tokenizer
            again = other.encoded(shown, is_chat=_is_chat(ids)) if ids else []
        first, num_before = own.continued(before, ids)
        second, num_after = other.continued(after, again)
        flops += reading_flops(before).of(num_before) + reading_flops(after).of(num_after)
        samples.append({"domain": domain, "prompt": shown, "before": first, "after": second})
    return samples, flops


def num_passes(run: Run) -> int:
    """Return the most forward passes of a token each in which both models write their samples."""
    evaluation = run.config.evaluation
    of_chat = _ANSWER_TOKENS if _chat(run) else _CONTINUATION_TOKENS
    most = of_chat if evaluation.sample_tokens is None else evaluation.sample_tokens
    return 2 * most * (len(run.data.domains) + len(evaluation.prompts))


def _own_prompts(run: Run, model: nn.Module) -> dict[str, list[int]]:
    """Return the prompts of `evaluation.prompts` as tokens; the end of one that is too long.

    If the checkpoint has a chat template, a prompt is rendered as a user's message.
    """
    texts = run.config.evaluation.prompts
    most, chat = _positions(model) // 2, _chat(run)
    encode = run.data.corpus.tokenizer.encode
    if chat is not None:
        return {text: _end_of(chat.prompt(text), most) for text in texts}
    return {text: encode(text, add_special_tokens=False).ids[-most:] for text in texts}


def _chat(run: Run) -> Chat | None:
    """Return the chat template and options of a run; None if it has no chat template."""
    chat = run.data.corpus.chat
    if chat is None and run.config.evaluation.prompts:
        stock = run.data.stock_tokenizer
        chat = None if stock is None or stock.chat_template is None else Chat(stock)
    return None if chat is None or chat.tokenizer is None else chat


def _end_of(conversation: list[int], most: int) -> list[int]:
    """Return at most the last tokens of a rendered conversation, marked as one."""
    first, *others = conversation[-most:]
    return [first | START, *others]


def _positions(model: nn.Module) -> int:
    # Learned positions are limited; the last generated token is not read
    return model_of(model).position_limit or RunData.max_positions


def _prompt_of(run: Run, domain: str, positions: int) -> list[int]:
    """Return a prompt from the first validation document of a domain."""
    document = run.data.corpus.domains[domain].validation.document(0)
    first = int(document[0]) if len(document) else 0
    if first >= ANSWER:  # a conversation up to its first answer, or half of it
        num_given = int(is_unpredicted(document).long().cumprod(0).sum())
        num_given = num_given if num_given > 1 else len(document) // 2
        given = document[:num_given].tolist()
        # The start of a text precedes one without a template, as in training
        return _end_of(given, positions // 2) if first >= START else given[-(positions // 2) :]
    # Skip the beginning of the document, which is usually a heading or imports
    return whole_word_prompt(
        document[: 4 * _SAMPLE_PROMPT_TOKENS].tolist(),
        run.data.corpus.tokenizer.decode,
        skipped_tokens=_SAMPLE_PROMPT_TOKENS,
        max_tokens=min(_SAMPLE_PROMPT_TOKENS, positions // 2),
    )


@dataclass(frozen=True, slots=True)
class _Sampler:
    """Greedy continuations of texts, and whole answers in conversations.

    Args:
        tokenizer: decodes them.
        max_new_tokens: limit of tokens; None is the default of texts and of answers.
        bounds: start and end of a text.
        turn_ends: further tokens that end an answer.
    """

    tokenizer: Tokenizer
    max_new_tokens: int | None
    bounds: TextBounds
    turn_ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, run: Run) -> "_Sampler":
        """Return the sampler of a run."""
        chat = _chat(run)
        ends = () if chat is None else tuple(end_of_turn_ids(chat.tokenizer))
        most = run.config.evaluation.sample_tokens
        return cls(run.data.corpus.tokenizer, most, run.data.bounds, ends)

    def shown(self, prompt: list[int]) -> str:
        """Return a prompt as text, a conversation with the special tokens that mark its roles."""
        return str(self.tokenizer.decode(_ids(prompt), skip_special_tokens=not _is_chat(prompt)))

    def encoded(self, shown: str, *, is_chat: bool) -> list[int]:
        """Return the tokens of a prompt, the reverse of `shown`."""
        first, *others = self.tokenizer.encode(shown, add_special_tokens=False).ids
        return [first | START if is_chat else first, *others]

    def continued(self, model: nn.Module, prompt: list[int]) -> tuple[str, int]:
        """Return the continuation of a prompt, and the number of tokens that the model read.

        These are what precedes a text, the prompt and all new tokens but the last: with a cache of
        keys and values, each would be read once.
        """
        is_chat = _is_chat(prompt)
        most = self.max_new_tokens or (_ANSWER_TOKENS if is_chat else _CONTINUATION_TOKENS)
        most = min(most, _positions(model) - len(prompt))
        if is_chat:
            ends = (*self.bounds.ends, *self.turn_ends)
            tokens = generated_tokens(model, _ids(prompt), max_new_tokens=most, end_ids=ends)
            is_cut = not tokens or tokens[-1] not in ends
            text = str(self.tokenizer.decode(tokens if is_cut else tokens[:-1]))
            return f"{text} [cut after {most} tokens]" if is_cut else text, len(prompt) + len(
                tokens
            )
        tokens = sample_text(model, prompt_ids=prompt, max_new_tokens=most, bounds=self.bounds)
        num_read = len(self.bounds.prefix) + len(prompt) + min(len(tokens), most - 1)
        return continued_text(self.tokenizer.decode, _ids(prompt), tokens), num_read


def _ids(prompt: list[int]) -> list[int]:
    """Return a prompt without marks."""
    ids: list[int] = ids_of(torch.tensor(prompt, dtype=torch.int64)).tolist()
    return ids


def _is_chat(prompt: list[int]) -> bool:
    """Return True if a prompt is a rendered conversation."""
    return bool(prompt) and prompt[0] >= START


class SampleLog(Callback):
    """Continue own prompts at every evaluation during training.

    The continuations are written to `samples.jsonl`, and to W&B as a table if its logger is open
    in this process.

    Args:
        prompts: text → tokens.
        sampler: continues them.
        folder: folder of the training run.
    """

    def __init__(self, prompts: Mapping[str, list[int]], sampler: _Sampler, folder: Path) -> None:
        self._prompts, self._sampler, self._folder = dict(prompts), sampler, folder
        self._rows: list[list[Any]] = []

    @classmethod
    def of(cls, run: Run, model: nn.Module, folder: Path) -> "tuple[SampleLog, ...]":
        """Return the callback for a training run with own prompts; none without."""
        prompts = _own_prompts(run, model)
        return (cls(prompts, _Sampler.of(run), folder),) if prompts else ()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # All processes generate: the layers of a sharded model are gathered by all of them
        module, step = base_of(pl_module), trainer.global_step
        validation = find_callback(trainer, Validation)
        assert validation is not None
        reading = module.reading_flops()
        for text, ids in self._prompts.items():
            continuation, num_read = self._sampler.continued(module.model, ids)
            shown = self._sampler.shown(ids) if _is_chat(ids) else text
            self._rows.append([step, shown, continuation])
            validation.flops += reading.of(num_read)
        if trainer.is_global_zero:
            log_samples(self._folder, trainer.loggers, self._rows, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [list(row) for row in self._rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = [list(row) for row in state_dict["rows"]]

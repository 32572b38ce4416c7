"""Replay: a fixed share of every batch comes from the old domains.

When to use: whenever old data is available. At our scale a fraction of two fifths costs a tenth of
the gain at equal steps and loses nothing on the old domain (compare arXiv 2403.08763). The fraction
is exact over time, and so is the share of each old domain. The new data keeps its order: a run with
replay sees a prefix of the new data that a run without replay sees. Cost: a fraction of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tritter.core.families import forward_flops
from tritter.data.batches import BatchStream
from tritter.data.chat import ANSWER, ids_of
from tritter.data.packing import DocumentMask, inputs_for
from tritter.data.replay import ReplayBuffer, Weighting
from tritter.data.tokens import TextBounds
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.evaluation.inference import eval_mode
from tritter.options import Count, RunRequest, WholeNumber, options
from tritter.training import ForgettingMethod, Needs, Preparation, Prepared, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Text that the model generates begins as training documents do, and after an end of text the next
# one begins. A text longer than a sequence is continued from its last half sequence. Models loop at
# low temperatures and produce noise at high ones: the share of distinct runs of four tokens and the
# perplexity under the model detect both.
#
# B  texts in a batch      T  tokens of a sequence      V  vocabulary

_RUN_TOKENS = 4
_PER_TEXT, _AT_ONCE = 4, 64  # sequences of a text, and texts that are generated at once
_Turns = Sequence[Sequence[int]]  # what opens a user's message and an answer
_SHORT_TEXT = 128  # tokens: few long sequences consist of several texts, to generate more at once
_WORDS = {
    "repeat_themselves": "repetitive",
    "perplexity_too_low": "with too low a perplexity",
    "perplexity_too_high": "with too high a perplexity",
}


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {_WORDS[why]}" for why, count in dropped.items() if count)


def _write_text(
    model: nn.Module,
    *,
    num_sequences: int,
    sequence_length: int,
    bounds: TextBounds,
    turns: _Turns = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    sequences_per_text: int = 1,
    batch_size: int = _AT_ONCE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Generate sequences with a causal language model, int32 [N, T].

    Also returns the mean −log p of each sequence's tokens at temperature 1, float64 [N], without
    tokens in front of a text.

    Args:
        turns: `Chat.turns`: every second text then consists of conversations.
        sequences_per_text: number of consecutive sequences cut from one text.
        batch_size: texts that are generated at once; another value yields other texts.
        progress: called with the length of the texts, added over batches, and the total.
    """
    import torch

    num_texts = -(-num_sequences // sequences_per_text)
    length = sequences_per_text * sequence_length
    total = -(-num_texts // batch_size) * length
    pieces: list[Tensor] = []
    nats: list[Tensor] = []
    with eval_mode(model) as device:
        generator = torch.Generator(device).manual_seed(seed)
        draw = partial(_draw, temperature=temperature, top_p=top_p, generator=generator)
        for number, first in enumerate(range(0, num_texts, batch_size)):
            count = min(batch_size, num_texts - first)
            openings = _Openings(bounds, turns, count, device)

            def show(count: int, before: int = number * length) -> None:
                if progress is not None:
                    progress(before + count, total)

            texts, costs = _texts(model, openings, length, sequence_length, draw, show=show)
            pieces.append(bounds.begun(texts.view(-1, sequence_length)).int().cpu())
            nats.append(costs.view(-1, sequence_length).cpu())
    costs_NT = torch.cat(nats)[:num_sequences].double()
    counted = costs_NT.isfinite()
    mean = costs_NT.nan_to_num().sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    return torch.cat(pieces)[:num_sequences], mean


def _distinct_share(sequences: Tensor) -> Tensor:
    """Return the share of distinct runs of four tokens in each sequence [N, T], as [N].

    1 if no run occurs twice; 1 / (T − 3) if one token is repeated throughout; 1 for a sequence
    shorter than a run.
    """
    import torch

    runs = sequences.long().unfold(1, min(_RUN_TOKENS, sequences.shape[1]), 1)  # [N, R, 4]
    shares = [len(each.unique(dim=0)) / len(each) for each in runs]
    return torch.tensor(shares, dtype=torch.float64)


def _draw(
    logits_BV: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """Return sampled token ids, int64 [B, 1]."""
    import torch

    probabilities = (logits_BV / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, entries = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(
            -1, entries, torch.where(before < top_p, ordered, 0.0)
        )
    return torch.multinomial(probabilities, 1, generator=generator)


class _Openings:
    """Opens each of a batch of texts, and the next one after an end of text.

    Without a start of text, its end begins the next one. With `turns`, every second text consists
    of conversations: the model writes questions and answers (arXiv 2406.08464), and what opens them
    is given to it and not predicted.
    """

    def __init__(self, bounds: TextBounds, turns: _Turns, count: int, device: torch.device) -> None:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        self.bounds = bounds
        given = [bounds.marked_start or bounds.prefix, *turns]
        as_tensor = partial(torch.tensor, device=device)
        self._given = pad_sequence([as_tensor(each) for each in given], batch_first=True)
        self._lengths = as_tensor([len(each) for each in given])
        self._ends = as_tensor(bounds.ends)
        # Per text: its current part (0 plain text, 1 a question, 2 an answer) and the part's tokens
        self._part = torch.arange(count, device=device)[:, None] % 2 * bool(turns)
        self._written = torch.zeros_like(self._part)

    def next_tokens(self, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the next token of each text, int64 [B, 1], and whether it was drawn.

        Args:
            drawn: int64 [B, 1]; None at the beginning of the texts.
        """
        import torch

        part, last = self._part, self._lengths[self._part] - 1
        is_drawn, is_text = self._written > last, part == 0
        tokens = self._given[part, torch.minimum(self._written, last)]
        if drawn is not None:
            tokens = torch.where(is_drawn, drawn + ANSWER * ~is_text, tokens)
        # What opens an answer begins with the end of the user's message
        turn_end = self._given[-1, 0]
        is_turn_end = ~is_text & (ids_of(tokens) == ids_of(turn_end))
        is_end = is_drawn & (torch.isin(ids_of(tokens), self._ends) | is_turn_end)
        is_question_end, is_answer_end = is_end & (part == 1), is_end & (part == 2)
        tokens = torch.where(is_question_end, turn_end, tokens)
        self._part = part + is_question_end.long() - is_answer_end.long()
        begins_anew = is_answer_end | (is_end & is_text & bool(self.bounds.start))
        self._written = (self._written + 1).masked_fill(begins_anew, 0)
        self._written = self._written.masked_fill(is_question_end, 1)
        return tokens.masked_fill(is_end & is_text, self.bounds.end), is_drawn


def _texts(
    model: nn.Module,
    openings: _Openings,
    length: int,
    window: int,
    draw: Callable[[Tensor], Tensor],
    *,
    show: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Return texts, int64 [B, length], and −log p of each token [B, length], NaN at first.

    `show` is called with the number of tokens that each text has.
    """
    import torch

    from tritter.core.models import cache_in, cache_name, last_logits_only

    document_mask = DocumentMask.of(model)
    read, _ = openings.next_tokens()
    tokens, costs = [read], [torch.full(read.shape, math.nan, device=read.device)]
    name, cache, num_cached = cache_name(model), None, 0
    last_only = last_logits_only(model)
    for position in range(1, length):
        if num_cached + read.shape[1] > window - 1:  # no more context than in training
            latest = torch.cat(tokens[-max(1, window // 2) :], dim=1)
            read, cache, num_cached = openings.bounds.begun(latest), None, 0
        num_cached += read.shape[1]
        document_arguments: dict[str, Tensor] = {}
        if document_mask is not None:
            document_arguments = document_mask.generation_inputs(
                torch.cat(tokens[-num_cached:], dim=1), num_read=read.shape[1]
            )
        ids = inputs_for(model, read)
        arguments = {name: cache, **document_arguments, **last_only}
        output = model(input_ids=ids, use_cache=True, **arguments)
        cache, logits = cache_in(output), output.logits[:, -1].float()  # [B, V]
        if not bool(logits.isfinite().all()):
            raise TritterError(
                "the model's logits are not finite: it can't generate data for replay."
            )
        read, is_drawn = openings.next_tokens(draw(logits))
        tokens.append(read)
        nats = -logits.log_softmax(dim=-1).gather(1, ids_of(read))
        costs.append(nats.masked_fill(~is_drawn, math.nan))
        show(position + 1)
    return torch.cat(tokens, dim=1), torch.cat(costs, dim=1)


@options
class ReplayOptions:
    """Options of replay.

    Args:
        fraction: exact share of all sequences that come from the old domains.
        weights: old domain → its weight among the old sequences; 1 if it is not listed.
        weighting: how sequences kept from an earlier run are drawn within their domain: `uniform`,
            or `loss`, in proportion to their loss at the end of that run.
        keep: training sequences of each domain that are saved with the trained model.
    """

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.4
    weights: Mapping[str, Annotated[float, Field(ge=0)]] | None = None
    weighting: Weighting = "uniform"
    keep: WholeNumber = 0


def _fraction_problems(name: str, options: Any, run: RunRequest) -> Iterator[Problem]:
    """Yield a problem if not one sequence of a run would be replayed."""
    sequences = run.training.max_steps * run.trainer.accumulate_grad_batches * run.data.batch_size
    if math.floor(sequences * options.fraction) < 1:
        reason = (
            f"of the {sequences} training sequences none would be replayed; "
            f"use at least {1 / sequences:.2g}, or remove {name}"
        )
        yield Problem(f"forgetting.{name}.fraction", options.fraction, reason=reason)


class Replay(ForgettingMethod):
    """Mix old sequences into the batches, see `ReplayOptions`."""

    name = "replay"
    Options = ReplayOptions
    uses_weights = False

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(old_text=True, mixes=True, keeps=options.keep)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        yield from _fraction_problems(cls.name, options, run)
        key, old, weights = "forgetting.replay.weights", run.text.old, options.weights or {}
        earlier = chain.from_iterable(run.text.tasks[:-1])
        known = tuple(dict.fromkeys([*old, *earlier, *run.text.kept_sequences.sequences]))
        unknown = [name for name in weights if name not in known]
        for name in unknown:
            reason = f"not an old domain of this run; its old domains: {', '.join(known) or 'none'}"
            near = nearest(name, known)
            yield Problem(f"{key}.{name}", weights[name], reason=reason, nearest=near)
        if not unknown and old and not any(weights.get(name, 1) for name in old):
            reason = "every old domain has the weight 0; remove replay instead"
            yield Problem(key, dict(weights), reason=reason)

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        # The position in the buffer is part of the stream's position, which checkpoints save
        buffer = ReplayBuffer.of_domains(
            task.old_sequences,
            seed=task.seed,
            weights=self.options.weights,
            losses=task.old_losses if self.options.weighting == "loss" else None,
        )
        return buffer.mixed_into(batches, self.options.fraction)


# Self-replay (arXiv 2605.26097): the model generates its own old data before it learns new data.
#
# The sequences are generated with the initial weights of the run, filtered, saved in the run folder
# and mixed into the batches like real old data. Rehearsal of a network's own output dates back to
# Robins 1995 (pseudorehearsal); for language models see also LAMOL, arXiv 1909.03329.
#
# When to use: the old data is not available. The model rarely generates what it models worst, so
# self-replay mitigates less forgetting than real old data. Cost: one forward pass per generated
# token before training, one token at a time; then as replay.


@options
class SelfReplayOptions:
    """Share of generated sequences in the batches, how they are generated and filtered."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    num_sequences: Count = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    sequences_per_text: Count | None = None
    min_distinct: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_perplexity: Annotated[float, Field(ge=1)] = 1.5
    max_perplexity: Annotated[float, Field(gt=1)] | None = None


def _text_lengths(options: SelfReplayOptions, length: int) -> tuple[int, int]:
    """Return the number of sequences per text, and of texts per sequence; one of them is 1."""
    count = options.num_sequences
    if options.sequences_per_text is not None:
        return options.sequences_per_text, 1
    most = min(_AT_ONCE // count, length // _SHORT_TEXT)
    parts = max((parts for parts in range(1, most + 1) if length % parts == 0), default=1)
    return max(1, min(_PER_TEXT, count // _AT_ONCE)), parts


def _stretch_lengths(num_sequences: int, sequence_length: int) -> tuple[int, ...]:
    """Return the tokens read in each cached stretch of a text of `num_sequences`."""
    left, lengths = num_sequences * sequence_length - 1, list[int]()
    num_prompt_tokens = 1
    while left > 0:
        drawn = min(left, sequence_length - num_prompt_tokens)
        lengths.append(num_prompt_tokens + drawn - 1)
        left, num_prompt_tokens = left - drawn, max(1, sequence_length // 2)
    return tuple(lengths)


class SelfReplay(ForgettingMethod):
    """Mix sequences that the model generated into the batches.

    Args:
        fraction: share of all sequences that are generated, 0 ≤ fraction < 1. 0 only generates
            text for other methods, such as `ewc`.
        num_sequences: number of sequences to generate.
        temperature: divisor of the logits.
        top_p: sample from the smallest set of tokens with this probability (arXiv 1904.09751).
        sequences_per_text: number of consecutive sequences cut from one text. None: 4, or fewer
            if more texts can be generated at once; few long sequences consist of several texts.
        min_distinct: minimum share of distinct runs of four tokens; below, a text is repetitive.
        min_perplexity: minimum perplexity of a sequence under the model that generated it.
        max_perplexity: maximum perplexity; None: the vocabulary size, that of random guessing.
    """

    name = "self_replay"
    Options = SelfReplayOptions

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(writes=True, mixes=options.fraction > 0)

    @classmethod
    def problems(cls, options: Any, run: RunRequest) -> Iterator[Problem]:
        # With 0, the text only serves methods that need old data, such as ewc
        others = (one.kind.needs(one.options) for one in run.forgetting)
        if options.fraction > 0 or not any(needs.old_text for needs in others):
            yield from _fraction_problems(cls.name, options, run)

    @classmethod
    def passes(cls, options: Any, length: int) -> tuple[int, int]:
        """Return the number of forward passes of the generation, and the texts of each."""
        per_text, parts = _text_lengths(options, length)
        num_texts = -(-options.num_sequences * parts // per_text)
        return -(-num_texts // _AT_ONCE) * (per_text * length // parts), min(num_texts, _AT_ONCE)

    def prepare(self, preparation: Preparation) -> Prepared:
        from tritter.core.models import model_of  # imports transformers, so not at the top

        model, options = model_of(preparation.model), self.options
        length, vocab_size = preparation.sequence_length, model.sizes.vocab_size
        count, (per_text, parts) = options.num_sequences, _text_lengths(options, length)
        preparation.log(f"the model generates {count} sequences of {length} tokens")
        sequences, nats = _write_text(
            preparation.model,
            num_sequences=count * parts,
            sequence_length=length // parts,
            bounds=preparation.bounds,
            turns=preparation.turns,
            temperature=options.temperature,
            top_p=options.top_p,
            sequences_per_text=per_text,
            seed=preparation.seed("self_replay"),
            progress=preparation.progress,
        )
        sequences, nats = sequences.view(count, length), nats.view(count, parts).mean(dim=1)
        is_kept, dropped = self.suitable(sequences, nats, vocab_size=vocab_size)
        sequences, perplexity = sequences[is_kept], math.exp(float(nats[is_kept].mean()))
        chats = ", half of them conversations," if preparation.turns else ""
        reasons = f"; dropped: {_reasons(dropped)}" if any(dropped.values()) else ""
        flops = forward_flops(model)
        return Prepared(
            written=sequences,
            flops=-(-count * parts // per_text)
            * sum(map(flops.of, _stretch_lengths(per_text, length // parts))),
            found={"written": {**dropped, "kept": len(sequences)}},
            notes=(
                f"self_replay: the model generated {count} sequences of {length} tokens{chats} "
                f"at perplexity {perplexity:.3g}, {len(sequences)} are used{reasons}.",
            ),
        )

    def suitable(
        self, sequences: Tensor, nats: Tensor, *, vocab_size: int
    ) -> tuple[Tensor, dict[str, int]]:
        """Return which sequences are used, bool [N], and the number of others for each reason.

        Repetitive ones are dropped, and those whose perplexity is too low or too high.
        """
        highest = self.options.max_perplexity or float(vocab_size)
        repeats = _distinct_share(sequences) < self.options.min_distinct
        too_low = ~repeats & (nats < math.log(self.options.min_perplexity))
        too_high = ~repeats & (nats > math.log(highest))
        kept = ~(repeats | too_low | too_high)
        dropped = {
            "repeat_themselves": int(repeats.sum()),
            "perplexity_too_low": int(too_low.sum()),
            "perplexity_too_high": int(too_high.sum()),
        }
        if not kept.any():
            raise RequestError(
                f"forgetting.self_replay: none of the {len(kept)} generated sequences is "
                f"suitable for replay ({_reasons(dropped)}; mean perplexity "
                f"{float(nats.mean().exp()):.4g}). Set data.old, try another "
                "forgetting.self_replay.temperature, or relax min_distinct, min_perplexity and "
                "max_perplexity."
            )
        return kept, dropped

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        assert task.written is not None
        if self.options.fraction == 0:
            return batches
        buffer = ReplayBuffer.of_domains({"written": task.written}, seed=task.seed)
        return buffer.mixed_into(batches, self.options.fraction)

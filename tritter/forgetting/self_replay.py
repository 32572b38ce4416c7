"""Self-replay (arXiv 2605.26097): the model writes its old text before it learns the new one.

What it writes at the weights that the training starts from is sorted, kept in the run's folder,
and mixed into the batches as replay mixes old text. Rehearsal of what a network itself puts out is
as old as Robins 1995 (pseudorehearsal); of language models see also LAMOL, arXiv 1909.03329.

When to use: the old text is gone, or was never at hand. What the model says worst it says seldom,
so it protects less than real old text does. Cost: one forward pass over each token that is
written, one token at a time, before the training; then as replay.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tritter.data.batches import BatchStream
from tritter.data.replay import ReplayBuffer
from tritter.errors import RequestError
from tritter.families import family_of, forward_flops
from tritter.forgetting.writing import Written, distinct_share, lengths_read, write_text
from tritter.options import Count, options
from tritter.training import ForgettingMethod, Needs, Preparation, Prepared, Task


@options
class SelfReplayOptions:
    """What share of the batches the model writes, how it writes, and what of it is kept."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    num_sequences: Count = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    sequences_per_text: Count = 4
    min_distinct: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_perplexity: Annotated[float, Field(ge=1)] = 1.5
    max_perplexity: Annotated[float, Field(gt=1)] | None = None


class SelfReplay(ForgettingMethod):
    """Mix sequences that the model wrote into the batches.

    Args:
        fraction: share of all sequences that it wrote, 0 ≤ fraction < 1.
        num_sequences: that it writes.
        temperature: by which logits are divided.
        top_p: tokens are drawn from the fewest whose chances add up to it.
        sequences_per_text: in a row, before the next text begins.
        min_distinct: least share of distinct runs of four tokens; what has less repeats itself.
        min_perplexity: least perplexity of a sequence under the model that wrote it.
        max_perplexity: largest one; None: the size of the vocabulary, where guessing is.
    """

    name = "self_replay"
    Options = SelfReplayOptions

    def __init__(
        self,
        *,
        fraction: float,
        num_sequences: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        sequences_per_text: int = 4,
        min_distinct: float = 0.5,
        min_perplexity: float = 1.5,
        max_perplexity: float | None = None,
    ) -> None:
        self.fraction = fraction
        self.num_sequences = num_sequences
        self.temperature = temperature
        self.top_p = top_p
        self.sequences_per_text = sequences_per_text
        self.min_distinct = min_distinct
        self.min_perplexity = min_perplexity
        self.max_perplexity = max_perplexity

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(writes=True, mixes=True)

    def prepare(self, given: Preparation) -> Prepared:
        from tritter.models import config_of  # transformers, which a refusal does not wait for

        config, length = config_of(given.model), given.sequence_length
        vocab_size = family_of(config).dimensions(config).vocab_size
        given.say(f"the model writes {self.num_sequences} sequences of {length} tokens to replay")
        written = write_text(
            given.model,
            num_sequences=self.num_sequences,
            sequence_length=length,
            end_of_text_id=given.end_of_text_id,
            temperature=self.temperature,
            top_p=self.top_p,
            sequences_per_text=self.sequences_per_text,
            seed=given.seed("self_replay"),
            say=given.say,
        )
        sorted_out = self.sort_out(written, vocab_size=vocab_size)
        flops = forward_flops(config)
        num_texts = -(-self.num_sequences // self.sequences_per_text)
        kept = sorted_out.kept
        return Prepared(
            written=kept,
            flops=num_texts * sum(map(flops.of, lengths_read(self.sequences_per_text, length))),
            found={"written": {**sorted_out.dropped, "kept": len(kept)}},
            notes=(sorted_out.note(self.num_sequences, length),),
        )

    def sort_out(self, written: Written, *, vocab_size: int) -> "SortedOut":
        """Drop what repeats itself, and what the model finds too likely or too unlikely.

        Raises:
            RequestError: nothing is left.
        """
        highest = self.max_perplexity or float(vocab_size)
        repeats = distinct_share(written.sequences) < self.min_distinct
        too_low = ~repeats & (written.nats < math.log(self.min_perplexity))
        too_high = ~repeats & (written.nats > math.log(highest))
        kept = ~(repeats | too_low | too_high)
        dropped = {
            "repeat_themselves": int(repeats.sum()),
            "perplexity_too_low": int(too_low.sum()),
            "perplexity_too_high": int(too_high.sum()),
        }
        if not kept.any():
            reasons = [f"{count} {_WORDS[why]}" for why, count in dropped.items() if count]
            raise RequestError(
                f"forgetting.self_replay: of {len(kept)} sequences that the model wrote none is "
                f"fit to be replayed ({', '.join(reasons)}; their mean perplexity is "
                f"{float(written.nats.mean().exp()):.4g}). Give old text (data.old), try another "
                "forgetting.self_replay.temperature, or widen min_distinct, min_perplexity and "
                "max_perplexity."
            )
        nats = float(written.nats[kept].mean())
        return SortedOut(written.sequences[torch.where(kept)[0]], dropped, nats)

    def mix(self, batches: BatchStream, task: Task) -> BatchStream:
        assert task.written is not None
        buffer = ReplayBuffer.of_domains({"written": task.written}, seed=task.seed)
        return batches.with_replay(buffer, self.fraction)


_WORDS = {
    "repeat_themselves": "repeat themselves",
    "perplexity_too_low": "of too low a perplexity",
    "perplexity_too_high": "of too high a perplexity",
}


@dataclass(frozen=True, slots=True)
class SortedOut:
    """What was kept, int32 [N, T], and how many sequences were dropped, by reason.

    Args:
        nats: mean −log p of a token of what was kept, under the model that wrote it.
    """

    kept: Tensor
    dropped: dict[str, int]
    nats: float

    def note(self, count: int, length: int) -> str:
        """Say what there was and what was dropped."""
        told = [f"{number} {_WORDS[why]}" for why, number in self.dropped.items() if number]
        dropped = f"; dropped were {', '.join(told)}" if told else ""
        return (
            f"self_replay: the model wrote {count} sequences of {length} tokens at perplexity "
            f"{math.exp(self.nats):.3g}, {len(self.kept)} are replayed{dropped}."
        )

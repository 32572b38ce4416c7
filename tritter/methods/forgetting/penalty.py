"""Penalties as a loss term for your own training loop, and the old data they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from tritter.data.batches import sample_equally
from tritter.data.tokens import PretrainedTokenizer, TokenisedDocuments
from tritter.errors import Problem, RequestError, brief, refused
from tritter.methods.forgetting.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from torch import Tensor, nn

    OldData = Iterable[str] | Iterable[Mapping[str, Tensor]] | Iterable[Tensor] | Tensor


class Penalty:
    """A penalty on moving away from the weights of a model, as a term for the loss.

    Calling it returns a scalar with its graph.

    Args:
        model: at the weights to protect.
        method: with their anchors and importances.
    """

    def __init__(self, model: nn.Module, method: QuadraticPenalty) -> None:
        self.model, self.method = model, method

    def __call__(self) -> Tensor:
        from tritter.core.models import refuse_wrapped  # imports transformers

        refuse_wrapped(self.model)
        now = {name: list(each.shape) for name, each in self.model.named_parameters()}
        for name, value in self.method.anchor.items():
            if (found := now.get(name)) != list(value.shape):
                raise RequestError(
                    f"{name} had shape {list(value.shape)} when protect was called, and "
                    f"{f'has {found}' if found else 'is not a parameter'} now: call protect again "
                    "after the model has grown."
                )
        return self.method.penalty(self.model)

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """Parameter name → its importance."""
        return self.method.importance

    @property
    def anchor(self) -> Mapping[str, Tensor]:
        """Parameter name → the weights to protect."""
        return self.method.anchor

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training run needs."""
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        names = state.get("anchor", {}).keys()
        if self.method.importance_key not in state or names != self.anchor.keys():
            reason = f"it is not the state of a penalty of {self.method.name} for this model"
            raise RequestError(Problem("state", reason=reason))
        self.method.load_state_dict(state)


def old_sequences(
    old_data: OldData | None,
    *,
    tokenizer: PretrainedTokenizer | None,
    sequence_length: int,
    count: int,
) -> Iterator[Tensor]:
    """Yield `count` sequences of old data at most, as integers [N, T] without padding.

    Args:
        old_data: documents, which are packed and drawn at random; or batches, of which the first
            ones count.
        tokenizer: of documents.
        sequence_length: that documents are packed to.
    """
    for batch in _sequences(old_data, tokenizer, sequence_length, count):
        if not count:
            break
        yield batch[:count]
        count -= len(batch[:count])


def _sequences(
    old_data: OldData | None,
    tokenizer: PretrainedTokenizer | None,
    sequence_length: int,
    count: int,
) -> Iterator[Tensor]:
    import torch

    if isinstance(old_data, str):
        reason = "must be a list of documents, or batches with input_ids"
        raise refused("old_data", brief(old_data), reason)
    if old_data is None:
        return
    if isinstance(old_data, torch.Tensor):
        old_data = [old_data]
    each = iter(cast("Iterable[Any]", old_data))
    first = next(each, None)
    if isinstance(first, str):
        yield _packed(chain([first], each), tokenizer, sequence_length, count)
        return
    for batch in chain([] if first is None else [first], each):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
            reason = "allowed are documents, integers [N, T], or mappings with input_ids [N, T]"
            raise refused("old_data", brief(batch), reason)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is None or bool(mask.all()):
            rows = [ids]
        else:
            rows = [row[own.bool()][None] for row, own in zip(ids, mask, strict=True)]
        yield from (each for each in rows if each.shape[1] > 1)  # one token predicts nothing


def _packed(
    texts: Iterable[str], tokenizer: PretrainedTokenizer | None, sequence_length: int, count: int
) -> Tensor:
    """Return documents packed into sequences [N, T], at most `count` of them, drawn at random."""
    if tokenizer is None:
        reason = "documents need one: pass a Hugging Face tokenizer or a folder that holds one"
        raise RequestError(Problem("tokenizer", reason=reason))
    documents = TokenisedDocuments.of_texts(texts, tokenizer.tokenizer)
    length = min(sequence_length, documents.num_closed_tokens(tokenizer.bounds))
    packed = documents.pack(sequence_length=length, bounds=tokenizer.bounds)
    return sample_equally({"old": packed}, count, seed=lambda name: 0)

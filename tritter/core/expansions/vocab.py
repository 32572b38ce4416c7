"""A larger vocabulary: new tokens get rows in the embedding and in the head.

New tokens get the first ids that no token has: rows that only pad the matrices, then further ones.
The rows of old tokens keep their bits, so the logits of old tokens do not change. The probabilities
do: new tokens take part of them at step 0, which the expansion reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tritter.core.families import Config, Model
from tritter.core.parameter_map import AxisFactor, Fill, ParameterMap, TensorMap
from tritter.core.parameter_map.axis_map import NO_SOURCE
from tritter.errors import Problem, RequestError, key_name, refused
from tritter.limits import MAX_VOCABULARY
from tritter.options import Text, options
from tritter.seeds import derived_seed

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "expansion.vocab"
_Token = Annotated[int, Field(ge=0, le=2 * MAX_VOCABULARY)]
_Init = Literal["mean", "overlap", "omp", "random"]


@options
class Vocab:
    """New tokens, as further merges of the tokenizer.

    Args:
        new_tokens: number of tokens to learn from the new data, or to take from `tokenizer`.
            Default: as many as the model has, or fewer if the data has fewer frequent pairs;
            all tokens of `tokenizer`.
        tokens: texts that become tokens, instead of learned ones.
        tokenizer: folder or hub id whose tokens are added, instead of learned ones.
        init: rows of new tokens: `mean` of the old tokens that the new one consists of; `overlap`,
            a mixture of old tokens with similar characters; `omp`, sparse combinations of old rows
            that fit in the embedding of `tokenizer` (arXiv 2506.06607); or `random` with mean and
            deviation of the old rows.
        head_init: rows of an untied head: `same` as `init`, or `quiet`: the mean row, at the usual
            length. Training with Adam makes its logit low, so new tokens get little probability.
        freeze_old_rows: train only the rows of new tokens in embedding and head.
        multiple_of: if the vocabulary grows, its size is rounded up to a multiple of it.
        merges: ids of the two parts of each new token, one pair after the other; set when they are
            known.
    """

    name: ClassVar[str] = "vocab"
    expansion_type: ClassVar[str] = "vocab"
    is_exact: ClassVar[bool] = True
    new_blocks_only: ClassVar[bool] = False
    new_tokens: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)] | None = None
    tokens: tuple[Text, ...] | None = None
    tokenizer: Text | None = None
    init: _Init = "mean"
    head_init: Literal["same", "quiet"] = "same"
    freeze_old_rows: bool = False
    multiple_of: Annotated[int, Field(ge=1, le=2**16)] = 64
    merges: tuple[_Token, ...] | None = None

    def __post_init__(self) -> None:
        reason, key = "", ""
        if self.tokens is not None and self.tokenizer is not None:
            key, reason = "tokens", f"{key_name(f'{_KEY}.tokenizer')} also sets the tokens"
        elif self.tokens is not None and self.new_tokens is not None:
            key, reason = "new_tokens", f"{key_name(f'{_KEY}.tokens')} lists the new tokens"
        elif len(self.merges or ()) % 2:
            key, reason = "merges", "it must be pairs: two ids for each new token"
        elif self.init == "omp" and self.tokenizer is None:
            key = "init"
            reason = f"it needs the embedding of another model: {key_name(f'{_KEY}.tokenizer')}"
        if reason:
            raise RequestError(Problem(f"{_KEY}.{key}", getattr(self, key), reason=reason))

    @property
    def is_learned(self) -> bool:
        """True if data must give the new tokens."""
        return self.merges is None and self.tokens is None and self.tokenizer is None

    @property
    def pairs(self) -> tuple[tuple[int, int], ...] | None:
        """The merges as pairs, or None if they are not known."""
        ids = self.merges
        return None if ids is None else tuple(zip(ids[::2], ids[1::2], strict=True))

    def num_tokens(self, source: Model) -> int:
        """Return the number of new tokens; an estimate until they are known."""
        known = self.pairs if self.merges is not None else self.tokens
        if known is not None:
            return len(known)
        return self.new_tokens or source.sizes.vocab_size

    def target_config(self, source: Model) -> Config:
        if source.is_tied and self.head_init != "same":
            reason = "the head is the embedding, so its rows can't differ; use same"
            raise refused(f"{_KEY}.head_init", self.head_init, reason)
        size = source.sizes.vocab_size  # at most, until the tokenizer is known
        return self.with_ids(source, size + self.num_tokens(source))

    def with_ids(self, source: Model, number: int) -> Config:
        """Return the config of a model with rows for a number of ids; rows are never removed."""
        size = math.ceil(number / self.multiple_of) * self.multiple_of
        if number <= source.sizes.vocab_size:
            return source.config
        if size > MAX_VOCABULARY:
            reason = f"the vocabulary would have {size:,} tokens; allowed: {MAX_VOCABULARY:,}"
            raise RequestError(Problem(f"{_KEY}.new_tokens", self.new_tokens, reason=reason))
        return source.family.with_vocabulary(source.config, size)

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        reason = "it extends the tokenizer too, so it needs a checkpoint folder that has one"
        raise RequestError(Problem(_KEY, reason=reason))

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        return ()


def vocab_place(specs: Sequence[object]) -> int | None:
    """Return the index of `vocab` among some expansions, or None."""
    places = [place for place, spec in enumerate(specs) if isinstance(spec, Vocab)]
    if len(places) > 1:
        raise RequestError(Problem("expansion.vocab", reason="one at a time; use two commands"))
    return places[0] if places else None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BoundVocab:
    """`vocab` with the tokenizer of its source.

    Args:
        options: the options, with `merges`.
        new_ids: ids of the new tokens, ascending.
        num_ids: the highest id of the tokenizer plus one.
        rows: index int64 [number of new tokens, k] of old rows and weights float64
            [number of new tokens, k], whose sums are the new rows; None for random rows.
        tokenizer: text of the extended tokenizer.json.
        remarks: notes for people.
    """

    options: Vocab
    new_ids: tuple[int, ...]
    num_ids: int
    rows: tuple[Tensor, Tensor] | None
    tokenizer: str
    remarks: tuple[str, ...] = ()
    name: ClassVar[str] = Vocab.name
    expansion_type: ClassVar[str] = Vocab.expansion_type
    is_exact: ClassVar[bool] = True
    new_blocks_only: ClassVar[bool] = False

    def target_config(self, source: Model) -> Config:
        self.options.target_config(source)
        return self.options.with_ids(source, self.num_ids)

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        """Return the map that keeps the rows of old tokens and makes those of new ones."""
        import torch

        old, new = (model.sizes.vocab_size for model in (source, target))
        index = torch.arange(new)
        index[old:] = NO_SOURCE
        index[torch.tensor(self.new_ids)] = NO_SOURCE
        kept = (index >= 0).double()
        rows = AxisFactor(index, kept, kept.clone())
        # The axes that follow the vocabulary differ in a model of another size
        other = target
        if new == old:
            other = source.changed(source.family.with_vocabulary(source.config, old + 1))
        before, after = source.shapes, other.shapes
        tensors = {}
        for tensor in target.tensors:
            name = tensor.name
            sizes = tuple(zip(before[name], after[name], strict=True))
            follow = {a for a, b in sizes if a != b}
            if follow - {old} or (tensor.kind == "embed" and not follow):
                reason = (
                    f"the rows of {tensor.disk_name} {[*before[name]]} are not exactly the tokens, "
                    "so this model's vocabulary can't be extended"
                )
                raise RequestError(Problem(_KEY, reason=reason))
            axes = tuple(rows if a != b else None for a, b in sizes)
            if not any(axes):
                tensors[name] = TensorMap(source=name)
                continue
            fill = self._fill(tensor.kind != "embed", index, derived_seed(seed, name))
            tensors[name] = TensorMap(source=name, axes=axes, fill=fill)
        layers = source.sizes.num_hidden_layers
        return ParameterMap(tensors=tensors, layer_sources=tuple(range(layers)))

    def _fill(self, is_head: bool, index: Tensor, seed: int) -> Fill:
        """Return the values of the rows without a source in `index`."""
        if is_head and self.options.head_init == "quiet":
            return Fill("quiet")
        import torch

        if self.rows is None:  # −2 is a random row
            summed = torch.full((len(self.new_ids), 1), -2)
            weights = torch.ones(len(self.new_ids), 1, dtype=torch.float64)
        else:
            summed, weights = self.rows
        made, width = (index < 0).nonzero().flatten(), summed.shape[1]
        is_token = torch.isin(made, torch.tensor(self.new_ids))
        sources = torch.full((len(made), width), -1)  # rows of no token are quiet
        factors = torch.full((len(made), width), 1 / width, dtype=torch.float64)
        sources[is_token], factors[is_token] = summed, weights
        return Fill("rows", index=sources, values=factors, seed=seed)

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        old, new = (model.sizes.vocab_size for model in (source, target))
        reused = sum(number < old for number in self.new_ids)
        unused = new - old - (len(self.new_ids) - reused)
        rows = f"{len(self.new_ids):,} new tokens"
        if reused:
            rows += f", {reused:,} of them in rows that padded the vocabulary"
        if unused:
            rows += f", and {unused:,} unused rows: {new:,} is a multiple of "
            rows += str(self.options.multiple_of)
        return (rows, *self.remarks)

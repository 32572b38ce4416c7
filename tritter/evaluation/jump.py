"""Logit shift of a model at expansion."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from tritter.core.streamed import StreamedModel, blocks, computed_in
from tritter.errors import TritterError
from tritter.evaluation.inference import eval_mode
from tritter.evaluation.losses import batch_that_fits, vocab_size_of
from tritter.evaluation.statistics import finite_or_none
from tritter.terminal import ShowProgress

_logger = logging.getLogger(__name__)
_CONSTANT = 1e-5  # of their size: logits that vary less are equal but for rounding in float32
_ROWS = 8192  # of the vocabulary that are compared at once, in float64
_OLD, _NEW, _UNUSED = range(3)  # kinds of rows; rows of no token that were there are old
_ROUNDING = 1e-4  # relative to the largest hidden state, far above float32 rounding
# Of the source and the result, before the first layer and after each layer
_HiddenStates = tuple[Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Jump:
    """The change of the logits of old tokens; σ is the standard deviation of the old logits.

    If these are all equal but for rounding, σ is their root mean square.

    The largest of millions of logits alarms where 16-bit weights were rounded, so the mean changes
    are compared with a yardstick: the source itself, its weights and activations in bfloat16.

    Args:
        max_absolute: the largest change.
        relative_to_std: the same in σ; infinite if all old logits are zero.
        new_token_mass: mean probability of new tokens; None without new tokens. Rows of no token,
            which pad the vocabulary, do not count.
        rms_to_std: root mean square of the changes, in σ; None in older records, like the others.
        divergence: mean KL divergence of the next token's distribution from the old one, in nats.
        bfloat16_rms_to_std: `rms_to_std` of the yardstick; None if it was not computed, or the
            class cannot compute in bfloat16.
        bfloat16_divergence: `divergence` of the yardstick.
    """

    max_absolute: float
    relative_to_std: float
    new_token_mass: float | None = None
    rms_to_std: float | None = None
    divergence: float | None = None
    bfloat16_rms_to_std: float | None = None
    bfloat16_divergence: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the record for summary.json; non-finite values become None."""
        values = asdict(self).items()
        return {name: finite_or_none(value) for name, value in values if value is not None}

    @classmethod
    def between(
        cls,
        before_model: nn.Module,
        after_model: nn.Module,
        input_ids: Tensor,
        *,
        new_tokens: Sequence[int] | None = None,
        has_yardstick: bool = False,
    ) -> "Jump":
        """Compare two models on the same tokens, in float32 and without autocast.

        Args:
            before_model: the model before expansion.
            after_model: the model after expansion.
            input_ids: int64 [B, T] of real text; random tokens may miss some changes.
            new_tokens: their ids. Default: all rows that the vocabulary has more.
            has_yardstick: also compute the first model in bfloat16.
        """
        # Eight such logits are held at once: of three models, in two parts, and their changes
        vocab_size = 8 * vocab_size_of(after_model)
        batch_size = batch_that_fits(len(input_ids), input_ids.shape[1], vocab_size)
        rounded = partial(rounded_logits_of, before_model) if has_yardstick else lambda ids: None
        parts = (
            (logits_of(before_model, ids), logits_of(after_model, ids), rounded(ids))
            for ids in input_ids.split(batch_size)
        )
        return cls.of_logits(parts, new_tokens=new_tokens)

    @classmethod
    def of_logits(
        cls,
        parts: Iterable[tuple[Tensor, Tensor, Tensor | None]],
        *,
        new_tokens: Sequence[int] | None = None,
    ) -> "Jump":
        """Compare logits [B, T, V] of the same tokens.

        Args:
            parts: a few sequences each: logits of the model before and after expansion, and the
                yardstick, of the model before expansion in bfloat16, if any.
            new_tokens: their ids. Default: all rows that the vocabulary has more.
        """
        shift, yardstick, masses, has_yardstick = _Shift(), _Shift(), list[Tensor](), True
        for before, after, rounded in parts:
            kinds = _kinds_of_rows(before.shape[-1], after.shape[-1], new_tokens)
            has_yardstick &= rounded is not None
            shift.begin_sequences()
            yardstick.begin_sequences()
            for ids in (kinds == _OLD).nonzero().flatten().split(_ROWS):
                shift.add(before[..., ids], after[..., ids])
                if rounded is not None:
                    yardstick.add(before[..., ids], rounded[..., ids])
            if bool((kinds == _NEW).any()):
                masses.append(after.softmax(dim=-1)[..., kinds == _NEW].sum(dim=-1))
        mass = float(torch.cat(masses).mean()) if masses else None
        return shift.jump(mass, yardstick if has_yardstick else None)

    @classmethod
    def of_folders(
        cls,
        before: Path,
        after: Path,
        input_ids: Tensor,
        *,
        new_tokens: Sequence[int] | None = None,
        has_yardstick: bool = False,
        progress: ShowProgress | None = None,
    ) -> "tuple[Jump, _HiddenStates]":
        """Compare the models of two folders of any size on the same tokens, in float32.

        The weights stay on disk (`tritter.core.streamed`): layers run one by one, then logits are
        compared in blocks of the vocabulary. V: tokens of a block.

        Args:
            before: folder of the model before expansion.
            after: folder of the model after expansion.
            input_ids: int64 [B, T].
            new_tokens: their ids. Default: all rows that the vocabulary has more.
            has_yardstick: also compute the first model in bfloat16.
            progress: called with bytes read so far and in total.

        Returns:
            The logit shift, and the hidden states of both models.
        """
        used = 0

        def count(num_bytes: int) -> None:
            nonlocal used
            used += num_bytes
            if progress is not None:
                progress(used, total)

        models = [StreamedModel(folder, input_ids, on_read=count) for folder in (before, after)]
        rounded = None
        if has_yardstick:
            rounded = StreamedModel(before, input_ids, on_read=count, dtype=torch.bfloat16)
        total = sum(model.num_bytes for model in (*models, *filter(None, [rounded])))
        before_size, after_size = (model.vocab_size for model in models[:2])
        kinds = _kinds_of_rows(before_size, after_size, new_tokens)
        step = min(model.rows_per_block for model in models)
        shift, yardstick, mass = _Shift(), _Shift(), None
        totals = [torch.tensor(-torch.inf)] * 3  # log of the sum of exp over the rows of each kind
        parts = (slice(0, before_size), slice(before_size, after_size))
        for rows in chain.from_iterable(blocks(part, step) for part in parts):
            new_BTV, kinds_V = models[1].logits(rows), kinds[rows]
            for kind in kinds_V.unique().tolist():
                sum_BT = new_BTV[..., kinds_V == kind].logsumexp(dim=-1)
                totals[kind] = torch.logaddexp(totals[kind], sum_BT)
            if bool((is_old_V := kinds_V == _OLD).any()):
                old_BTV = models[0].logits(rows)[..., is_old_V]
                shift.add(old_BTV, new_BTV[..., is_old_V])
                if rounded is not None:
                    rounded_BTV = _tried(partial(rounded.logits, rows))
                    if rounded_BTV is None:
                        rounded = None
                    else:
                        yardstick.add(old_BTV, rounded_BTV[..., is_old_V])
        if bool((kinds == _NEW).any()):
            rest_BT = torch.logaddexp(totals[_OLD], totals[_UNUSED])
            mass = float((totals[_NEW] - rest_BT).sigmoid().mean())
        if progress is not None:
            progress(total, total)  # image encoders, for example, are not read
        jump = shift.jump(mass, None if rounded is None else yardstick)
        return jump, (models[0].states, models[1].states)


class _Shift:
    """Running comparison of logits, block of the vocabulary by block."""

    def __init__(self) -> None:
        self.largest = torch.zeros(())
        self._new_total: Tensor = torch.tensor(-torch.inf)  # log of the sum of exp
        self._old_total: Tensor = torch.tensor(-torch.inf)
        self._moved: Tensor = torch.zeros(())  # expected loss of logit under the old distribution
        self._squares = torch.zeros((), dtype=torch.float64)
        self._moments = torch.zeros(3, dtype=torch.float64)  # number, sum and sum of squares
        self._divergences = list[Tensor]()  # of earlier sequences

    def add(self, old_BTV: Tensor, new_BTV: Tensor) -> None:
        """Compare the logits of a part of the vocabulary."""
        moved_BTV = old_BTV - new_BTV
        self.largest = torch.maximum(self.largest, moved_BTV.abs().max())  # keeps NaN
        self._squares += moved_BTV.double().square().sum()
        wide = old_BTV.double()
        number = torch.tensor(wide.numel()).double()
        self._moments += torch.stack([number, wide.sum(), wide.square().sum()])
        self._new_total = torch.logaddexp(self._new_total, new_BTV.logsumexp(dim=-1))
        before, part = self._old_total, old_BTV.logsumexp(dim=-1)
        self._old_total = torch.logaddexp(before, part)
        mean = (old_BTV.softmax(dim=-1) * moved_BTV).sum(dim=-1)
        shares = [(total - self._old_total).exp() for total in (before, part)]
        self._moved = self._moved * shares[0] + mean * shares[1]

    def begin_sequences(self) -> None:
        """Begin other sequences, whose parts of the vocabulary follow."""
        if self._old_total.ndim:
            self._divergences.append(self._moved - self._old_total + self._new_total)
        self._new_total = self._old_total = torch.tensor(-torch.inf)
        self._moved = torch.zeros(())

    def in_deviations(self, change: Tensor) -> float:
        """Return a change in standard deviations of the old logits."""
        number, total, squares = self._moments
        # Same as `Tensor.std`
        deviation = ((squares - total**2 / number).clamp(min=0) / (number - 1)).sqrt()
        size = (squares / number).sqrt()
        if deviation < _CONSTANT * size:
            deviation = size
        return float(change.double() / deviation) if change != 0 else 0.0

    @property
    def rms_to_std(self) -> float:
        """Root mean square of the changes in standard deviations."""
        return self.in_deviations((self._squares / self._moments[0]).sqrt())

    @property
    def divergence(self) -> float:
        """Mean KL divergence of the new distribution of old tokens from the old one, in nats."""
        last = self._moved - self._old_total + self._new_total
        return float(torch.cat([*self._divergences, last]).mean().clamp(min=0))

    def jump(self, new_token_mass: float | None, yardstick: "_Shift | None") -> Jump:
        """Return the record of the comparison and of that of the yardstick."""
        return Jump(
            float(self.largest),
            self.in_deviations(self.largest),
            new_token_mass,
            self.rms_to_std,
            self.divergence,
            None if yardstick is None else finite_or_none(yardstick.rms_to_std),
            None if yardstick is None else finite_or_none(yardstick.divergence),
        )


def _kinds_of_rows(before: int, after: int, new_tokens: Sequence[int] | None) -> Tensor:
    """Return the kind of each row of the vocabulary after the expansion, int64 [after]."""
    if after < before:
        raise TritterError(
            f"evaluation: vocabularies of {before} tokens before and {after} after the expansion "
            "cannot be compared; old tokens are missing"
        )
    kinds = torch.full((after,), _UNUSED)
    kinds[:before] = _OLD
    new = range(before, after) if new_tokens is None else new_tokens
    kinds[torch.tensor(new, dtype=torch.int64)] = _NEW
    return kinds


def rounded_logits_of(model: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Return logits [B, T, V] with weights and activations in bfloat16; None if that fails."""
    with computed_in(model, torch.bfloat16):
        return _tried(lambda: logits_of(model, input_ids))


def _tried(logits: Callable[[], Tensor]) -> Tensor | None:
    """Return logits in float32; None if the class cannot compute them."""
    try:
        return logits().float()
    except Exception as error:  # stock classes may raise any
        _logger.debug("no yardstick: the source does not compute in bfloat16: %r", error)
        return None


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return logits, float32 [B, T, V], for tokens int64 [B, T]; computed without autocast."""
    with eval_mode(model) as device, torch.autocast(device.type, enabled=False):
        return model(input_ids=input_ids.to(device), use_cache=False).logits.float().cpu()


def first_difference(states: _HiddenStates, layer_sources: Sequence[int]) -> str:
    """Return the first module of the result whose output differs from the source model.

    Args:
        states: hidden states of both models.
        layer_sources: index of the copied source layer, for each layer of the result.
    """
    before, after = states
    if not _are_same(before[0], after[0]):
        return "the embedding"
    # A copy of the next source layer either computes it, or is an identity if more copies
    # follow. Any other layer is an identity. A wider hidden state begins with the old one.
    done = 0  # source layers that are already computed
    for layer, source in enumerate(layer_sources):
        output = after[layer + 1]
        if source == done and _are_same(before[done + 1], output):
            done += 1
            continue
        is_due = source == done and source not in layer_sources[layer + 1 :]
        if is_due or not _are_same(before[done], output):
            return f"layer {layer}"
    return "the final norm or the head"


def _are_same(old: Tensor, new: Tensor) -> bool:
    return bool((new[..., : old.shape[-1]] - old).abs().max() <= _ROUNDING * old.abs().max())

"""When upcycling pays: the scaling law of Liew et al. 2025 (arXiv 2502.03009).

The law predicts the loss of a dense model, of experts from scratch, and of experts copied from a
dense model, for N parameters of the dense model:

    dense, scratch   A/D^α + B/N^β + E
    upcycled         A · D1^-α1 · D2^(-α2 + α3 · ln D1) + B/N^β + E

D1 are the tokens of the dense training, D2 those after the upcycling. The constants are those of
the paper's table 2, fitted to 8 experts with 2 per token. The logarithm is natural: with a decimal
one the law would put the paper's own 8x1B model 0.38 nats below its 1B model.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, log
from typing import Self

from tritter.core.expansions import Moe, target_model
from tritter.core.expansions.moe import SHARED
from tritter.core.families import Model, training_flops
from tritter.errors import RequestError
from tritter.options import RunRequest

_LARGEST_MODEL = 1.5e9  # parameters of the dense model; the largest in the paper is 1B
_SMALLEST_MODEL = 44e6  # far below the paper's models: predictions would mean nothing
_FITTED = "8 experts, 2 per token: copies of every FFN, none of them shared"
_IRREDUCIBLE = 0.165
_GRID = [10 ** (exponent / 50) for exponent in range(5 * 50, 16 * 50)]  # 0.1 M tokens to 10^16


def _dense_loss(parameters: float, tokens: float) -> float:
    """Return the predicted loss of a dense model in nats per token."""
    return 8.83 / tokens**0.088 + 12.3 / parameters**0.116 + _IRREDUCIBLE


def _scratch_loss(parameters: float, tokens: float) -> float:
    """Return the predicted loss of experts trained from scratch, of a dense model's shape."""
    return 32.0 / tokens**0.161 + 7.05 / parameters**0.080 + _IRREDUCIBLE


def _upcycled_loss(parameters: float, dense_tokens: float, tokens: float) -> float:
    """Return the predicted loss of a model upcycled after D1 dense tokens and trained on D2."""
    exponent = 0.085 - 7.98e-4 * log(dense_tokens)
    data_term = 16.3 / dense_tokens**0.043 / tokens**exponent
    return data_term + 8.53 / parameters**0.112 + _IRREDUCIBLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycling:
    """The budgets of an upcycling, and the range of budgets that pays.

    Args:
        parameters: of the dense model.
        dense_tokens: D1.
        tokens: D2.
        cost: FLOPs per token of the result, as a multiple of the dense model's.
        is_fitted: the law was fitted to such experts.
    """

    parameters: float
    dense_tokens: float
    tokens: float
    cost: float
    is_fitted: bool = True

    @classmethod
    def of(
        cls, source: Model, *, dense_tokens: float, tokens: float, sequence_length: int, spec: Moe
    ) -> Self:
        """Return the budgets of an upcycling."""
        target = target_model(source, [spec])
        dense, sparse = (training_flops(m).per_token(sequence_length) for m in (source, target))
        return cls(
            parameters=source.num_parameters,
            dense_tokens=dense_tokens,
            tokens=tokens,
            cost=sparse / dense,
            is_fitted=_is_fitted(spec, target),
        )

    @classmethod
    def of_budget(
        cls, source: Model, *, dense_tokens: float, gpu_flops: float, sequence_length: int
    ) -> Self | None:
        """Return the upcycling that a budget of FLOPs pays; None if the source has no partner."""
        spec = Moe()
        try:
            result = target_model(source, [spec])
        except RequestError:  # no partner, or a feature that models with experts lack
            return None
        return cls.of(
            source,
            dense_tokens=dense_tokens,
            tokens=gpu_flops / training_flops(result).per_token(sequence_length),
            sequence_length=sequence_length,
            spec=spec,
        )

    @property
    def pays_from(self) -> float:
        """Tokens from which it beats the dense model, trained on for as many FLOPs."""
        for tokens in _GRID:
            dense = _dense_loss(self.parameters, self.dense_tokens + self.cost * tokens)
            if dense > self._upcycled(tokens):
                return tokens
        return inf

    @property
    def pays_until(self) -> float:
        """Tokens from which the same experts, trained from scratch on them, are better."""
        for tokens in _GRID:
            if _scratch_loss(self.parameters, tokens) < self._upcycled(tokens):
                return tokens
        return inf

    @property
    def pays(self) -> bool:
        return self.pays_from <= self.tokens <= self.pays_until

    @property
    def text(self) -> str:
        """One line with both budgets and the prediction."""
        budgets = (
            f"{_count(self.tokens)} tokens of upcycled training after "
            f"{_count(self.dense_tokens)} of dense training"
        )
        if self.parameters < _SMALLEST_MODEL:
            return f"{budgets}; the scaling law of upcycling was not fitted to models this small"
        if not self.is_fitted:
            return f"{budgets}; the scaling law was fitted to {_FITTED}"
        low, high = self.pays_from, self.pays_until
        ranges = f"from {_count(low)} (below, the dense model is the better use)"
        ranges += f" to {_count(high)} (above, experts from scratch are)" if high < inf else ""
        if low >= high:
            ranges = "at no number of tokens"
        verdict = "is predicted to pay" if self.pays else "is not predicted to pay"
        is_larger = self.parameters > _LARGEST_MODEL
        more = "; extrapolated, the law was fitted to at most 8x1B" if is_larger else ""
        return f"{budgets} {verdict}; it pays {ranges}{more}"

    def _upcycled(self, tokens: float) -> float:
        return _upcycled_loss(self.parameters, self.dense_tokens, tokens)


def upcycling_notes(config: RunRequest, source: Model, dense_tokens: float | None) -> Iterator[str]:
    """Yield the budgets of an upcycling in a run.

    Args:
        config: the run.
        source: the model that the run starts from.
        dense_tokens: of the training of this model; None if they are not known.
    """
    place = next((n for n, spec in enumerate(config.expansion) if isinstance(spec, Moe)), None)
    if place is None:
        return
    length = config.data.sequence_length
    steps = config.training.max_steps * config.trainer.accumulate_grad_batches
    tokens = float(steps * config.data.batch_size * length)
    if dense_tokens is None:
        yield (
            f"upcycling: {_count(tokens)} tokens of upcycled training; those of the dense training "
            "are not recorded. `tritter plan` with --source-tokens predicts whether it pays."
        )
        return
    with suppress(RequestError):  # a note never ends a run
        found = Upcycling.of(
            target_model(source, config.expansion[:place]),  # the model that gets experts
            dense_tokens=dense_tokens,
            tokens=tokens,
            sequence_length=length,
            spec=config.expansion[place],
        )
        yield f"upcycling: {found.text}."


def _is_fitted(spec: Moe, target: Model) -> bool:
    counts = (spec.total_experts, spec.chosen_experts)
    plain = replace(Moe(), noise=spec.noise, target=spec.target)
    given = replace(spec, num_experts=None, experts_per_token=None)
    return counts == (8, 2) and given == plain and target.model_type not in SHARED


def _count(tokens: float) -> str:
    """Return a number of tokens with three digits."""
    if tokens > 1e15:
        return "over 1,000 T"
    tokens, power = float(f"{tokens:.3g}"), 0
    while tokens >= 1000 and power < 4:
        tokens, power = tokens / 1000, power + 1
    return f"{tokens:,.4g} {' kMBT'[power]}".strip()

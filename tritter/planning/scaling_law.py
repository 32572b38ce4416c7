"""What a model of N parameters loses after D tokens, as published: a prediction, no measurement.

Chinchilla's parametric law L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, arXiv 2203.15556,
equation 2) with the constants of the corrected fit to its data (Besiroglu et al. 2024,
arXiv 2404.10102). The constants belong to that study's text and tokenizer: differences between two
plans say more than the numbers do, and the law does not see a model's shape.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """L(N, D) = E + A/N^α + B/D^β, in nats per token.

    Args:
        irreducible: E, the loss of a perfect model.
        parameter_scale: A.
        token_scale: B.
        parameter_exponent: α.
        token_exponent: β.
    """

    irreducible: float
    parameter_scale: float
    token_scale: float
    parameter_exponent: float
    token_exponent: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the predicted loss of a model trained from scratch."""
        data_term = self.token_scale / tokens**self.token_exponent
        return self._limit(parameters) + data_term

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Return after how many tokens a model of this size, from scratch, has this loss.

        Raises:
            ValueError: a model of this size never has it.
        """
        gap = loss - self._limit(parameters)
        if gap <= 0:
            raise ValueError(f"{parameters:,.0f} parameters never come to a loss of {loss}")
        return float((self.token_scale / gap) ** (1 / self.token_exponent))

    def loss_after_growth(self, loss: float, *, parameters: float, tokens: float) -> float:
        """Return the predicted loss of a grown model that started at `loss` and saw `tokens`.

        It goes on like a model of its size from scratch that has just come to that loss. This
        takes the expansion as exact; the jump of one that is not is not predicted.

        Args:
            loss: of the model before it grew.
            parameters: of the grown model.
            tokens: of the training after the growth.
        """
        return self.loss(parameters, self.tokens_for(parameters, loss) + tokens)

    def _limit(self, parameters: float) -> float:
        return self.irreducible + self.parameter_scale / parameters**self.parameter_exponent


SMALLEST_MODEL = 44_000_000  # parameters; below it the law is stretched beyond its data
CHINCHILLA = ScalingLaw(
    irreducible=1.8172,
    parameter_scale=482.01,
    token_scale=2085.43,
    parameter_exponent=0.3478,
    token_exponent=0.3658,
)

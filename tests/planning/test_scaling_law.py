"""The scaling law against numbers computed by hand, and its inverse."""

import pytest

from tritter.planning.plan import ScalingLaw

SIMPLE = ScalingLaw(
    irreducible=1.0,
    parameter_scale=10.0,
    token_scale=100.0,
    parameter_exponent=0.5,
    token_exponent=0.5,
)


def test_a_loss_by_hand() -> None:
    assert SIMPLE.loss(100, 10_000) == pytest.approx(1 + 10 / 10 + 100 / 100)
    assert SIMPLE.tokens_for(100, 3.0) == pytest.approx(10_000)


def test_growth_keeps_the_loss_and_goes_on_from_there() -> None:
    """400 parameters: limit 1.5; a loss of 3 is 100/√D = 1.5, D = 4444.4; 5555.6 more give 2.5."""
    after = SIMPLE.loss_after_growth(3.0, parameters=400, tokens=10_000 - 4_444.444444)
    assert after == pytest.approx(2.5)
    assert SIMPLE.loss_after_growth(3.0, parameters=400, tokens=0) == pytest.approx(3.0)


def test_a_loss_below_the_limit_of_a_size_is_never_reached() -> None:
    with pytest.raises(ValueError, match="never"):
        SIMPLE.tokens_for(100, 2.0)


def test_chinchillas_own_model_is_near_its_loss() -> None:
    """70 B parameters and 1.4 T tokens: 1.8172 + 482.01/5915 + 2085.43/27720."""
    assert ScalingLaw().loss(70e9, 1.4e12) == pytest.approx(1.974, abs=0.001)

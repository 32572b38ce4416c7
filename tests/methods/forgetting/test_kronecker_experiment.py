"""The method of experiments/2026-11-21_kronecker matches its README."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "experiments/2026-11-21_kronecker"
CHECKS = (
    "check_exact_where_one_token_is_seen",
    "check_factors_of_many_tokens",
    "check_a_tied_head_is_no_layer_of_its_own",
    "check_gradient_by_finite_differences",
)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    getattr(importlib.import_module("check_kronecker"), name)()

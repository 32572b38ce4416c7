"""The method of experiments/2026-11-21_kronecker matches its README."""

import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "experiments/2026-11-21_kronecker"
CHECKS = (
    "check_exact_where_one_token_is_seen",
    "check_factors_of_many_tokens",
    "check_a_tied_head_is_no_layer_of_its_own",
    "check_gradient_by_finite_differences",
)


def test_no_check_is_left_out() -> None:
    source = (FOLDER / "check_kronecker.py").read_text("utf-8")
    assert re.findall(r"^def (check_\w+)", source, re.MULTILINE) == [*CHECKS]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    getattr(importlib.import_module("check_kronecker"), name)()

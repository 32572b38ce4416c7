"""The summary of a run as the pipeline writes it, small and complete."""

import copy
from typing import Any

import pytest


def _score(loss: float, loss_per_byte: float, standard_error: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "loss_per_byte": loss_per_byte,
        "standard_error": standard_error,
        "n": 60,
    }


def _check(name: str, subject: str, value: float, margin: float, bound: float) -> dict[str, Any]:
    return {
        "check": name,
        "subject": subject,
        "value": value,
        "bound": bound,
        "interval": [value - margin + 0.001, value + margin],  # not symmetric
        "confidence": 0.95,
        "verdict": "passed",
        "detail": f"loss per byte {value:+.2%}",
        "n": 60,
        "documents_needed": None,
    }


_BEFORE = {"prose": _score(3.59, 1.208, 0.04), "code": _score(4.591, 1.463, 0.06)}
_FINAL = {"prose": _score(3.627, 1.22, 0.041), "code": _score(3.42, 1.09, 0.035)}
_GATE = [
    _check("retention", "prose", 0.0102, 0.0034, 0.05),
    _check("new_capability", "code", -0.255, 0.007, 0.0),
    {
        "check": "preservation",
        "subject": "logits",
        "value": 3.4e-7,
        "bound": 1e-4,
        "interval": None,
        "confidence": None,
        "verdict": "passed",
        "detail": "exact",
        "n": None,
        "documents_needed": None,
    },
]
SUMMARY = {
    "status": "kept",
    "baseline": _BEFORE,
    "expanded": {"prose": _score(3.5901, 1.208, 0.04), "code": _score(4.588, 1.463, 0.06)},
    "final": _FINAL,
    "gate": _GATE,
    "attempts": [{"expansion": ["width"], "final": _FINAL, "gate": _GATE, "status": "kept"}],
    "flops": {"baseline": 1.23e12, "fit": 1.9e12, "total": 3.13e12},
    "seconds": {"baseline": 28.14, "expand": 0.62, "fit": 17.2, "total": 45.96},
    "parameters": {"baseline": 170_432, "final": 532_480},
    "checkpoint": "checkpoint",
    "lineage": [],
    "domains": {"old": ["prose"], "new": ["code"]},
    "samples": [
        {"prompt": "The  function", "before": "of the ±", "after": "[red]x[/red]\nreturns"}
    ],
    "jump": {"max_absolute": 2.1e-6, "relative_to_std": 3.4e-7},
}
_CONTROL = {
    "final": {"prose": _score(3.69, 1.24, 0.041), "code": _score(3.70, 1.16, 0.035)},
    "gate": [
        _check("retention", "prose", 0.026, 0.005, 0.05),
        _check("new_capability", "code", -0.21, 0.009, 0.0),
    ],
    "status": "kept",
    "flops": 6e11,
}


@pytest.fixture
def summary() -> dict[str, Any]:
    return copy.deepcopy(SUMMARY)


@pytest.fixture
def summary_with_control(summary) -> dict[str, Any]:
    return summary | {"control": copy.deepcopy(_CONTROL)}


@pytest.fixture
def rolled_back(summary) -> dict[str, Any]:
    """The last attempt broke down, so the run's own scores are the baseline's again."""
    broken = {
        "prose": _score(7.1, 2.4, 0.1),
        "code": {"loss": None, "loss_per_byte": None, "standard_error": None, "n": 60},
    }
    gate = copy.deepcopy(_GATE)
    gate[0] |= {"value": 0.99, "interval": [0.9, 1.08], "verdict": "failed"}
    gate[1] |= {"value": None, "interval": None, "verdict": "failed", "detail": "not finite"}
    attempt = {"expansion": ["width"], "final": broken, "gate": gate, "status": "rolled_back"}
    return summary | {
        "status": "rolled_back",
        "final": _BEFORE,
        "gate": gate,
        "attempts": [*summary["attempts"], attempt],
    }

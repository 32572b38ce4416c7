"""The smallest real job: a tenth of a second per stage, on the data of the fixtures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritter.evaluation.gate import _MEMORY_BOUND, Check

FIXTURES = Path(__file__).parents[1] / "fixtures/tiny_run"
TINY = (
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "data=text",
    f"data.old={FIXTURES / 'text/old'}",
    f"data.new={FIXTURES / 'text/new.jsonl'}",
    "data.vocab_size=280",
    "data.sequence_length=32",
    "data.batch_size=4",
    "pretraining.max_steps=6",
    "training.max_steps=6",
    "evaluation.max_tokens_per_document=64",
    "evaluation.sample_tokens=4",
    "trainer.progress=off",
    "trainer.precision=32-true",
    "trainer.save_every_n_steps=4",
    "forgetting=[ewc,replay]",
    "gate=off",
    "logger=csv",
)


_BOUNDS = {"gradient_flow": 0.0, "memory": _MEMORY_BOUND, "preservation": Check.EXACT_JUMP}


def is_within(summary: Mapping[str, Any]) -> dict[str, bool]:
    """Return check → True if its value is within the gate's bound, also for an ungated run."""
    values = {check["check"]: check["value"] for check in summary["gate"]}
    return {
        name: values[name] is None or abs(values[name]) <= bound
        for name, bound in _BOUNDS.items()
        if name in values
    }

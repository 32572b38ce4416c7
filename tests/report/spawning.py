"""What summary.json says of LoRA experts, made up: two spawned, one evicted, ranks that doubled."""

from typing import Any


def experts() -> dict[str, Any]:
    """Return `experts` of a summary with all its parts."""
    return {
        "kind": "dylora",
        "number": 2,
        "names": ["base", "expert_1", "expert_3"],
        "spawned": [
            _spawn(12, 0, 1, "code", {"base": 0.41}, score=9.3),
            _spawn(40, 1, 2, "sums", {"base": 0.52, "expert_1": 0.113}, score=6.44),
            _spawn(
                64, 2, 3, "tools", {"base": 0.3, "expert_1": 0.25, "expert_2": 0.9}, score=120.0
            ),
        ],
        "events": [
            {"step": 12, "task": 0, "kind": "spawned", "expert": "expert_1", "why": "novel"},
            {"step": 30, "task": 0, "kind": "mature", "expert": "expert_1", "why": "18 steps old"},
            {"step": 35, "task": 0, "kind": "widened", "expert": "expert_1", "why": "it stalled"},
            {"step": 60, "task": 1, "kind": "evicted", "expert": "expert_2", "why": "least used"},
            {"step": 80, "task": 2, "kind": "refused", "expert": "expert_4", "why": "the cooldown"},
        ],
        "states": {"expert_1": "mature", "expert_3": "young"},
        "usage": {
            "prose": {"base": 0.98, "expert_1": 0.02, "expert_3": 0.0},
            "code": {"base": 0.1, "expert_1": 0.85, "expert_3": 0.05},
        },
        "usage_over_time": {
            "steps": [10, 20, 50, 90],
            "gates": {
                "base": [1.0, 0.7, 0.5, 0.4],
                "expert_1": [None, 0.3, 0.3, 0.35],
                "expert_2": [None, None, 0.2, None],
                "expert_3": [None, None, None, 0.25],
            },
        },
        "ranks": {"expert_1": 16, "expert_3": 8},
        "ranks_over_time": {
            "steps": [12, 35, 64],
            "ranks": {"expert_1": [8, 16, 16], "expert_3": [None, None, 8]},
        },
        "parameters": {"base": 400_000, "trainable": 12_400, "share": 0.031},
        "batches": {"known": 120, "new": 6, "unsure": 2, "idle": 4},
        "routing": {"top_k": 2, "temperature": 0.5},
    }


def _spawn(
    step: int, task: int, number: int, domain: str, similarity: dict[str, float], *, score: float
) -> dict[str, Any]:
    name = f"expert_{number}"
    return {
        "step": step,
        "task": task,
        "expert": name,
        "skill": name,
        "domain": domain,
        "similarity": similarity,
        "score": score,
        "threshold": 6.0,
        "batches": 2,
        "samples": 32,
    }

"""What summary.json says of a growth, made up: as large as asked, and every sum as it has to be."""

from typing import Any

EVERY = 12  # steps between two checks
PER_NEURON = 3 * 64


def growth(
    *, layers: int = 2, checks: int = 17, grows_every: int = 3, replaces: bool = False
) -> dict[str, Any]:
    """Return `growth` of a summary: at each so-manieth check one layer grows by ten neurons."""
    widths, parameters = [192] * layers, 169_000
    seen: dict[str, list[Any]] = {"steps": [], "neurons": [], "pressure": []}
    events: list[dict[str, Any]] = []
    for check in range(1, checks + 1):
        step, layer = EVERY * check, check // grows_every % layers if grows_every else 0
        seen["steps"].append(step)
        seen["neurons"].append(list(widths))
        pressure = [0.02 * (1 + 0.3 * ((check * (n + 3)) % 7)) for n in range(layers)]
        seen["pressure"].append(pressure)
        if grows_every and check % grows_every == 0:
            replaced = 4 if replaces and check % (2 * grows_every) == 0 else 0
            widths[layer] += 10 - replaced
            parameters += (10 - replaced) * PER_NEURON
            events.append(
                {
                    "step": step,
                    "layer": layer,
                    "born": 10 - replaced,
                    "replaced": replaced,
                    "died": replaced // 4,
                    "neurons": widths[layer],
                    "pressure": pressure[layer],
                    "function_change": 1e-8 * check,
                    "parameters": parameters,
                    "flops": 1e9 * step,
                    "trigger": "percentile",
                    "initialiser": "gradmax",
                }
            )
    return {
        "options": {"trigger": "percentile", "initialiser": "gradmax", "growth_cooldown": 25},
        "advice": "a lower growth.gradient_percentile",
        "events": events,
        **{name: sum(event[name] for event in events) for name in ("born", "replaced", "died")},
        "checks": checks,
        "neurons": {"before": [192] * layers, "after": widths},
        "parameters": {"before": 169_000, "after": parameters},
        "young": 10 if events else 0,
        "map": seen,
        "function_change": max((event["function_change"] for event in events), default=None),
        "update_norms": {"young": 0.012, "old": 0.009} if events else None,
    }

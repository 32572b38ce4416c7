"""What the page says of its figures: their titles, and how each is read."""

from tritter.report.runs import CONFIDENCE

TITLES = {
    "tradeoff": "Retention against gain",
    "losses": "Losses over tokens",
    "changes": "Changes by domain",
    "cost": "Cost",
    "growth": "Neuron growth",
    "experts": "LoRA experts",
    "matrix": "After each task",
}
_OVER_SEEDS = f"Groups of several seeds: mean with Student's {CONFIDENCE:.0%} interval"
CAPTIONS = {
    "tradeoff": f"Right and low is good; dotted: what nothing beats in both. {_OVER_SEEDS}; pale: "
    "each seed; single runs: one-sided bounds of the gate, over documents. Hollow: the control, "
    "the base that did not grow.",
    "losses": "Validation: always the same part of the text, so a rise on old text is forgetting "
    "while it happens. Dashed vertical: an expansion; the level before it stands at its left. "
    "Dash-dotted: the next task begins. Dotted vertical, in the colour of its run, of several runs "
    "at the foot: neurons grew. Dashed curves, hollow marks: the control. Pale: every point, where "
    "the curve is a running mean.",
    "changes": f"From before the expansion to the end. {_OVER_SEEDS}; single runs: one-sided "
    "bounds of the gate. Hollow: the control.",
    "cost": "The last attempt or all rounds: what methods prepare, and training; the table has the "
    "whole run. Seconds depend on what else the machine did: compare those of one sweep only. "
    f"{_OVER_SEEDS}.",
    "growth": "Each layer's neurons over the training, against those it began with; triangles: "
    "neurons were born; circles: dead ones were replaced. Pressure, what the trigger goes by: the "
    "mean gradient norm of a layer's neurons, as a moving average, in proportion to that of the "
    "whole gradient; each check's is drawn back to the check before. FLOPs end with the last row "
    "of metrics.csv.",
    "experts": "Routing: mean gates on held-out text, which is none of the training's; similarity: "
    "of an expert's first batches to what was known, when it was spawned. Triangles: spawns; "
    "dash-dotted: the next task begins.",
    "matrix": "Rows: the model before the first task and after each one; columns: domains. "
    "Numbers: nats per byte on all validation documents; colours: the change from the first row. "
    "Framed: what the task was about.",
}

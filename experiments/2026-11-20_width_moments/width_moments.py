"""After a doubling of the width: moments, rates by share and inits compared.

    python experiments/2026-11-20_width_moments/width_moments.py

Rows that results.csv has already are not computed again. The part `step` writes function_step.csv:
how far one step of the optimizer moves the function, beside the step of the base itself.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from width_arms import (  # noqa: E402
    WIDTHS,
    ZERO_SECOND,
    Arm,
    Sizes,
    backward,
    base_of,
    grow,
    grown_as,
    optimizer_after,
    prose_batches,
    run,
    scaled_step,
    sequences,
    update_factors,
)

from tritter.core.expansions import Width  # noqa: E402

STEPS = 250
REWARM_STEPS = 25
SHORT_STEPS = 100
# Chosen by `rates` on seed 0
TUNED = {"ungrown": 7.5e-4, "fresh": 7.5e-4, "net2net": 7.5e-4, "share": 1.5e-3}
RATES = (7.5e-4, 1.5e-3, 3e-3)
STEP_WIDTHS: dict[str, Width] = {
    "ffn_net2net": Width(init="net2net", hidden_size=64, intermediate_size=384),
    "ffn_net2net_equal": Width(
        init="net2net", hidden_size=64, intermediate_size=384, shares="equal"
    ),
    "ffn_fresh": Width(hidden_size=64, intermediate_size=384),
    "net2net": Width(init="net2net"),
    "net2net_equal": Width(init="net2net", shares="equal"),
    "zero_pad": Width(init="zero_pad"),
    "fresh": Width(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionStep:
    """One step of a grown model, moments carried, beside the same step of its base.

    Args:
        moved: ‖Δ logits‖ over the base's.
        loss_change: on the batch of the step, over the base's.
    """

    growth: str
    factor: str
    learning_rate: float
    seed: int
    moved: float
    loss_change: float


def rate_arms(seeds: Sequence[int]) -> Iterator[Arm]:
    """Yield the arms that choose the rates of a family: one seed."""
    for growth, rate in product(("ungrown", "fresh", "net2net"), RATES):
        yield Arm(part="rates", growth=growth, learning_rate=rate, steps=STEPS, seed=seeds[0])
    for rate in RATES:
        yield Arm(
            part="rates",
            growth="net2net",
            factor="share",
            learning_rate=rate,
            steps=STEPS,
            seed=seeds[0],
        )


def moment_arms(seeds: Sequence[int]) -> Iterator[Arm]:
    """Yield question A; `reset_new` under `fresh`, which makes no copies, would be `carry`."""
    policies = [("net2net", policy) for policy in ("carry", "zero", "reset_new")]
    policies += [
        (growth, policy) for growth in ("fresh", "ungrown") for policy in ("carry", "zero")
    ]
    for seed in seeds:
        for growth, policy in policies:
            yield _arm("moments", growth, seed, policy=policy)
        yield _arm("moments", "net2net", seed, factor="share")


def beginning_arms(seeds: Sequence[int]) -> Iterator[Arm]:
    """Yield the rest of question A, whose differences the first 100 steps show."""
    cleared = (("fresh", f"carry{ZERO_SECOND}"), ("net2net", f"reset_new{ZERO_SECOND}"))
    for (growth, policy), seed in product(cleared, seeds):
        yield _arm("beginning", growth, seed, policy=policy, steps=SHORT_STEPS)
    warmed = (("net2net", "carry"), ("fresh", "carry"), ("net2net", "reset_new"))
    for (growth, policy), seed in product(warmed, seeds):
        yield _arm(
            "beginning",
            growth,
            seed,
            policy=policy,
            rewarm_steps=REWARM_STEPS,
            steps=SHORT_STEPS,
        )


def init_arms(seeds: Sequence[int]) -> Iterator[Arm]:
    """Yield question B on the base's own distribution."""
    for seed, growth in product(seeds, WIDTHS):
        yield _arm("inits", growth, seed, steps=SHORT_STEPS if growth == "aki" else STEPS)


def domain_arms(seeds: Sequence[int]) -> Iterator[Arm]:
    """Yield question B on code with replay: a new optimizer, warmed up, as the default job has."""
    growths = ("fresh", "net2net", "random_padding", "ungrown")
    for seed, growth in product(seeds, growths):
        yield _arm(
            "domain",
            growth,
            seed,
            policy="zero",
            rewarm_steps=REWARM_STEPS,
            domain="code",
            steps=SHORT_STEPS,
        )


def _arm(
    part: str,
    growth: str,
    seed: int,
    *,
    policy: str = "carry",
    rewarm_steps: int = 0,
    factor: str = "none",
    domain: str = "prose",
    steps: int = STEPS,
) -> Arm:
    family = "share" if factor == "share" else growth
    if family not in TUNED:
        family = "net2net" if WIDTHS[growth].init in ("net2net", "aki") else "fresh"
    return Arm(
        part=part,
        growth=growth,
        policy=policy,
        rewarm_steps=rewarm_steps,
        factor=factor,
        learning_rate=TUNED[family],
        domain=domain,
        steps=steps,
        seed=seed,
    )


PARTS = {
    "rates": rate_arms,
    "moments": moment_arms,
    "inits": init_arms,
    "beginning": beginning_arms,
    "domain": domain_arms,
}


def function_steps(seed: int, sizes: Sizes) -> Iterator[FunctionStep]:
    """Yield how far one step moves the grown functions, at the base's rate and at a hundredth."""
    batches = prose_batches(seed, sizes)
    batches.load_state_dict(base_of(seed, sizes).place)
    batch = next(iter(batches))["input_ids"]
    probe = sequences("prose", "validation", seed=seed, sizes=sizes)[:16].long()
    for rate in (3e-5, 3e-3):
        base = base_of(seed, sizes)
        before, loss = logits(base.model, probe), backward(base.model, batch)
        own = grown_as("ungrown", base.model, seed=seed)
        optimizer_after(base, own, policy="carry", learning_rate=rate).step()
        own_move = (logits(base.model, probe) - before).norm()
        own_change = backward(base.model, batch) - loss
        for (growth, spec), factor in product(STEP_WIDTHS.items(), ("none", "share", "weight")):
            if "fresh" in growth and factor != "none":
                continue  # no copies: every share is 1
            base = base_of(seed, sizes)
            grown = grow(base.model, spec, seed=seed)
            optimizer = optimizer_after(base, grown, policy="carry", learning_rate=rate)
            loss = backward(grown.model, batch)
            scaled_step(optimizer, update_factors(grown, factor))
            move = (logits(grown.model, probe) - before).norm()
            change = backward(grown.model, batch) - loss
            yield FunctionStep(
                growth=growth,
                factor=factor,
                learning_rate=rate,
                seed=seed,
                moved=round(float(move / own_move), 4),
                loss_change=round(change / own_change, 4),
            )


@torch.inference_mode()
def logits(model: nn.Module, rows: Tensor) -> Tensor:
    return model(input_ids=rows, use_cache=False).logits


def append(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Add rows to a table at once, so that an interrupted experiment keeps what it has."""
    is_new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def key_of(row: Mapping[str, object]) -> tuple[str, ...]:
    """Return what tells arms apart; two parts may share an arm."""
    return tuple(str(row[field.name]) for field in fields(Arm) if field.name != "part")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table; of one that does not exist, none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "step"), default=(*PARTS, "step"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Sizes().cache)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args(words)
    sizes = Sizes(cache=given.cache)
    for part in given.parts:
        if part == "step":
            path = given.output / "function_step.csv"
            known = {row["seed"] for row in read(path)}
            for seed in given.seeds:
                if str(seed) not in known:
                    append(path, [asdict(row) for row in function_steps(seed, sizes)])
            continue
        for arm in PARTS[part](given.seeds):
            path = given.output / "results.csv"
            if key_of(asdict(arm)) not in map(key_of, read(path)):
                append(path, run(arm, sizes))


if __name__ == "__main__":
    main()

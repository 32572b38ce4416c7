"""Print the tables of README.md.

python experiments/2026-11-24_depth_by_choice/summarise.py
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from scipy.stats import spearmanr  # noqa: E402

from experiments.jobs import Row, rows_of, with_interval  # noqa: E402

MEASURES = ("skip", "influence", "fisher")
DOMAINS = ("prose", "code")

Arm = tuple[str, str]  # rule, init
Losses = dict[int, dict[int, dict[str, float]]]  # budget → seed → domain or "mean" → loss


def losses(rows: Iterable[Row]) -> dict[Arm, Losses]:
    """Return the losses of each arm; `random` is the mean of both draws of a seed."""
    found: dict[tuple[Arm, int, int], list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        arm = (row["arm"].removesuffix("_1").removesuffix("_2"), row["init"])
        each = {domain: float(row[domain]) for domain in DOMAINS}
        each["mean"] = fmean(each.values())
        found[arm, int(row["budget"]), int(row["seed"])].append(each)
    by_arm: dict[Arm, Losses] = defaultdict(lambda: defaultdict(dict))
    for (arm, budget, seed), draws in found.items():
        by_arm[arm][budget][seed] = {key: fmean(d[key] for d in draws) for key in draws[0]}
    return by_arm


def shown(values: Sequence[float]) -> str:
    """Return a mean with its 95 % interval (Student's t)."""
    return with_interval(values, ".4f", sign="+")


def differences(first: Losses, second: Losses, budget: int, key: str = "mean") -> list[float]:
    pair = first[budget], second[budget]
    return [pair[0][seed][key] - pair[1][seed][key] for seed in sorted(pair[0])]


def importance_table(rows: Sequence[Row]) -> None:
    layers = sorted({int(row["layer"]) for row in rows})
    print("| measure |", *(f"{layer} |" for layer in layers))
    print("|---|" + "---|" * len(layers))
    for measure in MEASURES:
        means = (fmean(float(r[measure]) for r in rows if int(r["layer"]) == n) for n in layers)
        print(f"| {measure} |", *(f"{mean:.3f} |" for mean in means))


def arm_table(found: dict[Arm, Losses]) -> None:
    budgets = sorted(next(iter(found.values())))
    for inits in (("plain", "average", "lesa", "lesa_long", "none"), ("identity",)):
        reference = ("even", "plain") if "plain" in inits else ("llama_pro", "identity")
        print("\n| rule | init |", *(f"{n} steps |" for n in budgets), "prose, end | code, end |")
        print("|---|---|" + "---|" * (len(budgets) + 2))
        for (rule, init), arm in found.items():
            if init not in inits:
                continue
            cells = [shown(differences(arm, found[reference], n)) for n in budgets]
            cells += [shown(differences(arm, found[reference], budgets[-1], d)) for d in DOMAINS]
            if (rule, init) == reference:
                ends = [[each["mean"] for each in arm[n].values()] for n in budgets]
                ends += [[each[d] for each in arm[budgets[-1]].values()] for d in DOMAINS]
                cells = [f"{fmean(values):.4f}" for values in ends]
            print(f"| {rule} | {init} |", *(f"{cell} |" for cell in cells))


def init_table(found: dict[Arm, Losses]) -> None:
    """Print differences between inits at the same positions."""
    budgets = sorted(next(iter(found.values())))
    print("\n| inits | rule |", *(f"{n} steps |" for n in budgets))
    print("|---|---|" + "---|" * len(budgets))
    rules = [rule for rule, init in found if init == "plain" and rule != "stack"]
    pairs = [("identity", "plain", rule) for rule in rules]
    for first, second in (("average", "identity"), ("lesa", "identity"), ("lesa", "average")):
        pairs += [(first, second, rule) for rule in ("even", "top")]
    for first, second, rule in pairs:
        pair = found[rule, first], found[rule, second]
        cells = (f"{shown(differences(*pair, n))} |" for n in budgets)
        print(f"| {first} \N{MINUS SIGN} {second} | {rule} |", *cells)


def first_layer_table(rows: Sequence[Row]) -> None:
    """Print the mean loss of tables that copy layer 0, minus that of the others of a seed."""
    budgets = sorted({int(row["budget"]) for row in rows})
    print("\n| init |", *(f"{n} steps |" for n in budgets))
    print("|---|" + "---|" * len(budgets))
    for init in ("plain", "identity"):
        cells = []
        for budget in budgets:
            of_seed: dict[str, dict[str, float]] = defaultdict(dict)
            for row in rows:
                if (row["init"], int(row["budget"])) == (init, budget) and row["positions"]:
                    loss = fmean(float(row[domain]) for domain in DOMAINS)
                    of_seed[row["seed"]][row["positions"]] = loss
            changes = []
            for tables in of_seed.values():
                sides = [[loss for at, loss in tables.items() if (at[0] == "0") is has_first]
                         for has_first in (True, False)]  # fmt: skip
                changes.append(fmean(sides[0]) - fmean(sides[1]))
            cells.append(f"{shown(changes)} |")
        print(f"| {init} |", *cells)


def rank_table(rows: Sequence[Row], scores: Sequence[Row]) -> None:
    """Print rank correlations within seeds of the summed importance and the loss."""
    of_layer = {(r["seed"], int(r["layer"])): r for r in scores}
    budgets = sorted({int(row["budget"]) for row in rows})
    print("\n| init | measure |", *(f"{n} steps |" for n in budgets[1:]))
    print("|---|---|" + "---|" * (len(budgets) - 1))
    for init in ("plain", "identity"):
        for measure in MEASURES:
            cells = []
            for budget in budgets[1:]:
                found = []
                for seed in sorted({row["seed"] for row in rows}):
                    key = (seed, init, str(budget))
                    points = {
                        row["positions"]: float(row["prose"]) + float(row["code"])
                        for row in rows
                        if (row["seed"], row["init"], row["budget"]) == key and row["positions"]
                    }
                    sums = [
                        sum(float(of_layer[seed, int(layer)][measure]) for layer in text.split())
                        for text in points
                    ]
                    found.append(float(spearmanr(sums, list(points.values())).statistic))
                cells.append(shown(found))
            print(f"| {init} | {measure} |", *(f"{cell} |" for cell in cells))


def main() -> None:
    scores, rows = rows_of(FOLDER / "importance.csv"), rows_of(FOLDER / "results.csv")
    importance_table(scores)
    arm_table(losses(rows))
    init_table(losses(rows))
    first_layer_table(rows)
    rank_table(rows, scores)


if __name__ == "__main__":
    main()

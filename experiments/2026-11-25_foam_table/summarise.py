"""The tables of the README, from results.csv: means over seeds with 95 % intervals.

python experiments/2026-11-25_foam_table/summarise.py
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import Row, rows_of, with_interval  # noqa: E402

SKILLS = ("tool_call", "identity", "reasoning")
BENCHMARKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "lambada")


def main() -> None:
    """Print what each arm learned, then what it kept."""
    arms: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(FOLDER / "results.csv"):
        name = f"{row['arm']}, {float(row['rate']):g}, {row['steps']}"
        arms[name][row["measure"]].append(row)
    learned = [f"{skill}/{kind}" for skill in SKILLS for kind in ("accuracy", "probes")]
    table(arms, ["seeds", *learned], lambda rows: with_interval(percents(rows, "after"), ".1f"))
    print()
    kept = [*BENCHMARKS, "arc_easy, chat", "arc_challenge, chat", "dolly", "arc"]
    table(arms, ["seeds", *kept], change)


def table(
    arms: Mapping[str, Mapping[str, list[Row]]],
    columns: Sequence[str],
    cell: Callable[[list[Row]], str],
) -> None:
    """Print one row per arm, one column per measure."""
    print(f"| arm | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for arm, measures in arms.items():
        cells = [arm, str(max(len(rows) for rows in measures.values()))]
        cells += [cell(measures[name]) if name in measures else "" for name in columns[1:]]
        print(f"| {' | '.join(cells)} |")


def percents(rows: list[Row], column: str) -> list[float]:
    """Return the values of a column in per cent."""
    return [100 * float(row[column]) for row in rows]


def change(rows: list[Row]) -> str:
    """Return the change of a measure; with one seed, its interval over questions."""
    text = with_interval((float(row["change"]) for row in rows), ".2f", sign="+")
    if len(rows) == 1:
        interval = f" [{rows[0]['low']}, {rows[0]['high']}]"
        text += interval.replace("-", "\N{MINUS SIGN}")
    return text


if __name__ == "__main__":
    main()

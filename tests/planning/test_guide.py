"""The size guide: figures that are known, and the table in the docs."""

from pathlib import Path

import pytest

from tritter.planning.guide import size_guide
from tritter.report.wording import count_text

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "planning.md"


def test_counts_that_are_known() -> None:
    counts = [(row.source_parameters, row.target_parameters) for row in size_guide()]
    billions = [(round(source / 1e9, 2), round(target / 1e9, 2)) for source, target in counts]
    assert billions == [(1.74, 3.35), (1.74, 3.82), (7.24, 10.73), (7.24, 11.23), (7.24, 46.70)]


def test_every_row_of_the_appendix_is_there() -> None:
    stated = [(r.source, r.target, r.layers, r.hidden_size, r.stated) for r in size_guide()]
    assert stated == [
        ("3B", "7B", "24→48", "2048", "6.7B"),
        ("3B", "7B", "24", "2048→3072", "6.9B"),
        ("7B", "10B", "32→48", "4096", "10.7B"),
        ("7B", "14B", "32", "4096→5120", "13.8B"),
        ("7B", "70B", "32", "4096", "8x7B experts"),
    ]


@pytest.mark.parametrize(
    ("position", "figures"),
    [
        (0, ["1.88 B", "1.35 B", "5.83 B"]),
        (1, ["3.82 B", "6.64 B"]),
        (2, ["8 key/value heads", "14336", "9.98 B"]),
        (3, ["11.23 B", "13.75 B", "20480", "13.54 B"]),
        (4, ["56 B", "70 B", "12.9 B"]),
    ],
)
def test_notes_say_what_would_give_the_figures(position: int, figures: list[str]) -> None:
    note = size_guide()[position].note
    assert not [figure for figure in figures if figure not in note]


def test_the_table_in_the_docs_is_the_computed_one() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for row in size_guide():
        cells = [
            f"{row.source} → {row.target}", row.method, row.layers, row.hidden_size, row.stated,
            f"{count_text(row.source_parameters)} → {count_text(row.target_parameters)}",
            f"{row.shape}. {row.note}",
        ]  # fmt: skip
        assert f"| {' | '.join(cells)} |" in text, row

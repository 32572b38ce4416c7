"""The size guide: published figures and the table in the docs."""

import re
from pathlib import Path

from tritter.core.expansions import Dus, ExpansionSpec, Moe, Width, target_model
from tritter.core.families import Config, Model
from tritter.core.families.presets import PRESETS
from tritter.planning.guide import _llama, size_guide
from tritter.report.table import count_text

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/reference/planning.md"


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


def with_sizes(model: Model, sizes: Config) -> Model:
    return model.changed({**model.config, **sizes})


def billions(model: Model, spec: ExpansionSpec | None = None) -> str:
    grown = model if spec is None else target_model(model, [spec])
    return f"{grown.num_parameters / 1e9:.2f} B"


def test_what_the_docs_say_would_give_the_figures() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\| \d+B → \d+B \|", line)]
    small = _llama(layers=24, hidden_size=2048, intermediate_size=8192, heads=16)
    llama2 = _llama(layers=32, hidden_size=4096, intermediate_size=11_008, heads=32)
    plain_mlp = _llama(layers=32, hidden_size=5120, intermediate_size=4 * 5120, heads=40)
    three, seven, large = (Model(PRESETS[f"tritter_{n}b"].config()) for n in (3, 7, 14))
    mixture = target_model(seven, [Moe(num_experts=8, experts_per_token=2)])
    active = mixture.num_active_parameters
    figures = (
        [
            billions(small), billions(with_sizes(small, {"vocab_size": 65_536})),
            billions(with_sizes(small, {"intermediate_size": 5504})), billions(three),
            billions(three, Dus(target_layers=56)),
        ],
        [billions(small, Width(hidden_size=3072)), billions(three, Width(hidden_size=4608))],
        [billions(llama2), billions(llama2, Dus(target_layers=48))],
        [billions(seven, Width(hidden_size=5120)), billions(plain_mlp), billions(large)],
        [f"{active / 1e9:.1f} B"],
    )  # fmt: skip
    for line, expected in zip(lines, figures, strict=True):
        assert not [figure for figure in expected if figure not in line], line


def test_the_table_in_the_docs_is_the_computed_one() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for row in size_guide():
        cells = [
            f"{row.source} → {row.target}", row.method, row.layers, row.hidden_size, row.stated,
            f"{count_text(row.source_parameters)} → {count_text(row.target_parameters)}",
            f"{row.shape}. ",
        ]  # fmt: skip
        assert f"| {' | '.join(cells)}" in text, row

import io

import pytest

from tritter.report.summary import Summary
from tritter.report.table import count_text, ratio_text, si_text
from tritter.report.tables import SummaryTables
from tritter.terminal import Console


def printed(summary, *, encoding="utf-8", folder=None, width=80):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width)
    SummaryTables(Summary.of(summary)).print(console=console, folder=folder)
    file.flush()
    return raw.getvalue().decode(encoding)


def line_of(text, *starts):
    words = [line.replace("|", " ").split() for line in text.splitlines()]
    return next(line for line in words if line[: len(starts)] == list(starts))


def test_table_holds_the_numbers(summary):
    text = printed(summary)
    assert line_of(text, "prose") == [
        "prose", "old", "3.590", "3.590", "3.627", "+1.02", "[+0.78,", "+1.36]", "passed",
    ]  # fmt: skip
    assert line_of(text, "code") == [
        "code", "new", "4.591", "4.588", "3.420", "-25.50", "[-26.10,", "-24.80]", "passed",
    ]  # fmt: skip
    assert line_of(text, "baseline") == ["baseline", "28.1", "1.23", "T"]
    assert line_of(text, "expand") == ["expand", "0.6", "0"]
    assert line_of(text, "total") == ["total", "46.0", "3.13", "T"]
    assert line_of(text, "status") == ["status", "kept"]
    assert "170 k → 532 k (3.12 times)" in text
    assert "2.1e-06" in text and "3.4e-07" in text
    assert "one-sided 95% bounds" in text
    assert "control" not in text


def ungated(summary):
    """Return the summary as `gate=off` would have left it."""
    gate = [check | {"verdict": "reported", "bound": None} for check in summary["gate"]]
    attempt = summary["attempts"][0] | {"gate": gate, "status": "ungated"}
    return summary | {"status": "ungated", "gate": gate, "attempts": [attempt]}


def test_nothing_of_an_ungated_run_is_green(summary):
    for run, is_green in ((summary, True), (ungated(summary), False)):
        file = io.StringIO()
        console = Console(file=file, width=80, color_system="standard", force_terminal=True)
        SummaryTables(Summary.of(run)).print(console=console)
        assert ("\x1b[32m" in file.getvalue() or "\x1b[1;32m" in file.getvalue()) is is_green
    assert line_of(printed(ungated(summary)), "status")[:2] == ["status", "ungated:"]
    assert line_of(printed(ungated(summary)), "prose")[-1] == "reported"


def test_a_broken_off_training_is_named_though_it_is_ungated(summary):
    run = ungated(summary)
    check = {"check": "training", "subject": "steps", "verdict": "reported", "value": 3.0}
    run["attempts"][0]["gate"].append(check | {"detail": "not finite at step 17"})
    assert "not finite at step 17" in printed(run)


def test_what_did_not_grow_has_no_score_of_it(summary):
    summary["attempts"][0]["expansion"] = []
    text = printed(summary)
    assert line_of(text, "domain") == ["domain", "role", "before", "trained", "change", "verdict"]
    assert line_of(text, "prose")[:5] == ["prose", "old", "3.590", "3.627", "+1.02"]


def test_a_bound_that_is_not_known_is_a_question_mark(summary):
    summary["attempts"][0]["gate"][0]["interval"] = [0.0078, None]
    assert line_of(printed(summary), "prose")[5:] == ["+1.02", "[+0.78,", "?]", "passed"]


def test_control_has_its_own_rows(summary_with_control):
    text = printed(summary_with_control)
    rows = text[text.index("control:") :]
    assert line_of(rows, "prose") == [
        "prose", "old", "3.590", "-", "3.690", "+2.60", "[+2.20,", "+3.10]", "passed",
    ]  # fmt: skip
    summary_with_control["control"]["steps"] = 60
    text = printed(summary_with_control | {"rounds": summary_with_control["attempts"] * 2})
    assert "control: same training, not grown, 60 steps from the base" in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_fits_80_columns_on_any_terminal(summary_with_control, encoding):
    summary_with_control["domains"]["old"] = ["a_very_long_domain_näme"]
    for scores in ("baseline", "expanded"):
        scored = summary_with_control[scores]
        scored["a_very_long_domain_näme"] = scored["prose"]
    text = printed(summary_with_control, encoding=encoding)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "a_very_lo.." in text
    rows = [line for line in text.splitlines() if line.startswith("a_very_lo..")]
    assert len(rows) == 2 and all("old" in row and "3.590" in row for row in rows)
    assert text.isascii() == (encoding == "ascii")


def test_narrow_ascii_terminal_loses_no_digit(summary_with_control):
    text = printed(summary_with_control, encoding="ascii", width=44)
    assert max(map(len, text.splitlines())) <= 44
    cells = [line.split("|") for line in text[: text.index("Cost")].splitlines() if "|" in line]
    columns = ["".join(line[index].strip() for line in cells) for index in range(7)]
    for index, digits in ((2, "4.591"), (3, "4.588"), (4, "3.420"), (5, "-25.50")):
        assert digits in columns[index]


def test_ascii_terminal_gets_words_for_signs_and_samples_as_they_are(summary):
    text = printed(summary, encoding="ascii")
    assert "170 k -> 532 k" in text
    assert r"of the \xb1" in text
    assert "[red]x[/red] returns" in text, "a sample is text, not markup"


def test_rollback_shows_what_was_refused_and_why(rolled_back):
    text = printed(rolled_back)
    assert "rolled back: the checkpoint is the baseline" in text
    assert line_of(text, "prose")[4:] == ["7.100", "+99.00", "[+90.00,", "+108.00]", "failed"]
    assert line_of(text, "code")[4:] == ["-", "-", "failed"]
    assert line_of(text, "attempts")[1] == "2;"
    assert line_of(text, "failed", "new_capability") == [
        "failed", "new_capability", "of", "code:", "not", "finite",
    ]  # fmt: skip


def test_attempts_have_the_changes_of_their_tables(rolled_back):
    """A check of an accuracy states a drop, and one after several tasks another start."""
    rolled_back["baseline"]["code"] = rolled_back["baseline"]["code"] | {"accuracy": 0.5}
    first = rolled_back["attempts"][0]
    first["final"]["code"] = first["final"]["code"] | {"accuracy": 0.6}
    check = first["gate"][1]
    more = [check | {"subject": "code/accuracy", "value": -0.1}]
    more += [check | {"check": "retention", "value": 0.4}]
    first["gate"] = [*first["gate"], *more]
    line = "1: as requested: prose +1.0%, code -25.5%, code accuracy +10.0 points; kept"
    assert line in printed(rolled_back, width=160)
    table = SummaryTables(Summary.of(rolled_back)).attempts()
    assert table.caption == "Loss after each attempt [nats/token]"
    assert table.header[1:] == ("prose", "code", "code accuracy", "verdict")
    assert table.rows[0][1:] == ("3.627", "3.420", "60.0%", "kept")
    rolled_back["attempts"][0]["jump"] = {"new_token_mass": 0.1}
    table = SummaryTables(Summary.of(rolled_back)).attempts()
    assert table.caption == "Loss after each attempt [nats/byte]" and table.rows[0][1] == "1.220"


def test_undecided_says_how_many_documents(summary):
    summary["status"] = "undecided"
    check = summary["attempts"][0]["gate"][0]
    check |= {"verdict": "undecided", "detail": "about 812 documents would decide"}
    text = printed(summary)
    assert "undecided: inconclusive, the trained checkpoint is kept" in text
    assert "812 documents" in text


def test_checkpoint_path_is_one_line_to_copy(summary, tmp_path):
    folder = tmp_path / ("long" * 30)
    assert str(folder / "checkpoint") in printed(summary, folder=folder)


def test_colours_are_only_an_extra(summary):
    plain = printed(summary)
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    SummaryTables(Summary.of(summary)).print(console=console)
    assert "\x1b[32mpassed" in file.getvalue() and "\x1b" not in plain


def test_bare_summary_of_a_run_that_broke_early_still_prints(summary):
    for key in ("expanded", "jump", "samples", "parameters", "gate", "seconds"):
        del summary[key]
    summary["attempts"] = []
    assert line_of(printed(summary), "prose")[:4] == ["prose", "old", "3.590", "3.627"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1.00 k"),
        (170_432, "170 k"),
        (3.4e12, "3.40 T"),
        (999.6e15, "1.00 E"),
        (None, "-"),
    ],
)
def test_counts(value, text):
    assert count_text(value) == text


def test_billions_of_parameters_are_not_giga() -> None:
    assert (count_text(7.24e9), si_text(7.24e9)) == ("7.24 B", "7.24 G")


def test_each_stage_has_seconds_and_flops(summary) -> None:
    summary |= {"seconds": {"fit": 2.0, "gate": 0.1}, "flops": {"fit": 1e12}}
    text = printed(summary)
    text = text[text.index("Cost") :]
    assert line_of(text, "fit") == ["fit", "2.0", "1.00", "T"]
    assert line_of(text, "gate") == ["gate", "0.1", "0"]


def test_stages_keep_their_order_and_end_with_the_total(summary) -> None:
    summary |= {"seconds": {"a": 1.0, "total": 3.0}, "flops": {"a": 1.0, "b": 2.0, "total": 3.0}}
    assert [row[0] for row in SummaryTables(Summary.of(summary)).stages().rows] == [
        "a",
        "b",
        "total",
    ]


def test_what_own_methods_and_stages_report_is_a_table(summary) -> None:
    pulls = [[0, 0.0], [10, 0.15417]]
    summary["methods"] = {"tether": {"fits": [{"steps": 30, "norms": [0.5] * 30, "pulls": pulls}]}}
    summary["stages"] = {"drift": {"largest": ["a", "b"], "shares": {str(n): n for n in range(30)}}}
    table = SummaryTables(Summary.of(summary)).outside()
    assert table.rows[0] == ("drift", "largest", "a, b")
    assert table.rows[-4:] == (
        ("tether", "fits.0.steps", "30"),
        ("tether", "fits.0.norms", "30 values"),
        ("tether", "fits.0.pulls.0", "0, 0"),
        ("tether", "fits.0.pulls.1", "10, 0.1542"),
    )
    assert len(table.rows) == 24 and table.caption == "11 values of drift more are in summary.json"
    assert line_of(printed(summary), "tether", "fits.0.steps")[2:] == ["30"]


def test_control_characters_of_a_sample_never_reach_the_terminal():
    assert Console().printable("a\x1b[2Jb") == r"a\x1b[2Jb"


def test_little_growth_is_a_percentage():
    texts = {ratio: ratio_text(ratio) for ratio in (3.667, 1.1, 1.0012, 0.97, 1.0)}
    assert list(texts.values()) == ["3.67 times", "1.1 times", "+0.12 %", "-3 %", "unchanged"]

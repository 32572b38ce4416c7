"""The page: everything in one file, nothing loaded, and text of runs is text."""

from html.parser import HTMLParser
from typing import Any

from tests.report.test_runs import SETTINGS
from tritter.report.page import page
from tritter.report.plots import Curve
from tritter.report.runs import Run

HOSTILE = "<script>alert(1)</script>"


class Seen(HTMLParser):
    """What a browser would meet."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def seen(text: str) -> Seen:
    parser = Seen()
    parser.feed(text)
    return parser


def run_of(summary: dict[str, Any], name: str, seed: int) -> Run:
    curves = (
        Curve("eval/prose/loss", (-1, 0, 10), (3.0, 3.1, 3.2)),
        Curve("train/loss", (5, 10), (4.0, 3.9)),
    )
    return Run(
        name=name,
        summary=summary | {"seed": seed, "expansion": ["width"], "forgetting": ["ewc"]},
        settings=SETTINGS | {"seed": seed},
        curves=curves,
        history=("base", "  grown"),
    )


def test_it_holds_everything_and_loads_nothing(summary_with_control: dict[str, Any]) -> None:
    runs = [run_of(summary_with_control, f"run{seed}", seed) for seed in range(2)]
    text, pictures = page(runs, title="A sweep")
    found = seen(text)
    assert list(pictures) == ["tradeoff.png", "losses.png", "changes.png", "cost.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    images = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 4 and all(str(s).startswith("data:image/png;base64,") for s in images)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert all(a.get("href", "#").startswith("#") for _, a in found.tags)  # type: ignore[union-attr]
    words = " ".join(" ".join(found.words).split())
    for expected in (
        "2 finished runs in 1 groups",
        "+1.02 [+0.78, +1.36]",  # of the gate, as the run's own table has it
        "Settings that differ",
        "old, control",
        "base grown",
    ):
        assert expected in words
    assert sum(tag == "details" for tag, _ in found.tags) == 2


def test_text_of_a_run_is_text(summary: dict[str, Any]) -> None:
    summary["samples"][0] |= {"domain": "prose", "before": HOSTILE}
    summary["notes"] = [HOSTILE]
    run = run_of(summary, HOSTILE, 0)
    text, _ = page([run], title=HOSTILE, notes=[HOSTILE])
    found = seen(text)
    assert HOSTILE not in text and "script" not in {tag for tag, _ in found.tags}
    assert " ".join(found.words).count(HOSTILE) >= 5


def test_a_run_that_broke_down_has_a_page(rolled_back: dict[str, Any]) -> None:
    text, _ = page([run_of(rolled_back, "broken", 0)], title="One")
    assert 'class="rolled_back"' in text and "not finite" in text


def test_tasks_have_a_table(summary: dict[str, Any]) -> None:
    final = summary["final"]
    tasks = [{"domains": [name], "final": final, "steps": 5} for name in ("code", "prose")]
    text, _ = page([run_of(summary | {"tasks": tasks}, "tasks", 0)], title="One")
    assert "loss after each task" in text and "2: prose" in text

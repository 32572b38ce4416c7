"""`data=skills` and `skills:NAME`: composed configs and rejected requests."""

from pathlib import Path
from typing import Any

import pytest

from tritter.config.launch.composition import load_config
from tritter.config.run_folder import changes_between, fingerprint
from tritter.errors import RequestError

BASE = {"prose": ["stdlib:prose"]}


def sorting(count: int = 10_000) -> dict[str, list[str]]:
    return {"sorting": [f"skills:sorting:{count}"]}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "old", "tasks"),
    [
        ([], BASE, [{"arithmetic": ["skills:arithmetic:10000"]}]),
        (["data.new=sorting:99"], BASE, [sorting(99)]),
        (["data.old={mine:sorting}", "data.new=[skills:identity:7,stdlib:code]"],
         {"mine": ["skills:sorting:10000"]},
         [{"identity": ["skills:identity:7"], "code": ["stdlib:code"]}]),
        (["data.tasks=[sorting,[key_value,identity],skills:sorting:10000]"], BASE,
         [sorting(), {n: [f"skills:{n}:10000"] for n in ("key_value", "identity")}, sorting()]),
        (["data.old=sorting", "data.tasks=[sorting:5,sorting]"], sorting(),
         [{"sorting_2": ["skills:sorting:5"]}, sorting()]),
    ],
)  # fmt: skip
def test_names_in_every_form(words: list[str], old: Any, tasks: Any) -> None:
    data = load_config(["data=skills", *words]).data
    assert data.old_sources == old and list(data.task_sources) == tasks


def test_files_stand_beside_skills_in_the_order_in_which_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "sorting"):
        (tmp_path / name).write_text("Some text.")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/notes.txt").write_text("Other text.")
    data = load_config(["data=skills", "data.tasks=[notes.txt,sorting,more/notes.txt]"]).data
    assert list(data.task_sources) == [
        {"notes": [str(tmp_path / "notes.txt")]}, sorting(),
        {"notes_2": [str(tmp_path / "more/notes.txt")]},
    ]  # fmt: skip


def test_a_skill_is_text_like_any_other() -> None:
    words = ["data=text", "data.old=stdlib:prose"]
    data = load_config(
        [*words, "data.tasks=[skills:sorting,skills:identity:8,skills:sorting]"]
    ).data
    assert list(data.task_sources) == [sorting(), {"identity": ["skills:identity:8"]}, sorting()]
    data = load_config([*words, "data.new=[skills:sorting,skills:identity:8]"]).data
    assert data.new_sources == {"new": ["skills:sorting:10000", "skills:identity:8"]}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=skills", "data.new=sortin"], "data.new = sortin: there is no such skill, file"),
        (["data=skills", "data.new=sortin"], "Did you mean sorting?"),
        (["data=skills", "data.old={a:sortin}"], "data.old.a = sortin: there is no such skill"),
        (["data=skills", "data.new=stdlib:cod"], "Did you mean stdlib:code?"),
        (["data=skills", "data.new=sorting", "data.tasks=[sorting]"], "exclude each other"),
        (["data=text", "data.old=skills:sortin", "data.new=skills:a:b"],
         "data.old = skills:sortin: the skills are arithmetic, sorting"),
        (["data=text", "data.old=stdlib:prose", "data.new=skills:sorting:x"], "1 to 10,000,000"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(RequestError) as raised:
        load_config(words)
    assert message in str(raised.value)


def test_questions_are_part_of_a_run_only_where_they_are_asked() -> None:
    """Runs from before the option existed still resume."""
    for words, changed in ((["data=skills"], ["evaluation.task_questions"]), ([], [])):
        first, then = (
            fingerprint(load_config([*words, f"evaluation.task_questions={n}"])) for n in (10, 20)
        )
        assert list(changes_between(first, then)) == changed

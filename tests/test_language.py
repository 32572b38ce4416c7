"""What people read follows the glossary in tests/language.py: plain words of the field.

`python -m tests.language PATH` lists the places and what to write.
"""

from pathlib import Path

import pytest

from tests.language import ROOT, hits, readable_files

READ = ("tritter", "conf", "docs", "README.md", "train.py")
# Path → words that are right there: data, keys of files and values of options
ALLOWED = {
    "conf/experts/dylora.yaml": {"told"},  # experts.boundaries=told
    "docs/reference.md": {"told"},
    "tritter/cli/inspect.py": {"beside"},  # key of `inspect --json`
    "tritter/data/skills.py": {"say", "tell"},  # exercises
    "tritter/methods/experts/callback.py": {"roster"},  # key of a checkpoint
    "tritter/methods/experts/method.py": {"roster", "told"},
    "tritter/methods/experts/options.py": {"told"},
}


def test_the_glossary_is_followed() -> None:
    found = [
        hit
        for hit in hits(readable_files([ROOT / name for name in READ]))
        if hit.words.lower() not in ALLOWED.get(hit.path.relative_to(ROOT).as_posix(), set())
    ]
    listed = "\n".join(
        f"{hit.path.relative_to(ROOT)}:{hit.line}: {hit.words!r}, write: {hit.better}"
        for hit in found[:40]
    )
    assert not found, listed


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.md", "It says so.\n\n```\nit says so\n```\nand `it says` so", 1),
        ("a.yaml", "key: says # says so\n", 1),
        ("a.py", 'says = f"it says {says}"  # it says\n', 2),
    ],
)
def test_prose_is_found_and_code_is_not(name: str, text: str, count: int, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert len(hits(readable_files([tmp_path]))) == count

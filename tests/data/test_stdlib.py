import ast
import logging

import pytest

from tritter.data.built_in import Stdlib, _documented_nodes
from tritter.errors import RequestError

LONG = "A docstring of more than forty characters, é included."


@pytest.fixture
def library(tmp_path):
    files = {
        "b.py": f'"""{LONG}"""\n\ndef f():\n    "short"\n    return 1  # why\n',
        "a/__init__.py": "",
        "a/c.py": "x = 2\n",
        "a/test/t.py": "x = 3\n",
        "site-packages/p.py": "x = 4\n",
        "_sysconfigdata_x.py": "x = 5\n",
        "broken.py": "def (\n",
        "notutf8.py": b"x = '\xff'\n",
        "surrogate.py": f'"""{LONG} \\ud800"""\n',
        "pydoc_data/topics.py": "topics = {'b': 'about b', 'a': 'about a', 'no': ''}\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def test_gathering_a_small_library(library, caplog):
    with caplog.at_level(logging.WARNING):
        text = Stdlib(library).texts
    assert {each.identifier: each.text for each in text["prose"]} == {
        "pydoc_data/topics/a": "about a",
        "pydoc_data/topics/b": "about b",
        "b.py": LONG,
        "surrogate.py": f"{LONG} ?",
    }
    assert {each.identifier: each.text for each in text["code"]} == {
        "a/c.py": "x = 2\n",
        "b.py": "def f():\n    return 1\n",
    }
    assert len(caplog.records) == 1
    assert "2 library files could not be read: broken.py, notutf8.py\n" in caplog.text


def test_the_fingerprint_sees_a_changed_and_a_new_file(library):
    before = Stdlib(library).fingerprint
    assert Stdlib(library).fingerprint == before
    (library / "a/c.py").write_text("x = 20\n")
    changed = Stdlib(library).fingerprint
    (library / "a/test/t.py").write_text("x = 30\n")  # not part of the corpus
    assert Stdlib(library).fingerprint == changed != before


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"no Python sources.*full installation"):
        Stdlib(tmp_path).documents("code")


@pytest.mark.full
def test_the_real_library(caplog):
    text = Stdlib().texts
    prose, code = text["prose"], text["code"]
    assert 300 < len(prose) < 900 and 300 < len(code) < 900
    assert 1.2e6 < sum(len(each.text) for each in prose) < 5e6
    assert 3.5e6 < sum(len(each.text) for each in code) < 12e6
    assert sum(len(record.args[1].split(", ")) for record in caplog.records) < 5
    assert all(each.text == each.text.encode().decode() for each in prose + code)
    for side in (prose, code):
        names = [each.identifier for each in side]
        assert len(set(names)) == len(names)
        assert not any(name.startswith(("/", "test/")) or "/test/" in name for name in names)
    root = Stdlib().root
    code = {each.identifier: each.text for each in text["code"]}
    with_docstrings = 0
    for name in sorted(code)[::5]:
        # What is left parses, and has neither docstrings nor the text of the old ones.
        assert not list(_documented_nodes(ast.parse(code[name]))), name
        tree = ast.parse((root / name).read_bytes())
        for node in _documented_nodes(tree):
            raw = ast.get_docstring(node, clean=False)
            # One that is used twice (`__doc__` by hand, help strings) may stay as code.
            if raw and len(raw) > 200:
                with_docstrings += 1
                assert raw not in code[name], (name, raw)
    assert with_docstrings > 200

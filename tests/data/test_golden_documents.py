"""Hashes of the documents of every format, compared with `tests/golden/documents.json`.

A hash changes only on purpose, because runs and caches depend on it. `python -m
tests.data.test_golden_documents` rewrites the file; the commit message gives the reason.
"""

import csv
import gzip
import io
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from tritter.data.corpus import Corpus
from tritter.data.sources import TextRequest

GOLDEN = Path(__file__).parents[1] / "golden" / "documents.json"
PYTHON = f"stdlib of Python {platform.python_version()}"

LONG = "\n\n".join(
    f"paragraph {number} " + "wörd " * (number % 90) + "猫" * (number % 7) for number in range(900)
)
TEXTS = [
    "déjà vu\n\nagain\n",
    "猫\r\n\r\nneko \r\n",
    ' a "quoted", line\t',
    "a\ufeffb \x0b\x0c c\u2028d",
    "line\rreturn",
    "x" * 45_000,
    LONG,
    "again  déjà\nvu",
]
WORDS = ("grow", "a", "layer", "where", "data", "asks", "for", "one", "and", "keep", "what")
MANY = [" ".join(WORDS[(n * k) % 11] for k in range(1, 30)) + f" {n}." for n in range(120)]
ALPACA: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Add.", "input": "", "output": "nothing"},
    {"instruction": "Add.", "input": None, "output": "null"},
]
MIXED: list[Any] = [
    *ALPACA,
    "plain",
    {"text": "field", "prompt": "not", "completion": "this"},
    {"instruction": "Add.", "context": "4", "response": "8"},
    {"prompt": "Once", "completion": "upon"},
    {"prompt": "Once", "answer": "more", "loss": 0.3},
    {"question": "Why?", "answer": "So."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Lo\n"}]},
    {"text": "a\ud800b"},
]


def _jsonl(records: list[Any]) -> bytes:
    return "\r\n\n".join(map(json.dumps, records)).encode() + b"\n"


def _table(rows: list[dict[str, Any]], *, delimiter: str = ",") -> bytes:
    """Return rows as CSV with quotes where required."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=3)
    return file.getvalue()


def _rows(field: str, texts: list[str] = TEXTS) -> list[dict[str, Any]]:
    return [{"id": number, field: text} for number, text in enumerate(texts)]


_UNBROKEN = [text for text in TEXTS if "\r" not in text]
PLAIN: dict[str, bytes] = {
    "long.txt": LONG.encode(),
    "marked.txt": b"\xef\xbb\xbf" + TEXTS[1].encode(),
    "page.md": "# Zwölf\r\n\r\n猫\n".encode() * 3000,
    "page.rst": b"Title\n=====\n\n.. note:: text\n",
    "rows.jsonl": _jsonl(_rows("text")),
    "bodies.jsonl": _jsonl(_rows("body")),
    "mixed.jsonl": b"\xef\xbb\xbf" + _jsonl(MIXED),
    "rows.json": json.dumps(_rows("text")).encode(),
    "texts.json": json.dumps(TEXTS, ensure_ascii=False, indent=1).encode(),
    "mixed.json": json.dumps(MIXED).encode(),
}
TABLES: dict[str, bytes] = {
    "rows.csv": _table(_rows("text", _UNBROKEN)),
    "bodies.csv": _table(_rows("body", _UNBROKEN)),
    "rows.tsv": _table(_rows("text", _UNBROKEN), delimiter="\t"),
    "alpaca.csv": _table(ALPACA[:2]),
}


def _write(folder: Path) -> None:
    for name, content in (PLAIN | TABLES).items():
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    (folder / "rows.parquet").write_bytes(_parquet(_rows("text")))
    (folder / "bodies.parquet").write_bytes(_parquet(_rows("body")))
    (folder / "alpaca.parquet").write_bytes(_parquet(ALPACA))
    (folder / "many.jsonl").write_bytes(_jsonl(_rows("text", MANY)))
    (folder / "other.jsonl").write_bytes(_jsonl(_rows("text", MANY[::3] + TEXTS)))
    mixed = folder / "folder"
    (mixed / "deep" / ".hidden").mkdir(parents=True)
    for name, place in {"rows.jsonl": "z", "page.md": "a", "rows.parquet": "deep/b"}.items():
        (mixed / f"{place}{Path(name).suffix}").write_bytes((folder / name).read_bytes())
    for name in ("deep/.hidden/a.txt", ".a.txt", "a.log", "a.pyc"):
        (mixed / name).write_bytes(b"not,read\n")
    rows = {"id": list(range(8)), "text": TEXTS, "body": TEXTS[::-1]}
    saved = datasets.Dataset.from_dict(rows)
    saved.save_to_disk(folder / "alone")
    datasets.DatasetDict(train=saved, test=saved.select(range(3))).save_to_disk(folder / "splits")
    repository = folder / "repository"
    (repository / "data").mkdir(parents=True)
    for split in ("train", "test"):
        text = [f"{split} {number}" for number in range(4)]
        (repository / "data" / f"{split}-0.parquet").write_bytes(_parquet(_rows("text", text)))


Digests = dict[str, str]
_FIELDS = {"bodies": "body"}
_OF_DATASETS = (
    "hf:./alone",
    "hf:./alone#body",
    "hf:./alone[2:5]",
    "hf:./splits",
    "hf:./splits:test[1:]#body",
    "hf:./repository",
    "hf:./repository:test",
    "hf:./rows.csv",
    "hf:./rows.csv.gz",
    "hf:./rows.tsv",
    "hf:./bodies.csv#body",
    "hf:./alpaca.csv",
    "hf:./rows.jsonl",
    "hf:./rows.jsonl.gz",
    "hf:./bodies.jsonl#body",
    "hf:./rows.jsonl[1:3]",
    "hf:./rows.parquet",
    "hf:./alpaca.parquet",
    "hf:./bodies.parquet#body",
    "hf:./long.txt",
    "hf:./long.txt.gz",
)


def _digest(*paths: str, field: str = "text") -> str:
    return TextRequest(paths, key="data.new", text_field=field).documents().digest()


def of_files() -> Digests:
    names = [name for name in PLAIN for name in (name, f"{name}.gz")]
    names += ["rows.parquet", "bodies.parquet", "alpaca.parquet", "folder"]
    fields = {name: _FIELDS.get(name.partition(".")[0], "text") for name in names}
    found = {name: _digest(name, field=field) for name, field in fields.items()}
    found["p*.md and rows.json"] = _digest("p*.md", "rows.json")
    found["rows.json and p*.md"] = _digest("rows.json", "p*.md")
    found["mixed.json, field output"] = _digest("alpaca.parquet", field="output")
    return found


def of_datasets() -> Digests:
    return {name: _digest(name) for name in _OF_DATASETS}


def of_skills() -> Digests:
    names = ("skills:arithmetic:300", "skills:json_format:200", "skills:identity:300")
    return {name: _digest(name) for name in names} | {"all": _digest(*names, "rows.json")}


def of_the_library() -> Digests:
    return {name: _digest(name) for name in ("stdlib:prose", "stdlib:code")}


def _sides(corpus: Corpus) -> dict[str, Any]:
    return {
        name: {
            "sha256": domain.sha256,
            "counts": corpus.domains[name].counts,
            "validation": sorted(domain.validation.identifiers)[:3],
            "tokens": domain.train.num_tokens,
        }
        for name, domain in corpus.domains.items()
    }


def of_a_corpus() -> dict[str, Any]:
    paths = {"old": ["many.jsonl"], "new": ["other.jsonl", "long.txt"]}
    made = Corpus.build(
        {
            n: TextRequest(p, key="data.new", text_field="text").documents()
            for n, p in paths.items()
        },
        origin="files",
        vocab_size=300,
        validation_fraction=0.25,
        max_validation_tokens_per_document=400,
        seed=7,
        cache_dir=Path("cache"),
    )
    return {"digest": made.digest, **_sides(made)}


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "files": of_files,
    "datasets": of_datasets,
    "skills": of_skills,
    "corpus": of_a_corpus,
    PYTHON: of_the_library,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("golden")
    _write(place)
    return place


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("part", PARTS)
def test_documents_are_those_of_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hub")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if part not in golden:
        pytest.skip(f"no {part} was recorded")
    assert PARTS[part]() == golden[part]


def write() -> None:
    """Rewrite the golden file, except for entries of other Python versions."""
    before = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    here = Path.cwd()
    with TemporaryDirectory() as place:
        _write(Path(place))
        os.chdir(place)
        try:
            found = {name: part() for name, part in PARTS.items()}
        finally:
            os.chdir(here)
    text = json.dumps(before | found, indent=1, ensure_ascii=False, sort_keys=True)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()

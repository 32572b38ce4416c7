"""A run on datasets, and their records in a later run."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.data.replay import ReplayBuffer
from tritter.errors import RequestError
from tritter.pipeline import run_pipeline
from tritter.pipeline.run_data import RunData

TEXT = "the model grows a layer where data asks for one and keeps what it knew"
JOB = [word for word in TINY if not word.startswith(("data=", "data.old=", "data.new="))]


def save(folder: Path, column: str, *, of: int) -> None:
    words = TEXT.split()
    texts = [
        " ".join(words[(of + n * (k + 1)) % len(words)] for k in range(60)) + f" {of} {n}"
        for n in range(40)
    ]
    datasets.Dataset.from_dict({column: texts, "n": [*range(40)]}).save_to_disk(folder)


@pytest.mark.full
def test_a_run_on_data_sets_and_another_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache/hf")
    for number, (name, column) in enumerate({"old": "text", "a": "body", "b": "text"}.items()):
        save(tmp_path / name, column, of=number)
    with (tmp_path / "b.jsonl").open("w") as file:
        for row in datasets.load_from_disk(str(tmp_path / "b")):
            file.write(json.dumps(row) + "\n")
    words = ["data=hf", f"cache_dir={tmp_path}/cache", f"data.old={tmp_path}/old[:30]"]
    words[2] = words[2].replace("=", "='") + "'"
    new = f"data.new={{a:{tmp_path}/a,b:{tmp_path}/b.jsonl}}"
    (tmp_path / "run").mkdir()
    config = load_config([*JOB, *words, new, "data.weights={a:3}", "forgetting=replay"])
    streams: list[object] = []
    batches = RunData.batches

    def kept(data: RunData, *rest: object, **options: object) -> object:
        stream = batches(data, *rest, **options)  # type: ignore[arg-type]
        streams.append(stream.new)
        return stream

    monkeypatch.setattr(RunData, "batches", kept)
    outcome = run_pipeline(config, run_folder=tmp_path / "run")
    assert outcome.status == "ungated"
    assert [isinstance(stream, ReplayBuffer) for stream in streams] == [False, True]

    checkpoint = tmp_path / "run/checkpoint"
    lineage = Lineage.read(checkpoint)
    assert lineage is not None
    assert {name: domain.paths for name, domain in lineage.domains.items()} == {
        "old": (f"hf:{tmp_path}/old[:30]#text",),
        "a": (f"hf:{tmp_path}/a#body",),
        "b": (f"hf:{tmp_path}/b.jsonl:train#text",),
    }
    assert [domain.num_documents for domain in lineage.domains.values()] == [30, 40, 40]

    after = [*JOB, "model=hf", f"model.path={checkpoint}", "expansion=none", "forgetting=l2sp"]
    after = [word for word in after if not word.startswith(("model.h", "model.i", "model.n"))]
    # Learned domains are old, regardless of the next data and its location
    text = load_config([*after, "data=text", "data.new=stdlib:code"]).text
    assert (text.old, text.new) == (("old", "a", "b"), ("new",))
    moved = load_config([*after, "data=hf", f"data.new={tmp_path}/b"]).text
    assert (moved.old, moved.new) == (("old", "a"), ("b",))
    shutil.rmtree(tmp_path / "a")
    save(tmp_path / "a", "body", of=9)
    with pytest.raises(RequestError, match=f"a can't be used: hf:{tmp_path}/a#body has changed"):
        load_config([*after, "data=text", "data.new=stdlib:code"])
    changed = load_config([*after, "data=hf", f"data.new={tmp_path}/a", "data.old={}"]).text
    assert changed.new == ("a",)
    assert "The data of a has changed since the checkpoint learned it." in changed.notes

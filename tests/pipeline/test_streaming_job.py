"""`data.streaming=true` through whole jobs: mixtures, resume, later runs."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

import tritter
from tests.oracle import chat
from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.errors import RequestError
from tritter.pipeline import Outcome, run_pipeline

JOB = [word for word in TINY if not word.startswith(("data=", "data.old=", "data.new="))]
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    texts = [" ".join(m["content"] for m in chat.messages(n, turns=3)) for n in range(900)]
    datasets.Dataset.from_dict({"text": texts[:300]}).save_to_disk(folder / "old")
    for name, part in (("a", texts[300:600]), ("b", texts[600:])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    chat.checkpoint(folder / "base")
    talks = [{"messages": chat.messages(n, turns=2)} for n in range(300)]
    talks[250] = {"messages": [{"role": "narrator", "content": "Once upon a time"}]}
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    def run_job(folder: Path, *overrides: str) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        words = (
            *("data=hf", "data.streaming=true", f"cache_dir={place}/cache"),
            f"data.old=hf:{place}/old",
            f"data.new={{a:{place}/a.jsonl.gz,b:{place}/b.jsonl.gz}}",
        )
        return run_pipeline(load_config([*JOB, *words, *overrides]), run_folder=folder)

    return run_job


@pytest.mark.full
def test_an_interrupted_job_ends_with_the_weights_of_a_whole_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    words = [*JOB, "data=hf", "data.streaming=true", f"data.old=hf:{place}/old"]
    words += [f"data.new={{a:{place}/a.jsonl.gz,b:{place}/b.jsonl.gz}}", "data.weights={a:3}"]
    found = {}
    for name in ("whole", "stopped"):
        marker = tmp_path / f"{name}.marker"
        callback = f"{{_target_:tests.pipeline.interrupting.InterruptOnce,marker:'{marker}'}}"
        own = [*words, f"callbacks.stop={callback}"]
        if name == "whole":
            marker.touch()
        else:
            with pytest.raises(KeyboardInterrupt, match=r"continue with tritter\.run\('resume="):
                tritter.run(*own, output=tmp_path / name)
        found[name] = tritter.run(*own, output=tmp_path / name).model().state_dict()
    assert all(torch.equal(found["stopped"][key], value) for key, value in found["whole"].items())
    notes = json.loads((tmp_path / "stopped/summary.json").read_text())["notes"]
    assert sum(" is streamed: training reads all of it" in note for note in notes) == 3
    recorded = json.loads((tmp_path / "stopped/streams.json").read_text())
    assert str(place / "a.jsonl.gz") in recorded["a"]


@pytest.mark.full
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_later_run_reads_the_recorded_rows(
    run: Run, place: Path, tmp_path: Path, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it streams itself; and the same file is the same domain."""
    monkeypatch.setattr("tritter.data.datasets.DatasetName.HEAD_ROWS", 100)
    run(tmp_path / "first", "forgetting=replay", f"data.streaming={streaming}")
    checkpoint = tmp_path / "first/checkpoint"
    lineage = Lineage.read(checkpoint)
    assert lineage is not None
    rows = "[:100]" if streaming == "true" else ""
    assert {name: domain.paths for name, domain in lineage.domains.items()} == {
        "old": (f"hf:{place}/old{rows}#text",),
        "a": (f"hf:{place}/a.jsonl.gz:train{rows}#text",),
        "b": (f"hf:{place}/b.jsonl.gz:train{rows}#text",),
    }
    shape = ("model.h", "model.i", "model.n")
    job = [word for word in JOB if not word.startswith(shape)]
    after = [*job, "model=hf", f"model.path={checkpoint}", "expansion=none", "forgetting=replay"]
    for later in ("true", "false"):
        words = ["data=hf", f"data.new={place}/b.jsonl.gz", f"data.streaming={later}"]
        config = load_config([*after, *words, f"cache_dir={place}/cache"])
        assert (config.text.old, config.text.new) == (("old", "a"), ("b",))
        (tmp_path / later).mkdir()
        run_pipeline(config, run_folder=tmp_path / later)
        notes = json.loads((tmp_path / later / "summary.json").read_text())["notes"]
        streamed = [note.partition(" ")[0] for note in notes if " is streamed: " in note]
        assert streamed == (["b"] if later == "true" else [])


@pytest.mark.full
def test_conversations_are_streamed(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritter.data.datasets.DatasetName.HEAD_ROWS", 100)
    shape = ("model.hidden_size=", "model.intermediate_size=", "model.num_")
    words = [word for word in JOB if not word.startswith((*shape, "data.vocab_size"))]
    (tmp_path / "run").mkdir()
    config = load_config(
        [
            *words,
            *("model=hf", f"model.path={place}/base", "data=hf", "data.streaming=true"),
            *("data.old={}", f"data.new={place}/talks.jsonl", f"cache_dir={place}/cache"),
            *("data.sequence_length=64", "forgetting=none"),
        ]
    )
    run_pipeline(config, run_folder=tmp_path / "run")
    notes = json.loads((tmp_path / "run/summary.json").read_text())["notes"]
    assert any(note.startswith("new is streamed: training reads all of it") for note in notes)
    assert any("rendered with the chat template" in note for note in notes)
    # The first rows have no such record
    assert any("Skipped 1 of 300 records" in note and "narrator" in note for note in notes)


def test_a_domain_of_datasets_and_texts_is_refused(place: Path) -> None:
    words = ["data=hf", "data.streaming=true", f"data.new=[stdlib:code,hf:{place}/old]"]
    with pytest.raises(RequestError, match=r"data\.streaming = true: new mixes data sets and buil"):
        load_config([*JOB, *words, f"data.old=hf:{place}/old"])

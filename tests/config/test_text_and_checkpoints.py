"""`data=text` and `model=hf`: composed configs, and requests rejected before anything runs."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import FakePipeline, Result
from tritter.checkpoints.record import StateHead
from tritter.config.run_folder import changes_between, fingerprint
from tritter.config.schema import CheckpointModelConfig
from tritter.data.options import TextDataConfig
from tritter.data.sources import text_files
from tritter.storage.records import record_text

Run = Callable[..., Result]
TEXT = ("data=text", "data.old=old", "data.new=new")
SHAPES = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a checkpoint, next to the empty folder in which commands run."""
    place = tmp_path.parent / f"{tmp_path.name}-texts"
    for name in ("old/deep/a.txt", "old/b.jsonl", "old/.hidden/c.txt", "old/d.tsv", "new/e.txt.gz"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text('"text"\n')
    (place / "new/e.txt.gz").write_bytes(gzip.compress(b"text\n"))
    write_checkpoint(place / "base")
    return place


def write_checkpoint(folder: Path, **changes: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES | changes))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_text("")


@pytest.fixture
def run_there(run: Run, place: Path) -> Run:
    """Run a command in which @ is the folder of the data."""
    return lambda *words: run(*(word.replace("@", f"{place}/") for word in words))


def data_of(pipeline: FakePipeline) -> TextDataConfig:
    data = pipeline.configs[-1].data
    assert isinstance(data, TextDataConfig)
    return data


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["data.old=@old", "data.new=@new"], {"old": ["old"]}, {"new": ["new"]}),
        (["data.old=[@old/b.jsonl,@old/deep]", "data.new=@new/*.gz"],
         {"old": ["old/b.jsonl", "old/deep"]}, {"new": ["new/*.gz"]}),
        (["data.old={prose:@old,news:[@new]}", "data.new={code:@old/**/*.txt}"],
         {"prose": ["old"], "news": ["new"]}, {"code": ["old/**/*.txt"]}),
        (["data.old=stdlib:prose", "data.new=@new"], {"old": ["stdlib:prose"]}, {"new": ["new"]}),
    ],
)  # fmt: skip
def test_paths_in_every_form(
    run_there: Run, place: Path, pipeline: FakePipeline, words: list[str], old: Any, new: Any
) -> None:
    result = run_there("data=text", *words)
    assert result.code == 0, result.err

    def placed(sources: dict[str, list[str]]) -> dict[str, list[str]]:
        return {
            name: [path if ":" in path else f"{place}/{path}" for path in paths]
            for name, paths in sources.items()
        }

    assert data_of(pipeline).old == placed(old)
    assert data_of(pipeline).new == placed(new)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("words", "new", "tasks"),
    [
        ("data.tasks=[@new]", {"new": ["new"]}, (("new",),)),
        ("data.tasks=[@new,stdlib:code,@new]", {"new": ["new"], "code": ["stdlib:code"]},
         (("new",), ("code",), ("new",))),
        ("data.tasks=[[@new/e.txt.gz,@old/b.jsonl],{x:@new,y:@old/*.jsonl}]",
         {"e": ["new/e.txt.gz", "old/b.jsonl"], "x": ["new"], "y": ["old/*.jsonl"]},
         (("e",), ("x", "y"))),
        ("data.tasks=[@new/*.gz,@old/deep,@new]",
         {"new": ["new/*.gz"], "deep": ["old/deep"], "new_2": ["new"]},
         (("new",), ("deep",), ("new_2",))),
        ("data.tasks=[{unnamed:@new},@old/deep]", {"unnamed": ["new"], "deep": ["old/deep"]},
         (("unnamed",), ("deep",))),
        ("data.tasks=[{x:@new},{x:@new},@new]", {"x": ["new"]}, (("x",), ("x",), ("x",))),
        # The old text, which comes again later, is called what it is called as old text
        ("data.tasks=[@new,@old]", {"new": ["new"]}, (("new",), ("old",))),
    ],
)  # fmt: skip
def test_tasks_in_every_form(
    run_there: Run, place: Path, pipeline: FakePipeline, words: str, new: Any, tasks: Any
) -> None:
    result = run_there("data=text", "data.old=@old", words)
    assert result.code == 0, result.err
    placed = {
        name: [path if ":" in path else f"{place}/{path}" for path in paths]
        for name, paths in new.items()
    }
    assert data_of(pipeline).new_sources == placed
    text = pipeline.configs[-1].text
    assert text.tasks == tasks and text.old == ("old",)
    assert text.new == tuple(new) and len(text.domains) == len(new) + 1


@pytest.mark.full
def test_replay_may_weigh_what_earlier_tasks_are_about(run_there: Run) -> None:
    words = (
        "data=text",
        "data.old=@old",
        "data.tasks=[{a:@new},{b:@old/deep}]",
        "forgetting=replay",
    )
    assert run_there(*words, "forgetting.replay.weights={a:2}").code == 0
    last = run_there(*words, "forgetting.replay.weights={b:2}")
    assert last.code == 2 and "its old domains: old, a" in last.err


def test_a_single_task_is_what_new_is(run_there: Run, pipeline: FakePipeline) -> None:
    for words in ("data.tasks=[@new]", "data.new=@new"):
        assert run_there("data=text", "data.old=@old", words).code == 0
    one, new = (config.text for config in pipeline.configs)
    named = {
        name: replace(domain, key=domain.key.replace("tasks.", ""))
        for name, domain in one.domains.items()
    }
    assert named == new.domains and one.tasks == new.tasks == (("new",),)


def test_a_folder_means_what_is_below_it_and_not_hidden(place: Path) -> None:
    paths = [f"{place}/old", f"{place}/old/b.jsonl", "stdlib:prose"]
    found = text_files("data.old", paths)
    assert [str(path.relative_to(place)) for path in found] == ["old/b.jsonl", "old/deep/a.txt"]


def test_relative_paths_are_those_of_the_place_where_the_run_began(
    run: Run, place: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert run(*TEXT, "data.old=./old/../old").code == 0
    assert data_of(pipeline).old == {"old": [f"{place}/old"]}


def test_the_fingerprint_survives_json_and_sees_paths(
    run_there: Run, pipeline: FakePipeline
) -> None:
    run_there("data=text", "data.old=@old", "data.new=@new")
    run_there("data=text", "data.old=[@old,@new]", "data.new=@new")
    first, second = (fingerprint(config) for config in pipeline.configs)
    assert json.loads(json.dumps(first)) == first
    assert list(changes_between(first, second)) == ["data.old.old"]


def test_a_checkpoint(run_there: Run, place: Path, pipeline: FakePipeline) -> None:
    result = run_there("model=hf", "model.path=@base", "data.sequence_length=64")
    assert result.code == 0, result.err
    assert pipeline.configs[0].model == CheckpointModelConfig(
        model_type="hf", path=str(place / "base")
    )


def test_of_a_hub_id_the_rest_is_seen_when_it_is_there(run: Run, pipeline: FakePipeline) -> None:
    assert run("model=hf", "model.path=owner/name").code == 0
    assert pipeline.configs[0].model == CheckpointModelConfig(model_type="hf", path="owner/name")


def test_without_old_text_methods_that_need_none_run(run_there: Run) -> None:
    words = ("model=hf", "model.path=@base", "data=text", "data.new=@new", "data.sequence_length=9")
    for forgetting in ("none", "l2sp"):
        assert run_there(*words, f"forgetting={forgetting}").code == 0


def test_what_a_training_recorded_does_in_place_of_old_text(run_there: Run, place: Path) -> None:
    words = ("model=hf", "model.path=@base", "data=text", "data.new=@new", "data.sequence_length=9")
    refused = run_there(*words, "forgetting=si")
    assert refused.code == 2 and "required by si" in refused.err
    (place / "base/state").mkdir()
    head = StateHead(step=3, kinds=("path_integral", "displacement"))
    (place / "base/state/state.json").write_text(record_text(head))
    assert run_there(*words, "forgetting=si").code == 0
    assert "required by ewc" in run_there(*words, "forgetting=[si,ewc]").err


HF = "model=hf model.path=@base data.sequence_length=64"
REFUSALS: dict[str, tuple[str, ...]] = {
    "data=text data.old=@old": ("data.new = null", "data.new=PATH"),
    "data=text data.new=@new": ("data.old = null", "model=hf"),
    "data=text data.old=@odl data.new=@new": ("no such file or folder", "Did you mean 'old'?"),
    # No file that can't be read is suggested
    "data=text data.old=@base/model.safetensor data.new=@new": ("no such file or folder.\n",),
    "data=text data.old=@x/y data.new=@new": ("no such file or folder", "is not a folder either"),
    "data=text data.old=@old/d.tsv data.new=@new": ("d.tsv", ".parquet", "found .tsv 1"),
    "data=text data.old=@base/*s data.new=@new": ("found .safetensors 1",),
    "data=text data.old=@base/c* data.new=@new": ("found .json of one object 1",),
    "data=text data.old=@old/*.pdf data.new=@new": ("*.pdf", "the glob matches no file"),
    "data=text data.old=@old/*.tsv data.new=@new": ("found .tsv 1",),
    "data=text data.old=@old/**x data.new=@new": (
        ("data.old = ", "the glob matches no file" if sys.version_info >= (3, 13) else
         "it can't be read (Invalid")
    ),
    "data=text data.old='~nosuchuser/a' data.new=@new": ("~nosuchuser/a: this is not a valid",),
    f"data=text data.old=@{'a' * 300} data.new=@new": ("data.old = ", "(File name too long)"),
    "data=text data.old=[@odl,@old/d.tsv] data.new={x:@old/*.pdf,y:@nwe}": (
        "4 things are wrong", "data.old = ", "data.new.x = ", "data.new.y = ",
        "Did you mean 'old'?", "found .tsv 1", "the glob matches no file", "Did you mean 'new'?",
    ),
    "data=text data.old=@old data.new={}": ("data.new = null", "data.new=PATH"),
    "data=text data.old=@old data.new=@new data.tasks=[@new]": ("data.tasks", "exclude each other"),
    "data=text data.old=@old data.tasks=@new": ("data.tasks = ", "a list of tasks"),
    "data=text data.old=@old data.tasks=[]": ("data.tasks = []", "a list of tasks"),
    "data=text data.old=@old data.tasks=[@new,[]]": ("data.tasks[2] = []", "a task needs data"),
    "data=text data.old=@old data.tasks=[@new,@nwe,3]": (
        "2 things are wrong", "data.tasks[2] = ", "Did you mean 'new'?", "data.tasks[3] = 3",
    ),
    "data=text data.old=@old data.tasks=[{x:@new},{x:@old}]": ("data.tasks[2].x", "already named"),
    "data=text data.old=@old data.tasks=[{old:@new}]": ("data.tasks[1].old", "already named"),
    "data=text data.old=@old data.tasks=[@old,@new]": ("data.tasks.old", "already"),
    "data=text data.old=@old data.tasks=[@new,@old] pipeline.target_params=200k": (
        "data.tasks", "one task",
    ),
    "data.tasks=[stdlib:code]": (
        "data.tasks is not a key of data=stdlib (the current source). Did you mean: data=text data",
    ),
    "data=text data.old=3 data.new=@new": ("data.old = 3", "a path, a list of paths"),
    "data=text data.old=[] data.new=@new": ("data.old = []", "empty"),
    "data=text data.old={prose:{a:b}} data.new=@new": ("data.old.prose", "a path"),
    "data=text data.old={a/b:@old} data.new=@new": ("data.old = a/b", "letters"),
    "data=text data.old={x:@old} data.new={x:@new}": ("data.new.x", "already"),
    "data=text data.old=stdlib:prosa data.new=@new": ("stdlib:code", "Did you mean stdlib:prose?"),
    "data=text data.old=@old data.new=@new data.text_feild=a": ("Did you mean data.text_field?",),
    "data.old=@old": ("data.old is not a key of data=stdlib (the current source).",),
    "data.source=text": ("data.source = text", "select it with data=text"),
    "model=hf": ("model.path = null", "model.path=DIR"),
    "model=hf model.path=@bsae": ("model.path", "not a hub id", "Did you mean 'base'?"),
    "model=hf model.path=@old/b.jsonl": ("it is a file",),
    "model=hf model.path=@old": ("holds no config.json",),
    "model.path=@base": ("model.path requires model=hf. Did you mean: model=hf model.path=",),
    f"{HF} model.hidden_size=64": ("model.hidden_size is not a key of model=hf",),
    "model=hf model.path=@base data.sequence_length=128": (
        "data.sequence_length = 128", "max_position_embeddings = 64"
    ),
    f"{HF} expansion.width.hidden_size=25": ("expansion.width.hidden_size = 25",),
    f"{HF} expansion=dus expansion.dus.target_layers=9": ("expansion.dus.target_layers = 9",),
    f"{HF} data=text data.new=@new": ("data.old = null", "required by replay"),
    f"{HF} data=text data.new=@new forgetting=[l2sp,ewc]": (
        "required by ewc", "let the model generate it (forgetting=[self_replay,l2sp,ewc])"
    ),
    f"{HF} data=text data.new=@new forgetting=replay": ("(forgetting=self_replay)",),
    f"{HF} data=text data.new=@new forgetting=[replay,self_replay]": ("required by replay",),
    f"{HF} data=text data.new=@new forgetting=[ewc,si]": ("required by ewc and si",),
}  # fmt: skip


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("command", REFUSALS)
def test_refused(run_there: Run, pipeline: FakePipeline, command: str) -> None:
    result = run_there(*command.split(" "))
    assert result.code == 2
    for part in REFUSALS[command]:
        assert part in result.err
    assert "Traceback" not in result.err
    assert (result.written, pipeline.configs) == ([], [])


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("changes", "removed", "parts"),
    [
        (
            {"model_type": "llma"},
            (),
            ("'llma' is not supported", "installed transformers has no"),
        ),
        ({"model_type": "t5"}, (), ("'t5' is not supported",)),
        ({"num_hidden_layers": 0}, (), ("num_hidden_layers = 0",)),
        ({}, ("tokenizer.json",), ("no tokenizer.json", "save_pretrained")),
        ({}, ("model.safetensors",), ("contains no safetensors",)),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_on(
    run_there: Run, place: Path, changes: dict[str, Any], removed: tuple[str, ...], parts: Any
) -> None:
    shutil.rmtree(place / "base")
    write_checkpoint(place / "base", **changes)
    for name in removed:
        (place / "base" / name).unlink()
    result = run_there(*HF.split())
    assert (result.code, result.written) == (2, [])
    for part in (*parts, "model.path = "):
        assert part in result.err


def test_pickles_are_refused_by_name(run_there: Run, place: Path) -> None:
    (place / "base/model.safetensors").rename(place / "base/pytorch_model.bin")
    result = run_there(*HF.split())
    assert result.code == 2
    assert "pytorch_model.bin may run code" in result.err


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": 3}', "\udcff"])
def test_damaged_configs_are_refused(run_there: Run, place: Path, text: str) -> None:
    (place / "base/config.json").write_bytes(text.encode(errors="surrogateescape"))
    result = run_there(*HF.split())
    assert (result.code, result.written) == (2, [])
    assert "model.path = " in result.err


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("folder", ["@base", "@base/run", "@base/../base/run", "@link/deep/run"])
def test_no_run_lies_in_the_checkpoint_that_it_starts_from(
    run_there: Run, place: Path, folder: str
) -> None:
    (place / "link").symlink_to(place / "base")
    result = run_there(*HF.split(), f"hydra.run.dir={folder}")
    assert (result.code, result.written) == (2, [])
    assert "inside the initial checkpoint" in result.err


GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4}
OF_GPT2: dict[str, tuple[str, ...]] = {
    "data.sequence_length=65": ("sequence_length = 65", "config.json.n_positions = 64"),
    "expansion=width": (
        "hidden_size = 48 with expansion.width.init = fresh",
        "LayerNorm",
        "init=net2net",
    ),
    "expansion=none experts=dylora experts.base_bits=8": ("base_bits = 8", "transposed matrices"),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("words", OF_GPT2)
def test_what_gpt2_can_not_have(
    run_there: Run, place: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    shutil.rmtree(place / "base")
    (place / "base").mkdir()
    (place / "base/config.json").write_text(json.dumps({**GPT2, "n_positions": 64}))
    for name in ("model.safetensors", "tokenizer.json"):
        (place / "base" / name).write_text("")
    result = run_there(*HF.split(), *words.split())
    assert (result.code, result.written) == (2, [])
    for part in OF_GPT2[words]:
        assert part in result.err

"""`data=hf`: composed configs, and requests rejected before anything runs."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest

from tests.config.conftest import FakePipeline, Result
from tritter.config.launch.composition import load_config
from tritter.config.overrides import normalise
from tritter.data.options import DatasetsConfig

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with datasets, next to the empty folder in which commands run."""
    place = tmp_path.parent / f"{tmp_path.name}-texts"
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "body": ["c", "d"], "n": [1, 2]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(place / "saved")
    (place / "rows.csv").write_text("story,n\na,1\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    return place


@pytest.fixture
def run_there(run: Run, place: Path) -> Run:
    """Run a command in which @ is the folder of the datasets."""
    return lambda *words: run("data=hf", *(word.replace("@/", f"{place}/") for word in words))


def data_of(pipeline: FakePipeline) -> DatasetsConfig:
    data = pipeline.configs[-1].data
    assert isinstance(data, DatasetsConfig)
    return data


def test_names_in_every_form(run_there: Run, place: Path, pipeline: FakePipeline) -> None:
    words = ("data.old=[stdlib:prose,hf:@/rows.csv]", "data.max_rows=7", "data.text_column=body")
    result = run_there(*words, "data.new={a:hf:@/saved:test#text,b:hf:@/saved:train[1:2]}")
    assert result.code == 2  # of rows.csv there is no such column
    assert (
        f"data.old: hf:{place}/rows.csv[:7]#body has no column body; available: story, n"
        in result.err
    )
    names = "data.new={a:hf:@/saved:test#text,b:'@/saved:train[1:2]'}"
    result = run_there("data.old=stdlib:prose", *words[1:], names)
    assert result.code == 0, result.err
    data = data_of(pipeline)
    assert data.old == {"old": ["stdlib:prose"]}
    assert data.new == {
        "a": [f"hf:{place}/saved:test[:7]#text"],
        "b": [f"hf:{place}/saved:train[1:2]#body"],
    }
    assert [domain.paths for domain in [*pipeline.configs[-1].text.domains.values()][1:]] == [
        *map(tuple, data.new.values())
    ]


def test_tasks_are_named_after_their_data_sets(run_there: Run, pipeline: FakePipeline) -> None:
    tasks = "data.tasks=[hf:@/saved:test,{x:@/rows.csv},hf:@/rows.csv]"
    assert run_there("data.old=@/saved", tasks).code == 0
    assert pipeline.configs[-1].text.tasks == (("saved",), ("x",), ("x",))


def test_all_that_is_wrong_is_listed_before_anything_is_written(
    run_there: Run, place: Path, pipeline: FakePipeline
) -> None:
    result = run_there("data.old=@/saved:trian", "data.new=[@/rows.csv,hf:me/stories,hf:@/saved#n]")
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    lines = result.err.replace(str(place), "@").splitlines()
    heads = [
        "error: the data has 3 problems:",
        "  data.old: hf:@/saved:trian has no split trian; available: train, test. Did you mean",
        "  data.new: hf:me/stories is not cached in @/cache, and HF_HUB_OFFLINE disables",
        "  data.new: hf:@/saved#n has int64 in column n, not text.",
        "Nothing was written.",
    ]
    assert [line.startswith(head) for line, head in zip(lines, heads, strict=True)] == [True] * 5


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["data.new=@/savd"], "data.new = @/savd: there is no such file or folder. Did you mean"),
        (["data.new=@/rows.csv", "data.streming=true"], "Did you mean data.streaming?"),
        (["data.new=@/rows.csv", "data.max_rows=0"], "data.max_rows = 0: must be"),
        (["data.new=@/rows.csv", "data.text_field=a"], "data.text_field is not a key of data=hf"),
        (["data.new=hf:stories"], "the format is hf:OWNER/NAME[@REVISION]"),
        (["data.new=hf:me/stories[:5%]"], "FROM and TO count rows"),
        (["data.new={a:@/saved,b:@/rows.csv}", "data.weights={c:1}"],
         "data.weights.c = 1.0: there is no such new domain; available: a, b."),
        (["data.new={a:@/saved,b:stdlib:code}", "data.weights={a:0}"], "data.weights = {a:0}: "),
        (["data.new={a:@/saved}", "data.weights={a:2}"], "its task has no other domain"),
        ([], "data.new = null: set the data to train on"),
    ],
)  # fmt: skip
def test_what_is_refused(run_there: Run, place: Path, words: list[str], reported: str) -> None:
    result = run_there("data.old=@/saved", *words)
    assert (result.code, result.written) == (2, [])
    assert reported in result.err.replace(str(place), "@")


def test_data_sets_are_for_hf_alone(run: Run) -> None:
    result = run("data=text", "data.old=stdlib:prose", "data.new=hf:me/stories#a")
    assert result.code == 2
    assert "data.new = hf:me/stories#a: data sets require data=hf." in result.err


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("data.new=hf:a/b#c", "data.new='hf:a/b#c'"),
        (
            "data.new={x:hf:a/b[:5]#c,y:[hf:a/b#d,z]}",
            "data.new={x:'hf:a/b[:5]#c',y:['hf:a/b#d',z]}",
        ),
        ("data.new=hf:a/b#c,hf:d/e", "data.new='hf:a/b#c',hf:d/e"),
        ("data.new='hf:a/b#c'", "data.new='hf:a/b#c'"),
        ("logger.wandb.group=hf:a/b#c", "logger.wandb.group=hf:a/b#c"),
    ],
)
def test_names_need_no_quotes(typed: str, read: str) -> None:
    assert normalise(typed, {}) == read


def test_how_a_data_set_is_read_makes_no_other_base(place: Path) -> None:
    from tritter.pipeline.stages.baseline import _WHICH_TEXT

    words = ["data=hf", f"data.old={place}/saved", f"data.new={{a:{place}/saved,b:stdlib:code}}"]
    further = ["data.max_rows=1", "data.streaming=true", "data.weights={a:2}"]
    one, other = (asdict(load_config([*words, *more]).data) for more in ((), further))
    assert {name for name in one if one[name] != other[name]} <= _WHICH_TEXT

"""Every notebook runs from top to bottom, here on made-up runs and without Jupyter."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def _cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def _score(loss_per_byte: float) -> dict[str, float | int]:
    return {"loss": 3 * loss_per_byte, "loss_per_byte": loss_per_byte, "standard_error": 0.01}


def _check(name: str, domain: str, value: float | None) -> dict[str, Any]:
    interval = None if value is None else [value - 0.004, value + 0.004]
    return {"check": name, "subject": domain, "value": value, "interval": interval} | {
        "bound": 0.05,
        "confidence": 0.95,
        "verdict": "passed",
    }


def _summary(*, expansion: list[str], rise: float | None, change_of_new: float) -> dict[str, Any]:
    before = {"prose": _score(1.2), "code": _score(1.5)}
    after = {"prose": _score(1.2 * (1 + (rise or 0))), "code": _score(1.5 * (1 + change_of_new))}
    gate = [_check("retention", "prose", rise), _check("new_capability", "code", change_of_new)]
    return {
        "status": "kept",
        "domains": {"old": ["prose"], "new": ["code"]},
        "expansion": expansion,
        "forgetting": [],
        "seed": 0,
        "baseline": before,
        "expanded": before,
        "final": after,
        "gate": gate,
        "attempts": [{"final": after, "gate": gate}],
    }


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A sweep of two runs, one of which broke, seen from the notebooks' folder."""
    for number, (expansion, rise) in enumerate([(["width"], 0.013), ([], None)]):
        folder = tmp_path / "outputs" / "sweeps" / "earlier" / str(number)
        folder.mkdir(parents=True)
        summary = _summary(expansion=expansion, rise=rise, change_of_new=-0.25)
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def _run(notebook: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(_cells(notebook)):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{notebook.name}[{number}]", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def no_window():
    """Draw without a display, and forget the figures."""
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_no_notebook_keeps_outputs(notebook):
    assert not [cell for cell in _cells(notebook) if cell.get("outputs")]


def test_compare_runs_lists_and_plots_every_run(runs, capsys):
    namespace = _run(next(path for path in NOTEBOOKS if path.name == "compare_runs.ipynb"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == [
        "run",
        "sweeps/earlier/0",
        "sweeps/earlier/1",
    ]
    assert "+1.30" in lines[1] and "-25.00" in lines[1] and "width" in lines[1]
    assert "nan" in lines[2] and "none" in lines[2]
    assert "1 has no place in the plot" in lines[3]
    axes = namespace["axes"]
    assert [text.get_text() for text in axes.texts] == ["0"]
    assert axes.get_legend_handles_labels()[1] == ["allowed +5 %", "width | none"]


def test_runs_that_differ_in_their_seed_share_a_label(tmp_path, monkeypatch):
    for seed in range(3):
        folder = tmp_path / "outputs" / str(seed)
        folder.mkdir(parents=True)
        summary = _summary(expansion=["width"], rise=0.01, change_of_new=-0.2) | {"seed": seed}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    axes = _run(next(p for p in NOTEBOOKS if p.stem == "compare_runs"))["axes"]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]
    assert axes.get_legend_handles_labels()[1].count("width | none") == 1


def test_compare_runs_takes_no_accuracy_for_a_loss(tmp_path, monkeypatch, capsys):
    """A skill that was learned (+100 points) is no rise of the loss; experts are in the label."""
    summary = _summary(expansion=[], rise=-0.05, change_of_new=-0.2)
    for scores, accuracy in ((summary["baseline"], 0.0), (summary["final"], 1.0)):
        for score in scores.values():
            score["accuracy"] = accuracy
    summary["experts"] = {"kind": "dylora", "number": 1}
    folder = tmp_path / "outputs" / "0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    _run(next(p for p in NOTEBOOKS if p.stem == "compare_runs"))
    line = capsys.readouterr().out.splitlines()[1]
    assert "-5.00" in line and "-20.00" in line and "dylora" in line


def test_compare_runs_says_when_there_is_nothing(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(AssertionError, match=r"no summary\.json"):
        _run(next(path for path in NOTEBOOKS if path.name == "compare_runs.ipynb"))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["first_expansion", "growing_network"])
def test_what_needs_no_run_says_what_it_promises(name, tmp_path, monkeypatch):
    """They assert what they claim: equal logits, gradients that follow, growth that is silent."""
    monkeypatch.chdir(tmp_path)
    namespace = _run(next(path for path in NOTEBOOKS if path.stem == name))
    assert matplotlib.pyplot.get_fignums()
    assert not any(tmp_path.iterdir())
    if name == "growing_network":
        losses = {run: values[-1] for run, (values, _) in namespace["runs"].items()}
        assert losses["grows"] < losses["stays"]


@pytest.mark.full
def test_a_stream_of_skills_is_told(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "outputs/runs/skills"
    folder.mkdir(parents=True)
    spawned = {"step": 7, "expert": "expert_1", "domain": "code", "score": 9.0, "threshold": 6.0}
    experts = {
        "names": ["base", "expert_1"],
        "spawned": [spawned, {"step": 9, "expert": "expert_2", "domain": "told"}],
        "usage": {"prose": {"base": 0.9, "expert_1": 0.1}, "code": {"expert_1": 1.0}},
        "usage_over_time": {"steps": [5, 10], "gates": {"base": [1, 0.2], "expert_1": [None, 0.8]}},
    }
    summary = _summary(expansion=[], rise=0.01, change_of_new=-0.25) | {"experts": experts}
    summary["final"] |= {"arc_easy": {"accuracy": 0.4}}
    summary["final"] = summary["baseline"]  # rolled back
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    _run(next(path for path in NOTEBOOKS if path.stem == "stream_of_skills"))
    out = capsys.readouterr().out
    assert "step    7  expert_1  learns code, novelty 9.0 against 6.0\n" in out
    assert "step    9  expert_2  learns told\n" in out
    assert "-25.0 %" in out
    summary["experts"] = {"kind": "single_lora", "names": ["expert_0"]}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(AssertionError, match="it was not run with experts=dylora"):
        _run(next(path for path in NOTEBOOKS if path.stem == "stream_of_skills"))


def test_own_files_are_taught_too(tmp_path, monkeypatch, capsys):
    """They have no accuracy; the skills of the notebook may be gone."""
    monkeypatch.setattr(
        "tritter.run", lambda *words: SimpleNamespace(status="kept", folder=tmp_path)
    )
    summary = _summary(expansion=[], rise=0.01, change_of_new=-0.25)
    summary["baseline"]["identity"] = summary["attempts"][0]["final"]["identity"] = {
        "accuracy": 0.4
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    notebook = next(path for path in NOTEBOOKS if path.stem == "teach_an_instruct_model")
    code = [cell for cell in _cells(notebook) if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    for cell in code[:-1]:  # the last one loads the checkpoint
        exec("".join(cell["source"]), namespace)
    assert capsys.readouterr().out == "identity   before 40%, plain 40%, careful 40%\n"
    assert set(namespace["changes"]) == {"plain", "careful"}


@pytest.mark.full
def test_the_python_functions_do_what_their_notebook_says(tmp_path, monkeypatch):
    """It asserts equal logits after an expansion, and less forgetting with a penalty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITTER_CACHE", str(tmp_path / "cache"))
    namespace = _run(next(path for path in NOTEBOOKS if path.stem == "python_api"))
    assert namespace["result"].status in ("kept", "undecided", "rolled_back")

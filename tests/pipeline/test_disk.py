"""Files of a run: linked weights, removed stages, published dtypes, bytes."""

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle
from tests.pipeline.plug import WORK
from tests.pipeline.test_experts_job import DYLORA
from tests.pipeline.tiny import FIXTURES, TINY
from tests.test_kill_safety import run_child
from tritter.checkpoints import Lineage
from tritter.checkpoints.history import Link
from tritter.cli import main
from tritter.config.launch.composition import load_config
from tritter.core.models import load_model, save_tokenizer
from tritter.data.documents import Document
from tritter.data.tokens import train_tokenizer
from tritter.evaluation.gate import Check
from tritter.pipeline import run as run_module
from tritter.pipeline import run_pipeline, trained
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.run import Run
from tritter.pipeline.verdict import Candidate
from tritter.storage import atomic
from tritter.terminal import Console

OWN = [word for word in TINY if not word.startswith("model.")]
NEW, OLD = FIXTURES / "text/new.jsonl", FIXTURES / "text/old"
WIDTH = ("expansion=width",)
TASKS = (f"data.tasks=[{NEW},{{again:{OLD}}}]", *WIDTH)
ROUTERS = ("expansion=[moe,moe_add]", "adaptation.router_max_steps=2")
ROUNDS = ("pipeline.target_params=40k",)
LADDER = (*WIDTH, "gate=default", "gate.ladder=gentler")
EXPERTS = ("expansion=none", "forgetting=none", *DYLORA)
RunJob = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 that was not written by Tritter."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    model = oracle.tiny_llama(vocab_size=280, initializer_range=0.05).to(torch.bfloat16)
    oracle.saved(model, folder)
    texts = " ".join(path.read_text() for path in sorted(OLD.glob("*")))
    tokenizer = train_tokenizer([Document("d", texts)], vocab_size=280)
    save_tokenizer(tokenizer, folder, end_of_text="<|endoftext|>")
    return folder


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> RunJob:
    def run_words(*words: str, name: str = "run", model: Path | None = None) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        start = [*TINY] if model is None else [*OWN, "model=hf", f"model.path={model}"]
        if any(word.startswith("data.tasks") for word in words):
            start = [word for word in start if not word.startswith("data.new")]
        outcome = run_pipeline(
            load_config([*start, f"cache_dir={cache}", *words]), run_folder=folder
        )
        return json.loads(outcome.summary_path.read_text())  # type: ignore[no-any-return]

    return run_words


def weight_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")):
            if (path.parent / "config.json").exists() or "experts" in path.parts:
                yield path


def num_bytes(*folders: Path) -> int:
    """Count the bytes of weights, each inode once."""
    return sum({p.stat().st_ino: p.stat().st_size for p in weight_files(*folders)}.values())


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Meter:
    """Peak bytes of weights in a folder, measured at every rename in it."""

    folder: Path
    peak: int = 0
    rewritten: list[str] = field(default_factory=list)
    is_on: bool = True
    _known: dict[int, tuple[Path, str]] = field(default_factory=dict)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in ("os.rename", "os.remove", "os.link", "open"):
            return
        place = str(arguments[0])
        if event == "open":
            is_write = any(c in str(arguments[1]) for c in "wa+") or bool(
                int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            )
            if is_write and place.endswith(".safetensors") and Path(place).exists():
                self.rewritten.append(place)
        elif str(self.folder) in place:
            self.is_on = False  # what is opened here is ours
            self.look()
            self.is_on = True

    def look(self) -> None:
        """Sample the size, and compare the content of each inode with earlier content."""
        self.peak = max(self.peak, num_bytes(self.folder))
        for path in weight_files(self.folder):
            found = path.stat().st_ino, digest(path)
            before = self._known.setdefault(found[0], (path, found[1]))
            if before[1] != found[1] and before[0].exists() and path.samefile(before[0]):
                self.rewritten.append(f"{path} has other bytes")


@contextmanager
def metered(folder: Path) -> Iterator[Meter]:
    meter = Meter(folder)
    sys.addaudithook(meter.hook)
    try:
        yield meter
        meter.look()
    finally:
        meter.is_on = False


def test_the_meter_sees_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    """Negative control of the next test."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    with metered(tmp_path) as meter:
        meter.look()
        path.write_bytes(b"1234")
        meter.look()
    assert meter.rewritten[0] == str(path) and meter.peak == 8
    assert f"{path} has other bytes" in meter.rewritten


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "is_given", "most"),
    [
        pytest.param(WIDTH, False, 2, id="float32 base"),
        pytest.param(WIDTH, True, 2, id="bfloat16 source"),
        pytest.param(ROUTERS, False, 2, id="router stage"),
        pytest.param(TASKS, False, 2, id="tasks"),
        # Later tasks start from float32: it and the float32 start of the last task come on top
        pytest.param(TASKS, True, 2.5, id="tasks of a bfloat16 source"),
        pytest.param(ROUNDS, False, 2, id="rounds"),
        pytest.param(EXPERTS, True, 2, id="dylora"),
    ],
)
def test_the_weights_of_a_run_take_twice_source_and_result(
    run: RunJob, source: Path, tmp_path: Path, words: tuple[str, ...], is_given: bool, most: float
) -> None:
    folder = tmp_path / "run"
    with metered(folder) as meter:
        summary = run(*words, model=source if is_given else None)
    use, parts = summary["disk"], [num_bytes(folder / n) for n in ("baseline", "checkpoint")]
    end = num_bytes(folder)
    print(f"DISK {words} peak {meter.peak / sum(parts):.2f} end {end / sum(parts):.2f} {use}")
    assert meter.rewritten == []
    assert meter.peak <= most * sum(parts)
    assert end <= 1.1 * sum(parts) and use["weights"]["end"] == end
    assert [use["weights"]["source"], use["weights"]["result"]] == parts
    assert use["weights"]["peak"] <= meter.peak
    kept = sum(path.stat().st_size for path in folder.glob("checkpoint/state/**/*.safetensors"))
    assert use["state"]["peak"] > use["state"]["end"] == kept


@pytest.mark.full
def test_a_run_that_is_rolled_back_ends_with_its_baseline_alone(
    run: RunJob, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each retry starts from the baseline."""
    original, folder = Candidate.checks, tmp_path / "run"

    def failed(*arguments: Any) -> list[Check]:
        return [replace(check, verdict="failed") for check in original(*arguments)]

    monkeypatch.setattr(Candidate, "checks", failed)
    with metered(folder) as meter:
        summary = run(*LADDER, model=source)
    assert summary["status"] == "rolled_back" and len(summary["attempts"]) > 1
    tried = max(2 * attempt["parameters"] for attempt in summary["attempts"])
    baseline, end = num_bytes(folder / "baseline"), num_bytes(folder)
    print(f"DISK {LADDER} peak {meter.peak / (baseline + tried):.2f}", summary["disk"])
    assert meter.rewritten == [] and meter.peak <= 2.05 * (baseline + tried)
    assert end == baseline == num_bytes(folder / "checkpoint")
    assert summary["disk"]["state"]["end"] == 0


@pytest.mark.full
def test_weights_are_linked_and_outlive_their_other_names(
    run: RunJob, cache: Path, tmp_path: Path
) -> None:
    run("pipeline.keep_stages=true")
    folder, name = tmp_path / "run", "model.safetensors"
    weights = {place: folder / place / name for place in ("baseline", "checkpoint")}
    before = {place: digest(path) for place, path in weights.items()}
    assert weights["checkpoint"].samefile(folder / "attempt_1/trained" / name)
    (cached,) = (p for p in cache.glob(f"bases/*/{name}") if p.samefile(weights["baseline"]))
    assert not (folder / "baseline/config.json").samefile(cached.parent / "config.json")
    shutil.rmtree(cached.parent)
    shutil.rmtree(folder / "attempt_1")
    run(name="again")  # trains the base model again
    assert {place: digest(path) for place, path in weights.items()} == before
    # A checkpoint of a run is the baseline of the next, and loses nothing to it
    run("model=hf", f"model.path={folder / 'checkpoint'}", name="next", model=folder / "checkpoint")
    assert weights["checkpoint"].samefile(tmp_path / "next/baseline" / name)
    shutil.rmtree(tmp_path / "next")
    assert {place: digest(path) for place, path in weights.items()} == before


@pytest.mark.full
def test_a_source_of_another_tool_is_copied(run: RunJob, source: Path, tmp_path: Path) -> None:
    """Another tool may overwrite its files in place."""
    run(*WIDTH, model=source)
    path = source / "model.safetensors"
    assert path.stat().st_nlink == 1
    assert not path.samefile(tmp_path / "run/baseline/model.safetensors")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_where_links_do_not_work_weights_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/model.safetensors").write_bytes(b"weights")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    atomic.copy_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "a/model.safetensors").stat().st_nlink == 1
    number = errno.ENOSPC
    with pytest.raises(OSError, match="no links"):
        atomic.link_or_copy(tmp_path / "a/model.safetensors", tmp_path / "c")


def context_of(folder: Path, cache: Path, *words: str) -> Run:
    config = load_config([*words, f"cache_dir={cache}"])
    return Run(config=config, folder=folder, console=Console(), ledger=Ledger(folder))


def losses(context: Run, model: torch.nn.Module) -> dict[str, float]:
    scores = context.data.scoring.score(model)
    return {name: each.mean() for name, each in scores.items()}


def means(context: Run, name: str) -> dict[str, float]:
    return {subject: each.mean() for subject, each in context.read_scores(name).items()}


@pytest.mark.full
def test_published_weights_have_the_dtype_of_the_source_and_are_what_is_scored(
    run: RunJob, source: Path, tmp_path: Path, cache: Path
) -> None:
    start = [*OWN, "model=hf", f"model.path={source}", *WIDTH]
    run(*WIDTH, "pipeline.keep_stages=true", model=source)
    run(*WIDTH, "pipeline.dtype=float32", name="whole", model=source)
    kept, whole = tmp_path / "run/checkpoint", tmp_path / "whole/checkpoint"
    assert dtypes(kept) == {torch.bfloat16} and dtypes(whole) == {torch.float32}
    assert dtypes(tmp_path / "run/attempt_1/expanded") == {torch.float32}
    assert json.loads((kept / "config.json").read_text())["dtype"] == "bfloat16"
    tensors, exact = (load_file(f / "model.safetensors") for f in (kept, whole))
    assert all(torch.equal(exact[name].to(torch.bfloat16), tensors[name]) for name in exact)
    assert [link.differences() for link in Link.chain(kept)] == [(), (), ()]
    context = context_of(tmp_path / "run", cache, *start)
    scored = means(context, "attempt_1-trained")
    assert losses(context, load_model(kept)) == scored
    assert losses(context, load_model(whole)) != scored  # the negative control


@pytest.mark.full
def test_later_tasks_start_from_unrounded_weights_and_each_is_scored_as_rounded(
    run: RunJob, source: Path, tmp_path: Path, cache: Path
) -> None:
    run(*TASKS, "pipeline.keep_stages=true", model=source)
    folder = tmp_path / "run"
    first, last = folder / "attempt_1/trained", folder / "attempt_1_task_2/trained"
    assert dtypes(first) == {torch.float32} and dtypes(last) == {torch.bfloat16}
    assert Lineage.of(last).parent_hash == Lineage.of(first).model_hash
    words = [word for word in OWN if not word.startswith("data.new")]
    context = context_of(folder, cache, *words, "model=hf", f"model.path={source}", *TASKS)
    scored, model = means(context, "attempt_1-trained"), load_model(first)
    assert losses(context, model) != scored
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert losses(context, model) == scored


@pytest.mark.full
def test_a_round_that_is_rolled_back_publishes_the_rounded_one_before(
    run: RunJob, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Candidate.checks

    def checks(candidate: Candidate) -> list[Check]:
        answer = "failed" if candidate.branches[0].name == "round_2" else "passed"
        return [replace(check, verdict=answer) for check in original(candidate)]

    monkeypatch.setattr(Candidate, "checks", checks)
    words = ("pipeline.target_params=120k", "gate=default", "pipeline.keep_stages=true")
    summary = run(*words, model=source)
    kept, first = tmp_path / "run/checkpoint", tmp_path / "run/round_1/trained"
    assert summary["status"] == "rolled_back"
    tensors, exact = (load_file(f / "model.safetensors") for f in (kept, first))
    assert dtypes(first) == {torch.float32}
    assert all(torch.equal(exact[name].to(torch.bfloat16), tensors[name]) for name in exact)
    chain = Link.chain(kept)
    assert len(chain) == 3 and not any(link.differences() for link in chain)


class Killed(BaseException):
    """Simulates a kill: no code catches it."""


def end_after(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, is_before: bool) -> None:
    """Kill the run at a function call, before or after the call."""
    original = getattr(owner, name)

    def ended(*arguments: Any, **options: Any) -> Any:
        if not is_before:
            original(*arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, ended)


@pytest.mark.full
@pytest.mark.parametrize(
    ("owner", "name", "is_before"),
    [
        pytest.param(trained, "_unlink_weights", False, id="start removed, result not written"),
        pytest.param(Run, "accept", True, id="result written, not verified"),
        pytest.param(run_module, "_strip", True, id="marked, not removed"),
        pytest.param(run_module, "_strip", False, id="one removed"),
    ],
)
def test_a_run_that_ends_around_a_removal_goes_on_to_the_same_files(
    run: RunJob, source: Path, tmp_path: Path, owner: Any, name: str, is_before: bool
) -> None:
    whole = run(*WIDTH, name="whole", model=source)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        end_after(owner, name, patch, is_before=is_before)
        run(*WIDTH, model=source)
    summary = run(*WIDTH, model=source)
    assert summary["final"] == whole["final"]
    places = [tmp_path / name / "checkpoint/model.safetensors" for name in ("whole", "run")]
    assert digest(places[0]) == digest(places[1])
    weights = [{p.relative_to(f.parents[1]) for p in weight_files(f.parents[1])} for f in places]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "run/attempt_1").glob("*_again"))


@pytest.mark.full
def test_a_run_that_ends_amid_the_removal_of_its_saved_state_goes_on(
    run: RunJob, source: Path, tmp_path: Path
) -> None:
    whole = run(*WIDTH, name="whole", model=source)

    def torn(folder: Path) -> None:
        (folder / "saved/checkpoint.json").unlink()
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("tritter.pipeline.stages.fit.discard_saved", torn)
        run(*WIDTH, model=source)
    assert run(*WIDTH, model=source)["final"] == whole["final"]
    assert not (tmp_path / "run/attempt_1/saved").exists()


@pytest.mark.full
def test_a_deleted_result_is_made_again_from_the_start(run: RunJob, tmp_path: Path) -> None:
    run()
    kept = tmp_path / "run/checkpoint"
    before = digest(kept / "model.safetensors")
    shutil.rmtree(kept)
    run()
    assert digest(kept / "model.safetensors") == before
    assert not list((tmp_path / "run/attempt_1").rglob("*.safetensors"))


@pytest.mark.full
def test_history_reports_a_removed_parent(
    run: RunJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    folder = tmp_path / "run"
    assert not list((folder / "attempt_1").rglob("*.safetensors"))
    capsys.readouterr()
    history = ["history", str(folder / "checkpoint"), "--verify"]
    assert main([*history, "--json"]) == 0
    chain = json.loads(capsys.readouterr().out)["chain"]
    assert [each["state"] for each in chain] == ["intact", "removed", "intact"]
    assert chain[1]["made_by"] == "width, weights removed" and chain[1]["parameters"] > 0
    assert main(history) == 0
    assert "1 removed by their run" in " ".join(capsys.readouterr().out.split())
    # The negative control: weights that are gone without the mark of a run
    ledger = json.loads((folder / "ledger.json").read_text())
    del ledger["removed"]
    (folder / "ledger.json").write_text(json.dumps(ledger))
    assert main([*history, "--json"]) != 0


@pytest.mark.full
def test_keep_stages_keeps_them_and_may_be_changed_on_the_way(run: RunJob, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        end_after(trained, "_unlink_weights", patch, is_before=False)
        run()
    run("pipeline.keep_stages=true")
    stages = sorted(
        path.parent.name for path in (tmp_path / "run/attempt_1").glob("*/*.safetensors")
    )
    assert stages == ["expanded", "trained"]


def die_at_removal(number: int, folder: Path) -> None:
    """Kill this process just before it removes the `number`-th weight file in a folder."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        is_ours = event == "os.remove" and str(folder) in str(arguments[0])
        if is_ours and str(arguments[0]).endswith((".safetensors", "tokenizer.json")):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


@pytest.mark.slow
def test_a_run_killed_at_any_removal_goes_on_to_the_same_files(
    run: RunJob, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with SIGKILL at every removal after the expansion in turn."""
    words = (*TASKS, "evaluation.sample_tokens=0")
    run(*words, name="whole", model=source)
    expected = digest(tmp_path / "whole/checkpoint/model.safetensors")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        end_after(*WORK["fit"], patch, is_before=True)
        run(*words, name="expanded", model=source)
    for number in range(100):
        folder = tmp_path / "run"
        shutil.copytree(tmp_path / "expanded", folder)

        def work(number: int = number, folder: Path = folder) -> None:
            die_at_removal(number, folder)
            run(*words, model=source)

        has_died = run_child(work) == -signal.SIGKILL
        assert run_child(lambda: run(*words, model=source) and None) == 0
        assert digest(folder / "checkpoint/model.safetensors") == expected, number
        assert set(weight_files(folder)) == {
            folder / name / "model.safetensors" for name in ("baseline", "checkpoint")
        }
        shutil.rmtree(folder)
        if not has_died:
            assert number == 3  # the expanded model, and the trained one of each task
            return
    raise AssertionError("it never ended")

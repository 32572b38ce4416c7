"""What a dry run says of disk and memory is what the result takes; what can't fit is refused."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cli.conftest import Run, snapshot
from tests.oracle import stock
from tests.real import real_checkpoint
from tritter.checkpoints.state import write_state
from tritter.storage.writer import TensorStream


@pytest.fixture
def trained(place: Path) -> Path:
    """The base with state beside it."""
    values = {name: torch.zeros_like(value) for name, value in stock("base").state_dict().items()}
    kinds = {kind: TensorStream.of(values.items()) for kind in ("exp_avg", "exp_avg_sq", "fisher")}
    write_state(place / "base", kinds, step=3)
    return place


def bytes_of(folder: Path) -> int:
    return sum(len(content) for content in snapshot(folder).values())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "words",
    [
        "--method width",
        "--method width --dtype bfloat16",
        "--method dus",
        "--method moe,llama-pro",
    ],
)
def test_what_is_told_is_what_it_takes(run: Run, trained: Path, words: str) -> None:
    told = run(f"expand --checkpoint base --output out --dry-run --json {words}").json["disk"]
    assert not (trained / "out").exists()
    assert run(f"expand --checkpoint base --output out --no-measure {words}").code == 0
    taken = bytes_of(trained / "out")
    weights = (trained / "out/model.safetensors").stat().st_size
    state = bytes_of(trained / "out/state")
    # Beside the tensors lie headers and names, which are estimated from above
    assert weights - 512 * 100 < told["weights_bytes"] < weights
    assert state - 512 * 300 < told["state_bytes"] < state
    assert taken <= told["needed_bytes"] < taken + 512 * 400 + 2**16
    assert told["free_bytes"] == pytest.approx(shutil.disk_usage(trained).free, rel=0.2)


def test_a_full_disk_is_seen_before_the_first_byte(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("expand --checkpoint base --output old --method dus").code == 0
    words = "expand --checkpoint base --method width --output"
    needed = run(f"{words} deep/er/out --dry-run --json").json["disk"]["needed_bytes"]
    asked: list[Path] = []

    def usage(free: int) -> None:
        def of(folder: Path) -> SimpleNamespace:
            asked.append(Path(folder))
            return SimpleNamespace(total=10**9, used=0, free=free)

        monkeypatch.setattr(shutil, "disk_usage", of)

    before = snapshot(trained)
    usage(needed - 1)
    for output in ("deep/er/out", "old --overwrite"):
        result = run(f"{words} {output}")
        assert result.code == 2
        assert "the result takes" in result.err and "are free on the disk" in result.err
        assert snapshot(trained) == before and not (trained / "deep").exists()
    assert asked[0] == trained  # of the folder that will hold it there is nothing yet
    told = " ".join(run(f"{words} out --dry-run").out.split())
    assert f"{(needed - 1) / 1e6:.3g} MB free" in told
    assert "refused out: the result takes" in told
    usage(needed)
    assert run(f"{words} out").code == 0
    assert "refused" not in run(f"{words} other --dry-run").out


def test_a_disk_that_says_nothing_is_tried(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    words = "expand --checkpoint base --method width"
    assert "unknown" in run(f"{words} --dry-run").out
    assert run(words).code == 0


def test_memory_is_told_and_grows_with_what_has_to_be_whole(run: Run, place: Path) -> None:
    def told(words: str) -> tuple[int, list[str]]:
        dry = f"expand --checkpoint base --dry-run --no-measure {words}"
        line = next(line for line in run(dry).out.splitlines() if line.startswith("memory"))
        return run(f"{dry} --json").json["memory_bytes"], line.split()

    wide = "--method width --hidden-size 9600 --intermediate-size 32000"
    deep, words = told("--method llama-pro --target-layers 6")
    assert words[:3] == ["memory", "at", "most"]
    rows, largest = told(wide)[0], 4 * 32000 * 9600
    # Rows of it are made one after the other; what a second map is applied to is whole
    assert rows - deep < largest / 10
    whole = told(wide.replace("width", "width,moe", 1))[0]
    assert 2 * largest < whole - rows < 50 * largest
    checked = run("expand base --method llama-pro --target-layers 6 --dry-run --json").json
    assert 2e8 < checked["memory_bytes"] - deep < 5e8
    # The check comes after the writing: it is named only if it takes more
    dry = "expand base --dry-run --method"
    assert "step-0" in run(f"{dry} llama-pro").out
    assert "step-0" not in run(f"{dry} {wide.removeprefix('--method ')} --width-init aki").out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_memory_told_is_what_a_real_checkpoint_takes(tmp_path: Path, name: str) -> None:
    """SmolLM2: 556 MB told, 426 MB taken; Gemma 3, whose vocabulary is large: 556 and 456 MB."""
    words = ["expand", str(real_checkpoint(name)), "--method", "llama-pro", "--output"]
    program = [sys.executable, "-c", "import sys; from tritter.cli import main; sys.exit(main())"]
    dry = [*program, *words, str(tmp_path / "grown"), "--dry-run", "--json"]
    # What is told begins with the peak of the process, which a child inherits: a small shell's here
    small = ["sh", "-c", '"$@"; exit $?', "sh", *dry]
    told = json.loads(subprocess.run(small, capture_output=True, check=True).stdout)
    process = subprocess.Popen([*program, *words, str(tmp_path / "grown")])
    taken = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if (found := re.search(r"RssAnon:\s+(\d+) kB", status)) is not None:
            taken = max(taken, 1024 * int(found[1]))
        time.sleep(0.01)
    assert process.returncode == 0
    assert 0.7 * told["memory_bytes"] < taken < told["memory_bytes"]


@pytest.mark.slow
def test_the_shift_of_a_real_checkpoint_is_below_bfloat16(run: Run, tmp_path: Path) -> None:
    """Random tokens, 576 → 768: 0.025 σ and 3.8e-4 nats; the yardstick: 0.070 σ and 4.3e-3."""
    words = f"expand {real_checkpoint('smollm2')} --output {tmp_path}"
    wide = " ".join(run(f"{words}/wide --method width --hidden-size 768").out.split())
    numbers = [float(n) for n in re.findall(r"(?:square|KL|gives) ([-+.e\d]+)", wide)]
    rms, divergence, rms_of_bfloat16, divergence_of_bfloat16 = numbers
    assert 0.01 < rms < 0.5 * rms_of_bfloat16 < 0.05
    assert 1e-4 < divergence < 0.2 * divergence_of_bfloat16 < 1e-3
    deep = " ".join(run(f"{words}/deep --method llama-pro").out.split())
    assert "logit shift at most 0.0e+00 σ on random tokens" in deep

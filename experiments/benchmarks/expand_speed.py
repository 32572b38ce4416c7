"""How fast an expansion writes, beside `cp` of its result and beside mergekit's passthrough.

    python experiments/benchmarks/expand_speed.py --mergekit /path/to/python-with-mergekit

writes a synthetic bf16 Llama, expands it in processes of their own and prints a row per case and
contender. In each round all contenders of a case follow each other, and ratios are taken within
the round: what else runs on the machine then hits them alike. Every time ends when the bytes are
on the disk. That of the library's `expand` and of mergekit begins after the imports; that of the
whole command, `tritter expand`, with the process, and ends with it. mergekit is asked for the
layers that `dus` takes, and has to come to the same tensors; as it hashes nothing, Tritter is
measured beside it without hashing, too.

The first byte: weights are mapped from their files, so the command has begun to read them when
/proc/PID/smaps says that a megabyte of the source's files is in its memory; headers are smaller.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from experiments.benchmarks.streaming import (  # noqa: E402
    MEGABYTE,
    Measured,
    copy_seconds,
    memory_mb,
    sampled,
    wait_for_disk,
    write_source,
)
from experiments.benchmarks.table import tell  # noqa: E402

SHARD_BYTES = 500 * MEGABYTE
# Layers · FFN × 1.5 by copies · hidden size × 1.5, fresh · four experts a layer
CASES = ("dus", "ffn", "width", "moe")
WHOLE, UNCHECKED = "whole command", "whole command, unchecked"
POLL_SECONDS = 0.02  # to look through the mappings of a process that imports slows it down


@dataclass(frozen=True, slots=True)
class Row:
    """One contender of one case: medians over the rounds, memory the largest.

    Args:
        cpu_seconds: processor time, which other jobs on the machine change least.
        cpu_seconds_per_gb: of the result.
        over_cp: seconds over those of `cp` of the result in the same round; lowest and highest
            beside it.
        first_byte_seconds: from the start of a whole command to the first reading of weights.
        own_mb: anonymous memory beyond what its imports take, where these are known.
        anonymous_mb: all of it.
    """

    case: str
    contender: str
    result_mb: int
    seconds: float
    cpu_seconds: float
    cpu_seconds_per_gb: float
    over_cp: float
    over_cp_lowest: float
    over_cp_highest: float
    first_byte_seconds: float | None
    own_mb: int | None
    anonymous_mb: int
    rounds: int


@dataclass(frozen=True, slots=True)
class WholeCommand:
    """What one run of `tritter expand` took."""

    measured: Measured
    first_byte_seconds: float | None


# What runs in the children


def run_tritter(source: Path, destination: Path, case: str, *, is_hashed: bool) -> None:
    from tritter.core.expansions import Dus, ExpansionSpec, Moe, Width
    from tritter.storage import hashing, writer
    from tritter.transform import expand, plan_expansion

    config = json.loads((source / "config.json").read_text())
    specs: dict[str, ExpansionSpec] = {
        "dus": Dus(),
        "ffn": Width(intermediate_size=config["intermediate_size"] * 3 // 2, init="net2net"),
        "width": Width(hidden_size=config["hidden_size"] * 3 // 2),
        "moe": Moe(num_experts=4),
    }
    plan_expansion(source, [specs[case]])  # transformers imports some of itself at first use
    if not is_hashed:
        hashing.tensor_digest = lambda name, tensor: 64 * "0"
        writer.start_digest = lambda name, dtype, shape: _NoDigest()
    with _timed():
        expand(source, destination, [specs[case]], max_shard_bytes=SHARD_BYTES)


def run_mergekit(source: Path, destination: Path, layer_sources: Sequence[int]) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    sources = [{"model": str(source), "layer_range": span} for span in spans(layer_sources)]
    merge = MergeConfiguration.model_validate(
        {
            "merge_method": "passthrough",
            "dtype": "bfloat16",
            "slices": [{"sources": [entry]} for entry in sources],
        }
    )
    options = MergeOptions(out_shard_size=SHARD_BYTES, copy_tokenizer=False, quiet=True)
    with _timed():
        run_merge(merge, str(destination), options)
        wait_for_disk(destination)


class _NoDigest:
    """Stands in for SHA-256."""

    def update(self, part: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return 64 * "0"


class _timed:
    """Tell the parent that everything is imported, wait for its word, and say how long it took."""

    def __enter__(self) -> None:
        print("ready", flush=True)
        sys.stdin.readline()
        self._started = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            print(time.perf_counter() - self._started, flush=True)
            sys.stdin.readline()


def spans(layer_sources: Sequence[int]) -> list[list[int]]:
    """Return the runs of neighbouring layers as [first, behind the last]."""
    cuts = [at for at, (a, b) in enumerate(pairwise(layer_sources), start=1) if b != a + 1]
    bounds = [0, *cuts, len(layer_sources)]
    return [[layer_sources[a], layer_sources[b - 1] + 1] for a, b in pairwise(bounds)]


# The parent


def benchmark(
    *, megabytes: int, place: Path, cases: Sequence[str], rounds: int, mergekit: str | None
) -> Iterator[Row]:
    """Measure each case, contenders in turn."""
    source, result = place / "source", place / "result"
    write_source(source, megabytes=megabytes, hidden_size=1024 if megabytes >= 100 else 256)
    for case in cases:
        contenders = ["tritter", WHOLE, UNCHECKED]
        if case == "dus" and mergekit is not None:
            contenders += ["tritter without hashing", "mergekit"]
            check_same(source, place, mergekit=mergekit)
        runs: dict[str, list[Measured]] = {name: [] for name in ("cp", *contenders)}
        first_bytes: dict[str, list[float]] = {WHOLE: [], UNCHECKED: []}
        for number in range(rounds):
            for at in range(len(contenders)):
                name = contenders[(at + number) % len(contenders)]
                if name in first_bytes:
                    ran = run_command(source, result, case, is_checked=name == WHOLE)
                    runs[name].append(ran.measured)
                    first_bytes[name].append(ran.first_byte_seconds)
                else:
                    runs[name].append(sampled(_command(name, source, result, case, mergekit)))
                if at < len(contenders) - 1:
                    shutil.rmtree(result)
            result_mb = sum(path.stat().st_size for path in result.iterdir()) // MEGABYTE
            runs["cp"].append(_copy(result, place / "copy"))
            shutil.rmtree(result)
        yield from _rows(case, runs, first_bytes, result_mb)
    shutil.rmtree(source)


def check_same(source: Path, place: Path, *, mergekit: str) -> None:
    """Refuse to compare programs that come to different tensors."""
    from tritter.storage.hashing import tensor_digest
    from tritter.storage.tensors import TensorFolder

    digests = []
    for name in ("tritter", "mergekit"):
        sampled(_command(name, source, place / name, "dus", mergekit))
        held = TensorFolder.open(place / name)
        digests.append({key: tensor_digest(key, held.get(key)) for key in held.files})
        shutil.rmtree(place / name)
    if digests[0] != digests[1]:
        raise RuntimeError("mergekit and Tritter wrote different tensors")


def case_words(source: Path, case: str) -> list[str]:
    """Return the options of `tritter expand` that mean a case."""
    config = json.loads((source / "config.json").read_text())
    return {
        "dus": "--method dus",
        "ffn": f"--method width --width-init net2net --intermediate-size "
        f"{config['intermediate_size'] * 3 // 2}",
        "width": f"--method width --hidden-size {config['hidden_size'] * 3 // 2}",
        "moe": "--method moe --num-experts 4",
    }[case].split()


def run_command(source: Path, result: Path, case: str, *, is_checked: bool) -> WholeCommand:
    """Run `tritter expand` as a person would, and look at it from outside until it ends."""
    options = [f"--max-shard-size={SHARD_BYTES}", "--measure" if is_checked else "--no-measure"]
    ran = run_words(source, result, [*case_words(source, case), *options])
    if ran.first_byte_seconds is None:
        raise RuntimeError(f"{case} read its source between two looks; take a larger one")
    return ran


def run_words(source: Path, result: Path, words: Sequence[str]) -> WholeCommand:
    """Run `tritter expand` with some options; see `run_command`."""
    places = ["--checkpoint", str(source), "--output", str(result)]
    command = [sys.executable, "-m", "tritter", "expand", *places, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began, first_byte, peak, resident = time.perf_counter(), None, 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            used = memory_mb(process.pid)
            peak = max(peak, used.get("RssAnon", 0))
            resident = max(resident, used.get("VmHWM", 0))
            if first_byte is None and _has_read(process.pid, source):
                first_byte = time.perf_counter() - began
            time.sleep(POLL_SECONDS)
        seconds, (_, status, usage) = time.perf_counter() - began, ended
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return WholeCommand(Measured(seconds, cpu, 0, peak, resident), first_byte)


def _has_read(process: int, source: Path) -> bool:
    """Return whether a megabyte of the source's files is in a process's memory."""
    try:
        text = Path(f"/proc/{process}/smaps").read_text()
    except OSError:  # it has ended
        return False
    resident = 0
    is_of_source = False
    for line in text.splitlines():
        if "-" in line.partition(" ")[0]:  # begin-end of a mapping, and its file
            is_of_source = str(source) in line and line.endswith(".safetensors")
        elif is_of_source and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident >= MEGABYTE


def _command(
    contender: str, source: Path, result: Path, case: str, mergekit: str | None
) -> list[str]:
    program = sys.executable
    what = case
    if contender == "mergekit":
        from tritter.core.expansions import Dus
        from tritter.transform import plan_expansion

        assert mergekit is not None
        program = mergekit
        (step,) = plan_expansion(source, [Dus()]).steps
        what = json.dumps(list(step.parameter_map.layer_sources))
    return [program, __file__, "--child", contender, str(source), str(result), what]


def _copy(result: Path, copy: Path) -> Measured:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = copy_seconds(result, copy)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu, 0, 0, 0)


def _rows(
    case: str,
    runs: dict[str, list[Measured]],
    first_bytes: dict[str, list[float]],
    result_mb: int,
) -> Iterator[Row]:
    copies = [run.seconds for run in runs["cp"]]
    for name, measured in runs.items():
        ratios = [run.seconds / copy for run, copy in zip(measured, copies, strict=True)]
        cpu = statistics.median(run.cpu_seconds for run in measured)
        own = max(run.peak_anonymous_mb - run.idle_anonymous_mb for run in measured)
        first = first_bytes.get(name)
        yield Row(
            case=case,
            contender=name,
            result_mb=result_mb,
            seconds=round(statistics.median(run.seconds for run in measured), 2),
            cpu_seconds=round(cpu, 2),
            cpu_seconds_per_gb=round(1000 * cpu / max(result_mb, 1), 2),
            over_cp=round(statistics.median(ratios), 2),
            over_cp_lowest=round(min(ratios), 2),
            over_cp_highest=round(max(ratios), 2),
            first_byte_seconds=None if first is None else round(statistics.median(first), 2),
            own_mb=own if first is None else None,
            anonymous_mb=max(run.peak_anonymous_mb for run in measured),
            rounds=len(measured),
        )


def _run_child(contender: str, source: Path, result: Path, what: str) -> None:
    if contender == "mergekit":
        run_mergekit(source, result, json.loads(what))
    else:
        run_tritter(source, result, what, is_hashed=contender == "tritter")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--mergekit", help="Python in whose environment mergekit is installed")
    parser.add_argument("--output", type=Path, help="CSV file for the rows")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender, source, result, what = options.child
        _run_child(contender, Path(source), Path(result), what)
        return
    with tempfile.TemporaryDirectory(prefix="tritter-speed-") as place:
        rows = benchmark(
            megabytes=options.megabytes,
            place=Path(place),
            cases=options.cases,
            rounds=options.rounds,
            mergekit=options.mergekit,
        )
        tell(map(asdict, rows), options.output)


if __name__ == "__main__":
    main()
